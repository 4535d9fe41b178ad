"""A study says what its runs say, is stopped and goes on, and judges its own settings before any
work."""

import csv
import importlib
import itertools
import json
import os
import signal
import threading
import time

import jax
import numpy as np
import pytest
import scipy.stats
from jax.experimental.compilation_cache import compilation_cache
from PIL import Image

from configs.studies import figure4
from palm_jax import runner, study
from palm_jax import workdir as workdirs
from palm_jax.base import devices
from palm_jax.base.checkpoints import Checkpoints
from palm_jax.base.errors import UserError
from palm_jax.base.files import write_json
from palm_jax.generator import train
from palm_jax.job import Run
from palm_jax.study import arms, figure, numbers
from tests.jobs import finish
from tests.worlds import COMPILED, nature_config, tiny_config

NAMES = (
  'encoders',
  'figure3',
  'figure4',
  'figure5',
  'figure6',
  'table3',
  'episode_length',
  'reward_variants',
  'contours',
  'orderings',
  'objectives',
)
RANK = ('rank', 'pretrain/metrics/h_effective_rank')
LINEAR = ('linear', 'probe/rows[features=PALM encoder, method=lbfgs]/accuracy/clean')


# What numbers say.


def test_interval_is_the_percentile_bootstrap():
  rng = np.random.default_rng(0)
  for n in (2, 8, 30):
    values = rng.standard_normal(n) + 3
    want = scipy.stats.bootstrap(
      (values,), np.mean, n_resamples=100_000, method='percentile', rng=rng
    ).confidence_interval
    np.testing.assert_allclose(numbers.interval(values), want, atol=0.06 * values.std(), rtol=0)
    assert numbers.interval(values) == numbers.interval(values.tolist())  # no chance from outside
  means = [np.mean(x) for x in itertools.product((1.0, 2.0, 4.0), repeat=3)]  # all 27 resamples
  np.testing.assert_allclose(
    numbers.interval([1.0, 2.0, 4.0]),
    np.percentile(means, (2.5, 97.5), method='inverted_cdf'),
  )
  assert numbers.interval([5.0]) is None


def test_student_is_scipys_interval_and_stricter_than_signs():
  for values in ([1.0, 2.0], [0.3, 0.1, 0.7], np.random.default_rng(1).normal(size=12)):
    error = scipy.stats.sem(values)
    want = scipy.stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=error)
    np.testing.assert_allclose(numbers.student(values), want, rtol=1e-9)
  assert numbers.student([5.0]) is None
  found = numbers.difference({0: 1.0, 1: 2.0, 2: 6.0}, {0: 0.0, 1: 0.0, 2: 0.0})
  assert found['low'] > 0 > found['t_low'] and numbers.verdict(found) == 'undecided'


def test_a_tie_with_the_reference_is_a_difference_of_nothing():
  c = study.default_config()
  c.measures = (('m', ''),)
  rows = numbers.summarise(c, lines_of({('m', 'a', ''): [1.0, 2.0], ('m', 'b', ''): [1.0, 2.0]}))[
    'rows'
  ]
  assert rows[0]['minus_reference'] is None and rows[1]['minus_reference']['difference'] == 0


def test_differences_are_paired_by_seed():
  b = {0: 1.0, 1: 50.0, 2: -30.0, 4: 0.0}
  a = {2: -29.9, 0: 1.1, 1: 50.1, 3: 7.0}  # another order, another seed
  found = numbers.difference(a, b)
  assert found['n'] == 3
  np.testing.assert_allclose(
    [found[name] for name in ('difference', 'low', 'high')], 0.1, atol=1e-12
  )  # unpaired: within +-50
  assert numbers.verdict(found) == 'undecided'  # by rounding alone they differ at all
  a[1] = 50.11
  assert numbers.verdict(numbers.difference(a, b)) == 'holds'
  assert numbers.verdict(numbers.difference(b, a)) == 'does not hold'
  nan = numbers.difference({0: 1.0, 1: float('nan')}, {0: 0.0, 1: 0.0})
  assert numbers.verdict(nan) == 'undecided'
  assert numbers.verdict(numbers.difference({0: 1.0, 1: 2.0}, {0: 2.0, 1: 1.0})) == 'undecided'
  assert (
    numbers.verdict(numbers.difference({0: 9.0}, {0: 1.0})) == 'undecided'
  )  # one seed says nothing


