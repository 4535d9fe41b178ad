"""StyleGAN2's generator (arXiv 1912.04958, 2006.06676), written in JAX.

The numbers agree with NVlabs/stylegan2-ada-pytorch (training/networks.py), whose weights
`official.generator_from_official` takes. Images are NHWC, nominally in [-1, 1]; kernels are HWIO
and (in, out). `dtype` is the compute type of the convolutions; mapping, styles, demodulation and
image sums are at least float32. The discriminator is in discriminator.py.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

from palm_jax.base.errors import UserError
from palm_jax.generator import ops

W_AVG_MOMENTUM = 0.995  # stylegan2-ada-pytorch, MappingNetwork w_avg_beta
LR_MULTIPLIER = 0.01  # of the mapping's layers
NOISE_MODES = 'const', 'random', 'none'


def channels_for(
  resolution: int, channel_base: int = 32768, channel_max: int = 512, base_size: int = 4
) -> tuple[int, ...]:
  """Widths at base_size, twice that, ..., resolution: min(channel_base // r, channel_max).

  Raises:
    UserError: a resolution that is not base_size doubled once or more.
  """
  doublings = (max(resolution, 1) // base_size).bit_length() - 1
  if doublings < 1 or resolution != base_size << doublings:
    sizes = ', '.join(str(base_size << i) for i in range(1, 5))
    raise UserError(
      f'resolution {resolution}: expected one of {sizes}, ...; resize or pad the images.'
    )
  return tuple(min(channel_base // (base_size << i), channel_max) for i in range(doublings + 1))


def resolution_of(channels: tuple[int, ...], base_size: int = 4) -> int:
  """Side in pixels of the images of networks with these widths (see `channels_for`).

  Raises:
    UserError: fewer than two widths.
  """
  if len(channels) < 2:
    raise UserError(
      f'channels {channels}: expected one width for each of {base_size}, {2 * base_size}, ..., '
      'resolution; see channels_for.'
    )
  return base_size << len(channels) - 1


class LatentNetwork(nn.Module):
  """z, labels -> images by way of w: what all generators here share.

  A network has `mapping_network` ((z, labels) -> w (N, w_dim)), the variable `w_avg`, `num_ws` and
  `synthesis`.
  """

  def __call__(
    self,
    z: jax.Array,
    labels: jax.Array | None = None,
    truncation_psi: float | jax.Array = 1.0,
    truncation_cutoff: int | jax.Array | None = None,
    noise: str = 'const',
    noise_keys: jax.Array | None = None,
    **drawing: Any,
  ) -> jax.Array:
    """z (N, z_dim), labels -> (N, H, W, C) images in at least float32, not clipped.

    Further arguments are those of `mapping` and `synthesis`.
    """
    this: Any = self
    ws = self.mapping(z, labels, truncation_psi=truncation_psi, truncation_cutoff=truncation_cutoff)
    return this.synthesis(ws, noise, noise_keys, **drawing)

  def mapping(
    self,
    z: jax.Array,
    labels: jax.Array | None = None,
    *,
    truncation_psi: float | jax.Array = 1.0,
    truncation_cutoff: int | jax.Array | None = None,
    update_w_avg: bool = False,
    axis_name: str | None = None,
  ) -> jax.Array:
    """z (N, z_dim), labels -> ws (N, num_ws, w_dim).

    Args:
      truncation_psi: pulls the first truncation_cutoff (default: all) of the num_ws towards w_avg.
        Both may be traced.
      update_w_avg: moves w_avg, one for all classes, towards the batch mean; make 'buffers'
        mutable.
      axis_name: mesh axis over which that mean is taken.
    """
    this: Any = self
    w = this.mapping_network(z, labels)
    if update_w_avg and not self.is_initializing():
      mean = jax.lax.stop_gradient(w).mean(0)
      if axis_name is not None:
        mean = jax.lax.pmean(mean, axis_name)
      this.w_avg.value = mean + W_AVG_MOMENTUM * (this.w_avg.value - mean)
    ws = jnp.repeat(w[:, None], this.num_ws, 1)
    cutoff = this.num_ws if truncation_cutoff is None else truncation_cutoff
    pull = jnp.where(jnp.arange(this.num_ws) < cutoff, 1 - truncation_psi, 0).astype(ws.dtype)
    return ws + pull[:, None] * (this.average_w(labels) - ws)

  def average_w(self, labels: Any) -> jax.Array:
    """Where truncation pulls: of a shape that broadcasts against ws."""
    del labels
    this: Any = self
    return this.w_avg.value


class Generator(LatentNetwork):
  """z, labels -> images.

  Collections: 'params', and 'buffers' with w_avg and the constant noise pictures.

  Attributes:
    num_classes: 0 means unconditional; labels are then ignored and may be None. Otherwise labels
      are (N,) integers or (N, num_classes) vectors.
    channels: widths at base_size, twice that, ..., resolution (see `channels_for`).
    conv_clamp: limit of every convolution's result; None is no limit.
    base_size: side of the constant input.
    base_width: its width where it is not square; base_size is then its height.
    class_averages: whether w_avg, to which truncation pulls, is (num_classes, w_dim).
    embed_features, layer_features: widths of the label's embedding and of the mapping's hidden
      layers; None is w_dim.
    dtype: of the convolutions; None is that of the parameters.
  """

  z_dim: int
  w_dim: int
  num_classes: int
  channels: tuple[int, ...]
  image_channels: int = 3
  mapping_layers: int = 8  # stylegan2-ada-pytorch; its cifar config has 2
  conv_clamp: float | None = None
  base_size: int = 4
  base_width: int | None = None
  class_averages: bool = False
  embed_features: int | None = None
  layer_features: int | None = None
  dtype: Any = None

  @property
  def resolution(self) -> int:
    return resolution_of(self.channels, self.base_size)

  @property
  def image_shape(self) -> tuple[int, int, int]:
    width = (self.base_width or self.base_size) << len(self.channels) - 1
    return self.resolution, width, self.image_channels

  @property
  def num_ws(self) -> int:
    return 2 * len(self.channels)

  def setup(self) -> None:
    self.mapping_network = MappingNetwork(
      self.w_dim, self.mapping_layers, self.num_classes, self.embed_features, self.layer_features
    )
    self.synthesis_network = SynthesisNetwork(
      self.base_size,
      self.base_width or self.base_size,
      self.channels,
      self.image_channels,
      self.conv_clamp,
      self.dtype,
    )
    classes = (self.num_classes,) if self.class_averages else ()
    self.w_avg = self.variable('buffers', 'w_avg', jnp.zeros, (*classes, self.w_dim))

  def prepared(self, variables: Any) -> Any:
    """Variables with what `synthesis` makes of its kernels alone, in the collection 'prepared'."""
    params: dict[Any, Any] = traverse_util.flatten_dict(variables['params']['synthesis_network'])
    ready = {}
    for path, x in params.items():
      if path[-1] == 'kernel' and x.ndim == 4 and (*path[:-1], 'noise_strength') in params:
        ready[path] = x.astype(self.dtype or x.dtype)
        ready[*path[:-1], 'energy'] = ops.energy(x)
    return dict(variables, prepared={'synthesis_network': traverse_util.unflatten_dict(ready)})

  def average_w(self, labels: Any) -> jax.Array:
    """Of all classes, or (N, 1, w_dim) of the labels' classes or their mixtures."""
    averages = self.w_avg.value
    if not self.class_averages:
      return averages
    return (averages[labels] if labels.ndim == 1 else labels @ averages)[:, None]

  def synthesis(
    self, ws: jax.Array, noise: str = 'const', noise_keys: jax.Array | None = None
  ) -> jax.Array:
    """ws (N, num_ws, w_dim) -> (N, H, W, C) images in at least float32.

    Args:
      noise: 'const' (the stored pictures), 'none', or 'random'.
      noise_keys: (N,) typed keys of random noise, one a sample, so that a sample does not depend on
        how the batch lies on the devices.

    Raises:
      UserError: an unknown noise mode, or random noise without keys.
    """
    check_noise(noise)
    if noise == 'random' and noise_keys is None:
      raise UserError(
        "noise 'random': expected noise_keys, one key a sample, such as jax.random.split(key, N)."
      )
    return self.synthesis_network(ws, noise, noise_keys)


class MappingNetwork(nn.Module):
  """(z or None, labels) -> (N, features). Both inputs are scaled to unit mean square first."""

  features: int
  num_layers: int
  num_classes: int
  embed_features: int | None
  layer_features: int | None

  @nn.compact
  def __call__(self, z: jax.Array | None, labels: jax.Array | None) -> jax.Array:
    inputs = [] if z is None else [_normalize(z)]
    if self.num_classes:
      vectors = _label_vectors(labels, self.num_classes)
      embed = ops.Dense(self.embed_features or self.features, name='embed')
      inputs.append(_normalize(embed(vectors)))
    x = jnp.concatenate(inputs, -1)
    hidden = self.layer_features or self.features
    for i in range(self.num_layers):
      width = self.features if i == self.num_layers - 1 else hidden
      x = ops.Dense(width, lr_mult=LR_MULTIPLIER, activate=True, name=f'fc{i}')(x)
    return x


class SynthesisNetwork(nn.Module):
  """ws (N, num_ws, w_dim) -> image (N, H, W, C).

  The image is the sum of every resolution's picture ('skip' architecture).
  """

  base_size: int
  base_width: int
  channels: tuple[int, ...]
  image_channels: int
  conv_clamp: float | None
  dtype: Any

  @nn.compact
  def __call__(self, ws: jax.Array, noise: str, noise_keys: jax.Array | None) -> jax.Array:
    x = image = None
    for i, width in enumerate(self.channels):
      block = SynthesisBlock(
        i,
        (self.base_size, self.base_width),
        width,
        self.image_channels,
        self.conv_clamp,
        self.dtype,
        name=f'b{self.base_size << i}',
      )
      x, image = block(x, image, ws, noise, noise_keys)
    return image  # pyright: ignore[reportReturnType]  # of one width or more


class SynthesisBlock(nn.Module):
  """The index-th resolution: (x, image) -> (x, image).

  Both are None in the first, which starts from a constant.
  """

  index: int
  base_shape: tuple[int, int]
  features: int
  image_channels: int
  conv_clamp: float | None
  dtype: Any

  @nn.compact
  def __call__(self, x, image, ws, noise, noise_keys):
    def layer(x, i, up, name):
      keys = noise_keys
      if keys is not None:
        keys = jax.vmap(lambda key: jax.random.fold_in(key, i))(keys)
      conv = ops.StyleLayer(self.features, up, self.conv_clamp, self.dtype, name=name)
      return conv(x, ws[:, i], noise, keys)

    # A block's ToRGB shares its w with the first convolution of the next block.
    first = 2 * self.index - 1
    if self.index == 0:
      shape = *self.base_shape, self.features
      const = self.param('const', nn.initializers.normal(1.0), shape)
      x = jnp.broadcast_to(const, (len(ws), *shape))
    else:
      x = layer(x, first, True, 'conv0')
    x = layer(x, first + 1, False, 'conv1')
    to_rgb = ops.ToRGB(self.image_channels, self.conv_clamp, self.dtype, name='torgb')
    rgb = to_rgb(x, ws[:, first + 2])
    return x, rgb if image is None else ops.upsample(image) + rgb


def check_noise(noise: str) -> None:
  """Raises UserError for what is no noise mode."""
  if noise not in NOISE_MODES:
    raise UserError(f'noise {noise!r}: expected one of {", ".join(NOISE_MODES)}.')


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
