"""Training of StyleGAN2: losses, optimiser, moving average, devices, resuming."""
import contextlib
import functools
import math
import os
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from palm_jax import devices
from palm_jax.checkpoint import Checkpoints, load_item
from palm_jax.data import Data, Split
from palm_jax.errors import NonFiniteError, UserError
from palm_jax.generator import load_generator, losses, train

COLOURS = np.array([[230, 40, 40], [40, 230, 40], [40, 40, 230]], np.uint8)


@pytest.fixture(scope='module', autouse=True)
def compile_cache(tmp_path_factory):
  """Runs of one config compile once, although each is a fresh set of objects."""
  jax.config.update('jax_compilation_cache_dir', str(tmp_path_factory.mktemp('cache')))
  yield
  jax.config.update('jax_compilation_cache_dir', None)


@contextlib.contextmanager
def double_precision():
  """With it goes a compiler that hurries: these few steps cost far less than their compilation."""
  jax.config.update('jax_disable_most_optimizations', True)
  try:
    with jax.enable_x64(True):
      yield
  finally:
    jax.config.update('jax_disable_most_optimizations', False)


def tiny(**changes):
  config = train.default_config()
  config.update(dict(z_dim=8, w_dim=8, mapping_layers=1, channel_base=64, channel_max=8, conv_clamp=0.,
                     d_mapping_layers=0, mbstd_group=2, batch_size=16, lr=0.01, r1_gamma=0.1, r1_interval=4,
                     pl_interval=2, ema_kimg=.5, iterations_per_call=4, snapshot_kimg=.5, checkpoint_minutes=60.))
  config.update(changes)
  return config


# ---- losses


def test_losses_are_cross_entropies_of_the_logits():
  real, fake = np.array([2., -1., 0.]), np.array([-3., 1.5, .5])
  sigmoid = lambda x: 1 / (1 + np.exp(-x))
  np.testing.assert_allclose(losses.generator_loss(jnp.asarray(fake)), -np.log(sigmoid(fake)).mean(), rtol=1e-6)
  np.testing.assert_allclose(losses.discriminator_loss(jnp.asarray(real), jnp.asarray(fake)),
                             -np.log(sigmoid(real)).mean() - np.log(1 - sigmoid(fake)).mean(), rtol=1e-6)


def test_r1_is_the_squared_slope():
  rng = np.random.default_rng(0)
  images, slope = rng.normal(size=(3, 4, 4, 2)), rng.normal(size=(4, 4, 2))
  linear = losses.r1_penalty(lambda x: (x * slope).sum((1, 2, 3)) + 5, jnp.asarray(images))
  np.testing.assert_allclose(linear, np.full(3, (slope ** 2).sum()), rtol=1e-5)

  # Samples see each other, as in the minibatch statistic: the derivative is of the sum of all logits.
  f = lambda x, xp: (xp.tanh((x * slope).sum((1, 2, 3))) * x.std(0).sum())
  wanted, h = np.zeros(3), 1e-5
  for at in np.ndindex(images.shape):
    step = np.zeros_like(images)
    step[at] = h
    wanted[at[0]] += ((f(images + step, np).sum() - f(images - step, np).sum()) / (2 * h)) ** 2
  np.testing.assert_allclose(losses.r1_penalty(lambda x: f(x, jnp), jnp.asarray(images)), wanted, rtol=1e-4)


def test_path_lengths_of_a_linear_synthesis():
  rng = np.random.default_rng(0)
  jacobian, ws, y = rng.normal(size=(3, 5, 4, 4, 2)), rng.normal(size=(6, 3, 5)), rng.normal(size=(6, 4, 4, 2))
  lengths = losses.path_lengths(lambda w: jnp.einsum('nlk,lkhwc->nhwc', w, jacobian), jnp.asarray(ws), jnp.asarray(y))
  products = np.einsum('nhwc,lkhwc->nlk', y / 4, jacobian)  # 4 = sqrt(4 * 4 pixels)
  np.testing.assert_allclose(lengths, np.sqrt((products ** 2).sum(2).mean(1)), rtol=1e-5)


