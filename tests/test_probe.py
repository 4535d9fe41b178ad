import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from palm_jax.errors import UserError
from palm_jax.evaluate import features, probe

N, M, F, C = 300, 120, 6, 3


@pytest.fixture(scope='module')
def blobs():
  """Overlapping Gaussian classes with unequal scales and offsets: (train_x, train_y, test_x, test_y)."""
  generator = np.random.default_rng(0)
  y = generator.integers(0, C, N + M)
  centres = generator.normal(size=(C, F))
  x = (generator.normal(size=(N + M, F)) + centres[y]) * np.logspace(-2, 2, F) + np.arange(F)
  x = x.astype(np.float32)
  return x[:N], y[:N], x[N:], y[N:]


@pytest.fixture(scope='module')
def digits():
  images, labels = load_digits(return_X_y=True)
  images = np.round(images / 16 * 255).astype(np.uint8).reshape(-1, 8, 8, 1)
  order = np.random.default_rng(0).permutation(len(images))
  train, test = order[:1297], order[1297:]
  return images[train], labels[train], images[test], labels[test]


def scikit_learn(x, y, l2):
  mean, std = x.mean(0, dtype=np.float64), x.std(0, dtype=np.float64)
  model = LogisticRegression(C=1 / (l2 * len(x)), tol=1e-10, max_iter=5000).fit((x - mean) / std, y)
  return model, (lambda z: (z - mean) / std)


def objective(weight, bias, x, y, l2):
  out = x @ weight + bias
  out = out - out.max(1, keepdims=True)
  losses = np.log(np.exp(out).sum(1)) - out[np.arange(len(y)), y]
  return losses.mean() + l2 / 2 * np.sum(weight ** 2)


@pytest.mark.parametrize('l2', [1e-3, 1e-2, 1.])
def test_logistic_regression_equals_scikit_learn(blobs, l2):
  x, y, test_x, test_y = blobs
  model, report = probe.logistic_regression(x, y, C, l2_grid=[l2])
  truth, standardise = scikit_learn(x, y, l2)
  centred = model.bias - model.bias.mean()  # a constant added to all biases changes nothing
  np.testing.assert_allclose(model.weight, truth.coef_.T, atol=1e-3)
  np.testing.assert_allclose(centred, truth.intercept_ - truth.intercept_.mean(), atol=1e-3)
  z = standardise(x)
  np.testing.assert_allclose(objective(model.weight, model.bias, z, y, l2),
                             objective(truth.coef_.T, truth.intercept_, z, y, l2), rtol=1e-6)
  assert probe.accuracy(model, test_x, test_y) == pytest.approx(truth.score(standardise(test_x), test_y), abs=1 / M)
  assert report['converged']


def test_correlated_features_reach_the_minimum_within_the_limit():
  """Features whose covariance has a steep spectrum: plain L-BFGS stops at the limit, above the minimum."""
  generator = np.random.default_rng(0)
  y = generator.integers(0, C, 1000)
  basis = np.linalg.qr(generator.normal(size=(48, 48)))[0]
  latent = generator.normal(size=(1000, 48)) + 0.4 * generator.normal(size=(C, 48))[y]
  x = (latent * np.arange(1, 49) ** -2. @ basis.T).astype(np.float32)
  model, report = probe.logistic_regression(x, y, C, l2_grid=[1e-5])
  assert report['converged']
  assert report['iterations'] < probe.MAX_ITERATIONS / 2
  truth, standardise = scikit_learn(x, y, 1e-5)
  least = objective(truth.coef_.T, truth.intercept_, standardise(x), y, 1e-5)
  assert objective(model.weight, model.bias, standardise(x), y, 1e-5) < least * (1 + 1e-4)


def test_standardisation_makes_the_units_of_a_feature_irrelevant(blobs):
  x, y, test_x, _ = blobs
  units = np.array([1e-4, 1, 1e4, 10, 1, 3], np.float32)
  plain, _ = probe.logistic_regression(x, y, C, l2_grid=[1e-2])
  scaled, _ = probe.logistic_regression(x * units, y, C, l2_grid=[1e-2])
  np.testing.assert_allclose(probe.logits(scaled, test_x * units), probe.logits(plain, test_x), atol=2e-3)


def test_a_constant_feature_changes_nothing(blobs):
  x, y, test_x, _ = blobs
  add = lambda x: np.concatenate([x, np.full((len(x), 1), 0.1, np.float32)], 1)
  plain, _ = probe.logistic_regression(x, y, C, l2_grid=[1e-2])
  model, _ = probe.logistic_regression(add(x), y, C, l2_grid=[1e-2])
  np.testing.assert_allclose(probe.logits(model, add(test_x)), probe.logits(plain, test_x), atol=2e-3)


def test_l2_is_the_best_on_the_held_out_tenth(blobs):
  x, y, _, _ = blobs
  grid = [1e-4, 1e-2, 1., 100.]
  _, report = probe.logistic_regression(x, y, C, l2_grid=grid, seed=3)
  fit, held_out = probe.stratified_split(y, 0.1, seed=3)
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
  _, report = probe.logistic_regression(np.concatenate([x, shuffled_noise], 1), y, C)
  assert 1e-6 < report['l2'] < 100
  assert [tried['l2'] for tried in report['grid']] == sorted(probe.L2_GRID, reverse=True)


