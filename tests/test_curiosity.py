"""Learned rewards against their definitions in numpy, and on any number of devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from palm_jax import curiosity, reward
from palm_jax.base import devices

B, F, A = 16, 5, 3
CONFIG = reward.default_config()
CONFIG.update(dict(hidden=7, rep_dim=4, models=3, lr=1e-2))
RNG = np.random.default_rng(0)
H, ACTION, NEXT_H = (
  RNG.normal(size=(B, F)),
  np.tanh(RNG.normal(size=(B, A))),
  RNG.normal(size=(B, F)),
)


def wide(x):
  return x.astype(jnp.float64) if x.dtype == jnp.float32 else x


def mlp(params, x):
  """ReLU layers and a linear one, of flax's parameters."""
  layers = params['params']
  for i in range(len(layers)):
    layer = layers[f'Dense_{i}']
    x = x @ np.asarray(layer['kernel'], np.float64) + np.asarray(layer['bias'], np.float64)
    x = np.maximum(x, 0) if i < len(layers) - 1 else x
  return x


def in_numpy(kind, params):
  """(rewards, loss) by the agents' definitions."""
  norm = functools.partial(np.linalg.norm, axis=-1)
  if kind == 'rnd':
    r = np.mean((mlp(params['predictor'], H) - mlp(params['target'], H)) ** 2, -1)
    return r, r.mean()
  if kind == 'icm':
    forward = norm(NEXT_H - mlp(params['forward'], np.append(H, ACTION, 1)))
    backward = norm(ACTION - np.tanh(mlp(params['backward'], np.append(H, NEXT_H, 1))))
    return np.log(forward + 1), forward.mean() + backward.mean()
  if kind == 'disagreement':
    models = [jax.tree.map(lambda x, i=i: x[i], params) for i in range(CONFIG.models)]
    guesses = np.stack([mlp(model, np.append(H, ACTION, 1)) for model in models])
    variance = ((guesses - guesses.mean(0)) ** 2).sum(0) / (len(models) - 1)
    return variance.mean(-1), np.mean([norm(NEXT_H - guess).mean() for guess in guesses])
  phi = mlp(params, NEXT_H)
  r = np.sum(phi / np.linalg.norm(phi, axis=1, keepdims=True) * ACTION, 1)
  return r, -r.mean()


@pytest.mark.parametrize('kind', curiosity.KINDS)
def test_rewards_and_losses_are_their_definitions_and_are_learned(kind):
  with jax.enable_x64(True):
    state = jax.tree.map(wide, curiosity.init(jax.random.key(1), kind, F, A, CONFIG))
    update = jax.jit(lambda s: curiosity.update(s, kind, (H, ACTION, NEXT_H), CONFIG))
    losses, rewards = [], []
    for _ in range(30):
      _, loss = in_numpy(kind, jax.device_get(state.params))
      state, r, metrics = update(state)
      np.testing.assert_allclose(metrics[f'{kind}_loss'], loss, rtol=1e-9)
      plain, _ = in_numpy(kind, jax.device_get(state.params))
      rewards.append(plain)
      if kind == 'rnd':  # URLB's running variance is that of all rewards so far, and a little of 1
        plain = plain / np.sqrt(np.var(np.concatenate(rewards)))
      np.testing.assert_allclose(r, plain, rtol=1e-4 if kind == 'rnd' else 1e-9)
      losses.append(loss)
  assert losses[-1] < losses[0] - 0.05 * abs(losses[0])


def test_the_target_of_rnd_stays():
  state = curiosity.init(jax.random.key(1), 'rnd', F, A, CONFIG)
  seen = jnp.float32(H), ACTION, NEXT_H
  after = jax.jit(lambda s: curiosity.update(s, 'rnd', seen, CONFIG)[0])(state)
  jax.tree.map(np.testing.assert_array_equal, state.params['target'], after.params['target'])
  moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), state.params, after.params)
  assert max(jax.tree.leaves(moved['predictor'])) > 1e-3


@pytest.mark.parametrize('kind', curiosity.KINDS)
def test_any_number_of_devices_computes_the_same(kind):
  found = []
  with jax.enable_x64(True):
    state = jax.tree.map(wide, curiosity.init(jax.random.key(1), kind, F, A, CONFIG))
    for count in (1, 8):
      call = jax.shard_map(
        lambda s, seen: curiosity.update(s, kind, seen, CONFIG, 'data'),
        mesh=devices.make_mesh(count),
        in_specs=(P(), P('data')),
        out_specs=(P(), P('data'), P()),
      )
      found.append(jax.device_get(jax.jit(call)(state, (H, ACTION, NEXT_H))))
  for other in found[1:]:
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), found[0], other
    )
