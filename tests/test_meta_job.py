"""The job `meta`: its result, stops, mistakes; goals of the latent world; the point robot."""

import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import meta as configs
from palm_jax import runner
from palm_jax.base import devices
from palm_jax.base.checkpoints import Checkpoints
from palm_jax.base.errors import NonFiniteError, UserError
from palm_jax.base.metrics import read_jsonl
from palm_jax.meta import loop, results, tasks, train
from palm_jax.world import Features, goal_latent
from palm_jax.world.config import from_config
from palm_jax.world.tasks import oracle_action
from tests.jobs import finish, saved_result
from tests.test_meta import tiny
from tests.worlds import LinearGenerator

PIXELS = Features(
  lambda variables, seen: seen.reshape(len(seen), -1)[:, ::7].astype(jnp.float32) / 255, (), 10
)


MAKE, PROGRAMS = loop.make_program, {}


@pytest.fixture(autouse=True, scope='module')
def linear_world():
  """The tests' own generator and features; and one program for the same settings, which each start
  would compile anew."""

  def make(family, kind, c):
    program = PROGRAMS.get((kind, c.to_json_best_effort()))
    return PROGRAMS.setdefault((kind, c.to_json_best_effort()), program or MAKE(family, kind, c))

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr('palm_jax.world._features', lambda *_: PIXELS)
    patch.setattr('palm_jax.world.config.load_generator', lambda path: LinearGenerator())
    patch.setattr(loop, 'make_program', make)
    yield


@pytest.fixture(scope='module')
def mesh():
  return devices.make_mesh(1)


def config_of(**changes):
  c = configs.get_config('smoke')
  c.meta = tiny(agents=('pearl', 'told'), **changes)
  c.environment.update(dict(alpha=0.9, beta=0.5, episode_length=4))
  return c


def end_of(workdir, kind, c, mesh):
  """The last state of an agent, on the host."""
  program = loop.make_program(None, kind, c)  # it was made
  everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  template = devices.templates(jax.eval_shape(program.init, jax.random.key(0)), everywhere)
  with Checkpoints(workdir / 'meta' / kind / 'checkpoints') as checkpoints:
    state = checkpoints.restore({'state': template}).items['state']
  players = state.players.replace(key=jax.random.key_data(state.players.key))
  return jax.device_get(state.replace(players=players))


@pytest.fixture(scope='module')
def finished(tmp_path_factory, mesh):
  config, workdir = config_of(), tmp_path_factory.mktemp('meta')
  finish(train.JOB, config, workdir, mesh=mesh)
  return config, workdir


def test_the_result_has_every_agent_seed_and_episode(finished, capsys):
  config, workdir = finished
  result = json.loads((workdir / 'results' / 'meta.json').read_text())
  assert [(row['agent'], row['goals']) for row in result['rows']] == [
    (kind, goals) for kind in ('pearl', 'told') for goals in ('held-out', 'training')
  ]
  for row in result['rows']:
    low, high = result['random_return'][row['goals']], result['oracle_return'][row['goals']]
    returns = np.array(row['returns'])
    assert returns.shape == (2, 3) and low < high
    scores = (returns - low) / (high - low)
    np.testing.assert_allclose(row['normalised'], scores, rtol=1e-6)
    np.testing.assert_allclose(row['mean'], scores.mean(0), rtol=1e-6)
    error = np.abs(scores[0] - scores[1]) / 2
    np.testing.assert_allclose(row['standard_error'], error, rtol=1e-5, atol=1e-8)
  assert result['env_steps'] == 6 * 2 * 4 * 3 and result['updates'] == 4 * 2
  assert result['protocol']['meta'] == json.loads(config.meta.to_json_best_effort())
  lines = train.table(result).splitlines()
  assert len(lines) == 6 and lines[1].split()[:2] == ['pearl', 'held-out'] and '±' in lines[1]
  curve = read_jsonl(workdir / 'meta' / 'pearl' / 'metrics.jsonl')
  assert [line['step'] for line in curve] == list(range(1, 7))
  assert 'held_out_last' not in curve[2] and 'held_out_last' in curve[3] and 'kl' in curve[3]


