"""StyleGAN3 against arrays of the official implementation, and random networks against a float64
forward pass with inserted zeros."""

import copy
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view

from palm_jax.base.errors import UserError
from palm_jax.formats.torch_files import read, state_dict
from palm_jax.generator import load_generator, ops3
from palm_jax.generator.convert import convert
from palm_jax.generator.official3 import stylegan3_from_official
from palm_jax.generator.saved import network_fields, network_of
from palm_jax.generator.views import style_mixed, w_latents
from tests import snapshot_files as files
from tests.test_snapshots import Reference, clamped, correlate, lrelu


@pytest.fixture(autouse=True)
def highest_precision():
  with jax.default_matmul_precision('highest'):
    yield


def error(images, expected):
  """Largest difference, in parts of the range."""
  images, expected = np.asarray(images), np.asarray(expected)
  assert images.shape == expected.shape
  return np.abs(images - expected).max() / np.ptp(expected)


# ---- the forward pass in float64: images (C, H, W), one sample at a time


def resampled(x, taps, up=1, down=1, padding=(0, 0, 0, 0)):
  c, h, w = x.shape
  spread = np.zeros((c, h * up, w * up))
  spread[:, ::up, ::up] = x
  left, right, top, bottom = padding
  rows, columns = ((max(a, 0), max(b, 0)) for a, b in ((top, bottom), (left, right)))
  spread = np.pad(spread, [(0, 0), rows, columns])
  h, w = spread.shape[1:]
  spread = spread[:, max(-top, 0) : h + min(bottom, 0), max(-left, 0) : w + min(right, 0)]
  taps = np.ones(1) if taps is None else np.asarray(taps, np.float64)
  kernel = taps if taps.ndim == 2 else np.outer(taps, taps)
  windows = sliding_window_view(spread, kernel.shape, axis=(1, 2))
  return up**2 * np.einsum('chwkl,kl->chw', windows, kernel[::-1, ::-1])[:, ::down, ::down]


def filtered(x, bias, up_filter, down_filter, up, down, padding, clamp, activate=lrelu):
  x = resampled(x + bias[:, None, None], up_filter, up, 1, padding)
  return resampled(clamped(activate(x), clamp), down_filter, 1, down)


class Reference3(Reference):
  """What a `Builder` drew, and the attributes of its generator -> images."""

  def __init__(self, builder, generator):
    super().__init__(builder.tensors, builder.conv_clamp, builder.lr_multiplier)
    synthesis = generator.state['_modules']['synthesis'].state
    self.scale = synthesis['output_scale']
    self.layers = {name: synthesis['_modules'][name].state for name in synthesis['layer_names']}

  def features(self, w, size, rate=4.0, bandwidth=1.0):
    t = {n.removeprefix('synthesis.input.'): x for n, x in self.t.items()}
    cos, sin, *shift = self.dense('synthesis.input.affine', w)
    length = np.hypot(cos, sin)
    turn, move = np.eye(3), np.eye(3)
    turn[:2, :2] = np.array([[cos, -sin], [sin, cos]]) / length
    move[:2, 2] = -np.array(shift) / length
    matrix = turn @ move @ t['transform']
    phases = t['phases'] + t['freqs'] @ matrix[:2, 2]
    freqs = t['freqs'] @ matrix[:2, :2]
    high = (np.linalg.norm(freqs, axis=1) - bandwidth) / (rate / 2 - bandwidth)
    centres = ((2 * np.arange(size) + 1) / size - 1) * 0.5 * size / rate
    y, x = np.meshgrid(centres, centres, indexing='ij')
    angles = np.multiply.outer(freqs[:, 0], x) + np.multiply.outer(freqs[:, 1], y)
    waves = np.sin(2 * np.pi * (angles + phases[:, None, None]))
    waves *= np.clip(1 - high, 0, 1)[:, None, None]
    return np.einsum('oi,ihw->ohw', t['weight'], waves) / np.sqrt(len(freqs))

  def layer(self, name, x, w, state):
    style, weight = self.dense(f'{name}.affine', w), self.t[f'{name}.weight']
    if state['is_torgb']:
      weight = weight * style[:, None, None] / np.sqrt(weight[0].size)
    else:
      weight = weight / np.sqrt((weight**2).mean((1, 2, 3), keepdims=True))
      weight = weight * style[:, None, None] / np.sqrt((style**2).mean())
      weight = weight / np.sqrt((weight**2).sum((1, 2, 3), keepdims=True) + 1e-8)
    pad = weight.shape[2] - 1
    x = np.pad(x, [(0, 0), (pad, pad), (pad, pad)])
    x = correlate(x, weight / np.sqrt(self.t[f'{name}.magnitude_ema']))
    return filtered(
      x,
      self.t[f'{name}.bias'],
      self.t.get(f'{name}.up_filter'),
      self.t.get(f'{name}.down_filter'),
      up=state['up_factor'],
      down=state['down_factor'],
      padding=state['padding'],
      clamp=self.clamp,
      activate=(lambda x: x) if state['is_torgb'] else lrelu,
    )

  def image(self, z, c, psi=1.0, cutoff=None):
    w, w_avg = self.mapping(z, c), self.t['mapping.w_avg']
    ws = np.tile(w, (len(self.layers) + 1, 1))
    ws[:cutoff] = w_avg + psi * (ws[:cutoff] - w_avg)
    x = self.features(ws[0], next(iter(self.layers.values()))['in_size'][0])
    for w, (name, state) in zip(ws[1:], self.layers.items(), strict=True):
      x = self.layer(f'synthesis.{name}', x, w, state)
    return self.scale * x.transpose(1, 2, 0)


