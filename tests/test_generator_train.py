"""The generator's job: settings and their checks, data order, stopping and resuming, starting from
trained networks."""

import functools
import math
import os
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from ml_collections import ConfigDict

from configs import generator as presets
from palm_jax.base import devices
from palm_jax.base.checkpoints import Checkpoints, load_item
from palm_jax.base.errors import NonFiniteError, UserError
from palm_jax.base.metrics import read_jsonl
from palm_jax.data.arrays import Data, Split
from palm_jax.generator import load_generator, samples, train
from palm_jax.generator.saved import save_safetensors
from palm_jax.generator.snapshots import load_discriminator, load_snapshot
from palm_jax.generator.warm_start import load_networks

COLOURS = np.array([[230, 40, 40], [40, 230, 40], [40, 40, 230]], np.uint8)
from tests.jobs import finish


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
      batch_size=16,
      lr=0.01,
      r1_gamma=0.1,
      r1_interval=4,
      pl_interval=2,
      ema_kimg=0.5,
      augment='color',
      ada_interval=3,
      ada_kimg=50.0,
      ada_target=0.0,
      iterations_per_call=4,
      snapshot_kimg=0.5,
      checkpoint_minutes=60.0,
    )
  )
  config.update(changes)
  return config


def test_batch_indices_walk_through_whole_epochs():
  walk = samples.batch_indices(3, 0, 70, 20)
  for epoch in range(3):
    assert sorted(walk[epoch * 20 :][:20]) == list(range(20))
  assert not np.array_equal(walk[:20], walk[20:40])
  pieces = [samples.batch_indices(3, start, 7, 20) for start in range(0, 70, 7)]
  np.testing.assert_array_equal(np.concatenate(pieces), walk)
  assert not np.array_equal(samples.batch_indices(4, 0, 70, 20), walk)


def test_the_walk_covers_both_copies_once_an_epoch():
  """What the job asks for with mirror on: 40 images, of which those from 40 on are the flipped
  ones."""
  walk = samples.batch_indices(3, 0, 160, 80)
  for epoch in range(2):
    first = walk[epoch * 80 :][:80]
    assert sorted(first) == list(range(80)) and sorted(first % 40) == sorted([*range(40)] * 2)


# ---- the job


@pytest.fixture(scope='module', autouse=True)
def one_program():
  """Runs that differ in their length only share what is compiled: tracing alone takes seconds."""
  make, made = train.make_train_call, {}

  def shared(config, G, D, mesh):
    fields = {name: value for name, value in config.items() if name != 'kimg'}
    key = repr((fields, G, D, mesh))
    return made.setdefault(key, made.get(key) or make(config, G, D, mesh))

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(train, 'make_train_call', shared)
    yield


@pytest.fixture(scope='module')
def job(tmp_path_factory):
  """A run that SIGTERM stopped and that was resumed, and the same in one go: workdirs, result,
  config, data, mesh."""
  rng, stopped, whole = (
    np.random.default_rng(0),
    tmp_path_factory.mktemp('stopped'),
    tmp_path_factory.mktemp('whole'),
  )
  labels = rng.integers(0, 3, 90)
  images = np.broadcast_to(COLOURS[labels][:, None, None], (90, 8, 8, 3)).copy()
  data = Data(
    Split(images, labels), Split(images, labels), ('red', 'green', 'blue'), 'three colours'
  )
  config, mesh = ConfigDict(dict(seed=1, generator=tiny(kimg=1e6))), devices.make_mesh(2)

  def stop():
    deadline = time.monotonic() + 300
    while not list((stopped / 'generator').glob('samples/*.png')) and time.monotonic() < deadline:
      time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)

  watcher = threading.Thread(target=stop)
  watcher.start()
  assert finish(train.JOB, config, stopped, data, mesh) is None
  watcher.join()
  step = load_item(stopped / 'generator' / 'checkpoints', 'generator')[0]
  config.generator.kimg = max(step + 20, 240) * 16 / 1000
  result = finish(train.JOB, config, stopped, data, mesh)
  assert step < result['iterations']
  finish(train.JOB, config, whole, data, mesh)
  return stopped, whole, result, config, data, mesh


def template_of(config, image_shape, num_classes, mesh):
  G, D = train.make_networks(config, image_shape, num_classes)
  shapes = jax.eval_shape(lambda key: train.init_state(config, G, D, key), jax.random.key(0))
  everywhere = jax.NamedSharding(mesh, jax.P())
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), shapes)


def checkpointed(workdir, config, data, mesh):
  template = template_of(config.generator, (8, 8, 3), 3, mesh)
  return load_item(workdir / 'generator' / 'checkpoints', 'state', template=template)


