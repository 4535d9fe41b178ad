"""The networks of stylegan2-ada-pytorch (training/networks.py there) as ours.

Tensors come under the original's names and in its layouts; the networks' sizes are read from them.
"""

import re
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from palm_jax.base.errors import UserError
from palm_jax.formats.arrays import check_numbers
from palm_jax.generator import ops
from palm_jax.generator.discriminator import Discriminator
from palm_jax.generator.stylegan2 import LR_MULTIPLIER, Generator, resolution_of


def generator_from_official(
  state: dict[str, np.ndarray], *, conv_clamp: float | None = None, dtype: Any = None
) -> tuple[Generator, dict]:
  """The generator of a state_dict of G or G_ema.

  Args:
    state: {official name: array}. 'mapping.w_avg' is (w_dim,), or (num_classes, w_dim); where it is
      absent, it is zero. Where no layer has a noise_strength, all are zero.
    conv_clamp: is not in the tensors: take it from the file's constructor arguments.
    dtype: of the convolutions.

  Returns:
    Generator, variables as numpy arrays.

  Raises:
    UserError: names the first tensor that does not fit.
  """
  w_dim = _shape(state, 'synthesis.b4.conv1.affine.weight')[1]
  state = {'mapping.w_avg': np.zeros(w_dim, np.float32), **state}
  mapping = _mapping_fields(state, w_dim)
  height, width = _shape(state, 'synthesis.b4.const')[1:]
  if height != 4:
    raise UserError(f'weights: synthesis.b4.const is {height} x {width}, expected a height of 4.')
  embedded = _shape(state, 'mapping.embed.weight')[0] if mapping['num_classes'] else 0
  generator = Generator(
    z_dim=_shape(state, 'mapping.fc0.weight')[1] - embedded,
    w_dim=w_dim,
    channels=_widths(state, 'synthesis.b{}.conv1.weight'),
    image_channels=_shape(state, 'synthesis.b4.torgb.weight')[0],
    conv_clamp=conv_clamp,
    base_width=width if width != height else None,
    class_averages=np.ndim(state['mapping.w_avg']) == 2,
    dtype=dtype,
    **mapping,
  )
  z = np.zeros((1, generator.z_dim), np.float32)
  template = jax.eval_shape(generator.init, jax.random.key(0), z, np.zeros(1, np.int32))
  renamed = our_names(state)
  return generator, as_variables(_with_noise(renamed, template), template)


def discriminator_from_official(
  state: dict[str, np.ndarray],
  *,
  mbstd_group: int = 4,
  conv_clamp: float | None = None,
  dtype: Any = None,
) -> tuple[Discriminator, dict]:
  """The discriminator of a state_dict of D.

  Args:
    state: {official name: array}.
    mbstd_group, conv_clamp: are not in the tensors: take them from the file's constructor
      arguments.
    dtype: of the convolutions.

  Returns:
    Discriminator, variables as numpy arrays.

  Raises:
    UserError: names the first tensor that does not fit.
  """
  width, inputs = _shape(state, 'b4.conv.weight')[:2]
  channels = width, *_widths(state, 'b{}.conv0.weight', first=8)
  resolution = resolution_of(channels)
  label_features = _shape(state, 'b4.out.weight')[0]
  discriminator = Discriminator(
    channels=channels,
    image_channels=_shape(state, f'b{resolution}.fromrgb.weight')[1],
    architecture='resnet' if 'b8.skip.weight' in state else 'orig',
    mbstd_group=mbstd_group,
    mbstd_channels=inputs - width,
    label_features=label_features,
    conv_clamp=conv_clamp,
    dtype=dtype,
    **_mapping_fields(state, label_features),
  )
  images = np.zeros((1, resolution, resolution, discriminator.image_channels), np.float32)
  template = jax.eval_shape(discriminator.init, jax.random.key(0), images, np.zeros(1, np.int32))
  shape = _shape(state, 'b4.fc.weight')
  if shape != (width, 16 * width):
    raise UserError(
      f'weights: b4.fc.weight has shape {shape}, expected {width} x {16 * width}; the network is '
      'of a kind that is not supported.'
    )
  # The original flattens (C, H, W), this network (H, W, C).
  kernel = np.reshape(state['b4.fc.weight'], (-1, width, 16)).swapaxes(1, 2).reshape(width, -1)
  return discriminator, as_variables({**state, 'b4.fc.weight': kernel}, template)


