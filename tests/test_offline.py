"""Records of what was played, and the job that learns from them."""

import json
import signal

import gymnasium
import jax
import numpy as np
import pytest
from PIL import Image

from configs import offline as configs
from palm_jax import runner
from palm_jax.base import figures
from palm_jax.base.errors import UserError
from palm_jax.base.training import Training
from palm_jax.offline import behaviours, figure, records, train
from palm_jax.offline.methods import METHODS
from palm_jax.world import origins
from tests.test_bear import batch
from tests.test_bear import config as bear_config
from tests.test_meta_job import PIXELS
from tests.worlds import LinearGenerator


class Boundless(gymnasium.Env):
  """Actions may be any numbers."""

  observation_space = gymnasium.spaces.Box(-1, 1, (2,))
  action_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,))


gymnasium.register('Boundless-v0', Boundless)


class Square(Boundless):
  """Actions are matrices."""

  action_space = gymnasium.spaces.Box(-2, 2, (2, 2))


gymnasium.register('Square-v0', Square)


class Unit(gymnasium.Env):
  """Actions as they are: the wrapper that rescales them writes into those that it is given."""

  observation_space = gymnasium.spaces.Box(-1, 1, (1,))
  action_space = gymnasium.spaces.Box(-1, 1, (1,))

  def reset(self, *, seed=None, options=None):
    super().reset(seed=seed)
    self.count = 0
    return np.zeros(1, np.float32), {}

  def step(self, action):
    self.count += 1
    return np.asarray(action, np.float32), float(action[0]), False, self.count == 3, {}


gymnasium.register('Unit-v0', Unit)


class Counter(gymnasium.vector.VectorEnv):
  """Counts its steps: observation (env, episode, step), reward step, episodes of `length` steps.

  The second environment's episodes terminate, the others are cut.
  """

  metadata = {'autoreset_mode': gymnasium.vector.AutoresetMode.NEXT_STEP}

  def __init__(self, num_envs=3, length=3):
    self.num_envs, self.length = num_envs, length
    self.single_observation_space = gymnasium.spaces.Box(-9, 99, (3,), np.float32)
    self.single_action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)
    self.seen = np.zeros((num_envs, 3), np.float32)  # reused, as some environments do

  def reset(self, *, seed=None, options=None):
    self.seen[:] = 0
    self.seen[:, 0] = np.arange(self.num_envs)
    return self.seen, {}

  def step(self, actions):
    begins = self.seen[:, 2] == self.length
    self.seen[:, 1] += begins
    self.seen[:, 2] = np.where(begins, 0, self.seen[:, 2] + 1)
    ends = self.seen[:, 2] == self.length
    true = np.arange(self.num_envs) == 1
    return self.seen, np.where(begins, 50, self.seen[:, 2]), ends & true, ends & ~true, {}


def test_no_step_of_a_record_crosses_an_end():
  player = records.Player(Counter())
  player.begin(0)
  record = player.play(lambda seen, t: seen[:, 2:] / 9, 10)
  assert len(record.rewards) == 3 * 8  # of 10 steps two begin an episode
  before, after = record.observations, record.next_observations
  np.testing.assert_array_equal(before[:, :2], after[:, :2])
  np.testing.assert_array_equal(before[:, 2] + 1, after[:, 2])
  np.testing.assert_array_equal(record.rewards, after[:, 2])
  np.testing.assert_allclose(record.actions[:, 0], before[:, 2] / 9)
  np.testing.assert_array_equal(record.terminated, (after[:, 0] == 1) & (after[:, 2] == 3))
  np.testing.assert_array_equal(record.episode, before[:, 0] + 3 * before[:, 1])
  assert records.mean_return(record) == 6  # the third episode is cut by the record's end
  more = player.play(lambda seen, t: seen[:, :1] / 9, 2)  # it plays on
  assert more.observations[:, 1].min() == 2