def test_path_length_mean_moves_first_and_carries_gradient():
  lengths, pl_mean = np.array([1., 3.]), 0.
  for wanted in (.02, .02 + .01 * (2 - .02)):
    penalty, pl_mean = losses.path_length_penalty(jnp.asarray(lengths), pl_mean)
    np.testing.assert_allclose(pl_mean, wanted, rtol=1e-6)
    np.testing.assert_allclose(penalty, (lengths - wanted) ** 2, rtol=1e-6)
  slope = jax.grad(lambda x: losses.path_length_penalty(x, 1.)[0].mean())(jnp.asarray(lengths))
  mean = 1 + .01 * (2 - 1)
  by_hand = (lengths - mean) - (lengths - mean).sum() * .01 / 2
  np.testing.assert_allclose(slope, by_hand, rtol=1e-5)


# ---- optimiser, moving average, data order


@pytest.mark.parametrize('network', ['G', 'D'])
def test_adam_is_shared_and_corrected(network):
  """Against Adam as in torch, written out; G has no second kind of step because path lengths are off."""
  config = train.default_config()
  interval, regularised = {'G': (4, False), 'D': (16, True)}[network]
  rng, share = np.random.default_rng(0), interval / (interval + 1)
  x, v, count = np.array([1., -2.]), np.zeros(2), 0
  optimizer = train.make_optimizers(config)['GD'.index(network)]
  with jax.enable_x64(True):
    params = jnp.asarray(x)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for iteration in range(33):
      for _ in range(1 + (regularised and iteration % interval == 0)):
        gradient = rng.normal(size=2) * 10. ** rng.integers(-6, 3)
        count += 1
        b2 = .99 ** share
        v = b2 * v + (1 - b2) * gradient ** 2
        x = x - .0025 * share * gradient / (np.sqrt(v / (1 - b2 ** count)) + 1e-8)
        step, state = update(jnp.asarray(gradient), state, params)
        params = optax.apply_updates(params, step)
    np.testing.assert_allclose(params, x, rtol=1e-12)


def test_ema_decay_ramps_up():
  config = train.default_config()
  for step, half_life in ((0, 1e-8), (1, 64 * .05), (10_000, 32_000.), (10 ** 6, 500_000.)):
    np.testing.assert_allclose(train.ema_decay(config, jnp.int32(step)), .5 ** (64 / half_life), rtol=1e-5)
  assert train.ema_decay(config, jnp.int32(0)) == 0


def test_batch_indices_walk_through_whole_epochs():
  walk = train.batch_indices(3, 0, 70, 20)
  for epoch in range(3):
    assert sorted(walk[epoch * 20:][:20]) == list(range(20))
  assert not np.array_equal(walk[:20], walk[20:40])
  pieces = [train.batch_indices(3, start, 7, 20) for start in range(0, 70, 7)]
  np.testing.assert_array_equal(np.concatenate(pieces), walk)
  assert not np.array_equal(train.batch_indices(4, 0, 70, 20), walk)


# ---- the compiled call


def in_float64(tree):
  return jax.tree.map(lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


@pytest.fixture(scope='module')
def run():
  """f(number of devices) -> (states around each of five iterations, metrics): float64, everything on, numpy."""
  config = tiny(pl_weight=2., style_mixing=.5)
  rng = np.random.default_rng(0)
  images, labels = rng.integers(0, 256, (40, 8, 8, 1), np.uint8), rng.integers(0, 3, 40).astype(np.int32)
  G, D = train.make_networks(config, (8, 8, 1), 3)
  with double_precision():
    first = jax.device_get(jax.jit(lambda key: in_float64(train.init_state(config, G, D, key)).replace(key=0))(
        jax.random.key(0)))

  @functools.cache
  def run(count):
    with double_precision():
      mesh = devices.make_mesh(count)
      call = train.make_train_call(config, G, D, mesh)
      data = devices.replicate(mesh, (images, labels))
      state, states, metrics = devices.replicate(mesh, first.replace(key=jax.random.key(1))), [first], []
      for step in range(5):
        indices = train.batch_indices(0, step * 16, 16, 40).reshape(1, 16)
        state, metric = call(state, *data, jax.device_put(indices, jax.NamedSharding(mesh, jax.P(None, 'data'))))
        states.append(jax.device_get(state.replace(key=0)))
        metrics.append(jax.device_get(metric))
    return states, metrics
  return run


@pytest.mark.parametrize('count', [pytest.param(2, marks=pytest.mark.slow), 8])
def test_any_number_of_devices_computes_the_same(run, count):
  for wanted, got in zip(jax.tree.leaves(run(1)), jax.tree.leaves(run(count)), strict=True):
    np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=1e-9)
  states = run(count)[0]
  moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), states[0].D, states[-1].D)
  assert min(jax.tree.leaves(moved)) > 1e-3


