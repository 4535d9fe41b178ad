"""Networks of sines (SIREN, arXiv 2006.09661): of one picture, and of many.

Coordinates are (y, x) in [-1, 1], the picture's corners being (-1, -1) and (1, 1).
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from palm_jax.generator import ops
from palm_jax.generator.stylegan2 import Generator, LatentNetwork, MappingNetwork, check_noise
from palm_jax.layers.sine import sin

W0 = 30.0  # vsitzmann/siren, modules.py


def coordinates(height: int, width: int) -> np.ndarray:
  """Centres (y, x) of pixels: (height * width, 2) float32."""
  y, x = ((np.arange(n) * 2 + 1) / n - 1 for n in (height, width))
  return np.stack(np.meshgrid(y, x, indexing='ij'), -1).reshape(-1, 2).astype(np.float32)


def uniform(limit: float) -> Callable:
  """Initialiser of numbers within +- limit."""
  return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -limit, limit)


class Sine(nn.Module):
  """sin(w0 (x W + b)), with the initialisation that keeps its distribution from layer to layer.

  Weights are uniform within sqrt(6 / fan_in) / w0, those of the first layer within 1 / fan_in;
  biases within 1 / sqrt(fan_in) (arXiv 2006.09661, section 3.2; vsitzmann/siren, modules.py).
  """

  features: int
  first: bool = False
  w0: float = W0

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """(..., D) -> (..., features)."""
    fan_in = x.shape[-1]
    limit = 1 / fan_in if self.first else (6 / fan_in) ** 0.5 / self.w0
    x = nn.Dense(
      self.features, kernel_init=uniform(limit), bias_init=uniform(fan_in**-0.5), name='dense'
    )(x)
    return sin(self.w0 * x)


class Siren(nn.Module):
  """One picture: a first layer and `layers` more of sines, then a linear one.

  Attributes:
    channels: of the values.
    width: of each layer.
    layers: of sines after the first.
    w0: speed of the first.
  """

  channels: int
  width: int = 256
  layers: int = 3
  w0: float = W0

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """(N, 2) in [-1, 1] -> (N, channels)."""
    x = Sine(self.width, first=True, w0=self.w0, name='sine0')(x)
    for i in range(self.layers):
      x = Sine(self.width, name=f'sine{i + 1}')(x)
    limit = (6 / self.width) ** 0.5 / W0
    return nn.Dense(
      self.channels, kernel_init=uniform(limit), bias_init=uniform(self.width**-0.5), name='out'
    )(x)


class SirenGenerator(LatentNetwork):
  """Many pictures, each a function of its coordinates: z, labels -> images of any size.

  StyleGAN2's mapping gives each layer of sines its frequencies and phases (FiLM, as pi-GAN,
  arXiv 2012.00926): sin(w0 (1 + f / 2) (x W + b) + p), with f and p linear in w. Parameters are
  stored at unit scale, as StyleGAN2's, so that its trainer and rates fit.

  Attributes:
    num_classes: 0 means unconditional; labels are then ignored and may be None. Otherwise labels
      are (N,) integers or (N, num_classes) vectors.
    resolution: side of the pictures that it learns from, which it draws unless asked for others.
    width: of each layer.
    layers: of sines.
    samples: points a side of which a pixel is the mean at `resolution`, in proportion fewer in
      larger pictures: one drawn so many times larger and averaged down is the small one.
    dtype: of the products; None is that of the parameters.
  """

  z_dim: int
  w_dim: int
  num_classes: int
  resolution: int
  width: int = 64
  layers: int = 4
  samples: int = 2
  image_channels: int = 3
  mapping_layers: int = 2
  dtype: Any = None

  @property
  def image_shape(self) -> tuple[int, int, int]:
    return self.resolution, self.resolution, self.image_channels

  @property
  def channels(self) -> tuple[int, ...]:
    """Widths of the layers."""
    return (self.width,) * self.layers

  @property
  def num_ws(self) -> int:
    return self.layers

  def setup(self) -> None:
    self.mapping_network = MappingNetwork(
      self.w_dim, self.mapping_layers, self.num_classes, embed_features=None, layer_features=None
    )
    # The first layer turns a quarter as fast as pixels could follow: later ones add to that.
    fastest = [math.pi * self.resolution / 4] + [W0] * (self.layers - 1)
    self.sines = [ModulatedSine(self.width, i == 0, w0, self.dtype) for i, w0 in enumerate(fastest)]
    self.to_rgb = ops.Dense(self.image_channels)
    self.w_avg = self.variable('buffers', 'w_avg', jnp.zeros, (self.w_dim,))

  def synthesis(
    self,
    ws: jax.Array,
    noise: str = 'const',
    noise_keys: jax.Array | None = None,
    size: int | None = None,
  ) -> jax.Array:
    """ws (N, num_ws, w_dim) -> (N, size, size, C) images in at least float32.

    There is no noise: `noise` and `noise_keys` are StyleGAN2's and have no effect.

    Raises:
      UserError: an unknown noise mode.
    """
    del noise_keys
    check_noise(noise)
    side = size or self.resolution
    samples = max(1, round(self.samples * self.resolution / side))
    points = side * samples
    x = jnp.broadcast_to(coordinates(points, points), (len(ws), points**2, 2))
    for i, sine in enumerate(self.sines):
      x = sine(x, ws[:, i])
    values = self.to_rgb(x.astype(ops.at_least_float32(x)))
    cells = len(ws), side, samples, side, samples, self.image_channels
    return values.reshape(cells).mean((2, 4))


class ModulatedSine(nn.Module):
  """x (N, P, D), w (N, w_dim) -> (N, P, features)."""

  features: int
  first: bool
  w0: float
  dtype: Any

  @nn.compact
  def __call__(self, x, w):
    fan_in = x.shape[-1]
    limit = 1 / fan_in if self.first else (6 / fan_in) ** 0.5 / self.w0
    kernel = self.param('kernel', uniform(1.0), (fan_in, self.features)) * limit
    bias = self.param('bias', uniform(1.0), (self.features,)) * fan_in**-0.5
    film = ops.Dense(2 * self.features, name='affine')(w)
    frequency, phase = jnp.split(film[:, None], 2, -1)
    speed = self.w0 * (1 + frequency / 2)
    # A sine shows each lost bit of its argument: that is at least float32, and so are coordinates.
    if self.dtype is not None and not self.first:
      x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
    exact = 'highest' if self.first else None
    y = jnp.matmul(x, kernel, precision=exact, preferred_element_type=ops.at_least_float32(x))
    y = sin(speed * (y + bias) + phase)
    return y if self.dtype is None else y.astype(self.dtype)


TrainedNetwork = Generator | SirenGenerator  # by the job
