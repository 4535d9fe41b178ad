"""BEAR: learning from a record without playing (Kumar et al., arXiv 1906.00949).

A policy that is trained on a record alone asks its critics about actions that the record does not
hold, and nothing corrects what they answer. BEAR keeps the policy within the support of the record:
the maximum mean discrepancy between its actions and those of a fitted behaviour model stays below a
threshold. Defaults are those of aviralkumar2907/BEAR algos.py.
"""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from palm_jax import sac
from palm_jax.actor_critic import MLP, Actor
from palm_jax.base import checks

KERNELS = 'laplacian', 'gaussian'
LEAST_SQUARED = 1e-6  # below the root of the discrepancy, whose gradient is infinite at 0
CLIP = 0.5  # of the noise of what is compared, in standard deviations
LOG_STD = -4.0, 15.0  # of the behaviour model's latent
LOG_LAGRANGE = -5.0, 10.0
MIN_SHARE = 0.75  # of the smallest critic in a target; the rest is the largest's


def default_config() -> ConfigDict:
  return ConfigDict(
    dict(
      hidden_actor=(400, 300),
      hidden_critic=(400, 300),
      hidden_behaviour=(750, 750),
      lr_actor=3e-4,  # ours: 1e-3 there, Adam's default
      lr_critic=1e-3,
      lr_behaviour=1e-3,
      lr_lagrange=1e-3,
      tau=0.005,
      critics=2,
      # lambda: how many of the critics' deviations a value is lowered by; ours: sample deviations,
      # which are sqrt(2) of theirs with two critics
      spread=0.4,
      spread_share=0.1,  # delta
      samples=10,  # of actions: in targets, in the discrepancy, and when it acts
      kernel='laplacian',
      sigma=20.0,  # walker and ant; 10 for hopper and cheetah
      threshold=0.05,  # epsilon
      warmup_updates=20_000,  # in which the actor only learns to stay in the support
    )
  )


RANGES = dict(
  hidden_actor=checks.SIZES,
  hidden_critic=checks.SIZES,
  hidden_behaviour=checks.SIZES,
  lr_actor=checks.RATE,
  lr_critic=checks.RATE,
  lr_behaviour=checks.RATE,
  lr_lagrange=checks.RATE,
  tau=checks.SHARE,
  critics=checks.Range(1, 100),
  spread=checks.AMOUNT,
  spread_share=checks.SHARE,
  samples=checks.Range(1, 1000),
  sigma=checks.ABOVE_0,
  threshold=checks.AMOUNT,
  warmup_updates=checks.COUNT_OR_0,
)


def check(c: ConfigDict) -> None:
  """Raises UserError on invalid settings of the config's section `offline.bear`."""
  checks.choice('offline.bear.kernel', c.kernel, KERNELS)
  checks.positive('offline.bear.spread_share', c.spread_share)


def mmd(x: jax.Array, y: jax.Array, sigma: float, kernel: str = 'laplacian') -> jax.Array:
  """Sampled maximum mean discrepancy: sqrt(mean k(x, x') + mean k(y, y') - 2 mean k(x, y) + 1e-6).

  The means include each sample with itself, as the authors' code does.

  Args:
    x, y: (B, N, A), (B, M, A) samples.
    sigma: of the kernel: exp(-|x - y|_1 / (2 sigma)), or exp(-|x - y|^2 / (2 sigma)).
    kernel: one of KERNELS.

  Returns:
    (B,).
  """

  def mean_kernel(x, y):
    apart = x[:, :, None] - y[:, None]  # (B, N, M, A)
    size = jnp.abs(apart) if kernel == 'laplacian' else apart**2
    return jnp.expm1(-size.sum(-1) / (2 * sigma)).mean((1, 2))  # less 1, which cancels below

  squared = mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y)
  return jnp.sqrt(jnp.maximum(squared, 0) + LEAST_SQUARED)


