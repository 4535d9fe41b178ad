"""The ring against a plain list of everything that was ever added."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from palm_jax import replay

ROWS, ENVS, BLOCK, LENGTH, GROUPS, BATCH = 12, 4, 3, 5, 2, 256
FIRST = jnp.array([0, 1, 2, 4])


def block(number):
  """Frames that spell their row and environment; actions the same as floats."""
  row = np.arange(number * BLOCK, (number + 1) * BLOCK)
  frames = np.zeros((BLOCK, ENVS, 2, 2, 1), np.uint8)
  frames[:, :, 0, 0, 0], frames[:, :, 1, 1, 0] = row[:, None], np.arange(ENVS)
  actions = np.stack(
    [np.broadcast_to(row[:, None], (BLOCK, ENVS)), np.broadcast_to(np.arange(ENVS), (BLOCK, ENVS))],
    -1,
  )
  return jnp.asarray(frames), jnp.asarray(actions, jnp.float32)


add = jax.jit(replay.add, donate_argnums=0)


@jax.jit
def sample(ring, key):
  keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(GROUPS))
  return replay.sample(ring, keys, BATCH, FIRST, LENGTH, (2, 2, 1))[:3]


def filled(blocks):
  ring = replay.create(ROWS, ENVS, (2, 2, 1), 2)
  for i in range(blocks):
    ring = add(ring, *block(i))
  return ring


@pytest.mark.parametrize('blocks', [1, 2, 4, 5, 11, 30])
def test_pairs_are_consecutive_inside_an_episode_and_uniform(blocks):
  total, ring = blocks * BLOCK, filled(blocks)
  rows, envs = [], []
  for seed in range(8):
    s, a, s_next = jax.tree.map(np.asarray, sample(ring, jax.random.key(seed)))
    row, env = s[:, 0, 0, 0], s[:, 1, 1, 0]
    np.testing.assert_array_equal(s_next[:, 0, 0, 0], row + 1)
    np.testing.assert_array_equal(s_next[:, 1, 1, 0], env)
    np.testing.assert_array_equal(a, np.stack([row, env], -1))
    assert set(env[:BATCH]) <= {0, 1} and set(env[BATCH:]) <= {
      2,
      3,
    }  # groups sample their own environments
    rows.append(row), envs.append(env)
  row, env = np.concatenate(rows), np.concatenate(envs)
  for e in range(ENVS):
    # Everything a list of the last ROWS rows would offer: has a successor, and both lie in one
    # episode.
    valid = [
      t
      for t in range(max(0, total - ROWS), total - 1)
      if (t + int(FIRST[e])) % LENGTH != LENGTH - 1
    ]
    counts = np.array([np.sum((row == t) & (env == e)) for t in valid])
    assert counts.sum() == np.sum(env == e), 'a pair outside the list'
    assert len(valid) == 1 or stats.chisquare(counts).pvalue > 1e-4


@pytest.mark.parametrize('blocks, window', [(1, 0), (4, 3), (11, 0)])
def test_a_group_is_of_one_episode_and_window(blocks, window):
  total, ring, group = blocks * BLOCK, filled(blocks), 3
  keys = lambda seed: jax.random.split(jax.random.key(seed), GROUPS)
  draw = jax.jit(
    lambda keys: replay.sample(ring, keys, BATCH, FIRST, LENGTH, (2, 2, 1), group, window)
  )
  rows = []
  for seed in range(8):
    s, a, s_next, env, row = jax.tree.map(np.asarray, draw(keys(seed)))
    np.testing.assert_array_equal(s[:, 0, 0, 0], row)
    np.testing.assert_array_equal(s_next[:, 0, 0, 0], row + 1)
    np.testing.assert_array_equal(s[:, 1, 1, 0], env)
    np.testing.assert_array_equal(a, np.stack([row, env], -1))
    assert row.min() >= max(0, total - ROWS) and row.max() + 1 < total
    step = (row + np.asarray(FIRST)[env]) % LENGTH
    assert step.max() < LENGTH - 1  # a successor in the episode
    episode = (row - step).reshape(-1, group)
    assert (np.ptp(episode, 1) == 0).all() and (np.ptp(env.reshape(-1, group), 1) == 0).all()
    of_group = np.sort(row.reshape(-1, group), 1)
    if window:
      assert (np.ptp(of_group, 1) < window).all()
    held = [  # rows of the episode that are there with their successors
      min(e + LENGTH, total) - 1 - max(e, total - ROWS, 0) for e in episode[:, 0]
    ]
    enough = np.minimum(held, window or LENGTH) >= group
    assert (np.diff(of_group[enough], axis=1) > 0).all()  # none twice
    rows.append(row)
  assert len(np.unique(np.concatenate(rows))) > 1


def test_ring_keeps_the_newest_rows():
  ring = filled(7)
  want = {t % ROWS: t for t in range(7 * BLOCK - ROWS, 7 * BLOCK)}
  np.testing.assert_array_equal(ring.frames[:, 0, 0], [want[i] for i in range(ROWS)])
  assert int(ring.total) == 7 * BLOCK


def test_a_groups_draw_depends_on_its_key_alone():
  """What one device holding two groups draws is what two devices draw, each holding one."""
  ring, keys = filled(6), jax.random.split(jax.random.key(3), GROUPS)
  both = replay.sample(ring, keys, BATCH, FIRST, LENGTH, (2, 2, 1))
  for g in range(GROUPS):
    half = slice(g * ENVS // GROUPS, (g + 1) * ENVS // GROUPS)
    part = ring.replace(frames=ring.frames[:, half], actions=ring.actions[:, half])
    alone = replay.sample(part, keys[g : g + 1], BATCH, FIRST[half], LENGTH, (2, 2, 1))
    for x, y in zip(both[:3], alone[:3], strict=True):
      np.testing.assert_array_equal(x[g * BATCH : (g + 1) * BATCH], y)


@pytest.mark.parametrize(
  'dtype, error', [(jnp.float32, 0), (jnp.bfloat16, 2**-9), (jnp.int8, 0.5 / 127)]
)
def test_packed_actions(dtype, error):
  """Rounded to the nearest; what was rounded once stays as it is."""
  actions = jnp.linspace(-1, 1, 1001)
  taken = replay.unpack(replay.pack(actions, dtype), jnp.float32)
  assert jnp.abs(taken - actions).max() <= error + 1e-7 and jnp.abs(taken).max() <= 1
  np.testing.assert_array_equal(replay.unpack(replay.pack(taken, dtype), jnp.float32), taken)


def test_adding_is_in_place():
  ring = filled(1)
  before = ring.frames.unsafe_buffer_pointer()
  assert add(ring, *block(1)).frames.unsafe_buffer_pointer() == before
