"""Scores of Atari-100k: normalised by a human's, aggregated over games and runs with intervals,
beside published ones.

The aggregates are those of Agarwal et al. 2021 (arXiv 2108.13264), whose library rliable is the
model. Beside PALM's Table 2 stand scores of DrQ with a smaller epsilon, DrQ(eps), which learned
nothing beforehand and score higher than PALM's row. So the worth of a pretraining is seen only
beside the same fine-tuning from scratch.
"""

import collections
import functools
import glob
import json
import os
import pathlib
import time
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from palm_jax.atari.environment import GAMES, require_game, rom_id
from palm_jax.base import devices
from palm_jax.base.errors import UserError
from palm_jax.base.tables import aligned, protocol_line
from palm_jax.job import Job, Run, never

STATISTICS = 'median', 'mean', 'iqm', 'gap'
FEWEST_RUNS = 3  # for an interval: of two runs there are three resamples
RESAMPLES_AT_ONCE = 250


class FineTuned(NamedTuple):
  """What is read of a fine-tuning's result."""

  variant: str  # 'pretrained' or 'scratch'
  game: str
  seed: int
  score: float  # raw, mean of the evaluation's games
  episodes: int  # of the evaluation
  agent_steps: int
  frames: int
  agent: dict  # settings of the learner, {} where the file does not say
  trunk_step: int  # of the pretraining's checkpoint; -1 from scratch
  folder: str


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


@functools.cache
def published():
  """Random, human and published scores, as in published.json."""
  return json.loads((pathlib.Path(__file__).parent / 'published.json').read_text())


# ---- numbers


def human_normalised(scores, game):
  """Raw scores -> float64 scores of which 0 is a random player's and 1 a human's; UserError for an
  unknown game."""
  rom_id(game)
  known = published()['games'][game]
  return (np.asarray(scores, np.float64) - known['random']) / (known['human'] - known['random'])


def aggregate(runs):
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


def bootstrap(runs, resamples=2000, seed=0):
  """95% intervals of `aggregate`'s first four, {name: (low, high)}: runs are drawn anew within each
  game.

  None where a game has fewer than FEWEST_RUNS runs. Args as in `aggregate`.
  """
  scores, generator = _normalised(runs), np.random.default_rng(seed)
  if min(map(len, scores)) < FEWEST_RUNS:
    return None
  drawn = [
    _statistics(
      [
        score[
          generator.integers(0, len(score), (min(RESAMPLES_AT_ONCE, resamples - start), len(score)))
        ]
        for score in scores
      ]
    )
    for start in range(0, resamples, RESAMPLES_AT_ONCE)
  ]
  return {
    name: tuple(np.percentile(np.concatenate([part[name] for part in drawn]), [2.5, 97.5]).tolist())
    for name in STATISTICS
  }


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


# ---- runs


def find(patterns, workdir):
  """Folders that hold results/finetune.json, sorted, each once; UserError where there are none for
  a pattern."""
  result = pathlib.Path('results', 'finetune.json')
  found = set()
  for pattern in patterns or (
    glob.escape(str(workdir)),
    os.path.join(glob.escape(str(workdir)), '*'),
  ):
    matches = {
      path.resolve()
      for path in map(pathlib.Path, glob.glob(os.path.expanduser(pattern), recursive=True))
      if (path / result).is_file()
    }
    if patterns and not matches:
      raise UserError(
        f'scores.runs: {pattern!r} names no folder with {result} (working folder: '
        f'{pathlib.Path.cwd()}): '
        'name workdirs whose job finetune is complete'
      )
    found |= matches
  if not found:
    raise UserError(
      f'neither {workdir} nor a folder in it has {result}: run the job finetune, or name its '
      'workdirs '
      'in scores.runs'
    )
  return sorted(found)


