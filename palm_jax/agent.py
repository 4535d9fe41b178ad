"""The agent that plays: SAC, and what may stand around it.

Standardised features, a skill an episode, an ensemble of its own past policies, and a reward of its
own making. With all of them off it is SAC on features and nothing else.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from palm_jax import curiosity, reward, sac
from palm_jax.base import devices

CLIP = 5.0  # standard deviations that a standardised feature may show: URLB agent/rnd.py clip_val
LEAST_WEIGHT = 0.01  # of a batch in the moments: they follow an encoder that learns
ACTING = 'actor', 'moments', 'past'  # the parts of an agent that only acts


class Moments(flax.struct.PyTreeNode):
  """Running mean and variance of features: (F,), (F,), and () batches so far."""

  mean: jax.Array
  var: jax.Array
  count: jax.Array


class Past(flax.struct.PyTreeNode):
  """Actors of earlier updates, a leading axis of sac.policies - 1, and () int32 updates so far."""

  actors: Any
  updates: jax.Array


class Agent(sac.SAC):
  """SAC's state, and that of what stands around it; parts that are off are ().

  Attributes:
    moments: Moments of the features.
    past: Past.
    memory: reward.Memory of features.
    curiosity: curiosity.State of a reward that is learned.
    skill: curiosity.State of the features that skills are told apart by.
  """

  moments: Any = ()
  past: Any = ()
  memory: Any = ()
  curiosity: Any = ()
  skill: Any = ()


class Transitions(flax.struct.PyTreeNode):
  """B transitions as a batch has them, nothing in them with a gradient.

  Attributes:
    h, next_h: (B, F) features of s and s'.
    z, next_z: (B, D) projections.
    action: (B, A).
    episodes: (B,) int32.
  """

  h: jax.Array
  next_h: jax.Array
  z: jax.Array
  next_z: jax.Array
  action: jax.Array
  episodes: jax.Array


def needs_moments(config: ConfigDict) -> bool:
  """Whether anything reads the features' moments; `config` is the whole one."""
  c = config.reward
  return config.sac.standardise or c.space == 'unit' or c.kind == 'rnd' or config.sac.skill_dim > 0


def init(
  key: jax.Array, feature_dim: int, projection_dim: int, action_dim: int, config: ConfigDict
) -> Agent:
  """A new agent of the whole config."""
  c, r = config.sac, config.reward
  state = sac.init(key, feature_dim + c.skill_dim, action_dim, c)
  parts: dict[str, Any] = {name: getattr(state, name) for name in state.__dataclass_fields__}
  key_curiosity, key_skill = jax.random.split(jax.random.fold_in(key, 1))
  if needs_moments(config):
    zero = jnp.zeros(feature_dim)
    parts['moments'] = Moments(zero, jnp.ones(feature_dim), jnp.zeros(()))
  if c.policies > 1:
    repeat = lambda x: jnp.repeat(x[None], c.policies - 1, axis=0)
    parts['past'] = Past(jax.tree.map(repeat, state.actor), jnp.zeros((), jnp.int32))
  if r.memory:
    width = projection_dim if r.space == 'projection' else feature_dim
    parts['memory'] = reward.empty_memory(r.memory, width)
  if r.kind in reward.LEARNED:
    parts['curiosity'] = curiosity.init(key_curiosity, r.kind, feature_dim, action_dim, r)
  if c.skill_dim:
    parts['skill'] = curiosity.init(key_skill, 'aps', feature_dim, c.skill_dim, r)
  return Agent(**parts)


def skills(episodes: jax.Array, dim: int, dtype: Any = jnp.float32) -> jax.Array:
  """(B,) int32 episodes -> (B, dim) unit vectors, one a direction for each episode.

  Nothing has to be stored: an episode's number says its skill, in every run alike.
  """
  key = jax.random.key(0, impl='threefry2x32')
  draw = lambda i: jax.random.normal(jax.random.fold_in(key, i), (dim,), dtype)
  x = jax.vmap(draw)(episodes)
  return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def standardise(moments: Moments, h: jax.Array) -> jax.Array:
  """(B, F) features by their running mean and standard deviation, at most CLIP of them."""
  return jnp.clip((h - moments.mean) * jax.lax.rsqrt(moments.var + 1e-8), -CLIP, CLIP)


