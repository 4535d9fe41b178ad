"""Iterations of StyleGAN2's training: losses, optimisers, moving average, rounds, augmentation,
precision, devices."""

import contextlib
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from palm_jax.base import devices
from palm_jax.generator import losses, phases, samples, step, train

BATCH = 32


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
  config.update(
    dict(
      z_dim=8,
      w_dim=8,
      mapping_layers=1,
      channel_base=64,
      channel_max=8,
      conv_clamp=0.0,
      d_mapping_layers=0,
      mbstd_group=2,
      batch_size=BATCH,
      lr=0.01,
      r1_gamma=0.1,
      r1_interval=4,
      pl_interval=2,
      ema_kimg=0.5,
      augment='none',
      iterations_per_call=4,
    )
  )
  config.update(changes)
  return config


# ---- losses


def test_losses_are_cross_entropies_of_the_logits():
  real, fake = np.array([2.0, -1.0, 0.0]), np.array([-3.0, 1.5, 0.5])
  sigmoid = lambda x: 1 / (1 + np.exp(-x))
  np.testing.assert_allclose(
    losses.generator_loss(jnp.asarray(fake)), -np.log(sigmoid(fake)).mean(), rtol=1e-6
  )
  np.testing.assert_allclose(
    losses.discriminator_loss(jnp.asarray(real), jnp.asarray(fake)),
    -np.log(sigmoid(real)).mean() - np.log(1 - sigmoid(fake)).mean(),
    rtol=1e-6,
  )


def test_r1_is_the_squared_slope():
  rng = np.random.default_rng(0)
  images, slope = rng.normal(size=(3, 4, 4, 2)), rng.normal(size=(4, 4, 2))
  linear, logits = losses.r1_penalty(lambda x: (x * slope).sum((1, 2, 3)) + 5, jnp.asarray(images))
  np.testing.assert_allclose(logits, (images * slope).sum((1, 2, 3)) + 5, rtol=1e-5)
  np.testing.assert_allclose(linear, np.full(3, (slope**2).sum()), rtol=1e-5)

  # Samples see each other, as in the minibatch statistic: the derivative is of the sum of all
  # logits.
  f = lambda x, xp: xp.tanh((x * slope).sum((1, 2, 3))) * x.std(0).sum()
  wanted, h = np.zeros(3), 1e-5
  for at in np.ndindex(images.shape):
    change = np.zeros_like(images)
    change[at] = h
    wanted[at[0]] += ((f(images + change, np).sum() - f(images - change, np).sum()) / (2 * h)) ** 2
  np.testing.assert_allclose(
    losses.r1_penalty(lambda x: f(x, jnp), jnp.asarray(images))[0], wanted, rtol=1e-4
  )


def test_path_lengths_of_a_linear_synthesis():
  rng = np.random.default_rng(0)
  jacobian, ws, y = (
    rng.normal(size=(3, 5, 4, 4, 2)),
    rng.normal(size=(6, 3, 5)),
    rng.normal(size=(6, 4, 4, 2)),
  )
  lengths = losses.path_lengths(
    lambda w: jnp.einsum('nlk,lkhwc->nhwc', w, jacobian), jnp.asarray(ws), jnp.asarray(y)
  )
  products = np.einsum('nhwc,lkhwc->nlk', y / 4, jacobian)  # 4 = sqrt(4 * 4 pixels)
  np.testing.assert_allclose(lengths, np.sqrt((products**2).sum(2).mean(1)), rtol=1e-5)


def test_path_length_mean_moves_first_and_carries_gradient():
  lengths, pl_mean = np.array([1.0, 3.0]), 0.0
  for wanted in (0.02, 0.02 + 0.01 * (2 - 0.02)):
    penalty, pl_mean = losses.path_length_penalty(jnp.asarray(lengths), pl_mean)
    np.testing.assert_allclose(pl_mean, wanted, rtol=1e-6)
    np.testing.assert_allclose(penalty, (lengths - wanted) ** 2, rtol=1e-6)
  slope = jax.grad(lambda x: losses.path_length_penalty(x, 1.0)[0].mean())(jnp.asarray(lengths))
  mean = 1 + 0.01 * (2 - 1)
  by_hand = (lengths - mean) - (lengths - mean).sum() * 0.01 / 2
  np.testing.assert_allclose(slope, by_hand, rtol=1e-5)


# ---- optimiser, moving average


