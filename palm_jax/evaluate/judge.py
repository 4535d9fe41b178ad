"""Judges features by the labels they hold: by each method one row of the job probe's results."""

import time
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from palm_jax.base.errors import UserError
from palm_jax.data.arrays import Split
from palm_jax.evaluate import classifier, features, knn, linear, sgd
from palm_jax.evaluate.features import Encoder
from palm_jax.evaluate.labels import Task
from palm_jax.job import Run


class Source(NamedTuple):
  """Features of all images, by one function."""

  name: str
  train: np.ndarray  # (N, F)
  tests: dict[str, np.ndarray]  # name of the test set ('clean', corruptions) -> (M, F)
  encoder: Encoder | None = None  # where it is one of ours


def cached(
  source: Source,
  task: Task,
  method: str,
  seed: int = 0,
  l2_grid: Iterable[float] = linear.L2_GRID,
  k: int = knn.K,
  temperature: float = knn.TEMPERATURE,
) -> dict[str, Any]:
  """One row of the results by a method on cached features, 'lbfgs' or 'knn'.

  Returns:
    What `scored` gives, and for lbfgs the report of `linear.logistic_regression`.

  Raises:
    UserError: features or labels that the method cannot take; the message begins with the name of
      the features.
  """
  started = time.perf_counter()
  try:
    train_x, train_y = linear.checked(source.train[task.rows], task.train_y, 'training')
    for test_h in source.tests.values():
      test_x, test_y = linear.checked(test_h, task.test_y, 'test')
      linear.check_widths(train_x, test_x)
      if test_y.max() >= task.num_classes:
        raise UserError(
          f'a test label is {test_y.max()}, expected labels below num_classes = {task.num_classes}'
        )
    if method == 'lbfgs':
      model, report = linear.logistic_regression(
        train_x, train_y, task.num_classes, l2_grid, seed=seed
      )
      accuracy = lambda h: linear.accuracy(model, h, test_y)
    else:
      report = dict(k=min(k, len(train_x)), temperature=float(temperature))
      accuracy = lambda h: knn.accuracy(train_x, train_y, h, test_y, k, temperature)
    shares = {name: accuracy(h) for name, h in source.tests.items()}
  except UserError as error:
    raise UserError(f'{source.name}: {error}') from None
  return scored(source.name, train_x.shape[1], task, method, shares, started, **report)


def for_share(c: ConfigDict, count: int, of: int) -> ConfigDict:
  """SGD's settings for `count` labels: about as many updates as with all, `of` of them."""
  steps = lambda n: max(n // c.batch_size, 1)  # an epoch's
  c = c.copy_and_resolve_references()
  c.epochs = round(c.epochs * steps(of) / steps(count))
  return c


def by_sgd(
  source: Source, task: Task, images: np.ndarray, config: ConfigDict, mesh: Mesh
) -> dict[str, Any]:
  """One row of the results by a head that SGD trains.

  Args:
    source: of one of our encoders.
    images: (N, H, W, C) uint8, the training images.
    config: the whole config; read are seed and probe.sgd.
    mesh: one-dimensional mesh, axis 'data'.
  """
  started, count = time.perf_counter(), len(task.train_y)
  c = for_share(config.probe.sgd, count, len(source.train))
  of: Any = source.train[task.rows]
  if c.augment != 'none':
    of = source.encoder, images[task.rows]
  name = f'probe: sgd, {source.name}'
  [head] = sgd.fit_heads(of, task.train_y, task.num_classes, c, [config.seed], mesh, name)
  shares = {test: linear.accuracy(head, h, task.test_y) for test, h in source.tests.items()}
  return scored(source.name, source.train.shape[1], task, 'sgd', shares, started)


def end_to_end(
  this: Run,
  method: str,
  pretrained: Encoder,
  task: Task,
  images: np.ndarray,
  tests: dict[str, np.ndarray],
) -> dict[str, Any]:
  """One row of the results by a classifier whose encoder is trained, too.

  Args:
    method: 'finetune' or 'supervised'.
    pretrained: where 'finetune' starts.
    images: (N, H, W, C) uint8, the training images.
    tests: {test set: its images}.
  """
  started, config = time.perf_counter(), this.config
  start = pretrained if method == 'finetune' else None
  name = f'{pretrained.name}, fine-tuned' if start else 'supervised from scratch'
  encoder, head = classifier.fit(
    config,
    for_share(config.probe[method], len(task.train_y), len(images)),
    Split(images[task.rows], task.train_y),
    task.num_classes,
    config.seed,
    this.mesh,
    this.workdir,
    method,
    start,
  )
  shares = {}
  for test, test_images in tests.items():
    h = features.extract(encoder.apply, test_images, config.features.batch_size, this.mesh)
    shares[test] = linear.accuracy(head, h, task.test_y)
  return scored(name, head.weight.shape[0], task, method, shares, started)


def scored(
  name: str,
  width: int,
  task: Task,
  method: str,
  shares: dict[str, float],
  started: float,
  **report: Any,
) -> dict[str, Any]:
  """A row: who was judged, on what, and how well.

  Args:
    name: of the features.
    width: F.
    shares: {test set: share of right answers}.
    started: time.perf_counter() then.
    report: further entries.

  Returns:
    All of it JSON: `accuracy` is the shares, `half_width` of the clean one's 95% Wilson interval.
  """
  return dict(
    features=name,
    F=int(width),
    method=method,
    labels=task.labels,
    num_classes=int(task.num_classes),
    fraction=task.fraction,
    draw=task.draw,
    n_train=len(task.train_y),
    n_test=len(task.test_y),
    accuracy=shares,
    half_width=wilson_half_width(shares['clean'], len(task.test_y)),
    seconds=time.perf_counter() - started,
    **report,
  )


def wilson_half_width(share: float, n: int) -> float:
  """Half the width of the 95% Wilson interval of a share observed in n independent trials."""
  z = 1.959964  # normal quantile at 0.975
  return float(z * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n))