def lines_of(values):
  """{(measure, arm, x): [value of seed 0, of seed 1, ...]} -> long form."""
  return [
    dict(study='s', arm=arm, x=x, seed=seed, measure=measure, value=value, run='')
    for (measure, arm, x), of_seeds in values.items()
    for seed, value in enumerate(of_seeds)
  ]


def test_summary_compares_at_the_same_x():
  c = study.default_config()
  c.update(
    dict(
      measures=(('m', ''), ('other', '')),
      orderings=('a > b', 'a @ 2 > a @ 1', 'a > flat', 'flat > b @ 1'),
    )
  )
  lines = lines_of(
    {
      ('m', 'a', 1): [3.4, 3.6],
      ('m', 'a', 2.0): [5.8, 6.2],
      ('m', 'b', 1): [1.0, 1.0],
      ('m', 'b', 2.0): [9.0, 9.0],
      ('m', 'b', 3): [0.0, 0.0],
      ('m', 'flat', ''): [2.0, 2.0],
      ('other', 'b', 1): [0.0, 1.0],
    }
  )
  said = numbers.summarise(c, lines)
  rows = {(row['measure'], row['arm'], row['x']): row for row in said['rows']}
  assert rows['m', 'a', 2]['mean'] == 6 and (
    rows['m', 'a', 2]['low'],
    rows['m', 'a', 2]['high'],
  ) == (5.8, 6.2)
  assert (
    rows['m', 'b', 2]['minus_reference']['difference'] == 3
    and rows['m', 'a', 1]['minus_reference'] is None
  )
  assert (
    rows['m', 'b', 3]['minus_reference'] is None
    and rows['other', 'b', 1]['minus_reference'] is None
  )
  found = [
    (row['ordering'], row['x'], round(row['difference'], 9), row['verdict'])
    for row in said['orderings']
  ]
  assert found == [
    ('a > b', 1, 2.5, 'holds'),
    ('a > b', 2, -3, 'does not hold'),
    ('a @ 2 > a @ 1', '', 2.5, 'holds'),
    ('a > flat', 1, 1.5, 'holds'),
    ('a > flat', 2, 4, 'holds'),
    ('flat > b @ 1', '', 1, 'undecided'),  # seeds that do not differ at all
  ]
  c.reference = 'a @ 1'
  rows = {
    (row['arm'], row['x']): row
    for row in numbers.summarise(c, lines)['rows']
    if row['measure'] == 'm'
  }
  assert (
    rows['a', 2]['minus_reference']['difference'] == 2.5
    and rows['flat', '']['minus_reference']['difference'] == -1.5
  )


@pytest.mark.parametrize('grid', [False, True])
def test_figure_shows_a_panel_a_measure(tmp_path, grid):
  pytest.importorskip('matplotlib')
  c = study.default_config()
  c.measures = (('points', ''), ('lines', ''))
  values = {
    ('points', 'a', ''): [1.0, 2.0],
    ('points', 'b', ''): [2.0, 2.0],
    ('lines', 'flat', ''): [1.0, 1.0],
  }
  values |= {('lines', arm, x): [x, x + 1.0] for arm in 'ab' for x in (10, 1000)}
  results = dict(study='s', axis='x', grid=grid, **numbers.summarise(c, lines_of(values)))
  assert figure.draw(results, tmp_path / 'figure.png')
  with Image.open(tmp_path / 'figure.png') as image:
    pixels = np.asarray(image.convert('RGB')).astype(int)
  left, right = np.array_split(pixels, 2, axis=1)
  coloured = lambda half: (np.ptp(half, axis=2) > 60).mean()
  assert coloured(left) > 0.0005 and coloured(right) > (
    0.1 if grid else 0.0005
  )  # a map fills its panel