def test_resuming_is_exact(job):
  stopped, whole, _, *rest = job
  (step, a), (other_step, b) = checkpointed(stopped, *rest), checkpointed(whole, *rest)
  assert step == other_step
  assert jax.random.key_data(a.key).tolist() == jax.random.key_data(b.key).tolist()
  jax.tree.map(np.testing.assert_array_equal, a.replace(key=0), b.replace(key=0))


def test_the_generator_that_is_kept_is_the_average(job):
  _, state = checkpointed(job[0], *job[3:])
  kept = load_generator(job[0]).variables
  jax.tree.map(np.testing.assert_array_equal, kept, state.G_ema)
  apart = jax.tree.map(lambda a, b: np.abs(a - b).max(), state.G, state.G_ema)
  assert max(jax.tree.leaves(apart)) > 1e-4


def test_augmentation_is_part_of_a_resumed_run(job):
  """p has moved, and there are signs from after its last move."""
  stopped, result = job[0], job[2]
  _, state = checkpointed(stopped, *job[3:])
  rows = read_jsonl(stopped / 'generator' / 'metrics.jsonl')
  assert max(row['augment_p'] for row in rows) > 0
  assert result['metrics']['augment_p'] == rows[-1]['augment_p'] == state.augment_p
  assert (state.sign_count > 0) == (int(state.step) % 3 > 0)


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
  means = np.stack([images[c::3].clip(-1, 1).mean((0, 1, 2)) for c in range(3)])
  assert np.abs(means - (COLOURS / 127.5 - 1)).max() < 0.5, means


def test_result_and_pictures(job):
  stopped, _, result, config, _, _ = job
  assert result['images'] == result['iterations'] * 16 >= config.generator.kimg * 1000
  assert result['settings']['z_dim'] == 8 and result['data'] == 'three colours'
  assert all(math.isfinite(value) for value in result['metrics'].values())
  assert (stopped / 'results' / 'generator.json').is_file()
  for name in ('real.png', f'samples/{result["images"] // 1000:06d}.png'):
    assert (stopped / 'generator' / name).is_file()


def test_nan_stops_the_job_and_is_named(job):
  _, workdir, _, config, data, mesh = job
  step, state = checkpointed(workdir, config, data, mesh)
  state = state.replace(D=jax.tree.map(lambda x: x * jnp.nan, state.D))
  with Checkpoints(workdir / 'generator' / 'checkpoints') as checkpoints:
    checkpoints.save(
      step + 4, {'state': state, 'generator': state.G_ema}, dict(metrics={}, seconds=0.0)
    )
  config = ConfigDict(config.to_dict())
  config.generator.kimg += 1
  with pytest.raises(
    NonFiniteError, match=f'loss_g became nan between iterations {step + 4} and {step + 8}'
  ):
    finish(train.JOB, config, workdir, data, mesh)
  assert load_item(workdir / 'generator' / 'checkpoints', 'generator')[0] == step + 4


# ---- starting from trained networks


@pytest.mark.slow
def test_a_run_starts_from_the_networks_of_another(job, tmp_path):
  stopped, _, _, config, data, mesh = job
  _, before = checkpointed(stopped, config, data, mesh)
  config = ConfigDict(config.to_dict())
  config.generator.update(
    dict(init_from=str(stopped), lr=1e-9, kimg=4 * 16 / 1000, augment='none', r1_gamma=0.0)
  )
  finish(train.JOB, config, tmp_path, data, mesh)
  step, after = checkpointed(tmp_path, config, data, mesh)
  assert step == 4 == int(after.opt_g[0].count) and after.augment_p == 0
  same = lambda a, b: jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6), a, b
  )
  same(after.G['params'], before.G['params'])
  same(after.D, before.D)
  # G_ema starts from that of the other run, and not from a copy of G.
  decay = 0.5 ** (16 / 500)
  expected = jax.tree.map(
    lambda now, old: now + decay**4 * (old - now), before.G['params'], before.G_ema['params']
  )
  same(after.G_ema['params'], expected)
  apart = jax.tree.map(lambda a, b: np.abs(a - b).max(), after.G_ema['params'], before.G['params'])
  assert max(jax.tree.leaves(apart)) > 1e-3


