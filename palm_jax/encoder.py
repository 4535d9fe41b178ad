"""Image encoders by name: ResNets, vision transformers, and the Nature CNN for Atari frames.

| name | features F of (B, F) | at the default width |
|---|---|---|
| resnet18, resnet34 | 8 * width | 512 |
| resnet50 | 32 * width | 2048 |
| vit_tiny | 3 * width, 3 heads | 192 |
| vit_small | 6 * width, 6 heads | 384 |
| nature | features | 512 |
"""

import difflib
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from ml_collections import ConfigDict

from palm_jax.base import checks
from palm_jax.base.errors import UserError
from palm_jax.layers.convolution import flax_conv
from palm_jax.layers.maps import show_maps
from palm_jax.layers.pixels import preprocess
from palm_jax.resnet import STEMS, ResNet
from palm_jax.vit import HEADS, POOLS, ViT, check_patches

RESNETS = {'resnet18': 18, 'resnet34': 34, 'resnet50': 50}
VITS = {f'vit_{size}': heads for size, heads in HEADS.items()}
NAMES = *RESNETS, *VITS, 'nature'
LEAST_SIDE = 36  # of the Nature CNN's pictures
LARGE = 96  # side of pictures for which a stem that halves them is meant


def default_config() -> ConfigDict:
  return ConfigDict(
    dict(
      # PALM 4.2; or resnet34, resnet50, vit_tiny, vit_small; 'nature' for Atari
      name='resnet18',
      width=64,  # channels of a ResNet's first stage of four, each twice the last; of a ViT's head
      # of ResNets: PALM 4.2; 'imagenet' halves the sides twice, 7x7 and max pooling (torchvision)
      stem='cifar',
      # facebookresearch/simsiam has True; on CIFAR most leave it out (solo-learn#16)
      zero_init_residual=False,
      patch=4,  # of ViTs, pixels a side: for 32x32; 16 for 224x224 (arXiv 2010.11929)
      pool='token',  # of ViTs: the class token; 'mean' of the patches instead of one
      features=512,  # Mnih et al. 2015: the Nature CNN's dense layer
    )
  )


RANGES = dict(width=checks.Range(1, 1024), patch=checks.Range(1, 1024), features=checks.SIZE)


def check(c: ConfigDict) -> None:
  """Raises UserError on invalid settings of the config's section `encoder`."""
  checks.ranges('encoder', c, RANGES)
  make_encoder(c)


def cheaper_eyes(c: ConfigDict, shape: tuple[int, ...]) -> str:
  """Setting with which pictures of a shape (H, W, C) take less memory, for messages; else ''."""
  if c.name in RESNETS and c.stem == 'cifar' and min(shape[:2]) >= LARGE:
    return f"encoder.stem to 'imagenet' (for {shape[0]}x{shape[1]} a sixteenth of the memory)"
  return ''


def check_picture(c: ConfigDict, shape: tuple[int, ...]) -> None:
  """Raises UserError where the encoder cannot see pictures of a shape (H, W, C)."""
  height, width = shape[:2]
  if height != width and c.name in ('nature', *VITS):
    raise UserError(
      f'images of {height}x{width}: the encoder {c.name} has weights for the places of a square; '
      'take a ResNet, or pad the pictures'
    )
  if c.name == 'nature':
    _check_nature(height, width)
  if c.name in VITS:
    check_patches(shape, c.patch)


def _check_nature(height, width):
  if min(height, width) < LEAST_SIDE:
    raise UserError(
      f'images of {height}x{width}: the encoder nature expected at least {LEAST_SIDE}x'
      f'{LEAST_SIDE}; take resnet18 for smaller ones'
    )


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
    _check_nature(*images.shape[1:3])
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

  Keys that are absent, as in the settings of older checkpoints, have their defaults.

  Args:
    axis_name: mesh axis for synchronous batch statistics, where the network has them.
    dtype: compute type, see the networks.
  Raises:
    UserError: for a name that no encoder has, and for other unknown names in the settings.
  """
  c = ConfigDict(dict(default_config(), **dict(config)))
  if c.name not in NAMES:
    nearest = difflib.get_close_matches(str(c.name), NAMES, n=1, cutoff=0)[0]
    raise UserError(
      f'encoder.name={c.name!r}: expected one of {", ".join(NAMES)}; did you mean {nearest!r}?'
    )
  checks.choice('encoder.stem', c.stem, STEMS)
  checks.choice('encoder.pool', c.pool, POOLS)
  if c.name in RESNETS:
    depth = RESNETS[c.name]
    return ResNet(c.width, axis_name, dtype, c.zero_init_residual, depth, c.stem)
  if c.name in VITS:
    return ViT(VITS[c.name], c.width, c.patch, c.pool, dtype)
  return NatureCNN(c.features, dtype)
