"""Results as text."""

from collections.abc import Mapping, Sequence
from typing import Any


def aligned(cells: Sequence[Sequence[str]], left: int = 1) -> list[str]:
  """Rows of text of equal length as lines of columns.

  Args:
    cells: the rows.
    left: how many columns are flush left; the others are flush right.
  """
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  return [
    '  '.join(
      text.ljust(width) if i < left else text.rjust(width)
      for i, (text, width) in enumerate(zip(row, widths, strict=True))
    )
    for row in cells
  ]


def protocol_line(protocol: Mapping[str, Any]) -> str:
  """Every setting that made the numbers above it, in one line."""
  return 'protocol: ' + '; '.join(f'{key}={value}' for key, value in protocol.items())
