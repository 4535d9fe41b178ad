"""PEARL (Rakelly et al., arXiv 1903.08254): SAC that infers which task it is in from what it has
played, and the two agents that it is measured against.

A context encoder makes of each transition (s, a, r) a Gaussian over z; their product is what is
believed of the task. Actor and critics see z beside s.

  pearl   z is drawn from the belief
  blind   z has no dimensions: SAC that plays all tasks alike
  told    z is a description of the task: SAC that knows what pearl has to find out

Two critics and their targets, without the separate value network of the authors' code: the soft
value of s' is taken from them at an action of the policy, as SAC's second paper (arXiv 1812.05905)
and `sac.py` have it since, which leaves a network and a loss out. Also as there, and unlike theirs,
the temperature is learned: their fixed one suits a few joints, not 64 actions.
"""

import math
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from palm_jax import sac
from palm_jax.actor_critic import MLP, Actor, Critic

AGENTS = 'pearl', 'blind', 'told'
MIN_VARIANCE = 1e-7  # oyster agent.py _product_of_gaussians
PARTS = 'actor', 'critic', 'encoder', 'log_alpha'


class Context(NamedTuple):
  """C transitions of each of M tasks, by which these are told apart.

  Attributes:
    observation: (M, C, F) of s.
    action: (M, C, A) in [-1, 1].
    hint: (M, C) the reward, or another that says more of the task.
  """

  observation: jax.Array
  action: jax.Array
  hint: jax.Array


class Batch(NamedTuple):
  """B transitions of each of M tasks, to learn from.

  Attributes:
    observation: (M, B, F) of s.
    action: (M, B, A) in [-1, 1].
    reward: (M, B).
    next_observation: (M, B, F) of s'. Episodes are only cut, so its value always counts.
  """

  observation: jax.Array
  action: jax.Array
  reward: jax.Array
  next_observation: jax.Array


class Evidence(NamedTuple):
  """What independent Gaussians say together: the natural parameters of their product.

  Of several products it is the sum.

  Attributes:
    precision: (..., Z) sum of 1 / variance.
    shift: (..., Z) sum of mean / variance.
  """

  precision: jax.Array
  shift: jax.Array


class Agent(flax.struct.PyTreeNode):
  """State of an agent.

  Attributes:
    encoder: parameters of the context encoder; () for agents without.
    actor: parameters.
    critic: parameters of both values.
    target_critic: their moving average.
    log_alpha: () log of the temperature.
    opt: {part: Adam's state} of all four that learn.
  """

  encoder: Any
  actor: Any
  critic: Any
  target_critic: Any
  log_alpha: jax.Array
  opt: dict[str, Any]


# ---- the belief


def evidence_of(mean: jax.Array, variance: jax.Array) -> Evidence:
  """Evidence (M, Z) of C Gaussians for each task: means and variances (M, C, Z)."""
  precision = 1 / jnp.maximum(variance, MIN_VARIANCE)
  return Evidence(precision.sum(-2), (precision * mean).sum(-2))


def nothing(*shape: int) -> Evidence:
  """The evidence of no transition."""
  return Evidence(jnp.zeros(shape), jnp.zeros(shape))


def posterior(evidence: Evidence) -> tuple[jax.Array, jax.Array]:
  """Mean and variance (..., Z) of the product of Gaussians; the prior's, 0 and 1, of none.

  As in the authors' code the prior is no factor of the product: the KL holds it near.
  """
  some = evidence.precision > 0
  variance = jnp.where(some, 1 / jnp.where(some, evidence.precision, 1.0), 1.0)
  return evidence.shift * variance, variance


def kl_to_prior(mean: jax.Array, variance: jax.Array) -> jax.Array:
  """() KL(N(mean, variance) || N(0, I)), summed over dimensions and tasks (oyster agent.py)."""
  return 0.5 * jnp.sum(mean**2 + variance - jnp.log(variance) - 1)


def encode(kind: str, params: Any, context: Context, c: ConfigDict) -> tuple[jax.Array, jax.Array]:
  """Means and variances (M, C, Z) that each transition stands for; Z is 0 but for pearl."""
  x = jnp.concatenate([context.observation, context.action, context.hint[..., None]], -1)
  if kind != 'pearl':
    empty = jnp.zeros((*x.shape[:-1], 0))
    return empty, empty
  mean, raw = jnp.split(_encoder(c).apply(params, x), 2, axis=-1)
  return mean, jax.nn.softplus(raw)


