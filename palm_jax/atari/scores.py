"""The job that aggregates scores of Atari-100k and sets them beside published ones.

Scores are normalised by a human's and aggregated over games and runs, with intervals, as Agarwal et
al. 2021 (arXiv 2108.13264) do.

Beside PALM's Table 2 stand scores of DrQ with a smaller epsilon, DrQ(eps). It is not pretrained and
still scores higher than PALM's row. So the worth of a pretraining is seen only beside the same
fine-tuning from scratch.
"""

import collections
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from palm_jax.atari.aggregates import (
  FEWEST_RUNS,
  STATISTICS,
  aggregate,
  bootstrap,
  human_normalised,
  published,
)
from palm_jax.atari.environment import GAMES, require_game
from palm_jax.atari.results import FineTuned, find, read_files, read_runs
from palm_jax.base import checks, devices
from palm_jax.base.errors import UserError
from palm_jax.base.tables import aligned, protocol_line
from palm_jax.job import Job, Run, never

Scores = dict[str, dict[str, list[float]]]  # {variant: {game: raw scores of its runs}}
OTHERS = 'random', 'human', 'DrQ', 'DrQ(eps)'  # columns beside the scores of each game


def default_config() -> ConfigDict:
  """Settings of the job."""
  return ConfigDict(
    dict(
      # workdirs of fine-tunings, or patterns such as 'runs/atari/**'
      runs=(),  # empty: this workdir and the folders in it
      resamples=2000,  # of the runs, for the intervals; rliable's examples: up to 50,000
    )
  )


RANGES = dict(resamples=checks.Range(100, 10**7))


def check(config: ConfigDict, num_devices: int) -> None:
  """Raises UserError on settings of the whole config's section `scores` that cannot work."""
  del num_devices  # all is done on the host
  require_game(config, 'scores')
  c = config.scores
  listed = isinstance(c.runs, (tuple, list))
  if not listed or not all(isinstance(pattern, str) and pattern for pattern in c.runs):
    raise UserError(
      f"scores.runs={c.runs!r}: expected a tuple of workdirs or patterns, such as ('runs/atari/*',)"
    )
  checks.ranges('scores', c, RANGES)


def run(this: Run) -> dict:
  """The job: gathers results of fine-tunings, aggregates them, and lists every game.

  Returns:
    What stands in results/scores.json: `rows`, one a line of the first table, whose aggregates are
    [value] or [value, low, high], or None where unknown; `games`, {game: {variant: {mean, sd, hns,
    seeds, scores}}}; `notes`; `protocol`; `seconds`.

  Raises:
    UserError: no runs, or invalid results; see `find` and `read_runs`.
  """
  started = time.monotonic()
  config, c = this.config, this.config.scores
  runs = read_runs(find(c.runs, this.workdir))
  runs.sort(key=lambda run: (run.variant, run.game, run.seed))
  by_game = collections.defaultdict(lambda: collections.defaultdict(list))
  for each in runs:
    by_game[each.variant][each.game].append(each)
  scores = {
    variant: {game: [run.score for run in of_game] for game, of_game in games.items()}
    for variant, games in by_game.items()
  }
  games = {
    game: {
      variant: describe_game(game, of_games[game])
      for variant, of_games in by_game.items()
      if game in of_games
    }
    for game in GAMES
    if any(game in of_games for of_games in by_game.values())
  }
  return dict(
    job='scores',
    rows=make_rows(scores, c.resamples, config.seed),
    games=games,
    notes=make_notes(scores, runs),
    protocol=protocol_of(config, runs),
    folders=[run.folder for run in runs],
    **devices.describe(this.mesh),
    seconds=time.monotonic() - started,
  )


def describe_game(game: str, runs: list[FineTuned]) -> dict[str, Any]:
  """The scores of one variant in one game."""
  scores = [run.score for run in runs]
  return dict(
    mean=float(np.mean(scores)),
    sd=float(np.std(scores, ddof=1)) if len(scores) > 1 else None,
    hns=float(human_normalised(scores, game).mean()),
    seeds=[run.seed for run in runs],
    scores=scores,
  )


