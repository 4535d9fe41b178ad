"""What a generator is judged by: Inception, a classifier trained here on the data, or pixels."""

import functools
import hashlib
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from palm_jax import encoder
from palm_jax.base import devices
from palm_jax.base.errors import UserError
from palm_jax.base.files import user_path
from palm_jax.data.arrays import Data
from palm_jax.evaluate import classifier, features, inception, linear


class Extractor(NamedTuple):
  """A feature function and where it comes from.

  Attributes:
    apply: (variables, images (B, H, W, C) uint8) -> (B, F).
    variables: on every device of the mesh.
    about: for the protocol.
    classify: features (B, F) -> logits (B, num_classes), where it knows the classes.
  """

  apply: Callable
  variables: Any
  about: dict[str, Any]
  classify: Callable[[np.ndarray], np.ndarray] | None = None

  def partial(self) -> jax.tree_util.Partial:
    """images (B, H, W, C) uint8 -> (B, F), as features.extract takes it."""
    return jax.tree_util.Partial(self.apply, self.variables)


def make_extractor(config: ConfigDict, workdir: pathlib.Path, data: Data, mesh: Mesh) -> Extractor:
  """The feature function that config.quality.features names; trains or reads the proxy."""
  c = config.quality
  if c.features == 'inception':
    about = dict(
      network='Inception-v3 2015-12-05, last pool',
      file=c.inception_path,
      sha256=hashlib.sha256(user_path(c.inception_path).read_bytes()).hexdigest(),
      resize='299x299, TensorFlow 1 bilinear',
    )
    variables = devices.replicate(mesh, inception.load(c.inception_path))
    return Extractor(inception.Inception().apply, variables, about)
  if c.features == 'proxy':
    return proxy(config, workdir, data, mesh)
  flatten = lambda _, images: images.reshape(len(images), -1) / 127.5 - 1
  return Extractor(flatten, {}, dict(network='none: pixels as features'))


def proxy(config: ConfigDict, workdir: pathlib.Path, data: Data, mesh: Mesh) -> Extractor:
  """A narrow ResNet-18 trained on the training images and labels, or read from the workdir.

  Raises:
    UserError: a data set of one class, or fewer images than devices.
    NonFiniteError: its training diverges.
  """
  c = config.quality
  if len(data.class_names) < 2:
    raise UserError(
      'quality.features=proxy learns from labels, but the data have one class: give the Inception '
      'file (quality.features=inception, quality.inception_path=...), or set quality.features to '
      "'pixels'"
    )
  narrow = ConfigDict(dict(encoder=encoder.default_config()))
  narrow.encoder.width = c.proxy_width
  settings = classifier.default_config()
  # Left, right and a few pixels mean nothing in photographs, but may in drawn signs.
  augment = 'shift_flip' if data.train.images.shape[-1] == 3 else 'none'
  settings.update(
    dict(
      lr=c.proxy_lr,
      weight_decay=c.proxy_weight_decay,
      batch_size=c.proxy_batch_size,
      epochs=c.proxy_epochs,
      warmup=0.2,
      augment=augment,
    )
  )
  trained, head = classifier.fit(
    narrow, settings, data.train, len(data.class_names), config.seed, mesh, workdir, 'proxy'
  )
  test_h = features.extract(trained.apply, data.test.images, c.batch_size, mesh)
  about = trained.about | dict(test_accuracy=linear.accuracy(head, test_h, data.test.labels))
  variables = devices.replicate(mesh, trained.apply.args[0])
  return Extractor(trained.apply.func, variables, about, functools.partial(linear.logits, head))
