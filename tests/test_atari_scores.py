"""Scores of Atari-100k: published rows from published scores, statistics against scipy, intervals,
the job and its table."""

import importlib.util
import itertools
import json
import shutil

import numpy as np
import pytest
import scipy.stats
from ml_collections import ConfigDict

from palm_jax import provenance, runner
from palm_jax.atari import aggregates, finetune, scores
from palm_jax.atari import results as results_of
from palm_jax.atari.environment import GAMES
from palm_jax.base import devices
from palm_jax.base.errors import UserError
from palm_jax.base.results import write_result
from palm_jax.job import Run
from tests.jobs import finish, saved_result


@pytest.fixture(scope='module')
def reference(shared):
  path = shared / 'data' / 'atari_scores.json'
  if not path.is_file():
    pytest.skip(f'no {path}')
  return json.loads(path.read_text())


def simulated(seed, counts, games=GAMES):
  """{game: raw scores of `counts` runs} from far below random to far above human."""
  draw, known = np.random.default_rng(seed), aggregates.published()['games']
  return {
    game: known[game]['random']
    + (known[game]['human'] - known[game]['random']) * draw.normal(0.5, 1, count)
    for game, count in zip(games, np.broadcast_to(counts, len(games)), strict=True)
  }


# ---- numbers


def test_random_is_zero_and_human_one():
  known = aggregates.published()['games']
  assert tuple(known) == GAMES
  for game in GAMES:
    raw = [
      known[game]['random'],
      known[game]['human'],
      2 * known[game]['human'] - known[game]['random'],
    ]
    np.testing.assert_allclose(aggregates.human_normalised(raw, game), [0, 1, 2], atol=1e-12)
  assert aggregates.human_normalised(9.1, 'Boxing') == pytest.approx(0.75)
  with pytest.raises(UserError, match='did you mean Boxing'):
    aggregates.human_normalised(1.0, 'boxing')


def test_drq_of_the_papers_table():
  """Liu et al. 2022, Table 2, from the scores of each game."""
  found = aggregates.aggregate(
    {game: [known['DrQ']] for game, known in aggregates.published()['games'].items()}
  )
  assert (
    round(found['median'], 3),
    round(found['mean'], 3),
    found['above_human'],
    found['above_random'],
  ) == (0.268, 0.357, 2, 24)
  assert aggregates.published()['table_2']['rows']['DrQ'][:4] == [0.268, 0.357, 2, 24]


@pytest.mark.parametrize(
  'method', ['SimPLe', 'DrQ(eps)', 'SPR', 'IRIS', 'BBF (replay ratio 2)', 'BBF']
)
def test_published_aggregates_belong_to_published_games(method):
  known = aggregates.published()['methods'][method]
  found = aggregates.aggregate(
    {game: [row[method]] for game, row in aggregates.published()['games'].items()}
  )
  for name in ('median', 'mean'):
    assert found[name] == pytest.approx(known[name][0], abs=1e-4)
  assert (found['above_human'], found['above_random']) == (
    known['above_human'],
    known['above_random'],
  )
  for name in aggregates.STATISTICS:
    assert known[name][1] < known[name][0] < known[name][2]


@pytest.mark.parametrize(
  'method, name, runs',
  [
    ('DrQ(eps)', 'DrQ(eps)', 100),
    ('SPR', 'SPR', 100),
    ('SimPLe', 'SimPLe', 5),
    ('IRIS', 'IRIS', 5),
    ('BBF(RR2)', 'BBF (replay ratio 2)', 14),
    ('BBF(RR8)', 'BBF', 52),
  ],
)
def test_single_runs_give_the_published_row(reference, method, name, runs):
  per_run = {game: values[:runs] for game, values in reference['runs_per_game'][method].items()}
  wanted, row = reference['aggregates_recomputed'][method], aggregates.published()['methods'][name]
  found, intervals = aggregates.aggregate(per_run), aggregates.bootstrap(per_run, 2000, 0)
  assert (found['above_human'], found['above_random']) == (wanted['gtH'], wanted['gt0'])
  for ours, theirs in zip(
    aggregates.STATISTICS, ('median', 'mean', 'iqm', 'optimality_gap'), strict=True
  ):
    assert found[ours] == pytest.approx(
      wanted[theirs]['value'], abs=5.1e-5
    )  # written with four digits
    low, high = wanted[theirs]['ci95']
    np.testing.assert_allclose(intervals[ours], (low, high), atol=0.12 * (high - low))
    assert row[ours] == [wanted[theirs]['value'], low, high]
  means = [np.mean(values) for values in per_run.values()]  # SimPLe's runs have two decimals
  np.testing.assert_allclose(
    means, [known[name] for known in aggregates.published()['games'].values()], rtol=2e-4
  )


