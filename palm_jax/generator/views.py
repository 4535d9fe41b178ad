"""Other doors to a generator, with its own protocol: latents in W, vectors in place of classes,
pictures without a margin."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from palm_jax.base.errors import UserError


@dataclasses.dataclass(frozen=True)
class WLatents:
  """A StyleGAN2 whose latents are whitened coordinates of W: w = mean of the class + root of the
  covariance, times z.

  Standard normal z has the mean of each class and the covariance within classes that mapped latents
  have, so a world of unit-scaled latents and actions is as wide as W is. Made by `w_latents`.
  """

  generator: Any
  variables: Any  # {'generator', 'mean' (K, w_dim), 'root' (w_dim, w_dim)}

  @property
  def z_dim(self):
    return self.generator.network.w_dim

  @property
  def num_classes(self):
    return self.generator.num_classes

  @property
  def image_shape(self):
    return self.generator.image_shape

  def apply(self, variables, z, labels, truncation_psi=1.0):
    """z (N, w_dim), labels (N,) int -> (N, H, W, C) images; truncation pulls towards w_avg, as in
    Z."""
    w_avg = variables['generator']['buffers']['w_avg']
    w = (
      variables['mean'][labels if self.num_classes else jnp.zeros(len(z), jnp.int32)]
      + z @ variables['root'].T
    )
    w = w_avg + truncation_psi * (w - w_avg)
    network = self.generator.network
    return network.apply(
      variables['generator'], jnp.repeat(w[:, None], network.num_ws, 1), method='synthesis'
    )


def w_latents(generator, samples=10_000, seed=0):
  """`WLatents` of a LoadedGenerator, measured on `samples` mapped latents of equally many of each
  class.

  Raises:
    UserError: fewer samples than dimensions of W.
  """
  network = generator.network
  if samples <= network.w_dim:
    raise UserError(f'{samples} samples do not span the {network.w_dim} dimensions of W: take more')
  count = max(generator.num_classes, 1)
  labels = jnp.arange(samples) % count
  z = jax.random.normal(jax.random.key(seed), (samples, generator.z_dim))
  map_all = jax.jit(functools.partial(network.apply, method='mapping'))
  w = np.asarray(map_all(generator.variables, z, labels)[:, 0], np.float64)
  mean = np.stack([w[np.asarray(labels) == k].mean(0) for k in range(count)])
  within = w - mean[np.asarray(labels)]
  values, vectors = np.linalg.eigh(within.T @ within / (samples - count))
  root = (
    vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
  )  # the symmetric root: coordinates keep W's axes
  variables = dict(
    generator=generator.variables, mean=mean.astype(np.float32), root=root.astype(np.float32)
  )
  return WLatents(generator, variables)


@dataclasses.dataclass(frozen=True)
class Prompts:
  """A generator that is told what to draw by vectors: class k of the world is row k of a bank of
  embeddings.

  The inner generator's protocol is this one's, with labels (N, D) float in place of (N,) int: text
  embeddings, mixtures of classes (StyleGAN2 takes weights of its classes), or anything that it was
  trained on.
  """

  generator: Any
  variables: Any  # {'generator', 'prompts' (K, D)}

  @property
  def z_dim(self):
    return self.generator.z_dim

  @property
  def num_classes(self):
    return len(self.variables['prompts'])

  @property
  def image_shape(self):
    return self.generator.image_shape

  def apply(self, variables, z, labels, truncation_psi=1.0):
    """z (N, z_dim), labels (N,) int -> (N, H, W, C) images."""
    return self.generator.apply(
      variables['generator'], z, variables['prompts'][labels], truncation_psi
    )


def prompts(generator, embeddings):
  """`Prompts` of a generator and embeddings (K, D).

  Raises:
    UserError: embeddings that are not a finite matrix of one row or more.
  """
  embeddings = np.asarray(embeddings, np.float32)
  if embeddings.ndim != 2 or not embeddings.size or not np.isfinite(embeddings).all():
    raise UserError(
      f'prompts are {embeddings.shape}, expected finite embeddings of shape (K, D), one row a '
      'prompt'
    )
  return Prompts(generator, dict(generator=generator.variables, prompts=embeddings))


@dataclasses.dataclass(frozen=True)
class Cropped:
  """A generator's pictures without the margin that they were trained with (generator.pad)."""

  generator: Any
  margin: int

  @property
  def variables(self):
    return self.generator.variables

  @property
  def z_dim(self):
    return self.generator.z_dim

  @property
  def num_classes(self):
    return self.generator.num_classes

  @property
  def image_shape(self):
    height, width, channels = self.generator.image_shape
    return height - 2 * self.margin, width - 2 * self.margin, channels

  def apply(self, variables, z, labels, truncation_psi=1.0):
    """z (N, z_dim), labels (N,) int -> (N, H, W, C) images."""
    images = self.generator.apply(variables, z, labels, truncation_psi=truncation_psi)
    return images[:, self.margin : -self.margin, self.margin : -self.margin]


def cropped(generator, margin):
  """`Cropped` of a generator and a positive margin in pixels.

  Raises:
    UserError: a margin that is negative, or leaves nothing.
  """
  if not 0 < margin < min(generator.image_shape[:2]) / 2:
    raise UserError(
      f'environment.crop={margin} of pictures of '
      f'{generator.image_shape[0]}x{generator.image_shape[1]}: expected '
      'the margin that generator.pad added, and a picture within it'
    )
  return Cropped(generator, margin)
