"""Human-normalised scores of Atari-100k and their aggregates, with intervals.

The aggregates are those of Agarwal et al. 2021 (arXiv 2108.13264), whose library rliable is the
model.
"""

import functools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from palm_jax.atari.environment import rom_id
from palm_jax.base.errors import UserError

STATISTICS = 'median', 'mean', 'iqm', 'gap'
FEWEST_RUNS = 3  # for an interval: of two runs there are three resamples
RESAMPLES_AT_ONCE = 250


@functools.cache
def published() -> dict[str, Any]:
  """Random, human and published scores, as in published.json."""
  return json.loads((pathlib.Path(__file__).parent / 'published.json').read_text())


def human_normalised(scores: Sequence[float] | np.ndarray, game: str) -> np.ndarray:
  """Raw scores -> float64 scores of which 0 is a random player's and 1 a human's.

  Raises:
    UserError: an unknown game.
  """
  rom_id(game)
  known = published()['games'][game]
  return (np.asarray(scores, np.float64) - known['random']) / (known['human'] - known['random'])


def aggregate(runs: Mapping[str, Sequence[float]]) -> dict[str, Any]:
  """Aggregates of human-normalised scores.

  Args:
    runs: {game: (R,) raw scores of R runs}, R may differ.

  Returns:
    `median` and `mean`, over games, of a game's mean over runs; `iqm`, the mean of the middle half
    of all runs of all games; `gap`, the mean by which scores fall short of 1, games weighing alike;
    `above_human` and `above_random`, numbers of games whose mean is above 1, and above 0.

  Raises:
    UserError: no game, an unknown one, or scores that are not (R,) finite numbers.
  """
  scores = _normalised(runs)
  means = np.array([score.mean() for score in scores])
  return dict(
    **{name: float(value) for name, value in _statistics(scores).items()},
    above_human=int((means > 1).sum()),
    above_random=int((means > 0).sum()),
  )


def bootstrap(
  runs: Mapping[str, Sequence[float]], resamples: int = 2000, seed: int = 0
) -> dict[str, tuple[float, float]] | None:
  """95% intervals of the STATISTICS of `aggregate`; runs are drawn anew within each game.

  Args:
    runs: as for `aggregate`.
    resamples: draws of all runs.
    seed: of the draws.

  Returns:
    {name: (low, high)}; None where a game has fewer than FEWEST_RUNS runs.
  """
  scores, generator = _normalised(runs), np.random.default_rng(seed)
  if min(map(len, scores)) < FEWEST_RUNS:
    return None
  parts = []
  for start in range(0, resamples, RESAMPLES_AT_ONCE):
    count = min(RESAMPLES_AT_ONCE, resamples - start)
    places = (generator.integers(0, len(score), (count, len(score))) for score in scores)
    parts.append(_statistics([score[at] for score, at in zip(scores, places, strict=True)]))
  intervals = {}
  for name in STATISTICS:
    values = np.concatenate([part[name] for part in parts])
    low, high = np.percentile(values, [2.5, 97.5]).tolist()
    intervals[name] = low, high
  return intervals


def _normalised(runs):
  """[(R,) human-normalised] of {game: (R,) raw}."""
  if not runs:
    raise UserError('there are no scores to aggregate: give those of one game or more')
  for game, scores in runs.items():
    scores = np.asarray(scores, np.float64)
    if scores.ndim != 1 or not scores.size or not np.isfinite(scores).all():
      raise UserError(
        f'scores of {game} are {scores.tolist()}: expected a list of finite numbers, one a run'
      )
  return [human_normalised(scores, game) for game, scores in runs.items()]


def _statistics(scores):
  """{name: (...)} of one (..., R) array a game."""
  means = np.stack([score.mean(-1) for score in scores], -1)
  short = np.stack([(1 - np.minimum(score, 1)).mean(-1) for score in scores], -1)
  everything = np.sort(np.concatenate(scores, -1), -1)
  size = everything.shape[-1]
  middle = everything[..., size // 4 : size - size // 4]
  return dict(
    median=np.median(means, -1), mean=means.mean(-1), iqm=middle.mean(-1), gap=short.mean(-1)
  )
