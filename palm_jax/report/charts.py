"""Curves and maps as SVG. Pure functions of text and numbers."""

import math
import operator
from collections.abc import Iterable, Sequence

import numpy as np

from palm_jax.report.page import esc

# A chart's own units.
WIDTH = 320
HEIGHT = 180
# Margins within them.
LEFT = 46
RIGHT = 18
TOP = 10
BOTTOM = 24
MAP = 420  # side of a map
NUM_RUN_STYLES = 6  # r0, r1, ... of page.css
NUM_CLASS_COLOURS = 10  # k0, k1, ... of page.css


def short(x: float) -> str:
  """A tick's label: 1.5k, 2M, 0.02, 1e-05."""
  size = abs(x)
  for least, unit in ((1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
    if least <= size < 1e12:
      return f'{x / least:.4g}{unit}'
  return f'{x:.4g}' if size >= 1e-3 or not size else f'{x:.0e}'


def ticks(low: float, high: float, most: int = 5) -> list[float]:
  """Round numbers within [low, high], `most` at most.

  Their step is 1, 2, 2.5 or 5 times a power of ten.
  """
  power = 10.0 ** math.floor(math.log10((high - low) / most))
  step = next(
    factor * power
    for factor in (1, 2, 2.5, 5, 10, 20)
    if math.floor(high / factor / power + 1e-9) - math.ceil(low / factor / power - 1e-9) < most
  )
  return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
  """Powers of ten within [low, high], thinned to about five.

  Where there are fewer than three, 2 and 5 times them are added.
  """
  powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
  within = lambda factors: [
    f * 10.0**p for p in powers for f in factors if low * 0.999 <= f * 10.0**p <= high * 1.001
  ]
  found = within([1])
  return found[:: -(-len(found) // 5)] if len(found) > 2 else within([1, 2, 5])


def thinned(
  xs: Sequence[float], ys: Sequence[float | None], most: int = 300
) -> tuple[Sequence[float], Sequence[float | None]]:
  """About `most` points of a curve: of each of its pieces the lowest, the highest and a gap."""
  if len(xs) <= most:
    return xs, ys
  kept = {0, len(xs) - 1}
  size = math.ceil(len(xs) / (most // 2 - 1))
  for start in range(0, len(xs), size):
    every = list(enumerate(ys[start : start + size], start))
    kept |= set([i for i, y in every if y is None][:1])
    piece = [(y, i) for i, y in every if y is not None]
    if piece:
      lowest = min(piece, key=operator.itemgetter(0))
      highest = max(piece, key=operator.itemgetter(0))
      kept |= {lowest[1], highest[1]}
  return [xs[i] for i in sorted(kept)], [ys[i] for i in sorted(kept)]


def chart(
  title: str,
  series: Iterable[tuple[int, str, Sequence[float], Sequence[float | None]]],
  unit: str,
) -> str:
  """Curves of several runs over each other; '' without a number.

  The scale is logarithmic where all numbers are positive and differ by a factor of 50 or more.

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
  x_low = min(0, min(all_x))
  x_high = max(all_x) or 1
  log = min(all_y) > 0 and max(all_y) / min(all_y) >= 50
  scale = math.log10 if log else float
  low = scale(min(all_y))
  high = scale(max(all_y))
  pad = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
  low -= pad
  high += pad
  px = lambda x: LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
  py = lambda y: HEIGHT - BOTTOM - (scale(y) - low) / (high - low) * (HEIGHT - TOP - BOTTOM)
  parts = [
    f'<path class="g" d="M{LEFT} {py(y):.1f}H{WIDTH - RIGHT}"/>'
    f'<text x="{LEFT - 6}" y="{py(y) + 3.5:.1f}" text-anchor="end">{short(y)}</text>'
    for y in (log_ticks(10**low, 10**high) if log else ticks(low, high))
  ]
  parts += [
    f'<text x="{px(x):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{short(x)}</text>'
    for x in ticks(x_low, x_high, 6)
  ]
  parts += [
    f'<path class="c r{i % NUM_RUN_STYLES}" d="{_path(xs, ys, px, py)}">'
    f'<title>{esc(name)}</title></path>'
    for i, name, xs, ys in series
  ]
  ends = [(name, next(y for y in reversed(ys) if y is not None)) for _, name, _, ys in series]
  spoken = '; '.join(f'{name} ends at {y:.4g}' for name, y in ends)
  label = f'{title} against {unit}{", logarithmic" if log else ""}: {spoken}'
  last = f'{ends[0][1]:.4g}' if len(ends) == 1 else ''
  return (
    f'<figure class="chart"><figcaption>{esc(title)}{" (log)" if log else ""}<span>{last}</span>'
    f'</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
    f'aria-label="{esc(label)}">{"".join(parts)}</svg></figure>'
  )


def _path(xs, ys, px, py):
  """The d of a path through the points, with a gap at each None."""
  path = ''
  pen = 'M'
  for x, y in zip(xs, ys, strict=True):
    if y is None:
      pen = 'M'
    else:
      path += f'{pen}{px(x):.1f} {py(y):.1f}'
      pen = 'L'
  return f'{path}h0' if len(xs) == 1 else path


def legend(names: Iterable[tuple[int, str]]) -> str:
  """Which line is which run's: [(run's number, its name)]."""
  line = lambda i: (
    '<svg viewBox="0 0 26 10" aria-hidden="true">'
    f'<path class="c r{i % NUM_RUN_STYLES}" d="M1 5H25"/></svg>'
  )
  content = ''.join(f'<li>{line(i)}{esc(name)}</li>' for i, name in names)
  return f'<ul class="legend">{content}</ul>'


def scatter(
  title: str,
  points: np.ndarray | Sequence[Sequence[float]],
  labels: np.ndarray | Sequence[int],
  names: Sequence[str],
  axes: Sequence[str],
) -> str:
  """A map with a dot for each row, coloured by its class; grey beyond ten classes.

  A class is named at its median where there is room.

  Args:
    title: text.
    points: (N, 2) floats, finite; each axis is scaled to fill the square.
    labels: (N,) class numbers.
    names: of the classes.
    axes: texts below and at the left.
  """
  xs, ys = (_places(column) for column in zip(*points, strict=True))
  groups = {}
  for x, y, label in zip(xs, ys, labels, strict=True):
    groups.setdefault(int(label), []).append((x, MAP - y))
  dots = ''
  for label in sorted(groups, reverse=True):
    colour = f'k{label}' if label < NUM_CLASS_COLOURS else 'k-'
    path = ''.join(f'M{x:.1f} {y:.1f}h0' for x, y in groups[label])
    dots += f'<path class="p {colour}" d="{path}"><title>{esc(names[label])}</title></path>'
  captions = (
    f'<text x="{MAP / 2}" y="{MAP - 4}" text-anchor="middle">{esc(axes[0])}</text>'
    f'<text transform="translate(11 {MAP / 2}) rotate(-90)" '
    f'text-anchor="middle">{esc(axes[1])}</text>'
  )
  svg = (
    f'<svg viewBox="0 0 {MAP} {MAP}" role="img" aria-label="{esc(title)}">'
    f'{dots}{_class_names(groups, names)}{captions}</svg>'
  )
  coloured = [label for label in sorted(groups) if label < NUM_CLASS_COLOURS]
  dot = lambda i: (
    f'<svg viewBox="0 0 14 10" aria-hidden="true"><path class="p k{i}" d="M7 5h0" '
    'style="stroke-width:9"/></svg>'
  )
  key = ''.join(f'<li>{dot(label)}{esc(names[label])}</li>' for label in coloured)
  key += '<li>grey: the other classes</li>' if len(groups) > len(coloured) else ''
  return f'<figure class="card"><h3>{esc(title)}</h3>{svg}<ul class="legend">{key}</ul></figure>'


def _places(column):
  """Values scaled to fill a side of the map."""
  low = min(column)
  high = max(column)
  return [30 + (float(value) - low) / ((high - low) or 1.0) * (MAP - 60) for value in column]


def _class_names(groups, names):
  """Names at the medians of coloured classes, {label: [(x, y)]}, where they cover no other."""
  words = ''
  taken = []
  for label in sorted(groups, reverse=True):
    if label >= NUM_CLASS_COLOURS:
      continue
    x, y = (sorted(column)[len(column) // 2] for column in zip(*groups[label], strict=True))
    width = 4 * len(names[label]) + 6  # about half of it
    if all(
      abs(x - other_x) > width + other_width or abs(y - other_y) > 15
      for other_x, other_y, other_width in taken
    ):
      taken.append((x, y, width))
      words += f'<text class="k" x="{x:.1f}" y="{y - 7:.1f}">{esc(names[label])}</text>'
  return words
