"""Linear softmax classifiers of cached features, and their fit by L-BFGS."""

import itertools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize
from absl import logging
from flax import struct

from palm_jax.base.errors import UserError
from palm_jax.evaluate.features import check_finite
from palm_jax.evaluate.labels import stratified_split

L2_GRID = tuple(10.0**e for e in range(-6, 3))
VALIDATION_FRACTION = 0.1
MAX_ITERATIONS = 200  # 10 to 90 were used in trials, see `_path`
GRADIENT_TOLERANCE = 1e-5
PULSE_SECONDS = 5.0
ENOUGH = 1e-4  # of the gradient: scikit-learn's LogisticRegression stops there


@struct.dataclass
class LinearModel:
  """A softmax classifier: logits = (x - mean) / scale @ weight + bias."""

  weight: np.ndarray  # (F, num_classes), on standardised features
  bias: np.ndarray  # (num_classes,)
  mean: np.ndarray  # (F,), of the training features
  scale: np.ndarray  # (F,), their standard deviation; 1 where a feature is constant


def plain_model(weight: np.ndarray, bias: np.ndarray) -> LinearModel:
  """The model with these weights on features as they are."""
  zeros = np.zeros(len(weight), np.float32)
  return LinearModel(weight, bias, zeros, zeros + 1)


def logits(model: LinearModel, x: np.ndarray) -> np.ndarray:
  """Logits (N, num_classes) float32 of features x (N, F)."""
  return (np.asarray(x, np.float32) - model.mean) / model.scale @ model.weight + model.bias


def accuracy(model: LinearModel, x: np.ndarray, y: np.ndarray) -> float:
  """Share of the rows of x (N, F) whose largest logit is at label y (N,)."""
  return float(np.mean(logits(model, x).argmax(1) == y))


def logistic_regression(
  train_x: np.ndarray,
  train_y: np.ndarray,
  num_classes: int,
  l2_grid: Iterable[float] = L2_GRID,
  max_iterations: int = MAX_ITERATIONS,
  seed: int = 0,
) -> tuple[LinearModel, dict[str, Any]]:
  """Multinomial logistic regression whose L2 strength is chosen without looking at any test data.

  Minimises mean cross-entropy + l2 / 2 * |weight|^2 (the bias is free) on features standardised by
  the mean and standard deviation of the rows fitted; scikit-learn's LogisticRegression(C) has the
  same minimum at C = 1 / (l2 * N). The grid is walked from strong to weak, each fit starting from
  the one before, on nine tenths of the rows; the l2 with the highest accuracy on the other tenth
  (the strongest of equals) is refitted on all rows.

  Args:
    train_x: (N, F) features.
    train_y: (N,) integer labels in [0, num_classes), each class at least twice.
    l2_grid: strengths to try, all positive.
    max_iterations: limit of L-BFGS iterations for each strength.
    seed: of the held-out tenth.

  Returns:
    The model refitted on all rows, and `l2`, `validation_accuracy`, `grid` (for each l2, from
    strong to weak, its validation accuracy, iterations and whether it converged), `iterations` and
    `converged` of the last fit, `n_fit`, `n_validation`.

  Raises:
    UserError: features that are not finite or do not match the labels, labels outside the range,
      fewer than two classes, a class with fewer than two examples, or an empty or non-positive
      grid.
  """
  x, y = checked(train_x, train_y, 'training')
  _check_classes(y, num_classes)
  grid = sorted((float(l2) for l2 in l2_grid), reverse=True)
  if not grid or not all(0 < l2 < np.inf for l2 in grid):
    raise UserError(f'l2_grid is {list(l2_grid)}, expected one or more positive finite numbers')

  fit, held_out = stratified_split(y, VALIDATION_FRACTION, seed)
  tried, models = [], []
  for model, iterations, converged in _path(x[fit], y[fit], num_classes, grid, max_iterations):
    tried.append(
      dict(
        l2=grid[len(tried)],
        validation_accuracy=accuracy(model, x[held_out], y[held_out]),
        iterations=iterations,
        converged=converged,
      )
    )
    models.append(model)
  # The first of the largest, so the strongest of equals.
  best = int(np.argmax([each['validation_accuracy'] for each in tried]))
  l2 = grid[best]
  [(model, iterations, converged)] = _path(
    x, y, num_classes, [l2], max_iterations, start=models[best]
  )
  return model, dict(
    l2=l2,
    validation_accuracy=tried[best]['validation_accuracy'],
    grid=tried,
    iterations=iterations,
    converged=converged,
    n_fit=len(fit),
    n_validation=len(held_out),
  )


