"""What a traced program costs, counted without compiling it."""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr

from palm_jax.base.devices import nbytes


def flops(traced: Any) -> int:
  """FLOPs of the matrix products and convolutions that one device runs, 2 a multiplication.

  Loops of known length count as often as they run, others once. Of branches the most expensive
  counts. Products with padding and everything elementwise are left out. On CPU batch norm's sums
  count as far as they are products with ones.

  Args:
    traced: of jax.jit(f).trace(...).
  """
  return _flops(traced.jaxpr.jaxpr)


def _flops(jaxpr):
  return sum(_equation_flops(equation) for equation in jaxpr.eqns)


def _equation_flops(equation):
  name, params = equation.primitive.name, equation.params
  if name == 'dot_general':
    (contracted, _), _ = params['dimension_numbers']
    shape = equation.invars[0].aval.shape
    return 2 * equation.outvars[0].aval.size * math.prod(shape[i] for i in contracted)
  if name == 'conv_general_dilated':
    shapes = (v.aval.shape for v in (*equation.invars, *equation.outvars))
    return _convolution_flops(*shapes, **params)
  inner = [
    _flops(getattr(x, 'jaxpr', x))
    for x in jax.tree.leaves(list(params.values()))
    if isinstance(x, ClosedJaxpr | Jaxpr)
  ]
  if name == 'scan':
    return params['length'] * sum(inner)
  if name == 'cond':
    return max(inner, default=0)
  return sum(inner)


def _convolution_flops(
  x,
  kernel,
  out,
  *,
  dimension_numbers,
  window_strides,
  padding,
  lhs_dilation,
  rhs_dilation,
  batch_group_count,
  **_,
):
  (batch, _, *x_space), (outputs, inputs, *kernel_space), (_, _, *out_space) = dimension_numbers
  total = 2 * x[batch] * kernel[outputs] * kernel[inputs] // batch_group_count
  axes = zip(window_strides, padding, lhs_dilation, rhs_dilation, strict=True)
  for i, (step, (before, _), hole, spread) in enumerate(axes):
    first = np.arange(out[out_space[i]])[:, None] * step - before
    at = first + np.arange(kernel[kernel_space[i]]) * spread
    total *= int(((at >= 0) & (at <= (x[x_space[i]] - 1) * hole) & (at % hole == 0)).sum())
  return total


def residual_bytes(f: Callable, *arguments: Any) -> int:
  """Bytes that reverse differentiation of f keeps between its two passes.

  The compiler may then fuse or recompute some of it.
  """
  return nbytes(jax.eval_shape(lambda *x: jax.vjp(f, *x)[1], *arguments))
