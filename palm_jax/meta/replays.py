"""The two replays of each task: all that was played lately to learn from, and the newest play by
which the task is recognised.

The encoder's must be recent: it is to recognise a task by what the present policy does there.
"""

from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from palm_jax.meta.pearl import Batch, Context


class Record(NamedTuple):
  """Whole episodes of T steps, P of each of n tasks.

  Attributes:
    observation: (n, P, T + 1, F).
    action: (n, P, T, A).
    reward: (n, P, T).
    hint: (n, P, T), the reward that a context holds.
  """

  observation: jax.Array
  action: jax.Array
  reward: jax.Array
  hint: jax.Array


class Replay(flax.struct.PyTreeNode):
  """The learner's: the newest N episodes of each of M tasks. s' of step t stands at t + 1.

  Attributes:
    observation: (M, N, T + 1, F).
    action: (M, N, T, A).
    reward: (M, N, T).
    count: (M,) int32 episodes that were added, also those no longer there.
  """

  observation: jax.Array
  action: jax.Array
  reward: jax.Array
  count: jax.Array


def empty_replay(tasks: int, episodes: int, steps: int, observations: int, actions: int) -> Replay:
  """Of M tasks, N episodes, T steps, F and A numbers."""
  return Replay(
    observation=jnp.zeros((tasks, episodes, steps + 1, observations)),
    action=jnp.zeros((tasks, episodes, steps, actions)),
    reward=jnp.zeros((tasks, episodes, steps)),
    count=jnp.zeros(tasks, jnp.int32),
  )


def empty_context(tasks: int, transitions: int, observations: int, actions: int) -> Context:
  """Of M tasks, C transitions, F and A numbers."""
  return Context(
    observation=jnp.zeros((tasks, transitions, observations)),
    action=jnp.zeros((tasks, transitions, actions)),
    hint=jnp.zeros((tasks, transitions)),
  )


def add(replay: Replay, ids: jax.Array, record: Record) -> Replay:
  """Adds the episodes of the tasks with (n,) different ids, over the oldest of each."""
  episodes = record.reward.shape[1]
  slots = (replay.count[ids][:, None] + jnp.arange(episodes)) % replay.reward.shape[1]  # (n, P)
  rows = ids[:, None]
  return Replay(
    observation=replay.observation.at[rows, slots].set(record.observation),
    action=replay.action.at[rows, slots].set(record.action),
    reward=replay.reward.at[rows, slots].set(record.reward),
    count=replay.count.at[ids].add(episodes),
  )


def context_of(record: Record) -> Context:
  """All transitions of a record: (n, P * T, ...)."""
  flat = lambda x: x.reshape(len(x), -1, *x.shape[3:])
  return Context(flat(record.observation[:, :, :-1]), flat(record.action), flat(record.hint))


def refill(contexts: Context, ids: jax.Array, record: Record) -> Context:
  """Empties the context of the tasks with (n,) ids, and fills it with a record of its size."""
  return jax.tree.map(lambda old, new: old.at[ids].set(new), contexts, context_of(record))


def sample_context(contexts: Context, ids: jax.Array, count: int, key: jax.Array) -> Context:
  """`count` transitions of each of the tasks with (n,) ids, drawn with replacement."""
  columns = _below(contexts.hint.shape[1], jax.random.uniform(key, (len(ids), count)))
  return jax.tree.map(lambda x: x[ids[:, None], columns], contexts)


def sample(replay: Replay, ids: jax.Array, count: int, key: jax.Array) -> Batch:
  """`count` transitions of each of the tasks with (n,) ids, of which each has an episode at least.

  They are drawn with replacement.
  """
  _, episodes, steps = replay.reward.shape
  rows, there = ids[:, None], jnp.minimum(replay.count[ids], episodes)[:, None]
  at = jax.random.uniform(key, (2, len(ids), count))
  episode, t = _below(there, at[0]), _below(steps, at[1])
  return Batch(
    observation=replay.observation[rows, episode, t],
    action=replay.action[rows, episode, t],
    reward=replay.reward[rows, episode, t],
    next_observation=replay.observation[rows, episode, t + 1],
  )


def _below(count, uniform):
  """Integers in [0, count) of numbers in [0, 1): a draw that compiles sooner than randint."""
  return jnp.minimum((uniform * count).astype(jnp.int32), count - 1)