def latent(kind: str, evidence: Evidence, descriptors: jax.Array, noise: jax.Array) -> jax.Array:
  """z (M, Z) that actor and critics see.

  Args:
    kind: one of AGENTS.
    evidence: (M, Z); nothing gives the prior.
    descriptors: (M, D) of the tasks, which only `told` reads.
    noise: (M, Z) standard normal.
  """
  if kind == 'told':
    return descriptors
  mean, variance = posterior(evidence)
  return mean + jnp.sqrt(variance) * noise


def belief_size(kind: str, c: ConfigDict) -> int:
  """Z of the evidence."""
  return c.latent_dim if kind == 'pearl' else 0


# ---- networks


def _encoder(c) -> Any:
  return MLP(c.encoder_hidden, 2 * c.latent_dim)


def _actor(c, action_dim) -> Any:
  return Actor(action_dim, c.hidden, 0, c.log_std_min, c.log_std_max)


def _critic(c) -> Any:
  return Critic(c.hidden, 0)


def beside(observation: jax.Array, z: jax.Array) -> jax.Array:
  """(..., F) observations with the z of their task behind them: (..., F + Z)."""
  z = jnp.broadcast_to(z, (*observation.shape[:-1], z.shape[-1]))
  return jnp.concatenate([observation, z], -1)


def act(actor: Any, observation: jax.Array, z: jax.Array, noise: jax.Array, c: ConfigDict) -> Any:
  """Actions (E, A) in [-1, 1] for observations (E, F), z (E, Z), standard normal noise (E, A)."""
  mean, log_std = _actor(c, noise.shape[-1]).apply(actor, beside(observation, z))
  return sac.sample(mean, log_std, noise)[0]


def init(key: jax.Array, kind: str, sizes: tuple[int, int, int], c: ConfigDict) -> Agent:
  """A new agent with float32 parameters.

  Args:
    key: of the weights.
    kind: one of AGENTS.
    sizes: F of observations, A of actions, D of descriptors.
    c: attributes of `train.default_config()`.
  """
  observations, actions, descriptors = sizes
  keys = jax.random.split(key, 3)
  seen = observations + (descriptors if kind == 'told' else belief_size(kind, c))
  h, action = jnp.zeros((1, seen)), jnp.zeros((1, actions))
  critic = _critic(c).init(keys[1], h, action)
  encoder = ()
  if kind == 'pearl':
    encoder = _encoder(c).init(keys[2], jnp.zeros((1, observations + actions + 1)))
  parts = dict(
    actor=_actor(c, actions).init(keys[0], h),
    critic=critic,
    encoder=encoder,
    log_alpha=jnp.asarray(math.log(c.init_alpha), jnp.float32),
  )
  return Agent(
    target_critic=jax.tree.map(jnp.copy, critic),
    opt={name: optax.adam(c.lr).init(parts[name]) for name in PARTS},
    **parts,
  )


# ---- losses


