"""StyleGAN2 networks: Karras et al. 2020a (arXiv 1912.04958) and 2020b (arXiv 2006.06676), written
in JAX.

The numbers agree with NVlabs/stylegan2-ada-pytorch (training/networks.py), whose weights
`generator_from_official` and `discriminator_from_official` take. Images are NHWC, nominally in [-1,
1]; kernels are HWIO and (in, out). `dtype` is the compute type of the convolutions; mapping,
styles, demodulation, image sums and logits are at least float32.
"""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from palm_jax.base.errors import UserError
from palm_jax.generator import ops

W_AVG_MOMENTUM = 0.995  # stylegan2-ada-pytorch, MappingNetwork w_avg_beta
NOISE_MODES = 'const', 'random', 'none'


def channels_for(resolution, channel_base=32768, channel_max=512, base_size=4):
  """Widths at base_size, twice that, ..., resolution: min(channel_base // r, channel_max).

  UserError unless resolution is base_size doubled once or more.
  """
  doublings = (max(resolution, 1) // base_size).bit_length() - 1
  if doublings < 1 or resolution != base_size << doublings:
    sizes = ', '.join(str(base_size << i) for i in range(1, 5))
    raise UserError(
      f'resolution {resolution}: expected one of {sizes}, ...; resize or pad the images.'
    )
  return tuple(min(channel_base // (base_size << i), channel_max) for i in range(doublings + 1))


class Generator(nn.Module):
  """z, labels -> images. Collections: 'params', and 'buffers' with w_avg and the constant noise
  pictures.

  channels: widths at base_size, twice that, ..., resolution (see `channels_for`). num_classes 0
  means unconditional; labels are then ignored and may be None. Otherwise labels are (N,) integers
  or (N, num_classes) vectors. embed_features and layer_features: widths of the label's embedding
  and of the mapping's hidden layers; None is w_dim. noise: 'const' (the stored pictures), 'none',
  or 'random', drawn from noise_keys, (N,) typed keys, one a sample, so that a sample does not
  depend on how the batch lies on the devices.
  """

  z_dim: int
  w_dim: int
  num_classes: int
  channels: tuple[int, ...]
  image_channels: int = 3
  mapping_layers: int = 8  # stylegan2-ada-pytorch; its cifar config has 2
  conv_clamp: float | None = None
  base_size: int = 4
  embed_features: int | None = None
  layer_features: int | None = None
  dtype: Any = None

  @property
  def resolution(self):
    return _resolution(self.channels, self.base_size)

  @property
  def image_shape(self):
    return self.resolution, self.resolution, self.image_channels

  @property
  def num_ws(self):
    return 2 * len(self.channels)

  def setup(self):
    self.mapping_network = MappingNetwork(
      self.w_dim, self.mapping_layers, self.num_classes, self.embed_features, self.layer_features
    )
    self.synthesis_network = SynthesisNetwork(
      self.base_size, self.channels, self.image_channels, self.conv_clamp, self.dtype
    )
    self.w_avg = self.variable('buffers', 'w_avg', jnp.zeros, (self.w_dim,))

  def __call__(
    self, z, labels=None, truncation_psi=1.0, truncation_cutoff=None, noise='const', noise_keys=None
  ):
    """z (N, z_dim), labels -> (N, H, W, C) images in at least float32, not clipped."""
    ws = self.mapping(z, labels, truncation_psi=truncation_psi, truncation_cutoff=truncation_cutoff)
    return self.synthesis(ws, noise, noise_keys)

  def mapping(
    self,
    z,
    labels=None,
    *,
    truncation_psi=1.0,
    truncation_cutoff=None,
    update_w_avg=False,
    axis_name=None,
  ):
    """z (N, z_dim), labels -> ws (N, num_ws, w_dim).

    truncation_psi pulls the first truncation_cutoff (default: all) of the num_ws towards w_avg;
    both may be traced. update_w_avg moves w_avg, one for all classes, to the batch mean taken over
    axis_name; make 'buffers' mutable.
    """
    w = self.mapping_network(z, labels)
    w_avg = self.w_avg.value
    if update_w_avg and not self.is_initializing():
      mean = jax.lax.stop_gradient(w).mean(0)
      if axis_name is not None:
        mean = jax.lax.pmean(mean, axis_name)
      self.w_avg.value = mean + W_AVG_MOMENTUM * (w_avg - mean)
      w_avg = self.w_avg.value
    ws = jnp.repeat(w[:, None], self.num_ws, 1)
    cutoff = self.num_ws if truncation_cutoff is None else truncation_cutoff
    pull = jnp.where(jnp.arange(self.num_ws) < cutoff, 1 - truncation_psi, 0).astype(ws.dtype)
    return ws + pull[:, None] * (w_avg - ws)

  def synthesis(self, ws, noise='const', noise_keys=None):
    """ws (N, num_ws, w_dim) -> (N, H, W, C) images in at least float32.

    UserError for an unknown noise mode and for random noise without keys.
    """
    if noise not in NOISE_MODES:
      raise UserError(f'noise {noise!r}: expected one of {", ".join(NOISE_MODES)}.')
    if noise == 'random' and noise_keys is None:
      raise UserError(
        "noise 'random': expected noise_keys, one key a sample, such as jax.random.split(key, N)."
      )
    return self.synthesis_network(ws, noise, noise_keys)


class Discriminator(nn.Module):
  """images (N, H, W, C) in [-1, 1], labels as in `Generator` -> logits (N,) in at least float32.

  The minibatch standard deviation sees groups of min(mbstd_group, N) samples of this call, N /
  group apart. mapping_layers is the depth of the label's mapping, unused without classes;
  label_features is its output, embed_features and layer_features its inner widths. None:
  channels[0], and label_features for the last two. UserError for images of another size, an unknown
  architecture and an N that the group does not divide.
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
  def resolution(self):
    return _resolution(self.channels, self.base_size)

  @nn.compact
  def __call__(self, images, labels=None):
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


def generator_from_official(state, *, conv_clamp=None, dtype=None):
  """Official state_dict {name: array} of G or G_ema -> (Generator, variables). Sizes are read from
  the tensors.

  conv_clamp is not in the tensors: take it from the file's constructor arguments. UserError names
  what does not fit.
  """
  shape = functools.partial(_shape, state)
  mapping = _mapping_fields(state, shape('mapping.w_avg')[0])
  generator = Generator(
    z_dim=shape('mapping.fc0.weight')[1]
    - (shape('mapping.embed.weight')[0] if mapping['num_classes'] else 0),
    w_dim=shape('mapping.w_avg')[0],
    channels=_widths(state, 'synthesis.b{}.conv1.weight'),
    image_channels=shape('synthesis.b4.torgb.weight')[0],
    conv_clamp=conv_clamp,
    dtype=dtype,
    **mapping,
  )
  labels = np.zeros(1, np.int32)
  template = jax.eval_shape(
    generator.init, jax.random.key(0), np.zeros((1, generator.z_dim), np.float32), labels
  )
  renamed = {
    re.sub('^(mapping|synthesis)[.](?!w_avg)', r'\1_network.', name): x for name, x in state.items()
  }
  renamed['w_avg'] = renamed.pop('mapping.w_avg')
  return generator, _convert(renamed, template)


def discriminator_from_official(state, *, mbstd_group=4, conv_clamp=None, dtype=None):
  """Official state_dict {name: array} of D -> (Discriminator, variables). Sizes are read from the
  tensors.

  mbstd_group and conv_clamp are not in the tensors: take them from the file's constructor
  arguments. UserError names what does not fit.
  """
  shape = functools.partial(_shape, state)
  channels = (shape('b4.conv.weight')[0], *_widths(state, 'b{}.conv0.weight', first=8))
  resolution = _resolution(channels)
  label_features = shape('b4.out.weight')[0]
  discriminator = Discriminator(
    channels=channels,
    image_channels=shape(f'b{resolution}.fromrgb.weight')[1],
    architecture='resnet' if 'b8.skip.weight' in state else 'orig',
    mbstd_group=mbstd_group,
    mbstd_channels=shape('b4.conv.weight')[1] - channels[0],
    label_features=label_features,
    conv_clamp=conv_clamp,
    dtype=dtype,
    **_mapping_fields(state, label_features),
  )
  images = np.zeros((1, resolution, resolution, discriminator.image_channels), np.float32)
  template = jax.eval_shape(discriminator.init, jax.random.key(0), images, np.zeros(1, np.int32))
  # The original flattens (C, H, W), this network (H, W, C).
  if shape('b4.fc.weight') != (channels[0], 16 * channels[0]):
    raise UserError(
      f'weights: b4.fc.weight has shape {shape("b4.fc.weight")}, expected {channels[0]} x '
      f'{16 * channels[0]}; the network is of a kind that is not supported.'
    )
  kernel = (
    np.reshape(state['b4.fc.weight'], (-1, channels[0], 16)).swapaxes(1, 2).reshape(channels[0], -1)
  )
  return discriminator, _convert({**state, 'b4.fc.weight': kernel}, template)


class MappingNetwork(nn.Module):
  """(z or None, labels) -> (N, features). Both inputs are scaled to unit mean square first."""

  features: int
  num_layers: int
  num_classes: int
  embed_features: int | None
  layer_features: int | None

  @nn.compact
  def __call__(self, z, labels):
    inputs = [] if z is None else [_normalize(z)]
    if self.num_classes:
      vectors = _label_vectors(labels, self.num_classes)
      inputs.append(
        _normalize(ops.Dense(self.embed_features or self.features, name='embed')(vectors))
      )
    x = jnp.concatenate(inputs, -1)
    for i in range(self.num_layers):
      width = self.features if i == self.num_layers - 1 else self.layer_features or self.features
      x = ops.Dense(width, lr_mult=0.01, activate=True, name=f'fc{i}')(x)
    return x


class SynthesisBlock(nn.Module):
  """The index-th resolution: (x, image) -> (x, image). Both are None in the first, which starts
  from a constant."""

  index: int
  base_size: int
  features: int
  image_channels: int
  conv_clamp: float | None
  dtype: Any

  @nn.compact
  def __call__(self, x, image, ws, noise, noise_keys):
    def layer(x, i, up, name):
      keys = (
        None if noise_keys is None else jax.vmap(lambda key: jax.random.fold_in(key, i))(noise_keys)
      )
      return ops.StyleLayer(self.features, up, self.conv_clamp, self.dtype, name=name)(
        x, ws[:, i], noise, keys
      )

    # A block's ToRGB shares its w with the first convolution of the next block.
    first, second, rgb = 2 * self.index - 1, 2 * self.index, 2 * self.index + 1
    if self.index == 0:
      const = self.param(
        'const', nn.initializers.normal(1.0), (self.base_size, self.base_size, self.features)
      )
      x = jnp.broadcast_to(const, (len(ws), *const.shape))
    else:
      x = layer(x, first, True, 'conv0')
    x = layer(x, second, False, 'conv1')
    rgb = ops.ToRGB(self.image_channels, self.conv_clamp, self.dtype, name='torgb')(x, ws[:, rgb])
    return x, rgb if image is None else ops.upsample(image) + rgb


class SynthesisNetwork(nn.Module):
  """ws (N, num_ws, w_dim) -> image (N, H, W, C): the sum of every resolution's picture ('skip'
  architecture)."""

  base_size: int
  channels: tuple[int, ...]
  image_channels: int
  conv_clamp: float | None
  dtype: Any

  @nn.compact
  def __call__(self, ws, noise, noise_keys):
    x = image = None
    for i, width in enumerate(self.channels):
      block = SynthesisBlock(
        i,
        self.base_size,
        width,
        self.image_channels,
        self.conv_clamp,
        self.dtype,
        name=f'b{self.base_size << i}',
      )
      x, image = block(x, image, ws, noise, noise_keys)
    return image


class DiscriminatorBlock(nn.Module):
  """(N, H, W, C) -> (N, H/2, W/2, channels[0]); channels = widths at half and at full
  resolution."""

  channels: tuple[int, int]
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


def minibatch_std(x, group, num_channels=1):
  """Appends to x (N, H, W, C) its group's mean standard deviations: num_channels of them, each over
  C / num_channels.

  Groups are strided: j, j + N/group, ... UserError when min(group, N) does not divide N, and when N
  is 0.
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


def _normalize(x):
  x = x.astype(ops.at_least_float32(x))
  return x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-8)


def _label_vectors(labels, num_classes):
  """(N,) integers or (N, num_classes) vectors -> (N, num_classes)."""
  if labels is None:
    raise UserError(
      f'labels None: expected (N,) integers below {num_classes} or (N, {num_classes}) vectors.'
    )
  if labels.ndim == 1:
    return jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
  if labels.shape[-1] != num_classes:
    raise UserError(
      f'labels of shape {labels.shape}: expected (N,) integers or (N, {num_classes}) vectors.'
    )
  return labels


def _resolution(channels, base_size=4):
  if len(channels) < 2:
    raise UserError(
      f'channels {channels}: expected one width for each of {base_size}, {2 * base_size}, ..., '
      'resolution; '
      'see channels_for.'
    )
  return base_size << len(channels) - 1


def _shape(state, name):
  if name not in state:
    raise UserError(
      f'weights: {name} is missing; expected a network in the layout of stylegan2-ada-pytorch.'
    )
  return np.shape(state[name])


def _widths(state, pattern, first=4):
  widths, resolution = [], first
  while pattern.format(resolution) in state:
    widths.append(_shape(state, pattern.format(resolution))[0])
    resolution *= 2
  return tuple(widths)


def _mapping_fields(state, features):
  """Fields of the network whose mapping ends in `features`; widths that are the default are left to
  it."""
  layers = sum(re.fullmatch(r'mapping[.]fc\d+[.]weight', name) is not None for name in state)
  conditional = 'mapping.embed.weight' in state
  embed = _shape(state, 'mapping.embed.weight')[0] if conditional else features
  hidden = _shape(state, 'mapping.fc0.weight')[0] if layers > 1 else features
  return dict(
    num_classes=_shape(state, 'mapping.embed.weight')[1] if conditional else 0,
    mapping_layers=layers,
    embed_features=embed if embed != features else None,
    layer_features=hidden if hidden != features else None,
  )


def _convert(state, template):
  """Official names and layouts -> numpy arrays like template; UserError names the first tensor that
  does not fit."""
  expected = {
    path[1:]: (path[0], leaf) for path, leaf in traverse_util.flatten_dict(template).items()
  }
  variables = {}
  for name, value in state.items():
    value = np.asarray(value)
    *path, kind = name.split('.')
    if kind == 'resample_filter':
      if value.shape != (4, 4) or not np.allclose(value, np.outer(ops.TAPS, ops.TAPS), atol=1e-6):
        raise UserError(
          f'weights: {name} is not the filter [1, 3, 3, 1]; only that one is supported.'
        )
      continue
    if kind == 'weight':
      kind, value = 'kernel', value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
    elif kind == 'const':
      value = np.moveaxis(value, 0, -1)
    collection, leaf = expected.pop((*path, kind), (None, None))
    if leaf is None or leaf.shape != value.shape:
      raise UserError(
        f'weights: {name} has shape {value.shape} in our layout, expected {leaf and leaf.shape}; '
        'the network is of a kind that is not supported.'
      )
    variables[collection, *path, kind] = np.array(value, leaf.dtype, order='C')
  if expected:
    raise UserError(f'weights: {".".join(next(iter(expected)))} is missing.')
  return traverse_util.unflatten_dict(variables)
