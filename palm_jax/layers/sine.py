"""A sine that XLA vectorises on CPU, where its own is 40 times slower (14 ns a number)."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from palm_jax.base.devices import platform

# Pi in three parts, of which products with integers below 1,024 are exact in float32.
PI = 201 / 64, 16234 / 2**24, math.pi - 201 / 64 - 16234 / 2**24
TAYLOR = [np.float32((-1) ** n / math.factorial(2 * n + 1)) for n in range(6)]


def sin(x: jax.Array) -> jax.Array:
  """Sine of radians, of any shape; on CPU in float32 within 2e-7 for |x| below 3,000.

  It can be differentiated any number of times.
  """
  return _sin(x) if platform() == 'cpu' and x.dtype == jnp.float32 else jnp.sin(x)


@jax.custom_jvp
def _sin(x):
  return _wave(x, 0.0)


@jax.custom_jvp
def _cos(x):
  return -_wave(x, 0.5)


@_sin.defjvp
def _(primals, tangents):
  return _sin(*primals), _cos(*primals) * tangents[0]


@_cos.defjvp
def _(primals, tangents):
  return _cos(*primals), -_sin(*primals) * tangents[0]


def _wave(x, shift):
  """sin(x - shift pi): the nearest of its zeros, and a Taylor series about it."""
  zero = jnp.round(x * np.float32(1 / math.pi) - np.float32(shift))
  for part in PI:
    x = x - (zero + np.float32(shift)) * np.float32(part)
  square, series = x * x, TAYLOR[-1]
  for coefficient in TAYLOR[-2::-1]:
    series = series * square + coefficient
  rises = 1 - 2 * (zero - 2 * jnp.floor(zero / 2))
  return rises * x * series
