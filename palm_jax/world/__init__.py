"""The latent world for other people's agents: gymnax's protocol, Gymnasium, tasks."""

import dataclasses
import importlib.util
import numbers
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from palm_jax import environment
from palm_jax.base import checks
from palm_jax.base.errors import UserError
from palm_jax.base.files import user_path
from palm_jax.generator import load_generator
from palm_jax.generator.views import viewed
from palm_jax.world.manifold import OBSERVATIONS, LatentManifold, Params, State
from palm_jax.world.tasks import Nothing, check_head, make_task
from palm_jax.world.views import Features, at_random, check_features, pretrained

__all__ = ['Features', 'LatentManifold', 'Params', 'State', 'make', 'register']

NAME = 'palm_jax/LatentManifold-v0'
OF_GENERATORS = 'variables', 'z_dim', 'num_classes', 'image_shape', 'apply'  # PictureGenerator
CENTER = 256  # pictures whose mean feature is taken away from those of the goal
AT_ONCE = 16  # of them that are drawn
TOLD = dict(goal='goal', head='class', target='class')  # {setting: the task that has it}


def make(
  generator: Any = 'cifar10-small',
  task: str = 'none',
  *,
  observations: str = 'pixels',
  encoder: Features | str | os.PathLike | None = None,
  alpha: float | None = None,
  beta: float | None = None,
  truncation_psi: float | None = None,
  episode_length: int | None = None,
  label: int = -1,
  dynamics: str = 'ema',
  start: str = 'latent',
  stack: int = 1,
  latent_space: str = 'z',
  style_mixing: int = 0,
  crop: int = 0,
  goal: Any = None,
  head: tuple[np.ndarray, np.ndarray] | None = None,
  target: int | None = None,
  **settings: Any,
) -> tuple[LatentManifold, Params]:
  """A world, and the parameters that it is played with.

  Args:
    generator: a PictureGenerator, or path or name for `load_generator`.
    task: 'none', 'entropy', 'class' or 'goal' (`tasks.py`), or a `tasks.Task`.
    observations: 'pixels' (H, W, C) uint8, or 'features' of the encoder.
    encoder: Features, the workdir of a pretraining, or 'random'; None is random where features are
      needed.
    alpha, beta, truncation_psi, episode_length: None is `environment.default_config`'s.
    label: class of all episodes; -1 draws one for each.
    dynamics, start, stack, latent_space, style_mixing, crop: of `environment.default_config`.
    goal: of the task 'goal': a picture (H, W, C) uint8, or a seed of a latent (and of its class,
      unless label says it); None is seed 0.
    head: of the task 'class': kernel (F, classes) and bias (classes,).
    target: of the task 'class': the class; None is 0.
    **settings: of the task: threshold; k and memory of 'entropy'.

  Returns:
    (LatentManifold, Params).

  Raises:
    UserError: an invalid setting; names it and what was expected.
  """
  defaults = _environment(
    dict(alpha=alpha, beta=beta, truncation_psi=truncation_psi, episode_length=episode_length)
    | dict(dynamics=dynamics, start=start, stack=stack)
    | dict(latent_space=latent_space, style_mixing=style_mixing, crop=crop)
  )
  checks.choice('observations', observations, OBSERVATIONS)
  task_of = make_task(task, **settings)
  _check_told(task, goal=goal, head=head, target=target)
  generator = viewed(_loaded(generator), latent_space, style_mixing, crop)
  _check_label(label, max(generator.num_classes, 1))
  if task == 'goal':
    goal = _checked_goal(goal, generator.image_shape)
  height, width, channels = generator.image_shape
  features = None
  if task_of.sees or observations == 'features' or encoder is not None:
    features = _features(encoder, (height, width, channels * stack))
  params = Params(
    alpha=jnp.float32(defaults.alpha),
    beta=jnp.float32(defaults.beta),
    truncation_psi=jnp.float32(defaults.truncation_psi),
    episode_length=jnp.int32(defaults.episode_length),
    label=jnp.int32(label),
    variables=jax.device_put(generator.variables),
    features=() if features is None else jax.device_put(features.variables),
    task=(),
  )
  plain = LatentManifold(generator, Nothing(), features, 'pixels', params, dynamics, start, stack)
  told = ()
  if task == 'goal':
    told = _goal(plain, params, goal)
  elif task == 'class':
    told = _head(head, target or 0, features)
  params = params.replace(task=told)
  return dataclasses.replace(plain, task=task_of, observations=observations, params=params), params