# ---- filters


@pytest.mark.parametrize(
  'up, down, padding, up_taps, down_shape',
  [
    (1, 1, (0, 0, 0, 0), None, None),
    (2, 2, (3, 2, 4, 1), 6, (6,)),
    (4, 2, (-3, -2, -1, 2), 12, (6, 6)),
    (1, 4, (5, 1, 0, 6), 4, (5,)),
    (2, 1, (-1, 3, 2, -2), 5, None),
    (4, 4, (9, 3, -6, 7), None, (3, 3)),
  ],
)
def test_filtered_leaky_relu(up, down, padding, up_taps, down_shape, monkeypatch):
  rng = np.random.default_rng(0)
  x, bias = rng.normal(size=(2, 7, 6, 3)), rng.normal(size=3)
  up_filter = rng.normal(size=up_taps) if up_taps else None
  down_filter = rng.normal(size=down_shape) if down_shape else None
  settings = dict(up=up, down=down, padding=padding, clamp=1.5)
  args = [None if a is None else a.astype(np.float32) for a in (x, bias, up_filter, down_filter)]
  expected = [
    filtered(a, bias, up_filter, down_filter, **settings) for a in x.transpose(0, 3, 1, 2)
  ]
  expected = np.stack(expected).transpose(0, 2, 3, 1)
  apply = functools.partial(ops3.filtered_leaky_relu, **settings)
  assert error(jax.jit(apply)(*args), expected) < 1e-6
  lengths = up_taps or 1, down_shape[0] if down_shape else 1
  assert expected.shape[1:3] == (
    ops3.output_size(7, up, down, padding[2:], *lengths),
    ops3.output_size(6, up, down, padding[:2], *lengths),
  )
  # Elsewhere than on CPU all pictures are computed at once.
  monkeypatch.setattr(ops3, 'platform', lambda: 'gpu')
  if (up, down) == (4, 2):
    assert error(jax.jit(lambda *args: apply(*args))(*args), expected) < 1e-6


# ---- networks of strangers

NETWORKS = {
  'T, conditional': (
    dict(conv_clamp=1.5),
    dict(
      z_dim=5,
      w_dim=6,
      c_dim=3,
      layers=((4, 8, 2, 2, False), (5, 12, 4, 2, False), (4, 9, 2, 2, True)),
      image_channels=3,
    ),
  ),
  'R, unconditional, grey': (
    dict(lr_multiplier=0.001),
    dict(
      z_dim=7,
      w_dim=5,
      c_dim=0,
      layers=((3, 9, 2, 2, False), (4, 9, 4, 4, False), (3, 10, 2, 1, True)),
      image_channels=1,
      kernel=1,
      radial=True,
      mapping_layers=1,
      output_scale=0.5,
    ),
  ),
}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp('networks')


