import functools
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding
from ml_collections import ConfigDict

from configs import atari, cifar
from palm_jax.atari import collect, dqn, drq, finetune, play
from palm_jax.base import devices
from palm_jax.base.checkpoints import Checkpoints, load_item
from palm_jax.base.digests import file_digest
from palm_jax.base.errors import UserError
from palm_jax.base.metrics import read_jsonl
from palm_jax.base.training import Preemption
from palm_jax.data.collected import collected_digest, load_collected
from palm_jax.encoder import NatureCNN
from tests.catch import Catch

SHAPE = (36, 36, 4)
from tests.jobs import finish


class Same(Catch):
  """Every game of an environment has the same balls, whatever the seed: new games after a stop are
  those that would have come.

  A game takes 21 rows: two balls, and the last picture.
  """

  def __init__(self, game, num_envs, seed, before_step=lambda environment: None):
    super().__init__(game, num_envs, seed, size=SHAPE[0], balls=2)
    self._before_step, self.num_envs, self.rows = before_step, num_envs, -1

  def step(self, actions):
    self.rows += 1  # the first step is that of reset
    self._before_step(self)
    for e in np.flatnonzero(self._over):
      self._generators[e] = np.random.default_rng(e)
    return super().step(actions)


class Killed(Exception):
  pass


def killed_in(row):
  def before_step(environment):
    if environment.rows == row:
      raise Killed

  return functools.partial(Same, before_step=before_step)


def terminated_in(row, num_envs):
  def before_step(environment):
    if (environment.rows, environment.num_envs) == (row, num_envs):
      os.kill(os.getpid(), signal.SIGTERM)

  return functools.partial(Same, before_step=before_step)


def tiny_config():
  c = cifar.get_config()
  c.atari = ConfigDict(dict(game='Pong'))
  c.collect, c.finetune = collect.default_config(), finetune.default_config()
  c.collect.update(dict(frames=4 * 2 * 105, num_envs=2, max_bytes=50 * 36 * 36 * 4, log_steps=60))
  # A replay of 672 rows asks for a checkpoint every 42.
  c.collect.agent.update(
    dict(
      features=16,
      capacity=2 * 672,
      min_history=60,
      epsilon_decay=60,
      target_period=40,
      batch_size=4,
    )
  )
  c.finetune.update(dict(agent_steps=90, log_steps=30, eval_episodes=5, trunk='scratch'))
  c.finetune.agent.update(
    dict(features=16, min_history=40, epsilon_decay=30, capacity=672, batch_size=4)
  )
  return c


def trained_agent(workdir, job, agent_config):
  here = SingleDeviceSharding(jax.devices()[0])
  agent = jax.eval_shape(
    lambda: dqn.init(jax.random.key(0), SHAPE, Catch.num_actions, agent_config)
  )
  template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), agent)
  return load_item(workdir / job / 'checkpoints', 'agent', template=template)


@pytest.fixture(scope='module')
def mesh():
  return devices.make_mesh(1)


@pytest.fixture(scope='module')
def collected(tmp_path_factory, mesh):
  config, workdir = tiny_config(), tmp_path_factory.mktemp('collected')
  assert finish(collect.JOB, config, workdir, mesh=mesh, make_environment=Same)
  return config, workdir


def stacks_of(workdir):
  with np.load(workdir / 'collect' / 'stacks.npz') as file:
    return file['images'], file['labels']


def test_collecting_gives_stacks_a_curve_and_results(collected):
  config, workdir = collected
  results = json.loads((workdir / 'results' / 'collect.json').read_text())
  assert (results['frames'], results['agent_steps'], results['games'], results['resumes']) == (
    840,
    210,
    10,
    0,
  )
  assert results['updates'] == (105 - 30) // 2 + 1  # one in two rows of two steps, from row 30 on
  curve = read_jsonl(workdir / 'collect' / 'metrics.jsonl')
  assert [row['step'] for row in curve] == [
    60,
    84,
    120,
    168,
    180,
    210,
  ]  # every 60 steps, and at checkpoints
  assert all(row['frames'] == 4 * row['step'] for row in curve) and {'score', 'loss', 'q'} < set(
    curve[-1]
  )
  images, labels = stacks_of(workdir)
  assert (
    images.shape == (50, *SHAPE)
    and images.dtype == np.uint8
    and labels.shape == (50,)
    and not labels.any()
  )
  assert results['stacks']['images'] == [50, *SHAPE]
  assert collected_digest(workdir) == file_digest(workdir / 'collect' / 'stacks.npz')
  assert collected_digest(workdir / 'none') is None
  kept = {
    path.name for path in (workdir / 'collect').iterdir() if not path.name.startswith('events')
  }
  assert kept == {'checkpoints', 'metrics.jsonl', 'stacks.npz'}
  for newest, expected in (
    (False, images),
    (True, images[..., 3:]),
  ):  # in another order, a part for testing
    data = load_collected(workdir, newest)
    given = np.concatenate([data.train.images, data.test.images])
    assert sorted(picture.tobytes() for picture in given) == sorted(
      picture.tobytes() for picture in expected
    )
  # A picture of Catch shows the paddle and, not above it, the ball; a stack has empty places before
  # a game's first only.
  lit = (images.reshape(50, -1, 4) > 0).sum(1)
  assert (
    set(np.unique(lit)) == {0, 15, 30}
    and (lit[:, 3] > 0).all()
    and (np.diff(np.sign(lit)) >= 0).all()
  )


