"""The latent world as Gymnasium environments: one, and many at once in one compiled call a step."""

from typing import Any

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

from palm_jax import environment
from palm_jax.base import checks
from palm_jax.base.errors import UserError
from palm_jax.world import LatentManifold, Params, make

FPS = 8


class LatentManifoldVectorEnv(gymnasium.vector.VectorEnv):
  """E environments in one compiled call a step.

  The step after an episode's last frame begins the next one: its action is not done and its reward
  is 0 (NEXT_STEP). Environments never terminate, so values are always bootstrapped.
  """

  metadata = {
    'autoreset_mode': AutoresetMode.NEXT_STEP,
    'render_modes': ['rgb_array'],
    'render_fps': FPS,
  }

  def __init__(
    self, num_envs: int = 1, render_mode: str | None = None, world: Any = None, **settings: Any
  ):
    """Takes `num_envs`, and a (LatentManifold, Params) as `world`, or the settings of `make`.

    Raises:
      UserError: what `make` refuses, no environments, or settings beside a world.
    """
    num_envs = checks.whole('num_envs', num_envs, checks.Range(1, 1 << 20))
    self.world: LatentManifold
    self.params: Params
    self.world, self.params = make(**settings) if world is None else _whole(world, settings)
    self.num_envs = num_envs
    self.render_mode = render_mode
    self.single_action_space = action_space(self.world)
    self.single_observation_space = observation_space(self.world)
    self.action_space = batch_space(self.single_action_space, num_envs)
    self.observation_space = batch_space(self.single_observation_space, num_envs)
    self._ids = jnp.arange(num_envs)
    self._reset = jax.jit(self._begin)
    self._step = jax.jit(self._advance, donate_argnums=0)
    self._key: jax.Array | None = None
    self._steps: Any = None  # key of the steps since the last reset
    self._state: Any = None
    self._count = 0

  def _begin(self, params, key, memory):
    return self.world.reset_all(environment.env_keys(key, self._ids), params, memory)

  def _advance(self, state, params, key, count, actions):
    keys = environment.env_keys(jax.random.fold_in(key, count), self._ids)
    return self.world.step_all(keys, state, actions, params)

  def reset(
    self, *, seed: int | None = None, options: dict[str, Any] | None = None
  ) -> tuple[np.ndarray, dict[str, Any]]:
    """Begins an episode in every environment; a seed makes all that follows the same again.

    Without a seed the task goes on with what it remembers.
    """
    del options
    super().reset(seed=seed)
    memory = None
    if seed is not None or self._key is None:
      self._key = jax.random.key(_fresh(seed))
    else:
      memory = self._state.memory
    # Not by fold_in of the key that is split: fold_in(key, i) is split(key, n)[i].
    self._key, self._steps, key = jax.random.split(self._key, 3)
    observations, self._state = self._reset(self.params, key, memory)
    self._count = 0
    return np.array(observations), {}

  def step(
    self, actions: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
    """One step of every environment.

    Args:
      actions: (E, z_dim) in [-1, 1].

    Returns:
      observations (E, ...), rewards (E,) float32, terminations (all False), truncations (E,), {}.
      The arrays are the caller's own: agents add to rewards in place.

    Raises:
      UserError: before `reset`, or actions of another shape.
    """
    actions = _checked(actions, (self.num_envs, self.world.num_actions), self._state)
    observations, self._state, rewards, truncated = self._step(
      self._state, self.params, self._steps, np.int32(self._count), actions
    )
    self._count += 1
    never = np.zeros(self.num_envs, bool)
    return np.array(observations), np.array(rewards), never, np.array(truncated), {}

  def render(self) -> tuple[np.ndarray, ...] | None:
    """The pictures that the environments show: (H, W, 3) uint8 each."""
    if self.render_mode != 'rgb_array' or self._state is None:
      return None
    return tuple(_rgb(self.world, picture) for picture in np.asarray(self._state.seen))


class LatentManifoldEnv(gymnasium.Env):
  """One environment, which does not begin a next episode by itself: `reset` where one is cut."""

  metadata = {'render_modes': ['rgb_array'], 'render_fps': FPS}

  def __init__(self, render_mode: str | None = None, world: Any = None, **settings: Any):
    """As `LatentManifoldVectorEnv`."""
    self._many = LatentManifoldVectorEnv(1, render_mode, world, **settings)
    self.world, self.params = self._many.world, self._many.params
    self.render_mode = render_mode
    self.action_space = self._many.single_action_space
    self.observation_space = self._many.single_observation_space
    self._cut = False

  def reset(
    self, *, seed: int | None = None, options: dict[str, Any] | None = None
  ) -> tuple[np.ndarray, dict[str, Any]]:
    """Begins an episode; a seed makes all that follows the same again."""
    super().reset(seed=seed)
    observations, info = self._many.reset(seed=seed, options=options)
    self._cut = False
    return observations[0], info

  def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
    """One step: observation, reward, terminated (never), truncated, {}.

    Raises:
      UserError: before `reset`, after an episode's last frame, or an action of another shape.
    """
    if self._cut:
      raise UserError('step after the last frame of an episode: call reset first')
    observations, rewards, _, truncated, info = self._many.step(np.asarray(action)[None])
    self._cut = bool(truncated[0])
    return observations[0], float(rewards[0]), False, self._cut, info

  def render(self) -> Any:
    """(H, W, 3) uint8."""
    pictures = self._many.render()
    return None if pictures is None else pictures[0]


def action_space(world: LatentManifold) -> gymnasium.spaces.Box:
  """(z_dim,) float32 in [-1, 1]."""
  return gymnasium.spaces.Box(-1.0, 1.0, (world.num_actions,), np.float32)


def observation_space(world: LatentManifold) -> gymnasium.spaces.Box:
  """Pictures (H, W, K * C) uint8, or (F,) float32 features."""
  space = world.observation_space()
  dtype = np.dtype(space.dtype).type
  return gymnasium.spaces.Box(space.low, space.high, space.shape, dtype)


def _whole(world, settings):
  """A world of `make`, and its Params."""
  pair = isinstance(world, (tuple, list)) and len(world) == 2
  if not pair or not isinstance(world[0], LatentManifold):
    raise UserError(
      f'world is a {type(world).__name__}: give (world, params), as make returns them'
    )
  if settings:
    raise UserError(
      f'{", ".join(settings)} beside world=, which is made already: give one of the two'
    )
  return world


def _fresh(seed):
  return int(np.random.SeedSequence(seed).generate_state(1)[0])


def _checked(actions, shape, state):
  if state is None:
    raise UserError('step before reset: call reset first')
  actions = np.asarray(actions, np.float32)
  if actions.shape != shape or not np.isfinite(actions).all():
    raise UserError(f'actions of shape {actions.shape}: expected finite ones of shape {shape}')
  return np.clip(actions, -1, 1)


def _rgb(world, seen):
  picture = seen[..., -world.generator.image_shape[-1] :]
  return picture if picture.shape[-1] == 3 else picture[..., :1].repeat(3, -1)
