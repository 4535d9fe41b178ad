"""BEAR against float64 numpy, and what each of its losses moves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from palm_jax import sac
from palm_jax.base.errors import UserError
from palm_jax.offline import bear

O, A, B = 3, 2, 6


def config(**changes):
  c = bear.default_config()
  c.update(
    dict(hidden_actor=(8,), hidden_critic=(8,), hidden_behaviour=(8,), samples=4, warmup_updates=0)
  )
  c.update(changes)
  return ConfigDict(dict(bear=c))


def batch(seed=0):
  rng = np.random.default_rng(seed)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  discount = np.where(np.arange(B) % 2, 0.9, 0).astype(np.float32)
  return sac.Batch(draw(B, O), np.tanh(draw(B, A)), draw(B), draw(B, O), discount)


def mmd_numpy(x, y, sigma, kernel):
  def mean(x, y):
    total = 0.0
    for i in x:
      for j in y:
        size = np.abs(i - j).sum() if kernel == 'laplacian' else ((i - j) ** 2).sum()
        total += np.exp(-size / (2 * sigma))
    return total / (len(x) * len(y))

  return np.sqrt(mean(x, x) + mean(y, y) - 2 * mean(x, y) + 1e-6)


@pytest.mark.parametrize('kernel', bear.KERNELS)
@pytest.mark.parametrize('sigma', [0.5, 10.0])
def test_mmd_is_that_of_float64(kernel, sigma):
  rng = np.random.default_rng(1)
  x, y = rng.normal(size=(5, 7, 3)), rng.normal(0.5, 2, size=(5, 4, 3))
  expected = [mmd_numpy(a, b, sigma, kernel) for a, b in zip(x, y, strict=True)]
  with jax.enable_x64(True):
    np.testing.assert_allclose(bear.mmd(x, y, sigma, kernel), expected, rtol=1e-10)
  small = bear.mmd(jnp.float32(x), jnp.float32(y), sigma, kernel)
  np.testing.assert_allclose(small, expected, atol=1e-6)


def test_mmd_of_the_same_samples_is_nothing_and_has_a_gradient():
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 3)), jnp.float32)
  np.testing.assert_allclose(bear.mmd(x, x, 10.0), 1e-3, rtol=1e-2)
  moved = jax.grad(lambda y: bear.mmd(x, y, 10.0).sum())(x + 1)
  assert np.isfinite(moved).all() and (moved.sum((1, 2)) > 0).all()  # towards x is less
  assert np.isfinite(jax.grad(lambda y: bear.mmd(x, y, 10.0).sum())(x)).all()


@pytest.fixture(scope='module')
def updated():
  """State, what an update makes of it, and its metrics."""
  c = config()
  state, other = (bear.init(jax.random.key(i), O, A, c) for i in range(2))
  # At first the targets are copies, which would show nothing.
  state = state.replace(target_actor=other.target_actor, target_critic=other.target_critic)
  return state, *jax.jit(lambda s, b, k: bear.update(s, b, k, c))(state, batch(), jax.random.key(1))


def test_the_target_is_mixed_of_smallest_and_largest(updated):
  """The critics' loss, from the same noise, in numpy."""
  state, _, metrics = updated
  c, b = config().bear, batch()
  key = jax.random.split(jax.random.key(1), 4)[1]
  noise = np.asarray(jax.random.normal(key, (B, c.samples, A)))
  mean, log_std = bear._actor(c, A).apply(state.target_actor, b.next_h)
  actions = np.tanh(np.asarray(mean)[:, None] + np.exp(np.asarray(log_std))[:, None] * noise)
  seen = np.repeat(b.next_h[:, None], c.samples, 1)
  q = np.asarray(bear._critic(c).apply(state.target_critic, seen, actions))
  target = b.reward + b.discount * (0.75 * q.min(0) + 0.25 * q.max(0)).max(-1)
  now = np.asarray(bear._critic(c).apply(state.critic.params, b.h, b.action))
  expected = ((now - target) ** 2).mean(1).sum()
  np.testing.assert_allclose(metrics['critic_loss'], expected, rtol=1e-5)
  assert q.shape == (2, B, c.samples) and not np.allclose(q[0], q[1])  # two critics, not one twice


