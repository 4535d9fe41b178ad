"""One step of a checkpoint, read and checked."""

import errno
import json
import pathlib
import re
from typing import Any, NamedTuple

import jax
from absl import logging
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import v1 as ocp

from palm_jax.base import digests
from palm_jax.base.errors import UserError
from palm_jax.base.processes import any_process


class Restored(NamedTuple):
  """What a checkpoint gave: its step, {name: tree of arrays}, and the metadata that was saved with
  it."""

  step: int
  items: dict[str, Any]
  metadata: dict[str, Any]


# What keeps a file from being read, and says nothing about what is in it.
PASSING = (
  errno.EIO,
  errno.EACCES,
  errno.EPERM,
  errno.EMFILE,
  errno.ENFILE,
  errno.ETIMEDOUT,
  errno.ESTALE,
)


class Damaged(Exception):
  """A step cannot be read, or holds other values than were saved."""


def list_steps(folder):
  """The complete steps in a folder of checkpoints, oldest first."""
  folder = pathlib.Path(folder)
  return (
    sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal()) if folder.is_dir() else []
  )


def newest(folder, steps, make_templates, damaged):
  """The newest of `steps` that is whole, or None where there is none; those damaged are appended to
  `damaged`."""
  for step in reversed(steps):
    try:
      restored = _load(folder, step, make_templates)
    except Damaged as e:
      damaged.append(step)
      logging.warning('checkpoint step %d in %s is damaged and passed over: %s', step, folder, e)
      continue
    return restored
  if steps:
    raise UserError(
      f'checkpoint step {", ".join(map(str, steps))} in {folder} is damaged: restore a copy, '
      'name another step, or remove the folder to start anew'
    )
  return None


def _load(folder, step, make_templates):
  """One step, checked. Raises Damaged, or UserError where it does not fit the templates."""
  path, items, reason, passing = folder / str(step), None, None, None
  try:
    custom = json.loads((path / '_CHECKPOINT_METADATA').read_text())['custom_metadata']
    record = custom['record']
    if digests.json_digest(record) != custom['sha256']:
      reason = 'its metadata do not match their digest'
  except (OSError, ValueError, KeyError, TypeError) as e:
    reason, passing = f'its metadata cannot be read: {one_line(e)}', _passing(e)
  _refuse_passing(path, passing)
  if any_process(reason):
    raise Damaged(reason or 'another process cannot read it')
  templates = make_templates(record)
  saved = {
    f'{name}/{leaf}': f'{about["dtype"]}{tuple(about["shape"])}'
    for name in templates
    for leaf, about in record['items'].get(name, {}).items()
  }
  if misfit := _first_misfit(saved, digests.signatures(templates)):
    raise UserError(
      f'{path} is a checkpoint of another config: {misfit}: '
      'choose another --workdir, or go back to its config'
    )
  context, this = ocp.Context(), jax.process_index()
  # Each process alone: one that finds damage leaves orbax early, and the others would wait 5
  # minutes for it.
  context.multiprocessing_options.primary_host, context.multiprocessing_options.active_processes = (
    this,
    {this},
  )
  try:
    with context:
      items = ocp.load_checkpointables(path, templates)
    # Orbax makes a typed key a plain array where its file on types is missing.
    reason = _first_misfit(digests.signatures(items), digests.signatures(templates))
  except jax.errors.JaxRuntimeError:  # out of memory says nothing about the files
    raise
  except (
    Exception
  ) as e:  # orbax raises whatever the damaged bytes lead it into, and hides the first cause
    while e.__cause__ or e.__context__:
      e = e.__cause__ or e.__context__
    reason, passing = f'orbax cannot read it ({type(e).__name__}: {one_line(e)})', _passing(e)
  _refuse_passing(path, passing)
  if any_process(reason):
    raise Damaged(reason or 'another process found damage')
  reason = digests.difference(items, record['items'])
  if any_process(reason):
    raise Damaged(reason or 'another process found damage')
  return Restored(step, items, record['metadata'])


def _passing(error):
  """The error, if it keeps a file from being read and says nothing about what is in it; else
  None."""
  code = re.search(
    r'os_error_code\W+(\d+)', str(error)
  )  # tensorstore's disk errors are ValueErrors
  number = error.errno if isinstance(error, OSError) else int(code[1]) if code else None
  return error if isinstance(error, MemoryError) or number in PASSING else None


def _refuse_passing(path, passing):
  if any_process(passing):
    reason = one_line(passing) if passing else 'another process says why'
    raise UserError(
      f'{path} cannot be read now ({reason}): mend that, or remove that step to go on from the '
      'one before, then run '
      'again; nothing was changed'
    ) from passing


def _first_misfit(there, expected):
  """Names the first leaf in which two trees' signatures differ, or None."""
  for path in [*expected, *(there.keys() - expected.keys())]:
    if there.get(path) != expected.get(path):
      return f'{path} is {there.get(path, "absent")} there, {expected.get(path, "absent")} expected'
  return None


def nested_template(saved):
  """Nested dicts of replicated ShapeDtypeStructs for a saved item: exact on any number of
  devices."""
  everywhere, tree = NamedSharding(jax.sharding.Mesh(jax.devices(), 'data'), P()), {}
  for path, leaf in saved.items():
    *parents, last = path.split('/')
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = jax.ShapeDtypeStruct(
      leaf['shape'], jax.numpy.dtype(leaf['dtype']), sharding=everywhere
    )
  return tree


def one_line(error):
  return ' '.join(str(error).split())[:300] or type(error).__name__
