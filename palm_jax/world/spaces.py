"""Spaces with gymnax's names: gymnax's own where it is installed."""

import dataclasses
import functools
import importlib
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Box:
  """Arrays of a shape within bounds, with the attributes of gymnax.environments.spaces.Box."""

  low: Any
  high: Any
  shape: tuple[int, ...]
  dtype: Any = jnp.float32

  def sample(self, key: jax.Array) -> jax.Array:
    """Uniform within the bounds; standard normal where there are none."""
    if not (jnp.isfinite(self.low) and jnp.isfinite(self.high)):
      return jax.random.normal(key, self.shape, self.dtype)
    if jnp.issubdtype(self.dtype, jnp.integer):
      return jax.random.randint(key, self.shape, self.low, self.high + 1).astype(self.dtype)
    return jax.random.uniform(key, self.shape, self.dtype, self.low, self.high)

  def contains(self, x: jax.Array) -> jax.Array:
    """() bool."""
    return jnp.logical_and(jnp.all(x >= self.low), jnp.all(x <= self.high))


def box(low: Any, high: Any, shape: tuple[int, ...], dtype: Any) -> Any:
  """A box of gymnax's class, or `Box`."""
  return _box_class()(low=low, high=high, shape=shape, dtype=dtype)


@functools.cache
def _box_class():
  if importlib.util.find_spec('gymnax') is None:
    return Box
  return importlib.import_module('gymnax.environments.spaces').Box
