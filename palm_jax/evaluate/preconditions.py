"""What jobs that judge ask of the config and of the data."""

import pathlib
from collections.abc import Collection
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from palm_jax.base.errors import UserError
from palm_jax.base.files import user_path
from palm_jax.data.arrays import Data
from palm_jax.evaluate.labels import nested_rows
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


def check_features_file(config: ConfigDict) -> None:
  """Raises UserError where config.features.path names no file."""
  path = config.features.path
  if path and not user_path(path).is_file():
    raise UserError(f'features.path={path} is no file: give the .npz, or leave it empty')


def features_files(this: Run) -> list[pathlib.Path]:
  """The file of foreign features, if there is one, for `Job.reads_files`."""
  path = user_path(this.config.features.path or '.')
  return [path] if path.is_file() else []


def check_examples(this: Run, by_lbfgs: bool, validation: bool) -> None:
  """Raises UserError where a class has too few training images: what judges holds out one of each.

  Args:
    by_lbfgs: it chooses its penalty by one.
    validation: probe.split='validation' calls one of each a test image.
  """
  names, labels = this.data.class_names, this.data.train.labels
  counts, least = np.bincount(labels, minlength=len(names)), 1 + by_lbfgs + validation
  if counts.min() < least:
    why = 'probe.methods=lbfgs' if by_lbfgs else ''
    why += ' and ' if by_lbfgs and validation else ''
    why += "probe.split='validation'" if validation else ''
    raise UserError(
      f'{this.config.data.name}: class {names[counts.argmin()]} has {counts.min()} training '
      f'image(s), but {why} needs {least} of each: give more, or leave that class out'
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


def check_one_a_device(this: Run, share: float, methods: Collection[str]) -> None:
  """Raises UserError where a share of the labels leaves SGD less than one image a device."""
  count, devices = len(nested_rows(this.data.train.labels, share, (0,))), this.mesh.size
  if methods and count < devices:
    raise UserError(
      f'probe.label_fractions leave {count} images for {devices} devices, and {", ".join(methods)} '
      'need one a device: raise them, or take fewer devices'
    )