def test_gradient_norms_do_not_grow_with_devices(run):
  for name in ('grad_norm_g', 'grad_norm_pl', 'grad_norm_d', 'grad_norm_r1'):
    one, eight = (run(count)[1][0][name] for count in (1, 8))
    assert one > 1e-3
    np.testing.assert_allclose(eight, one, rtol=1e-9)


def test_moving_average_by_hand(run):
  average = None
  for step, state in enumerate(run(1)[0][1:]):
    if step == 0:
      average = state.G['params']
    decay = .5 ** (16 / min(500., step * 16 * .05)) if step else 0.
    average = jax.tree.map(lambda old, new, d=decay: d * old + (1 - d) * new, average, state.G['params'])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14), state.G_ema['params'], average)
    jax.tree.map(np.testing.assert_array_equal, state.G_ema['buffers'], state.G['buffers'])
    if step == 0:
      jax.tree.map(np.testing.assert_array_equal, state.G_ema, state.G)


def test_first_steps_have_the_corrected_length(run):
  """Adam without momentum moves by lr * share * sign(gradient) at first; G makes two steps in this iteration, D two."""
  before, after = run(1)[0][:2]
  for old, new, share in ((before.G['params'], after.G['params'], 2 / 3), (before.D, after.D, 4 / 5)):
    moved = max(jax.tree.leaves(jax.tree.map(lambda a, b: np.abs(a - b).max(), old, new)))
    assert .01 * share < moved < .01 * share * (1 + math.sqrt(2) * 1.01)


def test_lazy_phases_run_when_they_should(run):
  states, metrics = run(1)
  assert [m['r1'] > 0 for m in metrics] == [True, False, False, False, True]
  assert [m['pl'] > 0 for m in metrics] == [True, False, True, False, True]
  assert [int(s.opt_d[0].count) for s in states] == [0, 2, 3, 4, 5, 7]
  assert [int(s.opt_g[0].count) for s in states] == [0, 2, 3, 5, 6, 8]
  pl_means = [s.pl_mean for s in states]
  assert (np.diff(pl_means) != 0).tolist() == [True, False, True, False, True]


# ---- the job


@pytest.fixture(scope='module')
def job(tmp_path_factory):
  """A run that SIGTERM stopped and that was resumed, and the same in one go: workdirs, result, config, data, mesh."""
  rng, stopped, whole = np.random.default_rng(0), tmp_path_factory.mktemp('stopped'), tmp_path_factory.mktemp('whole')
  labels = rng.integers(0, 3, 90)
  images = np.broadcast_to(COLOURS[labels][:, None, None], (90, 8, 8, 3)).copy()
  data = Data(Split(images, labels), Split(images, labels), ('red', 'green', 'blue'), 'three colours')
  config, mesh = ConfigDict(dict(seed=1, generator=tiny(kimg=1e6))), devices.make_mesh(2)

  def stop():
    deadline = time.monotonic() + 300
    while not list((stopped / 'generator').glob('samples/*.png')) and time.monotonic() < deadline:
      time.sleep(.01)
    os.kill(os.getpid(), signal.SIGTERM)
  watcher = threading.Thread(target=stop)
  watcher.start()
  assert train.train(config, stopped, data, mesh) is None
  watcher.join()
  step = load_item(stopped / 'generator' / 'checkpoints', 'generator')[0]
  config.generator.kimg = max(step + 20, 240) * 16 / 1000
  result = train.train(config, stopped, data, mesh)
  assert step < result['iterations']
  train.train(config, whole, data, mesh)
  return stopped, whole, result, config, data, mesh


def checkpointed(workdir, config, data, mesh):
  G, D = train.make_networks(config.generator, (8, 8, 3), 3)
  template = jax.eval_shape(lambda key: train.init_state(config.generator, G, D, key), jax.random.key(0))
  everywhere = jax.NamedSharding(mesh, jax.P())
  template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), template)
  return load_item(workdir / 'generator' / 'checkpoints', 'state', template=template)


