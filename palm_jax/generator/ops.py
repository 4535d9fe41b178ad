"""Resampling, convolutions and layers of StyleGAN2, on NHWC images and HWIO kernels.

The filter is always the separable [1, 3, 3, 1] of StyleGAN2 (arXiv 1912.04958). It is written as
shifted sums, and resampled convolutions as dense products without inserted zeros: XLA on CPU runs
depthwise and dilated convolutions, and above all their gradients, many times slower. Everything
here can be differentiated any number of times.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from jax import lax

from palm_jax.base.devices import platform
from palm_jax.layers.convolution import conv

TAPS = (1 / 8, 3 / 8, 3 / 8, 1 / 8)


def fir(x: jax.Array, pad: tuple[int, int], stride: int = 1, gain: float = 1.0) -> jax.Array:
  """Pads both image axes of x (N, H, W, C), filters, and keeps every stride-th sample.

  Args:
    x: the images.
    pad: zeros before and after.
    stride: on both axes.
    gain: per axis.
  """
  if platform() == 'gpu' and stride == 1:
    return _fir_at_once(x, pad, gain)
  for axis in (1, 2):
    x = _pad(x, axis, pad)
    last = x.shape[axis] - len(TAPS)
    shifted = [lax.slice_in_dim(x, k, k + last + 1, stride, axis) for k in range(len(TAPS))]
    terms = [tap * gain * y for tap, y in zip(TAPS, shifted, strict=True)]
    x = sum(terms)  # pyright: ignore[reportAssignmentType]  # 0 only without terms
  return x


def _fir_at_once(x, pad, gain):
  """Both axes in one expression, which XLA:GPU makes one kernel; its 16 reads meet in the cache."""
  height, width = (n + sum(pad) - len(TAPS) + 1 for n in x.shape[1:3])
  x = _pad(_pad(x, 1, pad), 2, pad)
  terms = [
    a * b * gain**2 * x[:, i : i + height, j : j + width]
    for i, a in enumerate(TAPS)
    for j, b in enumerate(TAPS)
  ]
  return sum(terms[1:], terms[0])


def upsample(x: jax.Array) -> jax.Array:
  """(N, H, W, C) -> (N, 2H, 2W, C): zero insertion and the filter, by its two phases."""
  for axis in (1, 2):
    size = x.shape[axis]
    padded = _pad(x, axis, (1, 1))
    before, here, after = (lax.slice_in_dim(padded, k, k + size, axis=axis) for k in range(3))
    x = _interleave(0.25 * before + 0.75 * here, 0.75 * here + 0.25 * after, axis)
  return x


def downsample(x: jax.Array) -> jax.Array:
  """(N, H, W, C) -> (N, H/2, W/2, C)."""
  return fir(x, (1, 1), stride=2)


def up_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Transposed 3x3 convolution of stride 2, then the filter: (N, H, W, I) -> (N, 2H, 2W, O).

  Transposing makes the kernel a true convolution, hence the flip; without it images are wrong but
  still plausible. Even output rows see two taps of the kernel and odd ones one, so four small
  convolutions do the work of nine taps.
  """
  kernel = kernel[::-1, ::-1]
  if platform() == 'gpu':  # cuDNN has a kernel for it, and one of its result is read, not four
    y = lax.conv_general_dilated(
      x,
      kernel,
      (1, 1),
      ((2, 2), (2, 2)),
      lhs_dilation=(2, 2),
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )
    return fir(y, (1, 1), gain=2.0)
  padded = _pad(_pad(x, 1, (1, 1)), 2, (1, 1))
  rows = []
  for i in (0, 1):
    even, odd = (conv(padded[:, i:, j:], kernel[i::2, j::2], 'VALID') for j in (0, 1))
    rows.append(_interleave(even, odd, 2))
  # (N, 2H + 2, 2W + 2, O), last row and column zero: they are the filter's padding.
  y = _interleave(*rows, axis=1)
  return fir(y, (1, 0), gain=2.0)


def down_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """The filter, then a 3x3 correlation of stride 2: (N, H, W, I) -> (N, H/2, W/2, O).

  On CPUs the correlation is one matrix product, whose patches are nine times the input.
  """
  x = fir(x, (2, 2))
  if platform() != 'cpu':
    return jax.lax.conv_general_dilated(
      x, kernel, (2, 2), 'VALID', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )
  size = x.shape[1] - 2, x.shape[2] - 2
  patches = [x[:, i : i + size[0] : 2, j : j + size[1] : 2] for i in range(3) for j in range(3)]
  return jnp.concatenate(patches, -1) @ kernel.reshape(-1, kernel.shape[-1])


def energy(kernel: jax.Array) -> jax.Array:
  """Sum of squares over a kernel's taps: (h, w, I, O) -> (I, O)."""
  return (kernel**2).sum((0, 1))


class Dense(nn.Module):
  """Equalised fully connected layer: parameters are stored 1 / lr_mult larger than they act."""

  features: int
  lr_mult: float = 1.0
  activate: bool = False
  bias_init: float = 0.0

  @nn.compact
  def __call__(self, x):
    fan_in = x.shape[-1]
    kernel = self.param('kernel', nn.initializers.normal(1 / self.lr_mult), (fan_in, self.features))
    bias = self.param('bias', nn.initializers.constant(self.bias_init), (self.features,))
    x, kernel, bias = promote_dtype(x, kernel, bias)
    x = x @ (kernel * (self.lr_mult / np.sqrt(fan_in)).item()) + bias * self.lr_mult
    return _activate(x) if self.activate else x