def _loaded(generator):
  """The generator itself, or that of a path or name."""
  if isinstance(generator, str | os.PathLike):
    generator = load_generator(generator)
  if not all(hasattr(generator, name) for name in OF_GENERATORS):
    raise UserError(
      f'generator is a {type(generator).__name__}: expected a PictureGenerator, or a path or name '
      'for load_generator'
    )
  return generator


def _check_label(label, num_classes):
  if not isinstance(label, (int, np.integer)) or not -1 <= label < num_classes:
    raise UserError(f'label={label!r}: expected -1 or a class below {num_classes}')


def _check_told(task, **told):
  """Raises UserError where a task is told what it does not have, or not told what it needs."""
  for name, value in told.items():
    if value is not None and task != TOLD[name]:
      raise UserError(f'{name} with task={task!r}: it is for task={TOLD[name]!r}')
  if task == 'class' and (not isinstance(told['head'], (tuple, list)) or len(told['head']) != 2):
    raise UserError("task 'class' without a head: give head=(kernel, bias) of a linear probe")


def _environment(settings):
  """`environment.default_config` with the settings that are not None, checked."""
  found = environment.default_config()
  for name, value in settings.items():
    if value is None:
      continue
    value = value.item() if isinstance(value, np.generic) else value
    kind = {int: 'a whole number', float: 'a number'}.get(type(found[name]), 'text')
    try:
      found[name] = value
    except TypeError:
      raise UserError(f'environment.{name}={value!r}: expected {kind}') from None
  environment.check(found)
  return found


def _features(encoder, image_shape):
  if isinstance(encoder, Features):
    check_features(encoder, image_shape)
    return encoder
  if encoder is None or encoder == 'random':
    return at_random(image_shape)
  if not isinstance(encoder, str | os.PathLike) or not user_path(encoder).exists():
    raise UserError(
      f"encoder={encoder!r} is neither 'random' nor the workdir of a pretraining: give one of them"
    )
  return pretrained(encoder, image_shape)


def goal_latent(world: LatentManifold, seed: int) -> tuple[jax.Array, jax.Array]:
  """The latent (z_dim,) and class () of the goal with a seed."""
  z, label = environment.first_latent_and_label(
    jax.random.key(seed)[None], world.generator.z_dim, world.generator.num_classes, jnp.float32
  )
  return z[0], label[0]


def _checked_goal(goal, image_shape):
  """A seed, or a picture (H, W, C) uint8."""
  if goal is None or isinstance(goal, numbers.Integral):
    return checks.whole('goal', goal or 0, checks.Range(0, 2**31 - 1))
  picture = np.asarray(goal)
  if picture.shape != image_shape or picture.dtype != np.uint8:
    raise UserError(
      f'a goal of {picture.dtype}{picture.shape}: expected a picture of uint8{image_shape}, or a '
      'seed'
    )
  return picture


def _head(head, target, features):
  """The head of the task 'class', and its class."""
  assert head is not None and features is not None  # it sees
  kernel, bias = head
  check_head(kernel, bias, target, features.size)
  return dict(kernel=jnp.asarray(kernel), bias=jnp.asarray(bias), target=jnp.int32(target))


def _goal(world, params, goal):
  """Features of the goal, and the mean of those of random pictures.

  Of a stack all pictures are the same: what who has arrived sees.
  """
  blind = dataclasses.replace(world, features=None)
  channels = world.generator.image_shape[-1]

  @jax.jit
  def random_features(params, keys):
    return world.look(params, blind.reset_all(keys, params)[0][..., -channels:])

  if isinstance(goal, int):
    z, label = goal_latent(world, goal)
    label = jnp.where(params.label < 0, label, params.label)
    goal = jax.jit(world.picture)(params, z, label)
  keys = jax.random.split(jax.random.key(0), CENTER)
  found = [random_features(params, keys[at : at + AT_ONCE]) for at in range(0, CENTER, AT_ONCE)]
  return dict(
    features=jax.jit(world.look)(params, goal[None])[0], center=jnp.concatenate(found).mean(0)
  )


def register() -> None:
  """Makes `palm_jax/LatentManifold-v0` known to Gymnasium, where that is installed."""
  if importlib.util.find_spec('gymnasium') is None:
    return
  import gymnasium

  if NAME not in gymnasium.registry:
    gymnasium.register(
      NAME,
      entry_point='palm_jax.world.gym:LatentManifoldEnv',
      vector_entry_point='palm_jax.world.gym:LatentManifoldVectorEnv',
    )


register()
