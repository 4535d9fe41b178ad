"""StyleGAN3's generator (arXiv 2106.12423), configurations T and R, for drawing.

The numbers agree with NVlabs/stylegan3 (training/networks_stylegan3.py), whose snapshots
`official3.stylegan3_from_official` takes; training it is not provided for. Images are NHWC,
nominally in [-1, 1]; kernels are HWIO and (in, out). `dtype` is the compute type of the
convolutions and of the pictures between them; mapping, styles, demodulation, Fourier features,
sums of filters and the image are at least float32.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype

from palm_jax.generator import ops
from palm_jax.generator.layers3 import Layer, misfit
from palm_jax.generator.ops3 import filtered_leaky_relu
from palm_jax.generator.stylegan2 import LatentNetwork, MappingNetwork, check_noise
from palm_jax.layers.convolution import conv


class StyleGAN3(LatentNetwork):
  """z, labels -> images.

  Collections: 'params', and 'buffers' with w_avg, the filters, the Fourier features and the layers'
  input magnitudes. A new network's filters are boxes: those of a trained one come from its file.

  Attributes:
    num_classes: 0 means unconditional; labels are then ignored and may be None. Otherwise labels
      are (N,) integers or (N, num_classes) vectors.
    layers: of the synthesis, from the Fourier features, (in_size, in_size, in_channels) of the
      first, to the image.
    sampling_rate: of the Fourier features, in samples per unit.
    bandwidth: frequency up to which the features have full amplitude, which falls to 0 at
      sampling_rate / 2.
    output_scale: of the image.
    mapping_layers: 2 in the original's defaults.
    dtype: of the convolutions; None is that of the parameters.
  """

  z_dim: int
  w_dim: int
  num_classes: int
  layers: tuple[Layer, ...]
  sampling_rate: float
  bandwidth: float
  output_scale: float = 0.25
  mapping_layers: int = 2
  dtype: Any = None

  @classmethod
  def from_fields(cls, fields: dict[str, Any]) -> 'StyleGAN3':
    """The network of its fields as JSON gives them back, with lists for tuples.

    Raises:
      KeyError, TypeError, ValueError: fields that no network has, before they cost anything.
    """
    layers = tuple(Layer(*layer) for layer in fields['layers'])
    layers = tuple(layer._replace(padding=tuple(layer.padding)) for layer in layers)
    network = cls(**{**fields, 'layers': layers})
    wrong = misfit(network)
    if wrong:
      raise ValueError(wrong)
    return network

  @property
  def channels(self) -> tuple[int, ...]:
    """Widths of the layers' results."""
    return tuple(layer.out_channels for layer in self.layers)

  @property
  def layer_names(self) -> tuple[str, ...]:
    """The original's names of the layers, such as L0_36_512."""
    return tuple(f'L{i}_{x.out_size}_{x.out_channels}' for i, x in enumerate(self.layers))

  @property
  def image_channels(self) -> int:
    return self.layers[-1].out_channels

  @property
  def resolution(self) -> int:
    return self.layers[-1].out_size

  @property
  def image_shape(self) -> tuple[int, int, int]:
    return self.resolution, self.resolution, self.image_channels

  @property
  def num_ws(self) -> int:
    return len(self.layers) + 1

  def setup(self) -> None:
    self.mapping_network = MappingNetwork(
      self.w_dim, self.mapping_layers, self.num_classes, embed_features=None, layer_features=None
    )
    self.synthesis_network = SynthesisNetwork(
      self.layers, self.layer_names, self.sampling_rate, self.bandwidth, self.dtype
    )
    self.w_avg = self.variable('buffers', 'w_avg', jnp.zeros, (self.w_dim,))

  def synthesis(
    self, ws: jax.Array, noise: str = 'const', noise_keys: jax.Array | None = None
  ) -> jax.Array:
    """ws (N, num_ws, w_dim) -> (N, H, W, C) images in at least float32.

    There is no noise: `noise` and `noise_keys` are StyleGAN2's and have no effect.

    Raises:
      UserError: an unknown noise mode.
    """
    del noise_keys
    check_noise(noise)
    return self.synthesis_network(ws) * self.output_scale


class SynthesisNetwork(nn.Module):
  """ws (N, num_ws, w_dim) -> image (N, H, W, C)."""

  layers: tuple[Layer, ...]
  names: tuple[str, ...]
  sampling_rate: float
  bandwidth: float
  dtype: Any

  @nn.compact
  def __call__(self, ws: jax.Array) -> jax.Array:
    first = self.layers[0]
    features = FourierFeatures(
      first.in_size, first.in_channels, self.sampling_rate, self.bandwidth, self.dtype, name='input'
    )
    x = features(ws[:, 0])
    for i, (layer, name) in enumerate(zip(self.layers, self.names, strict=True)):
      x = SynthesisLayer(layer, self.dtype, name=name)(x, ws[:, i + 1])
    return x