def protocol_of(config: ConfigDict, runs: list[FineTuned]) -> dict[str, Any]:
  """Every setting that made the numbers."""
  distinct = lambda name: sorted({getattr(run, name) for run in runs})
  of_agents = lambda name: sorted({run.agent[name] for run in runs if name in run.agent})
  return dict(
    runs=len(runs),
    agent_steps=distinct('agent_steps'),
    frames=distinct('frames'),
    episodes=distinct('episodes'),
    epsilon=of_agents('epsilon'),
    eval_epsilon=of_agents('eval_epsilon'),
    trunk_steps=distinct('trunk_step'),
    score='raw, mean over the evaluation episodes of a run',
    hns='(score - random) / (human - random)',
    median='over games, of means over runs',
    mean='over games, of means over runs',
    iqm='mean of the middle half of all runs of all games',
    gap='mean of 1 - min(hns, 1)',
    interval='95%, stratified bootstrap: runs resampled within each game, percentiles 2.5 and 97.5',
    resamples=config.scores.resamples,
    seed=config.seed,
    published='sources in palm_jax/atari/published.json',
  )


def make_rows(scores: Scores, resamples: int, seed: int) -> list[dict[str, Any]]:
  """Lines of the first table: the variants, then what is known of others.

  Where not all variants have the same games, or not all 26, they and the published methods stand
  again over the games that all variants have.

  Args:
    scores: of the variants.
    resamples: for the intervals.
    seed: of the resamples.
  """
  measured = lambda name, known: measured_row(name, known, resamples, seed)
  methods = published()['methods']
  common = [game for game in GAMES if all(game in known for known in scores.values())]
  over_common = 'the same game' if len(common) == 1 else f'the same {len(common)} games'
  rows = [measured(variant, known) for variant, known in scores.items()]
  if common and any(len(known) > len(common) for known in scores.values()):
    rows += [
      measured(f'{variant}, {over_common}', {game: known[game] for game in common})
      for variant, known in scores.items()
    ]
  if 0 < len(common) < len(GAMES):
    rows += [row_of_means(f'{name}, {over_common}', name, common) for name in methods]
  return rows + [row_of_method(name) for name in methods] + paper_rows()


def measured_row(
  name: str, scores: dict[str, list[float]], resamples: int, seed: int
) -> dict[str, Any]:
  """The line of one variant's {game: scores}, with intervals where there are runs enough."""
  found = aggregate(scores)
  intervals = bootstrap(scores, resamples, seed)
  counts = {len(runs) for runs in scores.values()}
  row = dict(found, method=name, games=len(scores), runs=[min(counts), max(counts)])
  for statistic in STATISTICS:
    row[statistic] = [found[statistic], *(intervals[statistic] if intervals else ())]
  return row


def row_of_means(name: str, column: str, games: Sequence[str]) -> dict[str, Any]:
  """The line of a published method of which one mean score a game is known."""
  found = aggregate({game: [published()['games'][game][column]] for game in games})
  return dict(
    found,
    method=name,
    games=len(games),
    runs=None,
    median=[found['median']],
    mean=[found['mean']],
    # IQM and gap are of single runs, which are not known here.
    iqm=None,
    gap=None,
  )


def row_of_method(name: str) -> dict[str, Any]:
  """The line of a published method over all games, with its own aggregates where it gives them."""
  known = published()['methods'][name]
  row = row_of_means(name, name, GAMES)
  if 'runs' in known:
    row.update({statistic: known[statistic] for statistic in STATISTICS}, runs=[known['runs']] * 2)
  return row


def paper_rows() -> list[dict[str, Any]]:
  """The lines of PALM's Table 2."""
  return [
    dict(
      method=f'paper: {name}',
      games=len(GAMES),
      runs=None,
      median=[median],
      mean=[mean],
      iqm=None,
      gap=None,
      above_human=above_human,
      above_random=above_random,
    )
    for name, (median, mean, above_human, above_random, _) in published()['table_2']['rows'].items()
  ]


