"""A generator of ours with its weights, ready to be called."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from palm_jax.base.errors import UserError
from palm_jax.generator.sines import SirenGenerator
from palm_jax.generator.stylegan2 import Generator
from palm_jax.generator.stylegan3 import StyleGAN3

MAX_SIDE = 4096


@dataclasses.dataclass(frozen=True)
class LoadedGenerator:
  """A network with its variables, a `PictureGenerator`.

  `apply` is pure, so that variables can be arguments of a compiled function.

  Precision is the caller's: accelerators multiply float32 in fewer bits unless the call is compiled
  within `jax.default_matmul_precision('highest')`, with which images agree with the original's to
  1e-5 of their range.
  """

  network: Generator | StyleGAN3 | SirenGenerator
  variables: Any  # {'params', 'buffers'}

  @property
  def z_dim(self) -> int:
    return self.network.z_dim

  @property
  def num_classes(self) -> int:
    return self.network.num_classes

  @property
  def image_shape(self) -> tuple[int, int, int]:
    return self.network.image_shape

  def with_dtype(self, dtype: Any) -> 'LoadedGenerator':
    """The same generator with convolutions computed in `dtype`; None is that of the variables."""
    return dataclasses.replace(self, network=self.network.clone(dtype=dtype))

  def prepared(self, variables: Any) -> Any:
    """Variables of which `apply` draws the same with less work, for loops of many draws."""
    network = self.network
    return network.prepared(variables) if isinstance(network, Generator) else variables

  def apply(
    self,
    variables: Any,
    z: jax.Array,
    labels: jax.Array,
    truncation_psi: float | jax.Array = 1.0,
    truncation_cutoff: int | jax.Array | None = None,
    noise: str = 'const',
    noise_keys: jax.Array | None = None,
    size: int | None = None,
  ) -> jax.Array:
    """Pictures of latents: (N, H, W, C), nominally in [-1, 1], at least float32.

    Args:
      variables: as `self.variables`.
      z: (N, z_dim) floats.
      labels: (N,) integers, or (N, num_classes) vectors.
      truncation_psi, truncation_cutoff: of `Generator.mapping`.
      noise, noise_keys: of `Generator.synthesis`.
      size: side of the pictures in pixels, which a network of sines can be asked for.

    Raises:
      UserError: inputs of other shapes or types, and, outside of compiled functions, labels that
        are no class; a size of a network that has one size.
    """
    self._check_inputs(z, labels, truncation_cutoff)
    options = {}
    if size is not None:
      if not isinstance(self.network, SirenGenerator) or not 1 <= size <= MAX_SIDE:
        raise UserError(
          f'size={size}: only networks of sines (generator.network=siren) draw at any size, from 1 '
          f'to {MAX_SIDE}; leave it out'
        )
      options['size'] = size
    images: Any = self.network.apply(
      variables, z, labels, truncation_psi, truncation_cutoff, noise, noise_keys, **options
    )
    return images

  def __call__(
    self,
    z: jax.Array,
    labels: jax.Array,
    truncation_psi: float | jax.Array = 1.0,
    truncation_cutoff: int | jax.Array | None = None,
    noise: str = 'const',
    noise_keys: jax.Array | None = None,
    size: int | None = None,
  ) -> jax.Array:
    """`apply` with its own variables."""
    return self.apply(
      self.variables, z, labels, truncation_psi, truncation_cutoff, noise, noise_keys, size
    )

  def _check_inputs(self, z, labels, truncation_cutoff):
    if not _is_array(z, jnp.floating) or z.shape != (len(z), self.z_dim):
      raise UserError(
        f'z is {_described(z)}, expected floating-point numbers of shape (N, {self.z_dim})'
      )
    cutoff = truncation_cutoff
    if cutoff is not None and _is_known(cutoff) and not cutoff >= 0:
      raise UserError(f'truncation_cutoff={cutoff}, expected a number of layers, or None for all')
    count = len(z)
    num_classes = self.num_classes
    if not num_classes:
      return
    if _is_array(labels, jnp.number) and labels.shape == (count, num_classes):
      return
    if not _is_array(labels, jnp.integer) or labels.shape != (count,):
      raise UserError(
        f'labels are {_described(labels)}, expected integers of shape ({count},), or vectors of '
        f'shape ({count}, {num_classes})'
      )
    if _is_known(labels):
      known = np.asarray(labels)
      for i in np.flatnonzero((known < 0) | (known >= num_classes)):
        raise UserError(f'labels[{i}] is {known[i]}, expected 0 to {num_classes - 1}')


def _is_known(x):
  """Whether its numbers can be looked at: not inside a compiled function."""
  return not isinstance(x, Tracer)


def _is_array(x, kind):
  return isinstance(x, np.ndarray | jax.Array) and x.ndim > 0 and jnp.issubdtype(x.dtype, kind)


def _described(x):
  if isinstance(x, np.ndarray | jax.Array):
    return f'{x.dtype} of shape {x.shape}'
  return f'a {type(x).__name__}'