def test_a_killed_collection_ends_as_if_it_had_not_been(collected, tmp_path, mesh):
  config, workdir = collected
  with pytest.raises(Killed):
    finish(
      collect.JOB, config, tmp_path, mesh=mesh, make_environment=killed_in(50)
    )  # eight rows in the replay beyond the checkpoint
  assert finish(collect.JOB, config, tmp_path, mesh=mesh, make_environment=Same)
  once, again = (
    trained_agent(folder, 'collect', config.collect.agent) for folder in (workdir, tmp_path)
  )
  assert once[0] == again[0] == 105
  jax.tree.map(np.testing.assert_array_equal, again[1], once[1])
  np.testing.assert_array_equal(stacks_of(tmp_path)[0], stacks_of(workdir)[0])
  curves = [read_jsonl(folder / 'collect' / 'metrics.jsonl') for folder in (workdir, tmp_path)]
  assert curves[0] == curves[1]
  result = tmp_path / 'results' / 'collect.json'
  assert json.loads(result.read_text())['resumes'] == 1
  result.unlink()  # asks for the job again, whose play is complete
  assert finish(collect.JOB, config, tmp_path, mesh=mesh, make_environment=Same) and result.exists()
  np.testing.assert_array_equal(stacks_of(tmp_path)[0], stacks_of(workdir)[0])


def test_finetuning_a_frozen_trunk_through_two_stops(tmp_path, mesh):
  variables = jax.jit(
    lambda: NatureCNN(16).init(jax.random.key(5), jnp.zeros((1, *SHAPE)), train=False)
  )()
  with Checkpoints(tmp_path / 'pretrain' / 'checkpoints') as checkpoints:
    checkpoints.save(3, {'encoder': variables}, {})
  (tmp_path / 'config.json').write_text(json.dumps(dict(encoder=dict(name='nature'))))
  config = tiny_config()
  config.finetune.trunk, config.finetune.agent.trunk_scale, config.encoder.name = (
    'own',
    0.0,
    'nature',
  )
  assert (
    finish(finetune.JOB, config, tmp_path, mesh=mesh, make_environment=terminated_in(50, 1)) is None
  )
  step, stopped = trained_agent(tmp_path, 'finetune', config.finetune.agent)
  assert step == 50 and stopped.updates == 10
  assert (
    finish(finetune.JOB, config, tmp_path, mesh=mesh, make_environment=terminated_in(10, 5)) is None
  )  # in the evaluation
  assert not (tmp_path / 'results').exists()
  assert finish(finetune.JOB, config, tmp_path, mesh=mesh, make_environment=Same)
  step, agent = trained_agent(tmp_path, 'finetune', config.finetune.agent)
  assert step == 90 and agent.updates == 50
  for name, leaves in drq.load_trunk(tmp_path)[0].items():
    jax.tree.map(np.testing.assert_array_equal, agent.params['encoder'][name], leaves)
  assert np.any(
    agent.params['encoder']['dense']['kernel'] != stopped.params['encoder']['dense']['kernel']
  )
  results = json.loads((tmp_path / 'results' / 'finetune.json').read_text())
  assert results['variant'] == 'pretrained' and results['protocol']['trunk']['checkpoint_step'] == 3
  assert (results['resumes'], results['updates'], results['agent_steps'], results['frames']) == (
    1,
    50,
    90,
    360,
  )
  assert len(results['scores']) == results['episodes'] == 5 and set(results['scores']) <= {-2, 0, 2}
  assert results['score'] == np.mean(results['scores'])
  assert not (tmp_path / 'finetune' / 'replay.dat').exists()


