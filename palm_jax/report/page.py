"""A page in one file: tables whose numbers say where they come from, charts and pictures. Pure
functions of text and numbers.

The page asks nobody for anything: no script, no font, no picture from elsewhere, and its own policy
forbids them. Every text that is not markup of this module passes `esc`.
"""

import html
import math
from typing import NamedTuple

WIDTH, HEIGHT = 320, 180  # a chart's own units
LEFT, RIGHT, TOP, BOTTOM = 46, 18, 10, 24  # margins within them
MAP = 420  # side of a map
NUM_RUN_STYLES, NUM_CLASS_COLOURS = 6, 10

# Runs: Okabe and Ito's colours; classes: Paul Tol's muted scheme and an orange. Both are told apart
# by colour-blind readers; the dark page has lighter kinds of those that would sink into it.
CSS = (
  """
:root{color-scheme:light dark;--bg:#f7f6f3;--card:#fff;--ink:#1f2429;--soft:#5b646e;--line:#e2dfd8;--accent:#1f5f8f;--bar:#c9dcea;
--note:#fff3d6;--r0:#0072b2;--r1:#d55e00;--r2:#00805f;--r3:#b3568b;--r4:#7a6a00;--r5:#3b3b98;
--k0:#cc6677;--k1:#332288;--k2:#c2a93b;--k3:#117733;--k4:#5fb3dd;--k5:#882255;--k6:#44aa99;--k7:#80802a;--k8:#aa4499;--k9:#ee7733}
@media(prefers-color-scheme:dark){:root{--bg:#121518;--card:#1b1f24;--ink:#e5e8eb;--soft:#9ba5b0;--line:#2f363d;--accent:#8fc1e8;
--bar:#2c4a63;--note:#3a3015;--r0:#56b4e9;--r1:#f58a3c;--r2:#2fc79c;--r3:#e39ac4;--r4:#e0cf4f;--r5:#a3a3f5;
--k0:#e58a98;--k1:#8f7ff0;--k2:#ddcc77;--k3:#3fb865;--k4:#88ccee;--k5:#d65a94;--k6:#5cc9b6;--k7:#b5b54a;--k8:#d07fc4;--k9:#ff9a55}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;text-size-adjust:100%}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main,header,footer{max-width:1180px;margin:0 auto;padding:0 20px;overflow-wrap:anywhere}
h1{font-size:1.9rem;line-height:1.2;margin:32px 0 14px}
h2{font-size:1.25rem;margin:44px 0 10px;padding-top:14px;border-top:1px solid var(--line)}
h3{font-size:1rem;margin:22px 0 8px}
p{margin:6px 0 12px;max-width:78ch}
a{color:var(--accent)}
nav{display:flex;flex-wrap:wrap;gap:4px 16px;margin:14px 0 6px;font-size:.9rem}
nav a{text-decoration:none}
nav a:hover,nav a:focus{text-decoration:underline}
small,.soft,figcaption,summary{color:var(--soft);font-size:.84rem}
figure{margin:0 0 18px}
.note{background:var(--note);border-radius:8px;padding:8px 12px;margin:10px 0;font-size:.9rem}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(340px,100%),1fr));gap:14px;margin:16px 0}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:14px 16px;min-width:0}
.card h3{margin:0 0 4px;font-size:.86rem;font-weight:600;color:var(--soft)}
.big{font-size:2rem;font-weight:650;line-height:1.15;font-variant-numeric:tabular-nums}
.big small{display:block;font-size:.88rem;font-weight:400;line-height:1.4}
.card dl{display:grid;grid-template-columns:1fr auto;gap:1px 12px;margin:6px 0 0;font-size:.88rem}
.card dd{margin:0;text-align:right;font-variant-numeric:tabular-nums}
.card .who{margin:10px 0 0;font-size:.86rem;font-weight:600}
.facts{display:grid;grid-template-columns:max-content 1fr;gap:2px 18px;margin:12px 0;font-size:.92rem}
.facts dt{color:var(--soft)}
.facts dd{margin:0;min-width:0}
.box{background:var(--card);border:1px solid var(--line);border-radius:10px;overflow:hidden}
.box h3{margin:0;padding:10px 11px 4px;font-size:.9rem}
.scroll{overflow-x:auto;overflow-wrap:normal}
table{border-collapse:collapse;font-size:.9rem;width:100%}
th,td{padding:5px 11px;text-align:right;vertical-align:top;border-top:1px solid var(--line);white-space:nowrap;
font-variant-numeric:tabular-nums}
thead th{border-top:0;vertical-align:bottom;color:var(--soft);font-weight:600;font-size:.84rem}
th[scope=row]{font-weight:500}
th:first-child{position:sticky;left:0;background:var(--card)}
.l{text-align:left}
td.long,th.long{white-space:normal;min-width:11em;max-width:30em;overflow-wrap:anywhere}
tr.strong>*{font-weight:650}
tr.paper>*{color:var(--soft);font-style:italic}
td i{display:block;height:3px;border-radius:2px;background:var(--bar);margin-left:auto}
.from{margin:5px 2px 0}
details{margin:4px 2px 0}
details.fold{margin:0 0 18px}
summary{cursor:pointer}
details .facts{font-size:.82rem;grid-template-columns:minmax(7em,max-content) 1fr}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(270px,100%),1fr));gap:14px;margin:12px 0 18px}
.chart{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:10px 10px 4px;margin:0;min-width:0}
.chart figcaption{display:flex;justify-content:space-between;gap:8px;font-size:.84rem;color:var(--ink);padding:0 4px 2px}
.chart figcaption span{color:var(--soft);white-space:nowrap}
svg{display:block;width:100%;height:auto}
svg text{fill:var(--soft);font:10.5px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;font-variant-numeric:tabular-nums}
svg .g{stroke:var(--line);stroke-width:1}
svg .c{fill:none;stroke-width:1.7;stroke-linejoin:round;stroke-linecap:round}
svg .p{fill:none;stroke-width:5;stroke-linecap:round;opacity:.62}
svg text.k{font-size:13px;font-weight:700;fill:var(--ink);stroke:var(--card);stroke-width:4;paint-order:stroke;text-anchor:middle}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;list-style:none;padding:0;margin:8px 0;font-size:.86rem}
.legend li{display:flex;align-items:center;gap:7px}
.legend svg{width:26px;height:10px;flex:none}
.map .legend{gap:2px 10px}
.map .legend svg{width:14px}
.map .legend li{gap:3px}
img{max-width:100%;height:auto;border-radius:6px;background:var(--line);vertical-align:top}
.pictures{display:grid;align-items:start;grid-template-columns:repeat(auto-fill,minmax(min(420px,100%),1fr));gap:18px}
.pictures figure{min-width:0}
.pictures figcaption,.pictures summary{padding:4px 0}
.wide{width:100%}
.sharp{image-rendering:pixelated}
.map{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(460px,100%),1fr));gap:18px;align-items:start;margin-bottom:18px}
.map figure{margin:0}
.map .card+.card{margin-top:18px}
.map>*{min-width:0}
.strips figure{margin:0 0 9px!important}
.strips img{border-radius:4px;display:block;width:100%;image-rendering:pixelated}
.strips figcaption{font-size:.8rem;line-height:1.35;padding-top:2px}
.strips b{color:var(--r1)}
footer{margin-top:44px;padding-bottom:36px}
@media(max-width:560px){main,header,footer{padding:0 12px}h1{font-size:1.5rem}th,td{padding:5px 8px}.facts{column-gap:10px}
details .facts{grid-template-columns:1fr}details .facts dt{margin-top:5px}th:first-child.long{min-width:9em}}
@media print{.scroll{overflow:visible}}
"""
  + ''.join(f'.r{i}{{stroke:var(--r{i})}}' for i in range(NUM_RUN_STYLES))
  + ''.join(f'.k{i}{{stroke:var(--k{i})}}' for i in range(NUM_CLASS_COLOURS))
  + (
    '.k-{stroke:var(--line)}.r1{stroke-dasharray:7 3}.r2{stroke-dasharray:2 '
    '3.5}.r3{stroke-dasharray:9 3 2 3}'
    '.r4{stroke-dasharray:4 2}.r5{stroke-dasharray:1 2.5}'
  )
)


