"""Families of tasks: one world, many rewards. That of the latent world: pictures to go to."""

import dataclasses
import functools
import pathlib
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from palm_jax import environment
from palm_jax.base.errors import UserError
from palm_jax.layers.pixels import to_uint8
from palm_jax.world import goal_latent
from palm_jax.world.config import from_config
from palm_jax.world.manifold import LatentManifold, State
from palm_jax.world.tasks import Nothing, Task, oracle_action

PICTURES = 256  # by whose features observations are standardised


class Tasks(NamedTuple):
  """What a family is played with.

  Attributes:
    variables: arrays of the world, whatever the task.
    training: tree of arrays with a leading axis, one row a task.
    held_out: the same, of tasks to be tested on; nothing is ever learned there.
  """

  variables: Any
  training: Any
  held_out: Any


class Family(Protocol):
  """Tasks that share a world; E environments at once, each with a task of its own. All is pure.

  Episodes have one length and are only cut, so values are always bootstrapped.

  Attributes:
    sizes: F of observations, A of actions, D of descriptors.
    steps: T of an episode.
  """

  @property
  def sizes(self) -> tuple[int, int, int]: ...

  @property
  def steps(self) -> int: ...

  def begin(self, variables: Any, keys: jax.Array, tasks: Any) -> Any:
    """The state of E environments, by (E,) keys and rows of tasks, before their first episode.

    The first step begins it, whatever the actions: so there is one place where the world is drawn,
    which is what compiling takes longest for.
    """
    ...

  def step(
    self, variables: Any, keys: jax.Array, state: Any, actions: jax.Array, tasks: Any
  ) -> tuple[jax.Array, Any, jax.Array, jax.Array]:
    """Does actions (E, A): observations (E, F), state, rewards (E,), and hints (E,).

    A hint is the reward that a context holds: the same, or another.
    """
    ...

  def describe(self, tasks: Any) -> jax.Array:
    """(E, D): what `told` is told."""
    ...

  def oracle(self, observations: jax.Array, tasks: Any) -> jax.Array:
    """(E, A): what an agent does that knows the tasks, whose return is the measure for others."""
    ...


@dataclasses.dataclass(frozen=True, eq=False)
class LatentGoals:
  """Goals of the latent world: of each picture that a step leads to, how near it is to the goal's.

  A task is {'features' (F,), 'z' (z_dim,)} of its goal. Variables are {'params': world.Params,
  'deviation': (F,)}: observations are features less the world's mean, over their deviations.

  Attributes:
    world: that is played in, without rewards.
    goal: of world/tasks.py.
    steps: of an episode: all but its first picture are come to by one.
    dims: first coordinates of the latent, in which goals differ.
  """

  world: LatentManifold
  goal: Task
  steps: int
  dims: int

  @property
  def sizes(self) -> tuple[int, int, int]:
    assert self.world.features is not None
    return self.world.features.size, self.world.num_actions, self.dims

  def begin(self, variables: Any, keys: jax.Array, tasks: Any) -> State:
    del tasks
    params, world = variables['params'], self.world
    last = jnp.full(len(keys), params.episode_length - 1, jnp.int32)
    num_classes, dynamics = world.generator.num_classes, world.dynamics(params)
    env = environment.begin(keys, last, world.num_actions, num_classes, dynamics)
    return State(env, jnp.zeros((len(keys), *world.image_shape), jnp.uint8))

  def step(
    self, variables: Any, keys: jax.Array, state: State, actions: jax.Array, tasks: Any
  ) -> tuple[jax.Array, State, jax.Array, jax.Array]:
    params = variables['params']
    features, state, _, _ = self.world.step_all(keys, state, actions, params)

    def reward(there, here):  # of a goal of its own in each environment
      told = dict(params.task, features=there)
      return self.goal.reward(told, (), here[None], jnp.zeros(1, bool))[1][0]

    rewards = jax.vmap(reward)(tasks['features'], features)
    observations = (features - params.task['center']) / variables['deviation']
    return observations, state.replace(features=()), rewards, rewards

  def describe(self, tasks: Any) -> jax.Array:
    """The goal's latent, of which only the direction counts, at the length of a random one."""
    z = tasks['z'][:, : self.dims]
    return z / jnp.sqrt(jnp.mean(z**2, -1, keepdims=True))

  def oracle(self, observations: jax.Array, tasks: Any) -> jax.Array:
    del observations
    return oracle_action(tasks['z'])


def latent_goals(config: ConfigDict, workdir: pathlib.Path) -> tuple[LatentGoals, Tasks]:
  """The family of a config: goals are those of the seeds from config.world.goal on.

  The first meta.train_goals of them are trained on, the next meta.test_goals are held out.

  Raises:
    UserError: what `world.make` or `load_generator` refuse.
  """
  c, first = config.meta, config.world.goal
  world, params = from_config(config, workdir)
  assert world.features is not None
  plain = dataclasses.replace(world, task=Nothing())
  if c.goal_dims > world.num_actions:
    raise UserError(
      f'meta.goal_dims={c.goal_dims} is more than the {world.num_actions} coordinates of a latent: '
      'lower it, or set 0 for all'
    )
  dims = c.goal_dims or world.num_actions
  family = LatentGoals(plain, world.task, int(params.episode_length) - 1, dims)
  seeds = jnp.arange(first, first + c.train_goals + c.test_goals)
  look = jax.jit(functools.partial(_look, plain, dims))
  goals, deviation = look(params, seeds)
  split = lambda part: jax.tree.map(lambda x: x[part], goals)
  training, held_out = split(slice(c.train_goals)), split(slice(c.train_goals, None))
  return family, Tasks(dict(params=params, deviation=deviation), training, held_out)


def _look(world, dims, params, seeds):
  """{'features', 'z'} of the goals of seeds (N,), and the deviation (F,) of random features."""
  z, labels = jax.vmap(lambda seed: goal_latent(world, seed))(seeds)
  z = z.at[:, dims:].set(0)
  keys = jax.random.split(jax.random.key(1), PICTURES)
  others = environment.first_latent_and_label(
    keys, world.num_actions, world.generator.num_classes, z.dtype
  )
  labels = jnp.concatenate([labels, others[1]])
  labels = jnp.where(params.label < 0, labels, params.label)
  pictures = to_uint8(
    world.generator.apply(
      params.variables,
      jnp.concatenate([z, others[0]]),
      labels,
      truncation_psi=params.truncation_psi,
    )
  )
  features = world.look(params, pictures)
  deviation = jnp.maximum(features[len(seeds) :].std(0), 1e-6)
  return dict(features=features[: len(seeds)], z=z), deviation
