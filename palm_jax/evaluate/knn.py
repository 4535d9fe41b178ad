"""A vote of the nearest training features: how well they tell classes apart without any training.

The monitor of PatrickHua/SimSiam (tools/knn_monitor.py), as lightly's benchmarks have it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from palm_jax.base.errors import UserError
from palm_jax.evaluate import linear

K = 200  # of both
TEMPERATURE = 0.1  # of both


def accuracy(
  train_h: np.ndarray,
  train_y: np.ndarray,
  test_h: np.ndarray,
  test_y: np.ndarray,
  k: int = K,
  temperature: float = TEMPERATURE,
) -> float:
  """Share of test features that a vote of their neighbours gives the right label.

  The k training features with the largest cosine vote with the weight exp(cosine / temperature).
  k is limited to the number of training rows; equal votes go to the smaller label.

  Args:
    train_h: (N, F).
    train_y: (N,) integer labels from 0.
    test_h: (M, F).
    test_y: (M,) integer labels from 0.
    k: at least 1.
    temperature: positive; infinity makes all k votes equal.

  Raises:
    UserError: features that are not finite or do not match the labels or each other, or k or
      temperature out of range.
  """
  train_h, train_y = linear.checked(train_h, train_y, 'training')
  test_h, test_y = linear.checked(test_h, test_y, 'test')
  linear.check_widths(train_h, test_h)
  if k < 1 or not temperature > 0:
    raise UserError(
      f'k is {k} and temperature {temperature}, expected k of at least 1 and a temperature above 0'
    )
  sizes = dict(k=min(k, len(train_h)), num_classes=int(train_y.max()) + 1)
  predicted = _vote(train_h, train_y, test_h, temperature, **sizes)
  return float(np.mean(np.asarray(predicted) == test_y))


@functools.partial(jax.jit, static_argnames=('k', 'num_classes'))
def _vote(train_h, train_y, test_h, temperature, *, k, num_classes):
  dot = functools.partial(jnp.dot, precision=jax.lax.Precision.HIGHEST)
  bank = _unit(train_h)

  def predict(h):  # (F,)
    cosines, rows = jax.lax.top_k(dot(bank, h), k)
    weights = jnp.exp((cosines - cosines[0]) / temperature)  # the largest is 1: no overflow
    return jnp.argmax(dot(weights, jax.nn.one_hot(train_y[rows], num_classes)))

  return jax.lax.map(predict, _unit(test_h), batch_size=256)  # (256, N) cosines at a time


def _unit(h):
  return h / jnp.maximum(jnp.linalg.norm(h, axis=-1, keepdims=True), 1e-12)
