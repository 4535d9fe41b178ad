"""The sets of pictures whose coverage `diversity` compares."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from palm_jax.base.errors import UserError
from palm_jax.base.metrics import Progress
from palm_jax.data.arrays import Data
from palm_jax.evaluate import play
from palm_jax.job import Run

Pictures = Callable[[np.ndarray], np.ndarray]  # rows (B,) int -> (B, H, W, C) uint8


def records(this: Run, generator: Any) -> list[tuple[np.ndarray, np.ndarray]]:
  """(z, labels) of recorded frames, one pair a draw. Raises UserError, see play.recorded."""
  c, folder = this.config.diversity, this.workdir / 'pretrain' / 'experience'
  records = [
    play.recorded(folder, c.num_images, [this.config.seed, draw]) for draw in range(c.draws)
  ]
  shape = records[0][0].shape[1:]
  if shape != (generator.z_dim,):
    raise UserError(
      f'{folder} holds latents of {shape}, but the generator takes ({generator.z_dim},): '
      'give the generator that was played in'
    )
  return records


def number(c: ConfigDict, data: Data, records: list | None) -> int:
  """Images of each set: as many as asked for, or as there are. Raises UserError for too few."""
  available = {
    'half of the training images': len(data.train.images) // 2,
    'test images': len(data.test.images),
  }
  if records:
    available['recorded frames'] = len(records[0][0])
  least = min(available, key=lambda name: available[name])
  n = min(c.num_images, available[least])
  if n <= c.neighbours:
    raise UserError(
      f'there are {n} {least}, expected more than diversity.neighbours={c.neighbours}: give more'
    )
  if n < c.num_images:
    logging.warning(
      'diversity: %s images of each set instead of diversity.num_images=%s, because there are %s '
      '%s',
      n,
      c.num_images,
      available[least],
      least,
    )
  return n


def draw(
  this: Run, draw: int, n: int, arms: dict[str, play.Arm], num_classes: int, records: list | None
) -> tuple[dict[str, Pictures], Pictures]:
  """The sets of one draw, {set: Pictures}, and the training images that they are compared with."""
  train, test = this.data.train.images, this.data.test.images
  rng = np.random.default_rng([this.config.seed, draw])
  key = jax.random.fold_in(jax.random.key(this.config.seed), draw)
  order, test_order = rng.permutation(len(train)), rng.permutation(len(test))
  record = records[draw] if records else None
  length = this.config.environment.episode_length
  pictures = generated(arms, key, n, num_classes, length, record)
  pictures['other training images'] = _shown(train, order[n : 2 * n])
  pictures['test images'] = _shown(test, test_order)
  return pictures, _shown(train, order)


def _shown(images, order):
  return lambda rows: images[order[rows]]


def kept(pictures: Pictures, n: int, batch: int, what: str) -> Pictures:
  """The same n pictures out of the host's memory, drawn `batch` at a time, with progress."""
  progress, parts = Progress(f'diversity: {what}', n, 'images'), []
  for start in range(0, n, batch):
    parts.append(pictures(np.arange(start, start + batch) % n))
    progress.update(min(start + batch, n), {})
  images = np.concatenate(parts)[:n]
  return lambda rows: images[rows]


def generated(
  arms: dict[str, play.Arm],
  key: jax.Array,
  n: int,
  num_classes: int,
  episode_length: int,
  record: tuple[np.ndarray, np.ndarray] | None = None,
) -> dict[str, Pictures]:
  """One draw of the generated sets, n images each, with the same labels in all but the record.

  Args:
    arms: see `play.make_arms`.
    key: of the draw; `explored` and `random actions` begin alike and differ by their actions only.
    n: images of each.
    num_classes: of the generator; 0 is unconditional. Image i is of all classes in turn.
    episode_length: frames an episode.
    record: (z, labels) of `play.recorded`, n or more, which are then a set, too, with their own
      labels.

  Returns:
    {set: pictures of rows in [0, n)}.
  """
  ids = play.by_chosen_step(key, np.arange(n, dtype=np.int32), episode_length)
  labels = ids % max(num_classes, 1)
  pictures = lambda arm, which, labels: lambda rows: arms[arm](key, which[rows], labels[rows])
  sets = {'explored': pictures('policy', ids, labels)}
  if record:
    sets['whole record'] = pictures('record', *record)
  sets['random actions'] = pictures('uniform', ids, labels)
  sets['independent'] = pictures('independent', ids, labels)
  return sets