def observe(state: Agent, h: jax.Array, episodes: jax.Array, c: ConfigDict) -> jax.Array:
  """(B, F) features -> (B, F + skill_dim): what actor and critics see; `c` is the section `sac`."""
  seen = standardise(state.moments, h) if c.standardise else h
  if not c.skill_dim:
    return seen
  return jnp.concatenate([seen, skills(episodes, c.skill_dim, h.dtype)], axis=-1)


def act(
  state: Agent, h: jax.Array, noise: jax.Array, episodes: jax.Array, c: ConfigDict
) -> jax.Array:
  """Actions (B, A) in [-1, 1] for features (B, F), normal noise (B, A) and (B,) int32 episodes.

  With `policies` above 1 each episode has one of them, the present one among them, until another
  is kept in that one's place.
  """
  seen = observe(state, h, episodes, c)
  if c.policies == 1:
    return sac.act(state, seen, noise, c)
  every = lambda new, old: jnp.concatenate([new[None], old])
  actors = jax.tree.map(every, state.actor, state.past.actors)
  actions = jax.vmap(lambda p: sac.act(state.replace(actor=p), seen, noise, c))(actors)
  held = jnp.minimum(state.past.updates // c.policy_every, c.policies - 1)
  key = jax.random.key(1, impl='threefry2x32')
  share = jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i)))(episodes)
  which = jnp.minimum((share * (held + 1)).astype(jnp.int32), held)
  return actions[which, jnp.arange(len(h))]


def update(
  state: Agent, t: Transitions, noise: jax.Array, config: ConfigDict, axis_name: str | None = None
) -> tuple[Agent, dict[str, jax.Array]]:
  """A batch: moments, the reward and what it learns, then `updates_per_batch` updates of SAC.

  Args:
    state: Agent.
    t: Transitions of this device.
    noise: (U, 2, B, A) standard normal, for U = sac.updates_per_batch.
    config: the whole config.
    axis_name: mesh axis over which the batch is sharded.

  Returns:
    Agent, and metrics: those of `sac.update`, of its last update; of `spread_of_policy`; of what
    the reward learns; q_share, the mean value over its fixed point.
  """
  c = config.sac
  if needs_moments(config):
    state = state.replace(moments=_moved(state.moments, t.h, axis_name))
  state, r, metrics = intrinsic_reward(state, t, config, axis_name)
  batch = sac.Batch(
    h=observe(state, t.h, t.episodes, c),
    action=t.action,
    reward=r,
    next_h=observe(state, t.next_h, t.episodes, c),
    discount=jnp.full_like(r, c.gamma),
  )
  one: Any = lambda state, noise: sac.update(state, batch, noise, c, axis_name)
  if c.updates_per_batch == 1:
    state, found = one(state, noise[0])
  else:
    state, found = jax.lax.scan(one, state, noise)
    found = jax.tree.map(lambda x: x[-1], found)
  state = _remember_policy(state, c)
  spread = spread_of_policy(state, batch.h, t.action.shape[-1], c, axis_name)
  entropy = found['alpha'] * found['entropy_per_dim'] * t.action.shape[-1]
  fixed_point = (found['reward'] + c.gamma * entropy) / max(1 - c.gamma, 1e-6)
  share = found['q'] / jnp.where(jnp.abs(fixed_point) < 1e-6, 1, fixed_point)
  return state, found | spread | metrics | dict(q_share=share)


