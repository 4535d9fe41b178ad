"""Image encoders: ResNet-18 with the CIFAR stem, and the Nature CNN for Atari frames."""

import difflib
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from palm_jax.base import checks
from palm_jax.base.errors import UserError
from palm_jax.layers.convolution import flax_conv
from palm_jax.layers.normalization import BatchNorm

KAIMING = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')  # torchvision/models/resnet.py
# Both sides by one, as in torch; 'SAME' would pad only bottom and right when the stride is 2.
PADDING = ((1, 1), (1, 1))


def default_config() -> ConfigDict:
  return ConfigDict(
    dict(
      name='resnet18',  # PALM 4.2; 'nature' for Atari
      width=64,  # ResNet-18: 64, 128, 256, 512 channels in the four stages
      # facebookresearch/simsiam has True; on CIFAR most leave it out (solo-learn#16)
      zero_init_residual=False,
      features=512,  # Mnih et al. 2015: the Nature CNN's dense layer
    )
  )


RANGES = dict(width=checks.Range(1, 1024), features=checks.SIZE)


def check(c: ConfigDict) -> None:
  """Raises UserError on invalid settings of the config's section `encoder`."""
  checks.ranges('encoder', c, RANGES)


def preprocess(images: jax.Array, dtype: Any = None) -> jax.Array:
  """Brings images to floats in [-1, 1].

  Args:
    images: uint8 of any shape, or floats already in [-1, 1], which pass through.
    dtype: the result's type; None is float32 for uint8, and leaves floats as they are.
  Raises:
    UserError: for another integer type.
  """
  if images.dtype == jnp.uint8:
    # Computed in float32, then rounded once; networks with float64 parameters promote it
    # themselves.
    return (images.astype(jnp.float32) / 127.5 - 1).astype(dtype or jnp.float32)
  if not jnp.issubdtype(images.dtype, jnp.floating):
    raise UserError(
      f'images of type {images.dtype}: expected uint8 in 0..255 or floats in [-1, 1]; convert '
      'them first'
    )
  return images.astype(dtype or images.dtype)


def show_maps(module: nn.Module, maps: jax.Array) -> None:
  """Called by an encoder: its last maps (B, h, w, F), for those who ask by `feature_maps`."""
  if not module.is_initializing():
    module.sow('intermediates', 'maps', maps)


def feature_maps(network: nn.Module, variables: Any, images: jax.Array) -> jax.Array:
  """(B, h, w, F) float32: what an encoder shows by `show_maps`, batch statistics fixed.

  Raises:
    UserError: it shows none.
  """
  found: Any = network.apply(variables, images, train=False, mutable=['intermediates'])
  shown = found[1]
  if 'maps' not in shown.get('intermediates', {}):
    raise UserError(f'the encoder {type(network).__name__} has no feature maps to look at')
  return shown['intermediates']['maps'][0].astype(jnp.float32)


class ResidualBlock(nn.Module):
  """Two 3x3 convolutions and a shortcut (He et al. 2015, figure 2)."""

  features: int
  stride: int
  conv: Any
  norm: Any
  last_scale_init: Any

  @nn.compact
  def __call__(self, x):  # (B, H, W, C)
    y = self.conv(self.features, (3, 3), self.stride, padding=PADDING, name='conv1')(x)
    y = nn.relu(self.norm(name='norm1')(y))
    y = self.conv(self.features, (3, 3), padding=PADDING, name='conv2')(y)
    y = self.norm(name='norm2', scale_init=self.last_scale_init)(y)
    if x.shape != y.shape:
      x = self.conv(self.features, (1, 1), self.stride, padding='VALID', name='shortcut_conv')(x)
      x = self.norm(name='shortcut_norm')(x)
    return nn.relu(x + y)  # (B, H/stride, W/stride, features)


