"""A ring of single uint8 frames on the disk, mapped into memory.

Each frame is stored once; stacks and n-step returns are made on reading.

All environments add one row a step, side by side. A row is what was seen and what came of it. The
last picture of a game has a row too, whose action led nowhere. So a game which is only cut off
(27,000 steps, or a stop of the program) has the successor that its last transition bootstraps from.

The file is the ring itself, so a checkpoint keeps only the number of rows. Rows added after it are
added again after a kill. They must not have taken the place of rows that the checkpoint still
counts on: the file has a margin beyond the capacity, and `must_commit` asks for a checkpoint before
half of it is used. Half, because the newest checkpoint may be half-written or damaged, and then the
one before it is read.
"""

import os
import pathlib
from typing import Any, NamedTuple

import numpy as np

from palm_jax.base.errors import UserError
from palm_jax.base.files import replacing

STACK = 4


class Batch(NamedTuple):
  """B n-step transitions; U batches have a leading axis U.

  Attributes:
    stacks: (B, H, W, 4) uint8, oldest frame first, zeros before a game's first frame.
    actions: (B,) int32.
    returns: (B,) float32, sum of gamma^i r_i over the window.
    discounts: (B,) float32, weight of the value of next_stacks: gamma^(length of the window), 0
      after a lost life.
    next_stacks: (B, H, W, 4) uint8.
  """

  stacks: np.ndarray
  actions: np.ndarray
  returns: np.ndarray
  discounts: np.ndarray
  next_stacks: np.ndarray


def rows_of(capacity: int, num_envs: int, n_step: int = 1) -> int:
  """Rows for each environment.

  Raises:
    UserError: they are too few for windows of n_step.
  """
  rows = capacity // num_envs
  least = max(64, n_step + STACK + 1)
  if rows < least:
    raise UserError(
      f'a replay of capacity={capacity} has {rows} rows for each of {num_envs} environments, '
      f'expected {least} or more: raise capacity or lower num_envs'
    )
  return rows


