"""The Inception network against pytorch-fid's and torch-fidelity's, with weights made from their
names."""

import pathlib
import zlib

import jax
import numpy as np
import pytest
from flax import traverse_util

from palm_jax.base.errors import UserError
from palm_jax.evaluate import inception

REFERENCE = pathlib.Path(__file__).parent / 'reference' / 'inception.npz'


def uniform(name, shape):
  """In [0, 1): the upper 53 bits of PCG64's raw numbers, which no version of numpy changes, seeded
  by the name's crc32."""
  raw = np.random.PCG64(zlib.crc32(name.encode())).random_raw(int(np.prod(shape)))
  return ((raw >> np.uint64(11)) * 2.0**-53).reshape(shape)


def tensor(name, shape):
  """Convolutions of variance 2 / fan-in; gains and variances in [0.5, 1.5); biases and means in
  [-0.2, 0.2)."""
  u = uniform(name, shape)
  if name.endswith('conv.weight'):
    u = (2 * u - 1) * np.sqrt(6 / np.prod(shape[1:]))
  elif name.endswith(('bn.weight', 'running_var')):
    u = 0.5 + u
  else:
    u = 0.4 * u - 0.2
  return u.astype(np.float32)


@pytest.fixture(scope='module')
def template():
  return jax.eval_shape(
    inception.Inception().init, jax.random.key(0), np.zeros((1, 8, 8, 3), np.uint8)
  )['params']


@pytest.fixture(scope='module')
def state(template):
  """A state dict as the ports have it, but for the counters of batches."""
  shapes = {'fc.weight': (1008, 2048), 'fc.bias': (1008,)}
  for path, leaf in traverse_util.flatten_dict(template).items():
    if path[-1] == 'kernel':
      name, (height, width, inputs, outputs) = '.'.join(path[:-1]), leaf.shape
      shapes[f'{name}.conv.weight'] = outputs, inputs, height, width
      shapes |= {
        f'{name}.bn.{part}': (outputs,)
        for part in ('weight', 'bias', 'running_mean', 'running_var')
      }
  return {name: tensor(name, shape) for name, shape in shapes.items()}


def test_it_has_the_parameters_of_the_ports(state):
  """23,850,960 in torch-fidelity's network, counted there: all but batch statistics."""
  assert sum(x.size for name, x in state.items() if 'running' not in name) == 23_850_960
  assert len(state) == 566 - 94  # 94 units, of which each also has a counter there


def test_features_equal_the_ports(state):
  """inception.npz: features in float64 of torch-fidelity 0.4.0's network with these tensors, resize
  included.

  pytorch-fid 0.3.0's network gives the same bits as torch-fidelity's. Both are 3e-7 and 6e-7 of the
  largest away in float32.
  """
  variables, apply = inception.convert(state), jax.jit(inception.Inception().apply)
  with np.load(REFERENCE) as reference:
    for i, (height, width) in enumerate(((32, 32), (20, 310))):
      image = (uniform(f'image {height}x{width}', (1, height, width, 3)) * 256).astype(np.uint8)
      wanted = reference[f'features{i}']
      assert wanted.std() > 5  # nothing has vanished on the way
      np.testing.assert_allclose(apply(variables, image)[0], wanted, atol=3e-6 * wanted.max())


def test_inputs_are_scaled_and_grey_is_repeated():
  grey = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
  x = np.asarray(inception.prepare(grey))
  assert x.shape == (1, 299, 299, 3)
  np.testing.assert_array_equal(x, inception.prepare(np.repeat(grey, 3, -1)))
  assert x.min() == -1 and x.max() == 127 / 128


@pytest.mark.parametrize('height, width, size', [(8, 8, 19), (5, 11, 13), (19, 23, 7), (9, 9, 9)])
def test_resize_is_tensorflow_1(height, width, size):
  image = np.random.default_rng(0).integers(0, 256, (height, width, 2)).astype(np.float64)
  wanted = np.empty((size, size, 2))
  for i in range(size):
    for j in range(size):
      y, x = i * height / size, j * width / size
      top, left = int(y), int(x)
      bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
      upper = image[top, left] + (image[top, right] - image[top, left]) * (x - left)
      lower = image[bottom, left] + (image[bottom, right] - image[bottom, left]) * (x - left)
      wanted[i, j] = upper + (lower - upper) * (y - top)
  got = inception.resize(np.float32(image)[None], size)[0]
  np.testing.assert_allclose(got, wanted, atol=1e-3)
  if size == height == width:
    np.testing.assert_array_equal(got, image)


def test_pools_do_not_see_the_padding():
  x = np.random.default_rng(0).normal(size=(1, 4, 5, 2)).astype(np.float32) - 5
  for pool, reduce in ((inception.average_pool, np.mean), (inception.max_pool, np.max)):
    wanted = [
      [reduce(x[0, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2], axis=(0, 1)) for j in range(5)]
      for i in range(4)
    ]
    np.testing.assert_allclose(pool(x)[0], wanted, rtol=1e-5)


@pytest.mark.parametrize(
  'change, message',
  [
    (
      lambda s: s.pop('Mixed_6c.branch7x7dbl_4.bn.running_var'),
      'Mixed_6c.branch7x7dbl_4.bn.running_var is absent',
    ),
    (
      lambda s: s.update({'Conv2d_1a_3x3.conv.weight': np.zeros((32, 1, 3, 3))}),
      r'Conv2d_1a_3x3.conv.weight is \(32, 1, 3, 3\), expected \(32, 3, 3, 3\)',
    ),
    (lambda s: s.update({'fc.weight': np.zeros((1000, 2048))}), r'fc.weight is \(1000, 2048\)'),
  ],
)
def test_other_weights_are_refused(state, change, message):
  changed = dict(state)
  change(changed)
  with pytest.raises(UserError, match=message) as caught:
    inception.convert(changed)
  assert 'pytorch-fid' in str(caught.value) and '\n' not in str(caught.value)


@pytest.mark.parametrize('name', ['absent.pth', '', '.'])
def test_a_missing_file_is_named(name, tmp_path):
  with pytest.raises(
    UserError, match='inception_path.*no file.*6726825d.pth.*pytorch-fid'
  ) as caught:
    inception.load(name and tmp_path / name)
  assert '\n' not in str(caught.value)


def test_a_file_that_is_none_is_refused(tmp_path):
  path = tmp_path / 'weights.pth'
  path.write_bytes(b'<html>not found</html>')
  with pytest.raises(UserError, match='weights.pth'):
    inception.load(path)
