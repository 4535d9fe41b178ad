"""Wall-clock measures of compiled functions."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.compilation_cache import compilation_cache

REPEATS = 5


def seconds(call: Callable[[], Any]) -> tuple[float, Any]:
  """Seconds that one call takes until its result is complete, and the result."""
  began = time.monotonic()
  result = jax.block_until_ready(call())
  return time.monotonic() - began, result


def compile_seconds(lowered: Any, options: Any = None) -> tuple[float, Any]:
  """Seconds that compiling takes, without the cache on disk, and what is compiled.

  Args:
    lowered: jax.stages.Lowered.
    options: {name: value} of XLA's, or None.
  """
  flag = 'jax_enable_compilation_cache'
  enabled = getattr(jax.config, flag)
  jax.config.update(flag, False)
  compilation_cache.reset_cache()  # or the flag is not read again
  try:
    return seconds(lambda: lowered.compile(compiler_options=options))
  finally:
    jax.config.update(flag, enabled)
    compilation_cache.reset_cache()


def median_seconds(call: Callable, state: Any, *arguments: Any) -> float:
  """Median time of REPEATS calls after one that is not counted.

  Args:
    call: (state, *arguments) -> (state, anything); the state may be donated.
    state: of the first call.
    *arguments: the same in all calls.
  """
  times = []
  for _ in range(REPEATS + 1):
    took, (state, _) = seconds(lambda state=state: call(state, *arguments))
    times.append(took)
  return statistics.median(times[1:])


def matmul_flops(dtype: Any) -> float:
  """FLOP/s of one device in the product of two large square matrices.

  That is what its arithmetic can reach in practice.
  """
  size = 1024 if jax.default_backend() == 'cpu' else 8192
  x = jax.random.normal(jax.random.key(0), (size, size)).astype(dtype)
  product = jax.jit(jnp.matmul).lower(x, x).compile()
  jax.block_until_ready(product(x, x))
  return 2 * size**3 / min(seconds(lambda: product(x, x))[0] for _ in range(2 * REPEATS))
