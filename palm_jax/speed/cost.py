"""What a traced program costs, counted without compiling it."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr
from ml_collections import ConfigDict

from palm_jax import pairs, rollout, simsiam, worlds
from palm_jax.base.devices import nbytes
from palm_jax.encoder import make_encoder
from palm_jax.generator import PictureGenerator

# What makes them take less.
LESS_LEARNING = 'lower pretrain.batch_size or encoder.width'
LESS_DRAWING = 'lower pretrain.num_envs (a larger pretrain.rollout_length makes up for it)'


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
  inner = list(map(_flops, _inner(equation)))
  if name == 'scan':
    return params['length'] * sum(inner)
  if name == 'cond':
    return max(inner, default=0)
  return sum(inner)


def _inner(equation):
  """The programs within an equation, such as a loop's body."""
  parts = jax.tree.leaves(list(equation.params.values()))
  return [getattr(x, 'jaxpr', x) for x in parts if isinstance(x, ClosedJaxpr | Jaxpr)]


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


def rendering_bytes(config: ConfigDict, generator: PictureGenerator, num_devices: int) -> int:
  """What a device holds while it draws the pictures of one step, or of a batch where nobody plays.

  Twice the largest array of the generator: one that is read and one that is written.
  """
  source = pairs.SOURCES[config.pairs.source]
  if source.needs == 'images':
    return 0
  p = config.pretrain
  count = (p.num_envs if source.plays else p.batch_size) // num_devices
  z = jax.ShapeDtypeStruct(
    (count, generator.z_dim), jnp.promote_types(rollout.DTYPES[p.dtype], jnp.float32)
  )
  labels = jax.ShapeDtypeStruct((count,), jnp.int32)
  draw = lambda variables, z, labels: generator.apply(variables, z, labels, truncation_psi=1.0)
  return 2 * _largest(jax.make_jaxpr(draw)(generator.variables, z, labels).jaxpr)


def _largest(jaxpr):
  """Bytes of the largest array that is computed."""
  found = [0]
  for equation in jaxpr.eqns:
    found += [nbytes(v.aval) for v in equation.outvars if hasattr(v.aval, 'dtype')]
    found += map(_largest, _inner(equation))
  return max(found)


def working_bytes(
  config: ConfigDict, generator: PictureGenerator, ssl: dict[str, Any], num_devices: int
) -> dict[str, int]:
  """{'activations' or 'rendering': bytes}: the larger one, as the two are not at one time."""
  takes = dict(
    activations=activation_bytes(config, generator, ssl, num_devices),
    rendering=rendering_bytes(config, generator, num_devices),
  )
  most = max(takes, key=takes.__getitem__)
  return {most: takes[most]}


def compiled_bytes(compiled: Any) -> dict[str, int]:
  """Bytes of a compiled call on a device: together what it needs there, its code left out."""
  memory = compiled.memory_analysis()
  return dict(
    arguments=memory.argument_size_in_bytes,
    temporaries=memory.temp_size_in_bytes,
    results_beside_them=memory.output_size_in_bytes - memory.alias_size_in_bytes,
  )