def test_resuming_is_exact(job):
  stopped, whole, _, *rest = job
  (step, a), (other_step, b) = checkpointed(stopped, *rest), checkpointed(whole, *rest)
  assert step == other_step
  assert jax.random.key_data(a.key).tolist() == jax.random.key_data(b.key).tolist()
  jax.tree.map(np.testing.assert_array_equal, a.replace(key=0), b.replace(key=0))


def test_no_step_of_g_where_path_lengths_are_off(job):
  step, state = checkpointed(job[0], *job[3:])
  assert int(state.step) == step == int(state.opt_g[0].count)
  assert int(state.opt_d[0].count) == step + step // 4


def test_classes_get_their_colours(job):
  generator = load_generator(job[0])
  assert (generator.z_dim, generator.num_classes, generator.image_shape) == (8, 3, (8, 8, 3))
  z = jax.random.normal(jax.random.key(5), (30, 8))
  # Variables as an argument: the form in which a larger compiled program uses a generator.
  images = jax.jit(generator.apply)(generator.variables, z, jnp.arange(30) % 3)
  np.testing.assert_allclose(images, jax.jit(generator.__call__)(z, jnp.arange(30) % 3), atol=1e-4)
  means = np.stack([images[c::3].mean((0, 1, 2)) for c in range(3)])
  assert np.abs(means - (COLOURS / 127.5 - 1)).max() < .5, means


def test_result_and_pictures(job):
  stopped, _, result, config, _, _ = job
  assert result['images'] == result['iterations'] * 16 >= config.generator.kimg * 1000
  assert result['settings']['z_dim'] == 8 and result['data'] == 'three colours'
  assert all(math.isfinite(value) for value in result['metrics'].values())
  assert (stopped / 'results' / 'generator.json').is_file()
  assert (stopped / 'generator' / 'samples' / f'{result["images"] // 1000:06d}.png').is_file()


def test_nan_stops_the_job_and_is_named(job):
  _, workdir, _, config, data, mesh = job
  step, state = checkpointed(workdir, config, data, mesh)
  state = state.replace(D=jax.tree.map(lambda x: x * jnp.nan, state.D))
  with Checkpoints(workdir / 'generator' / 'checkpoints') as checkpoints:
    checkpoints.save(step + 4, {'state': state, 'generator': state.G_ema}, dict(metrics={}, seconds=0.))
  config = ConfigDict(config.to_dict())
  config.generator.kimg += 1
  with pytest.raises(NonFiniteError, match=f'loss_g became nan between iterations {step + 4} and {step + 8}'):
    train.train(config, workdir, data, mesh)
  assert load_item(workdir / 'generator' / 'checkpoints', 'generator')[0] == step + 4


# ---- bad input


@pytest.mark.parametrize('changes, count, words', [
    (dict(batch_size=12), 8, 'batch_size=12'),
    (dict(batch_size=24), 8, 'mbstd_group=2 .* set it to 1'),
    (dict(r1_interval=16), 1, 'iterations_per_call=4 is below generator.r1_interval=16'),
    (dict(pl_weight=2., mbstd_group=1, batch_size=8), 8, 'path lengths'),
    (dict(style_mixing=2.), 1, 'style_mixing=2.0'),
    (dict(lr=0.), 1, 'lr=0.0'),
    (dict(r1_gamma=-1.), 1, 'r1_gamma=-1.0'),
])
def test_sizes_that_cannot_work(changes, count, words):
  with pytest.raises(UserError, match=words):
    train.check_config(tiny(**changes), count)


@pytest.mark.parametrize('shape', [(12, 12, 1), (8, 16, 3), (4, 4, 1)])
def test_images_of_another_shape(shape):
  with pytest.raises(UserError, match=f'{shape[0]}x{shape[1]}'):
    train.make_networks(tiny(), shape, 3)


def test_unknown_architecture():
  with pytest.raises(UserError, match="architecture='skip'"):
    train.make_networks(tiny(architecture='skip'), (8, 8, 1), 3)


def test_no_generator_there(tmp_path):
  with pytest.raises(UserError, match='holds no generator'):
    load_generator(tmp_path)
