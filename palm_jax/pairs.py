"""Where positive pairs come from: play, its record, real images, or the generator alone. One entry
of SOURCES an origin.

A source either plays, and its pairs are consecutive frames of the replay ring, or draws pairs by
itself on the device. Draws are functions of (key, global group id), so they do not depend on the
number of devices.
"""

import json
import math
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from palm_jax import experience, replay
from palm_jax.base import devices
from palm_jax.base.errors import UserError


def default_config():
  return ConfigDict(
    dict(
      source='explored',  # see SOURCES
      # unique samples that there are to draw from, for sources that do not play; 0: no limit
      samples=0,
      record='',  # workdir of a run with pretrain.record, for passive_*
      std=0.25,  # of jahanian_gaussian in z: ali-design/GenRep, its StyleGAN2 script
      truncation_psi=0.9,  # of jahanian_gaussian: the same
    )
  )


class Source(NamedTuple):
  """Attributes: play: who fills the ring, 'policy', 'random' actions or 'record'; None: there is no
  ring. needs: 'record' or 'images', which lie on the devices beside the generator; None: nothing.
  draw: (Draw, keys (V,), n) -> frames (V * n, H, W, C) uint8, their partners, labels (V * n,)
  int32; None: from the ring.
  """

  play: str | None
  needs: str | None = None
  draw: Callable | None = None


class Draw(NamedTuple):
  """What a source draws with.

  Attributes:
    config: the whole config.
    material: see `load`; in shard_map, this device's share of it.
    render: (z (B, z_dim), labels (B,), truncation_psi) -> (B, H, W, C) uint8.
    z_dim, num_classes: of the generator.
    dtype: of latents.
  """

  config: ConfigDict
  material: Any
  render: Callable
  z_dim: int
  num_classes: int
  dtype: Any


class Images(NamedTuple):
  """Real images, sorted by label: those of label k are `count[k]` rows from `first[k]` on."""

  images: jax.Array  # (N, H, W, C) uint8
  labels: jax.Array  # (N,) int32
  first: jax.Array  # (K,) int32
  count: jax.Array  # (K,) int32


def independent(d, keys, n):
  """Two independent latents of one label (Jahanian et al., arXiv 2106.05258: 'random')."""

  def one(key):
    key_label, key_z = jax.random.split(key)
    return jax.random.normal(key_z, (2, d.z_dim), d.dtype), _label(d, key_label)

  return _rendered(d, one, keys, n, d.config.environment.truncation_psi)


def gaussian(d, keys, n):
  """A latent and the same with normal noise of `pairs.std`, truncated (Jahanian et al.:
  'Gaussian')."""

  def one(key):
    key_label, key_z = jax.random.split(key)
    z, noise = jax.random.normal(key_z, (2, d.z_dim), d.dtype)
    return jnp.stack([z, z + d.config.pairs.std * noise]), _label(d, key_label)

  return _rendered(d, one, keys, n, d.config.pairs.truncation_psi)


def recorded(d, keys, n):
  """Consecutive steps, uniformly from all of the record ('random passive')."""
  lived, length = d.material, d.config.environment.episode_length
  rows, num_envs = lived.step.shape
  env, row = replay.draw_rows(jnp.int32(rows), rows, keys, n, lived.step[0], length, num_envs)
  first, second = (
    d.render(
      lived.z[r, env].astype(d.dtype), lived.label[r, env], d.config.environment.truncation_psi
    )
    for r in (row, row + 1)
  )
  return first, second, lived.label[row, env]


def same_label(d, keys, n):
  """Two different real images of one label ('static')."""
  m = d.material

  def one(key):
    key_label, key_rows = jax.random.split(key)
    label = jax.random.randint(key_label, (), 0, len(m.count), jnp.int32)
    first, step = jax.random.randint(
      key_rows, (2,), 0, jnp.stack([m.count[label], m.count[label] - 1])
    )
    return m.first[label] + jnp.stack([first, (first + 1 + step) % m.count[label]])

  first, second = jax.vmap(one)(_sample_keys(keys, n)).T
  return m.images[first], m.images[second], m.labels[first]