def test_a_stopped_job_ends_as_if_it_had_not_been(finished, tmp_path, mesh, monkeypatch):
  """It is told to stop in each agent's fourth iteration, and in the second's last."""
  config, workdir = finished
  make, calls = loop.make_program, []

  def stopping_in(number):
    def counted(family, kind, c):
      program = make(family, kind, c)

      def call(*args):
        calls.append(kind)
        if len(calls) == number:
          os.kill(os.getpid(), signal.SIGTERM)
        return program.call(*args)

      return program._replace(call=call)

    return counted

  for number, done in ((4, 4), (10, 4), (12, 6)):
    monkeypatch.setattr(loop, 'make_program', stopping_in(number))
    assert finish(train.JOB, config, tmp_path, mesh=mesh) is None
    state = end_of(tmp_path, calls[-1], config.meta, mesh)
    assert state.iteration == done and not (tmp_path / 'results').exists()
  monkeypatch.setattr(loop, 'make_program', stopping_in(0))
  assert finish(train.JOB, config, tmp_path, mesh=mesh)
  assert calls == ['pearl'] * 6 + ['told'] * 6
  monkeypatch.undo()
  for kind in config.meta.agents:
    states = (end_of(folder, kind, config.meta, mesh) for folder in (workdir, tmp_path))
    jax.tree.map(np.testing.assert_array_equal, *states)
    curves = (
      read_jsonl(folder / 'meta' / kind / 'metrics.jsonl') for folder in (workdir, tmp_path)
    )
    assert next(curves) == next(curves)
  once, again = (saved_result(folder / 'results' / 'meta.json') for folder in (workdir, tmp_path))
  assert once | dict(seconds=0) == again | dict(seconds=0)


def poisoned(given, part):
  """Tasks of which a part is NaN."""
  return given._replace(**{part: jax.tree.map(lambda x: x * jnp.nan, getattr(given, part))})


def test_held_out_tasks_are_never_learned_from(finished, tmp_path, mesh):
  """A training whose held-out tasks are NaN ends the same, bit for bit."""
  config, workdir = finished
  family, given = tasks.latent_goals(config, tmp_path)
  given = devices.replicate(mesh, poisoned(given, 'held_out'))
  folder = tmp_path / 'meta' / 'pearl'
  found = train.train('pearl', config.meta, family, given, jax.random.key(0), folder, mesh)
  assert np.isnan(found['returns']['held-out']).all()
  assert np.isfinite(found['returns']['training']).all()
  states = (end_of(folder, 'pearl', config.meta, mesh) for folder in (workdir, tmp_path))
  jax.tree.map(np.testing.assert_array_equal, *states)


def test_it_is_not_resumed_with_other_tasks(finished, mesh):
  config, workdir = finished
  other = config.copy_and_resolve_references()
  other.world.goal = 1
  with pytest.raises(UserError, match='made with another choice of goals'):
    finish(train.JOB, other, workdir, mesh=mesh)


def test_what_is_not_finite_stops_it(finished, tmp_path, mesh):
  config, _ = finished
  family, given = tasks.latent_goals(config, tmp_path)
  broken = devices.replicate(mesh, poisoned(given, 'training'))
  with pytest.raises(NonFiniteError, match='return of pearl is not finite at iteration 0'):
    train.train('pearl', config.meta, family, broken, jax.random.key(0), tmp_path, mesh)


@pytest.mark.parametrize(
  'key, value, words',
  [
    ('meta.agents', (), 'meta.agents is empty'),
    ('meta.agents', ('perl',), 'did you mean pearl?'),
    ('meta.agents', ('told', 'told'), 'names one twice'),
    ('meta.meta_batch', 5, 'meta.meta_batch=5'),
    ('meta.tasks_per_iteration', 5, 'or more meta.train_goals'),
    ('meta.replay_episodes', 3, 'set it to 4 or more'),
    ('meta.test_episodes', 1, 'leaves none to adapt in'),
    ('meta.iterations', 2, 'set it to 3 or more'),
    ('meta.latent_dim', 0, 'meta.latent_dim=0'),
    ('meta.log_std_min', 3.0, 'meta.log_std_min=3.0'),
    ('world.task', 'entropy', "differ in 'goal'"),
    ('world.observations', 'pixels', "sees 'features' only"),
    ('world.goal', 2**31 - 3, 'too large'),
    ('environment.crop', 1, 'environment.crop=1'),
    ('environment.latent_space', 'w', 'plays without'),
  ],
)
def test_bad_settings_are_one_line(key, value, words):
  c = config_of()
  section, name = key.split('.')
  c[section][name] = value
  with pytest.raises(UserError) as caught:
    train.check(c, 1)
  assert words in str(caught.value) and '\n' not in str(caught.value)