@pytest.mark.parametrize('network', ['G', 'D'])
def test_adam_is_shared_and_corrected(network):
  """Against Adam as in torch, written out; G has no second kind of step because path lengths are
  off."""
  config = train.default_config()
  interval, regularised = {'G': (4, False), 'D': (16, True)}[network]
  rng, share = np.random.default_rng(0), interval / (interval + 1)
  x, v, count = np.array([1.0, -2.0]), np.zeros(2), 0
  optimizer = phases.make_optimizers(config)['GD'.index(network)]
  with jax.enable_x64(True):
    params = jnp.asarray(x)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for iteration in range(33):
      for _ in range(1 + (regularised and iteration % interval == 0)):
        gradient = rng.normal(size=2) * 10.0 ** rng.integers(-6, 3)
        count += 1
        b2 = 0.99**share
        v = b2 * v + (1 - b2) * gradient**2
        x = x - 0.0025 * share * gradient / (np.sqrt(v / (1 - b2**count)) + 1e-8)
        change, state = update(jnp.asarray(gradient), state, params)
        params = optax.apply_updates(params, change)
    np.testing.assert_allclose(params, x, rtol=1e-12)


def test_the_average_waits_while_d_learns_alone():
  G = dict(params={'w': jnp.ones(3)}, buffers={'w_avg': jnp.ones(2)})
  before = dict(params={'w': jnp.zeros(3)}, buffers={'w_avg': jnp.zeros(2)})
  config = tiny(d_alone_kimg=2 * BATCH / 1000, ema_rampup=0.0)
  for done, moves in ((0, False), (1, False), (2, True)):
    state = step.State(
      **{field: None for field in step.State.__dataclass_fields__}
      | dict(G=G, G_ema=before, step=jnp.int32(done))
    )
    after = step.average_generator(config, state).G_ema
    assert (after['params']['w'][0] > 0) == (after['buffers']['w_avg'][0] == 1) == moves


def test_ema_decay_ramps_up():
  config = train.default_config()
  for done, half_life in ((0, 1e-8), (1, 64 * 0.05), (10_000, 32_000.0), (10**6, 500_000.0)):
    np.testing.assert_allclose(
      step.ema_decay(config, jnp.int32(done)), 0.5 ** (64 / half_life), rtol=1e-5
    )
  assert step.ema_decay(config, jnp.int32(0)) == 0


def test_no_ramp_where_training_starts_from_trained_networks():
  for changes in (dict(ema_rampup=0.0), dict(init_from='elsewhere')):
    np.testing.assert_allclose(
      step.ema_decay(tiny(**changes), jnp.int32(0)), 0.5 ** (BATCH / 500), rtol=1e-6
    )


# ---- the compiled call


def in_float64(tree):
  return jax.tree.map(
    lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
  )


@functools.cache
def data():
  rng = np.random.default_rng(0)
  return rng.integers(0, 256, (40, 8, 8, 1), np.uint8), rng.integers(0, 3, 40).astype(np.int32)


@functools.cache
def first_state():
  """float64, numpy, half augmented."""
  config = tiny()
  G, D = train.make_networks(config, (8, 8, 1), 3)
  with double_precision():
    state = jax.jit(lambda key: in_float64(step.init_state(config, G, D, key)).replace(key=0))(
      jax.random.key(0)
    )
    return jax.device_get(state.replace(augment_p=0.5 + state.augment_p))


@pytest.mark.parametrize(
  'name, seen', [('g_main', 'loss_g'), ('d_main', 'logits_real logits_fake'), ('r1', 'r1')]
)
def test_all_that_d_judges_is_augmented(name, seen):
  config, mesh = tiny(augment='color', iterations_per_call=1), devices.make_mesh(1)
  G, D = train.make_networks(config, (8, 8, 1), 3)
  _, phase = phases.make_phases(config, G, D, 1)[name]
  whole = jax.jit(jax.shard_map(phase, mesh=mesh, in_specs=jax.P(), out_specs=jax.P()))
  single = lambda x: np.asarray(x, np.float32) if x.dtype == np.float64 else x
  state = jax.tree.map(single, first_state().replace(key=np.int32(0)))
  indices = np.arange(BATCH, dtype=np.int32)

  def found(p):
    at = state.replace(key=jax.random.key(1), augment_p=np.float32(p))
    return jax.device_get(whole(at, *data(), indices)[1])

  off, on = found(0), found(1)
  for metric in seen.split():
    assert abs(on[metric] - off[metric]) > 1e-3 * abs(off[metric]), metric


