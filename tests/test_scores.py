"""Scores and the numbers that judge them, against scikit-learn and scipy."""

import numpy as np
import pytest
import scipy.special
from scipy.spatial.distance import mahalanobis as distance
from sklearn import metrics
from sklearn.covariance import EmpiricalCovariance
from sklearn.neighbors import NearestNeighbors

from palm_jax.base.errors import UserError
from palm_jax.evaluate import scores

F, C = 6, 3


@pytest.fixture(scope='module')
def blobs():
  """Three correlated classes: training features and labels, more of the same (ID), and others far
  from them (OOD)."""
  generator = np.random.default_rng(0)
  mix = generator.normal(size=(F, F))
  centres = 4 * generator.normal(size=(C, F))
  draw = lambda n: (lambda y: (generator.normal(size=(n, F)) @ mix + centres[y], y))(
    generator.integers(0, C, n)
  )
  (train_h, train_y), (test_h, _) = draw(300), draw(80)
  ood_h = generator.normal(size=(70, F)) @ mix - 3 * centres.mean(0) + 12 * generator.normal(size=F)
  return train_h.astype(np.float32), train_y, test_h.astype(np.float32), ood_h.astype(np.float32)


# ---- numbers


def test_numbers_equal_scikit_learn_on_scores_full_of_ties():
  for seed in range(200):
    generator = np.random.default_rng(seed)
    n, m, levels = generator.integers(1, 60), generator.integers(1, 60), generator.integers(1, 30)
    good = np.round(generator.normal(size=n) * levels / 4 + generator.normal()) / levels
    bad = np.round(generator.normal(size=m) * levels / 4) / levels
    both, is_id = np.r_[good, bad], np.r_[np.ones(n), np.zeros(m)]
    false, true, _ = metrics.roc_curve(is_id, both, drop_intermediate=False)
    wanted = dict(
      auroc=metrics.roc_auc_score(is_id, both),
      aupr_in=metrics.average_precision_score(is_id, both),
      aupr_out=metrics.average_precision_score(1 - is_id, -both),
      fpr_at_95_tpr=false[np.argmax(true >= 0.95)],
    )
    assert scores.METRICS.keys() == wanted.keys()
    for name, function in scores.METRICS.items():
      np.testing.assert_allclose(
        function(good, bad), wanted[name], rtol=0, atol=1e-12, err_msg=f'{name}, seed {seed}'
      )


def test_numbers_of_scores_that_can_be_counted():
  perfect, reversed_, equal = ([1.0, 2.0], [0.0]), ([0.0], [1.0, 2.0]), ([3.0] * 4, [3.0] * 6)
  assert [scores.auroc(*pair) for pair in (perfect, reversed_, equal)] == [1, 0, 0.5]
  assert [scores.fpr_at_95_tpr(*pair) for pair in (perfect, reversed_, equal)] == [0, 1, 1]
  assert [scores.aupr_in(*pair) for pair in (perfect, equal)] == [1, 0.4]
  assert [scores.aupr_out(*pair) for pair in (perfect, equal)] == [1, 0.6]
  good = np.arange(20.0)  # 19 of 20 are kept: the threshold is 1, and what equals it passes
  assert scores.fpr_at_95_tpr(good, [0, 0.5, 1, 1, 2]) == 0.6
  assert scores.fpr_at_95_tpr(np.arange(19.0), [0, 0.5]) == 1  # 18 of 19 are fewer than 95%


def test_many_scores_lose_nothing():
  generator = np.random.default_rng(0)
  good, bad = (
    generator.normal(size=100_000).astype(np.float32),
    generator.normal(size=150_000).astype(np.float32) - 1,
  )
  is_id = np.r_[np.ones(len(good)), np.zeros(len(bad))]
  np.testing.assert_allclose(
    scores.auroc(good, bad), metrics.roc_auc_score(is_id, np.r_[good, bad]), atol=1e-12
  )


@pytest.mark.parametrize('name', scores.METRICS)
def test_scores_that_cannot_be_judged(name):
  for good, bad, message in (
    ([], [1.0], 'ID scores are'),
    ([1.0], [], 'OOD scores are'),
    ([1.0], [[1.0]], 'OOD scores are'),
    ([1.0, np.nan], [1.0], '1 NaN'),
  ):
    with pytest.raises(UserError, match=message):
      scores.METRICS[name](good, bad)


# ---- scores of logits


def test_scores_of_logits_equal_scipy():
  logits = np.random.default_rng(0).normal(size=(200, 10)) * 5
  np.testing.assert_allclose(
    scores.msp(logits), np.log(scipy.special.softmax(logits, 1).max(1)), rtol=1e-10
  )
  np.testing.assert_array_equal(scores.mls(logits), logits.max(1))
  np.testing.assert_allclose(scores.energy(logits), np.log(np.exp(logits).sum(1)), rtol=1e-13)


