"""The job's result: returns of episodes in a row, between those of random actions and oracle."""

from typing import Any

import numpy as np
from ml_collections import ConfigDict

from palm_jax.base import tables
from palm_jax.meta.tasks import Family


def row_of(kind: str, goals: str, returns: Any, bounds: np.ndarray) -> dict[str, Any]:
  """What an agent reached.

  Args:
    kind: one of pearl.AGENTS.
    goals: 'held-out' or 'training'.
    returns: (seeds, episodes, tasks).
    bounds: (2, tasks) returns of random actions and of the oracle.

  Returns:
    `returns` (seeds, episodes) means over tasks; `normalised` the same with 0 for random actions'
    mean return and 1 for the oracle's; `mean` and `standard_error` (episodes,) of these, over
    seeds. The standard error is None of a single seed.
  """
  means = np.asarray(returns, np.float64).mean(-1)
  low, high = np.asarray(bounds, np.float64).mean(-1)
  normalised = (means - low) / max(high - low, 1e-8)
  seeds, episodes = normalised.shape
  error = [None] * episodes
  if seeds > 1:
    error = (normalised.std(0, ddof=1) / np.sqrt(seeds)).tolist()
  return dict(
    agent=kind,
    goals=goals,
    returns=means.tolist(),
    normalised=normalised.tolist(),
    mean=normalised.mean(0).tolist(),
    standard_error=error,
  )


def protocol_of(config: ConfigDict, family: Family) -> dict[str, Any]:
  """Every setting that made the numbers."""
  return dict(
    score='undiscounted return of each episode in a row, (it - random actions) / (oracle - random '
    'actions), means over tasks and seeds, standard error over seeds',
    n=config.meta.test_goals,
    episode_steps=family.steps,
    world=config.world.to_dict(),
    environment=config.environment.to_dict(),
    generator=str(config.generator.path or 'own'),
    meta=config.meta.to_dict(),
  )


def table(result: dict[str, Any]) -> str:
  """Normalised returns, one line an agent and set of goals, one column an episode."""
  rows = result['rows']
  episodes = range(len(rows[0]['mean']))
  cells = [('agent', 'goals', *(f'episode {e + 1}' for e in episodes))]
  for row in rows:
    numbers = zip(row['mean'], row['standard_error'], strict=True)
    cells.append((row['agent'], row['goals'], *(_figure(*pair) for pair in numbers)))
  about = {name: x for name, x in result['protocol'].items() if not isinstance(x, dict)}
  return '\n'.join([*tables.aligned(cells, left=2), tables.protocol_line(about)])


def _figure(mean, error):
  return f'{mean:.3f}' if error is None else f'{mean:.3f} ± {error:.3f}'
