"""Ways to learn from a record, behind one door: BEAR, and two to compare it with."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from palm_jax import sac
from palm_jax.actor_critic import Actor
from palm_jax.offline import bear

EDGE = 1 - 1e-4  # of actions, beyond which a tanh Gaussian's density has no bound


class Method(NamedTuple):
  """A way to learn. `config` is the whole config.

  Attributes:
    init: (key, O, A, config) -> state.
    update: (state, sac.Batch, key, config) -> state, scalars.
    act: (state, observations (B, O), key, A, config) -> (B, A), as it acts when it is judged.
    value: (state, observations, actions, config) -> (B,) of its critics; None without critics.
  """

  init: Callable
  update: Callable
  act: Callable
  value: Callable | None


# ---- behaviour cloning


class Clone(flax.struct.PyTreeNode):
  """A tanh Gaussian that makes the record's actions likely: bear.Learner of the actor."""

  actor: bear.Learner


def _clone_actor(config, action_dim) -> Any:
  hidden = config.offline.bear.hidden_actor
  return Actor(action_dim, hidden, trunk=0, log_std_min=-5.0, log_std_max=2.0)


def _init_clone(key, observation_dim, action_dim, config):
  actor = _clone_actor(config, action_dim).init(key, jnp.zeros((1, observation_dim)))
  return Clone(bear.learner(actor))


def _update_clone(state, batch, key, config):
  del key

  def loss(params):
    mean, log_std = _clone_actor(config, batch.action.shape[-1]).apply(params, batch.h)
    raw = jnp.arctanh(jnp.clip(batch.action, -EDGE, EDGE))
    _, log_prob = sac.sample(mean, log_std, (raw - mean) * jnp.exp(-log_std))
    return -log_prob.mean()

  loss_now, grads = jax.value_and_grad(loss)(state.actor.params)
  return Clone(state.actor.step(config.offline.bear.lr_actor, grads)), dict(loss=loss_now)


def _act_clone(state, observation, key, action_dim, config):
  del key
  mean, _ = _clone_actor(config, action_dim).apply(state.actor.params, observation)
  return jnp.tanh(mean)


# ---- SAC as it learns when it plays, and nothing that holds it to the record


def _init_sac(key, observation_dim, action_dim, config):
  return sac.init(key, observation_dim, action_dim, config.sac)


def update_sac(
  state: sac.SAC, batch: sac.Batch, key: jax.Array, config: ConfigDict
) -> tuple[sac.SAC, dict[str, jax.Array]]:
  """`sac.update` with noise of a key."""
  noise = jax.random.normal(key, (2, *batch.action.shape))
  state, metrics = sac.update(state, batch, noise, config.sac)
  return state, {name: metrics[name] for name in ('critic_loss', 'q', 'alpha')}


def act_sac(
  state: sac.SAC, observation: jax.Array, key: jax.Array, action_dim: int, config: ConfigDict
) -> jax.Array:
  """(B, A), the mode before tanh."""
  del key
  return sac.act(state, observation, jnp.zeros((len(observation), action_dim)), config.sac)


def _value_sac(state, observation, action, config):
  return sac.value(state, observation, action, config.sac)


METHODS = dict(
  bc=Method(_init_clone, _update_clone, _act_clone, None),
  sac=Method(_init_sac, update_sac, act_sac, _value_sac),
  bear=Method(
    lambda key, o, a, config: bear.init(key, o, a, config.offline),
    lambda state, batch, key, config: bear.update(state, batch, key, config.offline),
    lambda state, o, key, a, config: bear.act(state, o, key, a, config.offline),
    lambda state, o, a, config: bear.value(state, o, a, config.offline),
  ),
)