class FourierFeatures(nn.Module):
  """w (N, w_dim) -> (N, size, size, features): waves that w moves and turns, then mixed."""

  size: int
  features: int
  sampling_rate: float
  bandwidth: float
  dtype: Any

  @nn.compact
  def __call__(self, w):
    freqs = self.variable('buffers', 'freqs', jnp.zeros, (self.features, 2)).value
    phases = self.variable('buffers', 'phases', jnp.zeros, (self.features,)).value
    transform = self.variable('buffers', 'transform', jnp.eye, 3).value
    kernel = self.param('kernel', nn.initializers.normal(1.0), (self.features, self.features))

    moved = _rigid(ops.Dense(4, bias_init=1.0, name='affine')(w), transform)
    # Phases show each lost bit: nothing here is left to the rounding of a matrix unit.
    phases += jnp.matmul(moved[:, :, 2], freqs.T, precision='highest')
    freqs = jnp.matmul(freqs, moved[:, :, :2], precision='highest')  # (N, features, 2)
    frequency = jnp.sqrt((freqs**2).sum(-1))
    fall = (frequency - self.bandwidth) / (self.sampling_rate / 2 - self.bandwidth)
    amplitude = jnp.clip(1 - fall, 0, 1)

    centres = (2 * jnp.arange(self.size) + 1 - self.size) / (2 * self.sampling_rate)
    x, y = (centres[:, None] * freqs[:, None, :, axis] for axis in (0, 1))  # (N, size, features)
    turns = x[:, None] + (y + phases[:, None])[:, :, None]
    waves = amplitude[:, None, None] * jnp.sin(2 * math.pi * turns)
    waves, kernel = promote_dtype(waves, kernel / math.sqrt(self.features), dtype=self.dtype)
    return conv(waves, kernel[None, None])


def _rigid(parameters, transform):
  """(N, 4) of rotation and translation -> the rows for x and y (N, 2, 3) of R T transform."""
  cos, sin, *shift = jnp.moveaxis(
    parameters / jnp.linalg.norm(parameters[:, :2], axis=1, keepdims=True), 1, 0
  )
  rotation = jnp.stack([jnp.stack([cos, -sin], 1), jnp.stack([sin, cos], 1)], 1)
  shifted = transform[:2] - jnp.stack(shift, 1)[:, :, None] * transform[2]
  return jnp.matmul(rotation, shifted, precision='highest')


class SynthesisLayer(nn.Module):
  """Modulated convolution and filtered leaky ReLU: (x, w) -> x; of ToRGB at least float32.

  In the scaled form, as `ops.StyleLayer`. The original scales styles to unit mean square over the
  whole batch, which demodulation undoes but for its epsilon; here it is over one picture, so that
  none depends on others.
  """

  layer: Layer
  dtype: Any

  @nn.compact
  def __call__(self, x, w):
    layer = self.layer
    style = ops.Dense(layer.in_channels, bias_init=1.0, name='affine')(w)
    shape = layer.kernel, layer.kernel, layer.in_channels, layer.out_channels
    kernel = self.param('kernel', nn.initializers.normal(1.0), shape)
    bias = self.param('bias', nn.initializers.zeros, (layer.out_channels,))
    magnitude = self.variable('buffers', 'magnitude_ema', jnp.ones, ()).value  # mean square of x
    up_filter = self._filter('up_filter', layer.up_taps)
    down_filter = self._filter('down_filter', layer.down_taps, layer.down_radial)

    demodulation = None
    if layer.is_torgb:
      style /= math.sqrt(math.prod(shape[:3]))
    else:
      kernel *= jax.lax.rsqrt((kernel**2).mean((0, 1, 2)))
      style *= jax.lax.rsqrt((style**2).mean(-1, keepdims=True))
      demodulation = jax.lax.rsqrt(style**2 @ (kernel**2).sum((0, 1)) + 1e-8)
    style *= jax.lax.rsqrt(magnitude)

    dtype = None if layer.is_torgb else self.dtype
    x, kernel, style = promote_dtype(x, kernel, style, dtype=dtype)
    pad = layer.kernel - 1
    x = conv(x * style[:, None, None], kernel, ((pad, pad), (pad, pad)))
    if demodulation is not None:
      x *= demodulation[:, None, None].astype(x.dtype)
    slope, gain = (1.0, 1.0) if layer.is_torgb else (0.2, 2**0.5)
    return filtered_leaky_relu(
      x,
      bias,
      up_filter,
      down_filter,
      up=layer.up,
      down=layer.down,
      padding=layer.padding,
      slope=slope,
      gain=gain,
      clamp=layer.conv_clamp,
    )

  def _filter(self, name, taps, radial=False):
    if taps == 1:
      return None
    shape = (taps, taps) if radial else (taps,)
    return self.variable('buffers', name, lambda: jnp.full(shape, 1 / math.prod(shape))).value
