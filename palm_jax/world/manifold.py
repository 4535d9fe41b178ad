"""The world that pretraining plays in, for other people's agents: gymnax's protocol, and batches.

Steps, episodes and pictures are `environment.py`'s. Everything is pure: it can be used under jit,
vmap and scan.
"""

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from palm_jax import environment
from palm_jax.base.errors import UserError
from palm_jax.layers.pixels import to_uint8
from palm_jax.world.spaces import box
from palm_jax.world.tasks import Task
from palm_jax.world.views import Features

OBSERVATIONS = 'pixels', 'features'


class Params(flax.struct.PyTreeNode):
  """What may be traced: a sweep over the numbers does not recompile.

  Attributes:
    alpha, beta: () of T_com and T_ema (`environment.Dynamics`).
    truncation_psi: () of the generator.
    episode_length: () frames of an episode, which is cut, never terminated, at the last.
    label: () class of all episodes; -1 draws one for each.
    variables: of the generator.
    features: variables of the features, or ().
    task: what the task is told, such as a goal's features, or ().
  """

  alpha: Any
  beta: Any
  truncation_psi: Any
  episode_length: Any
  label: Any
  variables: Any = flax.struct.field(repr=False)
  features: Any = flax.struct.field(repr=False)
  task: Any = flax.struct.field(repr=False)


class State(flax.struct.PyTreeNode):
  """State of E environments.

  Attributes:
    env: environment.EnvState.
    seen: (E, H, W, K * C) uint8, the picture or the last K of them.
    features: (E, F) of it; () where neither observations nor the task are of features.
    memory: of the task.
  """

  env: environment.EnvState
  seen: jax.Array
  features: Any = ()
  memory: Any = ()

  @property
  def time(self) -> jax.Array:
    """(E,) steps since the episode began."""
    return self.env.step


