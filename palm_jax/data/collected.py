"""The data that the job `collect` left in a workdir: stacks of frames."""

import pathlib

import numpy as np

from palm_jax.base.errors import UserError
from palm_jax.base.results import read_result
from palm_jax.data.arrays import Data
from palm_jax.data.load import load

COLLECTED = 'collect'  # as config.data.name; and the folder of that job


def check(name: str, size: int) -> None:
  """Raises UserError where `collect` is to be resized: its frames have the size that it was told.

  Args:
    name: config.data.name.
    size: config.data.size.
  """
  if name == COLLECTED and size:
    raise UserError(
      f'data.size={size} with data.name={COLLECTED}: frames are collected at the size that plays; '
      'set data.size to 0'
    )


def collected_stacks(workdir: pathlib.Path) -> pathlib.Path:
  """The file with what was collected."""
  return workdir / COLLECTED / 'stacks.npz'


def collected_digest(workdir: pathlib.Path) -> str | None:
  """Digest of that file, as the job has written it; None where it has not, or is of before that."""
  path = workdir / 'results' / f'{COLLECTED}.json'
  try:
    return read_result(path)['stacks']['sha256']
  except (OSError, ValueError, LookupError, TypeError):
    return None


def load_collected(workdir: pathlib.Path, newest: bool = False) -> Data:
  """The stacks, or the newest frame of each.

  Raises:
    UserError: there are none.
  """
  path = collected_stacks(workdir)
  if not path.exists():
    raise UserError(f'{path} is missing: run --job=collect first, or give --config.data.name')
  stacks = load(path, stacks=True)
  if not newest:
    return stacks
  last = lambda split: split._replace(images=np.ascontiguousarray(split.images[..., -1:]))
  source = f'{stacks.source}, the newest frame of each'
  return stacks._replace(train=last(stacks.train), test=last(stacks.test), source=source)
