"""Other views of a generator, each a `PictureGenerator` itself.

Latents in W, vectors in place of classes, pictures without a margin.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from palm_jax.base.errors import UserError
from palm_jax.generator.loaded import LoadedGenerator
from palm_jax.generator.protocol import PictureGenerator

OF_STYLES = 'mapping', 'synthesis', 'w_dim', 'num_ws'  # what StyleGAN's networks have


def prepared(generator: PictureGenerator, variables: Any) -> Any:
  """Variables of which it draws the same with less work; as they are where it knows none."""
  own = getattr(generator, 'prepared', None)
  return variables if own is None else own(variables)


def with_dtype(generator: Any, dtype: Any) -> Any:
  """The generator whose networks compute in `dtype`; itself where it knows only its own."""
  own = getattr(generator, 'with_dtype', None)
  return generator if own is None else own(dtype)


@dataclasses.dataclass(frozen=True)
class _MoreVariables:
  """A view with variables beside those of the generator within: {'generator', ...}."""

  generator: Any
  variables: Any

  @property
  def image_shape(self) -> tuple[int, int, int]:
    return self.generator.image_shape

  def prepared(self, variables: Any) -> Any:
    """As of the inner generator."""
    return dict(variables, generator=prepared(self.generator, variables['generator']))

  def with_dtype(self, dtype: Any) -> Any:
    """With that of the inner generator."""
    return dataclasses.replace(self, generator=with_dtype(self.generator, dtype))


@dataclasses.dataclass(frozen=True)
class WLatents(_MoreVariables):
  """A StyleGAN2 whose latents are whitened coordinates of W.

  w = mean of the class + root of the covariance, times z.

  Standard normal z has the mean of each class and the covariance within classes that mapped latents
  have, so a world of unit-scaled latents and actions is as wide as W is. Made by `w_latents`.
  """

  generator: LoadedGenerator
  variables: Any  # {'generator', 'mean' (K, w_dim), 'root' (w_dim, w_dim)}

  @property
  def z_dim(self) -> int:
    return self.generator.network.w_dim

  @property
  def num_classes(self) -> int:
    return self.generator.num_classes

  def apply(
    self,
    variables: Any,
    z: jax.Array,
    labels: jax.Array,
    truncation_psi: float | jax.Array = 1.0,
  ) -> jax.Array:
    """z (N, w_dim), labels (N,) int -> (N, H, W, C) images.

    Truncation pulls towards w_avg, as in Z.
    """
    network = self.generator.network
    w_avg = variables['generator']['buffers']['w_avg']
    if not self.num_classes:
      labels = jnp.zeros(len(z), jnp.int32)
    if w_avg.ndim == 2:
      w_avg = w_avg[labels]
    w = variables['mean'][labels] + z @ variables['root'].T
    w = w_avg + truncation_psi * (w - w_avg)
    ws = jnp.repeat(w[:, None], network.num_ws, 1)
    images: Any = network.apply(variables['generator'], ws, method='synthesis')
    return images


def w_latents(generator: LoadedGenerator, samples: int = 10_000, seed: int = 0) -> WLatents:
  """`WLatents` of a generator, measured on `samples` mapped latents, equally many of each class.

  Raises:
    UserError: fewer samples than dimensions of W.
  """
  network = generator.network
  if samples <= network.w_dim:
    raise UserError(f'{samples} samples do not span the {network.w_dim} dimensions of W: take more')
  count = max(generator.num_classes, 1)
  samples = max(samples, 10 * count)  # each class has a mean
  labels = jnp.arange(samples) % count
  z = jax.random.normal(jax.random.key(seed), (samples, generator.z_dim))
  map_all = jax.jit(functools.partial(network.apply, method='mapping'))
  with jax.default_matmul_precision('highest'):  # nearly the same on all kinds of devices
    w = np.asarray(map_all(generator.variables, z, labels)[:, 0], np.float64)
  mean = np.stack([w[np.asarray(labels) == k].mean(0) for k in range(count)])
  within = w - mean[np.asarray(labels)]
  values, vectors = np.linalg.eigh(within.T @ within / (samples - count))
  # The symmetric root: coordinates keep W's axes.
  root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
  variables = dict(
    generator=generator.variables, mean=mean.astype(np.float32), root=root.astype(np.float32)
  )
  return WLatents(generator, variables)


@dataclasses.dataclass(frozen=True)
class Prompts(_MoreVariables):
  """A generator that is told by vectors what to draw.

  Class k of the world is row k of a bank of embeddings. The inner generator has the same protocol,
  but takes labels (N, D) float: text embeddings, mixtures of classes (StyleGAN2 takes weights of
  its classes), or anything else that it was trained on.
  """

  generator: PictureGenerator
  variables: Any  # {'generator', 'prompts' (K, D)}

  @property
  def z_dim(self) -> int:
    return self.generator.z_dim

  @property
  def num_classes(self) -> int:
    return len(self.variables['prompts'])

  def apply(
    self,
    variables: Any,
    z: jax.Array,
    labels: jax.Array,
    truncation_psi: float | jax.Array = 1.0,
  ) -> jax.Array:
    """z (N, z_dim), labels (N,) int -> (N, H, W, C) images."""
    return self.generator.apply(
      variables['generator'], z, variables['prompts'][labels], truncation_psi
    )


def prompts(generator: PictureGenerator, embeddings: np.ndarray) -> Prompts:
  """`Prompts` of a generator and embeddings (K, D).

  Raises:
    UserError: embeddings that are not a finite matrix of one row or more; a generator without
      classes.
  """
  if not generator.num_classes:
    raise UserError('the generator has no classes: nothing in it would read the prompts')
  embeddings = np.asarray(embeddings, np.float32)
  if embeddings.ndim != 2 or not embeddings.size or not np.isfinite(embeddings).all():
    raise UserError(
      f'prompts are {embeddings.shape}, expected finite embeddings of shape (K, D), one row for '
      'each prompt'
    )
  return Prompts(generator, dict(generator=generator.variables, prompts=embeddings))


@dataclasses.dataclass(frozen=True)
class _SameVariables:
  """A view that draws other pictures with what the inner generator has."""

  generator: PictureGenerator

  @property
  def variables(self) -> Any:
    return self.generator.variables

  @property
  def z_dim(self) -> int:
    return self.generator.z_dim

  @property
  def num_classes(self) -> int:
    return self.generator.num_classes

  @property
  def image_shape(self) -> tuple[int, int, int]:
    return self.generator.image_shape

  @property
  def changes(self) -> dict[str, Any]:
    """What this view, and those within it, are beside their variables."""
    own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != 'generator'}
    return {**own, **getattr(self.generator, 'changes', {})}

  def prepared(self, variables: Any) -> Any:
    """As of the inner generator."""
    return prepared(self.generator, variables)

  def with_dtype(self, dtype: Any) -> Any:
    """With that of the inner generator."""
    return dataclasses.replace(self, generator=with_dtype(self.generator, dtype))


@dataclasses.dataclass(frozen=True)
class Cropped(_SameVariables):
  """A generator's pictures without the margin that they were trained with (generator.pad)."""

  margin: int

  @property
  def image_shape(self) -> tuple[int, int, int]:
    height, width, channels = self.generator.image_shape
    return height - 2 * self.margin, width - 2 * self.margin, channels

  def apply(
    self,
    variables: Any,
    z: jax.Array,
    labels: jax.Array,
    truncation_psi: float | jax.Array = 1.0,
  ) -> jax.Array:
    """z (N, z_dim), labels (N,) int -> (N, H, W, C) images."""
    images = self.generator.apply(variables, z, labels, truncation_psi=truncation_psi)
    return images[:, self.margin : -self.margin, self.margin : -self.margin]