@dataclasses.dataclass(frozen=True, eq=False)
class LatentManifold:
  """The world: what does not change while it is played in. `make` makes one.

  Methods without an ending are gymnax 1.0's, for one environment; those that end in `_all` are for
  E environments at once, which is faster than vmap.

  Attributes:
    generator: any PictureGenerator.
    task: of `tasks.py`.
    features: of `views.py`, or None.
    observations: one of OBSERVATIONS.
    params: the Params that are used where none are given.
    kind, start: of `environment.Dynamics`.
    stack: pictures that are seen at once.
  """

  generator: Any
  task: Task
  features: Features | None
  observations: str
  params: Params = dataclasses.field(repr=False)
  kind: str = 'ema'
  start: str = 'latent'
  stack: int = 1

  @property
  def name(self) -> str:
    return 'LatentManifold-v0'

  @property
  def default_params(self) -> Params:
    return self.params

  @property
  def num_actions(self) -> int:
    """Numbers of an action."""
    return self.generator.z_dim

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """(H, W, K * C) of what is seen."""
    height, width, channels = self.generator.image_shape
    return height, width, channels * self.stack

  def action_space(self, params: Params | None = None) -> Any:
    """A box of z_dim numbers in [-1, 1]: gymnax's where gymnax is installed."""
    del params
    return box(-1.0, 1.0, (self.generator.z_dim,), jnp.float32)

  def observation_space(self, params: Params | None = None) -> Any:
    """Pictures (H, W, K * C) uint8, or (F,) float32 features."""
    del params
    if self.observations == 'pixels':
      return box(0, 255, self.image_shape, jnp.uint8)
    assert self.features is not None
    return box(-jnp.inf, jnp.inf, (self.features.size,), jnp.float32)

  def picture(self, params: Params, z: jax.Array, label: jax.Array) -> jax.Array:
    """G(z, c) of one latent (z_dim,) and class (): (H, W, C) uint8."""
    images = self.generator.apply(
      params.variables, z[None], label[None], truncation_psi=params.truncation_psi
    )
    return to_uint8(images)[0]

  def look(self, params: Params, pictures: jax.Array) -> jax.Array:
    """Features (N, F) of pictures (N, H, W, C) uint8, each of which fills a stack."""
    assert self.features is not None
    return self.features.apply(params.features, jnp.tile(pictures, self.stack))

  # ---- E environments at once

  def reset_all(
    self, keys: jax.Array, params: Params | None = None, memory: Any = None
  ) -> tuple[jax.Array, State]:
    """Begins an episode in each environment.

    Args:
      keys: (E,) typed keys, one an environment.
      params: Params; None is `default_params`.
      memory: the task's, of episodes before these; None begins a new one.

    Returns:
      observations (E, ...), State.
    """
    params = self.params if params is None else params
    begun = environment.begin(
      keys,
      jnp.zeros(len(keys), jnp.int32),
      self.generator.z_dim,
      self.generator.num_classes,
      self.dynamics(params),
    )
    seen = jnp.zeros((len(keys), *self.image_shape), jnp.uint8)
    state = self.show(begun, seen, params)
    if memory is None:
      memory = self.task.init(state.features)
    else:
      began = jnp.ones(len(keys), bool)
      memory, _ = self.task.reward(params.task, memory, state.features, began)
    return self.observe(state), state.replace(memory=memory)

  def step_all(
    self, keys: jax.Array, state: State, actions: jax.Array, params: Params | None = None
  ) -> tuple[jax.Array, State, jax.Array, jax.Array]:
    """One step of each environment, as `rollout.collect` makes it.

    The step after an episode's last frame begins the next one: its action is not done, and its
    reward is 0 (Gymnasium's NEXT_STEP).

    Args:
      keys: (E,) typed keys, one an environment.
      state: State.
      actions: (E, z_dim) in [-1, 1]; others are clipped.
      params: Params; None is `default_params`.

    Returns:
      observations (E, ...), State, rewards (E,), truncated (E,) bool: this is the last frame.

    Raises:
      UserError: when traced, rewards of another shape by a task of someone's own.
    """
    params = self.params if params is None else params
    env = environment.advance(
      state.env,
      jnp.clip(actions, -1, 1),
      keys,
      self.dynamics(params),
      params.episode_length,
      self.generator.num_classes,
    )
    after = self.show(env, state.seen, params)
    began = env.step == 0
    memory, rewards = self.task.reward(params.task, state.memory, after.features, began)
    if rewards.shape != began.shape:
      raise UserError(
        f'task {self.task.name!r}: rewards of shape {rewards.shape} for {len(began)} '
        f'environments: expected {began.shape}'
      )
    rewards = jnp.where(began, 0.0, rewards)
    truncated = env.step + 1 >= params.episode_length
    return self.observe(after), after.replace(memory=memory), rewards, truncated

  # ---- one environment: gymnax 1.0

  @functools.partial(jax.jit, static_argnums=0)
  def reset(self, key: jax.Array, params: Params | None = None) -> tuple[jax.Array, State]:
    """Begins an episode: observation, State (whose arrays have a leading axis of 1)."""
    return self.reset_env(key, params)

  def reset_env(self, key: jax.Array, params: Params | None = None) -> tuple[jax.Array, State]:
    """As `reset`."""
    observations, state = self.reset_all(key[None], params)
    return observations[0], state

  @functools.partial(jax.jit, static_argnums=0)
  def step(
    self, key: jax.Array, state: State, action: jax.Array, params: Params | None = None
  ) -> tuple[jax.Array, State, jax.Array, jax.Array, jax.Array, dict[str, jax.Array]]:
    """One step; at an episode's last frame the next episode begins at once.

    That draws two pictures a step. `step_env` draws one, and begins the next episode a step later,
    as `step_all`.

    Returns:
      observation (of the next episode, where this one was cut), State, reward, terminated (never),
      truncated, {'terminated', 'truncated', 'final_observation': what this episode ended with}.
    """
    key_step, key_reset = jax.random.split(key)
    last, after, reward, terminated, info = self.step_env(key_step, state, action, params)
    first, begun = self.reset_all(key_reset[None], params, after.memory)
    observation, state = jax.tree.map(
      lambda new, old: jnp.where(info['truncated'], new, old), (first[0], begun), (last, after)
    )
    info = dict(info, terminated=terminated, final_observation=last)
    return observation, state, reward, terminated, info['truncated'], info

  def step_env(
    self, key: jax.Array, state: State, action: jax.Array, params: Params | None = None
  ) -> tuple[jax.Array, State, jax.Array, jax.Array, dict[str, jax.Array]]:
    """One step of one environment: observation, State, reward, terminated, {'truncated'}."""
    observations, state, rewards, truncated = self.step_all(key[None], state, action[None], params)
    return observations[0], state, rewards[0], jnp.zeros((), bool), dict(truncated=truncated[0])

  def is_truncated(self, state: State, params: Params) -> jax.Array:
    """() bool: the state shows an episode's last frame."""
    return state.env.step[0] + 1 >= params.episode_length

  def is_terminated(self, state: State, params: Params) -> jax.Array:
    """() bool: never, so values are always bootstrapped."""
    del params
    return jnp.zeros_like(state.env.step[0], bool)

  # ---- what both have

  def dynamics(self, params: Params) -> environment.Dynamics:
    """Those of params."""
    return environment.Dynamics(params.alpha, params.beta, self.kind, self.start)

  def show(self, env: environment.EnvState, seen: jax.Array, params: Params) -> State:
    """What environments show after `seen` (E, H, W, K * C) uint8 -> State without a memory."""
    label = jnp.where(params.label < 0, env.label, params.label).astype(env.label.dtype)
    env = env.replace(label=label)
    images = self.generator.apply(
      params.variables, env.z, env.label, truncation_psi=params.truncation_psi
    )
    seen = environment.see(seen, to_uint8(images), env.step)
    features = () if self.features is None else self.features.apply(params.features, seen)
    return State(env=env, seen=seen, features=features)

  def observe(self, state: State) -> jax.Array:
    """(E, ...) observations of a State."""
    return state.seen if self.observations == 'pixels' else state.features