def iterate(config, mesh, call, states, count):
  """(states around each of `count` iterations after `states`, their metrics), numpy."""
  metrics, training_set, set_size = [], devices.replicate(mesh, data()), 80 if config.mirror else 40
  state = devices.replicate(mesh, states[-1].replace(key=jax.random.key(1)))
  for _ in range(count):
    at = int(states[-1].step) * BATCH
    indices = devices.replicate(mesh, samples.batch_indices(0, at, BATCH, set_size)[None])
    state, metric = call(state, *training_set, indices)
    states = [*states, jax.device_get(state.replace(key=0))]
    metrics.append(jax.device_get(metric))
  return states, metrics


def compiled(config, count):
  """A function from a state and a number of iterations to what `iterate` returns, in float64 on
  `count` devices."""
  mesh = devices.make_mesh(count)
  train.check_config(config, count)
  call = step.make_train_call(config, *train.make_networks(config, (8, 8, 1), 3), mesh)

  def run(state, iterations):
    with double_precision():
      return iterate(config, mesh, call, [state], iterations)

  return run


@functools.cache
def everything(count):
  """Five iterations with everything on, on `count` devices; and the function that made them."""
  run = compiled(
    tiny(
      pl_weight=2.0,
      style_mixing=0.5,
      mirror=True,
      accumulate=2,
      augment='blit',
      ada_interval=3,
      ada_kimg=1.0,
    ),
    count,
  )
  return *run(first_state(), 5), run


@pytest.mark.parametrize('count', [pytest.param(n, marks=pytest.mark.slow) for n in (2, 8)])
def test_any_number_of_devices_computes_the_same(count):
  for wanted, got in zip(
    jax.tree.leaves(everything(1)[:2]), jax.tree.leaves(everything(count)[:2]), strict=True
  ):
    np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=1e-9)
  states = everything(count)[0]
  moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), states[0].D, states[-1].D)
  assert min(jax.tree.leaves(moved)) > 1e-3


@pytest.mark.slow
def test_gradient_norms_do_not_grow_with_devices():
  for name in ('grad_norm_g', 'grad_norm_pl', 'grad_norm_d', 'grad_norm_r1'):
    one, eight = (everything(count)[1][0][name] for count in (1, 8))
    assert one > 1e-3
    np.testing.assert_allclose(eight, one, rtol=1e-9)


def test_moving_average_by_hand():
  average = None
  for i, state in enumerate(everything(1)[0][1:]):
    if i == 0:
      average = state.G['params']
    decay = 0.5 ** (BATCH / min(500.0, i * BATCH * 0.05)) if i else 0.0
    average = jax.tree.map(
      lambda old, new, d=decay: d * old + (1 - d) * new, average, state.G['params']
    )
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14),
      state.G_ema['params'],
      average,
    )
    jax.tree.map(np.testing.assert_array_equal, state.G_ema['buffers'], state.G['buffers'])
    if i == 0:
      jax.tree.map(np.testing.assert_array_equal, state.G_ema, state.G)


def test_first_steps_have_the_corrected_length():
  """Adam without momentum moves by lr * share * sign(gradient) at first; G makes two steps in this
  iteration, D two."""
  before, after = everything(1)[0][:2]
  for old, new, share in (
    (before.G['params'], after.G['params'], 2 / 3),
    (before.D, after.D, 4 / 5),
  ):
    moved = max(jax.tree.leaves(jax.tree.map(lambda a, b: np.abs(a - b).max(), old, new)))
    assert 0.01 * share < moved < 0.01 * share * (1 + math.sqrt(2) * 1.01)


def test_lazy_phases_run_when_they_should():
  states, metrics, _ = everything(1)
  assert [m['r1'] > 0 for m in metrics] == [True, False, False, False, True]
  assert [m['pl'] > 0 for m in metrics] == [True, False, True, False, True]
  assert [int(s.opt_d[0].count) for s in states] == [0, 2, 3, 4, 5, 7]
  assert [int(s.opt_g[0].count) for s in states] == [0, 2, 3, 5, 6, 8]
  pl_means = [s.pl_mean for s in states]
  assert (np.diff(pl_means) != 0).tolist() == [True, False, True, False, True]


# ---- augmentation


