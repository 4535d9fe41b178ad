"""Results as text."""


def aligned(cells, left=1):
  """Rows of text, all as long as the first, as lines of columns: the first `left` flush left, the
  others flush right."""
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  return [
    '  '.join(
      text.ljust(width) if i < left else text.rjust(width)
      for i, (text, width) in enumerate(zip(row, widths, strict=True))
    )
    for row in cells
  ]


def protocol_line(protocol):
  """Every setting that made the numbers above it, in one line."""
  return 'protocol: ' + '; '.join(f'{key}={value}' for key, value in protocol.items())
