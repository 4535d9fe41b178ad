"""How much of a data set another source's pictures lie near to: nearest-neighbour coverage, PRDC.

Neighbours are exact: squared distances are sifted by a Gram matrix in float64 with a bound of its
errors, and those too close to call are computed again by differences. A block of distances at a
time is in memory.
"""

import numpy as np

from palm_jax.base.errors import UserError
from palm_jax.evaluate import distances


def unique_nearest(real: np.ndarray, fake: np.ndarray) -> float:
  """Share of reals that are the nearest real of at least one fake (PALM, Table 3).

  Uniformly spread hits give 1 - (1 - 1/N)^M. It measures neither fidelity nor independence of M:
  noise raises it, and so do more fakes.

  Args:
    real: (N, F) features; distances are Euclidean, without normalisation.
    fake: (M, F).

  Returns:
    In (0, 1].

  Raises:
    UserError: features that are empty, not finite or do not match.
  """
  return _shares(*_prepared(real, fake))[0]


def coverage(real: np.ndarray, fake: np.ndarray) -> dict[str, float]:
  """`unique_nearest` and the other readings of Table 3's caption.

  Returns:
    {'unique_nn': `unique_nearest`; 'symmetric': its mean with the share of fakes that are the
    nearest of at least one real; 'hit_once': share of reals that are the nearest of exactly one
    fake, 1/e where hits are uniform and M = N}.
  """
  real, fake = _prepared(real, fake)
  unique, once = _shares(real, fake)
  return dict(unique_nn=unique, symmetric=(unique + _shares(fake, real)[0]) / 2, hit_once=once)


def prdc(real: np.ndarray, fake: np.ndarray, k: int = 5) -> dict[str, float]:
  """Precision, recall, density and coverage, as the package prdc has them.

  arXiv 1904.06991 and 2002.09797. Balls reach from a point to its k-th nearest other point of its
  own set; points on their surface are outside, so features that are all equal score 0.

  Args:
    real: (N, F) features.
    fake: (M, F).
    k: neighbours, fewer than N and M.

  Returns:
    {'precision': share of fakes in any real's ball; 'recall': share of reals in any fake's ball;
    'density': mean number of real balls that a fake is in, over k, beyond 1 where fakes crowd;
    'coverage': share of reals whose ball holds any fake}.

  Raises:
    UserError: as `unique_nearest`, or k out of range.
  """
  real, fake = _prepared(real, fake)
  distances.check_neighbours(k, real, fake)
  real_radii, fake_radii = distances.neighbour_radii(real, k), distances.neighbour_radii(fake, k)
  precise = np.zeros(len(fake), bool)
  memberships = recalled = covered = 0
  for rows, rough, error in distances.rough_distances(real, fake):
    inside = _inside(rough, error, real_radii[rows, None], real[rows], fake)  # (n, M)
    precise |= inside.any(0)
    memberships += inside.sum()
    covered += inside.any(1).sum()
    recalled += _inside(rough, error, fake_radii, real[rows], fake).any(1).sum()
  return dict(
    precision=float(precise.mean()),
    recall=float(recalled / len(real)),
    density=float(memberships / k / len(fake)),
    coverage=float(covered / len(real)),
  )


def nearest(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
  """(M,) int: for each of (M, F) points the row of the nearest of (N, F) centres, all float64.

  Of equals it is the smallest.
  """
  found = np.empty(len(points), np.int64)
  for rows, rough, error in distances.rough_distances(points, centres):
    found[rows] = rough.argmin(1)
    close = rough <= rough.min(1, keepdims=True) + 2 * error
    for i in np.flatnonzero(np.count_nonzero(close, 1) > 1):
      candidates = np.flatnonzero(close[i])
      exact = distances.exact_distances(points[rows[i]], centres[candidates])
      found[rows[i]] = candidates[exact.argmin()]
  return found


def _shares(centres, points):
  """Shares of centres that are the nearest of at least one, and of exactly one point."""
  hits = np.bincount(nearest(points, centres), minlength=len(centres))
  return float(np.mean(hits > 0)), float(np.mean(hits == 1))


def _inside(rough, error, radii, points, centres):
  """(n, M) bool: squared distances strictly below squared radii (broadcast to (n, M)), exactly."""
  gap = rough - radii
  inside = gap < 0
  np.abs(gap, out=gap)
  doubtful = np.nonzero(gap <= error)
  step = max(distances.PAIRS_AT_ONCE // points.shape[1], 1)
  radii = np.broadcast_to(radii, gap.shape)
  for start in range(0, len(doubtful[0]), step):
    i, j = (index[start : start + step] for index in doubtful)
    inside[i, j] = distances.exact_distances(points[i], centres[j]) < radii[i, j]
  return inside


def _prepared(real, fake):
  """Checked features in float64, brought near to the origin, where Gram matrices lose less."""
  distances.check_features(real, fake)
  real, fake = np.asarray(real, np.float64), np.asarray(fake, np.float64)
  if not (real.size and fake.size and np.isfinite(real).all() and np.isfinite(fake).all()):
    raise UserError(
      f'features {real.shape} and {fake.shape} are empty or not finite: check what made them'
    )
  # Of few bits: differences of float32 features stay exact, so ties stay ties.
  shift = real.mean(0).astype(np.float32)
  return real - shift, fake - shift