def test_the_mean_return_is_of_all_whole_episodes():
  player = records.Player(Counter(length=np.array([2, 5, 4])))
  player.begin(0)
  blocks = [player.play(lambda seen, t: seen[:, :1] / 9, steps) for steps in (1, 9)]
  record = records.join(blocks)
  whole = [1 + 2] * 3 + [1 + 2 + 3 + 4 + 5] + [1 + 2 + 3 + 4] * 2  # in 10 steps
  assert record.ended.sum() == len(whole)
  np.testing.assert_allclose(records.mean_return(record), np.mean(whole))
  np.testing.assert_allclose(records.mean_return(blocks[0]), 1)  # none is whole
  assert records.mean_return(record._replace(ended=None)) == 15  # of an older version


def test_actions_that_need_no_rescaling_may_be_of_jax():
  c = configs.get_config('smoke')
  c.offline.environment = 'Unit-v0'
  player = records.Player(records.make_envs(c, None, 2))
  act = jax.jit(lambda seen, t: jax.numpy.full((2, 1), 0.5))
  assert (player.episode(act, 0, 1.0).returns == 1.5).all()
  player.begin(0)
  np.testing.assert_array_equal(player.play(act, 2).actions, 0.5)


def test_an_episode_is_summed_to_its_end():
  found = records.Player(Counter()).episode(lambda seen, t: seen[:, :1] / 9, 0, gamma=0.5)
  np.testing.assert_allclose(found.returns, 6)
  np.testing.assert_allclose(found.discounted, 1 + 1 + 0.75)
  np.testing.assert_array_equal(found.observations[:, 1:], 0)
  np.testing.assert_allclose(found.actions[:, 0], np.arange(3) / 9)


def test_nothing_has_a_value_after_a_true_end():
  player = records.Player(Counter())
  player.begin(0)
  record = player.play(lambda seen, t: seen[:, :1] / 9, 4)
  discount = behaviours.batch_of(record, 0.9).discount
  np.testing.assert_allclose(discount, np.where(record.terminated, 0, 0.9), rtol=1e-6)


def test_records_are_written_and_damage_is_named(tmp_path):
  player = records.Player(Counter())
  player.begin(0)
  record = player.play(lambda seen, t: seen[:, :1] / 9, 4)
  records.save(tmp_path / 'r.npz', record)
  jax.tree.map(np.testing.assert_array_equal, records.load(tmp_path / 'r.npz'), record)
  with (tmp_path / 'old.npz').open('wb') as file:  # as older versions wrote it
    np.savez(file, **{name: x for name, x in record._asdict().items() if name != 'ended'})
  assert records.load(tmp_path / 'old.npz', {'generator': 'a'}).ended is None
  content = bytearray((tmp_path / 'r.npz').read_bytes())
  content[200] ^= 1
  (tmp_path / 'r.npz').write_bytes(content)
  with pytest.raises(UserError, match='r.npz is damaged .*: delete it'):
    records.load(tmp_path / 'r.npz')


@pytest.mark.parametrize('name', METHODS)
def test_every_method_learns_and_acts(name):
  """Rewards are -|a - 0.3|, actions of the record uniform or, for cloning, 0.3."""
  c = configs.get_config('smoke')
  wide = dict(hidden_actor=(32, 32), hidden_critic=(32, 32), lr_actor=3e-3, lr_critic=3e-3)
  c.offline.bear.update(bear_config(warmup_updates=50, threshold=1.0, **wide).bear)
  c.sac.update(dict(hidden=(32, 32), lr_actor=3e-3, lr_critic=3e-3, init_alpha=1e-3))
  m = METHODS[name]

  def one(state, key):
    k = jax.random.split(key, 3)
    b = batch()
    action = jax.random.uniform(k[0], (64, 2), minval=-1, maxval=1)
    if name == 'bc':
      action = 0.3 + 0.01 * action
    h = jax.random.normal(k[1], (64, 3))
    reward = -abs(action - 0.3).sum(-1)
    b = b._replace(h=h, action=action, reward=reward, next_h=h, discount=0 * reward)
    return m.update(state, b, k[2], c)

  state = m.init(jax.random.key(0), 3, 2, c)
  state, _ = jax.jit(lambda s, k: jax.lax.scan(one, s, k))(
    state, jax.random.split(jax.random.key(1), 800)
  )
  actions = m.act(state, jax.random.normal(jax.random.key(2), (100, 3)), jax.random.key(3), 2, c)
  np.testing.assert_allclose(actions.mean(0), 0.3, atol=0.12)
  if m.value:
    h = jax.random.normal(jax.random.key(2), (100, 3))
    good, bad = (m.value(state, h, np.full((100, 2), x, np.float32), c) for x in (0.3, -0.9))
    assert (good > bad).mean() > 0.95


