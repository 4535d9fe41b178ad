import functools
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats
from jax.sharding import PartitionSpec as P

from palm_jax import sac
from palm_jax.actor_critic import Actor

F, A, B = 6, 3, 16


def tiny_config(**changes):
  config = sac.default_config()
  config.update(dict(hidden=(16, 16), trunk=8, lr_actor=1e-3, lr_critic=2e-3, lr_alpha=3e-3))
  config.update(changes)
  return config


def inputs(dtype=np.float32):
  rng = np.random.default_rng(
    1
  )  # no ReLU's input is nearly 0, where float32 and float64 would part
  draw = lambda *shape: rng.normal(size=shape).astype(dtype)
  discount = np.where(np.arange(B) % 4, 0.99, 0).astype(dtype)  # every fourth transition truly ends
  batch = sac.Batch(draw(B, F), np.tanh(draw(B, A)), draw(B), draw(B, F), discount)
  return batch, draw(2, B, A)


@functools.cache
def make_state(dtype=np.float32):
  """An agent, as numpy arrays, whose target differs from its critic, so that taking one for the
  other shows."""
  with jax.enable_x64(False):
    init = jax.jit(lambda key: sac.init(key, F, A, tiny_config()))
    state = init(jax.random.key(0)).replace(target_critic=init(jax.random.key(1)).critic)
  return jax.tree.map(
    lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, jax.device_get(state)
  )


@functools.cache
def compiled_update():
  def update(state, changes):
    batch, noise = inputs(np.float64)
    return sac.update(state, batch, noise, types.SimpleNamespace(**{**tiny_config(), **changes}))

  return jax.jit(update)


def update(state, **changes):
  """One update in float64; learning rates and target_entropy_scale are traced, so all tests share
  one program."""
  names = ('lr_actor', 'lr_critic', 'lr_alpha', 'target_entropy_scale')
  with jax.enable_x64(True):
    return jax.device_get(
      compiled_update()(state, {name: changes.get(name, tiny_config()[name]) for name in names})
    )


@pytest.fixture(scope='module')
def step():
  """State before one update, after it, and its metrics."""
  state = make_state(np.float64)
  return state, *update(state)


def dense(p, x):
  return x @ np.asarray(p['kernel'], np.float64) + np.asarray(p['bias'], np.float64)


def trunk_numpy(p, h):
  x = dense(p['Dense_0'], h)
  x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
  return np.tanh(x * np.asarray(p['LayerNorm_0']['scale']) + np.asarray(p['LayerNorm_0']['bias']))


def mlp_numpy(p, x):
  for i in range(2):
    x = np.maximum(dense(p[f'Dense_{i}'], x), 0)
  return dense(p['Dense_2'], x)


def policy_numpy(variables, h, noise):
  """Action and log-density with scipy's Gaussian and the change of variables written in the
  action."""
  p = variables['params']
  mean, raw = np.split(mlp_numpy(p['MLP_0'], trunk_numpy(p['Trunk_0'], h)), 2, axis=-1)
  std = np.exp(-5 + 3.5 * (np.tanh(raw) + 1))
  x = mean + std * noise
  action = np.tanh(x)
  return action, (scipy.stats.norm.logpdf(x, mean, std) - np.log1p(-(action**2))).sum(-1)


def values_numpy(variables, h, action):
  p = variables['params']
  x = np.concatenate([trunk_numpy(p['Trunk_0'], h), action], -1)
  return np.stack([mlp_numpy(p['q1'], x)[:, 0], mlp_numpy(p['q2'], x)[:, 0]])


@pytest.mark.parametrize('mean, log_std', [(0.0, 0.0), (0.7, -1.0), (-1.5, 0.5)])
def test_log_prob_is_a_density(mean, log_std):
  """The density integrates over the actions to the Gaussian's own probabilities."""
  with jax.enable_x64(True):
    noise = jnp.linspace(-8, 8, 20_001)
    action, log_prob = sac.sample(
      jnp.full((20_001, 1), mean), jnp.full((20_001, 1), log_std), noise[:, None]
    )
    mass = scipy.integrate.cumulative_trapezoid(np.exp(log_prob), action[:, 0], initial=0)
  assert mass[-1] == pytest.approx(1, abs=1e-6)
  np.testing.assert_allclose(mass, scipy.stats.norm.cdf(noise), atol=1e-6)