class Cell(NamedTuple):
  """A number of a file, as it is shown."""

  text: str
  run: str = ''  # name of the workdir
  file: str = ''  # in the workdir
  at: str = ''  # JSON pointer (RFC 6901) of the value
  spread: str = ''  # that of what stands behind the +-
  exact: str = ''  # all its digits
  share: float | None = None  # in [0, 1]: length of the bar beneath


class Row(NamedTuple):
  cells: list  # of str or Cell
  kind: str = ''  # 'strong' or 'paper'


def esc(text):
  return html.escape(str(text))


def document(title, head, sections, foot):
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
    f'<title>{esc(title)}</title><style>{CSS}</style></head><body><header><h1>{esc(title)}</h1>{head}'
    f'<nav aria-label="Sections">{nav}</nav></header><main>{body}</main><footer '
    f'class="soft">{foot}</footer></body></html>\n'
  )


def mark(cell, tag, classes=''):
  """An element that shows a cell, and on hovering where its number stands."""
  classes = f' class="{classes}"' if classes else ''
  if not isinstance(cell, Cell):
    return f'<{tag}{classes}>{esc(cell)}</{tag}>'
  spread = f' data-spread="{esc(cell.spread)}"' if cell.spread else ''
  bar = (
    '' if cell.share is None else f'<i style="width:{100 * min(max(cell.share, 0), 1):.1f}%"></i>'
  )
  return (
    f'<{tag}{classes} data-run="{esc(cell.run)}" data-file="{esc(cell.file)}" '
    f'data-at="{esc(cell.at)}"{spread} '
    f'title="{esc(f"{cell.file} {cell.at} = {cell.exact}")}">{esc(cell.text)}{bar}</{tag}>'
  )


