"""How much a picture looks in-distribution (ID), and how well that tells two sets apart.

Scores are of logits or features. Every score is higher for ID pictures, and computed in float64 on
the host. Names and settings are those of OpenOOD's postprocessors (msp, mls, ebo, knn, mds), and of
SSD (inspire-group/SSD, eval_ssd.py).
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import scipy.linalg
import scipy.special
import scipy.stats

from palm_jax.base.errors import UserError
from palm_jax.evaluate import linear
from palm_jax.evaluate.features import check_finite

PAIRS_AT_ONCE = 2**23  # similarities held at a time: 64 MB, twice over


# ---- scores of logits (N, K) -> (N,)


def msp(logits: np.ndarray) -> np.ndarray:
  """Logarithm of the largest softmax probability (Hendrycks and Gimpel 2017, arXiv 1610.02136).

  The logarithm keeps the order, and has no ties where the probability itself rounds to 1.
  """
  top, others = _top_and_others(logits)
  return -np.log1p(np.exp(others - top[:, None]).sum(1))


def mls(logits: np.ndarray) -> np.ndarray:
  """The largest logit (Hendrycks et al. 2022, arXiv 1911.11132)."""
  return _top_and_others(logits)[0]


def energy(logits: np.ndarray) -> np.ndarray:
  """Negative energy, log sum exp at temperature 1 (Liu et al. 2020, arXiv 2010.03759)."""
  return np.asarray(scipy.special.logsumexp(_rows(logits, 'logits'), axis=1))


# ---- scores of features: from the training set to a function (N, F) -> (N,)


def knn(train_h: np.ndarray, k: int = 50) -> Callable[[np.ndarray], np.ndarray]:
  """Minus the squared distance to the k-th nearest training feature, all l2-normalised.

  Sun et al. 2022, arXiv 2204.06507.

  Args:
    train_h: (N, F), every training feature.
    k: 50 is OpenOOD's for CIFAR-10.

  Raises:
    UserError: features that are not finite (N, F), or k below 1 or above N.
  """
  train_h = _unit(_rows(train_h, 'training features'))
  if not 1 <= k <= len(train_h):
    raise UserError(f'k is {k}, expected 1 to {len(train_h)}, the number of training features')

  def score(h):
    h = _unit(_rows(h, 'features', train_h.shape[1]))
    nearest = np.empty(len(h), np.intp)
    step = max(PAIRS_AT_ONCE // len(train_h), 1)
    for start in range(0, len(h), step):
      cosines = h[start : start + step] @ train_h.T
      nearest[start : start + step] = np.argpartition(cosines, -k, axis=1)[:, -k]
    return -np.sum((h - train_h[nearest]) ** 2, 1)  # 2 - 2 cosine would lose what is near

  return score


def mahalanobis(
  train_h: np.ndarray, train_labels: np.ndarray
) -> Callable[[np.ndarray], np.ndarray]:
  """Minus the squared Mahalanobis distance to the nearest class mean, one covariance for all.

  Lee et al. 2018, arXiv 1807.03888.

  Args:
    train_h: (N, F) features.
    train_labels: (N,).

  Raises:
    UserError: features that are not finite (N, F), or another number of labels.
  """
  train_h, train_labels = _rows(train_h, 'training features'), np.asarray(train_labels)
  if train_labels.shape != train_h.shape[:1]:
    raise UserError(
      f'training features are {train_h.shape} and labels {train_labels.shape}, '
      'expected (N, F) and (N,)'
    )
  classes, index = np.unique(train_labels, return_inverse=True)
  means = np.stack([train_h[train_labels == label].mean(0) for label in classes])
  whiten = _whitening(train_h - means[index])

  def score(h):
    h = _rows(h, 'features', train_h.shape[1])
    return np.max([-np.sum(((h - mean) @ whiten) ** 2, 1) for mean in means], axis=0)

  return score


def ssd(train_h: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
  """Minus the squared Mahalanobis distance to the training set as one cluster, without labels.

  Sehwag et al. 2021, arXiv 2103.12051. Features are l2-normalised, then standardised by training
  mean and deviation; a constant one is left out.

  Raises:
    UserError: features that are not finite (N, F).
  """
  train_h = _unit(_rows(train_h, 'training features'))
  mean, scale = train_h.mean(0), train_h.std(0)
  # SSD adds 1e-10; then the rounding of what never varies would count as a direction.
  scale[scale <= 1e-10] = np.inf
  whiten = _whitening((train_h - mean) / scale)

  def score(h):
    h = _unit(_rows(h, 'features', train_h.shape[1]))
    return -np.sum(((h - mean) / scale @ whiten) ** 2, 1)

  return score


class Score(NamedTuple):
  """One way to score."""

  needs: str  # 'logits' or 'features'
  function: Callable  # function(logits), or function(train_h, train_labels, k)(h)


SCORES = {
  'msp': Score('logits', msp),
  'mls': Score('logits', mls),
  'energy': Score('logits', energy),
  'knn': Score('features', lambda train_h, train_labels, k: knn(train_h, k)),
  'mahalanobis': Score(
    'features', lambda train_h, train_labels, k: mahalanobis(train_h, train_labels)
  ),
  'ssd': Score('features', lambda train_h, train_labels, k: ssd(train_h)),
}


def of_features(
  names: Iterable[str],
  heads: Sequence[linear.LinearModel],
  train_h: np.ndarray,
  train_labels: np.ndarray,
  k: int,
) -> dict[str, list[Callable[[np.ndarray], np.ndarray]]]:
  """The scores of these names as functions of features (N, F) -> (N,).

  A score of logits has a function a head, a score of features has one.
  """
  found = {}
  for name in names:
    score = SCORES[name]
    if score.needs == 'logits':
      found[name] = [functools.partial(_of_head, score.function, head) for head in heads]
    else:
      found[name] = [score.function(train_h, train_labels, k)]
  return found


def _of_head(function, head, h):
  return function(linear.logits(head, h))


# ---- how well scores (N,) of ID and (M,) of OOD pictures are told apart


def auroc(id_scores: np.ndarray, ood_scores: np.ndarray) -> float:
  """P(ID > OOD) + P(ID = OOD) / 2: Mann-Whitney's statistic by average ranks, no binning."""
  id_scores, ood_scores = _scores(id_scores, ood_scores)
  n, m = len(id_scores), len(ood_scores)
  ranks = scipy.stats.rankdata(np.concatenate([id_scores, ood_scores]))
  return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))


