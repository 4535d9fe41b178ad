"""StyleGAN2's discriminator (arXiv 1912.04958, 2006.06676), written in JAX.

As stylegan2.py: the numbers agree with NVlabs/stylegan2-ada-pytorch, whose weights
`official.discriminator_from_official` takes; images are NHWC; `dtype` is the compute type of the
convolutions, and logits are at least float32.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from palm_jax.base.errors import UserError
from palm_jax.generator import ops
from palm_jax.generator.stylegan2 import MappingNetwork, resolution_of


class Discriminator(nn.Module):
  """images (N, H, W, C) in [-1, 1], labels as in `Generator` -> logits (N,).

  Attributes:
    num_classes, channels, image_channels, conv_clamp, base_size, dtype: as in `Generator`.
    architecture: 'orig' or 'resnet'.
    mapping_layers: depth of the label's mapping, which is unused without classes.
    mbstd_group: the minibatch standard deviation sees groups of min(mbstd_group, N) samples of this
      call, N / group apart.
    mbstd_channels: how many statistics it appends.
    label_features: width of the label's mapping; None is channels[0].
    embed_features, layer_features: its inner widths; None is label_features.
  """

  num_classes: int
  channels: tuple[int, ...]
  image_channels: int = 3
  architecture: str = 'resnet'  # stylegan2-ada-pytorch; its cifar config has 'orig'
  mapping_layers: int = 8  # stylegan2-ada-pytorch
  mbstd_group: int = 4  # stylegan2-ada-pytorch; its cifar config has 32
  mbstd_channels: int = 1  # stylegan2-ada-pytorch
  conv_clamp: float | None = None
  base_size: int = 4
  label_features: int | None = None
  embed_features: int | None = None
  layer_features: int | None = None
  dtype: Any = None

  @property
  def resolution(self) -> int:
    return resolution_of(self.channels, self.base_size)

  @nn.compact
  def __call__(self, images: jax.Array, labels: jax.Array | None = None) -> jax.Array:
    """Raises UserError: an unknown architecture, images of another size, or an invalid N.

    The minibatch-std group must divide N.
    """
    if self.architecture not in ('orig', 'resnet'):
      raise UserError(f'architecture {self.architecture!r}: expected orig or resnet.')
    expected = self.resolution, self.resolution, self.image_channels
    if images.shape[1:] != expected:
      raise UserError(
        f'images of shape {images.shape[1:]}: the discriminator expects {expected}; resize the '
        'images.'
      )
    x = images
    for i in reversed(range(1, len(self.channels))):
      x = DiscriminatorBlock(
        self.channels[i - 1 : i + 1],
        self.architecture,
        i == len(self.channels) - 1,
        self.conv_clamp,
        self.dtype,
        name=f'b{self.base_size << i}',
      )(x)
    features = (self.label_features or self.channels[0]) if self.num_classes else 1
    x = DiscriminatorEpilogue(
      features, self.mbstd_group, self.mbstd_channels, self.conv_clamp, name=f'b{self.base_size}'
    )(x)
    if not self.num_classes:
      return x[:, 0]
    label_map = MappingNetwork(
      features,
      self.mapping_layers,
      self.num_classes,
      self.embed_features,
      self.layer_features,
      name='mapping',
    )(None, labels)
    return (x * label_map).sum(-1) / np.sqrt(features).item()


class DiscriminatorBlock(nn.Module):
  """(N, H, W, C) -> (N, H/2, W/2, channels[0]).

  Attributes:
    channels: widths at half and at full resolution.
    from_rgb: whether the input is the image.
  """

  channels: tuple[int, ...]
  architecture: str
  from_rgb: bool
  conv_clamp: float | None
  dtype: Any

  @nn.compact
  def __call__(self, x):
    layer = functools.partial(ops.ConvLayer, conv_clamp=self.conv_clamp, dtype=self.dtype)
    if self.from_rgb:
      x = layer(self.channels[1], 1, name='fromrgb')(x)
    resnet = self.architecture == 'resnet'
    gain = 0.5**0.5 if resnet else 1.0
    y = layer(self.channels[1], 3, name='conv0')(x)
    y = layer(self.channels[0], 3, down=True, gain=gain, name='conv1')(y)
    if resnet:
      y += ops.ConvLayer(
        self.channels[0],
        1,
        down=True,
        activate=False,
        use_bias=False,
        gain=gain,
        dtype=self.dtype,
        name='skip',
      )(x)
    return y


class DiscriminatorEpilogue(nn.Module):
  """(N, base_size, base_size, C) -> (N, outputs), in at least float32."""

  outputs: int
  mbstd_group: int
  mbstd_channels: int
  conv_clamp: float | None

  @nn.compact
  def __call__(self, x):
    width = x.shape[-1]
    x = minibatch_std(x.astype(ops.at_least_float32(x)), self.mbstd_group, self.mbstd_channels)
    x = ops.ConvLayer(width, 3, conv_clamp=self.conv_clamp, name='conv')(x)
    x = ops.Dense(width, activate=True, name='fc')(x.reshape(len(x), -1))
    return ops.Dense(self.outputs, name='out')(x)


def minibatch_std(x: jax.Array, group: int, num_channels: int = 1) -> jax.Array:
  """Appends to x (N, H, W, C) its group's mean standard deviations.

  There are num_channels of them, each over C / num_channels channels. Groups are strided: j,
  j + N/group, ...

  Raises:
    UserError: min(group, N) does not divide N, or N is 0.
  """
  if not len(x):
    raise UserError('batch of 0 images: expected at least one.')
  if not num_channels:
    return x
  group = min(group, len(x))
  if len(x) % group:
    raise UserError(
      f'batch of {len(x)} images: expected a multiple of the minibatch-std group {group}; change '
      'either.'
    )
  y = x.reshape(group, -1, *x.shape[1:])
  y = jnp.sqrt(y.var(0) + 1e-8).mean((1, 2)).reshape(y.shape[1], num_channels, -1).mean(-1)
  y = jnp.tile(y, (group, 1))[:, None, None]
  return jnp.concatenate([x, jnp.broadcast_to(y, (*x.shape[:3], num_channels))], -1)
