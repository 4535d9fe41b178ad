"""Soft actor-critic (Haarnoja et al., arXiv 1812.05905) on detached features, with ProtoRL's
networks and defaults."""

import math
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from palm_jax.actor_critic import NEUTRAL_STD, Actor, Critic
from palm_jax.base import checks, devices
from palm_jax.base.errors import UserError


def default_config() -> ConfigDict:
  return ConfigDict(
    dict(
      lr_actor=1e-4,  # ProtoRL config.yaml
      lr_critic=1e-4,  # ProtoRL config.yaml
      lr_alpha=3e-4,  # brax: alpha's own; with 512 actions it has far to go
      hidden=(1024, 1024),  # ProtoRL config.yaml
      trunk=50,  # ProtoRL config.yaml feature_dim; 0: none
      # cleanrl; ProtoRL's -10 starts 512 actions at an entropy of -1318, far below the target
      log_std_min=-5.0,
      log_std_max=2.0,  # ProtoRL config.yaml log_std_bounds
      gamma=0.99,  # ProtoRL config.yaml
      tau=0.01,  # ProtoRL config.yaml
      # ProtoRL config.yaml; at 1 the entropy bonus of 512 actions buries the reward
      init_alpha=0.1,
      target_entropy_scale=1.0,  # ProtoRL: -|A|; 0.5 in jaxrl and brax
      # Ours, beyond ProtoRL (agent.py); see `able` in configs/cifar.py
      neutral_start=False,  # the first actions have no preferred direction, and are nearly uniform
      standardise=False,  # the agent sees features by their running mean and deviation
      # it learns from: 'train', SimSiam's own pass; 'eval': one more, by which it also acts
      features='train',
      updates_per_batch=1,
      skill_dim=0,  # of a random direction an episode, which it is told and rewarded for following
      policies=1,  # above 1: an episode is played by one of so many, earlier ones or the present
      policy_every=1000,  # updates between those that are kept
    )
  )


RANGES = dict(
  lr_actor=checks.RATE,
  lr_critic=checks.RATE,
  lr_alpha=checks.RATE,
  hidden=checks.SIZES,
  trunk=checks.SIZE_OR_0,
  log_std_min=checks.Range(-100, 100),
  log_std_max=checks.Range(-100, 100),
  gamma=checks.SHARE,
  tau=checks.SHARE,
  init_alpha=checks.ABOVE_0,
  target_entropy_scale=checks.Range(-100, 100),
  updates_per_batch=checks.Range(1, 1000),
  skill_dim=checks.SIZE_OR_0,
  policies=checks.Range(1, 100),
  policy_every=checks.Range(1, 10**9),
)
FEATURES = 'train', 'eval'
# Of the quadrature: tanh of a Gaussian to 1e-3 for deviations up to 1.5, to 0.03 for 3.
NODES = 16


def check(c: ConfigDict) -> None:
  """Raises UserError on invalid settings of the config's section `sac`."""
  checks.ranges('sac', c, RANGES)
  checks.within('sac.log_std_min', c.log_std_min, checks.Range(-100, c.log_std_max))
  checks.choice('sac.features', c.features, FEATURES)
  if c.policies > 1 and c.policy_every < c.updates_per_batch:
    raise UserError(
      f'sac.policy_every={c.policy_every} is less than sac.updates_per_batch='
      f'{c.updates_per_batch}: a past policy is kept once a batch at most; raise the first'
    )
  if c.neutral_start and not c.log_std_min < math.log(NEUTRAL_STD) < c.log_std_max:
    raise UserError(
      f'sac.neutral_start with log_std in [{c.log_std_min}, {c.log_std_max}]: it begins at '
      f'{math.log(NEUTRAL_STD):.2f}; widen sac.log_std_min and sac.log_std_max'
    )


