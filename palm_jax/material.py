"""What sources of pairs need beside the generator, on the devices: real images, or a record."""

import json
import math
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from palm_jax import experience
from palm_jax.base import devices
from palm_jax.base.errors import UserError
from palm_jax.base.files import user_path
from palm_jax.data.arrays import Data
from palm_jax.experience import Experience


class Images(NamedTuple):
  """Real images, sorted by label: those of label k are `count[k]` rows from `first[k]` on."""

  images: Any  # (N, H, W, C) uint8
  labels: Any  # (N,) int32
  first: Any  # (K,) int32
  count: Any  # (K,) int32


def load(
  config: ConfigDict, needs: str | None, generator: Any, mesh: Mesh, data: Data | None = None
) -> Any:
  """What a source needs beside the generator, on the mesh.

  Args:
    config: the whole config.
    needs: of the source, see pairs.Source.
    generator: as for pretrain.make_program.
    mesh: one-dimensional mesh, axis 'data'.
    data: for sources that need images.

  Returns:
    Images on every device; an Experience (R, E, ...) with environments sharded; the data of a key,
    where pairs.samples of latents are drawn by it; or ().

  Raises:
    UserError: no or a damaged record, one of another world, too few rows; images unlike the
      generator's, a class too small.
  """
  if needs == 'images':
    return devices.replicate(mesh, _images(config, data, generator.image_shape))
  if needs == 'record':
    record = _record(config, generator)
    return jax.tree.map(lambda x: devices.shard(mesh, x, P(None, 'data')), record)
  if config.pairs.samples:  # traced, so that all seeds share a program
    return devices.replicate(mesh, np.asarray(jax.random.key_data(jax.random.key(config.seed))))
  return ()


def specs(needs: str | None) -> P:
  """PartitionSpec of `load`'s result."""
  return P(None, 'data') if needs == 'record' else P()


def _images(config, data, image_shape):
  """Images of the training set, of each class the same share of pairs.samples."""
  split, num_classes, samples = data.train, len(data.class_names), config.pairs.samples
  least = 1 if config.pairs.source == 'two_views' else 2  # of a class
  if split.images.shape[1:] != tuple(image_shape):
    raise UserError(
      f'the images are {split.images.shape[1:]}, but the generator makes {tuple(image_shape)}: '
      'give images of that size'
    )
  order = np.random.default_rng(config.seed).permutation(len(split.labels))
  rows = [order[split.labels[order] == label] for label in range(num_classes)]
  if samples:
    rows = [of_class[: -(-samples // num_classes)] for of_class in rows]
  count = np.array([len(of_class) for of_class in rows], np.int32)
  if count.min() < least:
    raise UserError(
      f'class {count.argmin()} has {count.min()} images, expected {least} or more: '
      'give more, or raise pairs.samples'
    )
  rows = np.concatenate(rows)
  first = np.cumsum(count, dtype=np.int32) - count
  return Images(split.images[rows], split.labels[rows].astype(np.int32), first, count)


def _record(config, generator):
  """The Experience of pairs.record, or its first rows where pairs.samples are fewer."""
  c, p, length = config.pairs, config.pretrain, config.environment.episode_length
  recorded = user_path(c.record)
  check_same_world(config, recorded)
  experience.check_generator(recorded, generator)
  folder = recorded / 'pretrain' / 'experience'
  if not (recorded / 'results' / 'pretrain.json').exists():
    logging.warning('pairs.record=%s is not complete: if it goes on, this run is refused', recorded)
  wanted = max(3, -(-c.samples // p.num_envs)) if c.samples else math.inf
  parts, held = [], 0
  for part in experience.read(folder):
    parts.append(part[:3])  # actions are not read
    held += len(part.step)
    if held >= wanted:
      break
  record = Experience(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
  rows, num_envs = record.step.shape
  z_dim = record.z.shape[2]
  expected = (record.step[:1] + np.arange(rows)[:, None]) % length
  if z_dim != generator.z_dim or num_envs != p.num_envs or (record.step != expected).any():
    raise UserError(
      f'{folder} holds latents of {z_dim} of {num_envs} environments in episodes of '
      f'{record.step.max() + 1} steps, expected {generator.z_dim}, {p.num_envs} and {length}: take '
      'the generator, pretrain.num_envs and environment.episode_length of that run'
    )
  return Experience(*(x[: min(rows, wanted)] for x in record[:3]))


def check_same_world(config: ConfigDict, record: pathlib.Path) -> None:
  """Raises UserError where the run in the folder `record` drew other pictures of its latents."""
  try:
    there = json.loads((record / 'config.json').read_text())['environment']
    differ = [
      f'environment.{key}={there.get(key)!r} there, {config.environment[key]!r} here'
      for key in ('latent_space', 'crop', 'style_mixing', 'truncation_psi')
      if there.get(key) != config.environment[key]
    ]
  except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
    raise UserError(
      f'{record / "config.json"} cannot be read ({e}): give the workdir of a run made with '
      'pretrain.record'
    ) from e
  if differ:
    raise UserError(
      f'pairs.record={record} was made in another world ({"; ".join(differ)}): its latents would '
      'be other pictures'
    )