def make_notes(scores: Scores, runs: list[FineTuned]) -> list[str]:
  """What a reader must know before comparing, one sentence each."""
  notes = []
  for variant, known in scores.items():
    counts = {len(of_game) for of_game in known.values()}
    if len(known) < len(GAMES):
      notes.append(
        f'{variant}: over {len(known)} of {len(GAMES)} games, not comparable with aggregates over '
        'all'
      )
    if min(counts) < FEWEST_RUNS:
      notes.append(f'{variant}: no intervals, which need {FEWEST_RUNS} runs of each game')
    if len(counts) > 1:
      notes.append(
        f'{variant}: {min(counts)} to {max(counts)} runs a game; games with more weigh more in '
        'the IQM'
      )
  if 'scratch' not in scores:
    best = published()['methods']['DrQ(eps)']['median'][0]
    palm = published()['table_2']['rows']['PALM'][0]
    notes.append(
      f'no runs from scratch: DrQ(eps) without pretraining has a median of {best:.3f}, PALM one of '
      f'{palm:.3f}, so run the same fine-tuning from scratch beside it'
    )
  steps = sorted({run.agent_steps for run in runs} - {100_000})
  if steps:
    notes.append(
      f'runs of {", ".join(f"{n:,}" for n in steps)} agent steps: published ones have 100,000, or '
      '400,000 frames'
    )
  fewest = min(run.episodes for run in runs)
  if fewest < 100:
    notes.append(f'evaluations of {fewest} episodes: most published ones have 100')
  for name in sorted(set().union(*(run.agent for run in runs))):
    values = {str(run.agent.get(name, '(absent)')) for run in runs}
    if len(values) > 1:
      notes.append(f'the runs differ in agent.{name}: {", ".join(sorted(values))}')
  return notes


def table(results: dict[str, Any]) -> str:
  """The result as text: aggregates, games, notes, protocol."""
  notes = [f'note: {note}' for note in results['notes']]
  aggregates = aligned(aggregate_cells(results['rows']))
  games = aligned(game_cells(results['games']))
  protocol = protocol_line(results['protocol'])
  return '\n'.join([*aggregates, '', *games, '', *notes, protocol])


def aggregate_cells(rows: list[dict[str, Any]]) -> list[list[str]]:
  """The first table: a variant or method a row."""
  cells = [['human-normalised', 'games', 'runs', 'median', 'mean', 'IQM', 'gap', '>H', '>0']]
  for row in rows:
    cells.append(
      [
        row['method'],
        f'{row["games"]} of {len(GAMES)}',
        _span(row['runs']),
        *(_with_interval(row[statistic]) for statistic in STATISTICS),
        str(row['above_human']),
        str(row['above_random']),
      ]
    )
  return cells


def game_cells(games: dict[str, dict[str, Any]]) -> list[list[str]]:
  """The second table: a game a row, published scores first, then those of each variant."""
  variants = list(dict.fromkeys(variant for known in games.values() for variant in known))
  head = ['raw scores', *OTHERS]
  for variant in variants:
    head += [variant, 'runs', 'HNS']
  cells = [head]
  for game, known in games.items():
    line = [game, *(f'{published()["games"][game][column]:,.1f}' for column in OTHERS)]
    for variant in variants:
      line += _of_variant(known.get(variant))
    cells.append(line)
  return cells


def _of_variant(found):
  """Mean and deviation, runs, and human-normalised mean, of `describe_game`."""
  if found is None:
    return ['-'] * 3
  mean = f'{found["mean"]:,.1f}'
  if found['sd'] is not None:
    mean += f' +- {found["sd"]:,.1f}'
  return [mean, str(len(found['scores'])), f'{found["hns"]:.3f}']


def _with_interval(values):
  if values is None:
    return '-'
  if len(values) < 3:
    return f'{values[0]:.3f}'
  return f'{values[0]:.3f} [{values[1]:.3f}, {values[2]:.3f}]'


def _span(counts):
  if counts is None:
    return '-'
  low, high = counts
  return str(low) if low == high else f'{low} to {high}'


JOB = Job(
  'scores',
  run,
  check,
  needs_data=never,
  table=table,
  reads=('finetune', 'scratch'),
  reads_files=read_files,
  judges=True,
)