def sample(mean: jax.Array, log_std: jax.Array, noise: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Draws from a tanh Gaussian.

  Args:
    mean: (..., A) of the Gaussian before tanh.
    log_std: (..., A).
    noise: (..., A) standard normal; zeros give the mode before tanh, which is the deterministic
      action.

  Returns:
    action (..., A) in [-1, 1], and its exact log-density (...), finite where tanh saturates.
  """
  x = mean + jnp.exp(log_std) * noise
  log_normal = -0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi)
  log_slope = 2 * (
    math.log(2) - x - jax.nn.softplus(-2 * x)
  )  # log(1 - tanh(x)^2), as in TFP's Tanh bijector
  return jnp.tanh(x), jnp.sum(log_normal - log_slope, axis=-1)


class SAC(flax.struct.PyTreeNode):
  """State of the agent.

  Attributes:
    actor: parameters.
    critic: parameters of both values.
    target_critic: their moving average.
    log_alpha: () log of the temperature.
    actor_opt: Adam's state; likewise critic_opt, alpha_opt.
  """

  actor: Any
  critic: Any
  target_critic: Any
  log_alpha: jax.Array
  actor_opt: Any
  critic_opt: Any
  alpha_opt: Any


class Batch(NamedTuple):
  """B transitions.

  Attributes:
    h: (B, F) detached features of s.
    action: (B, A) in [-1, 1].
    reward: (B,).
    next_h: (B, F) detached features of s'.
    discount: (B,) weight of the value of s': gamma where an episode is only cut off, 0 after a true
      end.
  """

  h: jax.Array
  action: jax.Array
  reward: jax.Array
  next_h: jax.Array
  discount: jax.Array


def _actor(config, action_dim) -> Any:
  return Actor(
    action_dim,
    config.hidden,
    config.trunk,
    config.log_std_min,
    config.log_std_max,
    neutral=config.neutral_start,
  )


def _critic(config) -> Any:
  return Critic(config.hidden, config.trunk)


def init(key: jax.Array, feature_dim: int, action_dim: int, config: ConfigDict) -> SAC:
  """A new agent with float32 parameters; `config` has the attributes of `default_config()`."""
  actor_key, critic_key = jax.random.split(key)
  h, action = jnp.zeros((1, feature_dim)), jnp.zeros((1, action_dim))
  actor = _actor(config, action_dim).init(actor_key, h)
  critic = _critic(config).init(critic_key, h, action)
  log_alpha = jnp.asarray(math.log(config.init_alpha), jnp.float32)
  adam = lambda params: optax.adam(0.0).init(
    params
  )  # its state does not depend on the learning rate
  return SAC(
    actor=actor,
    critic=critic,
    target_critic=jax.tree.map(jnp.copy, critic),
    log_alpha=log_alpha,
    actor_opt=adam(actor),
    critic_opt=adam(critic),
    alpha_opt=adam(log_alpha),
  )


def act(state: SAC, h: jax.Array, noise: jax.Array, config: ConfigDict) -> jax.Array:
  """Actions (B, A) in [-1, 1] for features (B, F) and standard normal noise (B, A).

  Zero noise is deterministic.
  """
  mean, log_std = _actor(config, noise.shape[-1]).apply(state.actor, h)
  return sample(mean, log_std, noise)[0]


def value(state: SAC, h: jax.Array, action: jax.Array, config: ConfigDict) -> jax.Array:
  """(B,) smaller of both critics, for features (B, F) and actions (B, A)."""
  return _critic(config).apply(state.critic, h, action).min(0)


def action_moments(
  state: SAC, h: jax.Array, action_dim: int, config: ConfigDict
) -> tuple[jax.Array, jax.Array]:
  """E[a] and E[a^2], (B, A) each, of the policy at features (B, F), by Gauss-Hermite quadrature."""
  mean, log_std = _actor(config, action_dim).apply(state.actor, h)
  nodes, weights = np.polynomial.hermite_e.hermegauss(NODES)
  nodes, weights = (jnp.asarray(x, mean.dtype)[:, None, None] for x in (nodes, weights))
  actions = jnp.tanh(mean + jnp.exp(log_std) * nodes)  # (NODES, B, A)
  weights /= weights.sum()
  return jnp.sum(weights * actions, axis=0), jnp.sum(weights * actions**2, axis=0)


def adam_step(lr: Any, grads: Any, opt_state: Any, params: Any) -> tuple[Any, Any]:
  """One step of Adam -> parameters, its state."""
  updates, opt_state = optax.adam(lr).update(grads, opt_state)
  return optax.apply_updates(params, updates), opt_state


def update(
  state: SAC, batch: Batch, noise: jax.Array, config: ConfigDict, axis_name: str | None = None
) -> tuple[SAC, dict[str, jax.Array]]:
  """One step of critic, then actor, then temperature, then target (ProtoRL proto.py update).

  Args:
    state: SAC.
    batch: Batch of this device.
    noise: (2, B, A) standard normal: for the actions at s' in the critic's target, and at s in the
      actor's loss.
    config: attributes of `default_config()`; gamma is not read, the batch brings its discount.
    axis_name: mesh axis over which the batch is sharded. Losses are averaged over it before they
      are differentiated, which is right under shard_map's check_vma=True only.

  Returns:
    SAC, and a dict of scalars: critic_loss, actor_loss, alpha_loss, alpha, entropy_per_dim (nats),
    alpha_logp, q, target_q, reward, critic_grad_norm, actor_grad_norm; all averaged over the
    devices.
  """
  actor, critic = _actor(config, noise.shape[-1]), _critic(config)
  average = lambda x: devices.mean(x, axis_name)
  alpha = jnp.exp(state.log_alpha)

  next_mean, next_log_std = actor.apply(state.actor, batch.next_h)
  next_action, next_log_prob = sample(next_mean, next_log_std, noise[0])
  next_value = (
    jnp.min(critic.apply(state.target_critic, batch.next_h, next_action), axis=0)
    - alpha * next_log_prob
  )
  target_q = batch.reward + batch.discount * next_value  # (B,)

  def critic_loss_fn(params):
    q = critic.apply(params, batch.h, batch.action)  # (2, B)
    return 2 * average((q - target_q) ** 2), average(q)  # the sum of the two values' errors

  (critic_loss, q), critic_grads = jax.value_and_grad(critic_loss_fn, has_aux=True)(state.critic)
  critic_params, critic_opt = adam_step(
    config.lr_critic, critic_grads, state.critic_opt, state.critic
  )

  def actor_loss_fn(params):
    mean, log_std = actor.apply(params, batch.h)
    action, log_prob = sample(mean, log_std, noise[1])
    value = jnp.min(critic.apply(critic_params, batch.h, action), axis=0)
    return average(alpha * log_prob - value), average(log_prob)

  (actor_loss, log_prob), actor_grads = jax.value_and_grad(actor_loss_fn, has_aux=True)(state.actor)
  actor_params, actor_opt = adam_step(config.lr_actor, actor_grads, state.actor_opt, state.actor)

  target_entropy = -config.target_entropy_scale * noise.shape[-1]
  alpha_loss, alpha_grad = jax.value_and_grad(lambda x: jnp.exp(x) * (-log_prob - target_entropy))(
    state.log_alpha
  )
  log_alpha, alpha_opt = adam_step(config.lr_alpha, alpha_grad, state.alpha_opt, state.log_alpha)

  metrics = dict(
    critic_loss=critic_loss,
    actor_loss=actor_loss,
    alpha_loss=alpha_loss,
    alpha=alpha,
    entropy_per_dim=-log_prob / noise.shape[-1],
    alpha_logp=alpha * log_prob,
    q=q,
    target_q=average(target_q),
    reward=average(batch.reward),
    critic_grad_norm=optax.tree.norm(critic_grads),
    actor_grad_norm=optax.tree.norm(actor_grads),
  )
  new_state = state.replace(
    actor=actor_params,
    critic=critic_params,
    target_critic=optax.incremental_update(critic_params, state.target_critic, config.tau),
    log_alpha=log_alpha,
    actor_opt=actor_opt,
    critic_opt=critic_opt,
    alpha_opt=alpha_opt,
  )
  return new_state, metrics
