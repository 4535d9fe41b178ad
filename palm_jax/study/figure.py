"""The figure of a study, a panel for each measure. It needs matplotlib."""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from palm_jax.base import figures
from palm_jax.base.figures import COLOURS

MARKERS = 'os^Dv<>P'


def draw(results: Mapping[str, Any], path: pathlib.Path) -> bool:
  """Writes a PNG with a panel for each measure; without matplotlib only a line in the log.

  Args:
    results: of study.run; read are study, axis, grid and rows.
    path: of the PNG.

  Returns:
    Whether it was drawn.
  """
  measures = list(dict.fromkeys(row['measure'] for row in results['rows']))
  begun = figures.begin(path, len(measures), 'results/study.csv')
  if begun is None:
    return False
  figure, panels = begun
  looks = _looks(dict.fromkeys(row['arm'] for row in results['rows']))
  in_legend = {}  # arm: its mark
  for panel, measure in zip(panels, measures, strict=True):
    rows = [row for row in results['rows'] if row['measure'] == measure]
    on_axis = any(row['x'] != '' for row in rows)
    if not on_axis:
      _draw_points(panel, rows)
    elif results['grid']:
      _draw_map(panel, rows)
    else:
      in_legend.update(_draw_lines(panel, rows, looks))
    panel.set_title(measure)
    panel.set_xlabel(results['axis'] if on_axis else '')
  if in_legend:
    figure.legend(
      in_legend.values(),
      in_legend,
      loc='outside lower center',
      ncols=min(len(in_legend), 3 * min(figures.COLUMNS, len(measures))),
      fontsize=8,
    )
  figure.suptitle(_title(results), fontsize=9)
  figures.save(figure, path)
  return True


def _looks(arms):
  """{arm: (colour, marker)}, the same in all panels."""
  looks = {}
  for i, arm in enumerate(arms):
    marker = MARKERS[(i + i // len(COLOURS)) % len(MARKERS)]
    looks[arm] = COLOURS[i % len(COLOURS)], marker
  return looks


def _title(results):
  seeds = sorted({row['n'] for row in results['rows']})
  span = f'{seeds[0]}' if len(seeds) == 1 else f'{seeds[0]} to {seeds[-1]}'
  interval = '' if results['grid'] or seeds[-1] < 2 else ', bootstrap interval'
  return f'{results["study"]}: mean of {span} seed(s){interval}'


def _whiskers(rows):
  """(2, n) lengths below and above the means; 0 where there is no interval."""
  ends = [
    (row['mean'] - row['low'], row['high'] - row['mean']) if row['low'] is not None else (0, 0)
    for row in rows
  ]
  # By rounding, the mean of few and uneven values may lie outside.
  return np.maximum(np.transpose(ends), 0)


def _draw_points(panel, rows):
  """Arms beneath each other, for a measure without an axis."""
  places = np.arange(len(rows))[::-1]
  panel.errorbar(
    [row['mean'] for row in rows],
    places,
    xerr=_whiskers(rows),
    fmt='o',
    capsize=3,
    color=COLOURS[0],
  )
  panel.set_yticks(places, [row['arm'] for row in rows])
  panel.grid(axis='x', alpha=0.3)


def _draw_lines(panel, rows, looks):
  """A line for each arm -> {arm: its mark}; looks: {arm: (colour, marker)}."""
  numbers = [row['x'] for row in rows if isinstance(row['x'], (int, float))]
  if numbers and min(numbers) > 0 and max(numbers) >= 8 * min(numbers):
    panel.set_xscale('log')
  marks = {}
  for arm in dict.fromkeys(row['arm'] for row in rows):
    of_arm = [row for row in rows if row['arm'] == arm]
    colour, marker = looks[arm]
    if of_arm[0]['x'] == '':  # an arm without an axis, such as a reference
      marks[arm] = panel.axhline(of_arm[0]['mean'], color=colour, linestyle='--')
      if of_arm[0]['low'] is not None:
        panel.axhspan(of_arm[0]['low'], of_arm[0]['high'], color=colour, alpha=0.12, linewidth=0)
    else:
      marks[arm] = panel.errorbar(
        [row['x'] for row in of_arm],
        [row['mean'] for row in of_arm],
        yerr=_whiskers(of_arm),
        capsize=3,
        color=colour,
        marker=marker,
      )
  panel.grid(alpha=0.3)
  return marks


def _draw_map(panel, rows):
  """Means as colours, arms down and x across."""
  rows = [row for row in rows if row['x'] != '']
  arms = list(dict.fromkeys(row['arm'] for row in rows))
  places = list(dict.fromkeys(row['x'] for row in rows))
  means = np.full((len(arms), len(places)), np.nan)
  for row in rows:
    means[arms.index(row['arm']), places.index(row['x'])] = row['mean']
  panel.imshow(means, cmap='cividis')
  middle = (np.nanmin(means) + np.nanmax(means)) / 2
  for (i, j), mean in np.ndenumerate(means):
    if np.isfinite(mean):
      colour = 'white' if mean < middle else 'black'
      panel.text(j, i, f'{mean:.3g}', ha='center', va='center', color=colour)
  panel.set_yticks(range(len(arms)), arms)
  panel.set_xticks(range(len(places)), [str(place) for place in places])
