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

  def step(carry, t):
    observation, state = carry
    drawn = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, t)))(keys)  # (E, 2)
    action = act(observation, drawn[:, 0])
    after, state, reward, hint = family.step(variables, drawn[:, 1], state, action, tasks)
    return (after, state), Record(after, action, reward, hint)

  nowhere = jnp.zeros((len(keys), family.sizes[0]))
  begun = nowhere, family.begin(variables, keys, tasks)
  steps = jax.lax.scan(step, begun, jnp.arange(family.steps + 1))[1]  # (T + 1, E, ...)
  steps = jax.tree.map(lambda x: x.swapaxes(0, 1), steps)
  # The first step only begins the episode.
  return Record(steps.observation, *(x[:, 1:] for x in steps[1:]))


def collect(
  setup: Setup,
  agent: Agent,
  variables: Any,
  tasks: Any,
  descriptors: jax.Array,
  key: jax.Array,
  ids: jax.Array,
) -> Record:
  """Episodes with z from the prior, then as many with z from the belief that these left.

  Args:
    setup: Setup.
    agent: Agent.
    variables: of the family.
    tasks: n rows.
    descriptors: (n, D) of these.
    key: of all that is drawn, with the tasks' ids.
    ids: (n,) int32.

  Returns:
    Record (2, n, P, ...): of the prior and of the belief, P = c.episodes.
  """
  count, size = setup.c.episodes, pearl.belief_size(setup.kind, setup.c)
  each = lambda tree: jax.tree.map(lambda x: jnp.repeat(x, count, axis=0), tree)
  many, told = each(tasks), each(descriptors)

  def play(evidence, phase):
    env_ids = (ids[:, None] * count + jnp.arange(count)).ravel()
    keys = env_keys(jax.random.fold_in(key, phase), env_ids)
    z = pearl.latent(setup.kind, each(evidence), told, _normal(keys, size))
    record = episodes(setup.family, variables, many, keys, _policy(setup, agent, z, 1.0))
    record = jax.tree.map(lambda x: x.reshape(len(ids), count, *x.shape[1:]), record)
    return _evidence(setup, agent, record), record

  return jax.lax.scan(play, pearl.nothing(len(ids), size), jnp.arange(2))[1]


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
    new = _evidence(setup, agent, jax.tree.map(lambda x: x[:, None], record))
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


def _evidence(setup, agent, record):
  """What all transitions of a record say of its tasks."""
  context = replays.context_of(record)
  return pearl.evidence_of(*pearl.encode(setup.kind, agent.encoder, context, setup.c))


def _policy(setup, agent, z, scale):
  """Acts with z; the noise of actions is scaled, to 0 for their modes."""
  size = setup.family.sizes[1]
  return lambda h, keys: pearl.act(agent.actor, h, z, scale * _normal(keys, size), setup.c)


def _normal(keys, size):
  return jax.vmap(lambda key: jax.random.normal(key, (size,)))(keys)
