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
from palm_jax.world import goal_latent
from palm_jax.world.config import from_config
from palm_jax.world.tasks import oracle_action
from tests.jobs import finish, saved_result
from tests.robots import PointRobot, half_circle
from tests.test_meta import tiny
from tests.worlds import LinearGenerator

ROBOT = PointRobot(steps=3)


def robots(config, workdir):
  del workdir
  return ROBOT, half_circle(config.meta.train_goals, config.meta.test_goals)


@pytest.fixture(scope='module')
def mesh():
  return devices.make_mesh(1)


def config_of(**changes):
  c = configs.get_config('smoke')
  c.meta = tiny(**changes)
  return c


def end_of(workdir, kind, c, mesh):
  """The last state of an agent, on the host."""
  program = loop.make_program(ROBOT, kind, c)
  everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  template = devices.templates(jax.eval_shape(program.init, jax.random.key(0)), everywhere)
  with Checkpoints(workdir / 'meta' / kind / 'checkpoints') as checkpoints:
    state = checkpoints.restore({'state': template}).items['state']
  players = state.players.replace(key=jax.random.key_data(state.players.key))
  return jax.device_get(state.replace(players=players))


@pytest.fixture(scope='module')
def finished(tmp_path_factory, mesh):
  config, workdir = config_of(), tmp_path_factory.mktemp('meta')
  finish(train.JOB, config, workdir, mesh=mesh, make_family=robots)
  return config, workdir


