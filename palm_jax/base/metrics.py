"""Where a run's numbers go: JSON lines always, TensorBoard beside them, and a line of progress in
the log."""

import collections
import json
import math
import pathlib
import time

from absl import logging

from palm_jax.base.files import replacing


class MetricWriter:
  """Writes `<folder>/metrics.jsonl` and TensorBoard's event files. One process (the first) should
  hold it.

  Args:
    folder: path; made if absent.
    step: the step that the run goes on from. Lines beyond it were written after its checkpoint and
      are dropped; TensorBoard is told to hide its own.
    tensorboard: also write event files, by tensorboardX.
  """

  def __init__(self, folder, step=0, tensorboard=True):
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / 'metrics.jsonl'
    _drop_lines_after(path, step)
    self._lines = path.open('a')
    self._events = None
    if tensorboard:
      from tensorboardX import (
        SummaryWriter,
      )  # here: half a second that a run without it need not spend

      self._events = SummaryWriter(str(folder), purge_step=step + 1)

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()

  def write(self, step, scalars):
    """One line {'step': step, name: float, ...}, on the disk's way at once. NaN and infinity become
    null."""
    scalars = {name: float(value) for name, value in scalars.items()}
    finite = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
    self._lines.write(json.dumps({'step': int(step), **finite}) + '\n')
    self._lines.flush()
    if self._events:
      for name, value in scalars.items():
        self._events.add_scalar(name, value, step)

  def close(self):
    """Flushes and closes both."""
    self._lines.close()
    if self._events:
      self._events.close()


def read_jsonl(path):
  """The lines of a metrics file as dicts; a last line that a kill cut short is left out."""
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
  """Rewrites the file without lines beyond `step` or cut short; all of it or what was there
  before."""
  if not path.exists():
    return
  with replacing(path, 'w') as f:
    f.writelines(json.dumps(row) + '\n' for row in read_jsonl(path) if row['step'] <= step)


class Progress:
  """A line in the log every few seconds: `pretrain  12,800/64,000 env steps  20.0%  1,934/s  left
  0:26  reward 1.23`.

  Args:
    name: the job.
    total: its length in `unit`.
    unit: what is counted, in the plural.
    every_seconds: the least time between two lines.
  """

  def __init__(self, name, total, unit, every_seconds=5.0):
    self._name, self._total, self._unit, self._every = name, total, unit, every_seconds
    self._printed = -math.inf
    # The first update only starts the clock: the call before it compiled.
    self._window = collections.deque(maxlen=32)

  def update(self, step, scalars):
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
    (then, before), pace = self._window[0], ''
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