@pytest.fixture(scope='module')
def tiny():
  c = configs.get_config('smoke')
  c.offline.update(dict(environment='Pendulum-v1', rollout_length=8, behaviours=('half',)))
  c.offline.update(dict(methods=('bear',), behaviour_steps=32, updates=20, judge_every=10))
  c.offline.episodes = 1
  return c


def total(items):
  return jax.tree.map(np.sum, (items['ring'], items['actors']))


@pytest.fixture(scope='module')
def saves():
  """[(what was saved, its sums as it was)]."""
  return []


@pytest.fixture(scope='module')
def finished(tiny, saves, tmp_path_factory):
  workdir, save = tmp_path_factory.mktemp('offline'), Training.save

  def noted(self, items, **about):
    if 'ring' in items.get('all', {}):
      saves.append((items['all'], total(items['all'])))
    save(self, items, **about)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Training, 'save', noted)
    patch.setattr(Training, 'should_save', True)
    runner.run(tiny, 'all', workdir)
  return workdir


def test_the_job_writes_what_it_found(finished, tiny):
  result = json.loads((finished / 'results' / 'offline.json').read_text())
  (row,) = result['rows']
  assert (row['record'], row['method']) == ('half', 'bear')
  assert len(row['returns']) == 2 and len(row['curve']) == 2
  np.testing.assert_allclose(row['mean'], np.mean(row['returns']))
  assert all(-2000 < x < 0 for x in row['returns'])
  assert result['protocol']['record_steps'] == 64
  assert 'bear' in train.table(result) and 'came true' in train.table(result)
  record = records.load(finished / 'offline' / 'records' / 'half.npz')
  assert record.observations.shape == (64, 3) and abs(record.actions).max() <= 1


def test_what_is_saved_is_not_what_the_next_round_writes_to(finished, saves):
  """Checkpoints are written in the background, and on CPUs device_put makes no copy."""
  assert len(saves) > 1
  for items, sums in saves:
    jax.tree.map(np.testing.assert_array_equal, sums, total(items))


def test_a_stopped_job_ends_as_one_that_was_not(finished, tiny, tmp_path, monkeypatch):
  """Stopped after each step of each of its trainings."""
  stops = []
  monkeypatch.setattr(Training, 'should_save', property(lambda self: stop(self)))

  def stop(training):
    place = training._name, training.step
    training._stopping = place not in stops and not training.complete
    training.preemption._received = signal.SIGTERM * training._stopping
    stops.append(place)
    return True

  for _ in range(12):
    runner.run(tiny, 'all', tmp_path)
    if (tmp_path / 'results' / 'offline.json').exists():
      break
  assert {name for name, _ in stops} == {'behaviours', 'offline half_bear'} and len(set(stops)) == 4
  read = lambda folder: json.loads((folder / 'results' / 'offline.json').read_text())
  for name in ('rows', 'behaviours', 'behaviour_curve'):
    assert read(tmp_path)[name] == read(finished)[name]


