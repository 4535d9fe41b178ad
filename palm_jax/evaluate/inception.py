"""Inception-v3 of 2015-12-05, the network of the Frechet Inception distance, for inference.

Weights come from a file. Units and their names are those of pytorch-fid
(src/pytorch_fid/inception.py) and torch-fidelity (torch_fidelity/feature_extractor_inceptionv3.py),
so a tensor's place in the network is its name in the file. It differs from the Inception-v3 of
torchvision: average pools leave the padding out of the count, the last block pools by maximum, and
there are 1008 classes.
"""

import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from ml_collections import ConfigDict

from palm_jax.base.errors import UserError
from palm_jax.base.files import user_path
from palm_jax.formats import torch_files

FILES = (
  'pt_inception-2015-12-05-6726825d.pth (project pytorch-fid) or '
  'weights-inception-2015-12-05-6726825d.pth (torch-fidelity)'
)
EPSILON = 1e-3  # of all its batch normalisations
SIDE = 299


class Inception(nn.Module):
  """images (N, H, W, 1 or 3) uint8 -> the last pooled features (N, 2048), at least float32.

  Variables are of `load` or `convert`. Every unit is a convolution in full float32 with its batch
  normalisation folded in, then ReLU.
  """

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    x = prepare(images)
    x = _unit(x, 'Conv2d_1a_3x3', 32, (3, 3), 2)  # (N, 149, 149, 32)
    x = _unit(x, 'Conv2d_2a_3x3', 32, (3, 3), padding='VALID')
    x = _unit(x, 'Conv2d_2b_3x3', 64, (3, 3))
    x = nn.max_pool(x, (3, 3), (2, 2))  # (N, 73, 73, 64)
    x = _unit(x, 'Conv2d_3b_1x1', 80)
    x = _unit(x, 'Conv2d_4a_3x3', 192, (3, 3), padding='VALID')
    x = nn.max_pool(x, (3, 3), (2, 2))  # (N, 35, 35, 192)
    for name, pool_features in (('Mixed_5b', 32), ('Mixed_5c', 64), ('Mixed_5d', 64)):
      x = BlockA(pool_features, name=name)(x)
    x = BlockB(name='Mixed_6a')(x)  # (N, 17, 17, 768)
    for name, width in (('Mixed_6b', 128), ('Mixed_6c', 160), ('Mixed_6d', 160), ('Mixed_6e', 192)):
      x = BlockC(width, name=name)(x)
    x = BlockD(name='Mixed_7a')(x)  # (N, 8, 8, 1280)
    x = BlockE(average_pool, name='Mixed_7b')(x)
    x = BlockE(max_pool, name='Mixed_7c')(x)
    return jnp.mean(x, axis=(1, 2), dtype=jnp.promote_types(x.dtype, jnp.float32))


def prepare(images: jax.Array) -> jax.Array:
  """images (N, H, W, 1 or 3) uint8 -> (N, 299, 299, 3) float32 in [-1, 1), as torch-fidelity."""
  x = images.astype(jnp.float32)
  if x.shape[-1] == 1:
    x = jnp.repeat(x, 3, -1)  # stylegan2-ada-pytorch, metrics/metric_utils.py
  return (resize(x, SIDE) - 128) / 128


def resize(images: jax.Array, size: int) -> jax.Array:
  """TensorFlow 1's bilinear resize, (N, H, W, C) float -> (N, size, size, C).

  Corners are not aligned: output i lies at i * input size / size, without half pixels. Enlarging
  repeats the last row and column; reducing is not smoothed.
  """

  def along(x, axis):
    length = x.shape[axis]
    position = np.arange(size, dtype=np.float32) * np.float32(length / size)  # float32, as there
    low = position.astype(np.int32)
    shape = [-1 if i == axis else 1 for i in range(x.ndim)]
    fraction = (position - low).reshape(shape)
    before, after = jnp.take(x, low, axis), jnp.take(x, np.minimum(low + 1, length - 1), axis)
    return before + (after - before) * fraction

  return along(along(images, 2), 1)


def average_pool(x: jax.Array) -> jax.Array:
  """3x3 means, stride 1, over the pixels that there are: padding does not count."""
  return nn.avg_pool(x, (3, 3), padding='SAME', count_include_pad=False)


def max_pool(x: jax.Array) -> jax.Array:
  """3x3 maxima, stride 1."""
  return nn.max_pool(x, (3, 3), padding='SAME')


def _unit(x, name, features, kernel=(1, 1), stride=1, padding=None):
  # An accelerator's default precision would round the inputs to about 10 bits, which moves the
  # distance.
  padding = padding or ('SAME' if stride == 1 else 'VALID')
  return nn.relu(
    nn.Conv(features, kernel, stride, padding, precision=jax.lax.Precision.HIGHEST, name=name)(x)
  )


def _chain(x, *units):
  for unit in units:
    x = _unit(x, *unit)
  return x


class BlockA(nn.Module):
  pool_features: int

  @nn.compact
  def __call__(self, x):
    return jnp.concatenate(
      [
        _unit(x, 'branch1x1', 64),
        _chain(x, ('branch5x5_1', 48), ('branch5x5_2', 64, (5, 5))),
        _chain(
          x, ('branch3x3dbl_1', 64), ('branch3x3dbl_2', 96, (3, 3)), ('branch3x3dbl_3', 96, (3, 3))
        ),
        _unit(average_pool(x), 'branch_pool', self.pool_features),
      ],
      -1,
    )


