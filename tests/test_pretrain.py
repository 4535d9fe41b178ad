"""The run is the same on 1, 2 and 8 devices, in place, and compiled once."""

import contextlib
import pathlib
import re

import jax
import jax.monitoring
import numpy as np
import pytest

from palm_jax import pretrain, train, worlds
from palm_jax.base import devices
from palm_jax.base.errors import UserError
from palm_jax.data.arrays import Data, Split
from palm_jax.job import Run
from tests.worlds import LinearGenerator, tiny_config

pytestmark = pytest.mark.usefixtures('shallow')

EVERYTHING = {
  'environment': dict(start='stationary'),
  'pairs': dict(group=2, window=3),
  # At 0.03 an update makes the last bit's rounding some ten times larger.
  'simsiam': dict(objective='simclr', mask_episode=True, lr=1e-3),
  'reward': dict(space='unit', memory=64),
  'sac': dict(
    neutral_start=True,
    standardise=True,
    features='eval',
    updates_per_batch=2,
    skill_dim=3,
    policies=3,
    policy_every=4,
  ),
}
EPISODES = {'pairs': dict(group=2), 'simsiam': dict(objective='supcon')}
BYOL = {'simsiam': dict(objective='byol', lr=0.3), 'encoder': dict(name='vit_tiny')}
KINDS = [{'reward': dict(kind=kind, hidden=8)} for kind in ('rnd', 'icm', 'disagreement')]


def start(num_devices, dtype='float32', changes=()):
  config = tiny_config()
  config.pretrain.dtype = dtype
  for section, values in dict(changes).items():
    config[section].update(values)
  mesh, generator = devices.make_mesh(num_devices), LinearGenerator()
  program = pretrain.make_program(config, generator, mesh)
  world = worlds.make_world(config, generator, mesh)
  return program, program.init(jax.random.key(3), world), world


@contextlib.contextmanager
def compilations():
  """A list that grows by one with each program that XLA compiles inside the block."""
  count = []
  listener = lambda event, duration, **_: (
    count.append(duration) if event.endswith('backend_compile_duration') else None
  )
  jax.monitoring.register_event_duration_secs_listener(listener)
  try:
    yield count
  finally:
    jax.monitoring.unregister_event_duration_listener(listener)


@pytest.mark.parametrize(
  'counts, changes',
  [
    ((1, 8), {}),
    pytest.param((1, 2), {}, marks=pytest.mark.slow),
    pytest.param((1, 8), BYOL, marks=pytest.mark.slow),
    *(
      pytest.param((1, 2, 8), changes, marks=pytest.mark.slow)
      for changes in (EVERYTHING, EPISODES, *KINDS)
    ),
  ],
)
def test_any_number_of_devices_computes_the_same_in_float64(counts, changes):
  """Gradient norms are among the metrics: averaging gradients that are already summed is seen."""
  results = []
  with jax.enable_x64(True):
    for num_devices in counts:
      program, state, world = start(num_devices, 'float64', changes)
      for i in range(program.setup.num_calls):
        with compilations() as count:
          state, (metrics, _) = program.call(state, world)
          jax.block_until_ready(
            state
          )  # one collective program in flight at a time: the fake devices share two cores
        assert len(count) == (i == 0)
      results.append(jax.device_get((state.replace(key=jax.random.key_data(state.key)), metrics)))
  (want, want_metrics), *others = results
  assert (
    int(want.iteration) == 24 and int(want.ring.total) == 96 > want.ring.frames.shape[0]
  )  # the ring wrapped
  assert {x.dtype for x in jax.tree.leaves(want.ssl['params'])} == {np.dtype('float64')}
  for state, metrics in others:
    np.testing.assert_array_equal(state.ring.frames, want.ring.frames)
    np.testing.assert_array_equal(state.frames, want.frames)
    parts = lambda s: jax.tree.leaves((s.ssl, s.agent, s.env))
    for a, b in zip(parts(state), parts(want), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)
    for name in metrics:
      np.testing.assert_allclose(
        metrics[name], want_metrics[name], rtol=1e-7, atol=1e-9, err_msg=name
      )


