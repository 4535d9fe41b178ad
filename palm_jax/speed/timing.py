"""Wall-clock measures of compiled functions."""

import statistics
import time

import jax
import jax.numpy as jnp

REPEATS = 5


def seconds(call):
  """Of one call of a function without arguments, until its result is there -> (seconds, result)."""
  began = time.monotonic()
  result = jax.block_until_ready(call())
  return time.monotonic() - began, result


def median_seconds(call, state, *arguments):
  """Median time of REPEATS calls that hand on a donated state, after one that is not counted."""
  times = []
  for _ in range(REPEATS + 1):
    took, (state, _) = seconds(lambda state=state: call(state, *arguments))
    times.append(took)
  return statistics.median(times[1:])


def matmul_flops(dtype):
  """FLOP/s of one device in the product of two large square matrices: what its arithmetic can reach
  in practice."""
  size = 1024 if jax.default_backend() == 'cpu' else 8192
  x = jax.random.normal(jax.random.key(0), (size, size)).astype(dtype)
  product = jax.jit(jnp.matmul).lower(x, x).compile()
  jax.block_until_ready(product(x, x))
  return 2 * size**3 / min(seconds(lambda: product(x, x))[0] for _ in range(2 * REPEATS))
