"""The training set of a generator: whole on the devices, or fed to them call by call."""

import functools
import importlib.util
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from palm_jax.base import devices
from palm_jax.base.errors import UserError
from palm_jax.base.processes import any_process
from palm_jax.generator.samples import batch_indices

PLACES = 'auto', 'device', 'host'
SHARE = 0.25  # of a device's memory that the pictures may take there
AHEAD = 2  # calls whose pictures are gathered while the devices compute


class Walk(NamedTuple):
  """The order in which a training goes through its set.

  Attributes:
    seed: of the run.
    batch: images of an iteration.
    per_call: iterations of a compiled call.
    mirror: whether flipped copies are part of the set.
  """

  seed: int
  batch: int
  per_call: int
  mirror: bool

  def indices(self, call: int, count: int) -> np.ndarray:
    """(per_call, batch) int32 of the call with this number; from `count` on they are flipped."""
    size, images = count * (2 if self.mirror else 1), self.per_call * self.batch
    return batch_indices(self.seed, call * images, images, size).reshape(self.per_call, self.batch)


def place(c: ConfigDict, images: np.ndarray, mesh: Mesh) -> str:
  """'device' or 'host': where the pictures lie by the config's section `generator`.

  Raises:
    UserError: they are to be fed and grain is not installed.
  """
  where = c.data_on
  if where == 'auto':
    fits = images.nbytes <= SHARE * devices.memory_bytes(mesh)
    where = 'host' if any_process(not fits) else 'device'  # one program for all
  if where == 'host' and not importlib.util.find_spec('grain'):
    raise UserError(
      f'generator.data_on={c.data_on}: {images.nbytes / 2**30:.1f} GiB of pictures are fed to the '
      "devices by grain, which is not installed: pip install 'palm_jax[stream]'"
    )
  return where


def feed(
  images: np.ndarray, labels: np.ndarray, walk: Walk, where: str, first: int, mesh: Mesh
) -> Iterator[tuple[jax.Array, jax.Array, jax.Array]]:
  """What `step.make_train_call` takes beside its state, endlessly, from call number `first` on.

  It is the same whatever the number of devices, and a function of the call's number, so that a
  resumed run goes on exactly where it stopped.

  Args:
    images: (N, H, W, C) uint8; may be a file that is mapped into memory.
    labels: (N,) int32.
    where: of `place`.
  """
  whole = devices.replicate(mesh, labels)
  if where == 'device':
    there = devices.replicate(mesh, images)
    call = first
    while True:
      yield there, whole, devices.replicate(mesh, walk.indices(call, len(images)))
      call += 1
  import grain  # an extra

  gather = functools.partial(_gathered, images, walk)
  calls: Any = grain.MapDataset.range(first, 2**31 - 1).map(gather)
  # One thread keeps their order, and the disk or memory is what limits it.
  options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=AHEAD)
  for block, indices in calls.to_iter_dataset(options):
    yield devices.replicate(mesh, block), whole, devices.replicate(mesh, indices)


def _gathered(images, walk, call):
  """The pictures (per_call, batch, H, W, C) of a call, flipped where they are to be; indices."""
  indices = walk.indices(int(call), len(images))
  block = images[indices % len(images)]
  flipped = indices >= len(images)
  block[flipped] = block[flipped][:, :, ::-1]
  return block, indices
