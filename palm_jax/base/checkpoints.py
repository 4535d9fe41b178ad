"""Checkpoints with digests, because orbax loads flipped bytes silently.

A step is `<folder>/<step>/`, with one folder for each item. Orbax writes it under a temporary name
and renames it, so a step that can be seen is complete. The digests lie in the step's own metadata:
SHA-256 of each block of each array.
"""

import logging as python_logging
import os
import pathlib
import shutil
import time
from collections.abc import Mapping
from typing import Any, Self

import jax
from absl import logging
from orbax.checkpoint import v1 as ocp

from palm_jax.base import digests, files
from palm_jax.base.errors import UserError
from palm_jax.base.files import sync
from palm_jax.base.processes import any_process, from_first
from palm_jax.base.signals import raise_if_interrupted
from palm_jax.base.steps import Restored, list_steps, nested_template, newest, one_line


class Checkpoints:
  """The checkpoints of one run. All processes call each method together.

  Args:
    folder: of the steps; made if absent, and no other run's. What a killed run left half-written in
      it is removed.
    keep: how many of the newest steps stay; there is one more while a save is under way or not yet
      waited for.

  Raises:
    UserError: the folder cannot be made.
  """

  def __init__(self, folder: str | os.PathLike, keep: int = 2):
    self.folder = pathlib.Path(folder).absolute()
    self._keep = keep
    self._pending = None  # (step, response) of the save under way
    self._damaged = []
    _quieten_orbax()
    error = None
    try:
      if jax.process_index() == 0:
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.glob('*.orbax-checkpoint-tmp*'):
          shutil.rmtree(path)
        for path in self.folder.glob('*.deleted'):
          _remove(path)
    except OSError as e:
      error = e
    if any_process(error):
      reason = error.strerror if error else 'another process says why'
      raise UserError(
        f'{self.folder} cannot hold checkpoints ({reason}): choose another --workdir'
      ) from error

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def steps(self) -> list[int]:
    """The complete steps, oldest first."""
    return list_steps(self.folder)

  def latest_step(self) -> int | None:
    """The newest complete step, or None."""
    return max(self.steps(), default=None)

  def save(self, step: int, items: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
    """Starts to save.

    Returns when all arrays are copied and hashed, so the caller may donate them at once. Where the
    save before found no room, this one is waited for, too: all that was lost is in it.

    Args:
      step: beyond every step of the folder.
      items: {name: tree of arrays}; each can be restored without the others.
      metadata: all of it JSON.

    Raises:
      UserError: this save found no room or no permission after the one before (among several
        processes, the one before did; earlier steps are untouched); or the folder has a newer step.
    """
    try:
      self.wait()
    except UserError as e:
      if jax.process_count() > 1:  # the others do not know
        raise
      logging.warning('%s): step %d is tried in its place', str(e).rpartition('): ')[0], step)
      self._begin(step, items, metadata)
      self.wait()
    else:
      self._begin(step, items, metadata)

  def _begin(self, step, items, metadata):
    """Starts to save, when no save is under way."""
    good = [s for s in self.steps() if s not in self._damaged]
    if good and step <= good[-1]:
      raise UserError(
        f'{self.folder} already holds step {good[-1]}, so step {step} cannot be saved there: '
        'resume from it or choose another --workdir'
      )
    self._set_aside_damaged(step)
    record = {
      'metadata': metadata,
      'items': {name: digests.describe(tree) for name, tree in items.items()},
    }
    context = ocp.Context()
    # Else a refused mkdir would delay the exit by 5 minutes.
    context.async_options.create_directories_asynchronously = False
    try:
      with context:
        response = ocp.save_checkpointables_async(
          str(self.folder / str(step)),
          dict(items),
          custom_metadata={'record': record, 'sha256': digests.json_digest(record)},
        )
    except (OSError, ValueError) as e:
      self._refuse(step, e)
    self._pending = step, response

  def wait(self) -> None:
    """Waits for the save under way, then removes the steps beyond `keep`.

    Raises:
      UserError: no room or no permission. Earlier steps are untouched, and nothing of this one
        stays.
    """
    if self._pending is None:
      return
    (step, response), self._pending = self._pending, None
    try:
      response.result()
    except (OSError, ValueError) as e:
      self._refuse(step, e)
    error = None
    folder = self.folder / str(step)
    if jax.process_index() == 0:
      try:
        # Orbax leaves that to the system, but older steps are removed now.
        sync(*folder.rglob('*'), folder, self.folder)
      except OSError as e:
        error = e
    if any_process(error):
      self._refuse(step, error or OSError('the first process says why'))
    if jax.process_index() == 0:
      for old in self.steps()[: -self._keep]:
        # Renamed first: a run killed in the middle of removing leaves no half of a step behind.
        gone = self.folder / f'{old}.deleted'
        try:
          os.rename(self.folder / str(old), gone)
        except OSError as e:  # the run goes on with a step more
          logging.warning('%s could not be removed (%s)', self.folder / str(old), e.strerror)
        else:
          _remove(gone)

  close = wait

  def _set_aside_damaged(self, step):
    """So that they neither count nor are resumed from; before `step` is saved."""
    error = None
    try:
      for name in map(str, self._damaged):
        if jax.process_index() == 0:
          shutil.rmtree(self.folder / f'{name}.damaged', ignore_errors=True)
          os.rename(self.folder / name, self.folder / f'{name}.damaged')
    except OSError as e:
      error = e
    if any_process(error):
      self._refuse(step, error or OSError('the first process says why'))
    self._damaged = []

  def _refuse(self, step, error):
    raise_if_interrupted(error)
    # Tensorstore's disk errors are ValueErrors.
    if not isinstance(error, OSError) and 'os_error_code' not in str(error):
      raise error
    for _ in range(50):  # orbax's threads may still be writing
      there = [*self.folder.glob(f'{step}.orbax-checkpoint-tmp*')]
      for path in there:
        shutil.rmtree(path, ignore_errors=True)
      if not there:
        break
      time.sleep(0.1)
    remedy = isinstance(error, OSError) and files.remedy(error)
    raise UserError(
      f'checkpoint step {step} could not be written to {self.folder} ({one_line(error)}): '
      f'{remedy or "free space or fix permissions there"}, then run again; earlier steps are '
      'untouched'
    ) from error

  def restore(self, templates: Mapping[str, Any]) -> Restored | None:
    """The newest step that is whole, None where there is no step.

    Damaged newer ones are named in the log, and set aside at the next save.

    Args:
      templates: {name: tree of jax.ShapeDtypeStruct with shardings} of the items wanted, on any
        number of devices.

    Raises:
      UserError: every step is damaged, the newest whole one belongs to another config, or one
        cannot be read for a reason that may pass.
    """
    self.wait()
    self._damaged = []
    steps = from_first(self.steps())
    return newest(self.folder, steps, lambda _: templates, self._damaged) if steps else None


def load_item(
  folder: str | os.PathLike, name: str, step: int | None = None, template: Any = None
) -> tuple[int, Any]:
  """(step, item) of `load`; without a template, in numpy arrays."""
  restored = load(folder, name, step, template)
  return restored.step, restored.items[name]


def load(
  folder: str | os.PathLike, name: str, step: int | None = None, template: Any = None
) -> Restored:
  """Reads one item of a step, and nothing else of it but what was saved with all.

  It writes nothing, so the folder may be that of a running job.

  Args:
    folder: of the steps.
    name: of the item.
    step: None for the newest that is whole.
    template: tree of jax.ShapeDtypeStruct with shardings; None gives numpy arrays, for an item of
      nested dicts only.

  Returns:
    Restored with the one item.

  Raises:
    UserError: no such step or item; damage (for step=None: of every step); or another shape than
      the template's.
  """
  _quieten_orbax()
  folder = pathlib.Path(folder).absolute()

  def templates(record):
    if name not in record['items']:
      raise UserError(
        f'{folder} has no item {name!r}, only {", ".join(record["items"])}: name one of them'
      )
    return {name: template or nested_template(record['items'][name])}

  steps = from_first(list_steps(folder))  # another may be saved at any moment
  if step not in (None, *steps) or not steps:
    job = f'run --job={folder.parent.name} first'
    if steps:
      raise UserError(f'{folder} has no checkpoint step {step}, only {steps}: name one of them')
    raise UserError(f'{folder} has no checkpoint: {job}, in that workdir, or name another')
  restored = newest(folder, steps if step is None else [step], templates, [])
  return restored if template else restored._replace(items=jax.device_get(restored.items))


def _remove(folder):
  """Removes what no longer counts; what a file server still holds of it stays for a while."""
  try:
    shutil.rmtree(folder)
  except OSError as e:
    logging.warning('%s could not be removed whole (%s)', folder, e.strerror)


def _quieten_orbax():
  for logger in (logging.get_absl_logger(), python_logging.getLogger('asyncio')):
    logger.addFilter(_without_orbax_chatter)


def _without_orbax_chatter(record):
  """False for lines of orbax below a warning, and for errors that it raises later anyway.

  It logs every stage of a save; and a disk error or damage, before it raises it, once for each
  thread with its stack.
  """
  message = record.getMessage()
  if '_SignalingThread' in message:
    return False
  if 'exception was never retrieved' in message and 'orbax' in message:
    return False
  return f'{os.sep}orbax{os.sep}' not in record.pathname or record.levelno >= python_logging.WARNING