def test_finetuning_is_not_resumed_from_another_trunk(tmp_path, mesh):
  config = tiny_config()
  c, complete = config.finetune, 90
  agent = jax.jit(lambda: dqn.init(jax.random.key(0), SHAPE, Catch.num_actions, c.agent))()
  origin = lambda name, step: dict(workdir=f'/runs/{name}', checkpoint_step=step, sha256=name * 64)
  counters = dict(updates=50, games=4, recent=[], resumes=0, scalars={}, sampled=0)
  make_games = functools.partial(Same, 'Pong')

  def resumed(before, now):
    """Origin of what goes on where a checkpoint says `before`."""
    folder = tmp_path / str(len([*tmp_path.iterdir()]))
    with Checkpoints(folder / 'checkpoints') as checkpoints:
      checkpoints.save(complete, {'agent': agent}, counters | before)
    return play.play('finetune', c, complete, make_games, 0, folder, mesh, origin=now).origin

  assert resumed(dict(origin=origin('a', 3)), origin('a', 3)) == origin('a', 3)
  moved = origin('a', 3) | dict(workdir='/runs/b')
  assert resumed(dict(origin=origin('a', 3)), moved) == origin('a', 3)
  assert resumed(dict(origin=None), None) is None
  for before, now, words in (
    (origin('a', 3), origin('b', 4), r'/runs/a, step 3 \(digest a{12}\), and .* /runs/b, step 4'),
    (None, origin('b', 4), r'fresh convolutions, and the trunk now is /runs/b, step 4'),
    (origin('a', 3), None, r'/runs/a, step 3 \(.*\), and the trunk now is fresh convolutions'),
  ):
    with pytest.raises(UserError, match=f'{words}.*: delete .*, or choose another --workdir'):
      resumed(dict(origin=before), now)


def test_from_scratch_all_learn_at_one_rate():
  c = tiny_config().finetune
  c.agent.update(dict(trunk_scale=0.0, hidden_scale=0.3, lr=2e-4))
  rates = lambda c: [c.agent[name] for name in ('trunk_scale', 'hidden_scale', 'lr')]
  assert rates(finetune.settle(c)) == [1.0, 1.0, 2e-4]
  c.trunk = 'own'
  assert rates(finetune.settle(c)) == rates(c) == [0.0, 0.3, 2e-4]


class Generous(Catch):
  """Environment 0 is cut off before its first ball falls, and begins its later games with a hundred
  points each."""

  def __init__(self, num_envs, seed):
    super().__init__(
      '', num_envs, seed, size=SHAPE[0], balls=2, max_steps=np.array([7] + [50] * (num_envs - 1))
    )
    self.begun = 0

  def step(self, actions):
    given = super().step(actions)
    self.begun += int(given.first[0])
    return given._replace(
      score=given.score + 100 * (self.begun - 1) * (np.arange(len(given.score)) == 0)
    )


def test_the_first_game_of_each_environment_counts():
  c = finetune.settle(tiny_config().finetune)
  agent = jax.jit(lambda: dqn.init(jax.random.key(0), SHAPE, Catch.num_actions, c.agent))()
  with Preemption() as preemption:
    scores = finetune.evaluate(agent.params, c, Generous, 0, preemption)
  assert scores[0] == 0 and len(scores) == 5 and set(scores[1:]) <= {-2, 0, 2}


@pytest.mark.slow  # 3.5 minutes
def test_catch_is_learned(tmp_path, mesh):
  """From the -0.7 of random play to mostly caught balls, with the settings of Atari-100k but for
  the schedule of epsilon."""
  config = tiny_config()
  config.finetune = finetune.default_config()
  config.finetune.update(dict(trunk='scratch', agent_steps=3000, log_steps=250, eval_episodes=50))
  config.finetune.agent.update(dict(min_history=400, epsilon_decay=400))
  assert finish(finetune.JOB, config, tmp_path, mesh=mesh, make_environment=Catch)
  results = json.loads((tmp_path / 'results' / 'finetune.json').read_text())
  curve = [row['score'] for row in read_jsonl(tmp_path / 'finetune' / 'metrics.jsonl')]
  assert results['variant'] == 'scratch' and curve[0] < -0.3 and results['score'] > 0.5