def test_a_transformer_learns_by_byol():
  """Without batch statistics in the encoder; the target, a part of the state, follows the newest
  parameters."""
  changes = BYOL | {'pretrain': dict(warmup_steps=64, iterations_per_call=2, batch_size=16)}
  changes['pretrain']['updates_per_iteration'] = 1
  changes['pairs'] = dict(source='jahanian_gaussian')  # nobody plays: compiled in half the time
  program, state, world = start(1, changes=changes)
  assert program.setup.warmup_iterations == 1
  before = jax.device_get(state.ssl)
  state, (metrics, _) = program.call(state, world)
  after, metrics = jax.device_get((state.ssl, metrics))
  assert after['batch_stats']['encoder'] == {} and set(after['target']) == {'encoder', 'projector'}
  assert all(np.isfinite(x).all() for x in metrics.values()) and 0 < metrics['loss'][1] < 8
  for name in after['target']:
    jax.tree.map(
      lambda t, p, new: np.testing.assert_allclose(new - t, 0.004 * (p - t), rtol=0.02, atol=1e-7),
      before['target'][name],
      after['params'][name],
      after['target'][name],
    )
  moved = jax.tree.map(lambda a, b: np.abs(a - b).sum(), after['target'], before['target'])
  assert sum(jax.tree.leaves(moved)) > 0


@pytest.fixture(scope='module')
def eight():
  return start(8)


def test_replay_is_updated_in_place(eight):
  """Read off the compiled program: each leaf of the ring is aliased to its output, and no copy has
  the ring's shape."""
  program, state, world = eight
  text = program.call.lower(state, world).compile().as_text()
  aliased = {int(i) for i in re.findall(r'\{\d*\}: \((\d+), \{\}', text[: text.index('\n')])}
  leaves = jax.tree_util.tree_leaves_with_path(state)
  ring = [i for i, (path, _) in enumerate(leaves) if path[0].name == 'ring']
  assert len(ring) == 3 and set(ring) <= aliased
  rows, envs = state.ring.frames.shape[:2]
  for shape in (f'u8[{rows},{envs // 8},64]', f'f32[{rows},{envs // 8},6]'):
    assert shape in text
    copies = [
      line for line in text.splitlines() if re.search(rf'= {re.escape(shape)}\S* copy\(', line)
    ]
    assert not copies, copies


def test_world_parameters_do_not_recompile(eight):
  program, state, world = eight
  state = jax.tree.map(lambda x: x.copy(), state)
  state, _ = program.call(state, world)
  for alpha in (0.2, 0.9):
    dynamics = world.dynamics.replace(
      alpha=jax.device_put(np.float32(alpha), world.dynamics.alpha.sharding)
    )
    with compilations() as count:
      state, _ = jax.block_until_ready(program.call(state, world._replace(dynamics=dynamics)))
    assert not count


@pytest.mark.parametrize(
  'settings, words',
  [
    ({'simsiam.warmup_updates': 10**6}, 'simsiam.warmup_updates=1000000 of [0-9]+ updates'),
    ({'pretrain.env_steps': 512, 'pretrain.warmup_steps': 511}, 'by an iteration: nothing would'),
    ({'environment.start': 'stationary', 'environment.beta': 1.0}, 'the latent would stay at 0'),
    ({'reward.kind': 'icm', 'reward.on': 'current'}, "reward.on='current' with reward.kind='icm'"),
    ({'reward.k': 64}, 'reward.k=64'),
  ],
)
def test_what_cannot_work_is_told_before_any_job(settings, words):
  config = tiny_config()
  pretrain.check(config, 1)
  config.update_from_flattened_dict(settings)
  with pytest.raises(UserError, match=words):
    pretrain.check(config, 1)


def test_a_run_without_an_agent_is_not_judged_by_its_reward():
  config = tiny_config()
  config.pairs.source = 'two_views'
  config.simsiam.augment = 'shift_flip'
  config.reward.k = config.pretrain.batch_size
  pretrain.check(config, 1)


def test_pictures_that_cannot_be_seen_are_told_before_the_generator_trains():
  config = tiny_config()
  config.environment.crop = 5
  pictures = Split(np.zeros((4, 8, 8, 1), np.uint8), np.zeros(4, np.int64))
  data = Data(pictures, pictures, ('a',), 'made up')
  run = Run(config, pathlib.Path('nowhere'), devices.make_mesh(1), data, False)
  with pytest.raises(UserError, match='environment.crop=5 of pictures of 8x8, which the generator'):
    train.check_data(run)
  config.generator.pad = 2
  train.check_data(run)
  config.encoder.update(dict(name='vit_tiny', patch=4))
  with pytest.raises(UserError, match='encoder.patch=4 does not divide pictures of 2x2: set it to'):
    train.check_data(run)
