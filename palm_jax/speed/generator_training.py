"""How fast a generator trains, and where the time is spent."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from palm_jax.base import devices
from palm_jax.data.arrays import Data
from palm_jax.generator.networks import check_config, make_networks
from palm_jax.generator.phases import make_phases
from palm_jax.generator.samples import batch_indices, padded
from palm_jax.generator.step import init_state, make_train_call
from palm_jax.speed import timing
from palm_jax.speed.timing import REPEATS, median_seconds

AUGMENT_P = 0.5  # probability of each augmentation while it is timed
PHASES = dict(g_main='Gmain', d_main='Dmain', r1='R1', path_lengths='path lengths', ada='ADA')


def measure(config: ConfigDict, data: Data, mesh: Mesh) -> dict[str, Any]:
  """Speed of the generator's training, and the share of its phases.

  Whole calls, as training makes them, give the speed. The phases are compiled and timed apart, each
  weighted by how often it runs. What augmentation takes is the difference to phases without it.
  Each measure is the median of REPEATS, after a run that is not counted.

  Args:
    config: the whole config; read are seed and generator.
    data: whose training pictures it learns.
    mesh: one-dimensional, axis 'data'.

  Returns:
    images_per_second and seconds_per_iteration of whole calls; phase_seconds, {phase: seconds an
    iteration}, those of PHASES that the config has, and phase_shares of their sum; compile_seconds
    of the whole call; settings.

  Raises:
    UserError: settings that cannot work.
  """
  c, split = config.generator.copy_and_resolve_references(), data.train
  c.data_on = 'device'
  c.d_alone_kimg = 0.0  # all phases, as after it
  check_config(c, mesh.size)
  num_classes = len(data.class_names) if len(data.class_names) > 1 else 0
  # The pictures of one call, as the whole set may not fit.
  walk = batch_indices(config.seed, 0, c.iterations_per_call * c.batch_size, len(split.images))
  images, labels = padded(split.images[walk], c.pad), split.labels[walk].astype(np.int32)
  G, D = make_networks(c, images.shape[1:], num_classes)
  training_set = devices.replicate(mesh, (images, labels))
  order = np.arange(len(walk), dtype=np.int32).reshape(-1, c.batch_size)
  indices = devices.replicate(mesh, order)
  # With augmentation at work: at p = 0 it is skipped.
  p = AUGMENT_P if c.augment != 'none' else 0.0
  first = lambda key: init_state(c, G, D, key).replace(augment_p=jnp.float32(p))
  init = jax.jit(first, out_shardings=NamedSharding(mesh, P()))
  fresh = lambda: init(jax.random.key(config.seed))

  call = make_train_call(c, G, D, mesh)
  lowered = call.lower(fresh(), *training_set, indices)
  compile_seconds, call = timing.compile_seconds(lowered)
  seconds = median_seconds(call, fresh(), *training_set, indices) / c.iterations_per_call

  def phase_seconds(config):
    """Seconds an iteration of each phase."""
    found = {}
    for name, (interval, phase) in make_phases(config, G, D, mesh.size).items():
      sharded = jax.shard_map(phase, mesh=mesh, in_specs=P(), out_specs=P())
      step = jax.jit(sharded, donate_argnums=0)
      found[name] = median_seconds(step, fresh(), *training_set, indices[0]) / interval
    return found

  found = phase_seconds(c)
  if c.augment != 'none':
    # Without path lengths, which know no augmentation.
    without = phase_seconds(ConfigDict(dict(c, augment='none', pl_weight=0.0)))
    ada = sum(max(found[name] - without[name], 0.0) for name in without)
    found = {name: min(found[name], without.get(name, found[name])) for name in found}
    found['ada'] = ada
  total = sum(found.values())
  shares = {name: value / total for name, value in found.items()}
  logging.info('%s', table(c, mesh, c.batch_size / seconds, seconds, found, shares))
  return dict(
    images_per_second=c.batch_size / seconds,
    seconds_per_iteration=seconds,
    phase_seconds=found,
    phase_shares=shares,
    compile_seconds=compile_seconds,
    repeats=REPEATS,
    settings=c.to_dict(),
  )


def table(
  config: ConfigDict,
  mesh: Mesh,
  images_per_second: float,
  seconds: float,
  found: dict[str, float],
  shares: dict[str, float],
) -> str:
  """The measures in lines of text."""
  about: dict[str, Any] = devices.describe(mesh)
  lines = [
    f'generator training on {about["devices"]}, jax {about["versions"]["jax"]}, {config.dtype}, '
    f'batch {config.batch_size}: {images_per_second:,.1f} images/s, {seconds * 1000:,.1f} ms an '
    'iteration',
    f'  {"phase":14}{"ms/iteration":>14}{"share":>8}',
  ]
  lines += [
    f'  {PHASES[name]:14}{found[name] * 1000:14,.2f}{shares[name]:8.1%}'
    for name in PHASES
    if name in found
  ]
  return '\n'.join([*lines, f'  median of {REPEATS}, first run left out; phases timed apart'])
