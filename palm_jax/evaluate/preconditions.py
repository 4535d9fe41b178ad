"""What jobs that judge ask of the config and of the data."""

import pathlib
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from palm_jax.base.errors import UserError
from palm_jax.base.files import user_path
from palm_jax.data.arrays import Data
from palm_jax.job import Run


def check_single_pictures(config: ConfigDict, job: str) -> None:
  """Raises UserError where the encoder sees several pictures at once: a job shows it one.

  Also where there is no place for its features.
  """
  folder = user_path(config.features.folder or '.')
  if folder.exists() and not folder.is_dir():
    raise UserError(f'features.folder={folder} is no folder: name one, or leave it empty')
  stack = config.environment.stack
  if stack > 1:
    raise UserError(
      f'--job={job} shows single pictures, but environment.stack={stack} trains an encoder of '
      'several: judge a run with 1'
    )


def check_classes(this: Run, job: str) -> None:
  """Raises UserError where the data of a job that tells classes apart have only one."""
  if len(this.data.class_names) < 2:
    raise UserError(
      f'the job {job} tells classes apart, but {this.config.data.name} has one: leave it out of '
      'config.jobs, or label the pictures'
    )


def check_examples(this: Run, method: str) -> None:
  """Raises UserError where a class has fewer than two training images: one is held out."""
  names, labels = this.data.class_names, this.data.train.labels
  counts = np.bincount(labels, minlength=len(names))
  if counts.min() < 2:
    raise UserError(
      f'{this.config.data.name}: class {names[counts.argmin()]} has {counts.min()} training '
      f'image(s), but probe.methods={method} needs two of each: give more, or leave that class out'
    )


def check_generator(generator: Any, path: str | pathlib.Path, data: Data) -> None:
  """Raises UserError where the data are not of the generator's shape and classes.

  Args:
    generator: of palm_jax.generator.load_generator.
    path: where it came from.
  """
  shape, num_classes = data.train.images.shape[1:], len(data.class_names)
  if tuple(generator.image_shape) != shape or generator.num_classes not in (0, num_classes):
    raise UserError(
      f'the generator of {path} makes images of {tuple(generator.image_shape)} in '
      f'{generator.num_classes} classes, but the data are {shape} in {num_classes} '
      f'({data.source}): give the data it was trained on'
    )
