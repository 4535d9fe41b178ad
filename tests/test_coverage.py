"""Coverage and PRDC against their definitions written out, closed forms, and what is known of
normal distributions."""

import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from palm_jax.base.errors import UserError
from palm_jax.evaluate import coverage, distances


def squared(x, y):
  return np.sum((x[:, None] - y[None]) ** 2, -1)


def brute_force_coverage(real, fake):
  hits = lambda centres, points: np.bincount(
    squared(points, centres).argmin(1), minlength=len(centres)
  )
  of_real, of_fake = hits(real, fake), hits(fake, real)
  return dict(
    unique_nn=np.mean(of_real > 0),
    symmetric=(np.mean(of_real > 0) + np.mean(of_fake > 0)) / 2,
    hit_once=np.mean(of_real == 1),
  )


def brute_force_prdc(real, fake, k):
  """arXiv 2002.09797, equations 1 to 3 and 5, with the k-th neighbour found among k + 1 that
  include the point itself."""
  radius = lambda x: np.array([sorted(np.linalg.norm(x - a, axis=1))[k] for a in x])
  real_radii, fake_radii = radius(real), radius(fake)
  between = np.array([[np.linalg.norm(x - y) for y in fake] for x in real])  # (N, M)
  in_real, in_fake = between < real_radii[:, None], between < fake_radii[None]
  return dict(
    precision=np.mean([in_real[:, j].any() for j in range(len(fake))]),
    recall=np.mean([in_fake[i].any() for i in range(len(real))]),
    density=in_real.sum() / (k * len(fake)),
    coverage=np.mean([between[i].min() < real_radii[i] for i in range(len(real))]),
  )


def sets(kind):
  """Two sets of features: far apart in places, far from the origin, or full of ties."""
  rng = np.random.default_rng(0)
  if kind == 'normal':
    return rng.normal(size=(83, 7)), rng.normal(size=(61, 7)) * 1.3
  if (
    kind == 'far'
  ):  # float32 as features are: a Gram matrix without a shift would have lost everything
    return [(rng.normal(size=(n, 7)) + 3e4).astype(np.float32) for n in (83, 61)]
  if kind == 'lattice':  # most distances are shared, many points are doubles
    return [rng.integers(0, 3, (n, 3)).astype(np.float32) for n in (83, 61)]
  if (
    kind == 'clusters'
  ):  # neighbours are a billionth of the way to the other cluster apart: lost in any Gram matrix
    return [rng.choice([-1e6, 1e6], (n, 1)) + rng.normal(size=(n, 7)) * 1e-3 for n in (83, 61)]
  x, y = rng.normal(size=(40, 5)), rng.normal(size=(30, 5))
  return np.concatenate([x, x, y[:3]]), np.concatenate([y, y, x[:5]])  # 'doubles'


KINDS = 'normal', 'far', 'lattice', 'clusters', 'doubles'


@pytest.mark.parametrize('pairs', [2**22, 300])  # all at once; a few rows at a time
@pytest.mark.parametrize('kind', KINDS)
def test_coverage_equals_its_definition(kind, pairs, monkeypatch):
  monkeypatch.setattr(distances, 'PAIRS_AT_ONCE', pairs)
  real, fake = sets(kind)
  wanted = brute_force_coverage(*(np.asarray(x, np.float64) for x in (real, fake)))
  assert coverage.coverage(real, fake) == pytest.approx(wanted, abs=1e-15)
  assert coverage.unique_nearest(real, fake) == wanted['unique_nn']
  assert 0 < wanted['hit_once'] < wanted['unique_nn'] < 1


@pytest.mark.parametrize('pairs', [2**22, 300])
@pytest.mark.parametrize('k', [1, 5])
@pytest.mark.parametrize('kind', KINDS)
def test_prdc_equals_its_definition(kind, k, pairs, monkeypatch):
  monkeypatch.setattr(distances, 'PAIRS_AT_ONCE', pairs)
  real, fake = sets(kind)
  wanted = brute_force_prdc(*(np.asarray(x, np.float64) for x in (real, fake)), k)
  assert coverage.prdc(real, fake, k) == pytest.approx(wanted, abs=1e-12)


def test_equal_distances_go_to_the_smaller_row():
  centres = np.array([[1.0, 0], [0, 1], [1, 0], [-1, 0], [5, 5], [5, 5]])
  points = np.array([[0.0, 0], [-0.1, 0], [1, 1], [5, 5], [2, 0]])
  np.testing.assert_array_equal(coverage.nearest(points, centres), [0, 3, 0, 4, 0])
  np.testing.assert_array_equal(coverage.nearest(points + 2**20, centres + 2**20), [0, 3, 0, 4, 0])


def test_features_that_are_all_equal_cover_nothing():
  for value in (0, 0.1, 1e6):
    same = np.full((30, 4), value, np.float32)
    assert coverage.prdc(same, same[:20], 5) == dict(precision=0, recall=0, density=0, coverage=0)
    wanted = dict(unique_nn=1 / 30, symmetric=(1 / 30 + 1 / 20) / 2, hit_once=0)
    assert coverage.coverage(same, same[:20]) == pytest.approx(wanted)