def test_configs_without_its_sections_are_refused():
  from configs import cifar

  with pytest.raises(UserError, match='no section meta: use configs/meta.py'):
    train.check(cifar.get_config('small'), 1)
  with pytest.raises(UserError, match='variants are smoke, laptop'):
    configs.get_config('large')
  for variant in configs.VARIANTS:
    train.check(configs.get_config(variant), 1)
  assert runner.find('meta') is train.JOB


# ---- goals of the latent world


@pytest.fixture(scope='module')
def goals(linear_world):
  """Family and tasks of the seeds 4 to 8, of which two are held out; worlds of two of them."""
  c = config_of(train_goals=3)
  c.world.goal = 4
  return *tasks.latent_goals(c, None), {seed: from_config(c, None, goal=seed) for seed in (4, 8)}


def test_goals_are_those_of_the_world(goals):
  family, found, worlds = goals
  assert family.sizes == (10, 6, 6) and family.steps == 3
  for seed, (world, params) in worlds.items():
    part, row = (found.training, 0) if seed == 4 else (found.held_out, 1)
    np.testing.assert_allclose(part['z'][row], goal_latent(world, seed)[0], rtol=1e-6)
    np.testing.assert_allclose(part['features'][row], params.task['features'], rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose((family.describe(found.training) ** 2).mean(1), 1, rtol=1e-5)
  expected = oracle_action(found.held_out['z'])
  np.testing.assert_array_equal(family.oracle(None, found.held_out), expected)


def test_each_environment_has_the_reward_of_its_own_goal(goals):
  family, found, worlds = goals
  both = jax.tree.map(lambda a, b: jnp.stack([a[0], b[1]]), found.training, found.held_out)
  keys = jax.random.split(jax.random.key(0), 2)
  actions = jax.random.uniform(jax.random.key(1), (2, 6), minval=-1, maxval=1)
  step = jax.jit(family.step)
  begun = family.begin(found.variables, keys, both)
  seen, state, *_ = step(found.variables, keys, begun, actions, both)
  assert state.env.step.tolist() == [0, 0]
  after, state, rewards, hints = step(found.variables, keys, state, actions, both)
  assert seen.shape == after.shape == (2, 10) and state.env.step.tolist() == [1, 1]
  np.testing.assert_array_equal(rewards, hints)
  for row, (world, params) in enumerate(worlds.values()):
    step = jax.jit(world.step_all)
    begun = family.begin(dict(params=params), keys, both)
    _, begun, _, _ = step(keys, begun, actions, params)
    features, _, expected, _ = step(keys, begun, actions, params)
    np.testing.assert_allclose(rewards[row], expected[row], rtol=1e-3, atol=1e-4)
    standard = (features - params.task['center']) / found.variables['deviation']
    np.testing.assert_allclose(after[row], standard[row], rtol=1e-2, atol=1e-2)


def test_goals_differ_in_the_first_coordinates_only():
  family, found = tasks.latent_goals(config_of(goal_dims=2), None)
  assert family.sizes == (10, 6, 2) and family.describe(found.training).shape == (4, 2)
  assert (found.training['z'][:, 2:] == 0).all() and (found.training['z'][:, :2] != 0).all()


def test_a_single_seed_has_no_standard_error():
  row = results.row_of('told', 'training', np.ones((1, 2, 3)), np.array([[0.0] * 3, [2.0] * 3]))
  assert row['mean'] == [0.5, 0.5] and row['standard_error'] == [None, None]
  assert '±' not in results._figure(0.5, None)