@functools.cache
def built(name, folder):
  """(path of a snapshot, LoadedGenerator, Reference3, its compiled `apply`)."""
  settings, sizes = NETWORKS[name]
  builder = files.Builder(1, **settings)
  generator = builder.generator3(**sizes)
  path = folder / f'{name[0]}.pkl'
  path.write_bytes(files.pickled(dict(G_ema=generator)))
  loaded = load_generator(path)
  return path, loaded, Reference3(builder, generator), jax.jit(loaded.apply)


@pytest.fixture
def small(folder):
  return built('T, conditional', folder)


def latents(loaded, count=3):
  z = np.random.default_rng(0).normal(size=(count, loaded.z_dim)).astype(np.float32)
  return z, np.arange(count) % max(loaded.num_classes, 1)


@pytest.mark.parametrize('name', NETWORKS)
def test_strangers_networks(name, folder):
  _, loaded, reference, draw = built(name, folder)
  z, labels = latents(loaded)
  one_hot = np.eye(max(loaded.num_classes, 1))[labels]
  assert loaded.network.num_ws == 5
  for psi, cutoff in ((1.0, 5), (0.6, 2)):  # both are traced
    expected = np.stack([reference.image(*x, psi, cutoff) for x in zip(z, one_hot, strict=True)])
    images = draw(loaded.variables, z, labels, psi, cutoff)
    assert images.shape[1:] == loaded.image_shape and images.dtype == np.float32
    assert error(images, expected) < 1e-5
  if reference.clamp:  # it matters
    reference = copy.copy(reference)
    reference.clamp = None
    assert error(reference.image(z[0], one_hot[0], 0.6, 2), expected[0]) > 0.01


def test_a_picture_does_not_depend_on_the_others(small):
  _, loaded, _, draw = small
  z, labels = latents(loaded)
  images = np.asarray(draw(loaded.variables, z, labels, 1.0, 5))
  others = np.asarray(draw(loaded.variables, z * [[1], [30], [-30]], labels, 1.0, 5))
  np.testing.assert_array_equal(images[0], others[0])
  assert error(images[1:], others[1:]) > 0.01


def test_bfloat16(small):
  _, loaded, _, draw = small
  z, labels = latents(loaded)
  images = jax.jit(loaded.with_dtype(jnp.bfloat16).__call__)(z, labels)
  assert images.dtype == np.float32
  expected = np.asarray(draw(loaded.variables, z, labels, 1.0, 5))
  assert 1e-4 < np.sqrt(((images - expected) ** 2).mean()) / expected.std() < 0.05


def test_noise_has_no_effect(small):
  _, loaded, _, _ = small
  ws = np.zeros((1, 5, 6), np.float32)
  keys = jax.random.split(jax.random.key(0), 1)

  def program(*noise):
    synthesis = lambda ws: loaded.network.apply(loaded.variables, ws, *noise, method='synthesis')
    return str(jax.make_jaxpr(synthesis)(ws))

  assert program() == program('none') == program('random') == program('random', keys)
  with pytest.raises(UserError, match="noise 'loud': expected one of const, random, none"):
    program('loud')


def test_other_views(small):
  _, loaded, _, _ = small
  z, labels = np.zeros((2, 6), np.float32), np.zeros(2, np.int32)
  for view in (w_latents(loaded, 60), style_mixed(loaded, 2)):
    x = z[:, : view.z_dim]
    assert jax.eval_shape(view.apply, view.variables, x, labels, 0.7).shape == (2, 9, 9, 3)


# ---- the description of a network as JSON


def test_fields_as_json(small):
  network = small[1].network
  fields = json.loads(json.dumps(network_fields(network)))
  assert network_of(fields) == network and hash(network_of(fields)) == hash(network)


