"""Figures with axes, by matplotlib, which is optional."""

import pathlib
from typing import Any

import numpy as np
from absl import logging

from palm_jax.base.files import replacing

COLUMNS = 3  # panels side by side, at most
# Okabe and Ito.
COLOURS = (
  '#0072B2',
  '#E69F00',
  '#009E73',
  '#D55E00',
  '#CC79A7',
  '#56B4E9',
  '#000000',
  '#999999',
)


def begin(path: pathlib.Path, count: int, numbers: str) -> tuple[Any, list[Any]] | None:
  """A figure of `count` panels; without matplotlib None, a line in the log, and no older figure.

  Args:
    path: of the PNG that `save` will write.
    count: of panels.
    numbers: which file has them all the same, for the line.

  Returns:
    (matplotlib's Figure, [its Axes]).
  """
  try:
    # Here, because it is optional.
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]
  except ImportError:
    logging.warning(
      "%s is not drawn, because matplotlib is not installed: pip install 'palm_jax[figures]' or "
      'matplotlib, and give the same command again; %s has the numbers',
      path,
      numbers,
    )
    path.unlink(missing_ok=True)  # of other numbers
    return None
  columns = min(COLUMNS, count)
  lines = -(-count // columns)
  figure = Figure(figsize=(5.2 * columns, 4 * lines), dpi=150, layout='constrained')
  panels = np.ravel(figure.subplots(lines, columns, squeeze=False))
  for panel in panels[count:]:
    panel.set_axis_off()
  return figure, list(panels[:count])


def save(figure: Any, path: pathlib.Path) -> None:
  """Writes the PNG; it is whole, or as it was before."""
  with replacing(path) as file:
    figure.savefig(file, format='png', bbox_inches='tight')