def test_what_an_update_moves(updated):
  state, after, metrics = updated
  moved = lambda name: any(
    not np.array_equal(x, y)
    for x, y in zip(
      jax.tree.leaves(getattr(state, name)), jax.tree.leaves(getattr(after, name)), strict=True
    )
  )
  assert all(map(moved, ('behaviour', 'actor', 'critic', 'target_actor', 'target_critic')))
  rises = metrics['mmd'] > 0.05
  assert (after.log_lagrange.params > 0) == rises
  assert int(after.updates) == 1
  tau = config().bear.tau
  jax.tree.map(
    lambda new, old, now: np.testing.assert_allclose(
      new, (1 - tau) * old + tau * now, rtol=1e-5, atol=1e-7
    ),
    after.target_critic,
    state.target_critic,
    after.critic.params,
  )


def test_in_the_warmup_only_the_support_counts():
  """The actor does not move with the critics, whatever they say."""
  c = config(warmup_updates=5)
  state = bear.init(jax.random.key(0), O, A, c)
  other = state.replace(critic=bear.learner(jax.tree.map(lambda x: 3 * x, state.critic.params)))
  update = jax.jit(lambda s: bear.update(s, batch(), jax.random.key(1), c)[0].actor.params)
  jax.tree.map(np.testing.assert_array_equal, update(state), update(other))
  late = jnp.int32(5)
  with pytest.raises(AssertionError):
    late_ones = update(state.replace(updates=late)), update(other.replace(updates=late))
    jax.tree.map(np.testing.assert_array_equal, *late_ones)


def test_the_policy_stays_in_the_support_of_a_record():
  """Its actions are near 0.5: a critic that pays for -1 does not draw the policy there."""
  c = config(lr_actor=3e-3, lr_lagrange=0.1, threshold=0.05, warmup_updates=300)

  def one(state, key):
    k = jax.random.split(key, 3)
    actions = jnp.clip(0.5 + 0.05 * jax.random.normal(k[0], (64, A)), -1, 1)
    h = jax.random.normal(k[1], (64, O))
    paid = sac.Batch(h, actions, -actions.sum(-1), h, jnp.zeros(64))
    return bear.update(state, paid, k[2], c)

  state = bear.init(jax.random.key(0), O, A, c)
  state, metrics = jax.jit(lambda s, keys: jax.lax.scan(one, s, keys))(
    state, jax.random.split(jax.random.key(1), 900)
  )
  h = jax.random.normal(jax.random.key(2), (200, O))
  actions = bear.act(state, h, jax.random.key(3), A, c)
  assert 0.2 < float(actions.mean()) < 0.7
  assert float(metrics['behaviour_error'][-50:].mean()) < 0.01
  assert float(metrics['mmd'][-50:].mean()) < 0.15


def test_acting_takes_the_best_of_several():
  c = config(samples=16)
  state = bear.init(jax.random.key(0), O, A, c)
  h = batch().h
  noise = jax.random.normal(jax.random.key(5), (B, 16, A))
  drawn = jnp.tanh(bear._before_tanh(c.bear, state.actor.params, h, noise))
  q = bear._critic(c.bear).apply(state.critic.params, np.repeat(h[:, None], 16, 1), drawn)[0]
  expected = np.asarray(drawn)[np.arange(B), np.asarray(q).argmax(-1)]
  np.testing.assert_allclose(bear.act(state, h, jax.random.key(5), A, c), expected, rtol=1e-6)


def test_invalid_settings_are_named():
  with pytest.raises(UserError, match="offline.bear.kernel='box'"):
    bear.check(config(kernel='box').bear)