def same_image(d, keys, n):
  """One real image twice, for simsiam.augment to make two views of."""
  rows = jax.vmap(lambda key: jax.random.randint(key, (), 0, len(d.material.labels)))(
    _sample_keys(keys, n)
  )
  return d.material.images[rows], d.material.images[rows], d.material.labels[rows]


SOURCES = {
  'explored': Source('policy'),  # PALM
  'random_action': Source('random'),  # paper Figure 4
  'passive_ordered': Source(
    'record', needs='record'
  ),  # Figure 6: what another run lived through, in its order
  'passive_random': Source(None, needs='record', draw=recorded),  # Figure 6
  'static': Source(None, needs='images', draw=same_label),  # Figure 6
  'two_views': Source(
    None, needs='images', draw=same_image
  ),  # SimSiam and SimCLR on real images, with augmentation
  'jahanian_random': Source(None, draw=independent),  # Figure 6
  'jahanian_gaussian': Source(None, draw=gaussian),  # Figure 6
}


def load(config, generator, mesh, data=None):
  """What the config's source needs beside the generator, on the mesh.

  Args:
    config: the whole config.
    generator: as for pretrain.make_program.
    mesh: one-dimensional mesh, axis 'data'.
    data: palm_jax.data.load.Data, for sources that need images.

  Returns:
    Images on every device; an experience.Experience (R, E, ...) with environments sharded; the data
    of a key, where pairs.samples of latents are drawn by it; or ().

  Raises:
    UserError: no or damaged record, one of another world, too few rows; images unlike the
      generator's, a class too small.
  """
  c, needs = config.pairs, SOURCES[config.pairs.source].needs
  if needs == 'images':
    return devices.replicate(
      mesh,
      _images(
        data.train,
        len(data.class_names),
        c.samples,
        generator.image_shape,
        config.seed,
        least=1 if c.source == 'two_views' else 2,
      ),
    )
  if needs == 'record':
    lived = _record(config, generator)
    return jax.tree.map(lambda x: devices.shard(mesh, x, P(None, 'data')), lived)
  if c.samples:  # traced, so that all seeds share a program
    return devices.replicate(mesh, np.asarray(jax.random.key_data(jax.random.key(config.seed))))
  return ()


def specs(config):
  """PartitionSpec of `load`'s result."""
  return P(None, 'data') if SOURCES[config.pairs.source].needs == 'record' else P()


def check_config(config):
  """Raises UserError on settings of the whole config's section `pairs` that cannot work."""
  c = config.pairs
  if c.source not in SOURCES:
    raise UserError(f'pairs.source={c.source!r} is unknown: choose one of {", ".join(SOURCES)}')
  source = SOURCES[c.source]
  if c.samples and (c.samples < 0 or source.play):
    raise UserError(
      f'pairs.samples={c.samples} with pairs.source={c.source!r}: sources that play see '
      'pretrain.env_steps '
      'samples; others take 0 (no limit) or more'
    )
  if bool(c.record) != (source.needs == 'record'):
    raise UserError(
      f'pairs.record={c.record!r} with pairs.source={c.source!r}: give the workdir of a run made '
      'with '
      'pretrain.record for passive_*, and none for others'
    )
  if config.pretrain.record and source.play not in ('policy', 'random'):
    raise UserError(
      f'pretrain.record with pairs.source={c.source!r}: nothing is lived through there; leave it '
      'off'
    )
  if config.environment.stack > 1 and source.play not in ('policy', 'random'):
    raise UserError(
      f'environment.stack={config.environment.stack} with pairs.source={c.source!r}: only who '
      'plays sees pictures '
      'one after another; set it to 1'
    )
  if c.std < 0:
    raise UserError(f'pairs.std={c.std} is negative: set it to 0 or more')
  if c.source == 'two_views' and config.simsiam.augment == 'none':
    raise UserError(
      "pairs.source='two_views' with simsiam.augment='none' gives the same picture twice: "
      "set simsiam.augment='simsiam'"
    )
  if config.simsiam.objective == 'supcon' and source.draw is None:
    raise UserError(
      f"simsiam.objective='supcon' needs labels, which pairs.source={c.source!r} never sees: "
      f'choose one of {", ".join(name for name, source in SOURCES.items() if source.draw)}'
    )