def test_it_is_not_resumed_in_another_world(tmp_path, monkeypatch):
  """Behaviours, records and what learns from them each know of which world they are."""
  generator = LinearGenerator()
  monkeypatch.setattr('palm_jax.world._features', lambda *_: PIXELS)
  monkeypatch.setattr('palm_jax.world.config.load_generator', lambda path: generator)
  c = configs.get_config('smoke')
  c.offline.update(dict(methods=('bc',), behaviours=('random',), behaviour_steps=32, updates=20))
  c.offline.record_steps = 32
  folder, own = tmp_path / 'offline', dict(generator.variables)

  def again():
    (tmp_path / 'results' / 'offline.json').unlink(missing_ok=True)
    runner.run(c, 'offline', tmp_path)

  again()
  path = folder / 'records' / 'random.npz'
  content, record = path.read_bytes(), records.load(path)
  generator.variables['w'] = own['w'] + 1
  with pytest.raises(UserError, match='random.npz was made with another generator .digest .*back'):
    again()
  assert path.read_bytes() == content
  assert not (tmp_path / 'results' / 'offline.json').exists()
  path.unlink()
  with pytest.raises(UserError, match='behaviours was made with another generator'):
    again()
  assert not path.exists()
  generator.variables = own  # the behaviours go on
  records.save(path, records.take(record, 20))  # as of an older version, which does not say whose
  with pytest.raises(UserError, match='random_bc was made with another record'):
    again()


def test_what_older_versions_wrote_fits_any_world():
  now = dict(generator='a' * 64, encoder='b' * 64)
  origins.check('x', None, now)
  origins.check('x', dict(encoder='b' * 64), now)
  with pytest.raises(UserError, match='another generator .digest c.* and another encoder .* back'):
    origins.check('x', dict(generator='c' * 64, encoder='d' * 64), now)


def test_what_critics_promise_is_drawn_beside_what_came_true(tmp_path):
  pytest.importorskip('matplotlib')

  def row(record, method, q):
    curve = [dict(updates=u, q=q and [u * q, u * q + 1], discounted=[5.0, 6.0]) for u in (1, 2)]
    return dict(record=record, method=method, q=curve[-1]['q'], curve=curve)

  rows = [row('random', 'bc', None), row('random', 'sac', 1e5), row('random', 'bear', 3.0)]
  assert figure.draw([*rows, row('half', 'sac', 2.0)], tmp_path / 'values.png')
  with Image.open(tmp_path / 'values.png') as image:
    pixels = np.asarray(image.convert('RGB'))
  panels = pixels[: int(0.85 * len(pixels))]  # without the legend
  has = lambda half, colour: (half == colour).all(-1).any()
  colours = [[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in figures.COLOURS[:2]]
  halves = np.array_split(panels, 2, axis=1)
  assert [[has(half, c) for c in colours] for half in halves] == [[True, True], [True, False]]
  assert not figure.draw(rows[:1], tmp_path / 'none.png') and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
  'changes, words',
  [
    ({'offline.environment': 'Nothing-v9'}, "offline.environment='Nothing-v9' cannot be made"),
    ({'offline.environment': 'CartPole-v1'}, 'both must be boxes'),
    ({'offline.environment': 'Boundless-v0'}, r'actions Box\(-inf.* without bounds'),
    ({'offline.environment': 'Square-v0'}, r'actions of shape \(2, 2\): expected vectors'),
    ({'offline.behaviour_steps': 10**9}, 'offline.behaviour_steps=1000000000 take'),
    ({'offline.record_steps': 10**9}, 'offline.record_steps=1000000000 take'),
    ({'offline.methods': ('bcq',)}, "'bcq' is unknown"),
    ({'offline.behaviours': ('expert',)}, "'expert' is unknown"),
    ({'offline.rollout_length': 10}, 'rollout_length=10 is not a positive multiple'),
    ({'offline.datasets': ('no/such-v0',)}, "data set 'no/such-v0' is not there"),
    ({'sac.hidden': (65_536, 65_536)}, 'networks of sac.hidden.* take .* lower sac.hidden'),
    ({'offline.bear.hidden_actor': (65_536,) * 3}, 'lower offline.bear.hidden_actor'),
    ({'world.observations': 'pixels'}, "set 'features'"),
    ({'world.task': 'class'}, 'needs a head'),
  ],
)
def test_mistakes_are_named(changes, words, tmp_path):
  if 'datasets' in str(changes):
    pytest.importorskip('minari')
  c = configs.get_config('smoke')
  with c.unlocked():
    for name, value in changes.items():
      c.update_from_flattened_dict({name: value})
  if 'datasets' in str(changes):
    c.offline.environment = 'Pendulum-v1'
  with pytest.raises(UserError, match=words):
    runner.run(c, 'offline', tmp_path)