class Behaviour(nn.Module):
  """A conditional variational autoencoder of the record's actions.

  Attributes:
    action_dim: A; its latent has 2 A numbers.
    hidden: sizes of the hidden layers of encoder and decoder.
  """

  action_dim: int
  hidden: tuple[int, ...]

  def setup(self):
    self.encoder = MLP(self.hidden, 4 * self.action_dim)
    self.decoder = MLP(self.hidden, self.action_dim)

  def __call__(
    self, observation: jax.Array, action: jax.Array, noise: jax.Array
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(B, O), (B, A), (B, 2 A) normal -> action before tanh (B, A), mean, log_std (B, 2 A)."""
    x = jnp.concatenate([observation, action], -1)
    mean, log_std = jnp.split(self.encoder(x), 2, -1)
    log_std = jnp.clip(log_std, *LOG_STD)
    return self.decode(observation, mean + jnp.exp(log_std) * noise), mean, log_std

  def decode(self, observation: jax.Array, latent: jax.Array) -> jax.Array:
    """(..., O), (..., 2 A) -> action before tanh (..., A)."""
    return self.decoder(jnp.concatenate([observation, latent], -1))


class Ensemble(nn.Module):
  """K critics: (..., O), (..., A) -> (K, ...)."""

  size: int
  hidden: tuple[int, ...]

  @nn.compact
  def __call__(self, observation, action):
    x = jnp.concatenate([observation, action], -1)
    return jnp.stack([MLP(self.hidden, 1, name=f'q{i}')(x)[..., 0] for i in range(self.size)])


class Learner(flax.struct.PyTreeNode):
  """Parameters and Adam's state."""

  params: Any
  opt_state: Any

  def step(self, lr: float, grads: Any) -> 'Learner':
    """One step of Adam."""
    return Learner(*sac.adam_step(lr, grads, self.opt_state, self.params))


def learner(params: Any) -> Learner:
  """Of parameters, before the first step."""
  return Learner(params, optax.adam(0.0).init(params))


class State(flax.struct.PyTreeNode):
  """Of BEAR.

  Attributes:
    behaviour, actor, critic: Learner.
    target_actor, target_critic: moving averages of their parameters.
    log_lagrange: Learner of the () log of the multiplier of MMD - threshold.
    updates: () int32 so far.
  """

  behaviour: Learner
  actor: Learner
  critic: Learner
  target_actor: Any
  target_critic: Any
  log_lagrange: Learner
  updates: jax.Array


def _actor(c, action_dim) -> Any:
  return Actor(action_dim, c.hidden_actor, trunk=0, log_std_min=-5.0, log_std_max=2.0)


def _behaviour(c, action_dim) -> Any:
  return Behaviour(action_dim, c.hidden_behaviour)


def _critic(c) -> Any:
  return Ensemble(c.critics, c.hidden_critic)


def init(key: jax.Array, observation_dim: int, action_dim: int, config: ConfigDict) -> State:
  """A new State; `config` is the section `offline`."""
  c = config.bear
  keys = jax.random.split(key, 3)
  o, a = jnp.zeros((1, observation_dim)), jnp.zeros((1, action_dim))
  behaviour = _behaviour(c, action_dim).init(keys[0], o, a, jnp.concatenate([a, a], -1))
  actor, critic = _actor(c, action_dim).init(keys[1], o), _critic(c).init(keys[2], o, a)
  copy = lambda tree: jax.tree.map(jnp.copy, tree)
  return State(
    learner(behaviour),
    learner(actor),
    learner(critic),
    copy(actor),
    copy(critic),
    learner(jnp.zeros(())),
    jnp.zeros((), jnp.int32),
  )


def _before_tanh(c, params, observation, noise):
  """Actions of an actor before tanh, (B, N, A), for (B, O) and normal noise (B, N, A)."""
  mean, log_std = _actor(c, noise.shape[-1]).apply(params, observation)
  return mean[:, None] + jnp.exp(log_std)[:, None] * noise


def _repeat(observation, count):
  """(B, O) -> (B, N, O)."""
  return jnp.repeat(observation[:, None], count, 1)


def act(state: State, observation: jax.Array, key: jax.Array, action_dim: int, config: ConfigDict):
  """Of several actions (B, A) of the actor, the one that the first critic values most."""
  c = config.bear
  noise = jax.random.normal(key, (len(observation), c.samples, action_dim))
  actions = jnp.tanh(_before_tanh(c, state.actor.params, observation, noise))
  q = _critic(c).apply(state.critic.params, _repeat(observation, c.samples), actions)
  best = jnp.argmax(q[0], -1)
  return jnp.take_along_axis(actions, best[:, None, None], 1)[:, 0]


def value(state: State, observation: jax.Array, action: jax.Array, config: ConfigDict) -> jax.Array:
  """(B,) smallest of the critics."""
  return _critic(config.bear).apply(state.critic.params, observation, action).min(0)


def update(
  state: State, batch: sac.Batch, key: jax.Array, config: ConfigDict
) -> tuple[State, dict[str, jax.Array]]:
  """One step of behaviour model, critics, actor, multiplier, and targets.

  Args:
    state: State.
    batch: sac.Batch of observations; its discount is 0 after a true end.
    key: of this update.
    config: section `offline`.

  Returns:
    State, and a dict of scalars.
  """
  c, (count, action_dim) = config.bear, batch.action.shape
  keys = jax.random.split(key, 4)
  behaviour, losses = _fit_behaviour(state.behaviour, batch, keys[0], c)
  critic, found = _fit_critic(state, batch, keys[1], c)
  losses |= found
  samples = count, c.samples, action_dim
  latents = jax.random.normal(keys[2], (count, c.samples, 2 * action_dim))
  # The draws of its latent stay near the mode, where the decoder has learned what to do.
  of_record = _behaviour(c, action_dim).apply(
    behaviour.params, _repeat(batch.h, c.samples), jnp.clip(latents, -CLIP, CLIP), method='decode'
  )
  noise = jnp.clip(jax.random.normal(keys[3], samples), -CLIP, CLIP)
  lagrange = jnp.exp(state.log_lagrange.params)
  warm = state.updates < c.warmup_updates

  def actor_loss(params):
    raw = _before_tanh(c, params, batch.h, noise)
    discrepancy = mmd(of_record, raw, c.sigma, c.kernel)
    q = _critic(c).apply(critic.params, _repeat(batch.h, c.samples), jnp.tanh(raw)).mean(-1)
    pessimistic = q.min(0)  # (B,)
    if c.critics > 1 and c.spread:
      factor = c.spread * jnp.sqrt((1 - c.spread_share) / c.spread_share)
      pessimistic -= factor * jnp.sqrt(q.var(0, ddof=1) + 1e-12)
    loss = lagrange * discrepancy - jnp.where(warm, 0.0, pessimistic)
    return loss.mean(), (discrepancy.mean(), q.mean())

  (loss, (discrepancy, q)), grads = jax.value_and_grad(actor_loss, has_aux=True)(state.actor.params)
  actor = state.actor.step(c.lr_actor, grads)
  dual = jax.grad(lambda x: -jnp.exp(x) * (discrepancy - c.threshold))(state.log_lagrange.params)
  log_lagrange = state.log_lagrange.step(c.lr_lagrange, dual)
  log_lagrange = log_lagrange.replace(params=jnp.clip(log_lagrange.params, *LOG_LAGRANGE))
  follow = lambda new, old: optax.incremental_update(new.params, old, c.tau)
  metrics = losses | dict(actor_loss=loss, mmd=discrepancy, lagrange=lagrange, q_policy=q)
  return State(
    behaviour,
    actor,
    critic,
    follow(actor, state.target_actor),
    follow(critic, state.target_critic),
    log_lagrange,
    state.updates + 1,
  ), metrics


def _fit_behaviour(behaviour, batch, key, c):
  """Squared error of the action, and half the divergence of the latent from a normal."""
  count, action_dim = batch.action.shape
  noise = jax.random.normal(key, (count, 2 * action_dim))

  def loss(params):
    raw, mean, log_std = _behaviour(c, action_dim).apply(params, batch.h, batch.action, noise)
    error = jnp.mean((jnp.tanh(raw) - batch.action) ** 2)
    divergence = -0.5 * jnp.mean(1 + 2 * log_std - mean**2 - jnp.exp(2 * log_std))
    return error + 0.5 * divergence, error

  (_, error), grads = jax.value_and_grad(loss, has_aux=True)(behaviour.params)
  return behaviour.step(c.lr_behaviour, grads), dict(behaviour_error=error)


def _fit_critic(state, batch, key, c):
  """Bellman errors of all critics against one target."""
  count, action_dim = batch.action.shape
  noise = jax.random.normal(key, (count, c.samples, action_dim))
  actions = jnp.tanh(_before_tanh(c, state.target_actor, batch.next_h, noise))
  q = _critic(c).apply(state.target_critic, _repeat(batch.next_h, c.samples), actions)  # (K, B, N)
  mixed = MIN_SHARE * q.min(0) + (1 - MIN_SHARE) * q.max(0)
  target = batch.reward + batch.discount * mixed.max(-1)

  def loss(params):
    q = _critic(c).apply(params, batch.h, batch.action)  # (K, B)
    return jnp.mean((q - target) ** 2, 1).sum(), q.mean()

  (error, q), grads = jax.value_and_grad(loss, has_aux=True)(state.critic.params)
  return state.critic.step(c.lr_critic, grads), dict(critic_loss=error, q=q)
