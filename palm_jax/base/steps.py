"""One step of a checkpoint, read and checked."""

import errno
import json
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from absl import logging
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import v1 as ocp

from palm_jax.base import digests
from palm_jax.base.errors import UserError
from palm_jax.base.files import seen
from palm_jax.base.processes import any_process, from_first, is_first
from palm_jax.base.signals import raise_if_interrupted


class Restored(NamedTuple):
  """What a checkpoint gave."""

  step: int
  items: dict[str, Any]  # {name: tree of arrays}
  metadata: dict[str, Any]  # that was saved with it


# What keeps a file from being read, and says nothing about what is in it.
PASSING = (
  errno.EIO,
  errno.EACCES,
  errno.EPERM,
  errno.EMFILE,
  errno.ENFILE,
  errno.ETIMEDOUT,
  errno.ESTALE,
  errno.EBUSY,
  errno.ENOMEM,
  errno.ENOTCONN,
  errno.EHOSTDOWN,
)


class Damaged(Exception):
  """A step cannot be read, or holds other values than were saved."""


def list_steps(folder: str | os.PathLike) -> list[int]:
  """The complete steps in a folder of checkpoints, oldest first."""
  folder = pathlib.Path(folder)
  if not folder.is_dir():
    return []
  return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())


def newest_step(folder: pathlib.Path) -> dict[str, Any]:
  """{'step', 'sha256'} of the newest checkpoint in <folder>/checkpoints; {} where there is none."""
  steps = list_steps(folder / 'checkpoints')
  if not steps:
    return {}
  about = folder / 'checkpoints' / str(steps[-1]) / '_CHECKPOINT_METADATA'
  try:
    sha256 = json.loads(about.read_text())['custom_metadata']['sha256']
  except (OSError, ValueError, KeyError, TypeError, RecursionError):  # whoever loads it will say so
    sha256 = None
  return {'step': steps[-1], 'sha256': sha256}


def newest(
  folder: pathlib.Path,
  steps: Sequence[int],
  make_templates: Callable[[dict[str, Any]], Mapping[str, Any]],
  damaged: list[int],
) -> Restored:
  """The newest of the steps that is whole.

  Args:
    folder: of the steps.
    steps: one at least, oldest first.
    make_templates: from a step's record, {name: tree of jax.ShapeDtypeStruct with shardings} of the
      items wanted.
    damaged: steps passed over are appended to it.

  Raises:
    UserError: all are damaged; or one does not fit its templates, or cannot be read for a reason
      that may pass.
  """
  for step in reversed(steps):
    try:
      return _load(folder, step, make_templates)
    except Damaged as e:
      damaged.append(step)
      logging.warning('checkpoint step %d in %s is damaged and passed over: %s', step, folder, e)
  raise UserError(
    f'checkpoint step {", ".join(map(str, steps))} in {folder} is damaged: restore a copy, '
    'name another step, or remove the folder to start anew'
  )


def _load(folder, step, make_templates):
  """One step, checked. Raises Damaged, or UserError where it does not fit the templates."""
  path = folder / str(step)
  record = _read_record(path)
  templates = make_templates(record)
  saved = {
    f'{name}/{leaf}': f'{about["dtype"]}{tuple(about["shape"])}'
    for name in templates
    for leaf, about in record['items'].get(name, {}).items()
  }
  misfit = _first_misfit(saved, digests.signatures(templates))
  if misfit:
    raise UserError(
      f'{path} is a checkpoint of another config: {misfit}: '
      'choose another --workdir, or go back to its config'
    )
  # What this process does not see yet is no damage.
  unseen = FileNotFoundError(errno.ENOENT, 'the first process sees it')
  _refuse_passing(path, None if seen(path) else unseen)
  items = _read_items(path, templates)
  reason = digests.difference(items, record['items'])
  if any_process(reason):
    raise Damaged(reason or 'another process found damage')
  return Restored(step, items, record['metadata'])


def _read_record(path):
  """The metadata that were saved with a step, {'metadata', 'items'}, as the first process reads it.

  To the others a file server may not show yet what this one has written.
  """
  record = reason = passing = None
  try:
    if is_first():
      custom = json.loads((path / '_CHECKPOINT_METADATA').read_text())['custom_metadata']
      record = custom['record']
      if digests.json_digest(record) != custom['sha256']:
        reason = 'its metadata do not match their digest'
  except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
    reason = f'its metadata cannot be read: {one_line(e)}'
    passing = _passing(e)
  _refuse_passing(path, passing)
  if any_process(reason):
    raise Damaged(reason or 'the first process cannot read it')
  return from_first(record)


def _read_items(path, templates):
  """{name: tree of arrays} of a step."""
  items = {}
  passing = None
  context = ocp.Context()
  # Each process alone: one that finds damage leaves orbax early, and the others would wait 5
  # minutes for it.
  this = jax.process_index()
  context.multiprocessing_options.primary_host = this
  context.multiprocessing_options.active_processes = {this}
  try:
    with context:
      items = ocp.load_checkpointables(path, templates)
    # Orbax makes a typed key a plain array where its file on types is missing.
    reason = _first_misfit(digests.signatures(items), digests.signatures(templates))
  except jax.errors.JaxRuntimeError:  # out of memory says nothing about the files
    raise
  except Exception as e:  # orbax raises whatever the damaged bytes lead it into
    raise_if_interrupted(e)
    cause = _first_cause(e)
    reason = f'orbax cannot read it ({type(cause).__name__}: {one_line(cause)})'
    passing = _passing(cause)
  _refuse_passing(path, passing)
  if any_process(reason):
    raise Damaged(reason or 'another process found damage')
  return items


def _first_cause(error):
  """The error that led to this one, through others."""
  cause = error
  while cause:
    error = cause
    cause = error.__cause__ or error.__context__
  return error


def _passing(error):
  """The error if it says nothing about what is in the file, such as a missing permission."""
  number = None
  code = re.search(r'os_error_code\W+(\d+)', str(error))
  if isinstance(error, OSError):
    number = error.errno
  elif code:  # tensorstore's disk errors are ValueErrors
    number = int(code[1])
  return error if isinstance(error, MemoryError) or number in PASSING else None


def _refuse_passing(path, passing):
  """Raises UserError where any process has such an error."""
  if any_process(passing):
    reason = one_line(passing) if passing else 'another process says why'
    raise UserError(
      f'{path} cannot be read now ({reason}): fix that, or remove that step to resume from the one '
      'before, then run again; nothing was changed'
    ) from passing


def _first_misfit(there, expected):
  """Names the first leaf in which two trees' signatures differ, or None."""
  for path in [*expected, *(there.keys() - expected.keys())]:
    if there.get(path) != expected.get(path):
      return f'{path} is {there.get(path, "absent")} there, {expected.get(path, "absent")} expected'
  return None


def nested_template(saved: Mapping[str, Any]) -> dict[str, Any]:
  """Nested dicts of ShapeDtypeStructs for a saved item, the same array on every device."""
  everywhere = NamedSharding(jax.sharding.Mesh(jax.devices(), 'data'), P())
  tree = {}
  for path, leaf in saved.items():
    *parents, last = path.split('/')
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = jax.ShapeDtypeStruct(
      leaf['shape'], jax.numpy.dtype(leaf['dtype']), sharding=everywhere
    )
  return tree


def one_line(error: BaseException) -> str:
  """The beginning of an error's message, or its kind where it has none."""
  return ' '.join(str(error).split())[:300] or type(error).__name__
