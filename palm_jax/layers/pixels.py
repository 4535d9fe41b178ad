"""Pictures as bytes, and bytes as what networks see."""

from typing import Any

import jax
import jax.numpy as jnp

from palm_jax.base.errors import UserError


def to_uint8(images: jax.Array) -> jax.Array:
  """Images of nominal range [-1, 1] to uint8: clip(x * 127.5 + 128, 0, 255), truncated.

  Source: the tools of stylegan2-ada-pytorch.
  """
  return jnp.clip(images * 127.5 + 128, 0, 255).astype(jnp.uint8)


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