class BlockB(nn.Module):
  @nn.compact
  def __call__(self, x):
    return jnp.concatenate(
      [
        _unit(x, 'branch3x3', 384, (3, 3), 2),
        _chain(
          x,
          ('branch3x3dbl_1', 64),
          ('branch3x3dbl_2', 96, (3, 3)),
          ('branch3x3dbl_3', 96, (3, 3), 2),
        ),
        nn.max_pool(x, (3, 3), (2, 2)),
      ],
      -1,
    )


class BlockC(nn.Module):
  width: int

  @nn.compact
  def __call__(self, x):
    width, row, column = self.width, (1, 7), (7, 1)
    return jnp.concatenate(
      [
        _unit(x, 'branch1x1', 192),
        _chain(
          x, ('branch7x7_1', width), ('branch7x7_2', width, row), ('branch7x7_3', 192, column)
        ),
        _chain(
          x,
          ('branch7x7dbl_1', width),
          ('branch7x7dbl_2', width, column),
          ('branch7x7dbl_3', width, row),
          ('branch7x7dbl_4', width, column),
          ('branch7x7dbl_5', 192, row),
        ),
        _unit(average_pool(x), 'branch_pool', 192),
      ],
      -1,
    )


class BlockD(nn.Module):
  @nn.compact
  def __call__(self, x):
    return jnp.concatenate(
      [
        _chain(x, ('branch3x3_1', 192), ('branch3x3_2', 320, (3, 3), 2)),
        _chain(
          x,
          ('branch7x7x3_1', 192),
          ('branch7x7x3_2', 192, (1, 7)),
          ('branch7x7x3_3', 192, (7, 1)),
          ('branch7x7x3_4', 192, (3, 3), 2),
        ),
        nn.max_pool(x, (3, 3), (2, 2)),
      ],
      -1,
    )


class BlockE(nn.Module):
  pool: Callable

  @nn.compact
  def __call__(self, x):
    once = _unit(x, 'branch3x3_1', 384)
    twice = _chain(x, ('branch3x3dbl_1', 448), ('branch3x3dbl_2', 384, (3, 3)))
    return jnp.concatenate(
      [
        _unit(x, 'branch1x1', 320),
        _unit(once, 'branch3x3_2a', 384, (1, 3)),
        _unit(once, 'branch3x3_2b', 384, (3, 1)),
        _unit(twice, 'branch3x3dbl_3a', 384, (1, 3)),
        _unit(twice, 'branch3x3dbl_3b', 384, (3, 1)),
        _unit(self.pool(x), 'branch_pool', 192),
      ],
      -1,
    )


def convert(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """{name in the PyTorch ports: array} -> variables of `Inception`.

  The logits' layer is checked and left out.

  Raises:
    UserError: a tensor is missing or has another shape; the first is named.
  """

  def tensor(name, shape):
    found = np.shape(state[name]) if name in state else 'absent'
    if found != shape:
      raise UserError(f'Inception weights: {name} is {found}, expected {shape}: give {FILES}')
    return np.asarray(state[name], np.float64)

  tensor('fc.weight', (1008, 2048))  # torchvision's own weights fit everywhere else
  template = jax.eval_shape(Inception().init, jax.random.key(0), np.zeros((1, 8, 8, 3), np.uint8))[
    'params'
  ]
  flat: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(template)
  units = {path[:-1]: kernel for path, kernel in flat.items() if path[-1] == 'kernel'}
  params = {}
  for path, kernel in units.items():
    name, (height, width, inputs, outputs) = '.'.join(path), kernel.shape
    weight = tensor(f'{name}.conv.weight', (outputs, inputs, height, width))
    gain, bias, mean, variance = (
      tensor(f'{name}.bn.{part}', (outputs,))
      for part in ('weight', 'bias', 'running_mean', 'running_var')
    )
    scale = gain / np.sqrt(variance + EPSILON)
    params[*path, 'kernel'] = (weight.transpose(2, 3, 1, 0) * scale).astype(kernel.dtype)
    params[*path, 'bias'] = (bias - mean * scale).astype(kernel.dtype)
  return {'params': traverse_util.unflatten_dict(params)}


def check_file(path: str | pathlib.Path) -> None:
  """Raises UserError, saying which file is meant and who publishes it, unless `path` is a file."""
  if not path or not user_path(path).is_file():
    raise UserError(
      f'quality.inception_path={str(path)!r} is no file: give {FILES}, fetched by hand from the '
      "releases of that project, or set quality.features to 'proxy'"
    )


def files_of(config: ConfigDict, features: Iterable[str]) -> list[pathlib.Path]:
  """The weight file, where it is among the features that a job uses, for `Job.reads_files`."""
  path = user_path(config.quality.inception_path or '.')
  return [path] if 'inception' in features and path.is_file() else []


def load(path: str | pathlib.Path) -> dict[str, Any]:
  """Variables of `Inception` from the file of one of the PyTorch ports. Nothing is downloaded.

  Raises:
    UserError: no such file, an unreadable one, or other weights than these.
  """
  check_file(path)
  return convert(torch_files.state_dict(torch_files.read(user_path(path))))
