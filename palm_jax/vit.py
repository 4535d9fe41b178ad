"""Vision transformers (Dosovitskiy et al., arXiv 2010.11929) of the sizes tiny and small."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from palm_jax.base.errors import UserError
from palm_jax.layers.convolution import flax_conv
from palm_jax.layers.pixels import preprocess

DEPTH = 12
HEADS = {'tiny': 3, 'small': 6}  # Touvron et al., arXiv 2012.12877, table 1
POOLS = 'token', 'mean'
EPSILON = 1e-6  # timm/models/vision_transformer.py
SMALL = nn.initializers.normal(0.02)  # the same; its truncation is at 100 standard deviations
PATCHES = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')  # torch's nn.Conv2d


def check_patches(shape: tuple[int, ...], patch: int) -> None:
  """Raises UserError where pictures of a shape (H, W, ...) are no whole number of patches."""
  height, width = shape[:2]
  if height % patch or width % patch:
    near = [n for n in range(1, min(height, width) + 1) if not (height % n or width % n)]
    best = min(near, key=lambda n: abs(n - patch))
    raise UserError(
      f'encoder.patch={patch} does not divide pictures of {height}x{width}: set it to {best}, for '
      'example'
    )


class Block(nn.Module):
  """Attention and a perceptron, each behind a LayerNorm and around a shortcut (pre-norm)."""

  heads: int
  dtype: Any = None

  @nn.compact
  def __call__(self, x, _):  # (B, N, D)
    batch, length, size = x.shape

    def dense(features, name):
      return nn.Dense(features, kernel_init=SMALL, dtype=self.dtype, name=name)

    y = layer_norm(self.dtype, 'norm1')(x)
    y = dense(3 * size, 'qkv')(y).reshape(batch, length, 3, self.heads, -1)
    y = attention(y[:, :, 0], y[:, :, 1], y[:, :, 2])
    x = x + dense(size, 'proj')(y.reshape(x.shape))
    y = dense(4 * size, 'fc1')(layer_norm(self.dtype, 'norm2')(x))
    x = x + dense(size, 'fc2')(nn.gelu(y, approximate=False))
    return x, None


def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """softmax(q k / sqrt(d)) v for (B, N, heads, d) each; logits and shares are at least float32.

  jax.nn.dot_product_attention would round the shares of float64 to float32.
  """
  wide = jnp.promote_types(q.dtype, jnp.float32)
  logits = jnp.einsum('bqhd,bkhd->bhqk', q, k, preferred_element_type=wide)
  shares = jax.nn.softmax(logits * q.shape[-1] ** -0.5, axis=-1).astype(v.dtype)
  return jnp.einsum('bhqk,bkhd->bqhd', shares, v)


def layer_norm(dtype, name):
  """LayerNorm of the last axis, by two passes over it: one loses digits of the variance."""
  return nn.LayerNorm(EPSILON, dtype=dtype, use_fast_variance=False, name=name)


class ViT(nn.Module):
  """12 pre-norm blocks over patches with learned positions; no dropout and no batch statistics.

  Source: timm's vit_tiny_patch16_224 and vit_small_patch16_224 without head, which at width 64,
  patch 16 and 224x224x3 have 5,524,416 and 21,665,664 parameters. Those of the blocks are stacked:
  their loop is compiled once. Positions are of one picture size, so that the network is, too.

  Attributes:
    heads: of the attention.
    width: channels of a head; D = heads * width.
    patch: side of a patch in pixels.
    pool: 'token': a class token is read; 'mean': the mean of the patches is, then normalised
      (timm: class_token=False, global_pool='avg').
    dtype: compute type; None follows parameters and input.
  """

  heads: int
  width: int = 64
  patch: int = 4
  pool: str = 'token'
  dtype: Any = None

  @nn.compact
  def __call__(self, images, train: bool):
    """images (B, H, W, C), uint8 or floats in [-1, 1] -> (B, D), at least float32.

    Patches are in rows from the top left, the class token before them.

    Raises:
      UserError: a patch that does not divide H and W.
    """
    del train  # all encoders are called alike
    check_patches(images.shape[1:], self.patch)
    size, side = self.heads * self.width, (self.patch, self.patch)
    x = nn.Conv(
      size,
      side,
      side,
      padding='VALID',
      kernel_init=PATCHES,
      dtype=self.dtype,
      conv_general_dilated=flax_conv,
      name='patch',
    )(preprocess(images, self.dtype))
    x = x.reshape(len(x), -1, size)  # (B, N, D)
    if self.pool == 'token':
      token = self.param('class_token', nn.initializers.normal(1e-6), (1, 1, size))
      x = jnp.concatenate([jnp.broadcast_to(token, (len(x), 1, size)).astype(x.dtype), x], axis=1)
    x += self.param('position', SMALL, (1, *x.shape[1:])).astype(x.dtype)
    blocks = nn.scan(Block, variable_axes={'params': 0}, split_rngs={'params': True}, length=DEPTH)
    x, _ = blocks(heads=self.heads, dtype=self.dtype, name='blocks')(x, None)
    x = x[:, 0] if self.pool == 'token' else x.mean(axis=1)
    x = layer_norm(self.dtype, 'norm')(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