@pytest.mark.parametrize('dtype', [np.float32, np.float64])
def test_confident_pictures_have_no_ties(dtype):
  """The probability of 1 - exp(-gap) rounds to 1 from a gap of 17 or 37 on; its logarithm does
  not."""
  gaps = np.arange(5, 700, 5)
  logits = np.stack([gaps, 0 * gaps], 1).astype(dtype)
  assert len(np.unique(scipy.special.softmax(logits, 1).max(1))) < 10
  assert (np.diff(scores.msp(logits)) > 0).all()
  np.testing.assert_allclose(scores.msp(logits), -np.exp(-gaps.astype(float)), rtol=1e-2)
  equal = np.zeros((1, 4), dtype)
  np.testing.assert_allclose(
    [scores.msp(equal)[0], scores.energy(equal)[0]], [-np.log(4), np.log(4)], rtol=1e-14
  )


def test_an_offset_of_all_logits():
  logits = (
    np.random.default_rng(0).integers(-(2**20), 2**20, (50, 5)) / 2**18
  )  # exact, also after the shift
  for offset in (2.0**20, -(2.0**30)):
    np.testing.assert_array_equal(scores.msp(logits + offset), scores.msp(logits))
    np.testing.assert_array_equal(scores.mls(logits + offset), scores.mls(logits) + offset)
    np.testing.assert_allclose(
      scores.energy(logits + offset) - offset, scores.energy(logits), atol=1e-6
    )


# ---- scores of features


@pytest.mark.parametrize('pairs', [2**23, 700])
@pytest.mark.parametrize('k', [1, 7, 300])
def test_knn_equals_scikit_learn(blobs, k, pairs, monkeypatch):
  monkeypatch.setattr(scores, 'PAIRS_AT_ONCE', pairs)  # all at once, or two rows
  train_h, _, test_h, _ = blobs
  unit = lambda h: (
    h.astype(np.float64) / np.linalg.norm(h.astype(np.float64), axis=1, keepdims=True)
  )
  distances, _ = (
    NearestNeighbors(n_neighbors=k, algorithm='kd_tree').fit(unit(train_h)).kneighbors(unit(test_h))
  )
  np.testing.assert_allclose(scores.knn(train_h, k)(test_h), -(distances[:, -1] ** 2), rtol=1e-9)
  np.testing.assert_allclose(
    scores.knn(train_h * 7, k)(test_h / 3), -(distances[:, -1] ** 2), rtol=1e-5
  )  # length means nothing


def test_knn_of_near_duplicates():
  generator = np.random.default_rng(0)
  train_h = generator.normal(size=(20, 4))
  away = (
    np.stack([-train_h[:, 1], train_h[:, 0], -train_h[:, 3], train_h[:, 2]], 1) * 1e-9
  )  # at a right angle
  np.testing.assert_allclose(scores.knn(train_h, 1)(train_h + away), np.full(20, -1e-18), rtol=1e-5)
  np.testing.assert_array_equal(scores.knn(train_h, 1)(train_h), np.zeros(20))


def test_mahalanobis_equals_scikit_learn_and_scipy(blobs):
  train_h, train_y, test_h, _ = blobs
  x = train_h.astype(np.float64)
  means = np.stack([x[train_y == c].mean(0) for c in range(C)])
  tied = EmpiricalCovariance(assume_centered=True).fit(x - means[train_y])
  wanted = np.max([-tied.mahalanobis(test_h - mean + 0.0) for mean in means], 0)
  got = scores.mahalanobis(train_h, train_y)(test_h)
  np.testing.assert_allclose(got, wanted, rtol=1e-5)
  inverse = np.linalg.inv(
    sum(np.cov(x[train_y == c].T, bias=True) * np.mean(train_y == c) for c in range(C))
  )
  np.testing.assert_allclose(
    got[:9],
    [-min(distance(h, mean, inverse) ** 2 for mean in means) for h in test_h[:9]],
    rtol=1e-5,
  )
  named = np.array([7, 40, 3])[train_y]  # labels are names only
  np.testing.assert_allclose(scores.mahalanobis(train_h, named)(test_h), got, rtol=1e-9)


def test_ssd_equals_its_definition(blobs):
  """As in SSD's eval_ssd.py: l2, z-score, pseudo-inverse of the biased covariance, quadratic
  form."""
  train_h, _, test_h, _ = blobs
  unit = lambda h: (
    h.astype(np.float64) / (np.linalg.norm(h.astype(np.float64), axis=1, keepdims=True) + 1e-10)
  )
  mean, std = unit(train_h).mean(0), unit(train_h).std(0)
  train, test = ((unit(h) - mean) / (std + 1e-10) for h in (train_h, test_h))
  z = test - train.mean(0)
  wanted = np.sum(z * (np.linalg.pinv(np.cov(train.T, bias=True)) @ z.T).T, 1)
  np.testing.assert_allclose(scores.ssd(train_h)(test_h), -wanted, rtol=1e-5)
  np.testing.assert_allclose(scores.ssd(train_h * 5)(test_h / 3), -wanted, rtol=1e-4)


