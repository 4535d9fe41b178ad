"""Where a run's numbers go: JSON lines, TensorBoard's files, and lines of progress in the log."""

import collections
import json
import math
import os
import pathlib
import time
from collections.abc import Mapping
from typing import Any, Self

from absl import logging

from palm_jax.base.files import replacing


class MetricWriter:
  """Writes `<folder>/metrics.jsonl` and TensorBoard's event files, in the first process only.

  Args:
    folder: made if absent.
    step: the step that the run resumes from. Lines beyond it were written after its checkpoint and
      are dropped; TensorBoard is told to hide its own.
    tensorboard: also write event files, by tensorboardX.
  """

  def __init__(self, folder: str | os.PathLike, step: int = 0, tensorboard: bool = True):
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / 'metrics.jsonl'
    _drop_lines_after(path, step)
    self._lines = path.open('a')
    self._events = None
    if tensorboard:
      from tensorboardX import SummaryWriter  # here, because it takes half a second

      self._events = SummaryWriter(str(folder), purge_step=step + 1)

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def write(self, step: int, scalars: Mapping[str, Any]) -> None:
    """Writes a line {'step': step, name: float, ...} at once. NaN and infinity become null."""
    scalars = {name: float(value) for name, value in scalars.items()}
    finite = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
    self._lines.write(json.dumps({'step': int(step), **finite}) + '\n')
    self._lines.flush()
    if self._events:
      for name, value in scalars.items():
        self._events.add_scalar(name, value, step)

  def close(self) -> None:
    """Flushes and closes both."""
    self._lines.close()
    if self._events:
      self._events.close()


def read_jsonl(path: str | os.PathLike) -> list[dict[str, Any]]:
  """The lines of a metrics file. A last line that was cut short by a kill is left out."""
  lines = pathlib.Path(path).read_text().splitlines()
  rows = []
  for i, line in enumerate(lines):
    try:
      rows.append(json.loads(line))
    except ValueError:
      if i + 1 < len(lines):
        logging.warning('%s: line %d is damaged and left out', path, i + 1)
  return rows


def _drop_lines_after(path, step):
  """Rewrites the file without lines beyond `step` or cut short: whole, or nothing is changed."""
  if not path.exists():
    return
  with replacing(path, 'w') as f:
    f.writelines(json.dumps(row) + '\n' for row in read_jsonl(path) if row['step'] <= step)


class Progress:
  """A line in the log every few seconds.

  For example `pretrain  12,800/64,000 env steps  20.0%  1,934/s  left 0:26  reward 1.23`.

  Args:
    name: the job.
    total: its length in `unit`.
    unit: what is counted, in the plural.
    every_seconds: the least time between two lines.
  """

  def __init__(self, name: str, total: int, unit: str, every_seconds: float = 5.0):
    self._name = name
    self._total = total
    self._unit = unit
    self._every = every_seconds
    self._printed = -math.inf
    # The first update only starts the clock: the call before it compiled.
    self._window = collections.deque(maxlen=32)

  def update(self, step: int, scalars: Mapping[str, Any]) -> bool:
    """Logs a line if the time has come or the job is complete.

    Args:
      step: how much is done.
      scalars: {name: float} for the end of the line, in this order.

    Returns:
      Whether a line was logged.
    """
    now = time.monotonic()
    self._window.append((now, step))
    if now - self._printed < self._every and step < self._total:
      return False
    self._printed = now
    then, before = self._window[0]
    pace = ''
    if len(self._window) > 1 and step > before:
      rate = (step - before) / max(now - then, 1e-9)
      pace = f'  {_figure(rate)}/s  left {_clock((self._total - step) / rate)}'
    numbers = ' '.join(f'{name} {_figure(value)}' for name, value in scalars.items())
    logging.info(
      '%s',
      f'{self._name}  {step:,}/{self._total:,} {self._unit}  {step / self._total:.1%}{pace}'
      f'{"  " if numbers else ""}{numbers}',
    )
    return True


def _figure(value):
  """Three significant digits, thousands with commas."""
  value = float(value)
  return f'{value:,.0f}' if 100 <= abs(value) < 1e9 else f'{value:.3g}'


def _clock(seconds):
  """h:mm:ss, or m:ss below an hour."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02}:{seconds:02}' if hours else f'{minutes}:{seconds:02}'