def test_published_numbers_are_those_of_the_reference(reference):
  known = aggregates.published()
  for game, row in known['games'].items():
    assert (row['random'], row['human']) == (reference['random'][game], reference['human'][game])
    assert (row['DrQ'], row['DER']) == tuple(
      reference['per_game_mean'][name][game] for name in ('DrQ(paper)', 'DER(SPR repo)')
    )
  assert known['table_2']['rows'] == reference['palm_table2']['rows']


@pytest.mark.parametrize('counts', [1, 5, np.arange(2, 28)])
def test_aggregates_equal_scipy(counts):
  runs = simulated(0, counts)
  hns = {game: aggregates.human_normalised(values, game) for game, values in runs.items()}
  found = aggregates.aggregate(runs)
  means = [values.mean() for values in hns.values()]
  np.testing.assert_allclose(
    found['iqm'], scipy.stats.trim_mean(np.concatenate(list(hns.values())), 0.25), rtol=1e-12
  )
  np.testing.assert_allclose(found['median'], np.median(means), rtol=1e-12)
  np.testing.assert_allclose(found['mean'], sum(means) / 26, rtol=1e-12)
  gap = np.mean([np.mean([max(1 - x, 0) for x in values]) for values in hns.values()])
  np.testing.assert_allclose(found['gap'], gap, rtol=1e-12)
  assert (found['above_human'], found['above_random']) == (
    sum(m > 1 for m in means),
    sum(m > 0 for m in means),
  )


def test_interval_of_the_mean_is_that_of_the_central_limit():
  runs = simulated(1, 40)
  intervals = aggregates.bootstrap(runs, 4000, 0)
  spread = (
    np.sqrt(
      sum(np.var(aggregates.human_normalised(values, game)) / 40 for game, values in runs.items())
    )
    / 26
  )
  found = aggregates.aggregate(runs)
  np.testing.assert_allclose(
    intervals['mean'],
    found['mean'] + spread * scipy.stats.norm.ppf([0.025, 0.975]),
    atol=0.15 * spread,
  )
  for name in aggregates.STATISTICS:
    assert intervals[name][0] < found[name] < intervals[name][1]


def test_runs_are_drawn_within_their_game():
  runs = {'Alien': [1000.0] * 3, 'Pong': [-20.0, 0.0, 20.0]}  # all spread is Pong's
  one = aggregates.human_normalised(1000.0, 'Alien')
  pong = [aggregates.human_normalised(x, 'Pong') for x in (-20.0, 20.0)]
  intervals = aggregates.bootstrap(runs, 2000, 0)
  # 1 resample in 27 is of one run three times: the outermost are beyond 2.5%.
  np.testing.assert_allclose(intervals['mean'], [(one + x) / 2 for x in pong], rtol=1e-12)
  same = {game: [value] * 5 for game, value in (('Alien', 1000.0), ('Pong', 3.0))}
  for low, high in aggregates.bootstrap(same).values():
    assert low == pytest.approx(high, rel=1e-12)


def test_intervals_need_three_runs():
  assert aggregates.bootstrap(simulated(0, 3)) is not None
  assert aggregates.bootstrap(simulated(0, 2)) is None
  assert aggregates.bootstrap(simulated(0, [2, *[9] * 25])) is None
  runs = simulated(0, 4)
  assert (
    aggregates.bootstrap(runs, 300, 1)
    == aggregates.bootstrap(runs, 300, 1)
    != aggregates.bootstrap(runs, 300, 2)
  )


def test_scores_that_cannot_be():
  for runs, message in (
    ({}, 'no scores'),
    ({'Pong': []}, 'Pong are'),
    ({'Pong': [1.0, np.nan]}, 'nan'),
    ({'Pong': 3.0}, 'Pong are'),
    ({'Pnog': [1.0]}, 'did you mean Pong'),
  ):
    for function in (aggregates.aggregate, aggregates.bootstrap):
      with pytest.raises(UserError, match=message):
        function(runs)


@pytest.mark.skipif(not importlib.util.find_spec('rliable'), reason='rliable is not installed')
def test_statistics_of_rliable():
  metrics = pytest.importorskip('rliable.metrics')
  runs = simulated(3, 6)
  hns = np.stack([aggregates.human_normalised(values, game) for game, values in runs.items()], 1)
  found = aggregates.aggregate(runs)
  for name, function in (
    ('median', metrics.aggregate_median),
    ('mean', metrics.aggregate_mean),
    ('iqm', metrics.aggregate_iqm),
    ('gap', metrics.aggregate_optimality_gap),
  ):
    np.testing.assert_allclose(found[name], function(hns), rtol=1e-12)


