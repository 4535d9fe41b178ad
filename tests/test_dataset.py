"""What a run recorded as a Minari data set, and back."""

import json
import shutil
import types

import gymnasium
import jax
import numpy as np
import pytest

from palm_jax import experience, pretrain, replay, rollout, worlds
from palm_jax.base import devices
from palm_jax.base.checkpoints import Checkpoints
from palm_jax.base.digests import digest
from palm_jax.base.errors import UserError
from palm_jax.offline import datasets, records
from palm_jax.world import config as worlds_config
from palm_jax.world import dataset, make
from tests.worlds import LinearGenerator, tiny_config

pytestmark = pytest.mark.usefixtures('shallow')

minari = pytest.importorskip('minari')
GENERATOR, LENGTH, ENVS = LinearGenerator(), 7, 16


@pytest.fixture(scope='module')
def recorded(tmp_path_factory):
  """A pretraining's first rows -> its workdir, and the ring that holds all of them."""
  workdir, config = tmp_path_factory.mktemp('recorded'), tiny_config()
  config.pretrain.update(dict(record=True, iterations_per_call=3, warmup_steps=1024))
  config.pairs.source = 'random_action'  # as the agent's are before it learns
  (workdir / 'config.json').write_text(config.to_json_best_effort())
  mesh = devices.make_mesh(1)
  program = pretrain.make_program(config, GENERATOR, mesh)
  world = worlds.make_world(config, GENERATOR, mesh)
  state, output = program.call(program.init(jax.random.key(0), world), world)
  experience.write(workdir / 'pretrain' / 'experience', 0, output.experience)
  return workdir, jax.device_get(state.ring)


@pytest.fixture(autouse=True)
def linear(monkeypatch):
  monkeypatch.setattr(worlds, 'load_world_generator', lambda config, workdir: GENERATOR)


@pytest.fixture(scope='module')
def written(recorded, tmp_path_factory):
  root = tmp_path_factory.mktemp('sets')
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(worlds, 'load_world_generator', lambda config, workdir: GENERATOR)
    dataset.write(recorded[0], root, encoder='random', task='goal', goal=3)
  return root


def test_pictures_and_actions_are_those_of_the_run(recorded, written, monkeypatch):
  """Bit for bit the frames of the ring, cut where episodes end."""
  ring = recorded[1]
  monkeypatch.setenv('MINARI_DATASETS_PATH', str(written))
  found = minari.load_dataset('palm/explored-v0')
  assert found.spec.env_spec.kwargs['crop'] == 0  # which world it is, to make it again
  config = tiny_config()
  first = np.asarray(rollout.environment.staggered_steps(np.arange(ENVS), ENVS, LENGTH))
  rows = 12
  step = (first + np.arange(rows)[:, None]) % LENGTH
  expected = {}
  for env in range(ENVS):
    starts = [0, *(np.flatnonzero(step[1:, env] == 0) + 1), rows]
    for begin, end in zip(starts, starts[1:], strict=False):
      if end - begin > 1:
        frames = ring.frames[begin:end, env].reshape(-1, 8, 8, 1)
        actions = replay.unpack(ring.actions[begin : end - 1, env], np.float32)
        expected[frames.tobytes()] = np.asarray(actions)
  assert found.total_episodes == len(expected) > ENVS
  for episode in found.iterate_episodes():
    actions = expected.pop(np.asarray(episode.observations).tobytes())
    np.testing.assert_array_equal(episode.actions, actions)
    assert len(episode.observations) == len(episode.actions) + 1 == len(episode.rewards) + 1
    assert not episode.terminations.any()
    assert episode.truncations.tolist() == [False] * (len(actions) - 1) + [True]
  assert not expected and config.environment.episode_length == LENGTH


def test_rewards_are_the_tasks(written, monkeypatch):
  monkeypatch.setenv('MINARI_DATASETS_PATH', str(written))
  world, params = make(GENERATOR, task='goal', goal=3, encoder='random')
  look = jax.jit(world.features.apply)
  for episode in list(minari.load_dataset('palm/explored-v0').iterate_episodes())[:4]:
    seen = look(params.features, np.asarray(episode.observations)[1:])
    _, rewards = world.task.reward(params.task, (), seen, np.zeros(len(seen), bool))
    np.testing.assert_allclose(episode.rewards, rewards, atol=1e-5)


@pytest.fixture(scope='module')
def of_class_1(recorded, tmp_path_factory):
  """Features, for a goal of that class."""
  root = tmp_path_factory.mktemp('features')
  settings = dict(encoder='random', observations='features', task='goal', goal=3, label=1)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(worlds, 'load_world_generator', lambda config, workdir: GENERATOR)
    return dataset.write(recorded[0], root, **settings)


