"""What an agent is rewarded for in the latent world.

A reward is of the picture that a step leads to. `optimum` is the largest reward of a step, whoever
acts; what can be reached is less, since noise is added to each action: `oracle_action` is an agent
that knows the goal's latent, whose return is the measure for others.
"""

import dataclasses
import numbers
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from palm_jax.base import checks
from palm_jax.base.errors import UserError
from palm_jax.reward import empty_memory, entropy_reward, remember

TASKS = 'none', 'entropy', 'class', 'goal'
PARTS = 'name', 'optimum', 'sees', 'init', 'reward'  # of a Task
RANGES = dict(k=checks.Range(1, 10**6), memory=checks.Range(1, 10**9))  # whole numbers


class Task(Protocol):
  """A reward of features.

  Attributes:
    name: of TASKS, or another.
    optimum: largest reward of a step; None where there is none.
    sees: whether it reads features.
  """

  @property
  def name(self) -> str: ...

  @property
  def optimum(self) -> float | None: ...

  @property
  def sees(self) -> bool: ...

  def init(self, features: Any) -> Any:
    """The memory at the start, for features (E, F)."""
    ...

  def reward(
    self, told: Any, memory: Any, features: Any, began: jax.Array
  ) -> tuple[Any, jax.Array]:
    """The memory after features (E, F), and their rewards (E,) float32.

    Where `began` (E,) bool, they are an episode's first, whose reward is not used: a memory
    outlives episodes unless it is renewed here.
    """
    ...


class _WithoutMemory:
  """A task whose rewards are of one picture alone."""

  def init(self, features: Any) -> Any:
    del features
    return ()


def _paid(values, threshold):
  """Values as rewards: dense, or 1 where they are above a threshold."""
  return (values if threshold is None else values > threshold).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Nothing(_WithoutMemory):
  """Reward 0, for agents that make their own."""

  name: str = 'none'
  optimum: float | None = 0.0
  sees: bool = False

  def reward(
    self, told: Any, memory: Any, features: Any, began: jax.Array
  ) -> tuple[Any, jax.Array]:
    del told, features
    return memory, jnp.zeros(len(began), jnp.float32)


@dataclasses.dataclass(frozen=True)
class Entropy:
  """log(1 + mean distance) to the k nearest of the last features of all environments.

  As PALM's reward (section 4.2, `reward.entropy_reward`), of a frozen encoder. 0 until there are
  more than k. It has no optimum. Sparse: 1 where that is above `threshold`.
  """

  k: int = 12
  memory: int = 2048
  threshold: float | None = None
  name: str = 'entropy'
  optimum: float | None = None
  sees: bool = True

  def init(self, features: jax.Array) -> Any:
    count = len(features)
    rows = max(self.memory // count, -(-(self.k + 1) // count)) * count
    return empty_memory(rows, features.shape[-1])

  def reward(
    self, told: Any, memory: Any, features: jax.Array, began: jax.Array
  ) -> tuple[Any, jax.Array]:
    del told
    rows = len(memory.features)
    after = remember(memory, features)
    distances = entropy_reward(
      features,
      after.features,
      self.k,
      self_index=memory.total % rows + jnp.arange(len(began)),
      valid=jnp.arange(rows) < after.total,
    )
    return after, _paid(jnp.where(after.total > self.k, distances, 0.0), self.threshold)


@dataclasses.dataclass(frozen=True)
class Classify(_WithoutMemory):
  """How surely a linear head sees a class: its probability. Sparse: 1 where it is above threshold.

  It is told {'kernel' (F, classes), 'bias' (classes,), 'target' ()}.
  """

  threshold: float | None = None
  name: str = 'class'
  optimum: float | None = 1.0
  sees: bool = True

  def reward(
    self, told: Any, memory: Any, features: jax.Array, began: jax.Array
  ) -> tuple[Any, jax.Array]:
    del began
    logits = jnp.matmul(features, told['kernel'], precision='highest') + told['bias']
    sure = jnp.take(jax.nn.softmax(logits), told['target'], axis=-1)
    return memory, _paid(sure, self.threshold)


@dataclasses.dataclass(frozen=True)
class Goal(_WithoutMemory):
  """Cosine to the features of a goal picture, less `center`. Sparse: 1 where it is above threshold.

  It is told {'features' (F,), 'center' (F,)}: features of any two pictures lie close together, so
  their mean is taken away before directions are compared.
  """

  threshold: float | None = None
  name: str = 'goal'
  optimum: float | None = 1.0
  sees: bool = True

  def reward(
    self, told: Any, memory: Any, features: jax.Array, began: jax.Array
  ) -> tuple[Any, jax.Array]:
    del began
    here, there = features - told['center'], told['features'] - told['center']
    lengths = jnp.linalg.norm(here, axis=-1) * jnp.linalg.norm(there)
    cosine = (here * there).sum(-1) / jnp.maximum(lengths, 1e-8)
    return memory, _paid(cosine, self.threshold)


def make_task(name: str | Task, threshold: float | None = None, **settings: Any) -> Task:
  """The task of a name, dense, or sparse with a threshold; a Task of someone's own as it is.

  Raises:
    UserError: an unknown name, or a setting that the task does not have.
  """
  if not isinstance(name, str):
    missing = [part for part in PARTS if not hasattr(name, part)]
    if missing or settings or threshold is not None:
      raise UserError(
        f'task is a {type(name).__name__}: expected one of {", ".join(TASKS)}, or an object with '
        f'{", ".join(PARTS)} (tasks.Task) and no other settings'
      )
    return name
  checks.choice('task', name, TASKS)
  kinds = {'none': Nothing, 'entropy': Entropy, 'class': Classify, 'goal': Goal}
  if threshold is not None:
    settings['threshold'] = threshold
  known = {field.name for field in dataclasses.fields(kinds[name])} - {'name', 'optimum', 'sees'}
  for setting in settings:
    if setting not in known:
      raise UserError(
        f'task {name!r} has no {setting}: it has {", ".join(sorted(known)) or "no settings"}'
      )
  for setting, value in settings.items():
    if setting in RANGES:
      settings[setting] = checks.whole(f'task {name!r}: {setting}', value, RANGES[setting])
    elif not isinstance(value, numbers.Real) and value is not None:
      raise UserError(f'task {name!r}: {setting}={value!r}: expected a number')
  return kinds[name](**settings)


def check_head(kernel: np.ndarray, bias: np.ndarray, target: int, size: int) -> None:
  """Raises UserError where a head of the task 'class' does not fit features of a size."""
  if np.ndim(kernel) != 2 or np.shape(kernel)[0] != size or np.shape(bias) != np.shape(kernel)[1:]:
    raise UserError(
      f'a head of shape {np.shape(kernel)} with a bias of {np.shape(bias)}: expected ({size}, '
      'classes) and (classes,)'
    )
  if not 0 <= target < np.shape(kernel)[1]:
    raise UserError(f'target={target}: expected 0 to {np.shape(kernel)[1] - 1}')


def oracle_action(z_goal: jax.Array) -> jax.Array:
  """What an agent does that knows the goal's latent: (..., z_dim) in [-1, 1].

  Pictures depend on a latent's direction alone, and the latent follows the mean of the actions. So
  it acts in that direction, as far as actions go.
  """
  return z_goal / jnp.abs(z_goal).max(-1, keepdims=True)
