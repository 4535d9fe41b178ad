import re

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from palm_jax.base.errors import UserError
from palm_jax.evaluate import linear
from palm_jax.evaluate.labels import stratified_split
from tests import worlds

N, M, F, C = 300, 120, 6, 3


@pytest.fixture(scope='module')
def blobs():
  return worlds.blobs(N, M, F, C)


def scikit_learn(x, y, l2):
  mean, std = x.mean(0, dtype=np.float64), x.std(0, dtype=np.float64)
  model = LogisticRegression(C=1 / (l2 * len(x)), tol=1e-10, max_iter=5000).fit((x - mean) / std, y)
  return model, (lambda z: (z - mean) / std)


def objective(weight, bias, x, y, l2):
  out = x @ weight + bias
  out = out - out.max(1, keepdims=True)
  losses = np.log(np.exp(out).sum(1)) - out[np.arange(len(y)), y]
  return losses.mean() + l2 / 2 * np.sum(weight**2)


@pytest.mark.parametrize('l2', [1e-3, 1e-2, 1.0])
def test_logistic_regression_equals_scikit_learn(blobs, l2):
  x, y, test_x, test_y = blobs
  model, report = linear.logistic_regression(x, y, C, l2_grid=[l2])
  truth, standardise = scikit_learn(x, y, l2)
  centred = model.bias - model.bias.mean()  # a constant added to all biases changes nothing
  np.testing.assert_allclose(model.weight, truth.coef_.T, atol=1e-3)
  np.testing.assert_allclose(centred, truth.intercept_ - truth.intercept_.mean(), atol=1e-3)
  z = standardise(x)
  np.testing.assert_allclose(
    objective(model.weight, model.bias, z, y, l2),
    objective(truth.coef_.T, truth.intercept_, z, y, l2),
    rtol=1e-6,
  )
  assert linear.accuracy(model, test_x, test_y) == pytest.approx(
    truth.score(standardise(test_x), test_y), abs=1 / M
  )
  assert report['converged']


def test_correlated_features_reach_the_minimum_within_the_limit():
  """Features whose covariance has a steep spectrum: plain L-BFGS stops at the limit, above the
  minimum."""
  generator = np.random.default_rng(0)
  y = generator.integers(0, C, 1000)
  basis = np.linalg.qr(generator.normal(size=(48, 48)))[0]
  latent = generator.normal(size=(1000, 48)) + 0.4 * generator.normal(size=(C, 48))[y]
  x = (latent * np.arange(1, 49) ** -2.0 @ basis.T).astype(np.float32)
  model, report = linear.logistic_regression(x, y, C, l2_grid=[1e-5])
  assert report['converged']
  assert report['iterations'] < linear.MAX_ITERATIONS / 2
  truth, standardise = scikit_learn(x, y, 1e-5)
  least = objective(truth.coef_.T, truth.intercept_, standardise(x), y, 1e-5)
  assert objective(model.weight, model.bias, standardise(x), y, 1e-5) < least * (1 + 1e-4)


def test_standardisation_makes_the_units_of_a_feature_irrelevant(blobs):
  x, y, test_x, _ = blobs
  units = np.array([1e-4, 1, 1e4, 10, 1, 3], np.float32)
  plain, _ = linear.logistic_regression(x, y, C, l2_grid=[1e-2])
  scaled, _ = linear.logistic_regression(x * units, y, C, l2_grid=[1e-2])
  np.testing.assert_allclose(
    linear.logits(scaled, test_x * units), linear.logits(plain, test_x), atol=2e-3
  )


def test_a_constant_feature_changes_nothing(blobs):
  x, y, test_x, _ = blobs
  add = lambda x: np.concatenate([x, np.full((len(x), 1), 0.1, np.float32)], 1)
  plain, _ = linear.logistic_regression(x, y, C, l2_grid=[1e-2])
  model, _ = linear.logistic_regression(add(x), y, C, l2_grid=[1e-2])
  np.testing.assert_allclose(
    linear.logits(model, add(test_x)), linear.logits(plain, test_x), atol=2e-3
  )


def test_l2_is_the_best_on_the_held_out_tenth(blobs):
  x, y, _, _ = blobs
  grid = [1e-4, 1e-2, 1.0, 100.0]
  _, report = linear.logistic_regression(x, y, C, l2_grid=grid, seed=3)
  fit, held_out = stratified_split(y, 0.1, seed=3)
  expected = []
  for l2 in sorted(grid, reverse=True):
    truth, standardise = scikit_learn(x[fit], y[fit], l2)
    expected.append(truth.score(standardise(x[held_out]), y[held_out]))
  got = [tried['validation_accuracy'] for tried in report['grid']]
  np.testing.assert_allclose(got, expected, atol=1e-9)
  assert report['l2'] == sorted(grid, reverse=True)[int(np.argmax(expected))]
  assert report['validation_accuracy'] == max(got)
  assert (report['n_fit'], report['n_validation']) == (len(fit), len(held_out))


def test_too_strong_an_l2_loses(blobs):
  x, y, _, _ = blobs
  shuffled_noise = np.random.default_rng(0).normal(size=(N, 60)).astype(np.float32)
  _, report = linear.logistic_regression(np.concatenate([x, shuffled_noise], 1), y, C)
  assert 1e-6 < report['l2'] < 100
  assert [tried['l2'] for tried in report['grid']] == sorted(linear.L2_GRID, reverse=True)


def test_an_unfinished_fit_is_reported(blobs):
  x, y, _, _ = blobs
  _, report = linear.logistic_regression(x, y, C, l2_grid=[1e-6], max_iterations=1)
  assert not report['converged']
  assert report['iterations'] == 1


def test_bad_settings_are_named(blobs):
  x, y, test_x, test_y = blobs
  with pytest.raises(UserError, match='num_classes is 1'):
    linear.logistic_regression(x, np.zeros_like(y), 1)
  with pytest.raises(UserError, match='class 2 has one'):
    keep = np.append(np.flatnonzero(y < 2), np.flatnonzero(y == 2)[0])
    linear.logistic_regression(x[keep], y[keep], C)
  for grid in ([], [0.0], [np.nan]):
    with pytest.raises(UserError, match='l2_grid'):
      linear.logistic_regression(x, y, C, l2_grid=grid)


def test_a_long_fit_says_where_it_is(monkeypatch, caplog):
  monkeypatch.setattr(linear, 'PULSE_SECONDS', 0.0)
  rng = np.random.default_rng(0)
  x, y = rng.normal(size=(60, 5)), np.arange(60) % 3
  with caplog.at_level('INFO', logger='absl'):
    linear.logistic_regression(x, y, 3, l2_grid=(0.1, 1.0))
  assert any(re.fullmatch(r'L-BFGS: l2 1e\+00, iteration \d+', m) for m in caplog.messages)
