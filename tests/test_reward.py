import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from palm_jax import agent, reward
from palm_jax.base.errors import UserError
from tests.worlds import tiny_config

OPTIONS = ('k', 'average', 'transform', 'include_self', 'clip')
entropy = jax.jit(reward.entropy_reward, static_argnames=OPTIONS)


def distances(h):
  """All pairs by differences in float64, each row sorted: the sample itself comes first."""
  h = np.asarray(h, np.float64)
  return np.sort(np.linalg.norm(h[:, None] - h[None], axis=-1), axis=1)


def clusters(size, spread, offset=50.0, features=64):
  """(96, F) float32: groups of `size` samples about `spread` apart, groups about 11 apart, all far
  from the origin."""
  rng = np.random.default_rng(0)
  centers = np.repeat(rng.normal(size=(96 // size, features)), size, axis=0)
  noise = spread / np.sqrt(2 * features) * rng.normal(size=centers.shape)
  return (offset + centers + noise).astype(np.float32)


def pbe(rep, knn_k, knn_avg, knn_clip):
  """URLB utils.PBE with knn_rms=False, line by line."""
  source = target = np.asarray(rep, np.float64)
  b1, b2 = source.shape[0], target.shape[0]
  sim_matrix = np.linalg.norm(
    source[:, None, :].reshape(b1, 1, -1) - target[None, :, :].reshape(1, b2, -1), axis=-1
  )
  reward = np.sort(sim_matrix, axis=1)[:, :knn_k]
  if not knn_avg:
    reward = reward[:, -1].reshape(-1, 1)
    reward = np.maximum(reward - knn_clip, 0) if knn_clip >= 0 else reward
  else:
    reward = reward.reshape(-1, 1)
    reward = np.maximum(reward - knn_clip, 0) if knn_clip >= 0 else reward
    reward = reward.reshape((b1, knn_k))
    reward = reward.mean(axis=1, keepdims=True)
  return np.log(reward + 1.0)[:, 0]


@pytest.mark.parametrize('k', [1, 3])
def test_near_duplicates_far_from_the_origin(k):
  h = clusters(4, 0.02)
  want = distances(h)[:, 1 : k + 1]
  assert np.all(want < 0.04)
  got = jnp.expm1(entropy(h, k=k))  # back to the distance: log1p would flatter it
  np.testing.assert_allclose(got, want.mean(axis=1), rtol=1e-5)
  kth = entropy(h, k=k, average=False)
  np.testing.assert_allclose(kth, np.log1p(want[:, -1]), rtol=1e-5)


def test_neighbours_in_a_dense_group_are_the_nearest_ones():
  h = clusters(24, 0.02)
  np.testing.assert_allclose(
    jnp.expm1(entropy(h, k=5)), distances(h)[:, 1:6].mean(axis=1), rtol=1e-5
  )


@pytest.mark.parametrize('average', [True, False])
@pytest.mark.parametrize('clip', [0.0, 3.0])
def test_matches_urlb(average, clip):
  h = np.random.default_rng(1).normal(size=(64, 8)).astype(np.float32)
  got = entropy(h, k=12, average=average, include_self=True, clip=clip)
  np.testing.assert_allclose(got, pbe(h, 12, average, clip), rtol=1e-5, atol=1e-6)


def test_self_counts_once_even_among_copies():
  """Identical frames happen: an exact copy is a neighbour at distance 0, not the sample itself."""
  h = np.random.default_rng(2).normal(size=(16, 4)).astype(np.float32)
  h[1] = h[0]
  for include_self in (False, True):
    want = distances(h)[:, 1 - include_self :][:, :3]
    got = entropy(h, k=3, include_self=include_self)
    np.testing.assert_allclose(got, np.log1p(want.mean(axis=1)), rtol=1e-5)


def test_matches_the_papers_formula():
  h = np.random.default_rng(3).normal(size=(32, 8)).astype(np.float32)
  got = reward.entropy_reward(jnp.asarray(h), None, 5, False, 'log')
  np.testing.assert_allclose(got, np.log(distances(h)[:, 5]), rtol=1e-5)
  np.testing.assert_allclose(
    entropy(jnp.ones((8, 4)), k=3, transform='log'), np.log(1e-6), rtol=1e-6
  )


def test_value_on_gaussians():
  """2.310 and 2.230 were computed in float64 for 1024 Gaussians of 64 dimensions; seeds differ by
  about 0.002."""
  h = jax.random.normal(jax.random.key(0), (1024, 64))
  assert float(entropy(h).mean()) == pytest.approx(2.310, abs=0.004)
  assert float(entropy(h, include_self=True).mean()) == pytest.approx(2.230, abs=0.004)


@pytest.mark.parametrize('include_self', [False, True])
def test_does_not_change_with_the_devices(include_self):
  with jax.enable_x64(True):
    h = jax.random.normal(jax.random.key(1), (48, 16), jnp.float64)
    want = reward.global_entropy_reward(h, k=7, include_self=include_self)
    assert want.dtype == jnp.float64
    mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
    f = lambda h: reward.global_entropy_reward(h, 'data', k=7, include_self=include_self)
    got = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=P('data'), out_specs=P('data')))(h)
    np.testing.assert_allclose(got, want, rtol=1e-12)
    np.testing.assert_allclose(
      want, np.log1p(distances(h)[:, 1 - include_self :][:, :7].mean(axis=1)), rtol=1e-12
    )


def test_half_precision_features_are_compared_in_float32():
  h = jax.random.normal(jax.random.key(2), (32, 16)).astype(jnp.bfloat16)
  got = entropy(h, k=4)
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(
    got, np.log1p(distances(h.astype(jnp.float32))[:, 1:5].mean(axis=1)), rtol=1e-5
  )


def test_no_gradient_reaches_the_features():
  h = jax.random.normal(jax.random.key(3), (16, 4))
  assert not np.any(jax.grad(lambda h: entropy(h, k=3).sum())(h))


@pytest.mark.parametrize(
  'options, words',
  [
    (dict(k=8), 'reward.k=8'),
    (dict(k=0), 'reward.k=0'),
    (dict(k=9, include_self=True), 'reward.k=9'),
    (dict(k=3, transform='sqrt'), 'sqrt'),
    (dict(k=3, candidates=np.zeros((9, 2))), 'self_index'),
    (dict(k=3, self_index=np.arange(8)), 'self_index'),
  ],
)
def test_bad_options(options, words):
  with pytest.raises(UserError, match=words):
    reward.entropy_reward(jnp.zeros((8, 2)), **options)


def test_largest_possible_k():
  h = np.random.default_rng(4).normal(size=(8, 3)).astype(np.float32)
  np.testing.assert_allclose(entropy(h, k=7), np.log1p(distances(h)[:, 1:].mean(axis=1)), rtol=1e-5)
  np.testing.assert_allclose(
    entropy(h, k=8, include_self=True), np.log1p(distances(h).mean(axis=1)), rtol=1e-5
  )


def test_a_memory_never_counts_beyond_its_size_twice():
  """An int32 of all features that ever came would overflow, and switch it off."""
  memory = reward.empty_memory(6, 1)
  step = jax.jit(reward.remember)
  for i in range(20):
    memory = step(memory, jnp.full((2, 1), float(i)))
    assert 0 < memory.total < 12
    assert memory.total >= min(6, 2 * (i + 1))  # all that came are valid
    newest = sorted({float(max(i - j, 0)) for j in range(3)})
    there = memory.features[: min(6, int(memory.total)), 0]
    assert sorted(set(map(float, there))) == newest


def test_defaults_are_those_of_the_function():
  h = jax.random.normal(jax.random.key(4), (32, 4))
  config = reward.options(reward.default_config())
  np.testing.assert_array_equal(entropy(h, **config), entropy(h))


def test_a_reward_of_someones_own_has_a_name(monkeypatch):
  """One entry makes it a choice of the config, and the agent's reward."""
  monkeypatch.setitem(reward.OF_FEATURES, 'mine', lambda x, axis_name, memory, **_: x[:, 0])
  c = tiny_config()
  c.reward.kind = 'mine'
  reward.check(c.reward, 32)
  h = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
  t = agent.Transitions(-h, h, h, h, h, np.arange(4))
  np.testing.assert_array_equal(agent.intrinsic_reward(agent.only_acting({}), t, c)[1], h[:, 0])
  c.reward.kind = 'other'
  with pytest.raises(UserError, match="reward.kind='other' is unknown.*apt, mine, rnd"):
    reward.check(c.reward, 32)
