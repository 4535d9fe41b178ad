"""Scores of Atari-100k: normalised by a human's, aggregated over games and runs with intervals,
beside published ones.

The aggregates are those of Agarwal et al. 2021 (arXiv 2108.13264), whose library rliable is the
model. Beside PALM's Table 2 stand scores of DrQ with a smaller epsilon, DrQ(eps), which learned
nothing beforehand and score higher than PALM's row. So the worth of a pretraining is seen only
beside the same fine-tuning from scratch.
"""

import collections
import time

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
from palm_jax.atari.results import FineTuned, find, read_runs
from palm_jax.base import devices
from palm_jax.base.errors import UserError
from palm_jax.base.tables import aligned, protocol_line
from palm_jax.job import Job, Run, never


def default_config():
  return ConfigDict(
    dict(
      # workdirs of fine-tunings, or patterns such as 'runs/atari/**'; empty: this workdir and the
      # folders in it
      runs=(),
      resamples=2000,  # of the runs, for the intervals; rliable's examples: up to 50,000
    )
  )


def check(config, num_devices):
  """Raises UserError on settings of the whole config's section `scores` that cannot work."""
  del num_devices  # all is done on the host
  require_game(config, 'scores')
  c = config.scores
  if not isinstance(c.runs, (tuple, list)) or not all(
    isinstance(run, str) and run for run in c.runs
  ):
    raise UserError(
      f"scores.runs={c.runs!r}: expected a tuple of workdirs or patterns, such as ('runs/atari/*',)"
    )
  if c.resamples < 100:
    raise UserError(
      f'scores.resamples={c.resamples} is too small for 95% intervals: set it to 100 or more'
    )


def run(this: Run) -> dict:
  """The job: gathers results of fine-tunings; aggregates beside published ones, and every game.

  Returns:
    What stands in results/scores.json: `rows`, one a line of the first table, whose aggregates are
    [value] or [value, low, high], or None where unknown; `games`, {game: {variant: {mean, sd, hns,
    seeds, scores}}}; `notes`; `protocol`; `seconds`.

  Raises:
    UserError: no runs, or results that cannot be used; see `find` and `read_runs`.
  """
  config, started, c = this.config, time.monotonic(), this.config.scores
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


def describe_game(game: str, runs: list[FineTuned]) -> dict:
  """The scores of one variant in one game."""
  scores = [run.score for run in runs]
  return dict(
    mean=float(np.mean(scores)),
    sd=float(np.std(scores, ddof=1)) if len(scores) > 1 else None,
    hns=float(human_normalised(scores, game).mean()),
    seeds=[run.seed for run in runs],
    scores=scores,
  )


def protocol_of(config: ConfigDict, runs: list[FineTuned]) -> dict:
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


def make_rows(scores, resamples, seed):
  """Lines of the first table: the variants of {variant: {game: [score]}}, then what is known of
  others.

  Where not all variants have the same games, or not all 26, they and the published methods stand
  again over the games that all variants have.
  """

  def measured(name, known):
    intervals, counts = bootstrap(known, resamples, seed), {len(runs) for runs in known.values()}
    found = aggregate(known)
    return dict(
      found,
      method=name,
      games=len(known),
      runs=[min(counts), max(counts)],
      **{s: [found[s], *(intervals[s] if intervals else ())] for s in STATISTICS},
    )

  def by_means(name, column, games):
    found = aggregate({game: [published()['games'][game][column]] for game in games})
    # IQM and gap are of single runs, which are not known here.
    return dict(
      found,
      method=name,
      games=len(games),
      runs=None,
      median=[found['median']],
      mean=[found['mean']],
      iqm=None,
      gap=None,
    )

  rows = [measured(variant, known) for variant, known in scores.items()]
  methods, table_2 = published()['methods'], published()['table_2']['rows']
  common = [game for game in GAMES if all(game in known for known in scores.values())]
  over_common = 'the same game' if len(common) == 1 else f'the same {len(common)} games'
  if common and any(len(known) > len(common) for known in scores.values()):
    rows += [
      measured(f'{variant}, {over_common}', {game: known[game] for game in common})
      for variant, known in scores.items()
    ]
  if 0 < len(common) < len(GAMES):
    rows += [by_means(f'{name}, {over_common}', name, common) for name in methods]
  for name, known in methods.items():
    row = dict(by_means(name, name, GAMES))
    if 'runs' in known:
      row.update({s: known[s] for s in STATISTICS}, runs=[known['runs']] * 2)
    rows.append(row)
  for name, (median, mean, above_human, above_random, _) in table_2.items():
    rows.append(
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
    )
  return rows


def make_notes(scores, runs):
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
    notes.append(
      f'no runs from scratch: DrQ(eps) without pretraining has a median of {best:.3f}, PALM one of '
      f'{published()["table_2"]["rows"]["PALM"][0]:.3f}, so run the same fine-tuning from scratch '
      'beside it'
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


def table(results):
  """The results of `evaluate` as text: aggregates, games, notes, protocol."""

  def cell(values):
    return (
      '-'
      if values is None
      else f'{values[0]:.3f}' + (f' [{values[1]:.3f}, {values[2]:.3f}]' if len(values) == 3 else '')
    )

  def number(mean, sd=None):
    return f'{mean:,.1f}' + (f' +- {sd:,.1f}' if sd is not None else '')

  def span(counts):
    return (
      '-'
      if counts is None
      else str(counts[0])
      if counts[0] == counts[1]
      else f'{counts[0]} to {counts[1]}'
    )

  aggregates = [['human-normalised', 'games', 'runs', 'median', 'mean', 'IQM', 'gap', '>H', '>0']]
  aggregates += [
    [
      row['method'],
      f'{row["games"]} of {len(GAMES)}',
      span(row['runs']),
      *(cell(row[s]) for s in STATISTICS),
      str(row['above_human']),
      str(row['above_random']),
    ]
    for row in results['rows']
  ]
  variants = list(
    dict.fromkeys(variant for known in results['games'].values() for variant in known)
  )
  others = ['random', 'human', 'DrQ', 'DrQ(eps)']
  games = [
    ['raw scores', *others, *(title for variant in variants for title in (variant, 'runs', 'HNS'))]
  ]
  for game, known in results['games'].items():
    line = [game, *(number(published()['games'][game][column]) for column in others)]
    for variant in variants:
      at = known.get(variant)
      line += (
        [number(at['mean'], at['sd']), str(len(at['scores'])), f'{at["hns"]:.3f}']
        if at
        else ['-'] * 3
      )
    games.append(line)
  notes = [f'note: {note}' for note in results['notes']]
  protocol = protocol_line(results['protocol'])
  return '\n'.join([*aligned(aggregates), '', *aligned(games), '', *notes, protocol])


JOB = Job('scores', run, check, needs_data=never, table=table, judges=True)
