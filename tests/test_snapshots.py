"""Other people's networks: official arrays, and random networks against a float64 forward pass
written from the papers.

That pass takes one kernel a sample (the grouped form) and convolutions with inserted zeros, unlike
the package.
"""

import json
import os
import pathlib
import pickle
import subprocess
import sys
import tracemalloc
import zipfile

import chex
import jax
import numpy as np
import pytest
import safetensors.numpy
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image

from palm_jax import generator as generators
from palm_jax.base.errors import UserError
from palm_jax.formats.kinds import SnapshotError
from palm_jax.generator import load_generator, network_fields, save_safetensors
from palm_jax.generator.convert import convert
from palm_jax.generator.sample import latent_walk, sample
from palm_jax.generator.saved import NETWORK_KEY
from palm_jax.generator.snapshots import load_discriminator, load_snapshot
from tests import snapshot_files as files
from tests.worlds import COMPILED

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def highest_precision():
  with jax.default_matmul_precision('highest'):
    yield


# ---- the forward pass in float64: images (C, H, W), one sample at a time


def correlate(x, kernel):
  """Valid correlation: (I, H, W), (O, I, k, k) -> (O, H', W')."""
  return np.einsum('ihwkl,oikl->ohw', sliding_window_view(x, kernel.shape[2:], axis=(1, 2)), kernel)


def upfirdn(x, up=1, down=1, pad=(0, 0), gain=1.0):
  spread = np.zeros((x.shape[0], x.shape[1] * up, x.shape[2] * up))
  spread[:, ::up, ::up] = x
  spread = np.pad(spread, [(0, 0), pad, pad])
  kernel = (np.outer([1, 3, 3, 1], [1, 3, 3, 1]) / 64 * gain)[::-1, ::-1]
  return np.einsum('ihwkl,kl->ihw', sliding_window_view(spread, (4, 4), axis=(1, 2)), kernel)[
    :, ::down, ::down
  ]


def transposed(x, kernel):
  """Transposed convolution of stride 2: (I, n, n), (O, I, 3, 3) -> (O, 2n + 1, 2n + 1)."""
  n = x.shape[1]
  y = np.zeros((kernel.shape[0], 2 * n + 1, 2 * n + 1))
  for a in range(3):
    for b in range(3):
      y[:, a : a + 2 * n : 2, b : b + 2 * n : 2] += np.einsum('ihw,oi->ohw', x, kernel[:, :, a, b])
  return y


def lrelu(x):
  return np.where(x < 0, 0.2 * x, x) * np.sqrt(2)


def clamped(x, limit):
  return x if limit is None else np.clip(x, -limit, limit)