def cropped(generator: PictureGenerator, margin: int) -> Cropped:
  """`Cropped` of a generator and a positive margin in pixels.

  Raises:
    UserError: a margin that is negative, or leaves nothing.
  """
  height, width, _ = generator.image_shape
  if not 0 < margin < min(height, width) / 2:
    raise UserError(
      f'environment.crop={margin} of pictures of {height}x{width}: expected the margin that '
      'generator.pad added, and a picture within it'
    )
  return Cropped(generator, margin)


@dataclasses.dataclass(frozen=True)
class StyleMixed(_SameVariables):
  """A StyleGAN2 whose fine layers take the style of another latent of the same class.

  Which other one follows from the latent's own bits, so a picture is still a function of its
  latent, while the latents of consecutive frames, close or not, have independent fine styles: two
  frames share what the coarse layers draw, and differ in colour and texture. Style mixing is of
  arXiv 1812.04948, section 3.1. Made by `style_mixed`.
  """

  generator: LoadedGenerator
  first: int

  def apply(
    self,
    variables: Any,
    z: jax.Array,
    labels: jax.Array,
    truncation_psi: float | jax.Array = 1.0,
  ) -> jax.Array:
    """z (N, z_dim), labels (N,) int -> (N, H, W, C) images."""
    network = self.generator.network
    both = jnp.concatenate([z, jax.vmap(_another_latent)(z)])
    classes = jnp.tile(labels, 2) if self.num_classes else None
    mapping = functools.partial(network.apply, variables, method='mapping')
    ws: Any = mapping(both, classes, truncation_psi=truncation_psi)
    coarse, fine = jnp.split(ws, 2)
    ws = jnp.where(jnp.arange(network.num_ws)[:, None] < self.first, coarse, fine)
    images: Any = network.apply(variables, ws, method='synthesis')
    return images


def _another_latent(z):
  """Standard normal (z_dim,), of a key that is made of the first bits of z."""
  bits = jax.lax.bitcast_convert_type(z.astype(jnp.float32), jnp.uint32)
  key = jax.random.wrap_key_data(jnp.resize(bits[:2], (2,)), impl='threefry2x32')
  return jax.random.normal(key, z.shape, z.dtype)


def style_mixed(generator: LoadedGenerator, first: int) -> StyleMixed:
  """`StyleMixed` of a generator, from the first layer on that takes the other style.

  Raises:
    UserError: a layer that the generator does not have.
  """
  layers = generator.network.num_ws
  if not 0 < first < layers:
    raise UserError(
      f'environment.style_mixing={first}: expected one of 1 to {layers - 1}, the first layer of '
      'the generator whose style is drawn anew, or 0 for none'
    )
  return StyleMixed(generator, first)


def viewed(
  generator: Any, latent_space: str = 'z', style_mixing: int = 0, crop: int = 0
) -> PictureGenerator:
  """The generator as the settings of config.environment with these names want it.

  Raises:
    UserError: a generator without styles where they are wanted, a layer that it does not have, or a
      crop that leaves nothing.
  """
  network = getattr(generator, 'network', None)
  if (latent_space == 'w' or style_mixing) and not all(hasattr(network, x) for x in OF_STYLES):
    wanted = f'style_mixing={style_mixing}' if style_mixing else f'latent_space={latent_space!r}'
    raise UserError(
      f'environment.{wanted} of a {type(generator).__name__}, which has no network with '
      f'{", ".join(OF_STYLES)}: give a StyleGAN, or leave that setting out'
    )
  if latent_space == 'w':
    generator = w_latents(generator)
  if style_mixing:
    generator = style_mixed(generator, style_mixing)
  return cropped(generator, crop) if crop else generator
