"""Where a run's numbers go: JSON lines, TensorBoard, Weights & Biases, and lines of progress."""

import collections
import importlib.util
import json
import math
import os
import pathlib
import re
import secrets
import time
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Self

from absl import logging

from palm_jax.base import console
from palm_jax.base.errors import UserError
from palm_jax.base.files import replacing, sync

STEP = 'step'
WANDB_ID = 'wandb_id'
wandb_project = ''  # of `log_to_wandb`


class MetricWriter:
  """Writes `<folder>/metrics.jsonl` and TensorBoard's event files, in the first process only.

  After `log_to_wandb` it is a run of Weights & Biases, too.

  Args:
    folder: made if absent.
    step: the step that the run resumes from. Lines beyond it were written after its checkpoint and
      are dropped; TensorBoard is told to hide its own.
    tensorboard: also write event files, by tensorboardX.
  """

  def __init__(self, folder: str | os.PathLike, step: int = 0, tensorboard: bool = True):
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    self._path = folder / 'metrics.jsonl'
    self._check = _drop_lines_after(self._path, step)
    self._lines = self._path.open('a')
    self._events = None
    self._wandb = _wandb_run(folder) if wandb_project else None
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
    if not self._path.exists():
      raise UserError(
        f'{self._path} was removed while the job ran: it stops here; run it again to resume from '
        'what was saved'
      )
    line, self._check = _sealed(json.dumps({'step': int(step), **finite}), self._check)
    self._lines.write(line)
    self._lines.flush()
    if self._events:
      for name, value in scalars.items():
        self._events.add_scalar(name, value, step)
    if self._wandb:
      self._wandb.log({STEP: step, **finite})

  def sync(self) -> None:
    """Brings the lines to the disk, or says that they may not be there: steps count for more."""
    self._lines.flush()
    try:
      sync(self._path)
    except OSError as e:
      logging.warning('%s may not be on the disk (%s)', self._path, e.strerror)

  def close(self) -> None:
    """Flushes and closes all of them."""
    self.sync()
    self._lines.close()
    if self._events:
      self._events.close()
    if self._wandb:
      self._wandb.finish()


def log_to_wandb(project: str) -> None:
  """From now on every MetricWriter also writes to a project of Weights & Biases; '' is none.

  Raises:
    UserError: its package is not installed.
  """
  global wandb_project
  if project and importlib.util.find_spec('wandb') is None:
    raise UserError("--wandb needs its package: pip install -e '.[wandb]'")
  wandb_project = project


def wandb_names(folder: pathlib.Path) -> dict[str, str]:
  """{'name', 'group'} of the run of a job's folder in a workdir.

  A study's runs are in <workdir>/<arm>[/<place>]/seed<k>, and those of an arm are a group.
  """
  workdir = folder.parent
  if not re.fullmatch(r'seed\d+', workdir.name):
    return dict(name=f'{workdir.name}/{folder.name}', group=workdir.name)
  arm = '/'.join(workdir.parts[-3:-1])
  return dict(name=f'{arm}/{workdir.name}/{folder.name}', group=arm)


def _wandb_run(folder) -> Any:
  """The run of a folder, which goes on after a stop: its id stays in the folder."""
  import wandb

  path = folder / WANDB_ID
  if not path.exists():
    with replacing(path, 'w') as file:
      file.write(secrets.token_hex(8))
  try:
    config = json.loads((folder.parent / 'config.json').read_text())
  except (OSError, ValueError):
    config = None
  run = wandb.init(
    project=wandb_project,
    id=path.read_text(),
    **wandb_names(folder),
    config=config,
    resume='allow',
    dir=str(folder),
    settings=wandb.Settings(silent=True),
  )
  # Steps after the last checkpoint come again, which wandb's own count of steps would refuse.
  run.define_metric('*', step_metric=STEP)
  return run


def read_jsonl(path: str | os.PathLike) -> list[dict[str, Any]]:
  """The lines of a metrics file; those that are damaged are left out, with a warning.

  A last line that was cut short by a kill is left out without.
  """
  rows, damaged = check_jsonl(path)
  if damaged:
    logging.warning('%s: %s', path, left_out(damaged))
  return rows


def left_out(damaged: list[int]) -> str:
  """Says which lines are."""
  return f'line {", ".join(map(str, damaged))} is damaged and left out'


def missing(rows: Sequence[Mapping[str, Any]], step: int) -> tuple[int, int] | None:
  """Two steps between which lines of a metrics file must be missing, or None.

  Args:
    rows: the lines, in order.
    step: what the run has reached.
  """
  steps = [0, *(row['step'] for row in rows)]
  usual = max((b - a for a, b in zip(steps, steps[1:], strict=False)), default=step)
  return (steps[-1], step) if step - steps[-1] > usual else None


# Each line has the CRC-32 of itself and all before it: one that was changed or lost is seen.
SEALED = re.compile(r'(\{.*), "check": "([0-9a-f]{8})"\}')


def _sealed(line, check):
  """A line with its check, and the check; `check` is that of the line before, 0 at first."""
  check = zlib.crc32(line.encode(), check)
  return f'{line[:-1]}, "check": "{check:08x}"}}\n', check


def check_jsonl(path: str | os.PathLike) -> tuple[list[dict[str, Any]], list[int]]:
  """The whole lines of a metrics file, and the numbers of those that are not, from 1."""
  rows = []
  damaged = []
  checks = {0}  # of the line before: as computed, and as it says itself
  sealed_before = False
  *lines, _ = pathlib.Path(path).read_text(errors='replace').split('\n')
  for number, line in enumerate(lines, 1):
    sealed = SEALED.fullmatch(line)
    content = sealed[1] + '}' if sealed else line
    computed = {zlib.crc32(content.encode(), check) for check in checks}
    said = {int(sealed[2], 16)} if sealed else set()
    whole = bool(computed & said) if sealed else not sealed_before  # older files have no checks
    sealed_before = sealed_before or bool(sealed)
    checks = computed & said or computed | said
    row = _row(content) if whole else None
    if row is None:
      damaged.append(number)
    else:
      rows.append(row)
  return rows, damaged


def _row(content):
  try:
    row = json.loads(content)
  except (ValueError, RecursionError):
    return None
  return row if isinstance(row, dict) and isinstance(row.get('step'), int) else None


def _drop_lines_after(path, step):
  """Rewrites the file without damaged lines and those beyond `step`: whole, or nothing is changed.

  Returns:
    The check of its last line.
  """
  check = 0
  if not path.exists():
    return check
  rows = [row for row in read_jsonl(path) if row['step'] <= step]
  with replacing(path, 'w') as f:
    for row in rows:
      line, check = _sealed(json.dumps(row), check)
      f.write(line)
  jump = missing(rows, step)
  if jump:
    logging.warning('%s: the lines between steps %d and %d are missing', path, *jump)
  return check


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
      extra=console.PROGRESS if step < self._total else None,
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
