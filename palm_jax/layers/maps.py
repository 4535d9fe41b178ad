"""An encoder's last feature maps, for those who ask."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from palm_jax.base.errors import UserError


def show_maps(module: nn.Module, maps: jax.Array) -> None:
  """Called by an encoder: its last maps (B, h, w, F), none negative."""
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
    raise UserError(
      f'the encoder {type(network).__name__} has no feature maps without negative values: take a '
      'ResNet'
    )
  return shown['intermediates']['maps'][0].astype(jnp.float32)