def critic_loss(
  params: tuple[Any, Any],
  agent: Agent,
  kind: str,
  batch: Batch,
  context: Context,
  descriptors: jax.Array,
  noise: tuple[jax.Array, jax.Array],
  c: ConfigDict,
) -> tuple[jax.Array, tuple[jax.Array, dict[str, jax.Array]]]:
  """Bellman error of both critics and kl_lambda * KL: all that the encoder learns from.

  Args:
    params: of critic and encoder, that the loss is differentiated by.
    agent: Agent.
    kind: one of AGENTS.
    batch: Batch.
    context: Context of the same tasks.
    descriptors: (M, D) of these.
    noise: standard normal, (M, Z) for z and (M, B, A) for the actions at s'.
    c: attributes of `train.default_config()`.

  Returns:
    (), and z (M, Z) with metrics.
  """
  critic, encoder = params
  evidence = evidence_of(*encode(kind, encoder, context, c))
  kl = kl_to_prior(*posterior(evidence))
  z = latent(kind, evidence, descriptors, noise[0])
  fixed = jax.lax.stop_gradient(z)[:, None]
  next_h = beside(batch.next_observation, fixed)
  next_mean, next_log_std = _actor(c, batch.action.shape[-1]).apply(agent.actor, next_h)
  next_action, next_log_prob = sac.sample(next_mean, next_log_std, noise[1])
  next_value = _critic(c).apply(agent.target_critic, next_h, next_action).min(0)
  next_value -= jnp.exp(agent.log_alpha) * next_log_prob
  target = jax.lax.stop_gradient(c.reward_scale * batch.reward + c.gamma * next_value)  # (M, B)
  q = _critic(c).apply(critic, beside(batch.observation, z[:, None]), batch.action)  # (2, M, B)
  bellman = 2 * jnp.mean((q - target) ** 2)  # the sum of the two values' errors
  metrics = dict(critic_loss=bellman, kl=kl / len(z), q=q.mean(), reward=batch.reward.mean())
  return bellman + c.kl_lambda * kl, (z, metrics)


def actor_loss(
  actor: Any, agent: Agent, batch: Batch, z: jax.Array, noise: jax.Array, c: ConfigDict
) -> tuple[jax.Array, jax.Array]:
  """SAC's, with z (M, Z) detached; noise (M, B, A) -> (), and the mean log-density ()."""
  h = beside(batch.observation, jax.lax.stop_gradient(z)[:, None])
  mean, log_std = _actor(c, noise.shape[-1]).apply(actor, h)
  action, log_prob = sac.sample(mean, log_std, noise)
  value = _critic(c).apply(agent.critic, h, action).min(0)
  # oyster sac.py: the Gaussian before tanh is kept small
  held = c.policy_reg * (jnp.mean(mean**2) + jnp.mean(log_std**2))
  return jnp.mean(jnp.exp(agent.log_alpha) * log_prob - value) + held, log_prob.mean()


def update(
  agent: Agent,
  kind: str,
  batch: Batch,
  context: Context,
  descriptors: jax.Array,
  key: jax.Array,
  c: ConfigDict,
) -> tuple[Agent, dict[str, jax.Array]]:
  """One step of critic and encoder, then actor, then temperature, then target.

  Args:
    agent: Agent.
    kind: one of AGENTS.
    batch: Batch of a meta-batch of tasks.
    context: Context of the same tasks.
    descriptors: (M, D) of these.
    key: of all that is drawn.
    c: attributes of `train.default_config()`.

  Returns:
    Agent, and a dict of scalars: critic_loss, kl (a task), q, reward, actor_loss, alpha,
    entropy_per_dim (nats).
  """
  key_z, key_actions = jax.random.split(key)
  z_noise = jax.random.normal(key_z, (len(descriptors), belief_size(kind, c)))
  noise = jax.random.normal(key_actions, (2, *batch.action.shape))
  (_, (z, metrics)), grads = jax.value_and_grad(critic_loss, has_aux=True)(
    (agent.critic, agent.encoder), agent, kind, batch, context, descriptors, (z_noise, noise[0]), c
  )
  agent = _step(_step(agent, 'critic', grads[0], c.lr), 'encoder', grads[1], c.lr)
  (loss, log_prob), grad = jax.value_and_grad(actor_loss, has_aux=True)(
    agent.actor, agent, batch, z, noise[1], c
  )
  metrics |= dict(actor_loss=loss, alpha=jnp.exp(agent.log_alpha))
  metrics['entropy_per_dim'] = -log_prob / noise.shape[-1]
  agent = _step(agent, 'actor', grad, c.lr)
  target_entropy = -c.target_entropy_scale * noise.shape[-1]
  grad = jax.grad(lambda x: jnp.exp(x) * (-log_prob - target_entropy))(agent.log_alpha)
  agent = _step(agent, 'log_alpha', grad, c.lr)
  target = optax.incremental_update(agent.critic, agent.target_critic, c.tau)
  return agent.replace(target_critic=target), metrics


def _step(agent, part, grads, lr):
  params, opt = sac.adam_step(lr, grads, agent.opt[part], getattr(agent, part))
  return agent.replace(**{part: params}, opt=agent.opt | {part: opt})
