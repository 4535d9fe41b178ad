"""A page in one file: tables whose numbers say where they come from, cards and pictures.

These are pure functions from text and numbers to HTML.

The page asks nobody for anything: no script, no font, no picture from elsewhere, and its own policy
forbids them. Every text that is not markup of this module passes `esc`.
"""

import html
import importlib.resources
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

# Colours of runs, r0 to r5, are Okabe and Ito's; of classes, k0 to k9, Paul Tol's muted scheme and
# an orange. Both are told apart by colour-blind readers; the dark page has lighter kinds of those
# that would sink into it.
CSS = importlib.resources.files('palm_jax.report').joinpath('page.css').read_text()
LONG = 34  # letters; a longer text is broken into lines within its cell


class Cell(NamedTuple):
  """A number of a file, as it is shown."""

  text: str
  run: str = ''  # name of the workdir
  file: str = ''  # in the workdir
  at: str = ''  # JSON pointer (RFC 6901) of the value
  spread: str = ''  # that of what stands behind the +-
  exact: str = ''  # all its digits
  share: float | None = None  # in [0, 1]: length of the bar beneath


# (title, number, what it is, [(name, number)] to compare with).
Headline = tuple[str, str | Cell, str, Sequence[tuple[str, str | Cell]]]


class Row(NamedTuple):
  """A row of a table."""

  cells: list[str | Cell]
  kind: str = ''  # 'strong' or 'paper'


def esc(text: Any) -> str:
  """Text as HTML."""
  return html.escape(str(text))


def document(title: str, head: str, sections: Sequence[tuple[str, str, str]], foot: str) -> str:
  """The whole page.

  Args:
    title: text.
    head: HTML beneath the title.
    sections: [(id, title, HTML)].
    foot: HTML.
  """
  nav = ''.join(f'<a href="#{name}">{esc(heading)}</a>' for name, heading, _ in sections)
  body = ''.join(
    f'<section id="{name}"><h2>{esc(heading)}</h2>{content}</section>'
    for name, heading, content in sections
  )
  return (
    '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width,initial-scale=1">'
    '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
    "style-src 'unsafe-inline'\">"
    f'<title>{esc(title)}</title><style>\n{CSS.rstrip()}</style></head><body>'
    f'<header><h1>{esc(title)}</h1>{head}<nav aria-label="Sections">{nav}</nav></header>'
    f'<main>{body}</main><footer class="soft">{foot}</footer></body></html>\n'
  )


def mark(cell: str | Cell, tag: str, classes: str = '') -> str:
  """An element that shows a cell, and on hovering where its number stands."""
  classes = f' class="{classes}"' if classes else ''
  if not isinstance(cell, Cell):
    return f'<{tag}{classes}>{esc(cell)}</{tag}>'
  spread = f' data-spread="{esc(cell.spread)}"' if cell.spread else ''
  bar = ''
  if cell.share is not None:
    bar = f'<i style="width:{100 * min(max(cell.share, 0), 1):.1f}%"></i>'
  title = f'{cell.file} {cell.at} = {cell.exact}'
  return (
    f'<{tag}{classes} data-run="{esc(cell.run)}" data-file="{esc(cell.file)}" '
    f'data-at="{esc(cell.at)}"{spread} title="{esc(title)}">{esc(cell.text)}{bar}</{tag}>'
  )


def table(
  caption: str,
  header: Sequence[str],
  rows: Iterable[Row],
  source: str,
  notes: str = '',
  texts: int = 1,
) -> str:
  """A table in its own scrolling box, with where it comes from beneath.

  Args:
    caption: text.
    header: texts.
    rows: the first cell of each is its header.
    source: text.
    notes: HTML beneath: the protocol.
    texts: how many columns at the left hold words.
  """
  head = ''.join(_header(text, i < texts) for i, text in enumerate(header))
  body = ''.join(_line(row, texts) for row in rows)
  # The caption stands outside of the box that scrolls, or it would be cut at its edge.
  return (
    f'<figure><div class="box"><h3>{esc(caption)}</h3><div class="scroll" tabindex="0" '
    f'role="region" aria-label="{esc(caption)}"><table aria-label="{esc(caption)}">'
    f'<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></div>'
    f'<figcaption class="from">{esc(source)}</figcaption>{notes}</figure>'
  )


def _header(text, left):
  classes = ' class="l"' if left else ''
  return f'<th scope="col"{classes}>{esc(text)}</th>'


def _line(row, texts):
  first, *rest = row.cells
  long = ' long' if len(first) > LONG else ''
  cells = ''.join(mark(cell, 'td', _classes(cell, i < texts)) for i, cell in enumerate(rest, 1))
  kind = f' class="{row.kind}"' if row.kind else ''
  return f'<tr{kind}><th scope="row" class="l{long}">{esc(first)}</th>{cells}</tr>'


def _classes(cell, left):
  text = cell.text if isinstance(cell, Cell) else cell
  return ' '.join(['l'] * left + ['long'] * (len(text) > LONG))


def details(summary: str, content: str, classes: str = 'fold') -> str:
  """Content that is hidden until its summary is clicked."""
  return f'<details class="{classes}"><summary>{esc(summary)}</summary>{content}</details>'


def facts(pairs: Iterable[tuple[str, str]]) -> str:
  """Names and values beneath each other."""
  content = ''.join(f'<dt>{esc(name)}</dt><dd>{esc(value)}</dd>' for name, value in pairs)
  return f'<dl class="facts">{content}</dl>'


def card(
  title: str, parts: Iterable[tuple[str, str | Cell, str, Sequence[tuple[str, str | Cell]]]]
) -> str:
  """Headline numbers of one kind.

  Args:
    title: text.
    parts: [(whose, number, what it is, [(name, number)] to compare with)]; `whose` may be empty.
  """
  body = ''
  for whose, cell, what, others in parts:
    body += f'<p class="who">{esc(whose)}</p>' if whose else ''
    body += f'<div class="big">{mark(cell, "span")} <small>{esc(what)}</small></div><dl>'
    body += ''.join(f'<dt>{esc(name)}</dt>{mark(other, "dd")}' for name, other in others) + '</dl>'
  return f'<div class="card"><h3>{esc(title)}</h3>{body}</div>'


def picture(uri: str, alt: str, caption: str, classes: str = '', moves: bool = False) -> str:
  """A picture within the page.

  Args:
    uri: a data: address.
    alt: text.
    caption: HTML.
    classes: of the image.
    moves: a film, which can be hidden.
  """
  image = f'<img src="{esc(uri)}" alt="{esc(alt)}" class="{classes}">'
  if moves:
    return f'<figure><details open><summary>{caption}</summary>{image}</details></figure>'
  return f'<figure>{image}<figcaption>{caption}</figcaption></figure>'
