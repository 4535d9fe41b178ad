"""Residual networks (He et al. 2015) of 18, 34 and 50 layers, for small and for large images."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from palm_jax.layers.convolution import flax_conv
from palm_jax.layers.maps import show_maps
from palm_jax.layers.normalization import EPSILON, BatchNorm
from palm_jax.layers.pixels import preprocess

KAIMING = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')  # torchvision/models/resnet.py
# Both sides by one, as in torch; 'SAME' would pad only bottom and right when the stride is 2.
PADDING: Any = ((1, 1), (1, 1))
STEM_PADDING = ((3, 3), (3, 3))  # of ImageNet's 7x7
STEMS = 'cifar', 'imagenet'
BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}  # in the four stages
EXPANSION = 4  # of a bottleneck's channels


@jax.custom_vjp
def relu(x: jax.Array) -> jax.Array:
  """max(x, 0), whose gradient remembers the result, which is kept anyway, instead of x."""
  return jnp.maximum(x, 0)


relu.defvjp(lambda x: (y := jnp.maximum(x, 0), y), lambda y, g: (jnp.where(y != 0, g, 0),))


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
    y = self.norm(name='norm1', relu=True)(y)
    y = self.conv(self.features, (3, 3), padding=PADDING, name='conv2')(y)
    y = self.norm(name='norm2', scale_init=self.last_scale_init)(y)
    return relu(shortcut(self, x, y) + y)  # (B, H/stride, W/stride, features)


class Bottleneck(nn.Module):
  """1x1, 3x3, 1x1 convolutions and a shortcut (figure 5), the stride at the 3x3 as in torchvision
  ("ResNet v1.5")."""

  features: int
  stride: int
  conv: Any
  norm: Any
  last_scale_init: Any

  @nn.compact
  def __call__(self, x):  # (B, H, W, C)
    y = self.conv(self.features, (1, 1), padding='VALID', name='conv1')(x)
    y = self.norm(name='norm1', relu=True)(y)
    y = self.conv(self.features, (3, 3), self.stride, padding=PADDING, name='conv2')(y)
    y = self.norm(name='norm2', relu=True)(y)
    y = self.conv(EXPANSION * self.features, (1, 1), padding='VALID', name='conv3')(y)
    y = self.norm(name='norm3', scale_init=self.last_scale_init)(y)
    return relu(shortcut(self, x, y) + y)  # (B, H/stride, W/stride, 4 * features)


def shortcut(block, x, y):
  """x itself, or where a block changes the shape its projection to that of y."""
  if x.shape == y.shape:
    return x
  conv = block.conv(y.shape[-1], (1, 1), block.stride, padding='VALID', name='shortcut_conv')
  return block.norm(name='shortcut_norm')(conv(x))


class Bias(nn.Module):
  """What folding leaves of a batch normalisation."""

  relu: bool = False
  scale_init: Any = None  # of BatchNorm, not read

  @nn.compact
  def __call__(self, x):
    x += self.param('bias', nn.initializers.zeros, x.shape[-1:], x.dtype)
    return nn.relu(x) if self.relu else x


class ResNet(nn.Module):
  """ResNet-18, -34 or -50, global average pooling at the end, no classifier.

  Source: torchvision/models/resnet.py; the stem 'cifar', 3x3 without stride or pooling, is that of
  PatrickHua/SimSiam models/backbones/cifar_resnet_1.py and OpenOOD networks/resnet18_32x32.py.
  Parameters at width 64 and three channels: 11,176,512, 21,284,672 and 23,508,032 with ImageNet's
  stem, 7,680 fewer with CIFAR's. Running variances are flax's (divided by n), torch's are divided
  by n - 1; the difference is 1/n with n = batch * height * width.

  Attributes:
    width: channels of the first stage.
    axis_name: mesh axis over which batch statistics are averaged in training; None keeps them
      local.
    dtype: compute type; None follows parameters and input. Batch statistics are at least float32.
    zero_init_residual: start every block as the identity.
    depth: a key of BLOCKS; 50 has bottlenecks.
    stem: one of STEMS.
    folded: without normalisation; the variables are those of `fold`.
  """

  width: int = 64
  axis_name: str | None = None
  dtype: Any = None
  zero_init_residual: bool = False
  depth: int = 18
  stem: str = 'cifar'
  folded: bool = False

  @nn.compact
  def __call__(self, images, train: bool):
    """images (B, H, W, C), uint8 or floats in [-1, 1] -> (B, F), at least float32.

    F is 8 * width, of depth 50 32 * width.
    """
    conv = partial(
      nn.Conv, use_bias=False, kernel_init=KAIMING, dtype=self.dtype, conv_general_dilated=flax_conv
    )
    norm: Any = partial(
      BatchNorm, use_running_average=not train, axis_name=self.axis_name, dtype=self.dtype
    )
    if self.folded:
      norm = Bias
    last_scale_init = nn.initializers.zeros if self.zero_init_residual else nn.initializers.ones

    x = preprocess(images, self.dtype)
    if self.stem == 'imagenet':
      x = conv(self.width, (7, 7), 2, padding=STEM_PADDING, name='stem_conv')(x)
    else:
      x = conv(self.width, (3, 3), padding=PADDING, name='stem_conv')(x)
    x = norm(name='stem_norm', relu=True)(x)
    if self.stem == 'imagenet':
      x = nn.max_pool(x, (3, 3), (2, 2), padding=PADDING)
    kind = Bottleneck if self.depth == 50 else ResidualBlock
    for stage, count in enumerate(BLOCKS[self.depth]):
      for block in range(count):
        stride = 2 if stage > 0 and block == 0 else 1
        name = f'stage{stage + 1}_block{block + 1}'
        x = kind(self.width * 2**stage, stride, conv, norm, last_scale_init, name=name)(x)
    show_maps(self, x)
    return jnp.mean(x, axis=(1, 2), dtype=jnp.promote_types(x.dtype, jnp.float32))

  def fold(self, variables: Any) -> tuple['ResNet', Any]:
    """The network with its running statistics folded into the convolutions before them.

    It sees what the network sees with train=False. XLA:GPU makes one kernel of a convolution, its
    bias and the ReLU, where a normalisation is one more.

    Args:
      variables: {'params', 'batch_stats'}.

    Returns:
      (network, its variables).
    """
    folded = _fold(variables['params'], variables['batch_stats'])
    if self.dtype is not None:
      folded = jax.tree.map(lambda x: x.astype(self.dtype), folded)
    return self.clone(folded=True), {'params': folded}


def _fold(params, batch_stats):
  folded = {}
  for name, own in params.items():
    if name not in batch_stats:
      continue
    if 'mean' not in batch_stats[name]:  # a block
      folded[name] = _fold(own, batch_stats[name])
      continue
    scaling = own['scale'] * lax.rsqrt(batch_stats[name]['var'] + EPSILON)
    conv = name.replace('norm', 'conv')
    folded[conv] = {'kernel': params[conv]['kernel'] * scaling}
    folded[name] = {'bias': own['bias'] - batch_stats[name]['mean'] * scaling}
  return folded