def envs_of():
  return types.SimpleNamespace(
    single_observation_space=gymnasium.spaces.Box(-9, 9, (128,)),
    single_action_space=gymnasium.spaces.Box(-1, 1, (6,)),
  )


def test_features_feed_the_offline_agents(of_class_1):
  folder, envs = of_class_1, envs_of()
  world, _ = make(GENERATOR, observations='features')
  record = datasets.load(str(folder), envs, dataset.identity(world))
  assert record.observations.shape[1] == 128 and record.actions.shape[1] == 6
  inside = record.episode[1:] == record.episode[:-1]
  np.testing.assert_array_equal(
    record.next_observations[:-1][inside], record.observations[1:][inside]
  )
  for key, words in (
    (dataset.FEATURES, 'through another encoder'),
    (dataset.WORLD, 'in the pictures of another generator'),
  ):
    with pytest.raises(UserError, match=words):
      datasets.load(str(folder), envs, dataset.identity(world) | {key: 'f' * 64})
  envs.single_action_space = gymnasium.spaces.Box(-1, 1, (5,))
  with pytest.raises(UserError, match=r'\(128, 6\) numbers, the environment has \(128, 5\)'):
    datasets.load(str(folder), envs)


def set_with(root, space, actions):
  """A set of one episode, of actions (3, 2) in a space -> its folder."""
  from minari.data_collector import EpisodeBuffer

  seen, last = np.zeros((4, 5), np.float32), [False, False, True]
  buffer = EpisodeBuffer(
    observations=seen,
    actions=actions,
    rewards=[0.0] * 3,
    terminations=[False] * 3,
    truncations=last,
    infos={},
  )
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('MINARI_DATASETS_PATH', str(root))
    minari.create_dataset_from_buffers(
      'tests/actions-v0',
      [buffer],
      observation_space=gymnasium.spaces.Box(-9, 9, (5,)),
      action_space=space,
      algorithm_name='x',
    )
  return str(root / 'tests' / 'actions-v0')


@pytest.mark.filterwarnings('ignore::UserWarning')  # Minari's, of all that is not told
@pytest.mark.parametrize(
  ('low', 'high', 'expected'),
  [
    ([-0.4, -0.4], [0.4, 0.4], [[-0.5, 0.5], [-1, 1], [0.75, -0.25]]),
    ([-3, 0], [3, 0.7], [[-0.5, 0.5], [-1, 1], [0.75, -0.25]]),
    ([-1, -1], [1, 1], [[-0.3, 1e-30], [-1, 1], [0.1, -0.7]]),  # as they are
    ([-1, -1], [1, 1], [[-0.3, 0.5], [-1, 1], [0.1, -1.1]]),
    ([-np.inf, -1], [np.inf, 1], [[-0.3, 0.5], [-1, 1], [0.1, -0.7]]),  # nothing to rescale by
    ([-np.inf, -1], [np.inf, 1], [[-0.3, 0.5], [-1, 1], [1.1, -0.7]]),
  ],
)
def test_actions_are_rescaled_from_the_bounds_of_their_set(low, high, expected, tmp_path):
  space = gymnasium.spaces.Box(np.array(low, np.float32), np.array(high, np.float32))
  expected, actions = np.array(expected, np.float32), np.array(expected, np.float32)
  if np.isfinite(low).all():
    middle, half = (space.high + space.low) / 2, (space.high - space.low) / 2
    actions = middle + half * expected
  folder = set_with(tmp_path, space, actions)
  envs = types.SimpleNamespace(
    single_observation_space=gymnasium.spaces.Box(-9, 9, (5,)),
    single_action_space=gymnasium.spaces.Box(-1, 1, (2,)),
  )
  if np.abs(expected).max() > 1:
    bounds = r'\[-1, 1\], and .* no bounds' if np.isinf(low).any() else 'the bounds of its'
    with pytest.raises(UserError, match=f'has actions outside {bounds}'):
      datasets.load(folder, envs)
    return
  given = datasets.load(folder, envs).actions
  assert given.dtype == np.float32 and np.abs(given).max() <= 1
  if low == [-1, -1] or np.isinf(low).any():
    np.testing.assert_array_equal(given, expected)
  np.testing.assert_allclose(given, expected, atol=1e-6)


def test_rewards_of_a_class_are_among_the_episodes_of_all(recorded):
  """Each picture in the memory of `entropy` is of its own class."""

  def rewards(label):
    config = tiny_config()
    settings = dict(task='entropy', encoder='random', label=label)
    world, params = make(GENERATOR, **settings, **worlds_config.settings_of(config.environment))
    parts = dataset._episodes(world, params, recorded[0] / 'pretrain' / 'experience', config)
    return {np.stack(x.observations).tobytes(): x.rewards for part in parts for x in part}

  of_all, of_one = rewards(-1), rewards(1)
  assert 0 < len(of_one) < len(of_all) and any(map(any, of_one.values()))
  for seen, given in of_one.items():
    np.testing.assert_allclose(given, of_all[seen], rtol=1e-5)