def test_figure_shows_an_arm_in_one_colour(tmp_path):
  pytest.importorskip('matplotlib')
  c = study.default_config()
  c.measures = (('one', ''), ('other', ''))
  arms = dict(one=('a', 'bb', 'ccc'), other=('ccc',))
  values = {(name, arm, x): [x + len(arm)] for name in arms for arm in arms[name] for x in (1, 2)}
  results = dict(study='s', axis='x', grid=False, **numbers.summarise(c, lines_of(values)))
  assert figure.draw(results, tmp_path / 'f.png')
  with Image.open(tmp_path / 'f.png') as image:
    pixels = np.asarray(image.convert('RGB'))
  panels = pixels[: int(0.85 * len(pixels))]  # without the legend
  shown = lambda half: [
    (half == np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])).all(-1).any()
    for colour in figure.COLOURS[:3]
  ]
  assert [shown(half) for half in np.array_split(panels, 2, axis=1)] == [
    [True] * 3,
    [False, False, True],
  ]


def test_numbers_are_looked_up(tmp_path):
  draw = lambda draw, value: dict(
    features='PALM encoder',
    method='lbfgs',
    fraction=0.1,
    draw=draw,
    accuracy={'clean': value, 'salt_pepper:0.1': value / 2},
  )
  rows = [
    draw(0, 0.5),
    draw(1, 0.7),
    dict(draw(0, 0.9), fraction=1.0),
    dict(draw(0, 0.1), method='knn', fraction=1.0),
    dict(draw(0, 0.3), features='pixels, PCA to 8', fraction=1.0),
  ]
  write_json(tmp_path / 'results' / 'probe.json', dict(rows=rows, seconds=3))
  path = lambda chosen, name='clean': (
    f'probe/rows[features=PALM encoder, method=lbfgs{chosen}]/accuracy/{name}'
  )
  look_up = lambda path: study.look_up(tmp_path, path)
  assert look_up(path(', fraction=1')) == 0.9 and look_up('probe/seconds') == 3
  assert look_up('probe/rows[features=pixels, PCA to 8, method=lbfgs]/accuracy/clean') == 0.3
  np.testing.assert_allclose(look_up(path(', fraction=0.10')), 0.6, rtol=1e-15)  # mean of the draws
  np.testing.assert_allclose(look_up(path(', fraction=0.1', 'salt_pepper:0.1')), 0.3, rtol=1e-15)
  for wrong, words in (
    (path(''), 'is 3 rows of'),
    (path(', fraction=0.2'), 'fraction=0.1; features=PALM encoder'),
    (path(', fraction=1', 'dirty'), 'is no number'),
    ('probe/rows', 'is no number'),
  ):
    with pytest.raises(UserError, match=words):
      look_up(wrong)


# Settings.


def small_study(folder, **changes):
  """A study of runs of seconds on 8 devices; pretraining only, with the Nature CNN."""
  c = nature_config()
  c.name, c.jobs = 'small', ('study',)
  c.generator.update(
    dict(
      path=str(folder / 'world'),
      z_dim=4,
      w_dim=4,
      mapping_layers=1,
      base_size=20,
      channel_base=160,
      channel_max=4,
      conv_clamp=0.0,
    )
  )
  c.pretrain.update(
    dict(
      env_steps=16 * 4 * 40, iterations_per_call=2, updates_per_iteration=1, monitor_fraction=1.0
    )
  )
  c.study = study.default_config()
  c.study.update(
    dict(
      arms=(('PALM', ''), ('alpha 0', 'environment.alpha=0')),
      seeds=(0, 1),
      jobs=('pretrain',),
      measures=(RANK,),
      orderings=('PALM > alpha 0',),
    )
  )
  c.study.update(changes)
  return c


