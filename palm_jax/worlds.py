"""The world that a config describes: its generator and dynamics, on the devices."""

import pathlib
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from palm_jax import environment, material, pairs
from palm_jax.base import devices
from palm_jax.base.errors import NonFiniteError
from palm_jax.base.files import user_path
from palm_jax.data.arrays import Data
from palm_jax.generator import load_generator
from palm_jax.generator.views import viewed, with_dtype
from palm_jax.rollout import DTYPES, World

PROBED = 8  # pictures


def load_world_generator(config: ConfigDict, workdir: pathlib.Path) -> Any:
  """The generator of config.generator.path, or the workdir's own, as config.environment wants it.

  Raises:
    UserError: none there, a damaged one, or one whose pictures the crop leaves nothing of.
  """
  path = user_path(config.generator.path or workdir)
  generator = load_generator(config.generator.path or workdir)
  is_run = (path / 'config.json').exists() and (path / 'generator').exists()
  if is_run and not (path / 'results' / 'generator.json').exists():
    logging.warning(
      'the generator of %s is not complete: if it trains on, this run continues in another world',
      path,
    )
  return as_world(config, with_dtype(generator, DTYPES[config.pretrain.dtype]))


def as_world(config: ConfigDict, generator: Any) -> Any:
  """The generator with the latents and without the margin that config.environment names.

  Raises:
    UserError: the crop leaves nothing.
  """
  e = config.environment
  return viewed(generator, e.latent_space, e.style_mixing, e.crop)


def check_pictures(config: ConfigDict, generator: Any) -> None:
  """Raises NonFiniteError where a few random pictures of the world are not finite.

  As bytes they would look like any others.
  """
  num_classes = generator.num_classes
  z = np.random.default_rng(0).standard_normal((PROBED, generator.z_dim), np.float32)
  labels = np.arange(PROBED, dtype=np.int32) % max(1, num_classes)
  psi = config.environment.truncation_psi
  images = jax.jit(lambda v: generator.apply(v, z, labels, truncation_psi=psi))(generator.variables)
  bad = ~np.isfinite(np.asarray(images, np.float32)).reshape(PROBED, -1).all(1)
  if bad.any():
    dtype = config.pretrain.dtype
    remedy = '' if dtype == 'float32' else ', or set pretrain.dtype=float32'
    raise NonFiniteError(
      f'the generator of {config.generator.path or "this workdir"} draws NaN or infinity in '
      f'{bad.sum()} of {PROBED} pictures (pretrain.dtype={dtype}): give another with '
      f'--config.generator.path{remedy}'
    )


def seen_shape(config: ConfigDict, generator: Any) -> tuple[int, int, int]:
  """(H, W, C) of what agent and encoder see: the generator's picture, or several as channels."""
  height, width, channels = generator.image_shape
  return height, width, channels * config.environment.stack


def make_world(config: ConfigDict, generator: Any, mesh: Mesh, data: Data | None = None) -> World:
  """World on the mesh; data are for pairs of real images. Raises UserError, see material.load."""
  needs = pairs.SOURCES[config.pairs.source].needs
  world = devices.replicate(mesh, host_world(config, generator))
  return world._replace(material=material.load(config, needs, generator, mesh, data))


def host_world(config: ConfigDict, generator: Any) -> World:
  """World in the host's memory, without the material of its pairs."""
  dynamics = environment.Dynamics(
    alpha=np.float32(config.environment.alpha),
    beta=np.float32(config.environment.beta),
    kind=config.environment.dynamics,
    start=config.environment.start,
  )
  return World(variables=generator.variables, dynamics=dynamics)
