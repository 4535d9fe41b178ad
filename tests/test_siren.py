"""Networks of sines: of one picture, and of many."""

import math
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from palm_jax.base import devices
from palm_jax.base.errors import UserError
from palm_jax.base.pictures import save_png
from palm_jax.data.arrays import Data, Split
from palm_jax.generator import load_generator, train
from palm_jax.generator.convert import convert
from palm_jax.generator.loaded import LoadedGenerator
from palm_jax.generator.saved import network_fields, network_of
from palm_jax.generator.sines import ModulatedSine, Siren, SirenGenerator, coordinates
from palm_jax.generator.siren import (
  along_waves,
  fit,
  gradients,
  laplacian,
  merge,
  psnr,
  waves_of,
)
from tests import compiler
from tests.jobs import finish
from tests.test_generator_train import COLOURS, tiny

SETTINGS = dict(steps=200, width=48, layers=1, lr=5e-3, batch=512)


def blobs(side=24, shift=0.0):
  """A smooth picture with two channels, (side, side, 2) in [-1, 1]."""
  y, x = coordinates(side, side).reshape(side, side, 2).transpose(2, 0, 1)
  first = np.exp(-8 * ((x - 0.3 + shift) ** 2 + (y + 0.2) ** 2))
  return np.stack([2 * first - 1, np.sin(3 * x + shift) * np.cos(2 * y)], -1).astype(np.float32)


# ---- one picture


def test_coordinates_are_centres_of_pixels():
  grid = coordinates(2, 4).reshape(2, 4, 2)
  np.testing.assert_allclose(grid[:, 0, 0], [-0.5, 0.5])
  np.testing.assert_allclose(grid[0, :, 1], [-0.75, -0.25, 0.25, 0.75])


def test_layers_keep_the_distribution_of_their_values():
  """Sines of normal values of any great spread are spread as sines of uniform angles: variance
  1/2 (arXiv 2006.09661, theorem 1.8)."""
  network = Siren(3, width=256, layers=4)
  x = coordinates(32, 32)
  variables = network.init(jax.random.key(0), x)
  _, seen = network.apply(variables, x, capture_intermediates=True)
  for i in range(1, 5):
    values = np.asarray(seen['intermediates'][f'sine{i}']['__call__'][0])
    assert 0.45 < values.var() < 0.55 and abs(values.mean()) < 0.1, i
  kernels = {name: layer['dense']['kernel'] for name, layer in variables['params'].items()
             if name != 'out'}  # fmt: skip
  for name, kernel in kernels.items():
    limit = 0.5 if name == 'sine0' else math.sqrt(6 / 256) / 30
    assert 0.95 * limit < np.abs(kernel).max() <= limit


def test_derivatives_are_those_of_the_fit():
  """Against central differences of a float64 forward pass in numpy."""
  network = Siren(2, width=32, layers=2)
  x = np.random.default_rng(0).uniform(-1, 1, (50, 2))
  params = network.init(jax.random.key(1), x.astype(np.float32))['params']
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)

  def f(x):
    for i in range(3):
      x = np.sin(30 * (x @ p[f'sine{i}']['dense']['kernel'] + p[f'sine{i}']['dense']['bias']))
    return x @ p['out']['kernel'] + p['out']['bias']

  def along(axis, step):
    return step * np.eye(2)[axis]

  apply = lambda x: network.apply({'params': params}, x)
  x32 = x.astype(np.float32)
  x = x32.astype(np.float64)
  slopes = np.stack([(f(x + along(a, 1e-5)) - f(x - along(a, 1e-5))) / 2e-5 for a in (0, 1)], -1)
  found = np.asarray(jax.jit(lambda x: gradients(apply, x))(x32))
  assert np.abs(found - slopes).max() < 1e-4 * np.abs(slopes).max()
  bends = sum((f(x + along(a, 1e-4)) - 2 * f(x) + f(x - along(a, 1e-4))) / 1e-8 for a in (0, 1))
  found = np.asarray(jax.jit(lambda x: laplacian(apply, x))(x32))
  assert np.abs(found - bends).max() < 1e-3 * np.abs(bends).max()


def test_waves_go_through_the_pixels_and_have_their_slopes():
  """A product of cosines is given back anywhere, with its derivatives in closed form."""
  height, width = 7, 5
  waves = lambda y, x: np.cos(2 * y) * np.cos(3 * x), lambda y, x: 1 + 0 * y * x
  y, x = (
    np.pi * (np.arange(height)[:, None] + 0.5) / height,
    np.pi * (np.arange(width) + 0.5) / width,
  )
  found = waves_of(np.stack([f(y, x) for f in waves], -1))
  places = np.random.default_rng(0).uniform(-1, 1, (20, 2))
  y, x = np.pi * (places.T + 1) / 2
  half = np.pi / 2  # of y in places
  for orders, expected in {
    (0, 0): np.cos(2 * y) * np.cos(3 * x),
    (1, 0): -2 * half * np.sin(2 * y) * np.cos(3 * x),
    (0, 1): -3 * half * np.cos(2 * y) * np.sin(3 * x),
    (2, 0): -((2 * half) ** 2) * np.cos(2 * y) * np.cos(3 * x),
    (0, 2): -((3 * half) ** 2) * np.cos(2 * y) * np.cos(3 * x),
  }.items():
    values = np.asarray(along_waves(found, places.astype(np.float32), orders))
    np.testing.assert_allclose(values[:, 0], expected, atol=1e-4)
    np.testing.assert_allclose(values[:, 1], float(orders == (0, 0)), atol=1e-4)