def aupr_in(id_scores: np.ndarray, ood_scores: np.ndarray) -> float:
  """Average precision with ID as the positives.

  The area is that of steps, as in scikit-learn; OpenOOD's trapezoids are larger.
  """
  return _average_precision(*_scores(id_scores, ood_scores))


def aupr_out(id_scores: np.ndarray, ood_scores: np.ndarray) -> float:
  """Average precision with OOD as the positives, by the scores' negatives."""
  id_scores, ood_scores = _scores(id_scores, ood_scores)
  return _average_precision(-ood_scores, -id_scores)


def fpr_at_95_tpr(id_scores: np.ndarray, ood_scores: np.ndarray) -> float:
  """Share of OOD at or above the highest threshold at or above which at least 95% of ID are.

  ID is positive, as in SSD and most papers (OpenOOD keeps 95% of OOD: another number). The
  threshold is one of the ID scores, and pictures of one score fall on one side together, as in
  scikit-learn's roc_curve.
  """
  id_scores, ood_scores = _scores(id_scores, ood_scores)
  kept = -(-95 * len(id_scores) // 100)
  return float(np.mean(ood_scores >= np.sort(id_scores)[-kept]))


METRICS = {'auroc': auroc, 'aupr_in': aupr_in, 'aupr_out': aupr_out, 'fpr_at_95_tpr': fpr_at_95_tpr}


def _average_precision(positive, negative):
  """Sum over distinct scores, from the top, of (recall gained) * (precision down to there)."""
  values, where = np.unique(np.concatenate([positive, negative]), return_inverse=True)
  counts = lambda part: np.bincount(part, minlength=len(values))[::-1]
  hits, misses = counts(where[: len(positive)]), counts(where[len(positive) :])
  precision = hits.cumsum() / (hits + misses).cumsum()
  return float(np.sum(hits * precision) / len(positive))


def _scores(*parts):
  parts = [np.asarray(part, np.float64) for part in parts]
  for name, part in zip(('ID', 'OOD'), parts, strict=True):
    if part.ndim != 1 or not part.size or np.isnan(part).any():
      raise UserError(
        f'{name} scores are {part.shape} with {np.isnan(part).sum()} NaN, expected (N,) with N of '
        'at least 1 and no NaN: check the network that made them'
      )
  return parts


def _rows(x, what, width=None):
  """x (N, F) as finite float64, or a UserError."""
  x = np.asarray(x, np.float64)
  if x.ndim != 2 or not x.size or width not in (None, x.shape[1]):
    raise UserError(f'{what} are {x.shape}, expected (N, {width or "F"}) with N of at least 1')
  check_finite(x, what, 'check the network that made them')
  return x


def _top_and_others(logits):
  """(N,) largest logit, (N, K - 1) all but one that is the largest."""
  logits = np.sort(_rows(logits, 'logits'), axis=1)
  return logits[:, -1], logits[:, :-1]


def _unit(h):
  return h / np.maximum(np.linalg.norm(h, axis=1, keepdims=True), 1e-10)


def _whitening(centred):
  """(F, R), W with |x @ W|^2 = x' C^+ x.

  C is the covariance (divided by N) of rows of mean zero (N, F), ^+ as in scipy's pinvh.
  """
  values, vectors = scipy.linalg.eigh(centred.T @ centred / len(centred), driver='evd')
  kept = values > len(values) * np.finfo(np.float64).eps * np.abs(values).max()
  return vectors[:, kept] / np.sqrt(values[kept])