@pytest.mark.slow
def test_a_new_discriminator_learns_alone_at_first(job, tmp_path):
  """A generator's file has no D: G stays as it is for the first of four iterations, or for all."""
  stopped, _, _, config, data, mesh = job
  generator = load_generator(stopped)
  save_safetensors(
    tmp_path / 'g.safetensors', generator.network, generator.variables, 'a test', np.float32
  )
  config = ConfigDict(config.to_dict())
  for alone, changed in ((4, False), (2, True)):
    config.generator.update(
      dict(
        init_from=str(tmp_path / 'g.safetensors'),
        d_alone_kimg=alone * 16 / 1000,
        kimg=4 * 16 / 1000,
      )
    )
    finish(train.JOB, config, tmp_path / str(changed), data, mesh)
    state = checkpointed(tmp_path / str(changed), config, data, mesh)[1]
    apart = jax.tree.map(
      lambda x, y: np.abs(x - y).max(), state.G['params'], generator.variables['params']
    )
    assert (max(jax.tree.leaves(apart)) > 1e-4) == changed
    assert (int(state.opt_g[0].count) > 0) == changed and int(state.opt_d[0].count) >= 4


@pytest.fixture(scope='module')
def official(shared):
  """A snapshot's path, its G and D with variables, and the template of a State of their sizes."""
  path = shared / 'fixtures' / 'stylegan2' / 'a_tiny_cond32.nosrc.pkl'
  G, variables = load_snapshot(path, 'G')
  D, d_variables = load_discriminator(path)
  config = tiny(
    z_dim=G.z_dim,
    w_dim=G.w_dim,
    mapping_layers=G.mapping_layers,
    channel_base=32 * G.channels[-1],
    channel_max=max(G.channels),
    d_mapping_layers=D.mapping_layers,
  )
  template = template_of(config, G.image_shape, G.num_classes, devices.make_mesh(2))
  return path, variables, d_variables, template


def test_networks_of_a_snapshot(official):
  """The official file's tensors arrive where the state has them, for D as for both G."""
  path, variables, d_variables, template = official
  mesh = devices.make_mesh(2)
  networks = load_networks(path, template)
  jax.tree.map(np.testing.assert_array_equal, networks['G'], variables)
  jax.tree.map(np.testing.assert_array_equal, networks['D'], d_variables['params'])
  assert jax.tree.leaves(networks['G_ema'])[0].sharding == jax.NamedSharding(mesh, jax.P())
  with pytest.raises(UserError, match=r'G has .* of shape .*, this config .*: set the sizes'):
    load_networks(path, template_of(tiny(), (8, 8, 3), 3, mesh))


def test_networks_of_other_peoples_files(official, tmp_path, monkeypatch):
  """D is taken where there is one, whatever the file's kind; G_ema stands in for an absent G."""
  path, variables, d_variables, template = official
  monkeypatch.setenv('HOME', str(tmp_path))
  with np.load(path.with_name('a_tiny_cond32.params.npz')) as file:
    arrays = {name: x for name, x in file.items() if name.split('/')[0] in ('G', 'G_ema', 'D')}
  of = lambda *names: {k: x for k, x in arrays.items() if k.split('/')[0] in names}
  same = functools.partial(jax.tree.map, np.testing.assert_array_equal)

  safetensors.numpy.save_file(arrays, tmp_path / 'all.safetensors')
  networks = load_networks('~/all.safetensors', template)
  same(networks['G'], variables)
  same(networks['D'], d_variables['params'])

  np.savez(tmp_path / 'both.npz', **of('G', 'G_ema'))
  networks = load_networks(tmp_path / 'both.npz', template)
  assert networks.keys() == {'G', 'G_ema'}
  same(networks['G'], variables)

  np.savez(tmp_path / 'average.npz', **of('G_ema'))
  networks = load_networks(tmp_path / 'average.npz', template)
  assert networks.keys() == {'G', 'G_ema'}
  same(networks['G'], networks['G_ema'])

  damaged = arrays | {'D/b4.out.bias': np.full_like(arrays['D/b4.out.bias'], np.nan)}
  np.savez(tmp_path / 'damaged.npz', **damaged)
  with pytest.raises(UserError, match='damaged.npz: b4.out.bias holds NaN'):
    load_networks(tmp_path / 'damaged.npz', template)


def test_networks_of_another_size(job):
  stopped, _, _, config, _, mesh = job
  config = ConfigDict(config.generator.to_dict())
  config.w_dim = 4
  with pytest.raises(
    UserError, match=f'init_from={stopped} is no run with networks of this size.*w_avg|kernel'
  ):
    load_networks(stopped, template_of(config, (8, 8, 3), 3, mesh))


# ---- pictures