def table(caption, header, rows, source, notes='', texts=1):
  """A table in its own scrolling box, with where it comes from beneath.

  Args:
    caption: text.
    header: texts.
    rows: of `Row`; the first cell of each is its header.
    source: text.
    notes: HTML beneath: the protocol.
    texts: how many columns at the left hold words.
  """

  def side(i, cell):
    return ' '.join(['l'] * (i < texts) + ['long'] * (len(getattr(cell, 'text', cell)) > 34))

  def head(i, text):
    left = ' class="l"' if i < texts else ''
    return f'<th scope="col"{left}>{esc(text)}</th>'

  def line(row):
    first, *rest = row.cells
    long = ' long' if len(first) > 34 else ''
    cells = ''.join(mark(cell, 'td', side(i, cell)) for i, cell in enumerate(rest, 1))
    kind = f' class="{row.kind}"' if row.kind else ''
    return f'<tr{kind}><th scope="row" class="l{long}">{esc(first)}</th>{cells}</tr>'

  # The caption stands outside of the box that scrolls, or it would be cut at its edge.
  return (
    f'<figure><div class="box"><h3>{esc(caption)}</h3><div class="scroll" tabindex="0" '
    'role="region" '
    f'aria-label="{esc(caption)}"><table aria-label="{esc(caption)}"><thead><tr>'
    f'{"".join(head(i, text) for i, text in enumerate(header))}</tr></thead><tbody>{"".join(map(line, rows))}</tbody>'
    f'</table></div></div><figcaption class="from">{esc(source)}</figcaption>{notes}</figure>'
  )


def fold(summary, content, classes='fold'):
  return f'<details class="{classes}"><summary>{esc(summary)}</summary>{content}</details>'


def facts(pairs):
  """Names and values beneath each other."""
  return (
    '<dl class="facts">'
    + ''.join(f'<dt>{esc(k)}</dt><dd>{esc(v)}</dd>' for k, v in pairs)
    + '</dl>'
  )


def card(title, parts):
  """Headline numbers of one kind.

  Args:
    parts: [(whose, Cell, what it is, [(name, Cell)] to compare with)]; `whose` may be empty.
  """
  body = ''
  for whose, cell, what, others in parts:
    body += f'<p class="who">{esc(whose)}</p>' if whose else ''
    body += f'<div class="big">{mark(cell, "span")} <small>{esc(what)}</small></div><dl>'
    body += ''.join(f'<dt>{esc(name)}</dt>{mark(other, "dd")}' for name, other in others) + '</dl>'
  return f'<div class="card"><h3>{esc(title)}</h3>{body}</div>'


