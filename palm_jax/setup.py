"""What a pretraining is made of, fixed before anything is traced."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from palm_jax import augment, objectives, pairs, replay, rollout, simsiam, worlds
from palm_jax.base.errors import UserError
from palm_jax.encoder import make_encoder
from palm_jax.optimizer import make_optimizer


@dataclasses.dataclass(frozen=True)
class Setup(rollout.Play):
  """What a run needs, fixed before anything is traced: what playing needs, and for learning:

  Attributes:
    source: where pairs come from.
    modules: encoder, projector, predictor.
    optimizer: of their parameters.
    target_rate: updates so far -> share of the way that BYOL's target goes to them.
    views: (keys, frames) -> augmented frames.
    warmup_iterations: with random actions and no update.
    num_calls: of the whole run, pretrain.iterations_per_call iterations each.
  """

  source: pairs.Source
  modules: simsiam.Modules
  optimizer: optax.GradientTransformation
  target_rate: optax.Schedule
  views: Callable[[jax.Array, jax.Array], jax.Array]
  warmup_iterations: int
  num_calls: int

  def next_target(self, ssl: dict[str, Any], params: Any) -> dict[str, Any]:
    """{'target': BYOL's target network} after an update of State.ssl to `params`, or {}."""
    if 'target' not in ssl:
      return {}
    rate = self.target_rate(optax.tree.get(ssl['opt_state'], 'count'))
    return {'target': objectives.follow(ssl['target'], params, rate)}

  @property
  def per_shard(self) -> int:
    """Pairs of a batch that each sampling group draws."""
    return self.config.pretrain.batch_size // self.config.replay.num_shards

  def shard_keys(self, key: jax.Array) -> jax.Array:
    """(V,) keys of this device's sampling groups, functions of their global ids."""
    count = self.config.replay.num_shards // self.num_devices
    shards = jax.lax.axis_index('data') * count + jnp.arange(count)
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(shards)


class Schedule(NamedTuple):
  """How a run is divided.

  Attributes:
    warmup_iterations: with random actions and no update.
    num_calls: of the whole run, pretrain.iterations_per_call iterations each.
    num_updates: of the whole run.
  """

  warmup_iterations: int
  num_calls: int
  num_updates: int


def schedule(p: ConfigDict) -> Schedule:
  """Schedule of the config's section `pretrain`."""
  steps_per_iteration = p.rollout_length * p.num_envs
  warmup_iterations = math.ceil(p.warmup_steps / steps_per_iteration)
  num_calls = math.ceil(p.env_steps / steps_per_iteration / p.iterations_per_call)
  updating = num_calls * p.iterations_per_call - warmup_iterations
  return Schedule(warmup_iterations, num_calls, updating * p.updates_per_iteration)


def make_setup(config: ConfigDict, generator: Any, num_devices: int) -> Setup:
  """Setup of a config that pretrain.check accepts; UserError where the generator does not fit."""
  source = pairs.SOURCES[config.pairs.source]
  drawn = config.pairs.source in pairs.DRAWS and source.needs != 'images'  # labels are of the data
  if config.simsiam.objective == 'supcon' and drawn and not generator.num_classes:
    raise UserError(
      "simsiam.objective='supcon' with a generator without classes makes one class of everything: "
      'choose another'
    )
  grey = generator.image_shape[-1] == 1
  if config.simsiam.augment == 'simsiam' and grey and config.environment.stack == 3:
    raise UserError(
      "simsiam.augment='simsiam' would take environment.stack=3 grey pictures for the colours of "
      "one: choose another number, or augment='shift_flip'"
    )
  p, c = config.pretrain, config.simsiam
  warmup_iterations, num_calls, num_updates = schedule(p)
  dtype = rollout.DTYPES[p.dtype]
  real = jnp.promote_types(dtype, jnp.float32)
  encoder = make_encoder(config.encoder, 'data', dtype)
  return Setup(
    config=config,
    generator=generator,
    encoder=encoder,
    image_shape=worlds.seen_shape(config, generator),
    real=real,
    action_dtype=replay.ACTION_DTYPES[config.replay.actions] or real,
    num_devices=num_devices,
    source=source,
    modules=simsiam.make_modules(encoder, c, 'data', dtype),
    optimizer=make_optimizer(c, num_updates, p.batch_size),
    target_rate=objectives.target_rate(c.tau, num_updates),
    views=augment.make_augment(c.augment),
    warmup_iterations=warmup_iterations,
    num_calls=num_calls,
  )