@pytest.fixture(scope='module')
def of_values():
  return fit(blobs(), **SETTINGS)


def test_values_are_fitted_and_drawn_at_any_size(of_values):
  assert psnr(blobs(), of_values.draw()) > 35
  large = of_values.draw(48, 72)
  assert large.shape == (48, 72, 2)
  y, x = coordinates(48, 72).reshape(48, 72, 2).transpose(2, 0, 1)
  truth = np.sin(3 * x) * np.cos(2 * y)
  assert np.abs(large[..., 1] - truth).max() < 0.2
  with pytest.raises(UserError, match='pixels'):
    of_values.draw(10**6, 10**6)


@pytest.mark.parametrize('of, least', [('gradients', 30), ('laplacian', 15)])
def test_derivatives_alone_give_the_picture(of, least):
  """A Laplacian leaves harmonic functions free, so less of the picture."""
  fitted = fit(blobs(), of=of, **SETTINGS)
  assert psnr(blobs(), fitted.draw()) > least
  np.testing.assert_allclose(fitted.draw().mean((0, 1)), blobs().mean((0, 1)), atol=1e-3)


def test_a_merger_has_the_mean_of_the_gradients():
  a, b = blobs(), blobs(shift=0.6)
  merged = merge(a, b, share=0.25, **SETTINGS).draw()
  assert psnr(0.25 * a + 0.75 * b, merged) > 30
  with pytest.raises(UserError, match='resize one'):
    merge(a, b[1:])
  with pytest.raises(UserError, match='share=2'):
    merge(a, b, share=2)


@pytest.mark.parametrize(
  'changes, words',
  [
    (dict(of='edges'), "of='edges'|of edges"),
    (dict(image=np.zeros((4, 4, 9))), 'a picture of shape'),
    (dict(image=np.zeros((1, 4, 1))), 'a picture of shape'),
    (dict(image=np.zeros((4, 4), np.int64)), 'a picture of int64'),
    (dict(image=np.full((4, 4), 7.0)), 'within -1 and 1'),
    (dict(image=np.full((4, 4), np.nan)), 'within -1 and 1'),
    (dict(steps=0), 'steps=0'),
    (dict(width=0), 'width=0'),
    (dict(lr=math.nan), 'lr=nan'),
  ],
)
def test_what_cannot_be_fitted(changes, words):
  with pytest.raises(UserError, match=words):
    fit(**{'image': blobs(8), **changes})


def test_the_command(tmp_path):
  save_png(tmp_path / 'a.png', ((blobs(16)[..., :1] + 1) * 127).astype(np.uint8))
  command = [sys.executable, '-m', 'palm_jax.generator.siren']
  small = ['--steps=60', '--width=16', '--layers=1']
  run = lambda *args: subprocess.run(
    [*command, *map(str, args)], capture_output=True, text=True, cwd=tmp_path,
    env={'PYTHONPATH': str(pathlib.Path(__file__).parents[1]), 'JAX_PLATFORMS': 'cpu',
         'PATH': '/usr/bin:/bin', 'XLA_FLAGS': compiler.FLAGS},
  )  # fmt: skip
  done = run('a.png', 'out.png', '--of=gradients', '--scale=2.5', *small)
  assert done.returncode == 0, done.stderr
  assert (tmp_path / 'out.png').read_bytes()[16:24] == (40).to_bytes(4, 'big') * 2
  done = run('none.png', 'out2.png', *small)
  assert done.returncode == 2 and done.stderr.count('\n') == 1
  assert 'none.png cannot be read' in done.stderr
  assert not (tmp_path / 'out2.png').exists()


@pytest.mark.slow
@pytest.mark.parametrize('of, least', [('values', 40), ('gradients', 30)])
def test_a_photograph(of, least):
  """Minutes on two cores."""
  camera = pytest.importorskip('skimage.data').camera().reshape(256, 2, 256, 2).mean((1, 3))
  image = camera.astype(np.uint8)
  assert psnr(image, fit(image, of=of).draw()) >= least


# ---- many pictures


@pytest.fixture(scope='module')
def generator():
  network = SirenGenerator(
    z_dim=4, w_dim=5, num_classes=3, resolution=6, width=8, layers=3, image_channels=2
  )
  z, labels = np.zeros((1, 4), np.float32), np.zeros(1, np.int32)
  return LoadedGenerator(network, jax.device_get(network.init(jax.random.key(0), z, labels)))


def latents(count=4):
  return np.random.default_rng(0).normal(size=(count, 4)).astype(np.float32), np.arange(count) % 3


