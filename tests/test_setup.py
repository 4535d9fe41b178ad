"""What a pretraining is made of: the length of its schedules, the frames that its losses see, and
what reaches the agent."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from palm_jax import agent, augment, pairs, pretrain, rollout, setup, simsiam, train
from tests.test_rollout import alone, made
from tests.worlds import LinearGenerator, tiny_config

FRAMES = np.random.default_rng(0).integers(0, 256, (32, 8, 8, 1), dtype=np.uint8)
NEXT = np.random.default_rng(1).integers(0, 256, (32, 8, 8, 1), dtype=np.uint8)
ACTIONS = np.random.default_rng(2).integers(-127, 128, (32, 6)).astype(np.int8)
EPISODES = np.arange(32, dtype=np.int32) // 4


def test_the_learning_rate_ends_with_the_run():
  """(24 iterations - 2 of warm-up) * 2 updates."""
  made_of = setup.make_setup(tiny_config(), LinearGenerator(), 1)
  params = {name: {'w': jnp.ones(3)} for name in ('encoder', 'projector', 'predictor')}
  first = made_of.optimizer.init(params)

  def step(count):
    state = optax.tree.set(first, count=jnp.int32(count))
    return float(jnp.abs(made_of.optimizer.update(params, state, params)[0]['encoder']['w'][0]))

  assert step(44) < 1e-9 < step(43) < 0.01 * step(0)
  np.testing.assert_allclose(step(22), step(0) / 2, rtol=1e-4)
  assert made_of.target_rate(44) < 1e-9 < made_of.target_rate(43)


class Seen(Exception):
  """Ends an update where all that is asked for is there."""


def views_of(monkeypatch, **settings):
  """What the loss is given of a batch: (first view, second view, labels, related), and the key."""
  play, _ = made()
  config = play.config.copy_and_resolve_references()
  config.simsiam.update(settings)
  play = setup.make_setup(config, LinearGenerator(), 1)
  key = jax.random.key(4)
  batch = pairs.Pairs(FRAMES, NEXT, actions=ACTIONS, episodes=EPISODES)
  found = {}

  def learn(batch):
    def forward(modules, params, batch_stats, first, second, labels, related, **_):
      found['views'] = first, second, labels, related
      raise Seen

    monkeypatch.setattr(simsiam, 'forward', forward)
    ssl = dict(params={'w': jnp.zeros(1)}, batch_stats={}, opt_state=())
    try:
      pretrain.learn_representation(play, ssl, batch, key)
    except Seen:
      pass
    first, second, labels, related = found['views']
    return first, second, labels, jnp.int32(-1) if related is None else related

  return alone(learn, batch), key


@pytest.mark.parametrize('name', ['none', 'simsiam'])
def test_the_loss_sees_both_frames_each_under_keys_of_its_own(monkeypatch, name):
  (first, second, labels, related), key = views_of(monkeypatch, augment=name)
  np.testing.assert_array_equal(labels, EPISODES)
  assert related == -1
  shards = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(8))
  keys = jax.vmap(lambda key: jax.random.split(key, (4, 2)))(shards).reshape(32, 2)
  for i, (got, frames) in enumerate([(first, FRAMES), (second, NEXT)]):
    if name == 'none':
      np.testing.assert_array_equal(got, frames)
      continue
    np.testing.assert_allclose(got, augment.make_augment(name)(keys[:, i], frames), atol=1e-5)
    other = augment.make_augment(name)(keys[:, 1 - i], frames)
    assert np.abs(got - other).mean() > 0.05


def test_frames_of_one_episode_are_known_to_a_loss_that_masks_them(monkeypatch):
  (_, _, _, related), _ = views_of(monkeypatch, objective='simclr', mask_episode=True)
  np.testing.assert_array_equal(related, EPISODES)


@pytest.mark.parametrize('features', ['train', 'eval'])
def test_the_agent_learns_from_what_it_saw_did_and_saw_next(monkeypatch, features):
  play, world = made()
  config = play.config.copy_and_resolve_references()
  config.sac.update(dict(features=features, updates_per_batch=2))
  play = dataclasses.replace(play, config=config)
  numbers = [np.full((32, 3), i, np.float32) for i in range(4)]
  seen = simsiam.Aux(*numbers, batch_stats={}, metrics={})
  batch = pairs.Pairs(FRAMES, NEXT, actions=ACTIONS, episodes=EPISODES)
  spread = dict(constant_action=jnp.float32(0.1), action_var=jnp.float32(0.3))
  monkeypatch.setattr(
    agent, 'update', lambda state, t, noise, *_, **__: (state, dict(spread, t=t, noise=noise))
  )
  look = lambda play, params, stats, frames: frames.reshape(len(frames), -1)[:, :5].astype(float)
  monkeypatch.setattr(rollout, 'encode', look)
  ssl = dict(params={}, batch_stats={})
  learn = functools.partial(pretrain.learn_policy, play)
  nobody = agent.only_acting({})
  given = alone(lambda b, s: learn(world, ssl, nobody, b, s, jax.random.key(0))[1], batch, seen)
  t = given['t']
  if features == 'eval':
    np.testing.assert_array_equal(t.h, FRAMES.reshape(32, -1)[:, :5])
    np.testing.assert_array_equal(t.next_h, NEXT.reshape(32, -1)[:, :5])
  else:
    assert (t.h == 0).all() and (t.next_h == 1).all()
  assert (t.z == 2).all() and (t.next_z == 3).all()
  np.testing.assert_allclose(t.action, ACTIONS / 127, atol=1e-6)
  np.testing.assert_array_equal(t.episodes, EPISODES)
  noise = np.asarray(given['noise'])
  assert noise.shape == (2, 2, 32, 6) and len(np.unique(noise)) == noise.size
  # E z' = alpha E a, Var z' = alpha^2 Var a + (1 - alpha)^2: at alpha 0.5, beta 0.95.
  mean, var = 0.5 * 0.1, (0.25 * 0.3 + 0.25) * 0.05 / 1.95
  z = np.random.default_rng(0).normal(mean, np.sqrt(var), (4000, 6))
  z /= np.linalg.norm(z, axis=1, keepdims=True)
  np.testing.assert_allclose(given['cone'], np.linalg.norm(z.mean(0)), atol=0.03)


def test_a_passive_run_has_weights_and_batches_of_its_own():
  c = tiny_config()
  keys = {}
  for source in ('explored', 'random_action', 'passive_ordered', 'passive_random'):
    c.pairs.source = source
    keys[source] = jax.random.key_data(train.first_key(c)).tolist()
  assert keys['explored'] == keys['random_action'] == [0, 0]
  assert keys['passive_ordered'] == keys['passive_random'] != keys['explored']


def test_metrics_are_of_the_iterations_that_updated(tmp_path):
  numbers = dict(loss=np.array([0.0, 0.0, 4.0, 6.0]), updated=np.array([False, False, True, True]))
  assert train.mean_metrics(numbers, 0, tmp_path) == {'loss': 5.0}
  numbers['updated'][:] = False
  assert train.mean_metrics(numbers, 0, tmp_path) == {}
