"""2-D convolutions, NHWC and HWIO, whose gradients stay fast inside a compiled loop on CPU.

XLA:CPU brings convolutions into the layout of its fast kernel in the outermost computation only
(jaxlib 0.10.2). The gradients of a convolution inside lax.scan or lax.cond fall back to a naive
loop, 30 to 100 times slower. Here they are written in that layout to begin with. Everything can be
differentiated any number of times in reverse. Other platforms keep XLA's own gradients.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from palm_jax.base.devices import platform, vary_alike

CHUNK = 16  # pictures
Padding = str | Sequence[Sequence[int]]  # 'SAME', 'VALID', or ((top, bottom), (left, right))


def conv(x: jax.Array, kernel: jax.Array, padding: Padding = 'SAME') -> jax.Array:
  """Correlation with stride 1.

  Args:
    x: (N, H, W, I).
    kernel: (h, w, I, O).
    padding: 'SAME' for odd kernels only.

  Returns:
    (N, H', W', O).
  """
  height, width = kernel.shape[:2]
  if padding == 'SAME':
    padding = ((height // 2, height // 2), (width // 2, width // 2))
  elif padding == 'VALID':
    padding = ((0, 0), (0, 0))
  if height == width == 1 and padding == ((0, 0), (0, 0)):
    return _of_pixels(x, kernel)
  if platform() != 'cpu':
    return _plain(x, kernel, tuple(map(tuple, padding)))
  return _canonical(*vary_alike(x, kernel), tuple(map(tuple, padding)))


def strided_conv(x: jax.Array, kernel: jax.Array, stride: int, padding: Padding) -> jax.Array:
  """Correlation with the same stride on both axes: (N, H, W, I) -> (N, H', W', O).

  Padding is as in `conv`, without 'SAME'.
  """
  pads = ((0, 0), (0, 0)) if padding == 'VALID' else tuple(map(tuple, padding))
  if platform() != 'cpu':
    return _strided(x, kernel, pads, stride)
  if kernel.shape[:2] == (1, 1) and pads == ((0, 0), (0, 0)):
    return _of_pixels(x[:, ::stride, ::stride], kernel)
  return _strided_on_cpu(*vary_alike(x, kernel), pads, stride)


def _of_pixels(x, kernel):
  """A kernel of 1x1, on CPU as a product of two matrices.

  With more axes XLA would transpose x for the kernel's gradient.
  """
  if platform() != 'cpu':
    return x @ kernel[0, 0]
  y = x.reshape(-1, x.shape[-1]) @ kernel[0, 0]
  return y.reshape(*x.shape[:-1], kernel.shape[-1])


def _as_blocks(x, kernel, padding, stride):
  """(x, kernel) whose convolution of stride 1 without padding is the strided one.

  Stride by stride pixels become channels, and the kernel a smaller one, padded by zeros.
  """
  sizes = kernel.shape[:2]
  blocks = [-(-size // stride) for size in sizes]  # of the kernel
  lengths = [  # of the pixels that are seen
    ((n + sum(pad) - size) // stride + b) * stride
    for n, pad, size, b in zip(x.shape[1:3], padding, sizes, blocks, strict=True)
  ]
  x = jnp.pad(x, ((0, 0), *((before, stride + after) for before, after in padding), (0, 0)))
  x = x[:, : lengths[0], : lengths[1]]
  missing = [(0, b * stride - size) for b, size in zip(blocks, sizes, strict=True)]
  kernel = jnp.pad(kernel, (*missing, (0, 0), (0, 0)))
  kernel = _as_channels(kernel.transpose(3, 0, 1, 2), stride).transpose(1, 2, 3, 0)
  return _as_channels(x, stride), kernel


def _as_channels(x, size):
  """(N, H, W, C) -> (N, H/size, W/size, size * size * C)."""
  n, height, width, channels = x.shape
  x = x.reshape(n, height // size, size, width // size, size, channels).transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(n, height // size, width // size, -1)


def flax_conv(
  x: jax.Array,
  kernel: jax.Array,
  strides: Sequence[int],
  padding: Any,
  lhs_dilation: Sequence[int] = (1, 1),
  rhs_dilation: Sequence[int] = (1, 1),
  feature_group_count: int = 1,
  **how: Any,
) -> jax.Array:
  """For nn.Conv(conv_general_dilated=flax_conv).

  What the convolutions here do not do, such as groups, dilation, or two different strides, XLA's
  does.
  """
  rare = {*lhs_dilation, *rhs_dilation, feature_group_count} != {1} or len({*strides}) > 1
  even = not all(size % 2 for size in kernel.shape[:2])
  if rare or (padding == 'SAME' and (even or strides[0] > 1)):
    return lax.conv_general_dilated(
      x,
      kernel,
      strides,
      padding,
      lhs_dilation,
      rhs_dilation,
      feature_group_count=feature_group_count,
      **how,
    )
  if strides[0] == 1:
    return conv(x, kernel, padding)
  return strided_conv(x, kernel, strides[0], padding)


def _strided(x, kernel, padding, stride):
  return lax.conv_general_dilated(
    x, kernel, (stride, stride), padding, dimension_numbers=('NHWC', 'HWIO', 'NHWC')
  )


def _plain(x, kernel, padding):
  return _strided(x, kernel, padding, 1)


def _in_chunks(gradients, x, kernel, g):
  """gradients(x, kernel, g), a few pictures at a time so that all stays in the cache.

  They are that of x, or None, and that of the kernel. The kernel's alone is 1.2 to 2.7 times faster
  so (128 pictures of 8x8x128 to 32x32x32, one core), that of x is not.
  """
  chunk = math.gcd(len(x), CHUNK)
  if chunk < CHUNK // 2 or chunk == len(x) or (x.size + g.size) * chunk // len(x) < kernel.size:
    return gradients(x, kernel, g)

  def step(total, start):
    # Sliced here: of a reshaped x XLA would compute what x is the result of a second time.
    to_x, to_kernel = gradients(
      lax.dynamic_slice_in_dim(x, start, chunk), kernel, lax.dynamic_slice_in_dim(g, start, chunk)
    )
    return total + to_kernel, to_x

  total = jnp.zeros_like(kernel, jnp.promote_types(kernel.dtype, jnp.float32))
  total, to_x = lax.scan(step, total, jnp.arange(0, len(x), chunk))
  return None if to_x is None else to_x.reshape(x.shape), total.astype(kernel.dtype)


def _on_cpu(x, kernel, padding):
  """The convolution; for pictures smaller than the kernel it is one matrix product.

  XLA:CPU would take such a picture for the kernel, outside its fast layout.
  """
  size, sides = x.shape[1:3], kernel.shape[:2]
  within = all(0 <= p < k for k, pad in zip(sides, padding, strict=True) for p in pad)
  if math.prod(size) >= math.prod(sides) or not within:
    return _plain(x, kernel, padding)
  # Of the result.
  reach = [n + sum(pad) - k + 1 for n, pad, k in zip(size, padding, sides, strict=True)]
  taps = jnp.pad(kernel, (*((r, n) for r, n in zip(reach, size, strict=True)), (0, 0), (0, 0)))
  starts = [
    [r + before - i for i in range(r)] for r, (before, _) in zip(reach, padding, strict=True)
  ]
  shifted = [taps[i : i + size[0], j : j + size[1]] for i in starts[0] for j in starts[1]]
  matrix = jnp.stack(shifted, -2)  # (H, W, I, H'W', O)
  y = x.reshape(len(x), -1) @ matrix.reshape(x[0].size, -1)
  return y.reshape(-1, *reach, kernel.shape[-1])


_canonical = jax.custom_vjp(_on_cpu, nondiff_argnums=(2,))


def _forward(x, kernel, padding):
  return _canonical(x, kernel, padding), (x, kernel)


def _backward(padding, residuals, g):
  def to_kernel(x, _, g):
    # Channels take the place of the batch and the batch that of the channels.
    found = _canonical(x.transpose(3, 1, 2, 0), g.transpose(1, 2, 0, 3), padding)  # (I, h, w, O)
    return None, found.transpose(1, 2, 0, 3)

  x, kernel = residuals
  rest = tuple(
    (k - 1 - before, k - 1 - after)
    for k, (before, after) in zip(kernel.shape[:2], padding, strict=True)
  )
  to_x = _canonical(g, kernel[::-1, ::-1].swapaxes(2, 3), rest)
  return to_x, _in_chunks(to_kernel, x, kernel, g)[1]


_canonical.defvjp(_forward, _backward)

_strided_on_cpu = jax.custom_vjp(_strided, nondiff_argnums=(2, 3))


def _strided_forward(x, kernel, padding, stride):
  return _strided_on_cpu(x, kernel, padding, stride), (x, kernel)


def _strided_backward(padding, stride, residuals, g):
  def gradients(x, kernel, g):
    blocks, back = jax.vjp(lambda x, kernel: _as_blocks(x, kernel, padding, stride), x, kernel)
    return back(_backward(((0, 0), (0, 0)), blocks, g))

  x, kernel = residuals
  return _in_chunks(gradients, x, kernel, g)


_strided_on_cpu.defvjp(_strided_forward, _strided_backward)