def test_a_set_covers_itself():
  real = np.random.default_rng(0).normal(size=(50, 6))
  assert coverage.coverage(real, real[::-1]) == dict(unique_nn=1, symmetric=1, hit_once=1)
  scores = coverage.prdc(real, real[::-1], 3)
  assert scores['precision'] == scores['recall'] == scores['coverage'] == 1
  assert scores['density'] == pytest.approx(
    1
  )  # itself and two others of the three neighbours: the third is on the surface


def test_neither_moving_nor_scaling_nor_turning_changes_anything():
  real, fake = sets('normal')
  turn = np.linalg.qr(np.random.default_rng(1).normal(size=(7, 7)))[0]
  for f in (coverage.coverage, coverage.prdc):
    assert f(real @ turn * 1e-4 + 3, fake @ turn * 1e-4 + 3) == pytest.approx(
      f(real, fake), abs=1e-12
    )


def test_hits_spread_uniformly():
  rng, n, drawn = np.random.default_rng(0), 10_000, []
  for _ in range(4):
    real = rng.permutation(n)[:, None].astype(float)
    drawn.append(
      coverage.coverage(real, real[rng.integers(0, n, n)] + rng.uniform(-0.4, 0.4, (n, 1)))
    )
  assert np.mean([d['unique_nn'] for d in drawn]) == pytest.approx(1 - (1 - 1 / n) ** n, abs=0.003)
  assert np.mean([d['hit_once'] for d in drawn]) == pytest.approx(np.exp(-1), abs=0.004)


def gaussian(dimensions, scale=1.0, seed=0, n=10_000):
  rng = np.random.default_rng(seed)
  return [rng.normal(size=(n, dimensions)) * scale for _ in range(2)]


@pytest.mark.parametrize(
  'dimensions, percent', [(1, 55.0), (2, 58.2), (3, 60.1), (5, 61.2), (10, 59.5), (20, 50.9)]
)
def test_normal_features_of_few_dimensions(dimensions, percent):
  assert 100 * coverage.unique_nearest(*gaussian(dimensions, seed=1)) == pytest.approx(
    percent, abs=1
  )


def test_on_a_line_it_has_a_closed_form():
  # The cell of a point is half of two exponential gaps, and empty with probability (1 / (1 +
  # 1/2))^2.
  shares = [coverage.unique_nearest(*gaussian(1, seed=seed, n=3000)) for seed in range(10)]
  assert np.mean(shares) == pytest.approx(5 / 9, abs=0.006)


@pytest.mark.slow
@pytest.mark.parametrize(
  'dimensions, percent, tolerance', [(50, 38.5, 1), (100, 32.3, 1), (500, 23.4, 3), (2048, 22.3, 3)]
)  # few hubs take most hits: draws differ by 1 from 500 on
def test_normal_features_of_many_dimensions(dimensions, percent, tolerance):
  real, fake = gaussian(dimensions)
  share = coverage.unique_nearest(real, fake)
  assert 100 * share == pytest.approx(percent, abs=tolerance)
  found = (
    NearestNeighbors(n_neighbors=1, algorithm='brute')
    .fit(real)
    .kneighbors(fake, return_distance=False)
  )
  assert share == len(np.unique(found)) / len(real)


@pytest.mark.slow
@pytest.mark.parametrize('power, percent', [(0.5, 26.1), (1, 41.1), (1.5, 50.1), (2, 54.4)])
def test_normal_features_whose_variances_follow_a_power_law(power, percent):
  scale = np.arange(1, 2049) ** (-power / 2)
  assert 100 * coverage.unique_nearest(*gaussian(2048, scale)) == pytest.approx(percent, abs=1)


def test_frames_of_few_episodes_cover_less():
  """20 chains of 100 frames, z <- beta z + sqrt(1 - beta^2) eps: the more alike consecutive frames
  are, the less."""
  rng, shares = np.random.default_rng(0), []
  real = rng.normal(size=(2000, 36))
  for beta in (0, 0.75, 0.9, 0.95):
    z = [rng.normal(size=(20, 36))]
    while len(z) < 100:
      z.append(beta * z[-1] + np.sqrt(1 - beta**2) * rng.normal(size=(20, 36)))
    shares.append(coverage.unique_nearest(real, np.concatenate(z)))
  assert all(b < a - 0.01 for a, b in zip(shares, shares[1:], strict=False))


def test_prdc_of_equal_distributions_is_what_its_paper_says():
  scores = coverage.prdc(*gaussian(16, n=3000), 5)
  assert scores['coverage'] == pytest.approx(1 - 2**-5, abs=0.012)
  assert scores['density'] == pytest.approx(1, abs=0.05)


def test_features_that_cannot_be_compared():
  x = np.zeros((6, 3))
  for real, fake, message in (
    (x, x[:, :2], r'\(6, 3\) and \(6, 2\)'),
    (x[0], x, r'expected \(N, F\)'),
    (x[:0], x, 'empty or not finite'),
    (x, x + np.nan, 'empty or not finite'),
  ):
    for f in (coverage.unique_nearest, coverage.coverage, coverage.prdc):
      with pytest.raises(UserError, match=message):
        f(real, fake)
  for k in (0, 6):
    with pytest.raises(UserError, match=f'k is {k}, expected 1 to 5'):
      coverage.prdc(x, x, k)