@pytest.mark.parametrize(
  'changes, words',
  [
    (dict(arms=()), ['study.arms is empty', 'expected (name']),
    (dict(arms=('PALM', '')), ["study.arms has 'PALM'", 'expected (name, settings)']),
    (
      dict(arms=(('a', 'environment.alhpa=0'),)),
      ["environment.alhpa=0 of 'a'", 'did you mean environment.alpha?'],
    ),
    (
      dict(arms=(('a', 'environment.alpha'),)),
      ["'environment.alpha' of 'a' is no setting", 'expected key=value'],
    ),
    (
      dict(arms=(('a', 'environment.alpha=zero'),)),
      ["environment.alpha=zero of 'a'", 'expected a value like'],
    ),
    (dict(arms=(('a', 'pretrain.batch_size=1.5'),)), ["pretrain.batch_size=1.5 of 'a'", 'like 32']),
    (dict(arms=(('a', 'seed=1'),)), ["seed=1 of 'a'", 'of the whole study']),
    (
      dict(arms=(('a', 'pretrain.batch_size=36'),)),
      ["study, arm 'a': pretrain.batch_size=36", 'set pretrain.batch_size'],
    ),
    (
      dict(arms=(('a', ''), ('a', 'environment.alpha=0'))),
      ["'a' has the folder of 'a'", 'its own name or x'],
    ),
    (dict(arms=(('a', '', 1), ('a', '', 1))), ["'a' @ 1 has the folder", 'its own name or x']),
    (dict(arms=(('a b', ''), ('a/b', ''))), ["'a/b' has the folder of 'a b'"]),
    (dict(arms=(('results', ''),)), ["'results' cannot be a folder", 'another name']),
    (
      dict(arms=(('PALM', ''), ('p', 'pairs.source=passive_random pairs.record={PLAM}'))),
      ["{PLAM} in 'p' names no other arm", 'did you mean PALM?'],
    ),
    (
      dict(arms=(('PALM', ''), ('p', 'pairs.source=passive_random pairs.record={PALM}'))),
      ["'p' reads the record of 'PALM'", 'add pretrain.record=True'],
    ),
    (
      dict(arms=(('a', 'generator.path={b}'), ('b', 'generator.path={a}'))),
      ["'a' waits for 'b'", 'which waits for it'],
    ),
    (dict(arms=(('a', 'generator.kimg=3'),)), ["generator.kimg=3 of 'a'", 'of the whole study']),
    (
      dict(arms=(('a', 'environment.stack=2'),), jobs=('probe',), measures=(LINEAR,), orderings=()),
      ["study, arm 'a': --job=probe shows single pictures, but environment.stack=2"],
    ),
    (
      dict(
        arms=(('a', 'pairs.source=random_action'),), jobs=('pretrain', 'diversity'), orderings=()
      ),
      ['--job=diversity asks for a policy'],
    ),
    (dict(arms=(('a', 'features.batch_size=0'),)), ["study, arm 'a': features.batch_size=0"]),
    (dict(seeds=()), ['study.seeds=()', 'one or more']),
    (dict(seeds=(1, 1)), ['study.seeds=(1, 1)', 'different']),
    (dict(seeds=(-1,)), ['study.seeds=(-1,)', 'at least 0']),
    (dict(jobs=('pretrian',)), ["'pretrian' is unknown", 'did you mean pretrain?']),
    (dict(measures=()), ['study.measures is empty']),
    (dict(measures=(('m', 'pretrain'),)), ["'pretrain' is no path", 'job/key']),
    (dict(measures=(('m', 'probe/rows[lbfgs]/accuracy'),)), ['[lbfgs]', 'chooses no row']),
    (dict(measures=(LINEAR,)), ['is of the job probe, which no arm runs', 'study.jobs']),
    (
      dict(measures=(('m', LINEAR[1].replace('lbfgs', 'finetune')),), jobs=('probe',)),
      ['has method finetune', "'PALM' does not run", 'probe.methods'],
    ),
    (dict(measures=(RANK, RANK)), ["'rank' of 'PALM' is there 2 times"]),
    (dict(measures=((*RANK, 1),), arms=(('a', '', 1),)), ["'rank' @ 1 is on an axis already"]),
    (
      dict(references=(('r', 'PLAM', *RANK),)),
      ["arm 'PLAM' of 'r' is unknown", 'expected one of PALM, alpha 0'],
    ),
    (dict(orderings=('PALM > beta 0',)), ["'beta 0' is no arm", 'expected one of PALM, alpha 0']),
    (dict(orderings=('PALM alpha 0',)), ["'PALM alpha 0' is no claim"]),
    (
      dict(orderings=('a > b',), arms=(('a', '', 1), ('a', '', 2), ('b', '', 3), ('b', '', 4))),
      ['nothing that is at the same x'],
    ),
    (dict(reference='PALM @ 3'), ["'PALM @ 3' is no arm"]),
  ],
)
def test_bad_studies_are_one_line_before_any_work(tmp_path, changes, words):
  compiled = len(COMPILED)
  with pytest.raises(UserError) as caught:
    finish(study.JOB, small_study(tmp_path, **{'orderings': (), **changes}), tmp_path / 'study')
  line = str(caught.value)
  assert all(word in line for word in words) and '\n' not in line, line
  assert len(COMPILED) == compiled and not any(tmp_path.iterdir())


