"""Playing: to learn, to be tested on held-out tasks, and as the measures at both ends."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from palm_jax.environment import env_keys, random_actions
from palm_jax.meta import pearl, replays
from palm_jax.meta.pearl import Agent, Evidence
from palm_jax.meta.replays import Record
from palm_jax.meta.tasks import Family

REFERENCE_EPISODES = 8  # of the oracle, and of random actions, in each task


class Setup(NamedTuple):
  """What does not change, and is not traced.

  Attributes:
    family: of tasks.
    kind: one of pearl.AGENTS.
    c: the config's section `meta`.
  """

  family: Family
  kind: str
  c: ConfigDict


def episodes(
  family: Family,
  variables: Any,
  tasks: Any,
  keys: jax.Array,
  act: Callable[[jax.Array, jax.Array], jax.Array],
) -> Record:
  """One episode in each of E environments.

  Args:
    family: Family.
    variables: of it.
    tasks: E rows.
    keys: (E,) typed keys, one an environment.
    act: (observations (E, F), (E,) keys) -> actions (E, A).

  Returns:
    Record (E, ...), without the axis of episodes.
  """
  observation, state = family.reset(variables, keys, tasks)

  def step(carry, t):
    observation, state = carry
    drawn = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, t + 1)))(keys)  # (E, 2)
    action = act(observation, drawn[:, 0])
    after, state, reward, hint = family.step(variables, drawn[:, 1], state, action, tasks)
    return (after, state), Record(observation, action, reward, hint)

  (last, _), steps = jax.lax.scan(step, (observation, state), jnp.arange(family.steps))
  record = jax.tree.map(lambda x: x.swapaxes(0, 1), steps)  # (E, T, ...)
  return record._replace(observation=jnp.concatenate([record.observation, last[:, None]], 1))


def collect(
  setup: Setup,
  agent: Agent,
  variables: Any,
  tasks: Any,
  descriptors: jax.Array,
  key: jax.Array,
  ids: jax.Array,
) -> tuple[Record, Record]:
  """Episodes with z from the prior, then others with z from the belief that these left.

  Args:
    setup: Setup.
    agent: Agent.
    variables: of the family.
    tasks: n rows.
    descriptors: (n, D) of these.
    key: of all that is drawn, with the tasks' ids.
    ids: (n,) int32.

  Returns:
    Records of prior_episodes and posterior_episodes of each task.
  """
  c = setup.c
  key_prior, key_posterior = jax.random.split(key)
  size = pearl.belief_size(setup.kind, c)

  def play(evidence, count, key):
    each = lambda tree: jax.tree.map(lambda x: jnp.repeat(x, count, axis=0), tree)
    keys = env_keys(key, (ids[:, None] * count + jnp.arange(count)).ravel())
    z = pearl.latent(setup.kind, each(evidence), each(descriptors), _normal(keys, size))
    act = _policy(setup, agent, z, 1.0)
    record = episodes(setup.family, variables, each(tasks), keys, act)
    return jax.tree.map(lambda x: x.reshape(len(ids), count, *x.shape[1:]), record)

  prior = play(pearl.nothing(len(ids), size), c.prior_episodes, key_prior)
  context = replays.context_of(prior)
  evidence = pearl.evidence_of(*pearl.encode(setup.kind, agent.encoder, context, c))
  return prior, play(evidence, c.posterior_episodes, key_posterior)


def test(setup: Setup, agent: Agent, variables: Any, tasks: Any, key: jax.Array) -> jax.Array:
  """Returns of c.test_episodes in a row in each of N tasks, of which nothing is learned.

  z is drawn from the prior for the first c.test_prior_episodes, then for each further one from the
  belief of all so far; actions are the policy's modes (the paper's section 5.2; oyster).

  Returns:
    (test_episodes, N), undiscounted.
  """
  c, descriptors = setup.c, setup.family.describe(tasks)
  ids, size = jnp.arange(len(descriptors)), pearl.belief_size(setup.kind, setup.c)

  def one(evidence, episode):
    keys = env_keys(jax.random.fold_in(key, episode), ids)
    early = episode < c.test_prior_episodes
    used = jax.tree.map(lambda x: jnp.where(early, 0.0, x), evidence)
    z = pearl.latent(setup.kind, used, descriptors, _normal(keys, size))
    act = _policy(setup, agent, z, 0.0)
    record = episodes(setup.family, variables, tasks, keys, act)
    context = replays.context_of(jax.tree.map(lambda x: x[:, None], record))
    new = pearl.evidence_of(*pearl.encode(setup.kind, agent.encoder, context, c))
    return Evidence(*jax.tree.map(jnp.add, evidence, new)), record.reward.sum(1)

  none = pearl.nothing(len(ids), size)
  return jax.lax.scan(one, none, jnp.arange(c.test_episodes))[1]


def references(family: Family, variables: Any, tasks: Any, key: jax.Array) -> jax.Array:
  """Mean returns (2, N) in each of N tasks, of random actions and of the oracle."""
  each = lambda tree: jax.tree.map(lambda x: jnp.repeat(x, REFERENCE_EPISODES, axis=0), tree)
  tasks = each(tasks)
  ids = jnp.arange(len(jax.tree.leaves(tasks)[0]))
  keys = env_keys(key, ids)

  def one(knows):
    def act(observation, keys):
      best = family.oracle(observation, tasks)
      return jnp.where(knows, best, random_actions(keys, best.shape[1], best.dtype))

    returns = episodes(family, variables, tasks, keys, act).reward.sum(1)
    return returns.reshape(-1, REFERENCE_EPISODES).mean(1)

  return jax.lax.map(one, jnp.array([False, True]))


def _policy(setup, agent, z, scale):
  """Acts with z; the noise of actions is scaled, to 0 for their modes."""
  size = setup.family.sizes[1]
  return lambda h, keys: pearl.act(agent.actor, h, z, scale * _normal(keys, size), setup.c)


def _normal(keys, size):
  return jax.vmap(lambda key: jax.random.normal(key, (size,)))(keys)
