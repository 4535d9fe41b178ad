"""A point robot for tests: a family of tasks as quick as its sums."""

import dataclasses

import jax
import jax.numpy as jnp

from palm_jax.meta.tasks import Tasks


@dataclasses.dataclass(frozen=True)
class PointRobot:
  """A point at (0, 0) that goes 0.1 a step and axis, to a goal on the unit half circle (oyster).

  A task is {'goal': (2,)}. The reward is the distance, negative.

  Attributes:
    steps: of an episode.
    sparse: whether a context holds 1 - distance within 0.2 of the goal and 0 outside, or the
      reward.
  """

  steps: int = 20
  sparse: bool = False
  sizes = 2, 2, 2

  def begin(self, variables, keys, tasks):
    del variables, tasks
    return dict(place=jnp.zeros((len(keys), 2)), steps=jnp.zeros(len(keys)))

  def step(self, variables, keys, state, actions, tasks):
    del variables, keys
    moves = (state['steps'] > 0)[:, None]
    place = state['place'] + jnp.where(moves, 0.1 * actions, 0.0)
    state = dict(place=place, steps=state['steps'] + 1)
    distance = jnp.linalg.norm(place - tasks['goal'], axis=-1)
    hint = jnp.where(distance < 0.2, 1 - distance, 0.0) if self.sparse else -distance
    return place, state, -distance, hint

  def describe(self, tasks):
    return tasks['goal']

  def oracle(self, observations, tasks):
    return jnp.clip((tasks['goal'] - observations) / 0.1, -1, 1)


def half_circle(training: int, held_out: int, seed: int = 0) -> Tasks:
  """Goals at random angles in [0, pi]."""
  angle = jnp.pi * jax.random.uniform(jax.random.key(seed), (training + held_out,))
  goals = jnp.stack([jnp.cos(angle), jnp.sin(angle)], -1)
  return Tasks((), dict(goal=goals[:training]), dict(goal=goals[training:]))