class ResNet18(nn.Module):
  """ResNet-18 for small images: 3x3 stem without stride or pooling, global average pooling at the
  end.

  Source: PatrickHua/SimSiam models/backbones/cifar_resnet_1.py and OpenOOD
  networks/resnet18_32x32.py. 11,168,832 parameters at width 64 and three channels. Running
  variances are flax's (divided by n), torch's are divided by n - 1; the difference is 1/n with n =
  batch * height * width.

  Attributes:
    width: channels of the first stage.
    axis_name: mesh axis over which batch statistics are averaged in training; None keeps them
      local.
    dtype: compute type; None follows parameters and input. Batch statistics are at least float32.
    zero_init_residual: start every block as the identity.
  """

  width: int = 64
  axis_name: str | None = None
  dtype: Any = None
  zero_init_residual: bool = False

  @nn.compact
  def __call__(self, images, train: bool):
    """images (B, H, W, C), uint8 or floats in [-1, 1] -> (B, 8 * width), at least float32."""
    conv = partial(
      nn.Conv, use_bias=False, kernel_init=KAIMING, dtype=self.dtype, conv_general_dilated=flax_conv
    )
    norm = partial(
      BatchNorm, use_running_average=not train, axis_name=self.axis_name, dtype=self.dtype
    )
    last_scale_init = nn.initializers.zeros if self.zero_init_residual else nn.initializers.ones

    x = preprocess(images, self.dtype)
    x = conv(self.width, (3, 3), padding=PADDING, name='stem_conv')(x)
    x = nn.relu(norm(name='stem_norm')(x))
    for stage in range(4):
      for block in range(2):
        stride = 2 if stage > 0 and block == 0 else 1
        x = ResidualBlock(
          self.width * 2**stage,
          stride,
          conv,
          norm,
          last_scale_init,
          name=f'stage{stage + 1}_block{block + 1}',
        )(x)
    show_maps(self, x)
    return jnp.mean(x, axis=(1, 2), dtype=jnp.promote_types(x.dtype, jnp.float32))


class NatureCNN(nn.Module):
  """The convolutions of Mnih et al. 2015 without padding, and one dense layer.

  It has no batch statistics; `train` is there so that all encoders are called alike.

  Attributes:
    features: width of the dense layer, the size of the representation.
    dtype: compute type; None follows parameters and input.
  """

  features: int = 512
  dtype: Any = None

  @nn.compact
  def __call__(self, images, train: bool):
    """images (B, H, W, C), uint8 or floats in [-1, 1] -> (B, features), at least float32.

    Raises:
      UserError: for images smaller than 36x36, of which the convolutions leave nothing.
    """
    if min(images.shape[1:3]) < 36:
      raise UserError(
        f'images of {images.shape[1]}x{images.shape[2]}: the encoder nature expected at least '
        '36x36; '
        'take resnet18 for smaller ones'
      )
    conv = partial(nn.Conv, padding='VALID', dtype=self.dtype, conv_general_dilated=flax_conv)
    x = preprocess(images, self.dtype)
    x = nn.relu(conv(32, (8, 8), 4, name='conv1')(x))
    x = nn.relu(conv(64, (4, 4), 2, name='conv2')(x))
    x = nn.relu(conv(64, (3, 3), 1, name='conv3')(x))
    show_maps(self, x)
    x = nn.relu(nn.Dense(self.features, dtype=self.dtype, name='dense')(x.reshape(x.shape[0], -1)))
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def make_encoder(config: ConfigDict, axis_name: str | None = None, dtype: Any = None) -> nn.Module:
  """The encoder that `config.name` names, with the keys of `default_config`.

  Args:
    axis_name: mesh axis for synchronous batch statistics, where the network has them.
    dtype: compute type, see the networks.
  Raises:
    UserError: for a name that no encoder has.
  """
  encoders = {
    'resnet18': lambda: ResNet18(config.width, axis_name, dtype, config.zero_init_residual),
    'nature': lambda: NatureCNN(config.features, dtype),
  }
  if config.name not in encoders:
    nearest = difflib.get_close_matches(str(config.name), encoders, n=1, cutoff=0)[0]
    raise UserError(
      f'encoder {config.name!r}: expected one of {", ".join(encoders)}; did you mean {nearest!r}?'
    )
  return encoders[config.name]()