def test_truncated_pictures_are_alike(job):
  """At 0 every latent is the average one: all pictures are the same, of whichever class."""
  generator = load_generator(job[0])
  draw = jax.jit(
    lambda psi: train.sample_images(generator.network, generator.variables, jax.random.key(1), psi)
  )
  full, none = draw(1.0), draw(0.0)
  assert full.shape == (3, 10, 8, 8, 3) and full.dtype == np.uint8
  assert (none == none[:1, :1]).all() and not (full == full[:, :1]).all()


def test_pictures_that_are_drawn_a_few_at_a_time_are_the_same(job):
  generator = load_generator(job[0])
  draw = lambda at_once: jax.jit(
    lambda: train.sample_images(
      generator.network, generator.variables, jax.random.key(1), at_once=at_once
    )
  )()
  whole, few = (np.asarray(draw(n), int) for n in (None, 4))
  assert np.abs(whole - few).max() <= 1  # of rounding


def test_real_pictures_stand_as_generated_ones_do():
  numbers = lambda count, channels: (
    np.arange(count, dtype=np.uint8)[:, None, None, None] * np.ones((8, 8, channels), np.uint8)
  )
  make = lambda shape, num_classes: train.make_networks(tiny(), shape, num_classes)[0]
  labels = np.repeat([0, 1, 2], [40, 4, 56])
  shown = train.real_images(numbers(100, 3), labels, make((8, 8, 3), 3))[:, :, 0, 0, 0]
  assert (
    shown.shape == (3, 10)
    and shown[0].tolist() == [*range(0, 40, 4)]
    and (labels[shown[2]] == 2).all()
  )
  assert shown[1].tolist() == [40, 41, 42, 43] + [0] * 6  # no more of its class
  shown = train.real_images(numbers(100, 4), labels, make((8, 8, 4), 0))
  assert shown.shape == (10, 2, 8, 8, 4) and len(np.unique(shown)) == 20
  G = make((8, 8, 4), 0)
  variables = jax.jit(G.init)(
    jax.random.key(0), np.zeros((1, G.z_dim), np.float32), np.zeros(1, np.int32)
  )
  drawn = jax.jit(lambda: train.sample_images(G, variables, jax.random.key(1)))()
  assert (
    drawn.shape == (10, 2, 8, 8, 4)
    and len(np.unique(np.asarray(drawn).reshape(20, -1), axis=0)) == 20
  )


# ---- presets

PRESETS = {
  'cifar': ((32, 32, 3), 10),
  'paper256': ((256, 256, 3), 0),
  'auto64': ((64, 64, 3), 0),
  'atari': ((96, 96, 4), 0),
  'digits': ((8, 8, 1), 10),
}


@pytest.mark.parametrize('variant', PRESETS)
def test_presets_build_at_full_size(variant):
  (image_shape, num_classes), config = PRESETS[variant], presets.get_config(variant)
  assert config.jobs == ('generator',)
  train.check_config(config.generator, 1)
  G, D = train.make_networks(config.generator, image_shape, num_classes)
  state = jax.eval_shape(
    lambda key: train.init_state(config.generator, G, D, key), jax.random.key(0)
  )

  count = config.generator.mbstd_group

  def judged(state):
    labels, keys = jnp.zeros(count, jnp.int32), jax.random.split(state.key, count)
    images = G.apply(state.G, jnp.zeros((count, G.z_dim)), labels, noise='random', noise_keys=keys)
    return images, D.apply({'params': state.D}, images, labels)

  images, logits = jax.eval_shape(judged, state)
  assert images.shape == (count, *image_shape) and logits.shape == (count,)
  if variant == 'cifar':  # of the original's own networks
    sizes = [sum(x.size for x in jax.tree.leaves(tree)) for tree in (state.G['params'], state.D)]
    assert sizes == [20_215_315, 23_089_664]


def test_values_of_presets():
  """Of stylegan2-ada-pytorch's train.py, worked out by hand for --cfg=auto."""

  def values(variant, *names):
    return [presets.get_config(variant).generator[name] for name in names]

  names = (
    'batch_size',
    'mbstd_group',
    'channel_base',
    'lr',
    'r1_gamma',
    'ema_kimg',
    'mapping_layers',
    'pl_weight',
  )
  np.testing.assert_allclose(values('auto64', *names), [32, 4, 16384, 0.0025, 0.0256, 10, 2, 2])
  np.testing.assert_allclose(values('auto256', *names), [16, 4, 16384, 0.0025, 0.8192, 5, 2, 2])
  np.testing.assert_allclose(values('auto256x8', *names), [64, 4, 16384, 0.0025, 0.2048, 20, 2, 2])
  np.testing.assert_allclose(values('auto1024x8', *names), [32, 4, 32768, 0.002, 6.5536, 10, 2, 2])
  np.testing.assert_allclose(values('paper256', *names), [64, 8, 16384, 0.0025, 1, 20, 8, 2])
  np.testing.assert_allclose(values('cifar', *names), [64, 32, 32768, 0.0025, 0.01, 500, 2, 0])
  assert values('cifar', 'augment', 'architecture', 'style_mixing', 'kimg') == [
    'bgc',
    'orig',
    0,
    100_000,
  ]
  train.check_config(presets.get_config('auto1024x8').generator, 8)
  with pytest.raises(UserError, match='auto0 is unknown'):
    presets.get_config('auto0')
  with pytest.raises(UserError, match='auto4096 is unknown.*resolutions are 8 to 2048'):
    presets.get_config('auto4096')


