"""What an agent or a task sees of a picture: an encoder's features."""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax.errors import ScopeParamShapeError
from ml_collections import ConfigDict

from palm_jax import encoder as encoders
from palm_jax.base import devices
from palm_jax.base.errors import UserError
from palm_jax.base.steps import one_line
from palm_jax.checkpoint import load_encoder

WIDTH = 16  # of the random encoder


@dataclasses.dataclass(frozen=True, eq=False)
class Features:
  """A frozen function of pictures.

  Attributes:
    apply: (variables, pictures (E, H, W, C) uint8) -> (E, F) floats.
    variables: of it.
    size: F.
  """

  apply: Callable[[Any, jax.Array], jax.Array]
  variables: Any = dataclasses.field(repr=False)
  size: int


def check_features(features: Features, image_shape: tuple[int, int, int]) -> None:
  """Raises UserError where features do not see pictures (H, W, C), or have another size."""
  picture = jax.ShapeDtypeStruct((1, *image_shape), jnp.uint8)
  try:
    found = jax.eval_shape(features.apply, features.variables, picture).shape
  except (TypeError, ValueError, ScopeParamShapeError) as e:
    raise UserError(
      f'the features do not see pictures of {image_shape} ({one_line(e)}): give some that do'
    ) from e
  if found != (1, features.size):
    raise UserError(
      f'features of shape {found} of one picture of {image_shape}: expected (1, {features.size}), '
      f'as their size is {features.size}'
    )


def pretrained(
  workdir: str | os.PathLike, image_shape: tuple[int, int, int], step: int | None = None
) -> Features:
  """The encoder that a run has pretrained, at its newest checkpoint or another.

  Raises:
    UserError: no or damaged config or checkpoint, or an encoder of other pictures.
  """
  config, variables, _ = load_encoder(str(workdir), step)
  network = encoders.make_encoder(ConfigDict(config['encoder']))
  try:
    return _of(network, variables, image_shape)
  except (TypeError, ValueError, ScopeParamShapeError) as e:
    raise UserError(
      f'the encoder of {workdir} does not see pictures of {image_shape}: give one that was '
      'pretrained on such'
    ) from e


def at_random(image_shape: tuple[int, int, int], seed: int = 0) -> Features:
  """A ResNet-18 of 16 channels with random weights, the same for a seed and shape."""
  config = encoders.default_config()
  config.width = WIDTH
  network = encoders.make_encoder(config)
  pictures = jnp.zeros((1, *image_shape), jnp.uint8)
  init = devices.jit_once(lambda key: network.init(key, pictures, train=False))
  variables = init(jax.random.key(seed))
  return _of(network, variables, image_shape)


def _of(network, variables, image_shape):
  apply = lambda variables, pictures: network.apply(variables, pictures, train=False)
  size = jax.eval_shape(apply, variables, jnp.zeros((1, *image_shape), jnp.uint8)).shape[-1]
  return Features(apply, variables, size)