def checked(features: np.ndarray, labels: np.ndarray, what: str) -> tuple[np.ndarray, np.ndarray]:
  """Features as (N, F) float32 and labels as (N,) int32.

  Raises:
    UserError: they do not match, or are not finite; `what` they are of begins the message.
  """
  features, labels = np.asarray(features, np.float32), np.asarray(labels)
  if features.ndim != 2 or labels.shape != features.shape[:1] or not features.size:
    raise UserError(
      f'{what} features are {features.shape} and labels {labels.shape}, '
      'expected (N, F) and (N,) with the same N of at least 1'
    )
  if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
    raise UserError(
      f'{what} labels are {labels.dtype} from {labels.min()}, expected integers from 0'
    )
  check_finite(features, f'{what} features', 'check the encoder that made them')
  return features, labels.astype(np.int32)


def check_widths(train: np.ndarray, test: np.ndarray) -> None:
  """Raises UserError unless two sets of features have the same width."""
  if train.shape[1] != test.shape[1]:
    raise UserError(
      f'training features have width {train.shape[1]} and test features {test.shape[1]}, '
      'expected the same: use one encoder for both'
    )


def _check_classes(labels, num_classes):
  if num_classes < 2:
    raise UserError(f'num_classes is {num_classes}, expected at least 2')
  if labels.max() >= num_classes:
    raise UserError(
      f'a training label is {labels.max()}, expected labels below num_classes = {num_classes}'
    )
  counts = np.bincount(labels, minlength=num_classes)
  if not counts.all():
    raise UserError(
      f'class {np.argmin(counts)} has no training example, expected all {num_classes} classes: '
      'give more labels or set num_classes'
    )


def _path(x, y, num_classes, l2_grid, max_iterations, start=None):
  """Yields (LinearModel, iterations, converged) for each l2, each fit starting from the one before.

  L-BFGS runs in the eigenbasis of the features' covariance, each direction scaled by the inverse
  root of Boehning's bound on its curvature, eigenvalue / 2 + l2. The minimum is the same; with
  correlated features, of which collapsed encoders are the extreme, and a weak l2, plain L-BFGS does
  not reach it within MAX_ITERATIONS.
  """
  mean = x.mean(0, dtype=np.float64)
  scale = x.std(0, dtype=np.float64)
  scale[scale <= 1e-6 * np.abs(mean)] = 1  # constant up to float32's rounding
  mean, scale = mean.astype(np.float32), scale.astype(np.float32)
  x = (x - mean) / scale
  eigenvalues, basis = np.linalg.eigh((x.T @ x / np.float32(len(x))).astype(np.float64))
  x = jax.device_put(x @ basis.astype(np.float32))
  y = jax.device_put(y)
  theta = np.zeros((len(basis) + 1, num_classes))  # rows of weights in the eigenbasis, and the bias
  if start is not None:
    theta = np.concatenate([basis.T @ start.weight, start.bias[None]])
  for l2 in l2_grid:
    scaling = np.append(1 / np.sqrt(np.maximum(eigenvalues, 0) / 2 + l2), 1)[:, None]
    theta, iterations, converged = _minimise(x, y, theta, scaling, l2, max_iterations)
    weight, bias = (basis @ theta[:-1]).astype(np.float32), theta[-1].astype(np.float32)
    yield LinearModel(weight, bias, mean, scale), iterations, converged


def _minimise(x, y, theta, scaling, l2, max_iterations):
  """L-BFGS from theta (F + 1, num_classes) -> theta, iterations, whether it converged."""

  def objective(flat):
    theta = scaling * flat.reshape(scaling.shape[0], -1)
    losses, gradient = _losses_and_gradient(theta.astype(np.float32), x, y)
    # Averaged in float64: float32's rounding of the mean stalls the line search near the minimum.
    value = np.asarray(losses).mean(dtype=np.float64) + l2 / 2 * np.sum(theta[:-1] ** 2)
    gradient = np.array(gradient, np.float64)
    gradient[:-1] += l2 * theta[:-1]
    return value, (scaling * gradient).ravel()

  count = itertools.count(1)

  def say(_):
    iteration = next(count)
    logging.log_every_n_seconds(
      logging.INFO, 'L-BFGS: l2 %.0e, iteration %d', PULSE_SECONDS, l2, iteration
    )

  found = scipy.optimize.minimize(
    objective,
    (theta / scaling).ravel(),
    jac=True,
    method='L-BFGS-B',
    callback=say,
    options=dict(maxiter=max_iterations, ftol=1e-9, gtol=GRADIENT_TOLERANCE),
  )
  # Rounding in float32 can end the last line search: then the gradient says whether it is over.
  converged = found.success or np.abs(found.jac).max() <= ENOUGH
  return scaling * found.x.reshape(theta.shape), int(found.nit), bool(converged)


@jax.jit
def _losses_and_gradient(theta, x, y):
  """Cross-entropy of each row (N,), and the gradient of its mean by theta (F + 1, num_classes)."""

  def loss(theta):
    out = jnp.dot(x, theta[:-1], precision=jax.lax.Precision.HIGHEST) + theta[-1]
    losses = optax.softmax_cross_entropy_with_integer_labels(out, y)
    return losses.mean(), losses

  gradient, losses = jax.grad(loss, has_aux=True)(theta)
  return losses, gradient