class StyleLayer(nn.Module):
  """Modulated 3x3 convolution, noise, activation.

  In the scaled form: scale inputs, one shared kernel, scale outputs. The grouped form, one kernel a
  sample, gives the same numbers and is slower (arXiv 1912.04958, section 2.2).
  """

  features: int
  up: bool
  conv_clamp: float | None
  dtype: Any

  @nn.compact
  def __call__(self, x, w, noise, noise_keys):
    style = Dense(x.shape[-1], bias_init=1.0, name='affine')(w)
    kernel = self.param('kernel', nn.initializers.normal(1.0), (3, 3, x.shape[-1], self.features))
    bias = self.param('bias', nn.initializers.zeros, (self.features,))
    strength = self.param('noise_strength', nn.initializers.zeros, ())
    size = tuple(n * (2 if self.up else 1) for n in x.shape[1:3])
    picture = self.variable(
      'buffers', 'noise_const', lambda: jax.random.normal(self.make_rng('params'), size)
    )
    if self.has_variable('prepared', 'kernel'):  # Generator.prepared
      kernel, weight = (self.get_variable('prepared', name) for name in ('kernel', 'energy'))
    else:
      weight = energy(kernel)
    demodulation = jax.lax.rsqrt(style**2 @ weight + 1e-8)

    x, kernel, style, demodulation, bias = promote_dtype(
      x, kernel, style, demodulation, bias, dtype=self.dtype
    )
    convolve = up_conv if self.up else conv
    x = convolve(x * style[:, None, None], kernel) * demodulation[:, None, None]
    if noise == 'const':
      x += (strength * picture.value)[..., None].astype(x.dtype)
    elif noise == 'random':
      draw = jax.vmap(lambda key: jax.random.normal(key, (*size, 1), strength.dtype))
      x += (strength * draw(noise_keys)).astype(x.dtype)
    return _clamp(_activate(x + bias), self.conv_clamp)


class ToRGB(nn.Module):
  """Modulated 1x1 convolution without demodulation; the result is at least float32."""

  features: int
  conv_clamp: float | None
  dtype: Any

  @nn.compact
  def __call__(self, x, w):
    style = Dense(x.shape[-1], bias_init=1.0, name='affine')(w) / np.sqrt(x.shape[-1]).item()
    kernel = self.param('kernel', nn.initializers.normal(1.0), (1, 1, x.shape[-1], self.features))
    bias = self.param('bias', nn.initializers.zeros, (self.features,))
    if platform() == 'gpu':
      # Few outputs: sums over channels, which XLA joins with what made x. For a product x would be
      # written to memory twice.
      wide = x.astype(at_least_float32(x))
      weights = style[:, :, None] * kernel[0, 0]  # (N, C, features)
      x = (wide[..., None] * weights[:, None, None]).sum(-2)
      return _clamp(x + bias, self.conv_clamp)
    x, kernel, style = promote_dtype(x, kernel, style, dtype=self.dtype)
    x = jnp.matmul(
      x * style[:, None, None], kernel[0, 0], preferred_element_type=at_least_float32(x)
    )
    return _clamp(x + bias, self.conv_clamp)


class ConvLayer(nn.Module):
  """Equalised convolution of D; `down` halves the resolution, `gain` scales result and clamp."""

  features: int
  size: int
  down: bool = False
  activate: bool = True
  use_bias: bool = True
  gain: float = 1.0
  conv_clamp: float | None = None
  dtype: Any = None

  @nn.compact
  def __call__(self, x):
    shape = self.size, self.size, x.shape[-1], self.features
    kernel = self.param('kernel', nn.initializers.normal(1.0), shape)
    bias = self.param('bias', nn.initializers.zeros, (self.features,)) if self.use_bias else None
    x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
    kernel *= 1 / np.sqrt(np.prod(shape[:3])).item()
    if self.down and self.size == 1:
      x = conv(downsample(x), kernel)
    else:
      x = (down_conv if self.down else conv)(x, kernel)
    if self.use_bias:
      x += bias
    if self.activate:
      x = _activate(x)
    limit = None if self.conv_clamp is None else self.conv_clamp * self.gain
    return _clamp(x * self.gain, limit)


def at_least_float32(x: jax.Array) -> jnp.dtype:
  """The type of x, or float32 where that is wider."""
  return jnp.promote_types(x.dtype, jnp.float32)


def _activate(x):
  return nn.leaky_relu(x, 0.2) * 2**0.5


def _clamp(x, limit):
  return x if limit is None else jnp.clip(x, -limit, limit)


def _pad(x, axis, pad):
  return jnp.pad(x, [pad if a == axis else (0, 0) for a in range(x.ndim)])


def _interleave(even, odd, axis):
  shape = list(even.shape)
  shape[axis] *= 2
  return jnp.stack([even, odd], axis + 1).reshape(shape)