def read_runs(folders):
  """[FineTuned] of the workdirs' results/finetune.json.

  Raises:
    UserError: a file that cannot be read or lacks something, or two of the same variant, game and
      seed.
  """
  runs = {}
  for folder in folders:
    path = pathlib.Path(folder) / 'results' / 'finetune.json'
    try:
      content = json.loads(path.read_text())
      protocol, episodes = (
        content.get('protocol', {}),
        content['episodes'],
      )  # their scores, or how many they were
      run = FineTuned(
        str(content['variant']),
        content['game'],
        int(content['seed']),
        float(content['score']),
        len(episodes) if isinstance(episodes, list) else int(episodes),
        int(content['agent_steps']),
        int(content['frames']),
        dict(protocol.get('agent', {})),
        int(protocol['trunk']['checkpoint_step'])
        if isinstance(protocol.get('trunk'), dict)
        else -1,
        str(folder),
      )
      if not np.isfinite(run.score) or not run.episodes:
        raise ValueError(f'score={run.score} of {run.episodes} episodes')
    except KeyError as e:
      raise UserError(f'{path} lacks {e}: expected a result of the job finetune') from e
    except (OSError, ValueError, TypeError, AttributeError) as e:
      raise UserError(
        f'{path} cannot be read ({e}): run the job finetune there again, or leave it out'
      ) from e
    rom_id(run.game)
    key = run.variant, run.game, run.seed
    if key in runs:
      raise UserError(
        f'{runs[key].folder} and {folder} are both {run.variant}, {run.game}, seed {run.seed}: a '
        'run counts once, '
        'name one of them in scores.runs'
      )
    runs[key] = run
  return list(runs.values())


def run(this: Run) -> dict:
  """The job: gathers results of fine-tunings, prints aggregates beside published ones, and every
  game.

  Writes <workdir>/results/scores.json.

  Args:
    config: the whole config; read are seed and scores.
    workdir: pathlib.Path.
    data: not read.
    mesh: one-dimensional mesh, axis 'data', or None.

  Returns:
    The dict that was written: `rows`, one a line of the first table, whose aggregates are [value]
    or [value, low, high], or None where unknown; `games`, {game: {variant: {mean, sd, hns, seeds,
    scores}}}; `notes`; `protocol`; `seconds`.

  Raises:
    UserError: no runs, or results that cannot be used; see `find` and `read_runs`.
  """
  config, workdir, mesh = this.config, this.workdir, this.mesh
  started, c = time.monotonic(), config.scores
  runs = read_runs(find(c.runs, workdir))
  variants = collections.defaultdict(lambda: collections.defaultdict(list))
  for run in sorted(runs, key=lambda run: (run.variant, run.game, run.seed)):
    variants[run.variant][run.game].append(run)
  scores = {
    variant: {game: [run.score for run in of_game] for game, of_game in games.items()}
    for variant, games in variants.items()
  }
  rows = make_rows(scores, c.resamples, config.seed)
  describe = lambda game, known, of_game: dict(
    mean=float(np.mean(known)),
    sd=float(np.std(known, ddof=1)) if len(known) > 1 else None,
    hns=float(human_normalised(known, game).mean()),
    seeds=[run.seed for run in of_game],
    scores=known,
  )
  games = {
    game: {
      variant: describe(game, known[game], variants[variant][game])
      for variant, known in scores.items()
      if game in known
    }
    for game in GAMES
    if any(game in known for known in scores.values())
  }
  distinct = lambda name: sorted({getattr(run, name) for run in runs})
  of_agents = lambda name: sorted({run.agent[name] for run in runs if name in run.agent})
  results = dict(
    job='scores',
    rows=rows,
    games=games,
    notes=make_notes(scores, runs),
    protocol=dict(
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
      interval='95%, stratified bootstrap: runs resampled within each game, percentiles 2.5 and '
      '97.5',
      resamples=c.resamples,
      seed=config.seed,
      published='sources in palm_jax/atari/published.json',
    ),
    folders=[run.folder for run in runs],
    **devices.describe(mesh),
    seconds=time.monotonic() - started,
  )
  return results


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