def short(x):
  """A tick's label: 1.5k, 2M, 0.02, 1e-05."""
  size = abs(x)
  for least, unit in ((1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
    if least <= size < 1e12:
      return f'{x / least:.4g}{unit}'
  return f'{x:.4g}' if size >= 1e-3 or not size else f'{x:.0e}'


def ticks(low, high, most=5):
  """Round numbers within [low, high], `most` at most, at steps of 1, 2, 2.5 or 5 times a power of
  ten."""
  power = 10.0 ** math.floor(math.log10((high - low) / most))
  step = next(
    factor * power
    for factor in (1, 2, 2.5, 5, 10, 20)
    if math.floor(high / factor / power + 1e-9) - math.ceil(low / factor / power - 1e-9) < most
  )
  return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def log_ticks(low, high):
  """Powers of ten within, thinned to five; with 2 and 5 times them where there are fewer than
  three."""
  powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
  within = lambda factors: [
    f * 10.0**p for p in powers for f in factors if low * 0.999 <= f * 10.0**p <= high * 1.001
  ]
  found = within([1])
  return found[:: -(-len(found) // 5)] if len(found) > 2 else within([1, 2, 5])


def thinned(xs, ys, most=300):
  """At most `most` points of a curve: smallest and largest of each of equally many neighbours, so
  that peaks stay."""
  if len(xs) <= most:
    return xs, ys
  kept, size = {0, len(xs) - 1}, math.ceil(len(xs) / (most // 2 - 1))
  for start in range(0, len(xs), size):
    bucket = [i for i in range(start, min(start + size, len(xs))) if ys[i] is not None]
    if bucket:
      kept |= {min(bucket, key=ys.__getitem__), max(bucket, key=ys.__getitem__)}
  return [xs[i] for i in sorted(kept)], [ys[i] for i in sorted(kept)]


def chart(title, series, unit):
  """Curves of several runs over each other; '' without a number. Logarithmic where positive over a
  factor of 50 or more.

  Args:
    title: text.
    series: [(run's number, its name, xs, ys)]; None in ys is a gap.
    unit: of x.
  """
  series = [
    (i, name, *thinned(xs, ys)) for i, name, xs, ys in series if any(y is not None for y in ys)
  ]
  if not series:
    return ''
  all_x = [x for _, _, xs, _ in series for x in xs]
  all_y = [y for _, _, _, ys in series for y in ys if y is not None]
  log = min(all_y) > 0 and max(all_y) / min(all_y) >= 50
  scale = math.log10 if log else float
  low, high = scale(min(all_y)), scale(max(all_y))
  pad = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
  low, high, x_low, x_high = low - pad, high + pad, min(0, min(all_x)), max(all_x) or 1
  px = lambda x: LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
  py = lambda y: HEIGHT - BOTTOM - (scale(y) - low) / (high - low) * (HEIGHT - TOP - BOTTOM)
  marks = log_ticks(10**low, 10**high) if log else ticks(low, high)
  parts = [
    f'<path class="g" d="M{LEFT} {py(y):.1f}H{WIDTH - RIGHT}"/>'
    f'<text x="{LEFT - 6}" y="{py(y) + 3.5:.1f}" text-anchor="end">{short(y)}</text>'
    for y in marks
  ]
  parts += [
    f'<text x="{px(x):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{short(x)}</text>'
    for x in ticks(x_low, x_high, 6)
  ]
  for i, name, xs, ys in series:
    path, pen = '', 'M'
    for x, y in zip(xs, ys, strict=True):
      if y is None:
        pen = 'M'
      else:
        path, pen = f'{path}{pen}{px(x):.1f} {py(y):.1f}', 'L'
    if len(xs) == 1:
      path += 'h0'
    parts.append(
      f'<path class="c r{i % NUM_RUN_STYLES}" d="{path}"><title>{esc(name)}</title></path>'
    )
  lasts = [next(y for y in reversed(ys) if y is not None) for _, _, _, ys in series]
  spoken = '; '.join(
    f'{name} ends at {y:.4g}' for (_, name, _, _), y in zip(series, lasts, strict=True)
  )
  label = f'{title} against {unit}{", logarithmic" if log else ""}: {spoken}'
  last = f'{lasts[0]:.4g}' if len(lasts) == 1 else ''
  return (
    '<figure '
    f'class="chart"><figcaption>{esc(title)}{" (log)" if log else ""}<span>{last}</span></figcaption>'
    f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
    f'aria-label="{esc(label)}">{"".join(parts)}</svg></figure>'
  )


def legend(names):
  """Which line is which run's: [(run's number, its name)]."""
  line = lambda i: (
    f'<svg viewBox="0 0 26 10" aria-hidden="true"><path class="c r{i % NUM_RUN_STYLES}" d="M1 '
    '5H25"/></svg>'
  )
  return (
    '<ul class="legend">' + ''.join(f'<li>{line(i)}{esc(name)}</li>' for i, name in names) + '</ul>'
  )


def scatter(title, points, labels, names, axes):
  """A map: a dot a row, coloured by class and named at its class's median where there is room.
  Beyond ten classes: grey.

  Args:
    title: text.
    points: (N, 2) floats, finite; each axis is scaled to fill the square.
    labels: (N,) class numbers.
    names: of the classes.
    axes: texts below and at the left.
  """

  def place(column):
    low, high = min(column), max(column)
    return [30 + (float(v) - low) / ((high - low) or 1.0) * (MAP - 60) for v in column]

  xs, ys = map(place, zip(*points, strict=True))
  groups = {}
  for x, y, label in zip(xs, ys, labels, strict=True):
    groups.setdefault(int(label), []).append((x, MAP - y))
  dots, words, taken = [], [], []
  for label in sorted(groups, reverse=True):
    colour = f'k{label}' if label < NUM_CLASS_COLOURS else 'k-'
    path = ''.join(f'M{x:.1f} {y:.1f}h0' for x, y in groups[label])
    dots.append(f'<path class="p {colour}" d="{path}"><title>{esc(names[label])}</title></path>')
    if label < NUM_CLASS_COLOURS:
      x, y = (sorted(column)[len(column) // 2] for column in zip(*groups[label], strict=True))
      width = 4 * len(names[label]) + 6  # about half of it
      if all(
        abs(x - other_x) > width + other or abs(y - other_y) > 15
        for other_x, other_y, other in taken
      ):
        taken.append((x, y, width))
        words.append(f'<text class="k" x="{x:.1f}" y="{y - 7:.1f}">{esc(names[label])}</text>')
  captions = (
    f'<text x="{MAP / 2}" y="{MAP - 4}" text-anchor="middle">{esc(axes[0])}</text>'
    f'<text transform="translate(11 {MAP / 2}) rotate(-90)" '
    f'text-anchor="middle">{esc(axes[1])}</text>'
  )
  svg = (
    f'<svg viewBox="0 0 {MAP} {MAP}" role="img" aria-label="{esc(title)}">'
    f'{"".join(dots)}{"".join(words)}{captions}</svg>'
  )
  shown = [label for label in sorted(groups) if label < NUM_CLASS_COLOURS]
  dot = lambda i: (
    f'<svg viewBox="0 0 14 10" aria-hidden="true"><path class="p k{i}" d="M7 5h0" '
    'style="stroke-width:9"/></svg>'
  )
  key = ''.join(f'<li>{dot(label)}{esc(names[label])}</li>' for label in shown)
  key += '<li>grey: the other classes</li>' if len(groups) > len(shown) else ''
  return f'<figure class="card"><h3>{esc(title)}</h3>{svg}<ul class="legend">{key}</ul></figure>'


def picture(uri, alt, caption, classes='', moves=False):
  """A picture within the page: `uri` is a data: address, `caption` HTML; one that moves can be
  folded away."""
  image = f'<img src="{esc(uri)}" alt="{esc(alt)}" class="{classes}">'
  if moves:
    return f'<figure><details open><summary>{caption}</summary>{image}</details></figure>'
  return f'<figure>{image}<figcaption>{caption}</figcaption></figure>'