@pytest.mark.parametrize(
  'job, changes, message',
  [
    ('collect', dict(atari=dict(game='Pongg')), "unknown Atari game 'Pongg'.*Pong"),
    ('collect', dict(collect=dict(frames=0)), 'collect.frames=0 is not positive'),
    (
      'collect',
      dict(collect=dict(max_bytes=100)),
      'collect.max_bytes=100 holds no stack of 5184 bytes',
    ),
    (
      'collect',
      dict(collect=dict(num_envs=6)),
      'collect.num_envs=6 and collect.agent.learn_period=4.*set num_envs to 8',
    ),
    (
      'collect',
      dict(collect=dict(agent=dict(min_history=3))),
      'min_history=3 holds no window of n_step=1 in each of 2',
    ),
    (
      'collect',
      dict(collect=dict(frames=240)),
      'collect.agent.min_history=60, but the run ends after 60 agent steps',
    ),
    (
      'finetune',
      dict(finetune=dict(agent_steps=40)),
      'finetune.agent.min_history=40, but the run ends after 40 agent steps',
    ),
    ('collect', dict(collect=dict(agent=dict(capacity=70))), 'capacity=70 has 35 rows'),
    ('finetune', dict(finetune=dict(eval_episodes=0)), 'finetune.eval_episodes=0 is not positive'),
    (
      'finetune',
      dict(finetune=dict(trunk='nowhere')),
      "finetune.trunk='nowhere' has no config.json",
    ),
    (
      'finetune',
      dict(finetune=dict(trunk='own')),
      "encoder.name='resnet18': only convolutions of 'nature' fit",
    ),
    (
      'finetune',
      dict(finetune=dict(trunk='own'), encoder=dict(name='nature')),
      'config.json is missing',
    ),
    ('finetune', dict(finetune=dict(agent=dict(eval_epsilon=2.0))), 'eval_epsilon=2.0'),
    ('scratch', dict(jobs=('finetune', 'scratch')), 'finetune the same as the job scratch'),
  ],
)
def test_settings_that_cannot_work_are_named(tmp_path, mesh, job, changes, message):
  config = tiny_config()
  config.update(changes)
  with pytest.raises(UserError, match=message) as caught:
    job = dict(collect=collect.JOB, finetune=finetune.JOB, scratch=finetune.SCRATCH)[job]
    finish(job, config, tmp_path, mesh=mesh, make_environment=Same)
  assert '\n' not in str(caught.value)


def test_a_trunk_of_another_kind_is_refused_before_anything_is_made(tmp_path):
  config = tiny_config()
  encoder = dict(name='resnet18')
  (tmp_path / 'other').mkdir()
  (tmp_path / 'other' / 'config.json').write_text(json.dumps(dict(encoder=encoder)))
  variables = dict(params=dict(conv1=dict(kernel=np.zeros((8, 8, 3, 32), np.float32))))
  with Checkpoints(tmp_path / 'other' / 'pretrain' / 'checkpoints') as checkpoints:
    checkpoints.save(1, {'encoder': variables}, {})
  config.finetune.trunk = str(tmp_path / 'other')
  with pytest.raises(UserError, match="is 'resnet18', expected 'nature'"):
    finetune.check(config, 1)
  encoder['name'] = 'nature'
  (tmp_path / 'other' / 'config.json').write_text(json.dumps(dict(encoder=encoder)))
  with pytest.raises(UserError, match=r'takes pictures of 3 channel\(s\), expected 4'):
    finetune.check(config, 1)


@pytest.mark.parametrize(
  'words',
  [
    'laptop,eps',
    'eps,laptop',
    'rmsprop,laptop',
    'laptop,rmsprop',
    'sgi,laptop',
    'laptop,sgi,single',
    'laptop,sgi,eps',
    'eps,laptop,sgi',
  ],
)
def test_words_of_the_config_in_any_order(words):
  """The laptop's sizes hold whatever else is chosen, and what is chosen holds at them."""
  c, small = atari.get_config(f'Assault,{words}'), atari.get_config('Assault,laptop')
  for name in ('min_history', 'epsilon_decay', 'capacity', 'target_period'):
    assert c.collect.agent[name] == small.collect.agent[name]
  assert (
    c.finetune.agent.epsilon_decay == small.finetune.agent.epsilon_decay < c.finetune.agent_steps
  )
  assert ('eps' in words) == (c.finetune.agent.eval_epsilon == 0.001)
  assert ('sgi' in words) == (c.finetune.agent.trunk_scale == 0.01)
  assert ('rmsprop' in words) == (c.collect.agent.optimizer == 'rmsprop')
  collect.check(c, 1)
  finetune.check(c, 1)
