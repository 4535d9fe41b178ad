"""Batch normalisation (Ioffe and Szegedy, arXiv 1502.03167) that is fast on CPU.

Numbers and names are those of flax.linen.BatchNorm.
"""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import canonicalize_dtype
from jax import lax

from palm_jax.base.devices import platform, vary_alike

MOMENTUM = 0.9  # what a step keeps of the running statistics; torch calls the rest so
EPSILON = 1e-5  # torch
CHUNK = 2**19  # numbers of an array: with what is made of them they stay in the cache
FOLD = 8  # pictures: XLA:CPU is fast at sums over few leading entries only


class BatchNorm(nn.Module):
  """As flax.linen.BatchNorm over all axes but the last; parameters and statistics fit both.

  Attributes:
    use_running_average: normalise by the running statistics, and leave them as they are.
    momentum: what a step keeps of the running statistics.
    axis_name: mesh axis over which batch statistics are averaged; None keeps them local.
    dtype: compute type; None follows parameters and input. Statistics are at least float32.
    relu: whether a ReLU follows; its gradient is cheaper as one with that of the normalisation.
  """

  use_running_average: bool
  momentum: float = MOMENTUM
  epsilon: float = EPSILON
  axis_name: str | None = None
  dtype: Any = None
  scale_init: Any = nn.initializers.ones
  relu: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """x (N, ..., C) -> (N, ..., C)."""
    shape = x.shape[-1:]
    scale = self.param('scale', self.scale_init, shape, jnp.float32)
    bias = self.param('bias', nn.initializers.zeros, shape, jnp.float32)
    running_mean, running_var = (
      self.variable('batch_stats', name, draw, shape, jnp.float32)
      for name, draw in (('mean', jnp.zeros), ('var', jnp.ones))
    )
    mean, var = running_mean.value, running_var.value
    if not self.use_running_average:
      wide = jnp.promote_types(self.dtype or x.dtype, jnp.float32)
      sums: Any = _sums_of_powers(x, wide)
      moments = sums / (x.size // x.shape[-1])
      if self.axis_name is not None and not self.is_initializing():
        moments = lax.pmean(moments, self.axis_name)
      mean, var = moments[0], jnp.maximum(moments[1] - moments[0] ** 2, 0)
      if not self.is_initializing():
        running_mean.value += (1 - self.momentum) * (mean - running_mean.value)
        running_var.value += (1 - self.momentum) * (var - running_var.value)
    # Promoted out here, where the gradients are converted back.
    dtype = jnp.result_type(x, mean, scale, bias)
    scaling = lax.rsqrt(var + self.epsilon) * scale
    mean, scaling, offset = (a.astype(dtype) for a in (mean, scaling, bias))
    normalize: Any = _normalize if platform() == 'tpu' else _normalize_by_hand
    out = canonicalize_dtype(x, scale, bias, dtype=self.dtype)
    return normalize(*vary_alike(x, mean, scaling, offset), self.relu, out)


def channel_sums(terms: Callable[..., Iterable[jax.Array]], *arrays: jax.Array) -> jax.Array:
  """Sums over all axes but the last of the terms that are made of arrays (N, ..., C).

  On CPU this takes a few pictures at a time where N is a multiple of 8. So no term is ever whole in
  memory, and what the arrays are made of is computed once, not for each term (0.85 of the time of
  SimSiam's update, configs/benchmark.py:small, two cores). What is left then is a product with
  ones, as XLA's own sums over leading axes are slow.

  Args:
    terms: arrays -> as many terms (N, ..., C) as it likes, computed element by element.
    *arrays: any number.

  Returns:
    (number of terms, C), at least float32.
  """
  wide = lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32))
  if platform() != 'cpu':
    return jnp.stack([wide(x).sum(range(x.ndim - 1)) for x in terms(*arrays)])
  n, size = len(arrays[0]), arrays[0].size
  # Never all of them: XLA would remove a loop of one step, and with it the border to what the
  # arrays are made of.
  divisors = (d for d in range(FOLD, n, FOLD) if n % d == 0)
  chunk = max((d for d in divisors if d == FOLD or d * size <= CHUNK * n), default=n)

  def fold(x):
    return wide(x).reshape(FOLD, -1, *x.shape[1:]).sum(0) if len(x) % FOLD == 0 else wide(x)

  def step(totals, start):
    chunks = (lax.dynamic_slice_in_dim(x, start, chunk) for x in arrays)
    return [total + fold(x) for total, x in zip(totals, terms(*chunks), strict=True)], None

  if chunk == n:
    totals = map(fold, terms(*arrays))
  else:
    first = jax.eval_shape(lambda *arrays: [fold(x[:chunk]) for x in terms(*arrays)], *arrays)
    zeros = [vary_alike(jnp.zeros(x.shape, x.dtype), *arrays)[0] for x in first]
    totals, _ = lax.scan(step, zeros, jnp.arange(0, n, chunk))
  return jnp.stack([_sum(x) for x in totals])


def _sum(x):
  # Rows of all columns: fewer terms, smaller error.
  rows = x.reshape(-1, math.prod(x.shape[-2:]) if x.ndim > 2 else x.shape[-1])
  sums = jnp.matmul(jnp.ones((1, len(rows)), x.dtype), rows, precision=lax.Precision.HIGHEST)
  return sums.reshape(-1, x.shape[-1]).sum(0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _sums_of_powers(x, dtype):
  """(N, ..., C) -> (2, C) in `dtype`: of x and of its square.

  The gradient keeps x alone, and none of the loop's steps.
  """
  return channel_sums(lambda x: (x.astype(dtype), x.astype(dtype) ** 2), x)


_sums_of_powers.defvjp(
  lambda x, dtype: (_sums_of_powers(x, dtype), x),
  lambda dtype, x, g: ((g[0] + 2 * g[1] * x).astype(x.dtype),),
)


def _normalize(x, mean, scale, bias, relu, dtype):
  y = (x - mean) * scale + bias
  return (nn.relu(y) if relu else y).astype(dtype)


# Its gradient has two sums over x where the chain rule has three, and where a ReLU follows no
# masked gradient in memory: SimSiam's backward pass reads and writes 2.9 GB less of 16 on a GPU
# (configs/cifar.py, compiled for an H200). libtpu counts 8% more traffic with it (v5e:2x4).
_normalize_by_hand = jax.custom_vjp(_normalize, nondiff_argnums=(4, 5))


def _forward(x, mean, scale, bias, relu, dtype):
  return _normalize_by_hand(x, mean, scale, bias, relu, dtype), (x, mean, scale, bias)


def _backward(relu, dtype, residuals, g):
  del dtype
  x, mean, scale, bias = residuals
  # Where the ReLU lets pass, in three ways that are equal: a mask that is needed twice would be
  # written to memory, and read there.
  masks = (
    lambda x: (x - mean) * scale + bias > 0,
    lambda x: (x - mean) * scale > -bias,
    lambda x: (mean - x) * scale < bias,
  )
  wide = lambda g: g.astype(mean.dtype)
  passed = [lambda x, g, m=m: jnp.where(m(x), wide(g), 0) if relu else wide(g) for m in masks]

  def terms(x, g):
    return passed[0](x, g), passed[1](x, g) * (x - mean)

  # Held together: a sum over several views of a sum would become a sum over x of its own.
  to_bias, to_scale = lax.optimization_barrier(channel_sums(terms, x, g)).astype(mean.dtype)
  return (passed[2](x, g) * scale).astype(x.dtype), -scale * to_bias, to_scale, to_bias


_normalize_by_hand.defvjp(_forward, _backward)