# ---- the job


def write_run(folder, game, seed, score, variant='pretrained', **changes):
  content = dict(
    dict(
      job='finetune',
      game=game,
      seed=seed,
      variant=variant,
      score=score,
      episodes=[score] * 100,
      agent_steps=100_000,
      frames=400_000,
    ),
    **changes,
  )
  (folder / 'results').mkdir(parents=True)
  (folder / 'results' / 'finetune.json').write_text(json.dumps(content))
  return folder


def run_job(workdir, **settings):
  config = ConfigDict(dict(seed=0, scores=scores.default_config(), atari=dict(game='Pong')))
  config.scores.update(settings)
  return finish(scores.JOB, config, workdir, mesh=devices.make_mesh(1))


def by_method(results):
  return {row['method']: row for row in results['rows']}


def test_the_job_over_three_games(tmp_path, capsys):
  expected = {}
  for variant, gain in (('pretrained', 1.2), ('scratch', 1.0)):
    for game, value in (('Pong', -8.0), ('Boxing', 6.0), ('Krull', 4000.0)):
      expected[variant, game] = [gain * value + seed for seed in range(3)]
      for seed, score in enumerate(expected[variant, game]):
        write_run(tmp_path / f'{variant}_{game}_{seed}', game, seed, score, variant)
  (tmp_path / 'another folder').mkdir()
  results = run_job(tmp_path)
  assert results == saved_result(tmp_path / 'results' / 'scores.json')

  rows, games = by_method(results), ('Boxing', 'Krull', 'Pong')
  for variant in ('pretrained', 'scratch'):
    known = {game: expected[variant, game] for game in games}
    found, intervals = aggregates.aggregate(known), aggregates.bootstrap(known, 2000, 0)
    for name in aggregates.STATISTICS:
      assert rows[variant][name] == pytest.approx([found[name], *intervals[name]])
    assert rows[variant]['games'] == 3 and rows[variant]['runs'] == [3, 3]
  # Others' scores over these games, and over all.
  drq = aggregates.aggregate(
    {game: [aggregates.published()['games'][game]['DrQ']] for game in games}
  )
  assert (
    rows['DrQ, the same 3 games']['median'] == [drq['median']]
    and rows['DrQ, the same 3 games']['iqm'] is None
  )
  assert rows['DrQ(eps)']['iqm'] == [0.2796, 0.2709, 0.2885]
  assert rows['paper: PALM']['median'] == [0.298]
  assert list(results['games']) == list(games)
  pong = results['games']['Pong']['scratch']
  assert pong == dict(
    mean=-7.0, sd=1.0, hns=pytest.approx(13.7 / 35.3), seeds=[0, 1, 2], scores=[-8.0, -7.0, -6.0]
  )

  text = capsys.readouterr().out
  lines = text.splitlines()
  line = lambda start: next(line.split() for line in lines if line.startswith(start))
  assert line('DrQ ')[:7] == ['DrQ', '26', 'of', '26', '-', '0.268', '0.357']
  assert line('DrQ ')[-2:] == ['2', '24']
  assert line('scratch ')[1:5] == ['3', 'of', '26', '3']
  assert line('Pong ')[1:5] == ['-20.7', '14.6', '-8.5', '-9.1']
  assert (
    'scratch: over 3 of 26 games, not comparable' in text and 'pretrained: over 3 of 26' in text
  )
  assert 'no runs from scratch' not in text and 'agent_steps=[100000]' in lines[-1]


def test_variants_with_different_games_meet_over_common_ones(tmp_path):
  for game in GAMES:
    write_run(tmp_path / f'a{game}', game, 0, 100.0, 'pretrained')
  for game in ('Pong', 'Hero'):
    write_run(tmp_path / f'b{game}', game, 0, 10.0, 'scratch')
  results = run_job(tmp_path)
  rows = by_method(results)
  assert rows['pretrained']['games'] == 26 and rows['pretrained, the same 2 games']['games'] == 2
  wanted = aggregates.aggregate({'Pong': [100.0], 'Hero': [100.0]})
  assert rows['pretrained, the same 2 games']['median'] == [pytest.approx(wanted['median'])]
  assert rows['scratch, the same 2 games']['median'] == rows['scratch']['median']
  assert len(rows['scratch']['median']) == 1  # one run has no interval
  assert not any(note.startswith('pretrained: over') for note in results['notes'])


