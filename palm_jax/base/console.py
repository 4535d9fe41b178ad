"""What a run says, as it reads best on a terminal: colours, and one line of progress that moves.

Where the output is a file or a pipe, absl's lines with date and place stay.
"""

import contextlib
import logging
import os
import shutil
import sys
from typing import TextIO

from absl import logging as absl_logging

PROGRESS = dict(progress=True)  # extra= of a line that takes the place of the one before
COLOURS = {logging.WARNING: '33', logging.ERROR: '31', logging.CRITICAL: '31'}  # yellow, red
CLEAR = '\r\x1b[K'


class Terminal(logging.Handler):
  """Writes records to a terminal.

  Args:
    stream: the terminal.
    colours: whether it shows them.
    columns: its width; None is that of now, for each line. A longer line of progress is cut, since
      only one that fits can be taken back.
  """

  def __init__(self, stream: TextIO, colours: bool = True, columns: int | None = None):
    super().__init__()
    self._stream = stream
    self._colours = colours
    self._columns = columns
    self._moving = False  # the last line has no end yet

  def emit(self, record: logging.LogRecord) -> None:
    text = record.getMessage()
    if record.exc_info:
      text += '\n' + logging.Formatter().formatException(record.exc_info)
    moves = getattr(record, 'progress', False)
    if moves:
      width = self._columns or shutil.get_terminal_size().columns
      text = text[: width - 1]
    colour = COLOURS.get(record.levelno, '')
    if moves:
      name, gap, rest = text.partition('  ')
      text = f'{self._painted(name, "1")}{gap}{rest}'
    elif record.levelno >= logging.WARNING:
      text = f'{self._painted(record.levelname.lower(), colour)}: {text}'
    begin = CLEAR if self._moving else ''
    self._write(f'{begin}{text}' + ('' if moves else '\n'))
    self._moving = moves

  def rest(self) -> None:
    """Ends the line of progress, so that what others print begins a new one."""
    if self._moving:
      self._write('\n')
      self._moving = False

  def _write(self, text):
    with contextlib.suppress(OSError):  # of a terminal that was closed: the work goes on
      self._stream.write(text)
      self._stream.flush()

  def _painted(self, text, colour):
    return f'\x1b[{colour}m{text}\x1b[0m' if self._colours and colour else text


_terminal: Terminal | None = None


def start() -> None:
  """From now on records go to the terminal in this way, if standard error is one."""
  global _terminal
  if _terminal or not sys.stderr.isatty() or os.environ.get('TERM') == 'dumb':
    return
  _terminal = Terminal(sys.stderr, colours='NO_COLOR' not in os.environ)
  root = logging.getLogger()
  root.removeHandler(absl_logging.get_absl_handler())
  root.addHandler(_terminal)


def rest() -> None:
  """Before something else is printed: ends the line of progress, where there is one."""
  if _terminal:
    _terminal.rest()
