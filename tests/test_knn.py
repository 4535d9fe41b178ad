"""The vote of the nearest neighbours against a transcription and scikit-learn."""

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from palm_jax.base.errors import UserError
from palm_jax.evaluate import knn
from tests import worlds

N, M, F, C = 300, 120, 6, 3


@pytest.fixture(scope='module')
def blobs():
  return worlds.blobs(N, M, F, C)


def vote_in_numpy(train_h, train_y, test_h, k, temperature):
  """PatrickHua/SimSiam's knn_predict, written again in float64."""
  unit = lambda h: (
    h.astype(np.float64) / np.linalg.norm(h.astype(np.float64), axis=1, keepdims=True)
  )
  predicted = []
  for cosines in unit(test_h) @ unit(train_h).T:
    nearest = np.argsort(-cosines)[:k]
    scores = np.zeros(train_y.max() + 1)
    for row in nearest:
      scores[train_y[row]] += np.exp(cosines[row] / temperature)
    predicted.append(scores.argmax())
  return np.array(predicted)


@pytest.mark.parametrize(
  'k, temperature', [(1, 0.1), (20, 0.1), (20, 0.01), (200, 0.1), (1000, 0.1)]
)
def test_knn_equals_a_transcription(blobs, k, temperature):
  x, y, test_x, test_y = blobs
  x, test_x = x / np.logspace(-2, 2, F), test_x / np.logspace(-2, 2, F)
  predicted = vote_in_numpy(x, y, test_x, k, temperature)
  # Against the predictions as labels: agreement in every row, not only in the mean.
  assert knn.accuracy(x, y, test_x, predicted, k, temperature) == 1
  assert knn.accuracy(x, y, test_x, test_y, k, temperature) == np.mean(predicted == test_y)


@pytest.mark.parametrize('temperature', [1e9, np.inf])
def test_knn_at_infinite_temperature_is_scikit_learns(blobs, temperature):
  x, y, test_x, _ = blobs
  truth = KNeighborsClassifier(15, metric='cosine', algorithm='brute').fit(x, y)
  assert knn.accuracy(x, y, test_x, truth.predict(test_x), 15, temperature) == 1


def test_knn_of_more_rows_than_a_chunk():
  generator = np.random.default_rng(0)
  x, y = generator.normal(size=(700, 3)), generator.integers(0, 4, 700)
  predicted = vote_in_numpy(x, y, x[:600], 5, 0.1)
  assert knn.accuracy(x, y, x[:600], predicted, 5) == 1


def test_bad_settings_are_named(blobs):
  x, y, test_x, test_y = blobs
  with pytest.raises(UserError, match='k is 0'):
    knn.accuracy(x, y, test_x, test_y, k=0)
  with pytest.raises(UserError, match='temperature 0'):
    knn.accuracy(x, y, test_x, test_y, temperature=0)