def test_forms_of_ours(small, tmp_path):
  """A folder keeps each bit; a file of half precision keeps those of the waves."""
  path, loaded, _, draw = small
  convert(path, tmp_path / 'out')
  folder = load_generator(tmp_path / 'out')
  assert folder.network == loaded.network
  jax.tree.map(np.testing.assert_array_equal, folder.variables, loaded.variables)
  convert(path, tmp_path / 'out.safetensors')
  file = load_generator(tmp_path / 'out.safetensors')
  assert file.network == loaded.network
  z, labels = latents(loaded)
  assert error(draw(file.variables, z, labels), draw(loaded.variables, z, labels)) < 0.01
  with pytest.raises(UserError, match='class averages are of StyleGAN2 only'):
    convert(path, tmp_path / 'no.safetensors', class_averages=True)


def layer_field(index, value):
  """Changes a field of the second layer."""

  def change(fields):
    fields['layers'][1][index] = value

  return change


@pytest.mark.parametrize(
  'change',
  [
    dict(z_dim=0),
    dict(w_dim=10**9),
    dict(num_classes=-1),
    dict(mapping_layers=1000),
    dict(mapping_layers=True),
    dict(layers=[]),
    dict(layers=3),
    dict(layers=[[1, 2]]),
    dict(sampling_rate=2.0),
    dict(bandwidth=float('nan')),
    dict(output_scale='x'),
    dict(unknown=1),
    *(layer_field(i, x) for i in range(13) for x in (-1, 'x', [1])),
    *(layer_field(i, 10**9) for i in range(12)),
  ],
)
def test_damaged_fields(change, small):
  fields = json.loads(json.dumps(network_fields(small[1].network)))
  if callable(change):
    change(fields)
  else:
    fields |= change
  with pytest.raises((KeyError, TypeError, ValueError)):
    network_of(fields)


# ---- networks that ours is not, and damage


def fresh(name='T, conditional'):
  settings, sizes = NETWORKS[name]
  return files.Builder(1, **settings).generator3(**sizes)


def part(module, path):
  for name in path.split('.') if path else ():
    module = module.state['_modules'][name]
  return module


def refusal(module, folder):
  """The message of a generator that a snapshot would hold."""
  path = folder / 'x.pkl'
  path.write_bytes(files.pickled(dict(G_ema=module)))
  with pytest.raises(UserError) as caught:
    load_generator(path)
  message = str(caught.value)
  assert message.isprintable() and len(message) < 400
  return message


FIRST, SECOND, LAST = 'synthesis.L0_8_4', 'synthesis.L1_12_5', 'synthesis.L3_9_3'