class Reference:
  """{name: array} -> images and logits."""

  def __init__(self, tensors, conv_clamp=None, lr_multiplier=0.01):
    self.t = {name.lstrip('.'): np.asarray(x, np.float64) for name, x in tensors.items()}
    self.clamp, self.lr_multiplier = conv_clamp, lr_multiplier

  def dense(self, name, x, multiplier=1.0):
    weight, bias = self.t[f'{name}.weight'], self.t[f'{name}.bias']
    return x @ weight.T * (multiplier / np.sqrt(weight.shape[1])) + bias * multiplier

  def mapping(self, z, c):
    parts = [] if z is None else [z / np.sqrt((z**2).mean() + 1e-8)]
    if 'mapping.embed.weight' in self.t:
      y = self.dense('mapping.embed', c)
      parts.append(y / np.sqrt((y**2).mean() + 1e-8))
    x, i = np.concatenate(parts), 0
    while f'mapping.fc{i}.weight' in self.t:
      x, i = lrelu(self.dense(f'mapping.fc{i}', x, self.lr_multiplier)), i + 1
    return x

  def style_layer(self, name, x, w, up):
    style, weight = self.dense(f'{name}.affine', w), self.t[f'{name}.weight']
    weight = weight * style[None, :, None, None]
    weight = weight / np.sqrt((weight**2).sum((1, 2, 3), keepdims=True) + 1e-8)
    if up:
      x = upfirdn(transposed(x, weight), pad=(1, 1), gain=4.0)
    else:
      x = correlate(np.pad(x, [(0, 0), (1, 1), (1, 1)]), weight)
    x = (
      x
      + self.t[f'{name}.noise_const'] * self.t[f'{name}.noise_strength']
      + self.t[f'{name}.bias'][:, None, None]
    )
    return clamped(lrelu(x), self.clamp)

  def to_rgb(self, name, x, w):
    weight = self.t[f'{name}.weight'][:, :, 0, 0]
    style = self.dense(f'{name}.affine', w) / np.sqrt(weight.shape[1])
    return clamped(
      np.einsum('ihw,oi->ohw', x, weight * style) + self.t[f'{name}.bias'][:, None, None],
      self.clamp,
    )

  def image(self, z, c, psi):
    w = self.mapping(z, c)
    w = self.t['mapping.w_avg'] + psi * (w - self.t['mapping.w_avg'])
    x, image, size = self.t['synthesis.b4.const'], 0, 4
    while f'synthesis.b{size}.conv1.weight' in self.t:
      name = f'synthesis.b{size}'
      if size > 4:
        x, image = (
          self.style_layer(f'{name}.conv0', x, w, True),
          upfirdn(image, up=2, pad=(2, 1), gain=4.0),
        )
      x = self.style_layer(f'{name}.conv1', x, w, False)
      image, size = image + self.to_rgb(f'{name}.torgb', x, w), 2 * size
    return image.transpose(1, 2, 0)

  def conv(self, name, x, down=False, gain=1.0):
    weight = self.t[f'{name}.weight']
    size = weight.shape[2]
    weight = weight / np.sqrt(weight[0].size)
    if down and size == 1:
      x = correlate(upfirdn(x, down=2, pad=(1, 1)), weight)
    elif down:
      x = correlate(upfirdn(x, pad=(2, 2)), weight)[:, ::2, ::2]
    else:
      x = correlate(np.pad(x, [(0, 0), (size // 2,) * 2, (size // 2,) * 2]), weight)
    if f'{name}.bias' not in self.t:
      return x * gain
    return clamped(
      lrelu(x + self.t[f'{name}.bias'][:, None, None]) * gain, self.clamp and self.clamp * gain
    )

  def logits(self, images, labels, group):
    features = []
    for image in images:
      x, size = image.transpose(2, 0, 1).astype(np.float64), image.shape[0]
      x = self.conv(f'b{size}.fromrgb', x)
      while size > 4:
        name, resnet = f'b{size}', f'b{size}.skip.weight' in self.t
        y = self.conv(
          f'{name}.conv1', self.conv(f'{name}.conv0', x), True, np.sqrt(0.5) if resnet else 1.0
        )
        x, size = y + (self.conv(f'{name}.skip', x, True, np.sqrt(0.5)) if resnet else 0), size // 2
      features.append(x)
    features, logits = np.stack(features), []
    count = len(features) // min(group, len(features))
    for n, x in enumerate(features):
      spread = np.sqrt(features[n % count :: count].var(0) + 1e-8).mean()
      x = self.conv('b4.conv', np.concatenate([x, np.full((1, 4, 4), spread)]))
      x = self.dense('b4.out', lrelu(self.dense('b4.fc', x.reshape(-1))))
      logits.append(
        x[0] if labels is None else (x * self.mapping(None, labels[n])).sum() / np.sqrt(len(x))
      )
    return np.array(logits)


# ---- networks of strangers


STRANGERS = {  # settings of the builder, of the generator, of the discriminator, protocol
  'unconditional, grey, 64x64, 8 mapping layers, resnet': (
    {},
    dict(z_dim=7, w_dim=6, c_dim=0, channels=(6, 5, 4, 3, 3), image_channels=1),
    dict(c_dim=0, channels=(6, 5, 4, 3, 3), image_channels=1),
    4,
  ),
  'clamped, float16, channels-last': (
    dict(conv_clamp=1.5, fp16=True),
    dict(z_dim=5, w_dim=6, c_dim=3, channels=(8, 6, 4), image_channels=3, layers=2),
    dict(c_dim=3, channels=(8, 6, 4), image_channels=3, layers=3),
    5,
  ),
  'converted from TensorFlow: no layers in the map of labels': (
    {},
    dict(z_dim=6, w_dim=6, c_dim=4, channels=(5, 5, 5), image_channels=3, layers=2),
    dict(c_dim=4, channels=(5, 5, 5), image_channels=3, architecture='orig', layers=0, group=32),
    3,
  ),
  'mapping of other widths and learning rate': (
    dict(lr_multiplier=0.05),
    dict(
      z_dim=9, w_dim=6, c_dim=3, channels=(6, 4), image_channels=3, layers=3, embed=4, hidden=11
    ),
    dict(c_dim=3, channels=(6, 4), image_channels=3, layers=1, group=1),
    2,
  ),
}


@pytest.mark.parametrize('name', STRANGERS)
def test_strangers_networks(name, tmp_path):
  settings, of_g, of_d, protocol = STRANGERS[name]
  built = files.Builder(1, **settings), files.Builder(2, **settings), files.Builder(3, **settings)
  path = tmp_path / 'network-snapshot-000000.pkl'
  path.write_bytes(
    files.pickled(
      dict(
        G=built[0].generator(**of_g),
        D=built[1].discriminator(**of_d),
        G_ema=built[2].generator(**of_g),
      ),
      protocol,
    )
  )
  rng, count = np.random.default_rng(0), 4
  labels = np.arange(count) % max(of_g['c_dim'], 1)
  z, one_hot = rng.normal(size=(count, of_g['z_dim'])), np.eye(max(of_g['c_dim'], 1))[labels]
  reference = {
    'conv_clamp': settings.get('conv_clamp'),
    'lr_multiplier': settings.get('lr_multiplier', 0.01),
  }

  draw = jax.jit(load_generator(path).apply)
  for network, tensors in (('G', built[0].tensors), ('G_ema', built[2].tensors)):
    loaded = load_generator(path, network)
    assert (loaded.z_dim, loaded.num_classes) == (of_g['z_dim'], of_g['c_dim'])
    images = np.asarray(draw(loaded.variables, z.astype(np.float32), labels, 0.8))
    truth = Reference(tensors, **reference)
    expected = np.stack([truth.image(z[n], one_hot[n], 0.8) for n in range(count)])
    assert loaded.image_shape == expected.shape[1:]
    assert np.abs(images - expected).max() < 1e-5 * np.ptp(expected), network
    if reference['conv_clamp']:  # it matters
      unclamped = Reference(tensors).image(z[0], one_hot[0], 0.8)
      assert np.abs(unclamped - expected[0]).max() > 0.01 * np.ptp(expected)

  D, variables = load_discriminator(path)
  pictures = rng.normal(size=(count, *loaded.image_shape)).astype(np.float32)
  logits = jax.jit(D.apply)(variables, pictures, labels)
  expected = Reference(built[1].tensors, **reference).logits(
    pictures, one_hot if of_d['c_dim'] else None, of_d.get('group', 4)
  )
  assert np.abs(logits - expected).max() < 1e-5 * np.abs(expected).max()


def test_official_images(shared, caplog):
  folder = shared / 'fixtures' / 'stylegan2'
  with caplog.at_level('INFO'):
    loaded = load_generator(folder / 'a_tiny_cond32.nosrc.pkl')
  assert 'G_ema, 32 x 32 x 3, 10 classes, z 32' in caplog.text
  with np.load(folder / 'a_tiny_cond32.npz') as arrays:
    draw = jax.jit(loaded.__call__, static_argnames='noise')
    for psi, name in ((1.0, 'psi1'), (0.7, 'psi07')):
      for noise in ('const', 'none'):
        expected = np.moveaxis(arrays[f'img_{name}_{noise}'], 1, -1)
        images = draw(arrays['z'], arrays['labels'], psi, noise=noise)
        assert np.abs(images - expected).max() < 1e-5 * np.ptp(expected)
    D, variables = load_discriminator(folder / 'a_tiny_cond32.nosrc.pkl')
    logits = jax.jit(D.apply)(variables, np.moveaxis(arrays['d_img'], 1, -1), arrays['d_c'])
    assert np.abs(logits - arrays['d_logits'][:, 0]).max() < 1e-5 * np.abs(arrays['d_logits']).max()

  same = load_generator(folder / 'a_tiny_cond32.params.npz')
  assert same.network == loaded.network
  jax.tree.map(np.testing.assert_array_equal, same.variables, loaded.variables)
  other = load_generator(folder / 'a_tiny_cond32.nosrc.pkl', 'G')
  const = lambda G: G.variables['params']['synthesis_network']['b4']['const']
  assert (const(other) != const(loaded)).any()
  jax.tree.map(
    np.testing.assert_array_equal,
    load_discriminator(folder / 'a_tiny_cond32.params.npz')[1],
    variables,
  )


# ---- networks that ours is not, and damage


def part(snapshot, path):
  """The Persistent at a path such as 'G_ema.synthesis.b4'."""
  network, *names = path.split('.')
  module = snapshot[network]
  for name in names:
    module = module.state['_modules'][name]
  return module


def attribute(path, name, value):
  return lambda snapshot: part(snapshot, path).state.update({name: value})


def parameter(path, name, value):
  return lambda snapshot: part(snapshot, path).state['_parameters'].update({name: value})


def bad_filter(snapshot):
  part(snapshot, 'G_ema.synthesis.b8').state['_buffers']['resample_filter'] = files.Tensor(
    np.full((4, 4), 1 / 16, np.float32)
  )


def poisoned(value):
  def change(snapshot):
    part(snapshot, 'G_ema.mapping.fc1').state['_parameters']['bias'].storage.array[3] = value

  return change


def tied(snapshot):
  """The same large numbers as every tensor of the mapping."""
  mapping = part(snapshot, 'G_ema.mapping').state['_modules']
  mapping |= {f'fc{i}': mapping['fc1'] for i in range(2, 2000)}
  part(snapshot, 'G_ema.mapping').state['num_layers'] = 2000


REFUSED = {
  "class 'SynthesisInput'": (
    lambda s: setattr(part(s, 'G_ema.synthesis.b4'), 'class_name', 'SynthesisInput'),
    "G_ema.synthesis.b4 is a 'SynthesisInput'",
  ),
  'activation': (
    attribute('G_ema.synthesis.b8.conv0', 'activation', 'relu'),
    "b8.conv0 has activation='relu', expected lrelu",
  ),
  'gain': (attribute('G_ema.synthesis.b8.conv0', 'act_gain', 1.0), 'act_gain=1.0'),
  'noise by word': (attribute('G_ema.synthesis.b4.conv1', 'use_noise', 'no'), "use_noise='no'"),
  'no strength of noise': (
    lambda s: part(s, 'G_ema.synthesis.b4.conv1').state['_parameters'].pop('noise_strength'),
    'use_noise=True',
  ),
  'architecture of G': (
    attribute('G_ema.synthesis.b4', 'architecture', 'resnet'),
    "architecture='resnet', expected skip",
  ),
  'up': (attribute('G_ema.synthesis.b8.conv0', 'up', 4), 'up=4, expected 2'),
  'filter': (bad_filter, 'b8.resample_filter is not the filter'),
  'weight gain': (attribute('G_ema.mapping.fc0', 'weight_gain', 0.5), 'fc0 has weight_gain=0.5'),
  'clamps that differ': (
    attribute('G_ema.synthesis.b8.torgb', 'conv_clamp', 3.0),
    'conv_clamp=3.0, expected None as elsewhere',
  ),
  'clamp that is no number': (
    attribute('G_ema.synthesis.b8.torgb', 'conv_clamp', ((),) * 2),
    'conv_clamp=a tuple',
  ),
  'layers': (attribute('G_ema.mapping', 'num_layers', 3), 'num_layers=3, expected 2'),
  'missing attribute': (
    lambda s: part(s, 'G_ema.mapping.fc0').state.pop('activation'),
    "activation='missing'",
  ),
  'size in attributes': (attribute('G_ema', 'z_dim', 6), 'z_dim is 6, but its tensors say 5'),
  'size in arguments': (
    lambda s: s['G_ema'].state['_init_kwargs'].update(img_channels=1),
    'img_channels is 1',
  ),
  'number of ws': (attribute('G_ema', 'num_ws', 18), 'num_ws is 18'),
  'missing tensor': (
    lambda s: part(s, 'G_ema.synthesis.b8.conv1').state['_parameters'].pop('bias'),
    'bias is missing',
  ),
  'None for a tensor': (parameter('G_ema.mapping.fc0', 'weight', None), 'do not belong together'),
  'a part more': (
    lambda s: (
      part(s, 'G_ema.synthesis').state['_modules'].update(b12=part(s, 'G_ema.synthesis.b8'))
    ),
    'of a kind that is not supported',
  ),
  'a shape': (
    parameter('G_ema.synthesis.b8.conv1', 'bias', files.Tensor(np.zeros(3, np.float32))),
    'has shape',
  ),
  'NaN': (poisoned(np.nan), 'mapping.fc1.bias holds NaN or infinite'),
  'infinity': (poisoned(-np.inf), 'mapping.fc1.bias holds NaN or infinite'),
  'integers': (
    parameter('G_ema.mapping.fc0', 'bias', files.Tensor(np.zeros(6, np.int64))),
    'of type int64',
  ),
  'one tensor many times': (tied, 'the same numbers twice'),
  'no G_ema': (lambda s: s.pop('G_ema'), 'no G_ema in it'),
  'G_ema of text': (lambda s: s.update(G_ema='x'), 'no G_ema in it, but G'),
}
REFUSED_D = {
  'architecture of D': (
    attribute('D.b4', 'architecture', 'skip'),
    "architecture='skip', expected orig or resnet",
  ),
  'architectures that differ': (
    attribute('D.b8', 'architecture', 'orig'),
    "architecture='orig', expected resnet",
  ),
  'group': (attribute('D.b4.mbstd', 'group_size', 'many'), "mbstd_group='many'"),
  'statistic': (attribute('D.b4.mbstd', 'num_channels', 2), 'num_channels=2, expected 1'),
  'no statistic': (lambda s: part(s, 'D.b4').state['_modules'].pop('mbstd'), 'mbstd is missing'),
  'gain of D': (attribute('D.b8.skip', 'act_gain', 2.0), 'act_gain=2.0'),
  'classes': (attribute('D', 'c_dim', 4), 'c_dim is 4, but its tensors say 3'),
}


@pytest.mark.parametrize('case', [*REFUSED, *REFUSED_D])
def test_what_ours_is_not_is_refused(case, tmp_path):
  change, words = (REFUSED | REFUSED_D)[case]
  snapshot, _ = files.small_snapshot()
  change(snapshot)
  path = tmp_path / 'x.pkl'
  path.write_bytes(files.pickled(snapshot))
  with pytest.raises(SnapshotError) as caught:
    (load_discriminator if case in REFUSED_D else load_generator)(path)
  assert (
    words in str(caught.value)
    and str(caught.value).startswith(f'{path}: ')
    and '\n' not in str(caught.value)
  )


def test_files_of_forks_that_have_moved_its_modules(tmp_path):
  content = files.pickled(files.small_snapshot()[0])
  assert b'ctorch_utils.persistence\n' in content
  paths = tmp_path / 'its.pkl', tmp_path / 'forked.pkl'
  paths[0].write_bytes(content)
  paths[1].write_bytes(
    content.replace(b'ctorch_utils.', b'csg2.torch_utils.').replace(b'cdnnlib.', b'csrc.dnnlib.')
  )
  one, other = (load_generator(path) for path in paths)
  assert one.network == other.network
  chex.assert_trees_all_equal(one.variables, other.variables)


def test_what_may_be_absent_or_different(tmp_path):
  snapshot, truth = files.small_snapshot()
  for name in ('augment_pipe', 'training_set_kwargs', 'D', 'G'):
    del snapshot[name]
  path = tmp_path / 'x.pkl'
  path.write_bytes(files.pickled(snapshot))
  assert (
    load_generator(path).variables['buffers']['w_avg'].tolist()
    == truth['G_ema']['mapping.w_avg'].tolist()
  )
  with pytest.raises(SnapshotError, match='no D in it'):
    load_discriminator(path)
  with pytest.raises(UserError, match="network 'D'"):
    load_generator(path, 'D')
  snapshot, _ = files.small_snapshot()
  part(snapshot, 'D.b4.mbstd').state['group_size'] = None
  path.write_bytes(files.pickled(snapshot))
  assert load_discriminator(path)[0].mbstd_group > 10**6  # the whole batch


# ---- arrays under official names


@pytest.fixture(scope='module')
def truth():
  return files.small_snapshot()[1]


@pytest.mark.parametrize('suffix', ['.npz', '.safetensors'])
@pytest.mark.parametrize('prefixed', [False, True])
def test_official_arrays(suffix, prefixed, truth, tmp_path):
  def save(name, network, **extra):
    arrays = {f'{network}/{key}' if prefixed else key: x for key, x in truth[network].items()}
    if suffix == '.npz':
      np.savez_compressed(
        tmp_path / name, **arrays, **{key: np.asarray(value) for key, value in extra.items()}
      )
    else:
      safetensors.numpy.save_file(
        arrays, tmp_path / name, {key: str(value) for key, value in extra.items()}
      )
    return tmp_path / name

  G = load_generator(save(f'g{suffix}', 'G_ema'))
  assert G.network.conv_clamp is None
  np.testing.assert_array_equal(G.variables['buffers']['w_avg'], truth['G_ema']['mapping.w_avg'])
  assert load_generator(save(f'g{suffix}', 'G_ema', conv_clamp=256.0)).network.conv_clamp == 256.0
  D, _ = load_discriminator(save(f'd{suffix}', 'D', conv_clamp=2.5, mbstd_group=7))
  assert (D.conv_clamp, D.mbstd_group) == (2.5, 7)
  with pytest.raises(SnapshotError, match="conv_clamp='-1.0'"):
    load_generator(save(f'g{suffix}', 'G_ema', conv_clamp=-1.0))
  with pytest.raises(SnapshotError, match='no G in it'):
    load_snapshot(save(f'd{suffix}', 'D'), 'G')


def npy(header, content=b''):
  text = (header + ' ' * (118 - len(header)) + '\n').encode()
  return b'\x93NUMPY\x01\x00' + len(text).to_bytes(2, 'little') + text + content


@pytest.mark.parametrize(
  'entries, words',
  [
    (
      {'a.npy': npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }")},
      'not as long as its header',
    ),
    (
      {
        'a.npy': npy(
          "{'descr': '<f4', 'fortran_order': False, 'shape': (25000000,), }", bytes(100_000_000)
        )
      },
      'unpacks to more',
    ),
    (
      {
        'a.npy': npy(
          "{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", pickle.dumps([os.system])
        )
      },
      'header',
    ),
    (
      {'a.npy': npy("{'descr': __import__('os'), 'fortran_order': False, 'shape': (1,), }")},
      'not a readable .npz',
    ),
    ({'a.npy': b'nonsense'}, 'not a readable .npz'),
    ({'a.npy': npy('(' * 100)}, 'not a readable .npz'),
    (
      {
        'synthesis.b4.const.npy': npy(
          "{'descr': '<i8', 'fortran_order': False, 'shape': (1,), }", bytes(8)
        )
      },
      'of type int64',
    ),
  ],
)
def test_bad_npz(entries, words, tmp_path):
  path = tmp_path / 'x.npz'
  with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
    for name, content in entries.items():
      archive.writestr(name, content)
  with pytest.raises(SnapshotError, match=words) as caught:
    load_generator(path)
  assert str(caught.value).startswith(f'{path}: ') and '\n' not in str(caught.value)


def test_npz_packed_without_a_bound(tmp_path):
  path = tmp_path / 'x.npz'
  with zipfile.ZipFile(path, 'w', zipfile.ZIP_BZIP2) as archive:
    archive.writestr('a.npy', bytes(1000))
  with pytest.raises(SnapshotError, match='packed in another way'):
    load_generator(path)


@pytest.mark.parametrize('suffix', ['.npz', '.safetensors', '.pkl'])
def test_unreadable_files(suffix, truth, tmp_path):
  path = tmp_path / f'x{suffix}'
  with pytest.raises(UserError, match='no such file'):
    load_generator(path)
  for content in (b'', b'<html></html>', b'\xff' * 100):
    path.write_bytes(content)
    with pytest.raises(SnapshotError) as caught:
      load_generator(path)
    assert str(caught.value).startswith(f'{path}') and '\n' not in str(caught.value)


# ---- our own forms


@pytest.mark.parametrize('kind', ['.pkl', '.npz', '.safetensors'])
def test_half_precision_costs_itself_and_its_float32(kind, tmp_path):
  """A file of G_ema alone, of which all is used; a first load has left behind what tracing
  keeps."""
  builder, path = files.Builder([0], fp16=True), tmp_path / f'large{kind}'
  module = builder.generator(64, 64, 3, (192, 192, 192), 3, layers=2)
  arrays = {name: x.astype(np.float16) for name, x in builder.tensors.items()}
  if kind == '.pkl':
    path.write_bytes(files.pickled(dict(G_ema=module)))
  elif kind == '.npz':
    np.savez(path, **arrays)
  else:
    safetensors.numpy.save_file(arrays, path)
  load_snapshot(path)
  tracemalloc.start()
  load_snapshot(path)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak <= 3.1 * path.stat().st_size


@pytest.fixture(scope='module')
def network(tmp_path_factory):
  """Path of a tiny snapshot with a clamp."""
  path = tmp_path_factory.mktemp('network') / 'tiny.pkl'
  path.write_bytes(files.pickled(files.small_snapshot(conv_clamp=5.0)[0]))
  return path


def test_save_safetensors(network, tmp_path):
  G, path = load_generator(network), tmp_path / 'new' / 'x.safetensors'
  save_safetensors(path, G.network, G.variables, 'drawn at random')
  loaded = load_generator(path)
  assert loaded.network == G.network
  for x, y in zip(jax.tree.leaves(loaded.variables), jax.tree.leaves(G.variables), strict=True):
    assert x.dtype == np.float32 and x.shape == y.shape
    np.testing.assert_array_equal(x, y.astype(np.float16).astype(np.float32))
  save_safetensors(path, G.network, G.variables, '', np.float32)
  jax.tree.map(np.testing.assert_array_equal, load_generator(path).variables, G.variables)
  assert [p.name for p in path.parent.iterdir()] == ['x.safetensors']
  with pytest.raises(UserError, match='only G_ema'):
    load_generator(path, 'G')

  before = path.read_bytes()
  large = jax.tree.map(lambda x: x * 1e6, G.variables)
  with pytest.raises(UserError, match='float16 does not hold'):
    save_safetensors(path, G.network, large, '')
  assert path.read_bytes() == before


def test_damaged_safetensors_of_ours(network, tmp_path):
  G, path = load_generator(network), tmp_path / 'x.safetensors'
  save_safetensors(path, G.network, G.variables, '', np.float32)
  arrays = safetensors.numpy.load_file(path)
  fields = network_fields(G.network)

  def refused(words, arrays=arrays, fields=fields):
    safetensors.numpy.save_file(arrays, path, {NETWORK_KEY: json.dumps(fields)})
    with pytest.raises(SnapshotError, match=words) as caught:
      load_generator(path)
    assert '\n' not in str(caught.value)

  name = 'params/mapping_network/fc0/bias'
  refused(f'{name} is absent', {key: x for key, x in arrays.items() if key != name})
  refused(f'{name} holds NaN', {**arrays, name: arrays[name] * np.nan})
  refused(f'{name} is', {**arrays, name: arrays[name][1:]})
  refused('params/more', {**arrays, 'params/more': arrays[name]})
  refused('description of the network', fields={**fields, 'channels': 'wide'})
  refused('description of the network', fields={**fields, 'unknown': 1})
  refused('description of the network', fields=[1])
  for huge in (
    dict(mapping_layers=10**9),
    dict(z_dim=10**12),
    dict(channels=[8] * 200),
    dict(channels=[8, 10**9]),
  ):
    refused('description of the network', fields={**fields, **huge})
  whole = path.read_bytes()
  path.write_bytes(whole[: len(whole) // 2])
  with pytest.raises(SnapshotError, match='not a readable .safetensors'):
    load_generator(path)
  safetensors.numpy.save_file(arrays, path, dict(words='x' * (1 << 20)))
  with pytest.raises(SnapshotError, match='its header is longer'):
    load_generator(path)


def test_names(network, tmp_path, monkeypatch):
  with pytest.raises(
    UserError, match="'cifar11' is neither a path nor a bundled generator; bundled are"
  ):
    load_generator('cifar11')
  with pytest.raises(UserError, match='holds no generator .* give the workdir'):
    load_generator(tmp_path / 'none')
  with pytest.raises(UserError, match='holds no generator .* give the workdir'):
    load_generator(tmp_path)
  with pytest.raises(UserError, match='only G_ema'):
    load_generator(tmp_path, 'G')
  (tmp_path / 'x.pth').write_bytes(b'x')
  with pytest.raises(UserError, match='none of the files of weights'):
    load_generator(tmp_path / 'x.pth')
  folder = pathlib.Path(generators.__file__).parent / 'bundled'
  for path in folder.glob('*.safetensors'):
    assert load_generator(path.stem).num_classes > 0
    with pytest.raises(UserError, match=f'did you mean {path.stem}'):
      load_generator(path.stem + 'x')


@pytest.mark.parametrize(
  'name', [None, 3, 'a\0b', 'x' * 5000, pathlib.Path('\x1b[31m\nlost.pkl'), '/proc/kmsg.pkl']
)
def test_what_is_no_name(name):
  with pytest.raises(UserError) as caught:
    load_generator(name)
  assert str(caught.value).isprintable() and len(str(caught.value)) < 400


@pytest.mark.parametrize(
  'changes, words',
  [
    (dict(labels=np.array([0, 3])), r'labels\[1\] is 3, expected 0 to 2'),
    (dict(labels=np.array([-1, 0])), r'labels\[0\] is -1, expected 0 to 2'),
    (dict(labels=np.array([True, False])), 'labels are bool of shape'),
    (
      dict(labels=np.array([0])),
      r'labels are int64 of shape \(1,\), expected integers of shape \(2,\)',
    ),
    (
      dict(labels=np.zeros((2, 4), np.float32)),
      r'float32 of shape \(2, 4\), expected .* shape \(2, 3\)',
    ),
    (dict(labels=1), 'labels are a int, expected integers'),
    (dict(labels=[0, 1]), 'labels are a list, expected integers'),
    (dict(labels=None), 'labels are a NoneType, expected integers'),
    (dict(z=np.zeros(5, np.float32)), r'z is float32 of shape \(5,\), expected'),
    (dict(z=np.zeros((2, 6), np.float32)), r'z is float32 of shape \(2, 6\), expected .* \(N, 5\)'),
    (dict(z=np.zeros((2, 5), int)), 'z is int64'),
    (dict(z=None), 'z is a NoneType'),
    (dict(truncation_cutoff=-1), 'truncation_cutoff=-1, expected a number of layers, or None'),
  ],
)
def test_inputs_that_cannot_be(changes, words, network):
  G = load_generator(network)
  with pytest.raises(UserError, match=words):
    G(**dict(dict(z=np.zeros((2, 5), np.float32), labels=np.array([0, 1])), **changes))


# ---- convert and sample


def test_convert_to_a_folder(network, tmp_path):
  G, out = load_generator(network), tmp_path / 'out'
  convert(network, f'{out}/')
  loaded = load_generator(out)
  assert loaded.network == G.network
  jax.tree.map(np.testing.assert_array_equal, loaded.variables, G.variables)
  before = sorted(tmp_path.rglob('*'))
  for target in (out, network.parent):
    with pytest.raises(UserError, match='holds something already'):
      convert(network, target)
  with pytest.raises(UserError, match='no such file'):
    convert(tmp_path / 'none.pkl', tmp_path / 'other')
  assert sorted(tmp_path.rglob('*')) == before
  (tmp_path / 'empty').mkdir()
  convert(network, tmp_path / 'empty', 'G')
  w_avg = load_generator(tmp_path / 'empty').variables['buffers']['w_avg']
  np.testing.assert_array_equal(w_avg, load_generator(network, 'G').variables['buffers']['w_avg'])
  assert {path.name for path in tmp_path.iterdir()} == {'out', 'empty'}


def test_the_working_folder_is_not_replaced(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for target in ('.', tmp_path):
    with pytest.raises(UserError, match='is the folder you are in, .*: name a new one'):
      convert('cifar10-small', target)


def test_convert_to_a_file(network, tmp_path):
  convert(network, tmp_path / 'out.safetensors')
  assert load_generator(tmp_path / 'out.safetensors').network == load_generator(network).network
  (tmp_path / 'folder.safetensors').mkdir()
  with pytest.raises(UserError, match='holds something already'):
    convert(network, tmp_path / 'folder.safetensors')
  assert len([*tmp_path.iterdir()]) == 2


def test_a_grid(network, tmp_path):
  sample(network, tmp_path / 'x.png', classes=[2, 0], columns=3, seed=1)
  drawn = np.asarray(Image.open(tmp_path / 'x.png'))
  assert drawn.shape[0] == 2 * 64 and drawn.shape[1] > 3 * 64
  z = jax.random.normal(jax.random.key(1), (3, 5))
  G = load_generator(network)
  images = np.asarray(jax.jit(G.__call__)(z, np.full(3, 0)))
  expected = np.clip(images * 127.5 + 128, 0, 255).astype(np.uint8)
  cells = drawn[64:, -3 * 64 :].reshape(8, 8, 3, 8, 8, 3)[:, 0, :, :, 0].transpose(1, 0, 2, 3)
  assert np.abs(cells.astype(int) - expected).max() <= 1

  sample(network, tmp_path / 'y.png', classes=[2, 0], columns=3, seed=1, truncation=0.0)
  mean = np.asarray(Image.open(tmp_path / 'y.png'))[:, -3 * 64 :]
  np.testing.assert_array_equal(mean[:, :64], mean[:, 64:128])  # every latent is the mean


def test_a_film(network, tmp_path):
  sample(network, tmp_path / 'x.webp', steps=5)
  film = Image.open(tmp_path / 'x.webp')
  assert film.n_frames == 5 and film.size == (3 * 64, 64)
  walk = jax.jit(latent_walk, static_argnums=(1, 2))
  z = np.asarray(walk(jax.random.key(0), 400, 50, 0.5, 0.95))
  assert z.shape == (400, 50)
  # z' has variance (.5 ** 2) / 3 + .5 ** 2 and a moving average keeps (1 - beta) / (1 + beta) of
  # it.
  np.testing.assert_allclose(z[100:].var(), (1 / 12 + 1 / 4) * 0.05 / 1.95, rtol=0.15)
  still = np.asarray(walk(jax.random.key(0), 400, 50, 0.5, 1.0))
  np.testing.assert_array_equal(still, still[:1].repeat(400, 0))


@pytest.mark.parametrize(
  'changes, words',
  [
    (dict(out='x.jpg'), 'x.jpg: expected a name that ends in .png'),
    (dict(truncation=float('nan')), 'truncation=nan'),
    (dict(truncation=1e38), r'truncation=1e\+38: expected -10 to 10'),
    (dict(columns=0), 'columns=0: expected 1 to'),
    (dict(steps=0), 'steps=0: expected 1 to'),
    (dict(alpha=1.5), 'alpha=1.5: expected 0 to 1'),
    (dict(beta=float('nan')), 'beta=nan: expected 0 to 1'),
    (dict(seed=-1), 'seed=-1'),
    (dict(classes=[0, 3]), 'class 3: expected 0 to 2'),
    (dict(classes=[-1]), 'class -1: expected 0 to 2'),
    (dict(out='x.webp', classes=[0] * 2048), 'frames of 8x16384: WebP has at most 16383'),
    (dict(network='none.pkl'), 'none.pkl: no such file'),
  ],
)
def test_samples_that_cannot_be_drawn(changes, words, network, tmp_path):
  compiled = len(COMPILED)
  arguments = dict(network=network, out=tmp_path / 'x.png') | changes
  with pytest.raises(UserError, match=words):
    sample(**arguments)
  assert not any(tmp_path.iterdir()) and len(COMPILED) == compiled


@pytest.mark.parametrize(
  'tool, args, words',
  [
    (
      'sample',
      ['--network={network}', '--classes=0,one', 'x.png'],
      '--classes=0,one: expected class numbers',
    ),
    ('sample', ['--network={network}', '--sed=3', 'x.png'], "Unknown command line flag 'sed'"),
    ('convert', ['{network}'], '1 arguments: expected two'),
  ],
)
def test_the_command_line_ends_with_code_2_and_one_line(tool, args, words, network, tmp_path):
  done = subprocess.run(
    [
      sys.executable,
      '-m',
      f'palm_jax.generator.{tool}',
      *(arg.format(network=network) for arg in args),
    ],
    cwd=tmp_path,
    capture_output=True,
    text=True,
    env=dict(os.environ, JAX_PLATFORMS='cpu', PYTHONPATH=str(ROOT)),
  )
  lines = done.stderr.splitlines()
  assert (
    done.returncode == 2
    and len(lines) == 1
    and lines[0].startswith('palm_jax: ')
    and words in lines[0]
  ), done.stderr
  assert not any(tmp_path.iterdir())