# ---- bad input


@pytest.mark.parametrize(
  'changes, count, words',
  [
    (dict(batch_size=12), 8, 'batch_size=12'),
    (dict(batch_size=24), 8, 'mbstd_group=2 .* set it to 1'),
    (dict(r1_interval=16), 1, 'iterations_per_call=4 is below generator.r1_interval=16'),
    (dict(pl_weight=2.0, mbstd_group=1, batch_size=8), 8, 'path lengths'),
    (dict(d_alone_kimg=1.0, kimg=1.0), 1, 'd_alone_kimg=1.0 of generator.kimg=1.0'),
    (dict(style_mixing=2.0), 1, 'style_mixing=2.0'),
    (dict(lr=0.0), 1, 'lr=0.0'),
    (dict(r1_gamma=-1.0), 1, 'r1_gamma=-1.0'),
    (dict(augment='flip'), 1, "augment='flip' is unknown: choose .*bgc"),
    (dict(dtype='float16'), 1, "dtype='float16' is unknown .*choose one of float32, bfloat16"),
    (dict(architecture='skip'), 1, "architecture='skip'"),
    (dict(accumulate=3), 1, 'accumulate=3 does not divide the 16 images'),
    (dict(accumulate=0), 1, 'accumulate=0 is not positive'),
    (
      dict(accumulate=8, pl_weight=2.0, mbstd_group=1),
      2,
      'pl_weight=2.0: path lengths take half of the 1 images',
    ),
    (dict(accumulate=4, mbstd_group=3), 1, 'mbstd_group=3 does not divide the 4 images'),
    (dict(mbstd_group=0), 1, 'mbstd_group=0'),
    (dict(base_size=0), 1, 'base_size=0'),
    (dict(ada_target=1.5), 1, 'ada_target=1.5'),
    (dict(ada_interval=0), 1, 'ada_interval=0'),
    (dict(ada_kimg=0.0), 1, 'ada_kimg=0.0'),
    (dict(truncation_psi=-0.1), 1, 'truncation_psi=-0.1'),
  ],
)
def test_sizes_that_cannot_work(changes, count, words):
  with pytest.raises(UserError, match=words):
    train.check_config(tiny(**changes), count)


@pytest.mark.parametrize(
  'base_size, shape',
  [(4, (12, 12, 1)), (4, (8, 16, 3)), (4, (4, 4, 1)), (3, (8, 8, 1)), (16, (8, 8, 1))],
)
def test_images_of_another_shape(base_size, shape):
  with pytest.raises(
    UserError, match=f'{shape[0]}x{shape[1]}: with generator.base_size={base_size}'
  ):
    train.make_networks(tiny(base_size=base_size), shape, 3)


def test_no_generator_there(tmp_path):
  with pytest.raises(UserError, match='holds no generator'):
    load_generator(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize('num_devices', [1, 2])
def test_a_streamed_set_is_the_one_in_memory(tmp_path, num_devices):
  """Bit for bit, flipped copies and rounds included."""
  rng = np.random.default_rng(0)
  labels = rng.integers(0, 3, 50)
  images = rng.integers(0, 256, (50, 8, 8, 3), np.uint8)
  data = Data(Split(images, labels), Split(images, labels), ('a', 'b', 'c'), 'noise')
  mesh, states = devices.make_mesh(num_devices), []
  for where in ('device', 'host'):
    changes = dict(kimg=0.192, mirror=True, accumulate=2, data_on=where)
    config = ConfigDict(dict(seed=1, generator=tiny(**changes)))
    finish(train.JOB, config, tmp_path / where, data, mesh)
    states.append(checkpointed(tmp_path / where, config, data, mesh)[1].replace(key=0))
  assert int(states[0].step) == 12
  jax.tree.map(np.testing.assert_array_equal, *states)
