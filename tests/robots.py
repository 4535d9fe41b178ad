"""A point robot for tests: a family of tasks as quick as its sums.

  python -m tests.robots pearl

trains three seeds and prints their scores on held-out goals as JSON.
"""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from palm_jax.meta import loop, play, train
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


def scores(kind: str) -> dict:
  """What an agent of a kind reaches on goals that it was not trained on.

  Returns:
    scores, (seeds, episodes): 0 for random actions and 1 for who goes straight to the goal; two
    episodes are of the prior, three of the belief. range: the return from 0 to 1. steps: of an
    episode.
  """
  robot, tasks = PointRobot(), half_circle(100, 16)
  c = train.default_config()
  c.update(
    dict(
      train_goals=100,
      tasks_per_iteration=10,
      episodes=4,
      replay_episodes=100,
      updates=100,
      meta_batch=10,
      batch_size=64,
      hidden=(64, 64),
      encoder_hidden=(64, 64),
      gamma=0.9,  # oyster, of this robot
      lr=1e-3,
      tau=0.02,
      kl_lambda=0.03,
      test_prior_episodes=2,
      test_episodes=5,
    )
  )
  low, high = np.asarray(play.references(robot, (), tasks.held_out, jax.random.key(1))).mean(1)
  program = loop.make_program(robot, kind, c)
  state = program.init(jax.random.key(0))
  for _ in range(200):
    state, _ = program.call(state, (), tasks.training)
  keys = jax.random.split(jax.random.key(2), c.seeds)
  returns = np.asarray(program.test(state.players.agent, (), tasks.held_out, keys)).mean(-1)
  found = (returns - low) / (high - low)
  return dict(scores=found.tolist(), range=float(high - low), steps=robot.steps)


if __name__ == '__main__':
  print(json.dumps(scores(sys.argv[1])))