def test_pictures_are_modulated_sines(generator):
  """A forward pass in numpy, float64, from w on."""
  z, labels = latents()
  network = generator.network
  ws: np.ndarray = np.asarray(network.apply(generator.variables, z, labels, method='mapping'))
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), generator.variables['params'])
  x = np.broadcast_to(coordinates(12, 12), (4, 144, 2)).astype(np.float64)
  for i, w0 in enumerate((math.pi * 6 / 4, 30, 30)):
    layer, fan_in = p[f'sines_{i}'], x.shape[-1]
    limit = 0.5 if i == 0 else math.sqrt(6 / 8) / 30
    film = ws[:, i] @ layer['affine']['kernel'] / math.sqrt(5) + layer['affine']['bias']
    y = x @ (layer['kernel'] * limit) + layer['bias'] / math.sqrt(fan_in)
    x = np.sin(w0 * (1 + film[:, None, :8] / 2) * y + film[:, None, 8:])
  values = x @ p['to_rgb']['kernel'] / math.sqrt(8) + p['to_rgb']['bias']
  expected = values.reshape(4, 6, 2, 6, 2, 2).mean((2, 4))
  with jax.default_matmul_precision('highest'):
    images = np.asarray(generator(z, labels))
  assert images.shape == (4, 6, 6, 2) == (4, *generator.image_shape)
  assert np.abs(images - expected).max() < 1e-5 * np.ptp(expected)


def test_any_size_is_the_same_function(generator):
  """At twice the size a pixel is one point, and averaged down the picture is the small one."""
  z, labels = latents()
  large = np.asarray(generator(z, labels, size=12))
  np.testing.assert_allclose(
    large.reshape(4, 6, 2, 6, 2, 2).mean((2, 4)), generator(z, labels), atol=1e-5
  )
  assert np.abs(np.diff(large[:, 0, :2], axis=1)).max() > 0.01
  assert generator(z, labels, size=5).shape == (4, 5, 5, 2)
  with pytest.raises(UserError, match='from 1 to'):
    generator(z, labels, size=0)
  with pytest.raises(UserError, match='only networks of sines'):
    load_generator('cifar10-small')(np.zeros((1, 64), np.float32), np.zeros(1, int), size=64)


def test_half_precision(generator):
  z, labels = latents()
  exact = np.asarray(generator(z, labels))
  half = np.asarray(generator.with_dtype(jnp.bfloat16)(z, labels))
  assert half.dtype == np.float32
  assert 0 < np.sqrt(np.mean((half - exact) ** 2)) < 0.1 * exact.std()


def test_half_precision_keeps_coordinates():
  """Points that differ in the tenth bit are two to the first layer."""
  layer = ModulatedSine(4, True, 30.0, jnp.bfloat16)
  x = jnp.array([[[511 / 512, 0.0], [509 / 512, 0.0]]])
  w = jnp.zeros((1, 3))
  variables = layer.init(jax.random.key(0), x, w)
  exact = ModulatedSine(4, True, 30.0, None).apply(variables, x, w)
  np.testing.assert_allclose(layer.apply(variables, x, w), exact, atol=0.01)
  assert np.abs(exact[0, 0] - exact[0, 1]).max() > 0.02


def test_fields(generator, tmp_path):
  fields = network_fields(generator.network)
  assert network_of(fields) == generator.network
  damaged = dict(layers=10**6), dict(width=10**9), dict(network='x'), dict(unknown=1)
  for wrong in (*damaged, dict(resolution=32768, samples=2), dict(resolution=0)):
    with pytest.raises((KeyError, TypeError, ValueError)):
      network_of(fields | wrong)


def test_a_training_and_what_it_leaves(tmp_path):
  """The job of StyleGAN2 trains it; classes get their colours, at any size."""
  labels = np.random.default_rng(0).integers(0, 3, 90)
  images = np.broadcast_to(COLOURS[labels][:, None, None], (90, 8, 8, 3)).copy()
  split = Split(images, labels)
  data = Data(split, split, ('red', 'green', 'blue'), 'three colours')
  settings = tiny(
    network='siren', sine_layers=2, sine_width=16, kimg=3.2, style_mixing=0.5, augment='none'
  )
  config = ConfigDict(dict(seed=1, generator=settings))
  finish(train.JOB, config, tmp_path / 'run', data, devices.make_mesh(1))
  loaded = load_generator(tmp_path / 'run')
  assert isinstance(loaded.network, SirenGenerator)
  z = jax.random.normal(jax.random.key(5), (30, 8))
  drawn = np.asarray(loaded(z, jnp.arange(30) % 3, size=16))
  means = np.stack([drawn[c::3].clip(-1, 1).mean((0, 1, 2)) for c in range(3)])
  assert np.abs(means - (COLOURS / 127.5 - 1)).max() < 0.5, means
  convert(tmp_path / 'run', tmp_path / 'x.safetensors')
  file = load_generator(tmp_path / 'x.safetensors')
  assert file.network == loaded.network
  np.testing.assert_allclose(file(z, jnp.arange(30) % 3, size=16), drawn, atol=0.1)