def test_signs_are_gathered_until_p_moves():
  states, metrics, _ = everything(1)
  assert [int(s.sign_count) for s in states] == [0, 2, 3, 0, 1, 3]  # Dmain each time, R1 at 0 and 4
  assert [s.augment_p == states[0].augment_p for s in states] == [
    True,
    True,
    True,
    False,
    False,
    False,
  ]
  assert [m['augment_p'] for m in metrics] == [s.augment_p for s in states[1:]]
  np.testing.assert_allclose(states[4].sign_sum, metrics[3]['sign_real'], rtol=1e-12)
  np.testing.assert_allclose(
    (states[2].sign_sum - states[1].sign_sum), metrics[1]['sign_real'], rtol=1e-12
  )


def test_p_follows_the_signs_of_d():
  """A D that is sure of one answer: the label's map is made all ones and the last bias large."""
  states, _, run = everything(1)
  jump = BATCH * 3 / 1000

  def sure(state, bias):
    D = jax.tree.map(np.copy, state.D)
    D['mapping']['embed'] = dict(
      kernel=0 * D['mapping']['embed']['kernel'], bias=1 + 0 * D['mapping']['embed']['bias']
    )
    D['b4']['out']['bias'] = bias + 0 * D['b4']['out']['bias']
    return state.replace(D=D)

  up = run(sure(states[0], 1000.0), 6)[0]
  np.testing.assert_allclose(
    [s.augment_p for s in up], 0.5 + jump * np.array([0, 0, 0, 1, 1, 1, 2]), rtol=1e-12
  )
  down = run(sure(up[-1].replace(augment_p=np.float64(1.5 * jump)), -1000.0), 6)[0]
  np.testing.assert_allclose(
    [s.augment_p for s in down], jump * np.array([1.5, 1.5, 1.5, 0.5, 0.5, 0.5, 0]), atol=1e-12
  )


# ---- rounds and precision


@functools.cache
def plain(**changes):
  """Two iterations on one device without path lengths and augmentation."""
  return compiled(tiny(**changes), 1)(first_state(), 2)


@pytest.mark.slow
def test_two_rounds_have_the_gradients_of_one():
  """Groups of D's statistic are the same samples; only the latents' average moves once a round."""
  for whole, rounds in zip(
    *(plain(**changes)[0] for changes in ({}, dict(accumulate=2))), strict=True
  ):
    strip = lambda s: s.replace(G=s.G['params'], G_ema=s.G_ema['params'])
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9),
      strip(whole),
      strip(rounds),
    )
  for whole, rounds in zip(plain()[1], plain(accumulate=2)[1], strict=True):
    assert whole.keys() == rounds.keys()
    for name in whole:
      np.testing.assert_allclose(rounds[name], whole[name], rtol=1e-9, err_msg=name)


@pytest.mark.slow
def test_latents_average_moves_every_round():
  """0 -> m at first, by the share .005; four rounds in an iteration of G and D, of nearly the same
  means."""
  one, two = (changed[0][1].G['buffers']['w_avg'] for changed in (plain(), plain(accumulate=2)))
  ratio = np.linalg.norm(two) / np.linalg.norm(one)
  np.testing.assert_allclose(ratio, (1 - 0.995**4) / (1 - 0.995**2), rtol=0.05)


@pytest.mark.slow
def test_bfloat16_is_near_and_stays_out_of_the_state():
  exact, rough = plain(), plain(dtype='bfloat16')
  assert [np.asarray(x).dtype for x in jax.tree.leaves(exact)] == [
    np.asarray(x).dtype for x in jax.tree.leaves(rough)
  ]
  changed = False
  for name in ('loss_g', 'loss_d', 'r1', 'grad_norm_g', 'grad_norm_d', 'grad_norm_r1'):
    np.testing.assert_allclose(rough[1][0][name], exact[1][0][name], rtol=0.03, err_msg=name)
    changed |= abs(rough[1][0][name] / exact[1][0][name] - 1) > 1e-6
  assert changed
  for optimizer in ('opt_g', 'opt_d'):
    sizes = [
      np.sqrt(
        np.concatenate([x.ravel() for x in jax.tree.leaves(getattr(states[1], optimizer)[0].nu)])
      )
      for states, _ in (exact, rough)
    ]  # of the first gradients
    assert np.linalg.norm(sizes[1] - sizes[0]) < 0.05 * np.linalg.norm(sizes[0])


@pytest.mark.slow
def test_nothing_is_drawn_without_augmentation():
  states = plain()[0]
  assert {float(s.augment_p) for s in states} == {0.5} and {
    float(s.sign_count) for s in states
  } == {0.0}
  assert 'augment_p' not in plain()[1][0]


# ---- flipped copies