def test_all_games_alone(tmp_path):
  runs = [
    write_run(tmp_path / 'runs' / f'{game}{seed}', game, seed, values[seed])
    for game, values in simulated(0, 3).items()
    for seed in range(3)
  ]
  results = run_job(
    tmp_path, runs=(str(tmp_path / 'runs' / '*'), str(runs[0]))
  )  # one of them named twice
  rows = by_method(results)
  assert results['protocol']['runs'] == 78
  assert not any('same' in name for name in rows)
  assert len(rows['pretrained']['iqm']) == 3
  # A table of PALM's must not stand without the same fine-tuning from scratch.
  assert (
    len(results['notes']) == 1 and 'run the same fine-tuning from scratch' in results['notes'][0]
  )


def test_what_differs_is_said(tmp_path):
  write_run(tmp_path / 'a', 'Pong', 0, 1.0, protocol=dict(agent=dict(lr=1e-4, eval_epsilon=0.05)))
  write_run(
    tmp_path / 'b',
    'Pong',
    0,
    1.0,
    'scratch',
    protocol=dict(agent=dict(lr=1e-4, eval_epsilon=0.001)),
    agent_steps=10_000,
    frames=40_000,
    episodes=7,
  )
  results = run_job(tmp_path)
  notes = '\n'.join(results['notes'])
  assert 'differ in agent.eval_epsilon: 0.001, 0.05' in notes and 'agent.lr' not in notes
  assert 'runs of 10,000 agent steps' in notes and 'evaluations of 7 episodes' in notes
  assert results['protocol']['episodes'] == [7, 100]


def test_scores_no_longer_fit_when_a_run_is_made_anew_or_added(tmp_path):
  config = ConfigDict(dict(seed=0, scores=scores.default_config(), atari=dict(game='Pong')))
  this = Run(config, tmp_path, devices.make_mesh(1))
  assert scores.read_files(this) == []
  seen = []
  for score in (1.0, 2.0):
    shutil.rmtree(tmp_path / 'a', ignore_errors=True)
    write_run(tmp_path / 'a', 'Pong', 0, score)
    seen.append(provenance.made_from(scores.JOB, this))
    assert provenance.made_from(scores.JOB, this) == seen[-1]
  write_run(tmp_path / 'b', 'Pong', 1, 2.0)
  seen.append(provenance.made_from(scores.JOB, this))
  assert [provenance.difference(a, b) for a, b in itertools.pairwise(seen)] == [
    'files, which is now another'
  ] * 2
  write_result(tmp_path / 'results' / 'scores.json', {}, seen[-1], {})
  assert provenance.is_current(scores.JOB, this)
  jobs = [runner.find('finetune'), scores.JOB]  # what waits makes what reads it wait
  config.finetune = finetune.default_config()
  assert [job.name for job in provenance.waiting(jobs, this)] == ['finetune', 'scores']


def test_the_workdir_itself_counts(tmp_path):
  write_run(tmp_path / 'run[1]', 'Pong', 0, 1.0)
  assert by_method(run_job(tmp_path / 'run[1]'))['pretrained']['games'] == 1


def test_runs_that_cannot_be_used(tmp_path):
  with pytest.raises(UserError, match='run the job finetune'):
    run_job(tmp_path)
  with pytest.raises(UserError, match='names no folder'):
    run_job(tmp_path, runs=(str(tmp_path / 'nothing*'),))
  for settings in (dict(runs=('',)), dict(resamples=10)):
    with pytest.raises(UserError, match=next(iter(settings))):
      run_job(tmp_path, **settings)
  write_run(tmp_path / 'a', 'Pong', 0, 1.0)
  write_run(tmp_path / 'b', 'Pong', 0, 2.0)
  with pytest.raises(UserError, match='both pretrained, Pong, seed 0'):
    run_job(tmp_path)
  for number, (changes, message) in enumerate(
    [
      (dict(score=float('nan')), 'score=nan'),
      (dict(episodes=[]), '0 episodes'),
      (dict(game='pong'), 'did you mean Pong'),
      (dict(seed=None), 'cannot be read'),
      (dict(protocol=3), 'cannot be read'),
    ]
  ):
    folder = write_run(
      tmp_path / f'broken{number}', **{**dict(game='Pong', seed=1, score=1.0), **changes}
    )
    with pytest.raises(UserError, match=message):
      results_of.read_runs([folder])
  path = tmp_path / 'a' / 'results' / 'finetune.json'
  for text, message in (
    ('{', 'cannot be read'),
    ('[]', 'cannot be read'),
    ('{"game": "Pong"}', "lacks 'episodes'"),
  ):
    path.write_text(text)
    with pytest.raises(UserError, match=message):
      results_of.read_runs([tmp_path / 'a'])