@pytest.mark.parametrize(
  'place, attribute, value, words',
  [
    ('', 'z_dim', 6, 'the generator has z_dim=6, expected 5'),
    ('', 'img_resolution', 32, 'img_resolution=32, expected 9'),
    ('', 'num_ws', 6, 'num_ws=6, expected 5'),
    ('mapping', 'num_layers', 3, 'mapping has num_layers=3, expected 2'),
    ('mapping', 'num_ws', 4, 'mapping has num_ws=4, expected 5'),
    ('mapping.fc0', 'activation', 'relu', "fc0 has activation='relu', expected lrelu"),
    ('mapping.fc1', 'weight_gain', 0.5, 'fc1 has weight_gain=0.5, expected 0.004'),
    ('mapping.fc1', 'bias_gain', 0, 'fc1 has bias_gain=0, expected a positive number'),
    ('mapping.embed', 'activation', 'lrelu', "embed has activation='lrelu', expected linear"),
    ('synthesis', 'output_scale', 'x', "output_scale='x', expected a positive number"),
    ('synthesis', 'layer_names', ['L0'], "layer_names=['L0'], expected ['L0_8_4', 'L1_12_5'"),
    ('synthesis', 'num_layers', 4, 'num_layers=4, expected 3'),
    ('synthesis.input', 'size', np.array([8, 9]), 'size=[8 9], expected the same width and height'),
    ('synthesis.input', 'size', np.array([9, 9]), 'size=[9 9], expected 8'),
    ('synthesis.input', 'channels', 4, 'channels=4, expected 5'),
    ('synthesis.input', 'sampling_rate', 8.0, 'in_sampling_rate=4.0, expected 8.0'),
    ('synthesis.input', 'bandwidth', 3.0, 'in_cutoff=1.0, expected 3.0'),
    ('synthesis.input.affine', 'bias_gain', 2, 'input.affine has bias_gain=2, expected 1'),
    (f'{FIRST}.affine', 'weight_gain', 1.0, 'affine has weight_gain=1.0, expected 0.408'),
    (FIRST, 'padding', [9, 8, 9, 9], 'out_size=8, expected 14 by its in_size'),
    (FIRST, 'padding', [9, 8], 'padding=[9, 8], expected four integers'),
    (FIRST, 'up_factor', 4, 'tmp_sampling_rate=8.0, expected 16.0'),
    (FIRST, 'down_factor', 1, 'tmp_sampling_rate=8.0, expected 4.0'),
    (FIRST, 'up_factor', 10**9, 'tmp_sampling_rate=8.0'),
    (FIRST, 'up_taps', 7, 'out_size=8, expected'),
    (FIRST, 'down_taps', 10**6, 'down_taps=1000000, expected 1 to 128'),
    (FIRST, 'down_radial', True, 'has shape (6,) in our layout, expected (6, 6)'),
    ('synthesis.L2_9_4', 'down_radial', True, 'down_radial=True, expected False'),
    (FIRST, 'is_critically_sampled', 'no', "is_critically_sampled='no', expected True or False"),
    (FIRST, 'is_torgb', True, 'L0_8_4 has is_torgb=True, expected False'),
    (LAST, 'is_torgb', False, 'L3_9_3 has is_torgb=False, expected True'),
    (FIRST, 'conv_kernel', 1, 'out_size=8, expected'),
    (FIRST, 'conv_clamp', -1.0, 'conv_clamp=-1.0, expected a positive number'),
    (FIRST, 'conv_clamp', ((),), 'conv_clamp=a tuple, expected a positive number'),
    (FIRST, 'in_channels', 10**9, 'in_channels=1000000000, expected 1 to 65536'),
    (SECOND, 'in_channels', 7, 'in_channels=7 and in_size=8, expected 4 and 8'),
    (SECOND, 'in_sampling_rate', 2.0, 'L1_12_5 has in_sampling_rate=2.0, expected 4.0'),
    (SECOND, 'in_cutoff', 2.0, 'L1_12_5 has in_cutoff=2.0, expected 1.0'),
    (SECOND, 'in_half_width', 1.0, 'L1_12_5 has in_half_width=1.0, expected 2.0'),
    (SECOND, 'w_dim', 7, 'L1_12_5 has w_dim=7, expected 6'),
  ],
)
def test_attributes_that_ours_does_not_have(place, attribute, value, words, tmp_path):
  module = fresh()
  part(module, place).state[attribute] = value
  assert words in refusal(module, tmp_path)
  del part(module, place).state[attribute]
  assert f'{attribute}=' in refusal(module, tmp_path)


def new_class(place, name):
  return lambda module: setattr(part(module, place), 'class_name', name)


def without(place, kind, name):
  return lambda module: part(module, place).state[kind].pop(name)


def tensor(place, kind, name, value):
  value = None if value is None else files.Tensor(np.asarray(value, np.float32))
  return lambda module: part(module, place).state[kind].update({name: value})


