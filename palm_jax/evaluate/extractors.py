"""What a generator is judged by: Inception, a classifier trained here on the data's own labels, or
pixels."""

import functools
import hashlib
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from palm_jax import encoder
from palm_jax.base import devices
from palm_jax.base.errors import UserError
from palm_jax.evaluate import classifier, features, inception, linear


class Extractor(NamedTuple):
  """A feature function and where it comes from."""

  apply: Callable  # (variables, images (B, H, W, C) uint8) -> (B, F)
  variables: Any  # on every device of the mesh
  about: dict  # for the protocol
  classify: Callable | None = (
    None  # features (B, F) -> logits (B, num_classes), where it knows the classes
  )


def make_extractor(config, workdir, data, mesh):
  """The feature function that config.quality.features names; trains or reads the proxy."""
  c = config.quality
  if c.features == 'inception':
    digest = hashlib.sha256(pathlib.Path(c.inception_path).read_bytes()).hexdigest()
    about = dict(
      network='Inception-v3 2015-12-05, last pool',
      file=c.inception_path,
      sha256=digest,
      resize='299x299, TensorFlow 1 bilinear',
    )
    return Extractor(
      inception.Inception().apply, devices.replicate(mesh, inception.load(c.inception_path)), about
    )
  if c.features == 'proxy':
    return proxy(config, workdir, data, mesh)
  flatten = lambda _, images: images.reshape(len(images), -1) / 127.5 - 1
  return Extractor(flatten, {}, dict(network='none: pixels as features'))


def proxy(config, workdir, data, mesh):
  """Extractor of a narrow ResNet-18 trained on the training images and labels, or read from the
  workdir: `classifier.fit`.

  Raises:
    UserError: a data set of one class, or fewer images than devices.
    NonFiniteError: its training diverges.
  """
  c = config.quality
  if len(data.class_names) < 2:
    raise UserError(
      'quality.features=proxy learns from labels, but the data have one class: give the Inception '
      'file '
      '(quality.features=inception, quality.inception_path=...), or set quality.features to '
      "'pixels'"
    )
  narrow = ConfigDict(dict(encoder=encoder.default_config()))
  narrow.encoder.width = c.proxy_width
  settings = classifier.default_config()
  # Left, right and a few pixels mean nothing in photographs, but may in drawn signs.
  settings.update(
    dict(
      lr=c.proxy_lr,
      weight_decay=c.proxy_weight_decay,
      batch_size=c.proxy_batch_size,
      epochs=c.proxy_epochs,
      warmup=0.2,
      augment='shift_flip' if data.train.images.shape[-1] == 3 else 'none',
    )
  )
  trained, head = classifier.fit(
    narrow, settings, data.train, len(data.class_names), config.seed, mesh, workdir, 'proxy'
  )
  predicted = linear.logits(
    head, features.extract(trained.apply, data.test.images, c.batch_size, mesh)
  ).argmax(1)
  about = trained.about | dict(test_accuracy=float(np.mean(predicted == data.test.labels)))
  variables = devices.replicate(mesh, trained.apply.args[0])
  return Extractor(trained.apply.func, variables, about, functools.partial(linear.logits, head))