class Replay:
  """The rows of `num_envs` games side by side.

  Args:
    path: of the file; made, or taken over as it is. All its space is reserved at once (7 GB for a
      million frames).
    capacity: frames over all environments that are sampled from.
    num_envs: E.
    frame_shape: (H, W).

  Raises:
    UserError: the capacity leaves too few rows an environment.
    OSError: no room for the file.
  """

  def __init__(
    self,
    path: str | os.PathLike,
    capacity: int,
    num_envs: int,
    frame_shape: tuple[int, ...] = (84, 84),
  ) -> None:
    self.rows = rows_of(capacity, num_envs)
    self.num_envs = num_envs
    self.total = 0
    self._margin = max(16, self.rows // 8)
    self._committed = 0
    record = np.dtype(
      [
        ('frame', np.uint8, frame_shape),
        ('action', np.int32),
        ('reward', np.float32),
        ('alive', np.bool_),
        ('start', np.bool_),
        ('transition', np.bool_),
      ]
    )
    self._file_rows = self.rows + self._margin
    self._record = record
    self._path = pathlib.Path(path)

  def begin(self) -> None:
    """Makes the file, or takes one that an earlier beginning left. Raises OSError: no room."""
    if not self._is_whole():
      size = self._size()
      # 'w+b': some network file systems reserve space by reading and writing.
      with replacing(self._path, 'w+b') as file:
        file.truncate(size)
        # A full disk must be an error here, not a SIGBUS on some later row.
        if hasattr(os, 'posix_fallocate'):
          os.posix_fallocate(file.fileno(), 0, size)
    shape = self._file_rows, self.num_envs
    self._records = np.memmap(self._path, self._record, 'r+', shape=shape)

  def _size(self):
    return self._file_rows * self.num_envs * self._record.itemsize

  def _is_whole(self):
    return self._path.exists() and self._path.stat().st_size == self._size()

  @property
  def must_commit(self) -> bool:
    """Whether a checkpoint is due, so that none of the last two would lose rows."""
    return self.total - self._committed >= self._margin // 2

  def add(
    self,
    frames: np.ndarray,
    actions: np.ndarray,
    rewards: np.ndarray,
    alive: np.ndarray,
    starts: np.ndarray,
    transitions: np.ndarray,
  ) -> None:
    """Adds a row.

    Args:
      frames: (E, H, W) uint8, the newest frame of what was seen.
      actions: (E,) integers, taken on seeing it.
      rewards: (E,) as they are to be learned from (clipped).
      alive: (E,) bool, False where the action cost a life or the game.
      starts: (E,) bool, the frame is the first of a game.
      transitions: (E,) bool, False where the action was ignored because the frame is the last of a
        game.
    """
    row = self._records[self.total % self._file_rows]
    row['frame'] = frames
    row['action'] = actions
    row['reward'] = rewards
    row['alive'] = alive
    row['start'] = starts
    row['transition'] = transitions
    self.total += 1

  def cut(self) -> None:
    """Ends all games at the newest row, as they cannot be continued.

    The row's own transition is given up.
    """
    if self.total:
      self._records['transition'][(self.total - 1) % self._file_rows] = False

  def commit(self) -> None:
    """Brings all rows to the disk; to be called just before a checkpoint with `total` in it."""
    self._records.flush()
    self._committed = self.total

  def restore(self, total: int) -> None:
    """Goes back to `total` rows, the number at a commit.

    Raises:
      UserError: the file was missing or not whole.
    """
    if total and not self._is_whole():
      raise UserError(
        f'{self._path} is missing or cut short, but the checkpoint beside it counts on {total} '
        f'rows: restore both, or remove {self._path.parent} to begin anew'
      )
    self.begin()
    self.total = self._committed = total

  def sample(
    self, generator: np.random.Generator, batch_size: int, n_step: int, gamma: float
  ) -> Batch:
    """Transitions drawn uniformly, with replacement.

    A window ends after n steps, with a lost life (no value beyond it), or on the last picture of a
    game that was cut off, from where its shorter return bootstraps. Without such starts, what is
    seen late in long games would be hidden.

    Args:
      generator: of the draws.
      batch_size: B.
      n_step: longest window.
      gamma: discount of a step.

    Raises:
      ValueError: fewer than n_step + 1 rows.
    """
    # Frames before the oldest row may be gone, and a stack reaches three back.
    low = 0 if self.total <= self.rows else self.total - self.rows + STACK - 1
    high = self.total - n_step
    if low >= high:
      raise ValueError(f'{self.total} rows hold no window of {n_step} steps')

    def draw(count):
      rows = generator.integers(low, high, count)
      return rows, generator.integers(0, self.num_envs, count)

    rows, envs = draw(batch_size)
    while (ended := ~self._get('transition', rows, envs)).any():
      rows[ended], envs[ended] = draw(ended.sum())

    window = rows[:, None] + np.arange(n_step), envs[:, None]  # (B, n)
    within = np.logical_and.accumulate(self._get('transition', *window), axis=1)
    alive = self._get('alive', *window)
    counted = within.copy()
    counted[:, 1:] &= np.logical_and.accumulate(alive, axis=1)[:, :-1]
    powers = gamma ** np.arange(n_step)
    returns = (self._get('reward', *window) * counted * powers).sum(1)
    length = counted.sum(1)
    discounts = gamma**length * (alive | ~counted).all(1)
    return Batch(
      self._stacks(rows, envs),
      self._get('action', rows, envs),
      returns.astype(np.float32),
      discounts.astype(np.float32),
      self._stacks(rows + length, envs),
    )

  def _get(self, name, rows, envs) -> Any:
    return self._records[name][rows % self._file_rows, envs]

  def _stacks(self, rows, envs):
    """(B, H, W, 4): the frames of `rows` and the three before in the same game."""
    back = rows[:, None] + np.arange(1 - STACK, 1)  # (B, 4), oldest first
    # What lies before a start, seen from the newest frame, is of another game. Rows before the
    # first wrap into rows that are not written yet.
    starts = self._get('start', back[:, 1:], envs[:, None]) | (back[:, 1:] <= 0)
    same_game = np.ones(back.shape, bool)
    same_game[:, :-1] = ~np.logical_or.accumulate(starts[:, ::-1], axis=1)[:, ::-1]
    frames = self._get('frame', back, envs[:, None])
    frames[~same_game] = 0
    return np.moveaxis(frames, 1, -1)
