"""Pictures as bytes."""

import jax
import jax.numpy as jnp


def to_uint8(images: jax.Array) -> jax.Array:
  """Images of nominal range [-1, 1] to uint8: clip(x * 127.5 + 128, 0, 255), truncated.

  Source: the tools of stylegan2-ada-pytorch.
  """
  return jnp.clip(images * 127.5 + 128, 0, 255).astype(jnp.uint8)