def test_mirroring_is_training_on_flipped_copies_too():
  """R1's step over both copies, against the same places of a set that holds them: the same to the
  last bit."""
  (images, labels), places = data(), np.arange(4, 80, 80 // BATCH, dtype=np.int32)[:BATCH]
  mesh, results = devices.make_mesh(1), []
  doubled = np.concatenate([images, images[:, :, ::-1]]), np.concatenate([labels, labels])
  for mirror, training_set in ((True, (images, labels)), (False, doubled)):
    config = tiny(mirror=mirror)
    phase = phases.make_phases(config, *train.make_networks(config, (8, 8, 1), 3), 1)['r1'][1]
    call = jax.jit(jax.shard_map(phase, mesh=mesh, in_specs=jax.P(), out_specs=jax.P()))
    state = first_state().replace(key=jax.random.key(1))
    state = jax.tree.map(lambda x: x.astype(np.float32) if x.dtype == np.float64 else x, state)
    state, metrics = call(*devices.replicate(mesh, (state, *training_set, places)))
    assert (state.augment_p, state.sign_count) == (0.5, 0)  # nothing is drawn, nothing is gathered
    results.append(jax.device_get((state.D, metrics)))
  assert (places >= 40).any() and (places < 40).any()
  jax.tree.map(np.testing.assert_array_equal, *results)


# ---- weights of what is done now and then, and mixed styles


def on_one_device(f, *arguments):
  mesh = devices.make_mesh(1)
  call = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=jax.P(), out_specs=jax.P()))
  return call(*devices.replicate(mesh, arguments))


def single(state):
  return jax.tree.map(lambda x: x.astype(np.float32) if x.dtype == np.float64 else x, state)


@pytest.mark.parametrize(
  'name, penalty, changes, weight',
  [
    ('r1', 'r1', dict(r1_gamma=0.3, r1_interval=4), 0.3 / 2 * 4),
    ('path_lengths', 'pl', dict(pl_weight=2.0, pl_interval=3), 2.0 * 3),
  ],
)
def test_what_is_rarely_done_weighs_so_much_more(monkeypatch, name, penalty, changes, weight):
  """arXiv 1912.04958, appendix B; stylegan2-ada-pytorch training/loss.py."""
  update = phases.update

  def told(*arguments):  # the loss in the place of the gradient's norm
    new = update(*arguments)
    return new._replace(grad_norm=new.loss)

  monkeypatch.setattr(phases, 'update', told)
  config, (images, labels) = tiny(**changes), data()
  phase = phases.make_phases(config, *train.make_networks(config, (8, 8, 1), 3), 1)[name][1]
  state = single(first_state()).replace(key=jax.random.key(1))
  places = np.arange(BATCH, dtype=np.int32)
  _, metrics = on_one_device(phase, state, images, labels, places)
  assert metrics[penalty] > 0
  np.testing.assert_allclose(metrics[f'grad_norm_{penalty}'], weight * metrics[penalty], rtol=1e-5)


def test_mixed_styles_are_of_two_latents_from_one_layer_on():
  config, count, (_, labels) = tiny(style_mixing=1.0), 24, data()
  G, D = train.make_networks(config, (8, 8, 1), 3)
  setup = phases.Setup(config, G, D, 1, BATCH, 2, None, None, ())
  params, buffers = single(first_state()).G['params'], single(first_state()).G['buffers']
  ids = np.arange(count)
  found = on_one_device(
    lambda key, params, buffers: phases.map_fakes(
      setup, params, buffers, key, ids, jnp.asarray(labels)
    )[:2],
    jax.random.key(3),
    params,
    buffers,
  )
  ws, classes = found
  _, key = jax.random.split(jax.random.key(3))
  keys = jax.vmap(lambda i: jax.random.split(jax.random.fold_in(key, i), 4))(ids)
  latents = lambda keys: jax.vmap(lambda k: jax.random.normal(k, (8,)))(keys)
  mapped = [
    np.asarray(
      G.apply(dict(params=params, buffers=buffers), latents(keys[:, i]), classes, method='mapping')
    )
    for i in (1, 2)
  ]
  is_first, is_second = (np.isclose(ws, w, atol=1e-5).all(-1) for w in mapped)  # (n, num_ws)
  assert not (is_first & is_second).any() and (is_first | is_second).all()
  cutoffs = is_first.sum(1)
  assert (is_first == (np.arange(G.num_ws) < cutoffs[:, None])).all()
  assert len(set(cutoffs)) == 1 and 1 <= cutoffs[0] < G.num_ws
