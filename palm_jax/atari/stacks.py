"""Stacks of frames, drawn evenly from a run of known length and kept on the disk."""

import itertools
import math
import pathlib
import zipfile
from collections.abc import Iterable

import numpy as np

from palm_jax.atari.play import PURPOSES
from palm_jax.base.files import replacing

STACKS_IN_SHARD = 1024


class StackSample:
  """Stacks drawn uniformly from a run of known length: one in each of `count` equal parts of it.

  Every step of the run is equally likely, but for parts that differ by a step. The sample spreads
  over the whole run, and it only ever grows: there is nothing to replace, as there would be in a
  reservoir, so what is on the disk stays right whenever the run is killed.

  Args:
    folder: for the shards.
    agent_steps: of the run, over all environments; step s is environment s % E of row s // E.
    count: stacks, at most agent_steps.
    num_envs: E.
    seed: of the draws.
  """

  def __init__(
    self, folder: pathlib.Path, agent_steps: int, count: int, num_envs: int, seed: int
  ) -> None:
    self._folder = folder
    self._steps = agent_steps
    self._size = count
    self._num_envs = num_envs
    self._seed = seed
    self.restore(0)

  def restore(self, count: int) -> None:
    """Goes back to the first `count` stacks, the number at a commit."""
    self.count = count
    self._open = []
    if count % STACKS_IN_SHARD and count < self._size:
      with np.load(self._path(count // STACKS_IN_SHARD)) as shard:
        self._open = list(shard['images'][: count % STACKS_IN_SHARD])
    self._next = self._draw()

  def take(self, row: int, stacks: np.ndarray) -> None:
    """Keeps those of stacks (E, H, W, 4) that were drawn. Rows come in order."""
    while self._next < (row + 1) * self._num_envs:
      place = int(self._next) - row * self._num_envs
      self._open.append(stacks[place].copy())
      self.count += 1
      self._next = self._draw()
      if self.count % STACKS_IN_SHARD == 0:
        self._write()
        self._open = []

  def commit(self) -> int:
    """Brings all stacks to the disk; returns their number."""
    if self._open:
      self._write()
    return self.count

  def finish(self, path: pathlib.Path) -> None:
    """Writes all stacks to one .npz.

    It holds images (N, H, W, 4) uint8, oldest frame first, and labels (N,), all 0.
    """
    if path.exists():  # it is whole, and its shards may be gone
      return
    paths = [self._path(i) for i in range(-(-self.count // STACKS_IN_SHARD))]
    write_stacks(path, self.count, (np.load(path)['images'] for path in paths))

  def _path(self, shard):
    return self._folder / f'{shard:06d}.npz'

  def _write(self):
    path = self._path((self.count - 1) // STACKS_IN_SHARD)
    write_stacks(path, len(self._open), [np.stack(self._open)])

  def _draw(self):
    """The step of the next stack, infinite after the last."""
    if self.count == self._size:
      return math.inf
    start, stop = (i * self._steps // self._size for i in (self.count, self.count + 1))
    generator = np.random.default_rng([self._seed, PURPOSES['stacks'], self.count])
    return int(generator.integers(start, stop))


def write_stacks(path: pathlib.Path, count: int, blocks: Iterable[np.ndarray]) -> None:
  """Writes an .npz of images (count, H, W, 4) and labels, all 0.

  The images come in blocks (n, H, W, 4), which need not fit into memory together.
  """

  def header(file, shape, dtype):
    np.lib.format.write_array_header_1_0(
      file, dict(descr=np.lib.format.dtype_to_descr(dtype), fortran_order=False, shape=shape)
    )

  blocks = iter(blocks)
  first = next(blocks)
  with (
    replacing(path) as file,
    zipfile.ZipFile(file, 'w', zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
  ):
    with archive.open('images.npy', 'w', force_zip64=True) as images:
      header(images, (count, *first.shape[1:]), np.dtype(np.uint8))
      for block in itertools.chain([first], blocks):
        images.write(np.ascontiguousarray(block).data)
    with archive.open('labels.npy', 'w') as labels:
      np.lib.format.write_array(labels, np.zeros(count, np.int64))