def test_ssd_leaves_out_what_varies_by_rounding_only():
  """Squared Mahalanobis distances of the training set itself have the number of directions as their
  mean."""
  generator = np.random.default_rng(0)
  angle, length = generator.uniform(0, 6, 500), generator.uniform(1, 9, 500)
  h = (
    np.stack([np.cos(angle), np.sin(angle), np.ones(500)], 1) * length[:, None]
  )  # the third: root half, once normalised
  assert 0 < np.std(h[:, 2] / np.linalg.norm(h, axis=1)) < 1e-15
  assert -scores.ssd(h)(h).mean() == pytest.approx(2, abs=1e-9)
  wide = generator.normal(size=(500, 7))
  assert -scores.ssd(wide)(wide).mean() == pytest.approx(7, abs=1e-9)


def test_features_far_from_the_origin_or_in_other_units(blobs):
  train_h, train_y, test_h, _ = (
    x.astype(np.float64) if x.dtype == np.float32 else x for x in blobs
  )
  wanted = scores.mahalanobis(train_h, train_y)(test_h)
  moved = scores.mahalanobis(train_h + 1e6, train_y)(test_h + 1e6)
  np.testing.assert_allclose(moved, wanted, rtol=1e-5)
  units = np.logspace(-2, 2, F)
  np.testing.assert_allclose(
    scores.mahalanobis(train_h * units, train_y)(test_h * units), wanted, rtol=1e-5
  )


@pytest.mark.parametrize('score', ['mahalanobis', 'ssd'])
def test_features_that_never_vary_or_say_the_same_twice(blobs, score):
  """A dead unit and a double of another: of no weight, though float32 rounding lets the double
  differ a little."""
  train_h, train_y, test_h, _ = blobs
  fit = lambda h: scores.SCORES[score].function(h, train_y, 1)
  dead = lambda h: np.concatenate([h, np.zeros((len(h), 2), np.float32)], 1)
  np.testing.assert_allclose(fit(dead(train_h))(dead(test_h)), fit(train_h)(test_h), rtol=1e-6)
  other = dead(test_h)
  other[:, -1] = 1e-3  # alive in these pictures only
  assert (
    np.abs(fit(dead(train_h))(other) - fit(train_h)(test_h)).max()
    < 1e-3 * np.abs(fit(train_h)(test_h)).max()
  )
  if score == 'mahalanobis':
    double = lambda h: np.concatenate([h, h[:, :1] + h[:, 1:2]], 1)
    np.testing.assert_allclose(
      fit(double(train_h))(double(test_h)), fit(train_h)(test_h), rtol=1e-4
    )
  few = scores.SCORES[score].function(train_h[:4], train_y[:4], 1)  # fewer rows than features
  assert np.isfinite(few(test_h)).all()


@pytest.mark.parametrize('name', scores.SCORES)
def test_in_distribution_is_higher(blobs, name):
  train_h, train_y, test_h, ood_h = blobs
  score = scores.SCORES[name]
  if score.needs == 'logits':
    generator = np.random.default_rng(0)
    certain = generator.normal(size=(60, 5)) + 9 * np.eye(5)[generator.integers(0, 5, 60)]
    good, bad = score.function(certain), score.function(generator.normal(size=(50, 5)))
  else:
    known = score.function(train_h, train_y, 10)
    good, bad = known(test_h), known(ood_h)
  assert scores.auroc(good, bad) > 0.9
  assert good.dtype == np.float64


def test_bad_features_are_named(blobs):
  train_h, train_y, test_h, _ = blobs
  hole = test_h.copy()
  hole[7, 2] = np.nan
  for k in (0, 301):
    with pytest.raises(UserError, match=f'k is {k}, expected 1 to 300'):
      scores.knn(train_h, k)
  with pytest.raises(UserError, match=r'labels \(299,\)'):
    scores.mahalanobis(train_h, train_y[1:])
  for fit in (scores.knn, scores.ssd, lambda h: scores.mahalanobis(h, train_y)):
    with pytest.raises(
      UserError, match='features are NaN or infinite in 1 of 80 rows, first in row 7'
    ):
      fit(train_h)(hole)
    with pytest.raises(UserError, match=r'features are \(80, 5\), expected \(N, 6\)'):
      fit(train_h)(test_h[:, :5])
  for function in (scores.msp, scores.mls, scores.energy):
    with pytest.raises(UserError, match='logits are NaN'):
      function(hole)
    with pytest.raises(UserError, match=r'logits are \(6,\)'):
      function(test_h[0])
