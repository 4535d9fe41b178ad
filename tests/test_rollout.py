"""Who acts, what is drawn, and which frames belong to one episode, on a device of its own."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from palm_jax import agent, environment, pairs, pretrain, replay, rollout, setup, worlds
from palm_jax.base import devices
from tests.worlds import LinearGenerator, tiny_config

GENERATOR = LinearGenerator()
IDS = np.arange(16)


def made(**environment):
  """(Setup on one device, World) of the tiny config; nothing is compiled."""
  config = tiny_config()
  config.environment.update(environment)
  return setup.make_setup(config, GENERATOR, 1), worlds.host_world(config, GENERATOR)


def alone(f, *args):
  """f on a mesh of one device, where the axis 'data' has a name."""
  mesh = devices.make_mesh(1)
  return jax.jit(jax.shard_map(f, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False))(*args)


def numbers_of(env, row, length=7, num_envs=16):
  """The episode of a frame, counted from the first frame on."""
  number, step = 0, env * length // num_envs
  for _ in range(row):
    step += 1
    if step % length == 0:
      number += 1
  return number * num_envs + env


def test_an_episode_has_a_number_of_its_own():
  play, _ = made()
  for row in range(30):
    found = rollout.episode_numbers(play, IDS, row)
    np.testing.assert_array_equal(found, [numbers_of(env, row) for env in IDS])


@pytest.mark.parametrize('warm', [False, True])
def test_the_policy_acts_after_the_warm_up(monkeypatch, warm):
  """Random actions before it; the policy is told frames and episodes."""
  play, world = made()

  def act(play, ssl, agent, frames, keys, episodes):
    seen = frames.reshape(len(frames), -1).mean(1)
    drawn = jnp.full(16, jax.random.uniform(keys[0]))
    return jnp.stack([episodes / 1000, seen / 1000, *[drawn] * 4], axis=1)

  monkeypatch.setattr(rollout, 'act', act)
  key, first = jax.random.key(5), 3 * 4
  blank = replay.create(12, 16, (8, 8, 1), 6)
  env = environment.reset(
    jax.random.key(1), IDS, play.first_steps(IDS), 6, 3, world.dynamics, jnp.float32
  )
  state = pretrain.State(
    iteration=jnp.int32(3),
    key=key,
    env=env,
    frames=rollout.look(play, world, env),
    ring=blank.replace(total=jnp.int32(first)),
    ssl={},
    agent=agent.only_acting({}),
  )
  collect = functools.partial(rollout.collect, play)
  after, _ = alone(lambda s, w: collect(s, w, key, jnp.bool_(warm)), state, world)
  assert after.ring.total == first + 4
  np.testing.assert_array_equal(after.ring.frames[0], np.reshape(state.frames, (16, 64)))
  for t in range(4):
    key_policy, _ = jax.random.split(jax.random.fold_in(key, t))
    keys = environment.env_keys(key_policy, IDS)
    if warm:
      expected = environment.random_actions(keys, 6, jnp.float32)
      np.testing.assert_array_equal(after.ring.actions[t], expected)
      continue
    actions = np.asarray(after.ring.actions[t], np.float64)
    numbers = [numbers_of(env, first + t) for env in IDS]
    np.testing.assert_allclose(actions[:, 0], np.array(numbers) / 1000, rtol=1e-6)
    np.testing.assert_allclose(
      actions[:, 1], np.asarray(after.ring.frames[t]).mean(-1) / 1000, rtol=1e-5
    )
    np.testing.assert_allclose(actions[:, 2], jax.random.uniform(keys[0]), rtol=1e-6)


@pytest.mark.parametrize('given, psi', [(None, 0.5), (0.9, 0.9)])
def test_pictures_are_truncated_as_the_world_says(given, psi):
  play, world = made(truncation_psi=0.5)
  z, label = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32), np.arange(4) % 3
  found = rollout.render(play, world, z, label, given)
  w, offset = (np.asarray(world.variables[name], np.float64) for name in ('w', 'offset'))
  values = np.clip(np.tanh(psi * z @ w + offset[label]) * 127.5 + 128, 0, 255)
  assert np.abs(np.reshape(found, (4, 64)) - np.floor(values)).max() <= 1
  assert np.mean(np.reshape(found, (4, 64)) == np.floor(values)) > 0.99


@pytest.mark.parametrize('group, window', [(1, 0), (2, 0), (4, 3)])
def test_pairs_of_the_ring_know_their_episode(group, window):
  """Frames spell row and environment; the ring has wrapped."""
  play, world = made()
  config = play.config.copy_and_resolve_references()
  config.pairs.update(dict(group=group, window=window))
  play = dataclasses.replace(play, config=config)
  ring, total = replay.create(12, 16, (8, 8, 1), 6), 28
  rows = np.arange(total - 12, total)
  frames = np.zeros((12, 16, 64), np.uint8)
  frames[rows % 12, :, 0], frames[..., 1] = rows[:, None], IDS
  actions = np.zeros((12, 16, 6), np.float32)
  actions[rows % 12] = rows[:, None, None] / 100
  ring = ring.replace(frames=frames, actions=actions, total=jnp.int32(total))
  keys = jax.random.split(jax.random.key(2), 8)
  found = alone(lambda ring: pairs.from_ring(play, ring, world, keys, 16), ring)
  spelled, partner = (
    np.asarray(x).reshape(128, 64).astype(int) for x in (found.frames, found.next_frames)
  )
  np.testing.assert_array_equal(partner[:, :2], spelled[:, :2] + [1, 0])
  np.testing.assert_allclose(found.actions[:, 0], spelled[:, 0] / 100, atol=1e-6)
  numbers = [numbers_of(env, row) for row, env in spelled[:, :2]]
  np.testing.assert_array_equal(found.episodes, numbers)
  np.testing.assert_array_equal(
    [numbers_of(env, row) for row, env in partner[:, :2]], numbers
  )  # no pair across an end
  of_groups = np.asarray(found.episodes).reshape(-1, group)
  assert (of_groups == of_groups[:, :1]).all()
  if window:
    place = spelled[:, 0].reshape(-1, group)
    assert (np.ptp(place, axis=1) < window).all()
  assert len(set(numbers)) > 8
