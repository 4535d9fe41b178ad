"""What the critics promise, beside what comes true of it, while a method learns from a record."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from palm_jax.base import figures

WIDEST = 30.0  # of values to returns, beyond which the axis is logarithmic


def draw(rows: Sequence[Mapping[str, Any]], path: pathlib.Path) -> bool:
  """Writes a PNG with a panel for each record; without matplotlib only a line in the log.

  Solid: Q of an episode's first step, mean and range of the seeds; dashed: the discounted return
  that came of it.

  Args:
    rows: of train.run's result.
    path: of the PNG.

  Returns:
    Whether it was drawn.
  """
  rows = [row for row in rows if row['q'] is not None]
  names = list(dict.fromkeys(row['record'] for row in rows))
  if not names:
    return False
  begun = figures.begin(path, len(names), 'results/offline.json')
  if begun is None:
    return False
  figure, panels = begun
  methods = list(dict.fromkeys(row['method'] for row in rows))
  for panel, name in zip(panels, names, strict=True):
    of_record = [row for row in rows if row['record'] == name]
    for row in of_record:
      colour = figures.COLOURS[methods.index(row['method'])]
      updates = [point['updates'] for point in row['curve']]
      q, came = (np.array([point[key] for point in row['curve']]) for key in ('q', 'discounted'))
      panel.fill_between(updates, q.min(1), q.max(1), color=colour, alpha=0.2, linewidth=0)
      panel.plot(updates, q.mean(1), color=colour, label=f'{row["method"]}: Q')
      label = f'{row["method"]}: came true'
      panel.plot(updates, came.mean(1), color=colour, linestyle='--', label=label)
    panel.set_title(f'record {name!r}')
    panel.set_xlabel('updates')
    panel.grid(alpha=0.3)
    values, returns = (
      np.abs([point[key] for row in of_record for point in row['curve']]).max()
      for key in ('q', 'discounted')
    )
    if values > WIDEST * returns:
      panel.set_yscale('symlog', linthresh=max(returns, 1e-3))
  handles, labels = panels[0].get_legend_handles_labels()
  figure.legend(handles, labels, loc='outside lower center', ncols=len(labels), fontsize=8)
  figures.save(figure, path)
  return True