def test_log_prob_matches_scipy():
  rng = np.random.default_rng(0)
  mean, log_std, noise = rng.normal(size=(3, 50, 4)).astype(np.float32)
  action, log_prob = sac.sample(mean, log_std, noise)
  x = mean.astype(np.float64) + np.exp(log_std.astype(np.float64)) * noise
  want = scipy.stats.norm.logpdf(x, mean, np.exp(log_std.astype(np.float64))) - 2 * np.log(
    1 / np.cosh(x)
  )
  np.testing.assert_allclose(action, np.tanh(x), rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(log_prob, want.sum(-1), rtol=1e-5, atol=1e-5)


def test_log_prob_is_finite_where_tanh_saturates():
  mean = jnp.array([[-30.0], [30.0], [100.0]])
  f = lambda mean: sac.sample(mean, jnp.zeros_like(mean), jnp.zeros_like(mean))[1].sum()
  log_prob, grad = jax.value_and_grad(f)(mean)
  # log(1 - tanh(x)^2) -> log 4 - 2 |x|
  assert float(log_prob) == pytest.approx(
    3 * (-0.5 * np.log(2 * np.pi) - np.log(4)) + 2 * 160, rel=1e-5
  )
  np.testing.assert_allclose(grad, [[-2.0], [2.0], [2.0]], rtol=1e-5)


def test_entropy_of_512_actions():
  """-log pi of a unit Gaussian through tanh: +343 nats, which buries a reward of about 2 unless
  alpha is small."""
  noise = jax.random.normal(jax.random.key(0), (4096, 512))
  entropy = -sac.sample(jnp.zeros_like(noise), jnp.zeros_like(noise), noise)[1].mean()
  x, weights = np.polynomial.hermite_e.hermegauss(200)
  slope = (weights @ np.log(1 / np.cosh(x) ** 2)) / weights.sum()
  assert float(entropy) == pytest.approx(512 * (0.5 * np.log(2 * np.pi * np.e) + slope), abs=1.5)
  assert float(entropy) == pytest.approx(343, abs=1.5)


def test_losses_and_target_by_hand(step):
  state, new, metrics = step
  batch, noise = inputs(np.float64)
  alpha = np.exp(state.log_alpha)
  assert alpha == pytest.approx(0.1)
  next_action, next_log_prob = policy_numpy(state.actor, batch.next_h, noise[0])
  target = batch.reward + batch.discount * (
    values_numpy(state.target_critic, batch.next_h, next_action).min(0) - alpha * next_log_prob
  )
  q = values_numpy(state.critic, batch.h, batch.action)
  action, log_prob = policy_numpy(state.actor, batch.h, noise[1])
  value = values_numpy(new.critic, batch.h, action).min(0)  # by the critic just updated
  want = dict(
    target_q=target.mean(),
    q=q.mean(),
    reward=batch.reward.mean(),
    alpha=alpha,
    critic_loss=((q[0] - target) ** 2).mean() + ((q[1] - target) ** 2).mean(),
    actor_loss=(alpha * log_prob - value).mean(),
    alpha_loss=alpha * (-log_prob.mean() + A),
    entropy_per_dim=-log_prob.mean() / A,
    alpha_logp=alpha * log_prob.mean(),
  )
  for name in want:
    assert float(metrics[name]) == pytest.approx(want[name], rel=1e-9), name
  assert set(metrics) == {*want, 'critic_grad_norm', 'actor_grad_norm'}


def test_gradients_by_finite_differences():
  """Along its gradient each loss changes at the rate of the norm reported."""
  state = make_state(np.float64)
  frozen = dict(lr_actor=0.0, lr_critic=0.0)
  new, metrics = update(state, **frozen)
  for part in ('critic', 'actor'):
    norm = metrics[f'{part}_grad_norm']
    # Adam's first moment after one step is 0.1 of the gradient.
    direction = jax.tree.map(lambda m, n=norm: m / 0.1 / n, getattr(new, f'{part}_opt')[0].mu)
    loss = []
    for size in (1e-6, -1e-6):
      params = jax.tree.map(lambda p, d, s=size: p + s * d, getattr(state, part), direction)
      loss.append(update(state.replace(**{part: params}), **frozen)[1][f'{part}_loss'])
    assert (loss[0] - loss[1]) / 2e-6 == pytest.approx(norm, rel=1e-6), part


def test_target_is_a_moving_average(step):
  state, new, _ = step
  trees = map(jax.tree.leaves, (new.target_critic, state.target_critic, new.critic))
  for target, old, critic in zip(*trees, strict=True):
    np.testing.assert_allclose(target, 0.01 * critic + 0.99 * old, rtol=1e-12)


def test_each_part_has_its_own_learning_rate(step):
  """Adam's first step moves a parameter by the learning rate, whatever the gradient."""
  state, new, _ = step
  change = lambda name: max(
    float(np.abs(a - b).max())
    for a, b in zip(
      jax.tree.leaves(getattr(new, name)), jax.tree.leaves(getattr(state, name)), strict=True
    )
  )
  assert change('actor') == pytest.approx(1e-3, rel=1e-2)
  assert change('critic') == pytest.approx(2e-3, rel=1e-2)
  assert change('log_alpha') == pytest.approx(3e-3, rel=1e-2)


@pytest.mark.parametrize('scale, sign', [(-10.0, 1), (10.0, -1)])
def test_temperature_moves_towards_the_target_entropy(scale, sign):
  """Wanted entropy +10 a dimension is above what the policy has: alpha grows; -10 is below: it
  falls."""
  state = make_state(np.float64)
  new, metrics = update(state, target_entropy_scale=scale)
  assert -10 < metrics['entropy_per_dim'] < 10
  assert np.sign(new.log_alpha - state.log_alpha) == sign


def updates_on(num_devices, dtype, num_updates=1):
  """Updates with the batch sharded over devices -> state, metrics."""
  mesh = jax.make_mesh(
    (num_devices,),
    ('data',),
    axis_types=(jax.sharding.AxisType.Auto,),
    devices=jax.devices()[:num_devices],
  )
  state, (batch, noise) = make_state(dtype), inputs(dtype)
  sharded = jax.jit(
    jax.shard_map(
      lambda *args: sac.update(*args, tiny_config(), axis_name='data'),
      mesh=mesh,
      in_specs=(P(), P('data'), P(None, 'data')),
      out_specs=P(),
    )
  )
  for _ in range(num_updates):
    state, metrics = jax.block_until_ready(sharded(state, batch, noise))
  return jax.device_get((state, metrics))


def test_one_two_and_eight_devices_agree_in_float64():
  """Gradient norms are among the metrics: averaging gradients that are already summed is seen."""
  state = make_state(np.float64)
  for _ in range(5):
    state, metrics = update(state)
  assert state.actor['params']['MLP_0']['Dense_0']['kernel'].dtype == np.float64
  with jax.enable_x64(True):
    for num_devices in (2, 8):
      other = updates_on(num_devices, np.float64, num_updates=5)
      for a, b in zip(jax.tree.leaves(other), jax.tree.leaves((state, metrics)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def test_initial_layers_are_orthogonal():
  state = make_state()
  for tree in (state.actor, state.critic):
    kernels = [x for x in jax.tree.leaves(tree) if x.ndim == 2]
    assert len(kernels) >= 4
    for kernel in map(np.asarray, kernels):
      small = kernel if kernel.shape[0] <= kernel.shape[1] else kernel.T
      np.testing.assert_allclose(small @ small.T, np.eye(len(small)), atol=1e-5)
  assert np.any(
    state.critic['params']['q1']['Dense_0']['kernel']
    != state.critic['params']['q2']['Dense_0']['kernel']
  )


def test_log_std_stays_in_its_bounds_with_a_gradient():
  actor = Actor(A, (16,), 0, log_std_min=-5.0, log_std_max=1.0)
  h = jnp.asarray(inputs()[0].h)
  params = jax.jit(actor.init)(jax.random.key(0), h)
  log_std_of = jax.jit(lambda h: actor.apply(params, h)[1])
  for scale, low, high in ((0.0, -2.0, -2.0), (1.0, -5.0, 1.0), (1e6, -5.0, 1.0)):
    log_std = log_std_of(scale * h)
    assert low <= float(log_std.min()) and float(log_std.max()) <= high
  assert {float(x) for x in np.unique(log_std_of(1e6 * h))} == {-5.0, 1.0}
  assert np.all(np.asarray(jax.grad(lambda h: log_std_of(h).sum())(h)).any(axis=1))


def test_zero_noise_acts_deterministically(step):
  state, _, _ = step
  batch, noise = inputs()
  config = types.SimpleNamespace(**dict(tiny_config()))
  np.testing.assert_allclose(
    sac.act(state, batch.h, 0 * noise[0], config),
    policy_numpy(state.actor, batch.h, 0)[0],
    rtol=1e-4,
    atol=1e-5,
  )
  np.testing.assert_allclose(
    sac.act(state, batch.h, noise[0], config),
    policy_numpy(state.actor, batch.h, noise[0])[0],
    rtol=1e-4,
    atol=1e-5,
  )


@pytest.mark.slow
def test_solves_pendulum():
  """-200 is a pendulum that is swung up and held; a random policy gets about -1200."""
  gymnasium = pytest.importorskip('gymnasium')
  started = time.monotonic()
  config = sac.default_config()
  config.update(
    dict(
      hidden=(256, 256),
      trunk=0,
      lr_actor=3e-4,
      lr_critic=1e-3,
      lr_alpha=1e-3,
      log_std_min=-5.0,
      tau=0.005,
      init_alpha=1.0,
    )
  )  # cleanrl sac_continuous_action.py
  env = gymnasium.make('Pendulum-v1')
  steps, warmup, batch_size, key = 10_000, 1000, 256, jax.random.key(0)
  state = sac.init(key, 3, 1, config)
  rng = np.random.default_rng(0)
  obs_ring, next_ring = np.zeros((2, steps, 3), np.float32)
  action_ring, reward_ring = np.zeros((steps, 1), np.float32), np.zeros(steps, np.float32)
  act = jax.jit(lambda state, h, noise: sac.act(state, h, noise, config))
  update = jax.jit(lambda *args: sac.update(*args, config), donate_argnums=0)
  discount = np.full(
    batch_size, config.gamma, np.float32
  )  # Pendulum never ends, it is only cut off

  obs, _ = env.reset(seed=0)
  for t in range(steps):
    if t < warmup:
      action = rng.uniform(-1, 1, 1).astype(np.float32)
    else:
      action = np.asarray(act(state, obs[None], rng.normal(size=(1, 1)).astype(np.float32)))[0]
    next_obs, reward, _, truncated, _ = env.step(2 * action)
    obs_ring[t], action_ring[t], reward_ring[t], next_ring[t] = obs, action, reward, next_obs
    obs = env.reset()[0] if truncated else next_obs
    if t >= warmup:
      rows = rng.integers(0, t + 1, batch_size)
      batch = sac.Batch(
        obs_ring[rows], action_ring[rows], reward_ring[rows], next_ring[rows], discount
      )
      state, metrics = update(state, batch, rng.normal(size=(2, batch_size, 1)).astype(np.float32))

  returns = []
  for episode in range(10):
    obs, _ = env.reset(seed=1000 + episode)
    total, truncated = 0.0, False
    while not truncated:
      obs, reward, _, truncated, _ = env.step(
        2 * np.asarray(act(state, obs[None], np.zeros((1, 1), np.float32)))[0]
      )
      total += reward
    returns.append(total)
  print(
    f'mean return {np.mean(returns):.1f}, worst {min(returns):.1f}, alpha '
    f'{float(metrics["alpha"]):.3f}, '
    f'{steps} steps in {time.monotonic() - started:.0f} s'
  )
  assert np.mean(returns) >= -200
