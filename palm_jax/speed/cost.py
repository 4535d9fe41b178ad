"""What a traced program costs, counted without compiling it."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr
from ml_collections import ConfigDict

from palm_jax import rollout, simsiam, worlds
from palm_jax.base.devices import nbytes
from palm_jax.encoder import make_encoder
from palm_jax.generator import PictureGenerator


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


def activation_bytes(
  config: ConfigDict, generator: PictureGenerator, ssl: dict[str, Any], num_devices: int
) -> int:
  """What SimSiam's forward pass over one device's batch keeps for its backward pass.

  That is the largest backward pass of all.
  """
  dtype = rollout.DTYPES[config.pretrain.dtype]
  encoder = make_encoder(config.encoder, None, dtype)
  modules = simsiam.make_modules(encoder, config.simsiam, None, dtype)
  count = config.pretrain.batch_size // num_devices
  frames = jax.ShapeDtypeStruct((count, *worlds.seen_shape(config, generator)), jnp.uint8)
  zeros = lambda tree: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)
  ids = jnp.zeros(count, jnp.int32)

  def loss(params, *views):
    return simsiam.forward(
      modules,
      params,
      zeros(ssl['batch_stats']),
      *views,
      target=zeros(ssl.get('target')),
      **simsiam.options(config.simsiam),
      labels=ids,
      related=ids if config.simsiam.mask_episode else None,
    )[0]

  return residual_bytes(loss, ssl['params'], frames, frames)


def compiled_bytes(compiled: Any) -> dict[str, int]:
  """Bytes of a compiled call on a device: together what it needs there, its code left out."""
  memory = compiled.memory_analysis()
  return dict(
    arguments=memory.argument_size_in_bytes,
    temporaries=memory.temp_size_in_bytes,
    results_beside_them=memory.output_size_in_bytes - memory.alias_size_in_bytes,
  )