def test_the_result_has_every_agent_seed_and_episode(finished, capsys):
  config, workdir = finished
  result = json.loads((workdir / 'results' / 'meta.json').read_text())
  assert [(row['agent'], row['goals']) for row in result['rows']] == [
    (kind, goals) for kind in ('pearl', 'blind', 'told') for goals in ('held-out', 'training')
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
  assert result['env_steps'] == 6 * 2 * 3 * 3 and result['updates'] == 4 * 2
  assert result['protocol']['meta'] == json.loads(config.meta.to_json_best_effort())
  lines = train.table(result).splitlines()
  assert len(lines) == 8 and lines[1].split()[:2] == ['pearl', 'held-out'] and '±' in lines[1]
  curve = read_jsonl(workdir / 'meta' / 'pearl' / 'metrics.jsonl')
  assert [line['step'] for line in curve] == list(range(1, 7))
  assert 'held_out_last' not in curve[2] and 'held_out_last' in curve[3] and 'kl' in curve[3]


def test_a_stopped_job_ends_as_if_it_had_not_been(finished, tmp_path, mesh, monkeypatch):
  """It is told to stop in the second agent's fourth iteration, later in its last."""
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

  for number, done in ((10, 4), (12, 6)):
    monkeypatch.setattr(loop, 'make_program', stopping_in(number))
    assert finish(train.JOB, config, tmp_path, mesh=mesh, make_family=robots) is None
    state = end_of(tmp_path, 'blind', config.meta, mesh)
    assert state.iteration == done and not (tmp_path / 'results').exists()
  monkeypatch.setattr(loop, 'make_program', stopping_in(0))
  assert finish(train.JOB, config, tmp_path, mesh=mesh, make_family=robots)
  assert calls == ['pearl'] * 6 + ['blind'] * 6 + ['told'] * 6
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


def test_it_is_not_resumed_with_other_tasks(finished, mesh):
  config, workdir = finished
  other = lambda config, workdir: (ROBOT, half_circle(4, 2, seed=1))
  with pytest.raises(UserError, match='began with other tasks'):
    finish(train.JOB, config, workdir, mesh=mesh, make_family=other)


def test_what_is_not_finite_stops_it(tmp_path, mesh):
  with pytest.raises(NonFiniteError, match='prior_return of pearl is not finite at iteration 0'):
    broken = lambda config, workdir: (ROBOT, jax.tree.map(lambda x: x * jnp.nan, half_circle(4, 2)))
    finish(train.JOB, config_of(), tmp_path, mesh=mesh, make_family=broken)


@pytest.mark.parametrize(
  'key, value, words',
  [
    ('meta.agents', (), 'meta.agents is empty'),
    ('meta.agents', ('perl',), 'did you mean pearl?'),
    ('meta.agents', ('told', 'told'), 'names one twice'),
    ('meta.meta_batch', 5, 'meta.meta_batch=5'),
    ('meta.tasks_per_iteration', 5, 'or more meta.train_goals'),
    ('meta.replay_episodes', 2, 'set it to 3 or more'),
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


@pytest.fixture
def linear(monkeypatch):
  """A config whose generator is the tests' own."""
  monkeypatch.setattr('palm_jax.world.config.load_generator', lambda path: LinearGenerator())
  c = config_of()
  c.meta.update(dict(train_goals=3, test_goals=2))
  c.environment.update(dict(alpha=0.9, beta=0.5, episode_length=6))
  return c


def test_goals_are_those_of_the_world(linear, tmp_path):
  linear.world.goal = 4
  family, found = tasks.latent_goals(linear, tmp_path)
  assert family.sizes == (128, 6, 6) and family.steps == 5
  for i in range(5):  # of the seeds 4 to 8
    world, params = from_config(linear, tmp_path, goal=4 + i)
    part, row = (found.training, i) if i < 3 else (found.held_out, i - 3)
    np.testing.assert_allclose(part['z'][row], goal_latent(world, 4 + i)[0], rtol=1e-6)
    np.testing.assert_allclose(part['features'][row], params.task['features'], rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose((family.describe(found.training) ** 2).mean(1), 1, rtol=1e-5)
  np.testing.assert_array_equal(family.oracle(found.held_out), oracle_action(found.held_out['z']))


def test_each_environment_has_the_reward_of_its_own_goal(linear, tmp_path):
  family, found = tasks.latent_goals(linear, tmp_path)
  keys = jax.random.split(jax.random.key(0), 3)
  actions = jax.random.uniform(jax.random.key(1), (3, 6), minval=-1, maxval=1)
  seen, state = jax.jit(family.reset)(found.variables, keys, found.training)
  after, _, rewards, hints = jax.jit(family.step)(
    found.variables, keys, state, actions, found.training
  )
  assert seen.shape == after.shape == (3, 128)
  np.testing.assert_array_equal(rewards, hints)
  for goal in range(3):
    world, params = from_config(linear, tmp_path, goal=goal)
    _, begun = world.reset_all(keys, params)
    features, _, expected, _ = world.step_all(keys, begun, actions, params)
    np.testing.assert_allclose(rewards[goal], expected[goal], rtol=1e-3, atol=1e-4)
    standard = (features - params.task['center']) / found.variables['deviation']
    np.testing.assert_allclose(after[goal], standard[goal], rtol=1e-2, atol=1e-2)


def test_goals_differ_in_the_first_coordinates_only(linear, tmp_path):
  linear.meta.goal_dims = 2
  family, found = tasks.latent_goals(linear, tmp_path)
  assert family.sizes == (128, 6, 2) and family.describe(found.training).shape == (3, 2)
  assert (found.training['z'][:, 2:] == 0).all() and (found.training['z'][:, :2] != 0).all()


def test_the_job_runs_in_the_latent_world(linear, tmp_path, mesh, capsys):
  linear.meta.update(
    dict(meta_batch=2, iterations=3, updates=1, agents=('pearl', 'told'), test_episodes=2)
  )
  result = finish(train.JOB, linear, tmp_path, mesh=mesh)
  assert result and np.isfinite([row['mean'] for row in result['rows']]).all()
  assert result['oracle_return']['held-out'] > result['random_return']['held-out']
  assert 'told   held-out' in capsys.readouterr().out


def test_a_single_seed_has_no_standard_error():
  row = results.row_of('told', 'training', np.ones((1, 2, 3)), np.array([[0.0] * 3, [2.0] * 3]))
  assert row['mean'] == [0.5, 0.5] and row['standard_error'] == [None, None]
  assert '±' not in results._figure(0.5, None)