def test_an_unfinished_fit_is_reported(blobs):
  x, y, _, _ = blobs
  _, report = probe.logistic_regression(x, y, C, l2_grid=[1e-6], max_iterations=1)
  assert not report['converged']
  assert report['iterations'] == 1


def test_shuffled_test_labels_change_the_score_and_nothing_else(blobs):
  x, y, test_x, test_y = blobs
  protocol = dict(data='blobs')
  shuffled = np.random.default_rng(1).permutation(test_y)
  one = probe.run({'raw': (x, test_x)}, y, test_y, C, protocol=protocol, k=10)
  two = probe.run({'raw': (x, test_x)}, y, shuffled, C, protocol=protocol, k=10)
  a, b = one['sets']['raw']['linear'], two['sets']['raw']['linear']
  read_from_test = ('test_accuracy', 'half_width')
  assert {k: v for k, v in a.items() if k not in read_from_test} == {
    k: v for k, v in b.items() if k not in read_from_test}
  assert a['test_accuracy'] > b['test_accuracy'] + 0.2
  assert one['protocol'] == two['protocol']


def test_stratified_split():
  labels = np.repeat([0, 1, 2, 7], [2, 30, 100, 5])
  np.random.default_rng(0).shuffle(labels)
  rest, held_out = probe.stratified_split(labels, 0.1, seed=5)
  assert sorted([*rest, *held_out]) == list(range(len(labels)))
  assert {c: int(np.sum(labels[held_out] == c)) for c in (0, 1, 2, 7)} == {0: 1, 1: 3, 2: 10, 7: 1}
  assert set(labels[rest]) == {0, 1, 2, 7}
  again = probe.stratified_split(labels, 0.1, seed=5)
  np.testing.assert_array_equal(again[1], held_out)
  other = probe.stratified_split(labels, 0.1, seed=6)
  assert set(other[1]) != set(held_out)


def vote_in_numpy(train_h, train_y, test_h, k, temperature):
  """PatrickHua/SimSiam's knn_predict, written again in float64."""
  unit = lambda h: h.astype(np.float64) / np.linalg.norm(h.astype(np.float64), axis=1, keepdims=True)
  predicted = []
  for cosines in unit(test_h) @ unit(train_h).T:
    nearest = np.argsort(-cosines)[:k]
    scores = np.zeros(train_y.max() + 1)
    for row in nearest:
      scores[train_y[row]] += np.exp(cosines[row] / temperature)
    predicted.append(scores.argmax())
  return np.array(predicted)


@pytest.mark.parametrize('k, temperature', [(1, 0.1), (20, 0.1), (20, 0.01), (200, 0.1), (1000, 0.1)])
def test_knn_equals_a_transcription(blobs, k, temperature):
  x, y, test_x, test_y = blobs
  x, test_x = x / np.logspace(-2, 2, F), test_x / np.logspace(-2, 2, F)
  predicted = vote_in_numpy(x, y, test_x, k, temperature)
  # Against the predictions as labels: agreement in every row, not only in the mean.
  assert probe.knn_accuracy(x, y, test_x, predicted, k, temperature) == 1
  assert probe.knn_accuracy(x, y, test_x, test_y, k, temperature) == np.mean(predicted == test_y)


@pytest.mark.parametrize('temperature', [1e9, np.inf])
def test_knn_at_infinite_temperature_is_scikit_learns(blobs, temperature):
  x, y, test_x, _ = blobs
  truth = KNeighborsClassifier(15, metric='cosine', algorithm='brute').fit(x, y)
  assert probe.knn_accuracy(x, y, test_x, truth.predict(test_x), 15, temperature) == 1


def test_knn_of_more_rows_than_a_chunk():
  generator = np.random.default_rng(0)
  x, y = generator.normal(size=(700, 3)), generator.integers(0, 4, 700)
  predicted = vote_in_numpy(x, y, x[:600], 5, 0.1)
  assert probe.knn_accuracy(x, y, x[:600], predicted, 5) == 1


def test_digits_pixels(digits):
  train, train_y, test, test_y = digits
  sets = {'pixels': (features.pixels(train), features.pixels(test)),
          'noise': (np.random.default_rng(0).normal(size=(len(train), 8)),
                    np.random.default_rng(1).normal(size=(len(test), 8)))}
  results = probe.run(sets, train_y, test_y, 10, protocol=dict(data='scikit-learn digits', encoder='none'))
  pixels, noise = results['sets']['pixels'], results['sets']['noise']
  assert pixels['linear']['test_accuracy'] > 0.94
  assert pixels['knn']['test_accuracy'] > 0.9
  assert noise['linear']['test_accuracy'] < 0.2
  assert json.loads(json.dumps(results)) == results
  protocol = results['protocol']
  assert (protocol['n_train'], protocol['n_test'], protocol['knn_k'], protocol['data']) == (
    1297, 500, 200, 'scikit-learn digits')
  assert protocol['n_fit'] + protocol['n_validation'] == 1297

  text = probe.table(results)
  lines = text.splitlines()
  assert [line.split()[0] for line in lines[:3]] == ['features', 'pixels', 'noise']
  assert len({len(line) for line in lines[:3]}) == 1
  linear = pixels['linear']
  assert f'{100 * linear["test_accuracy"]:.2f} +- {100 * linear["half_width"]:.2f}' in lines[1]
  assert lines[-1].startswith('protocol: ')
  assert all(f'{key}={value}' in lines[-1] for key, value in protocol.items())