def test_settings_of_arms_are_as_on_the_command_line(tmp_path):
  c = figure4.get_config('laptop,able')
  c.study.arms = (
    ('PALM', ''),
    ('beta 0', 'environment.beta=0'),
    ('quoted', "probe.methods='lbfgs'"),
    ('word', 'probe.methods=lbfgs'),
    ('two', "probe.methods=('lbfgs','knn')"),
  )
  made = {arm.name: run for arm, *_, run in arms.make_runs(c, tmp_path, arms.make_arms(c))[:5]}
  assert (made['PALM'].sac.gamma, made['beta 0'].sac.gamma) == (0.875, 0.5)  # it follows beta
  assert c.environment.beta == 0.75
  methods = [made[name].probe.methods for name in ('quoted', 'word', 'two')]
  assert methods == [('lbfgs',), ('lbfgs',), ('lbfgs', 'knn')]


def test_a_config_without_a_study(tmp_path):
  with pytest.raises(UserError, match='no section study: give one of configs/studies/'):
    finish(study.JOB, tiny_config(), tmp_path / 'study')


def num_updates(c):
  p = c.pretrain
  block = p.num_envs * p.rollout_length
  iterations = -(-p.env_steps // (block * p.iterations_per_call)) * p.iterations_per_call
  return (iterations - -(-p.warmup_steps // block)) * p.updates_per_iteration


@pytest.mark.parametrize('scale', ['smoke', 'digits', 'laptop', 'paper', 'paper,cifar100'])
def test_every_study_can_be_run(tmp_path, scale):
  for name in NAMES:
    c = importlib.import_module(f'configs.studies.{name}').get_config(scale)
    c.quality.features = 'proxy'
    if 'inception' in c.diversity.features:
      c.diversity.features = ('proxy',)  # the other needs a file
    runs, _ = study.make_study(c, tmp_path, 8, runner)
    assert (
      len({run.folder for run in runs})
      == len(runs)
      == len({run.config.to_json_best_effort() for run in runs})
    ), name
    updates_a_call = c.pretrain.iterations_per_call * c.pretrain.updates_per_iteration
    updates = [num_updates(run.config) for run in runs]
    if name == 'objectives':  # more updates a frame are one of its arms
      updates = [run.config.pretrain.env_steps for run in runs]
    assert len(set(updates)) == 1 and updates[0] > 50, (name, set(updates))  # budgets are matched
    for run in runs:
      assert 'study' not in run.config and run.config.seed == run.seed
      p = run.config.pretrain  # a line of progress as often as the base run prints one
      assert p.iterations_per_call in range(
        1, max(1, updates_a_call // p.updates_per_iteration) + 1
      )


# Runs.


def same_table(workdir):
  return [(workdir / 'results' / name).read_bytes() for name in ('study.csv', 'study.json')]


def read(workdir):
  return json.loads((workdir / 'results' / 'study.json').read_text())


def act_when(path, act):
  """Does something as soon as a file has content, from another thread."""

  def watch():
    deadline = time.monotonic() + 300
    while not (path.exists() and path.stat().st_size) and time.monotonic() < deadline:
      time.sleep(0.001)
    act()

  thread = threading.Thread(target=watch, daemon=True)
  thread.start()
  return thread


@pytest.mark.parametrize('ends', [True, False])
def test_several_commands_share_the_runs(ends, tmp_path, monkeypatch):
  """What another is at comes last, and what reads it; so does nothing that it will never end."""
  c = small_study(tmp_path, seeds=(0, 1))
  passive = 'pairs.source=passive_random pairs.record={PALM}'
  c.study.arms = (
    ('PALM', 'pretrain.record=True'),
    ('passive', passive),
    ('alpha 0', 'environment.alpha=0'),
  )
  called, busy = [], '/PALM/seed0'

  def run_jobs(this, config, folder, jobs, patience):
    called.append('/'.join(folder.parts[-2:]))
    if str(folder).endswith(busy) and not (patience and ends):
      raise workdirs.Busy('another command has it')
    return True

  monkeypatch.setattr(study, '_run_jobs', run_jobs)
  monkeypatch.setattr(study, '_line', lambda *_: dict(run=''))
  monkeypatch.setattr(study.numbers, 'write_lines', lambda path, lines: None)
  seen = []
  monkeypatch.setattr(study, '_results', lambda c, runs, lines: seen.append(lines) or {})
  monkeypatch.setattr(study.numbers, 'table', lambda results: '')
  monkeypatch.setattr(study.figure, 'draw', lambda results, path: None)
  result = study.run(Run(c, tmp_path / 'study', devices.make_mesh(), None, runner=runner))
  first = ['PALM/seed0', 'alpha_0/seed0', 'PALM/seed1', 'alpha_0/seed1', 'passive/seed1']
  assert called == first + (['PALM/seed0', 'passive/seed0'] if ends else ['PALM/seed0'])
  assert (result is not None) == ends == bool(seen)


def test_the_table_never_shrinks_while_a_study_is_repeated(tmp_path, monkeypatch):
  c = small_study(tmp_path, seeds=(0, 1))
  csv = tmp_path / 'study' / 'results' / 'study.csv'
  line = lambda name, reading, run, place: (
    dict.fromkeys(numbers.COLUMNS, 1) | dict(arm=run.arm.name, run=str(run.folder))
  )
  monkeypatch.setattr(study, '_line', line)
  monkeypatch.setattr(study, '_results', lambda *_: {})
  monkeypatch.setattr(study.numbers, 'table', lambda results: '')
  monkeypatch.setattr(study.figure, 'draw', lambda results, path: None)
  stops_at, lines = 99, []

  def run_jobs(this, config, folder, jobs, patience):
    lines.append(len(csv.read_text().splitlines()) if csv.exists() else 0)
    return len(lines) < stops_at

  monkeypatch.setattr(study, '_run_jobs', run_jobs)
  again = lambda: study.run(Run(c, tmp_path / 'study', devices.make_mesh(), None, runner=runner))
  assert again() is not None
  assert lines == sorted(lines) and lines[0] == 0
  whole = csv.read_bytes()
  stops_at = len(lines) + 2
  assert again() is None and csv.read_bytes() == whole
  c.study.seeds = (0, 1, 2)
  stops_at = 99
  again()
  assert len(csv.read_bytes()) > len(whole)


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """A study that was interrupted in its first run, stopped in its second, and then finished."""
  folder = tmp_path_factory.mktemp('study')
  c, workdir = small_study(folder, seeds=(3,)), folder / 'study'
  G, _ = train.make_networks(c.generator, (40, 40, 1), 3)
  variables = jax.jit(lambda key: G.init(key, np.zeros((1, 4), np.float32), np.zeros(1, np.int32)))(
    jax.random.key(0)
  )
  write_json(folder / 'world' / 'generator' / 'network.json', train.network_fields(G))
  with Checkpoints(folder / 'world' / 'generator' / 'checkpoints') as checkpoints:
    checkpoints.save(1, {'generator': variables}, {})
  # Programs are kept in the workdir, as they are where nobody names another place.
  cache = dict(jax_compilation_cache_dir=None, jax_persistent_cache_min_compile_time_secs=0.0)
  before = {name: getattr(jax.config, name) for name in cache}
  for name, value in cache.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()  # else JAX stays with the first folder of the process
  handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
  signal.signal(signal.SIGTERM, lambda *_: pytest.fail('SIGTERM came when nothing ran'))
  signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    metrics = lambda arm: workdir / arm / 'seed3' / 'pretrain' / 'metrics.jsonl'
    kill = lambda number: lambda: os.kill(os.getpid(), number)
    thread = act_when(metrics('PALM'), kill(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
      finish(study.JOB, c, workdir)
    thread.join()
    assert not (workdir / 'results').exists()
    thread = act_when(metrics('alpha_0'), kill(signal.SIGTERM))
    assert not finish(study.JOB, c, workdir)
    thread.join()
    assert (
      len((workdir / 'results' / 'study.csv').read_text().splitlines()) == 2
    )  # the header and one run
    assert not (workdir / 'results' / 'study.json').exists()
    assert finish(study.JOB, c, workdir)
    yield c, workdir, read(workdir)
  finally:
    for number, handler in handlers.items():
      signal.signal(number, handler)
    for name, value in before.items():
      jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.mark.slow  # two minutes of compilation for this and the next two
def test_a_study_has_the_numbers_of_ordinary_runs_however_often_it_was_stopped(finished):
  c, workdir, results = finished
  with (workdir / 'results' / 'study.csv').open() as file:
    lines = list(csv.DictReader(file))
  assert [(line['arm'], line['seed'], line['run']) for line in lines] == [
    ('PALM', '3', 'PALM/seed3'),
    ('alpha 0', '3', 'alpha_0/seed3'),
  ]
  alone, folder = c.copy_and_resolve_references(), workdir.parent / 'alone'
  alone.seed, alone.environment.alpha = 3, 0.0
  runner.run(alone, 'pretrain', folder)
  value = json.loads((folder / 'results' / 'pretrain.json').read_text())['metrics'][
    'h_effective_rank'
  ]
  assert float(lines[1]['value']) == value != float(lines[0]['value'])
  assert (
    results['rows'][1]['mean'] == value
    and results['orderings'][0]['difference'] == float(lines[0]['value']) - value
  )


@pytest.mark.slow
def test_arms_that_differ_in_traced_values_compile_once(finished):
  _, workdir, _ = finished
  assert len([*(workdir / 'compilation_cache').glob('jit_call-*')]) == 1


@pytest.mark.slow
def test_it_goes_on_with_another_seed_and_runs_nothing_twice(finished, capfd):
  c, workdir, results = finished
  before = {path: path.stat().st_mtime_ns for path in workdir.rglob('results/pretrain.json')}
  table = same_table(workdir)
  finish(study.JOB, c, workdir)
  assert same_table(workdir) == table and len(before) == 2
  c = small_study(workdir.parent, seeds=(3, 4), arms=(('PALM', ''),), orderings=())
  finish(study.JOB, c, workdir)
  [row] = read(workdir)['rows']
  assert 'minus PALM' in capfd.readouterr().out
  assert (
    row['n'] == 2
    and row['low'] < row['mean'] < row['high']
    and results['rows'][0]['mean'] in (row['low'], row['high'])
  )
  assert {path: path.stat().st_mtime_ns for path in before} == before
  assert len([*(workdir / 'compilation_cache').glob('jit_call-*')]) == 1  # nor does a seed compile
  # A study that judges has been at one of the runs, with settings of its own.
  judged, settings = workdir / 'PALM' / 'seed3', workdir / 'PALM' / 'seed3' / 'config.json'
  write_json(judged / 'results' / 'diversity.json', {})
  write_json(settings, json.loads(settings.read_text()) | dict(diversity=dict(num_images=7)))
  another = small_study(workdir.parent, seeds=(3,), runs=str(workdir))
  another.name = 'another'
  finish(study.JOB, another, workdir.parent / 'another')  # has the same runs
  assert read(workdir.parent / 'another')['rows'] == results['rows']
  assert {path: path.stat().st_mtime_ns for path in before} == before
  c.pretrain.batch_size = 64
  with pytest.raises(UserError, match='another config .pretrain.batch_size: 32 there, 64 now'):
    finish(study.JOB, c, workdir)


@pytest.mark.slow
@pytest.mark.parametrize('name', NAMES)
def test_smoke(tmp_path, name):
  c = importlib.import_module(f'configs.studies.{name}').get_config('smoke')
  assert finish(study.JOB, c, tmp_path)
  assert all(row['n'] == 2 and np.isfinite(row['mean']) for row in read(tmp_path)['rows'])
  assert (tmp_path / 'results' / 'study.csv').exists() and (tmp_path / 'figure.png').exists()
