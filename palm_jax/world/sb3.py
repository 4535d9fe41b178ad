"""The world as Stable-Baselines3's VecEnv, which is not Gymnasium's."""

import importlib
from typing import Any

import numpy as np

from palm_jax.base.errors import UserError
from palm_jax.world.gym import LatentManifoldVectorEnv


def make_vec_env(num_envs: int, **settings: Any) -> Any:
  """A `stable_baselines3.common.vec_env.VecEnv` of so many environments, one compiled call a step.

  Args:
    num_envs: which begin and end their episodes together.
    settings: of `LatentManifoldVectorEnv`, such as world=palm_jax.world.make(...).

  Raises:
    UserError: no Stable-Baselines3, or settings that LatentManifoldVectorEnv refuses.
  """
  try:
    base: Any = importlib.import_module('stable_baselines3.common.vec_env').VecEnv
  except ImportError as error:
    raise UserError(
      'palm_jax.world.sb3 needs Stable-Baselines3: pip install stable-baselines3'
    ) from error
  envs = LatentManifoldVectorEnv(num_envs, **settings)

  class Batch(base):
    """Begins the next episodes within the step that ends the last ones, as VecEnv asks."""

    def __init__(self):
      super().__init__(envs.num_envs, envs.single_observation_space, envs.single_action_space)

    def reset(self):
      seed = self._seeds[0]
      self._reset_seeds()  # one is for the next reset alone
      return envs.reset(seed=seed)[0]

    def step_async(self, actions: np.ndarray):
      self.actions = actions

    def step_wait(self):
      seen, rewards, _, cut, _ = envs.step(self.actions)
      infos = [{} for _ in range(envs.num_envs)]
      if cut.any():  # all at once: the step that begins the next episodes
        last, (seen, *_) = seen, envs.step(self.actions)
        for info, observation in zip(infos, last, strict=True):
          info |= {'terminal_observation': observation, 'TimeLimit.truncated': True}
      return seen, rewards, cut, infos

    def close(self):
      envs.close()

    def get_images(self):
      return list(envs.render() or [None] * envs.num_envs)

    def get_attr(self, attr_name: str, indices: Any = None):
      spaces = dict(
        action_space='single_action_space', observation_space='single_observation_space'
      )
      return [getattr(envs, spaces.get(attr_name, attr_name)) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None):
      setattr(envs, attr_name, value)

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any):
      return [getattr(envs, method_name)(*args, **kwargs) for _ in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None):
      return [False for _ in self._get_indices(indices)]

  return Batch()