def _shape(state, name):
  if name not in state:
    raise UserError(
      f'weights: {name} is missing; expected a network in the layout of stylegan2-ada-pytorch.'
    )
  return np.shape(state[name])


def _widths(state, pattern, first=4):
  """Output widths of the layers whose names are `pattern` with first, twice that, ..."""
  widths = []
  resolution = first
  while pattern.format(resolution) in state:
    widths.append(_shape(state, pattern.format(resolution))[0])
    resolution *= 2
  return tuple(widths)


def _mapping_fields(state, features) -> dict[str, Any]:
  """Fields of the network whose mapping ends in `features`; default widths are None."""
  layers = sum(re.fullmatch(r'mapping[.]fc\d+[.]weight', name) is not None for name in state)
  num_classes = 0
  embed = hidden = features
  if 'mapping.embed.weight' in state:
    embed, num_classes = _shape(state, 'mapping.embed.weight')[:2]
  if layers > 1:
    hidden = _shape(state, 'mapping.fc0.weight')[0]
  return dict(
    num_classes=num_classes,
    mapping_layers=layers,
    embed_features=embed if embed != features else None,
    layer_features=hidden if hidden != features else None,
  )


def our_names(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Official names of a generator's tensors as those below the collections of our networks."""
  renamed = {
    re.sub('^(mapping|synthesis)[.](?!w_avg)', r'\1_network.', name): x for name, x in state.items()
  }
  renamed['w_avg'] = renamed.pop('mapping.w_avg')
  return renamed


def rescaled(state: dict[str, np.ndarray], multipliers: dict[str, Any]) -> dict[str, np.ndarray]:
  """The tensors with layers of the mapping rescaled to the learning rate multiplier of ours.

  They are stored larger by 1 / lr_multiplier than they act.

  Args:
    state: {official name: array}.
    multipliers: {layer: its learning rate multiplier}.

  Raises:
    SnapshotError: numbers that are not finite then.
  """
  scaled = {}
  for name, multiplier in multipliers.items():
    if multiplier != LR_MULTIPLIER:
      factor = np.float64(multiplier / LR_MULTIPLIER)
      for kind in ('weight', 'bias'):
        scaled[f'{name}.{kind}'] = state[f'{name}.{kind}'] * factor
  check_numbers(scaled)
  return {**state, **scaled}


def _with_noise(state, template):
  """State with zeros for the noise of layers that add none."""
  flat: dict[Any, Any] = traverse_util.flatten_dict(template)
  shapes = {'.'.join(path): leaf.shape for (_, *path), leaf in flat.items()}
  strengths = [name for name in shapes if name.endswith('noise_strength')]
  zeros = {}
  if not any(name in state for name in strengths):
    zeros = {name: np.zeros(()) for name in strengths}
  for name in strengths:
    picture = f'{name.removesuffix("strength")}const'
    if not np.any(state.get(name, 0)):
      zeros[picture] = np.zeros(shapes[picture])
  return {**zeros, **state}


def as_variables(state: dict[str, np.ndarray], template: Any) -> dict:
  """Variables like `template` of tensors whose names are below its collections.

  'weight' is a 'kernel' here, of another order of axes.

  Raises:
    UserError: names the first tensor that does not fit.
  """
  expected = {}  # name below the collection: the collection, shape and dtype
  for (collection, *path), leaf in traverse_util.flatten_dict(template).items():
    expected[tuple(path)] = collection, leaf
  variables = {}
  for name, value in state.items():
    value = np.asarray(value)
    *path, kind = name.split('.')
    if kind == 'resample_filter':
      _check_filter(name, value)
      continue
    if kind == 'weight':
      kind = 'kernel'
      value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
    elif kind == 'const':
      value = np.moveaxis(value, 0, -1)
    collection, leaf = expected.pop((*path, kind), (None, None))
    if leaf is None or leaf.shape != value.shape:
      wanted = 'no such tensor' if leaf is None else leaf.shape
      raise UserError(
        f'weights: {name} has shape {value.shape} in our layout, expected {wanted}; the network is '
        'of a kind that is not supported.'
      )
    variables[collection, *path, kind] = np.array(value, leaf.dtype, order='C')
  if expected:
    raise UserError(f'weights: {".".join(next(iter(expected)))} is missing.')
  return traverse_util.unflatten_dict(variables)


def _check_filter(name, value):
  if value.shape != (4, 4) or not np.allclose(value, np.outer(ops.TAPS, ops.TAPS), atol=1e-6):
    raise UserError(f'weights: {name} is not the filter [1, 3, 3, 1]; only that one is supported.')