def intrinsic_reward(
  state: Agent, t: Transitions, config: ConfigDict, axis_name: str | None = None
) -> tuple[Agent, jax.Array, dict[str, jax.Array]]:
  """The reward (B,) of `reward.kind`, with the skill's where there are skills.

  What is learned learns from the batch first, as URLB's agents do -> Agent, (B,), metrics.
  """
  c, metrics = config.reward, {}
  novel_next = c.on == 'next'
  if c.kind in reward.OF_FEATURES:
    if c.space == 'projection':
      x = t.next_z if novel_next else t.z
    else:
      x = t.next_h if novel_next else t.h
    if c.space == 'unit':
      x = reward.unit(x, state.moments.mean)
    r = reward.OF_FEATURES[c.kind](x, axis_name, memory=state.memory, **reward.options(c))
    if c.memory:
      state = state.replace(memory=reward.remember(state.memory, x, axis_name))
  else:
    h, next_h = t.h, t.next_h
    if c.kind == 'rnd':
      h = standardise(state.moments, next_h if novel_next else h)
    learned, r, metrics = curiosity.update(
      state.curiosity, c.kind, (h, t.action, next_h), c, axis_name
    )
    state = state.replace(curiosity=learned)
  if config.sac.skill_dim:
    skill = skills(t.episodes, config.sac.skill_dim, t.h.dtype)
    arrived = standardise(state.moments, t.next_h)
    learned, bonus, found = curiosity.update(
      state.skill, 'aps', (arrived, skill, arrived), c, axis_name
    )
    state, r = state.replace(skill=learned), r + c.skill * bonus
    metrics = metrics | found | dict(skill_reward=devices.mean(bonus, axis_name))
  return state, r, metrics


def spread_of_policy(
  state: Agent,
  seen: jax.Array,
  action_dim: int,
  c: ConfigDict,
  axis_name: str | None = None,
) -> dict[str, jax.Array]:
  """What a policy does on average: `mean_action`, the root mean square over dimensions of E[a];
  `constant_share` of it that is the same in all states; `action_var` about the common mean.

  Args:
    seen: (B, F + skill_dim) of `observe`.
  """
  mean, second = sac.action_moments(state, seen, action_dim, c)
  common = devices.mean(mean, axis_name, axis=0)  # (A,)
  squared = devices.mean(mean**2, axis_name)
  constant = jnp.mean(common**2)
  return dict(
    mean_action=jnp.sqrt(squared),
    constant_share=constant / jnp.maximum(squared, 1e-12),
    constant_action=jnp.sqrt(constant),
    action_var=devices.mean(second, axis_name) - constant,
  )


def _moved(moments, h, axis_name):
  """The moments after one more batch, which weighs at least LEAST_WEIGHT."""
  mean = devices.mean(h, axis_name, axis=0)
  var = devices.mean((h - mean) ** 2, axis_name, axis=0)
  weight = jnp.maximum(1 / (moments.count + 1), LEAST_WEIGHT).astype(mean.dtype)
  return Moments(
    mean=moments.mean + weight * (mean - moments.mean),
    var=moments.var + weight * (var - moments.var),
    count=moments.count + 1,
  )


def _remember_policy(state, c):
  """With every `policy_every` updates of SAC the present actor takes the place of the oldest."""
  if c.policies == 1:
    return state
  updates = state.past.updates + c.updates_per_batch
  place = (updates // c.policy_every - 1) % (c.policies - 1)
  due = updates // c.policy_every > state.past.updates // c.policy_every
  put = lambda old, new: jnp.where(due, old.at[place].set(new), old)
  return state.replace(past=Past(jax.tree.map(put, state.past.actors, state.actor), updates))


def acting(state: Agent) -> dict[str, Any]:
  """The parts by which an agent acts; for `only_acting`."""
  return {name: getattr(state, name) for name in ACTING if not _is_off(getattr(state, name))}


def _is_off(part):
  return isinstance(part, tuple) and part == ()


def only_acting(parts: dict[str, Any]) -> Agent:
  """An agent that acts as the one whose `acting` these are, and cannot learn."""
  unused = {name: None for name in sac.SAC.__dataclass_fields__ if name not in parts}
  return Agent(**unused, **parts)