def test_wilson_half_width():
  # Roots of (p - share)^2 = z^2 p (1 - p) / n, the interval's definition.
  z = 1.959964
  for share, n in [(0.5, 100), (0.97, 500), (1., 50), (0., 50)]:
    low, high = np.sort(np.roots([1 + z ** 2 / n, -(2 * share + z ** 2 / n), share ** 2]).real)
    assert probe.wilson_half_width(share, n) == pytest.approx((high - low) / 2, rel=1e-9)
  assert probe.wilson_half_width(0.9, 10000) == pytest.approx(1.96 * np.sqrt(0.09 / 10000), rel=1e-3)


@pytest.fixture
def variables():
  return {'params': {'conv': {'kernel': jnp.ones((2, 3))}}, 'batch_stats': {'bn': {'mean': jnp.array([0., jnp.nan])}}}


def test_frozen_variables_pass(variables):
  probe.assert_frozen(jax.device_get(variables), jax.tree.map(lambda x: x + 0, variables))


@pytest.mark.parametrize('change', [
  lambda x: np.nextafter(x, np.float32(9)), lambda x: x.astype(np.float16), lambda x: x[:1]])
def test_a_changed_batch_statistic_is_caught(variables, change):
  after = jax.device_get(variables)
  after['batch_stats']['bn']['mean'] = change(after['batch_stats']['bn']['mean'])
  with pytest.raises(AssertionError, match=r"\['batch_stats'\]\['bn'\]\['mean'\]"):
    probe.assert_frozen(variables, after)


def test_a_missing_leaf_is_caught(variables):
  with pytest.raises(AssertionError, match='batch_stats'):
    probe.assert_frozen(variables, {'params': variables['params']})


def with_nan(x):
  x = x.copy()
  x[7, 2] = np.nan
  return x


@pytest.mark.parametrize('change, message', [
  (lambda x, y, test_x, test_y: (with_nan(x), y, test_x, test_y), 'training features.*row 7'),
  (lambda x, y, test_x, test_y: (x, y, with_nan(test_x), test_y), 'test features.*row 7'),
  (lambda x, y, test_x, test_y: (x[1:], y, test_x, test_y), r'training features are \(299, 6\)'),
  (lambda x, y, test_x, test_y: (x, y, test_x, test_y[1:]), r'test features are \(120, 6\)'),
  (lambda x, y, test_x, test_y: (x, y, test_x[:, 1:], test_y), 'width 6 and test features 5'),
  (lambda x, y, test_x, test_y: (x, np.minimum(y, 1), test_x, test_y), 'class 2 has no training example'),
  (lambda x, y, test_x, test_y: (x, y + 1, test_x, test_y), 'training label is 3'),
  (lambda x, y, test_x, test_y: (x, y, test_x, test_y + 1), 'test label is 3'),
  (lambda x, y, test_x, test_y: (x, y - 1, test_x, test_y), 'expected integers from 0'),
  (lambda x, y, test_x, test_y: (x, y / 2, test_x, test_y), 'expected integers from 0'),
])
def test_bad_input_is_named(blobs, change, message):
  x, y, test_x, test_y = change(*blobs)
  with pytest.raises(UserError, match=message) as caught:
    probe.run({'PALM encoder': (x, test_x)}, y, test_y, C, protocol=dict(data='blobs'))
  assert str(caught.value).startswith('PALM encoder: ')
  assert '\n' not in str(caught.value)


def test_bad_settings_are_named(blobs):
  x, y, test_x, test_y = blobs
  with pytest.raises(UserError, match='num_classes is 1'):
    probe.logistic_regression(x, np.zeros_like(y), 1)
  with pytest.raises(UserError, match='class 2 has one'):
    keep = np.append(np.flatnonzero(y < 2), np.flatnonzero(y == 2)[0])
    probe.logistic_regression(x[keep], y[keep], C)
  for grid in ([], [0.], [np.nan]):
    with pytest.raises(UserError, match='l2_grid'):
      probe.logistic_regression(x, y, C, l2_grid=grid)
  with pytest.raises(UserError, match='k is 0'):
    probe.knn_accuracy(x, y, test_x, test_y, k=0)
  with pytest.raises(UserError, match='temperature 0'):
    probe.knn_accuracy(x, y, test_x, test_y, temperature=0)
  with pytest.raises(UserError, match='data'):
    probe.run({'raw': (x, test_x)}, y, test_y, C, protocol={})
  with pytest.raises(UserError, match='no feature sets'):
    probe.run({}, y, test_y, C, protocol=dict(data='blobs'))
