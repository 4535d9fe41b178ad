"""Monitors see a collapse."""

import dataclasses
import types

import jax
import numpy as np
import pytest

from palm_jax import environment, monitors, rollout, simsiam
from tests.test_rollout import made


def test_effective_rank_sees_what_std_does_not():
  rng = np.random.default_rng(0)
  noise, directions = rng.normal(size=(600, 64)), rng.normal(size=(64, 100))

  def z_std_ratio(x):
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    return unit.std(0).mean() * 10

  for dtype in (np.float64, np.float32):
    rank_one = (noise[:, :1] * directions[:1]).astype(dtype)
    erank, top = monitors.effective_rank(rank_one)
    assert erank == pytest.approx(1, abs=1e-6) and top == pytest.approx(1, abs=1e-6)
  assert 0.7 < z_std_ratio(rank_one) < 0.9  # nearly healthy, though one number describes a sample

  # Orthonormal directions with equal weights: as many as there are; by numpy's SVD for anything
  # else.
  erank, top = monitors.effective_rank(np.eye(8)[rng.permutation(np.repeat(np.arange(8), 50))])
  assert erank == pytest.approx(7, rel=1e-6) and top == pytest.approx(
    1 / 7, rel=1e-6
  )  # centring takes one away
  for x in (noise @ directions, noise[:40] @ directions):
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    singular = np.linalg.svd(unit - unit.mean(0), compute_uv=False)
    share = singular[singular > 1e-6] / singular.sum()
    erank, top = monitors.effective_rank(x)
    assert erank == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-6)
    assert top == pytest.approx(singular[0] ** 2 / (singular**2).sum(), rel=1e-6)
  assert monitors.effective_rank(np.ones((10, 4), np.float32)) == (1, 1)


def test_troubles_are_told():
  healthy = dict(z_std_ratio=0.9, h_effective_rank=40.0, cone=0.2)
  assert not monitors.troubles(healthy) and not monitors.troubles({})
  for changes, words in (
    (dict(z_std_ratio=0.01), ('z_std_ratio 0.010', 'simsiam.lr')),
    (dict(h_effective_rank=1.2), ('h_effective_rank 1.2', 'simsiam.lr')),
    (dict(cone=0.9), ('length 0.90', 'sac.skill_dim')),
  ):
    (line,) = monitors.troubles(healthy | changes).values()
    assert all(word in line for word in words) and '\n' not in line


def test_ranks_are_of_what_the_encoder_makes_of_the_worlds_pictures():
  play, world = made()
  seen = lambda frames: frames.reshape(len(frames), -1)[:, :5].astype(np.float32)
  encoder = types.SimpleNamespace(apply=lambda _, frames, train: seen(frames))
  projector = types.SimpleNamespace(apply=lambda _, h, train: 2 * h[:, :3])
  play = dataclasses.replace(play, modules=simsiam.Modules(encoder, projector, None))
  parts = dict(encoder={}, projector={})
  key = jax.random.key(2)
  h, z = monitors.representations(
    play, 24, dict(params=parts, batch_stats=parts), world, key
  )  # 8 at a time
  env, _ = monitors.begin(play, world, key, 24)
  expected = seen(np.asarray(rollout.render(play, world, env.z, env.label)))
  np.testing.assert_array_equal(h, expected)
  np.testing.assert_array_equal(z, 2 * expected[:, :3])
  found = monitors.ranks(lambda *_: (h, z), None, None, None)
  assert found['h_effective_rank'] == monitors.effective_rank(expected)[0]
  assert found['z_top_variance'] == monitors.effective_rank(expected[:, :3])[1]


@pytest.mark.parametrize(
  'side, count', [(8, 128), (64, 128), (128, 32), (500, 2), (512, 2), (4096, 1)]
)
def test_large_pictures_are_fewer_at_once(side, count):
  assert monitors._at_once((side, side, 3)) == count


def test_a_film_begins_with_what_is_seen_first(monkeypatch):
  play, world = made()
  actions = jax.random.uniform(jax.random.key(9), (4, 6), minval=-1, maxval=1)
  monkeypatch.setattr(rollout, 'act', lambda *_: actions)
  key = jax.random.key(2)
  frames, labels = monitors.play_episodes(play, 4, 3, {}, (), world, key)
  env, ids = monitors.begin(play, world, key, 4)
  np.testing.assert_array_equal(labels, [0, 1, 2, 0])
  env = env.replace(label=labels)
  for t in range(3):
    np.testing.assert_array_equal(frames[:, t], rollout.render(play, world, env.z, labels))
    _, key_env = jax.random.split(jax.random.fold_in(key, t + 1))
    env = environment.step(env, actions, key_env, ids, world.dynamics, 9, 3)