def test_a_set_of_a_class_has_its_episodes_only(recorded, of_class_1):
  parts = list(experience.read(recorded[0] / 'pretrain' / 'experience'))
  label, step = (np.concatenate([getattr(x, name) for x in parts]) for name in ('label', 'step'))
  inside = (step[1:] > 0) & (label[1:] == 1)
  record = datasets.load(str(of_class_1), envs_of())
  assert 0 < len(record.rewards) == inside.sum() < inside.size / 2
  # Whole are those from their first picture to their last.
  rows, env = np.nonzero((step == LENGTH - 1) & (label == 1))
  assert record.ended.sum() == (rows >= LENGTH - 1).sum() > 0
  _, numbers = np.unique(record.episode, return_inverse=True)
  returns = np.bincount(numbers, record.rewards)[numbers[record.ended]]
  np.testing.assert_allclose(records.mean_return(record), returns.mean(), rtol=1e-5)


def test_a_set_of_another_task_is_refused(of_class_1, caplog):
  c = tiny_config()
  c.world = worlds_config.default_config()
  c.world.update(dict(label=1, goal=3))
  load = lambda: datasets.load(str(of_class_1), envs_of(), None, c)
  load()
  assert not caplog.records
  c.environment.alpha = 0.25
  load()
  [line] = [r.getMessage() for r in caplog.records]
  assert 'in other dynamics (environment.alpha=0.5 there, 0.25 here)' in line
  for section, key, value, there in (
    ('world', 'task', 'entropy', "'goal'"),
    ('world', 'goal', 0, 3),
    ('world', 'label', -1, 1),
    ('environment', 'truncation_psi', 0.5, 1.0),
  ):
    before, c[section][key] = c[section][key], value
    with pytest.raises(UserError, match=f'{section}.{key}={there} there, {value!r} here.: give'):
      load()
    c[section][key] = before


def test_pictures_of_another_generator_are_refused(recorded, tmp_path):
  workdir = tmp_path / 'run'
  shutil.copytree(recorded[0], workdir)
  with Checkpoints(workdir / 'pretrain' / 'checkpoints') as checkpoints:
    checkpoints.save(
      1, {'encoder': {'x': np.zeros(1, np.float32)}}, {'world': digest(GENERATOR.variables, {})}
    )
  experience.check_generator(workdir, GENERATOR)
  with Checkpoints(workdir / 'pretrain' / 'checkpoints') as checkpoints:
    checkpoints.save(2, {'encoder': {'x': np.zeros(1, np.float32)}}, {'world': 'f' * 64})
  with pytest.raises(UserError, match='world of another generator .digest ffffffffffff, here'):
    dataset.write(workdir, tmp_path / 'sets')
  assert not (tmp_path / 'sets').exists()


def test_mistakes_leave_nothing(recorded, written, tmp_path, monkeypatch):
  with pytest.raises(UserError, match='holds something already'):
    dataset.write(recorded[0], written)
  with pytest.raises(UserError, match='Minari refuses it'):
    dataset.write(recorded[0], tmp_path / 'a', name='no version', encoder='random')
  assert not list((tmp_path / 'a').iterdir())
  full = types.SimpleNamespace(free=1_000_000)
  monkeypatch.setattr(dataset.shutil, 'disk_usage', lambda path: full)
  with pytest.raises(UserError, match=r'the disk has 1.00 MB left, and \d+ episodes take some'):
    dataset.write(recorded[0], tmp_path / 'a')
  assert not list((tmp_path / 'a').iterdir())
  (tmp_path / 'empty').mkdir()
  with pytest.raises(UserError, match='config.json is missing: give the --workdir'):
    dataset.write(tmp_path / 'empty', tmp_path / 'b')
  old = tmp_path / 'old'
  (old / 'pretrain' / 'experience').mkdir(parents=True)
  (old / 'config.json').write_text((recorded[0] / 'config.json').read_text())
  for path in (recorded[0] / 'pretrain' / 'experience').iterdir():
    with np.load(path) as file:
      np.savez(
        old / 'pretrain' / 'experience' / path.name, **{n: file[n] for n in ('z', 'label', 'step')}
      )
  with pytest.raises(UserError, match='holds no actions: it was recorded by an older version'):
    dataset.write(old, tmp_path / 'b', encoder='random')
  assert json.loads((old / 'config.json').read_text())['pretrain']['record']
