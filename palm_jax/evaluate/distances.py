"""Distances between two sets of features, in float64 on the host: Frechet, kernel, precision and
recall."""

from typing import NamedTuple

import numpy as np
import scipy.linalg

from palm_jax.base.errors import UserError

PAIRS_AT_ONCE = 2**22  # distances held at a time: 32 MB, some times over


class Moments(NamedTuple):
  mean: np.ndarray  # (F,)
  cov: np.ndarray  # (F, F), divided by count - 1
  count: int


def moments(batches):
  """Mean and covariance of features that come in batches (n, F), accumulated in float64 (Chan et
  al. 1979).

  Raises:
    UserError: fewer than two rows in all.
  """
  count, mean, scatter = 0, 0.0, 0.0
  for x in batches:
    x = np.asarray(x, np.float64)
    centre, total = x.mean(0), count + len(x)
    x, shift = x - centre, centre - mean
    scatter = scatter + x.T @ x + np.outer(shift, shift) * (count * len(x) / total)
    mean, count = mean + shift * (len(x) / total), total
  if count < 2:
    raise UserError(f'{count} samples have no covariance: give at least two')
  return Moments(mean, scatter / (count - 1), count)


def frechet_distance(mean_a, cov_a, mean_b, cov_b):
  """Squared Frechet distance of two normal distributions: |mean_a - mean_b|^2 + tr(A + B - 2 (A
  B)^(1/2)).

  Heusel et al. 2017 (arXiv 1706.08500). tr (A B)^(1/2) is the sum of the singular values of
  B^(1/2)' A^(1/2) for any roots of A and B: real, and accurate where fewer samples than features
  leave A and B singular.

  Args:
    mean_a, mean_b: (F,).
    cov_a, cov_b: (F, F), symmetric.

  Returns:
    float, not negative.

  Raises:
    UserError: shapes that do not match, or values that are not finite.
  """
  parts = [np.asarray(x, np.float64) for x in (mean_a, cov_a, mean_b, cov_b)]
  size = parts[0].size
  if [x.shape for x in parts] != [(size,), (size, size)] * 2 or not all(
    np.isfinite(x).all() for x in parts
  ):
    raise UserError(
      f'means and covariances have shapes {[x.shape for x in parts]}, expected finite (F,), (F, '
      'F), twice'
    )
  mean_a, cov_a, mean_b, cov_b = parts

  def root(cov):
    values, vectors = scipy.linalg.eigh(cov, driver='evd')  # three times faster than the default
    values[values <= size * np.finfo(np.float64).eps * max(values[-1], 0)] = (
      0  # the rounding of zeros
    )
    return vectors * np.sqrt(values)

  cross = scipy.linalg.svdvals(root(cov_b).T @ root(cov_a)).sum()
  return max(
    float(np.sum((mean_a - mean_b) ** 2) + np.trace(cov_a) + np.trace(cov_b) - 2 * cross), 0.0
  )


def kernel_distance(a, b, subset_size, num_subsets, seed):
  """Kernel distance: the unbiased squared MMD under (x.y / F + 1)^3, over random subsets (arXiv
  1801.01401).

  Args:
    a, b: (N, F) and (M, F) features.
    subset_size: rows of a and of b in a subset, drawn without replacement.
    num_subsets, seed: of the subsets.

  Returns:
    (mean, standard deviation) over the subsets; around zero, also below it, for equal
    distributions.

  Raises:
    UserError: features that do not match, or a subset that is larger than a or b, or below 2.
  """
  check_features(a, b)
  if not 2 <= subset_size <= min(len(a), len(b)):
    raise UserError(
      f'subset_size is {subset_size}, expected 2 to {min(len(a), len(b))}, the rows of the '
      'smaller set'
    )
  generator, m, distances = np.random.default_rng(seed), subset_size, []

  def kernel(x, y):
    base = x @ y.T / x.shape[1] + 1
    return base * base * base  # 20 times faster than base ** 3

  for _ in range(num_subsets):
    x, y = (np.asarray(z[generator.choice(len(z), m, replace=False)], np.float64) for z in (a, b))
    xx, yy = kernel(x, x), kernel(y, y)
    within = xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)
    distances.append(within / (m * (m - 1)) - 2 * kernel(x, y).mean())
  return float(np.mean(distances)), float(np.std(distances))


def precision_recall(real, fake, k=3):
  """Improved precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991).

  Precision is the share of fakes in the union of the balls around reals that reach to their k-th
  nearest other real; recall the same with the sides exchanged. A point on a ball's surface is in
  it.

  Args:
    real, fake: (N, F) and (M, F) features.
    k: neighbours, fewer than N and M.

  Returns:
    (precision, recall).

  Raises:
    UserError: features that do not match, or k out of range.
  """
  check_features(real, fake)
  if not 1 <= k < min(len(real), len(fake)):
    raise UserError(
      f'k is {k}, expected 1 to {min(len(real), len(fake)) - 1}, fewer than the rows of the '
      'smaller set'
    )
  centre = np.mean(
    real, axis=0, dtype=np.float64
  )  # far from the origin, Gram matrices lose what is near
  real, fake = np.asarray(real, np.float64) - centre, np.asarray(fake, np.float64) - centre
  return _covered(fake, real, neighbour_radii(real, k)), _covered(
    real, fake, neighbour_radii(fake, k)
  )


def rough_distances(points, centres):
  """Yields (rows of points, their squared distances to all centres (n, N), a bound of these
  distances' errors (n, 1))."""
  squares = np.sum(centres * centres, 1)
  relative = 4 * points.shape[1] * np.finfo(np.float64).eps
  step = max(PAIRS_AT_ONCE // len(centres), 1)
  for start in range(0, len(points), step):
    rows = np.arange(start, min(start + step, len(points)))
    own = np.sum(points[rows] ** 2, 1)[:, None]
    distances = points[rows] @ centres.T
    distances *= -2
    distances += squares
    distances += own
    yield rows, distances, relative * (own + squares.max())


def exact_distances(x, y):
  return np.sum((x - y) ** 2, -1)


def neighbour_radii(x, k):
  """(N,) squared distances to the k-th nearest other row, among all that may be it, computed
  exactly."""
  radii = np.empty(len(x))
  for rows, distances, error in rough_distances(x, x):
    distances[np.arange(len(rows)), rows] = np.inf
    farthest = np.partition(distances, k - 1, 1)[:, k - 1 : k] + 2 * error
    for row, candidates in zip(rows, distances <= farthest, strict=True):
      radii[row] = np.partition(exact_distances(x[row], x[candidates]), k - 1)[k - 1]
  return radii


def _covered(points, centres, radii):
  """Share of points within the squared radius of any centre. Pairs too close to call are computed
  exactly."""
  covered = 0
  for rows, distances, error in rough_distances(points, centres):
    distances -= radii
    inside = (distances <= -error).any(1)
    for i in np.flatnonzero(~inside):
      doubtful = np.flatnonzero(distances[i] <= error[i])
      inside[i] = (exact_distances(points[rows[i]], centres[doubtful]) <= radii[doubtful]).any()
    covered += inside.sum()
  return float(covered / len(points))


def check_features(a, b):
  if np.ndim(a) != 2 or np.shape(a)[1:] != np.shape(b)[1:]:
    raise UserError(f'features are {np.shape(a)} and {np.shape(b)}, expected (N, F) and (M, F)')
