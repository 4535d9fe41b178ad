"""What the rest of the package asks of a picture generator."""

from typing import Any, Protocol

import jax


class PictureGenerator(Protocol):
  """Any generator: StyleGAN2, a view of one (views.py), or another model of yours.

  Attributes:
    variables: pytree of arrays; a compiled function takes it as an argument of `apply`.
    z_dim: length of a latent. StyleGAN reads a latent's direction alone. A world's latents are
      shorter than standard normal ones: at alpha 0.5, beta 0.95 a tenth as long. A generator to
      which length matters should normalise them.
    num_classes: labels are below it; 0 is unconditional, and labels are then not read.
    image_shape: (H, W, C).
  """

  @property
  def variables(self) -> Any: ...

  @property
  def z_dim(self) -> int: ...

  @property
  def num_classes(self) -> int: ...

  @property
  def image_shape(self) -> tuple[int, int, int]: ...

  def apply(
    self,
    variables: Any,
    z: jax.Array,
    labels: jax.Array,
    truncation_psi: float | jax.Array = 1.0,
  ) -> jax.Array:
    """z (N, z_dim), labels (N,) int -> (N, H, W, C) images, nominally in [-1, 1]; pure."""
    ...