@pytest.mark.parametrize(
  'change, words',
  [
    (new_class('mapping', 'Mapping'), "mapping is a 'Mapping', which is not part"),
    (new_class(FIRST, 'training.x.ToRGBLayer'), f"{FIRST} is a 'training.x.ToRGBLayer'"),
    (without('', '_modules', 'mapping'), 'mapping is missing'),
    (without('synthesis', '_modules', 'input'), 'no G_ema in it'),
    (without(FIRST, '_modules', 'affine'), f'{FIRST}.affine is missing'),
    (without('mapping', '_modules', 'fc0'), 'mapping.fc0.weight is missing'),
    (without('mapping', '_buffers', 'w_avg'), 'mapping.w_avg is missing'),
    (without(FIRST, '_buffers', 'up_filter'), 'L0_8_4.up_filter is missing'),
    (without('mapping.fc1', '_parameters', 'bias'), 'fc1.bias is missing'),
    (tensor(FIRST, '_buffers', 'up_filter', np.ones(5)), 'up_filter has shape (5,)'),
    (tensor(LAST, '_buffers', 'up_filter', np.ones(6)), 'expected no such tensor'),
    (tensor(FIRST, '_buffers', 'magnitude_ema', 0), 'magnitude_ema is 0.0, expected a positive'),
    (tensor(FIRST, '_buffers', 'magnitude_ema', np.nan), 'magnitude_ema holds NaN'),
    (tensor(FIRST, '_parameters', 'weight', np.ones((4, 5, 3))), 'weight has shape (3, 5, 4)'),
    (tensor('mapping.fc0', '_parameters', 'weight', np.ones(5)), 'expected 2 axes'),
    (tensor('mapping.fc0', '_parameters', 'weight', np.ones((6, 2))), 'fc0 has weight_gain'),
    (tensor('mapping.fc0', '_parameters', 'weight', None), 'mapping.fc0.weight is missing'),
    (lambda m: m.state['_init_kwargs'].update(c_dim=4), 'c_dim is 4, but its tensors say 3'),
  ],
)
def test_parts_that_ours_does_not_have(change, words, tmp_path):
  module = fresh()
  change(module)
  assert words in refusal(module, tmp_path)


def test_names_of_classes_with_their_module(tmp_path):
  module = fresh()
  part(module, FIRST).class_name = 'training.networks_stylegan3.SynthesisLayer'
  (tmp_path / 'x.pkl').write_bytes(files.pickled(module))
  module = read(tmp_path / 'x.pkl')
  network, _ = stylegan3_from_official(state_dict(module), module)
  assert network.layer_names == ('L0_8_4', 'L1_12_5', 'L2_9_4', 'L3_9_3')
  with pytest.raises(UserError, match=r'give the \.pkl snapshot instead'):
    stylegan3_from_official(state_dict(module), None)


# ---- arrays of the official implementation


@pytest.mark.parametrize('name', ['t_cond32', 'r_uncond32'])
def test_official_images(name, shared):
  folder = shared / 'fixtures' / 'stylegan3'
  module = read(folder / f'{name}.nosrc.pkl')['G_ema']
  network, variables = stylegan3_from_official(state_dict(module), module)

  @jax.jit
  def draw(z, c, psi, cutoff):
    settings = dict(truncation_psi=psi, truncation_cutoff=cutoff)
    ws = network.apply(variables, z, c, method='mapping', **settings)
    drawn = network.apply(variables, ws, method='synthesis', capture_intermediates=True)
    return ws, drawn[0], drawn[1]['intermediates']['synthesis_network']

  with np.load(folder / f'{name}.npz') as arrays:
    z, c, every = arrays['z'], arrays['c'], network.num_ws
    ws, images, layers = draw(z, c, 1.0, every)
    assert error(ws, arrays['ws_psi1']) < 1e-5 and error(images, arrays['img_psi1']) < 1e-5
    names = {'x_input': 'input'}
    names |= {f'x_{i:02}_{layer}': layer for i, layer in enumerate(network.layer_names)}
    for key, layer in names.items():
      found = np.moveaxis(np.asarray(layers[layer]['__call__'][0][:1]), -1, 1)
      assert error(found, arrays[key]) < 1e-5, layer
    ws, images, _ = draw(z, c, 0.7, every)
    assert error(ws, arrays['ws_psi0.7']) < 1e-5 and error(images, arrays['img_psi0.7']) < 1e-5
    assert error(draw(z, c, 0.5, 3)[1], arrays['img_psi.5_cut3']) < 1e-5