def require_policy(config, job):
  """Raises UserError where a job asks for a policy and the whole config's source of pairs trains
  none."""
  check_config(config)
  if SOURCES[config.pairs.source].play != 'policy':
    raise UserError(
      f'--job={job} asks for a policy, which pairs.source={config.pairs.source!r} trains none of: '
      "it is for pairs.source='explored'"
    )


def _images(split, num_classes, samples, image_shape, seed, least):
  if split.images.shape[1:] != tuple(image_shape):
    raise UserError(
      f'the images are {split.images.shape[1:]}, but the generator makes {tuple(image_shape)}: '
      'give images of that size'
    )
  order = np.random.default_rng(seed).permutation(len(split.labels))
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
  return Images(
    split.images[rows],
    split.labels[rows].astype(np.int32),
    np.cumsum(count, dtype=np.int32) - count,
    count,
  )


def _record(config, generator):
  c, p, length = config.pairs, config.pretrain, config.environment.episode_length
  folder = pathlib.Path(c.record) / 'pretrain' / 'experience'
  check_same_world(config, pathlib.Path(c.record))
  parts, held, wanted = [], 0, max(3, -(-c.samples // p.num_envs)) if c.samples else math.inf
  for part in experience.read(folder):
    parts.append(part)
    held += len(part.step)
    if held >= wanted:
      break
  lived = experience.Experience(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
  rows, num_envs = lived.step.shape
  expected = lived.step[:1] + np.arange(rows)[:, None]
  if (
    lived.z.shape[2] != generator.z_dim
    or num_envs != p.num_envs
    or (lived.step != expected % length).any()
  ):
    raise UserError(
      f'{folder} holds latents of {lived.z.shape[2]} of {num_envs} environments in episodes of '
      f'{lived.step.max() + 1} steps, expected {generator.z_dim}, {p.num_envs} and {length}: take '
      'the '
      'generator, pretrain.num_envs and environment.episode_length of that run'
    )
  return experience.Experience(*(x[: min(rows, wanted)] for x in lived))


def check_same_world(config, record):
  """Raises UserError where the run in the folder `record` saw other pictures of its latents than
  this config would."""
  try:
    there = json.loads((record / 'config.json').read_text())
    differ = [
      f'environment.{key}={there["environment"].get(key)!r} there, {config.environment[key]!r} here'
      for key in ('latent_space', 'crop', 'truncation_psi')
      if there['environment'].get(key) != config.environment[key]
    ]
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
    raise UserError(
      f'{record / "config.json"} cannot be read ({e}): give the workdir of a run made with '
      'pretrain.record'
    ) from e
  if differ:
    raise UserError(
      f'pairs.record={record} was made in another world ({"; ".join(differ)}): its latents would '
      'be other pictures'
    )


def _label(d, key):
  return jax.random.randint(key, (), 0, max(d.num_classes, 1), jnp.int32)


def _sample_keys(keys, n):
  """(V,) group keys -> (V * n,) keys."""
  return jax.vmap(lambda key: jax.random.split(key, n))(keys).reshape(-1)


def _rendered(d, one, keys, n, truncation_psi):
  """Pictures of the latents (2, z_dim) and label that `one` draws from a key; pairs.samples limits
  the keys."""
  keys, samples = _sample_keys(keys, n), d.config.pairs.samples
  if samples:
    numbers = jax.vmap(lambda key: jax.random.randint(key, (), 0, samples))(keys)
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.wrap_key_data(d.material), i))(numbers)
  z, labels = jax.vmap(one)(keys)
  return (
    d.render(z[:, 0], labels, truncation_psi),
    d.render(z[:, 1], labels, truncation_psi),
    labels,
  )
