"""The record of what an agent did: latents, labels, steps and actions, in order and on disk.

Its frames are drawn again from them, bit for bit where the pictures of a batch do not depend on its
size. One file a call of pretraining and process; a run that is resumed after a kill writes the
files after its last checkpoint again, with the same content.
"""

import json
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from palm_jax.base.checkpoints import load
from palm_jax.base.digests import digest
from palm_jax.base.errors import UserError
from palm_jax.base.files import replacing
from palm_jax.base.processes import any_process, from_first, is_first
from palm_jax.base.signals import raise_if_interrupted
from palm_jax.base.steps import list_steps

NAME = re.compile(r'(\d{10})_(\d{6})\.npz')  # first row, first environment


class Experience(NamedTuple):
  """R rows of E environments.

  Attributes:
    z: (R, E, z_dim) latents.
    label: (R, E) int32.
    step: (R, E) int32 steps since the episode began; 0 in its first row.
    action: (R, E, z_dim) what was done in that row, as replay.pack stores it (bfloat16 as float32);
      not done where the next row begins an episode. () where it is unknown, and (R, E, 0) in the
      files of versions that did not record it.
  """

  z: Any
  label: Any
  step: Any
  action: Any = ()


def write(folder: pathlib.Path, first_row: int, experience: Experience) -> None:
  """Adds rows; each process writes those of its own environments.

  Args:
    folder: pathlib.Path.
    first_row: of the run, the first of these.
    experience: Experience of jax.Arrays (R, E, ...), environments sharded.

  Raises:
    UserError: the rows before them were removed.
    OSError: the file cannot be written; there is then none.
  """
  if first_row and not folder.is_dir():
    raise UserError(
      f'{folder} was removed: rows 0 to {first_row - 1} of the record are lost; restore it, or '
      'record again in another --workdir'
    )
  shards = {
    field: sorted(x.addressable_shards, key=lambda s: s.index[1].start or 0)
    for field, x in experience._asdict().items()
    if not isinstance(x, tuple)
  }
  first_env = shards['step'][0].index[1].start or 0
  local: dict[str, Any] = {
    field: np.concatenate([np.asarray(s.data) for s in parts], 1) for field, parts in shards.items()
  }
  with replacing(folder / f'{first_row:010d}_{first_env:06d}.npz') as file:
    np.savez(file, **local)


def forget(folder: pathlib.Path, rows: int) -> None:
  """Removes all but the first rows; any number of processes may then write the rest again."""
  if is_first():
    for path in folder.glob('*.npz'):
      if (match := NAME.fullmatch(path.name)) and int(match[1]) >= rows:
        path.unlink()
  any_process(False)  # nobody writes before that


def read(folder: str | pathlib.Path) -> Iterator[Experience]:
  """Yields the Experience of each call, in order, all environments together.

  Raises:
    UserError: no files, damaged ones, or rows or environments that are missing.
  """
  folder, calls = pathlib.Path(folder), {}
  for path in sorted(folder.glob('*.npz')):
    match = NAME.fullmatch(path.name)
    if match:
      calls.setdefault(int(match[1]), []).append((int(match[2]), path))
  if not calls:
    raise UserError(
      f'{folder} holds no experience: give <workdir>/pretrain/experience of a run with '
      '--config.pretrain.record'
    )
  expected, environments = 0, None
  for first_row, files in calls.items():
    if first_row != expected:
      raise UserError(
        f'{folder}: rows {expected} to {first_row - 1} are missing; restore their files or record '
        'again'
      )
    parts, width = [], 0
    for first_env, path in files:
      parts.append(_load(path))
      if first_env != width or parts[-1].step.shape[0] != parts[0].step.shape[0]:
        raise UserError(
          f'{path} does not follow the file before it; restore the files of row {first_row} or '
          'record again'
        )
      width += parts[-1].step.shape[1]
    if environments not in (None, width):
      raise UserError(
        f'{folder}: {width} environments in row {first_row}, {environments} before; files are '
        'missing'
      )
    environments = width
    yield Experience(*(np.concatenate(arrays, 1) for arrays in zip(*parts, strict=True)))
    expected += parts[0].step.shape[0]
  played = _rows_played(folder)
  if expected < played:
    raise UserError(
      f'{folder}: rows {expected} to {played - 1} are missing; restore their files or record again'
    )


def _rows_played(folder):
  """Rows of the run beside which the record lies, up to its newest checkpoint; 0 if unknown."""
  try:
    config = json.loads((folder.parents[1] / 'config.json').read_text())
    length = config['pretrain']['rollout_length']
    return max(list_steps(folder.parent / 'checkpoints'), default=0) * length
  except (OSError, ValueError, KeyError, TypeError, RecursionError):
    return 0


def world_digest(generator: Any) -> str:
  """Digest of the generator that a world plays in, the same on all kinds of devices.

  What `views.w_latents` measures of it is left out, as its last bits depend on the device; so are
  the numbers of an average of w, which is drawn where a file has none.
  """

  def without_average(path, x):
    return np.zeros_like(x) if path[-1:] == (jax.tree_util.DictKey('w_avg'),) else x

  return digest(jax.tree.map_with_path(without_average, _given(generator)), {})


def _given(generator):
  """Its variables without what `views.w_latents` measures."""
  variables = generator.variables
  of_w = isinstance(variables, Mapping) and 'root' in variables
  return {'w': variables['generator']} if of_w else variables


def is_world_of(generator: Any, sha256: str) -> bool:
  """Whether a digest is the generator's, by this version or those that left out less."""
  if sha256 == world_digest(generator):
    return True
  return sha256 in (digest(_given(generator), {}), digest(generator.variables, {}))


def check_generator(run: pathlib.Path, generator: Any) -> None:
  """Raises UserError where a run played in the world of another generator than this.

  It is not known of runs without checkpoints, and of those of older versions.
  """
  folder = run / 'pretrain' / 'checkpoints'
  # As the first process sees them: to load is done by all, or by none.
  begun = from_first(list_steps(folder))
  there = load(folder, 'encoder').metadata.get('world') if begun else None
  if there and not is_world_of(generator, there):
    raise UserError(
      f'{run} played in the world of another generator (digest {there[:12]}, here '
      f'{world_digest(generator)[:12]}): its latents would be other pictures; give that one'
    )


def _load(path):
  try:
    with np.load(path) as file:
      loaded = Experience(**file)
    if isinstance(loaded.action, tuple):
      loaded = loaded._replace(action=np.zeros((*loaded.step.shape, 0), np.float32))
    if loaded.action.shape[:2] != loaded.step.shape:
      raise ValueError('shapes')
    if loaded.z.shape[:2] != loaded.step.shape or loaded.label.shape != loaded.step.shape:
      raise ValueError('shapes')
    return loaded
  except Exception as e:  # numpy and zipfile raise a dozen kinds on damage
    raise_if_interrupted(e)
    raise UserError(f'{path} is damaged ({type(e).__name__}): restore it or record again') from e


def frames(experience: Experience, render: Callable) -> np.ndarray:
  """(R, E, H, W, C) uint8, the pictures of an Experience, one row of environments at a time.

  Args:
    experience: Experience.
    render: (z (E, z_dim), label (E,)) -> (E, H, W, C) uint8, such as jit of the generator's
      pictures by to_uint8.
  """
  return np.stack(
    [
      jax.device_get(render(z, label))
      for z, label in zip(experience.z, experience.label, strict=True)
    ]
  )
