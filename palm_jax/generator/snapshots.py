"""Networks of stylegan2-ada-pytorch: its snapshots (.pkl), or arrays (.npz, .safetensors).

A snapshot is Python objects with their source code, which is not run. What such an object computes
is known from its class's name and its attributes, so each attribute that changes the images must
have the value that our networks have.
"""

import contextlib
import math
import os
import pathlib
import re

import jax
import numpy as np
from absl import logging

from palm_jax.base.errors import UserError
from palm_jax.formats.arrays import check_numbers, read_arrays
from palm_jax.formats.pickle_machine import Module, short
from palm_jax.formats.torch_files import MAX_NAME, SnapshotError, modules, read, state_dict
from palm_jax.generator.discriminator import Discriminator
from palm_jax.generator.official import discriminator_from_official, generator_from_official
from palm_jax.generator.stylegan2 import Generator

SETTINGS = 'conv_clamp', 'mbstd_group'  # what a network does besides its tensors
MAX_RESOLUTION = 2048
LR_MULTIPLIER = 0.01  # of the mapping in our networks
WHOLE_BATCH = 1 << 30  # minibatch-std group, which is at most the batch

# Place, class and attributes (training/networks.py there) of what our networks do. Gains of weights
# follow from shapes.
_LINEAR = dict(activation='linear')
_LRELU = dict(activation='lrelu')
_MAPPING = [
  (r'mapping', 'MappingNetwork', {}),
  (r'mapping\.embed', 'FullyConnectedLayer', dict(_LINEAR, bias_gain=1)),
  (r'mapping\.fc\d+', 'FullyConnectedLayer', _LRELU),
]
_STYLED = dict(_LRELU, act_gain=2**0.5, use_noise=True)
_GENERATOR = [
  (r'', 'Generator', {}),
  *_MAPPING,
  (r'synthesis', 'SynthesisNetwork', {}),
  (r'synthesis\.b\d+', 'SynthesisBlock', dict(architecture='skip')),
  (r'synthesis\.b\d+\.conv0', 'SynthesisLayer', dict(_STYLED, up=2)),
  (r'synthesis\.b\d+\.conv1', 'SynthesisLayer', dict(_STYLED, up=1)),
  (r'synthesis\.b\d+\.torgb', 'ToRGBLayer', {}),
  (r'synthesis\.b\d+\.\w+\.affine', 'FullyConnectedLayer', dict(_LINEAR, bias_gain=1)),
]
_CONV = dict(_LRELU, act_gain=2**0.5, up=1)
_DISCRIMINATOR = [
  (r'', 'Discriminator', {}),
  *_MAPPING,
  (r'b4', 'DiscriminatorEpilogue', {}),
  (r'b4\.mbstd', 'MinibatchStdLayer', {}),
  (r'b4\.conv', 'Conv2dLayer', dict(_CONV, down=1)),
  (r'b4\.fc', 'FullyConnectedLayer', dict(_LRELU, bias_gain=1)),
  (r'b4\.out', 'FullyConnectedLayer', dict(_LINEAR, bias_gain=1)),
  (r'b\d+', 'DiscriminatorBlock', {}),
  (r'b\d+\.(fromrgb|conv0)', 'Conv2dLayer', dict(_CONV, down=1)),
  (r'b\d+\.conv1', 'Conv2dLayer', dict(_CONV, down=2)),
  (r'b\d+\.skip', 'Conv2dLayer', dict(_LINEAR, act_gain=1, up=1, down=2, conv_clamp=None)),
]
_WEIGHTED = 'FullyConnectedLayer', 'Conv2dLayer', 'ToRGBLayer'
_CLAMPED = 'SynthesisLayer', 'ToRGBLayer', 'Conv2dLayer'


def load_snapshot(path: str | os.PathLike, network: str = 'G_ema') -> tuple[Generator, dict]:
  """A generator of stylegan2-ada-pytorch.

  Args:
    path: .pkl snapshot, or .npz or .safetensors with the names of its state_dict, alone
      ('synthesis.b4.const') or below the network's name ('G_ema/synthesis.b4.const'). Those know no
      conv_clamp unless an entry 'conv_clamp' (.npz) or metadata key of this name (.safetensors)
      gives it.
    network: 'G_ema', the average over the training, or 'G'.

  Returns:
    (Generator, variables): float32 numpy arrays. Networks that ran partly in float16 run in
      float32.

  Raises:
    SnapshotError: no such file, damage, numbers that are not finite, or a network that `Generator`
      is not.
  """
  path = pathlib.Path(path)
  if network not in ('G', 'G_ema'):
    raise UserError(f'network {network!r}: expected G_ema (the average over the training) or G')
  with _path_in_errors(path):
    state, module, settings = _open(path, network)
    if module is not None:
      settings = dict(conv_clamp=_check_parts(module, network, _GENERATOR))
      state = _common_multiplier(module, state)
    G, variables = generator_from_official(state, conv_clamp=_clamp(settings))
    if module is not None:
      _check_sizes(
        module,
        z_dim=G.z_dim,
        w_dim=G.w_dim,
        c_dim=G.num_classes,
        img_resolution=G.resolution,
        img_channels=G.image_channels,
        num_ws=G.num_ws,
      )
  _log(path, network, G, f'z {G.z_dim}, w {G.w_dim}', variables)
  return G, variables


def load_discriminator(path: str | os.PathLike) -> tuple[Discriminator, dict]:
  """The discriminator 'D' of a file as for `load_snapshot`.

  An .npz or .safetensors may give 'mbstd_group' (else 4) as it gives 'conv_clamp'.

  Returns:
    (Discriminator, variables): float32 numpy arrays.

  Raises:
    SnapshotError: as `load_snapshot`.
  """
  path = pathlib.Path(path)
  with _path_in_errors(path):
    state, module, settings = _open(path, 'D')
    if module is not None:
      clamp = _check_parts(module, 'D', _DISCRIMINATOR)
      settings = dict(conv_clamp=clamp, mbstd_group=_check_discriminator(module))
      state = _common_multiplier(module, state)
    D, variables = discriminator_from_official(
      state, mbstd_group=_group(settings), conv_clamp=_clamp(settings)
    )
    if module is not None:
      _check_sizes(
        module, c_dim=D.num_classes, img_resolution=D.resolution, img_channels=D.image_channels
      )
  _log(path, 'D', D, f'{D.architecture}, minibatch-std group {D.mbstd_group}', variables)
  return D, variables


@contextlib.contextmanager
def _path_in_errors(path):
  """Puts the path before what is wrong, once.

  What damaged sizes lead to becomes a SnapshotError too.
  """
  try:
    yield
  except UserError as e:
    message = str(e)
    raise SnapshotError(message if message.startswith(f'{path}') else f'{path}: {message}') from e
  except (ArithmeticError, AttributeError, LookupError, MemoryError, TypeError, ValueError) as e:
    raise SnapshotError(
      f'{path}: the weights do not belong together ({type(e).__name__}); fetch or save it again'
    ) from e


def _open(path, network):
  """A network's {name: array}, its Module, and its {setting: text}.

  Files of arrays have no Module (None), snapshots no settings.
  """
  if path.suffix in ('.npz', '.safetensors'):
    module = None
    arrays, settings = _open_arrays(path, network)
  else:
    module = _open_module(path, network)
    arrays, settings = state_dict(module), {}
    if sum(x.nbytes for x in arrays.values()) > path.stat().st_size:
      raise SnapshotError(f'{network} names the same numbers twice; it is damaged')
  for name in arrays:
    if not name.isprintable() or len(name) > MAX_NAME:
      raise SnapshotError(f'{name[:40]!r} in it is no name of a tensor; it is damaged')
  resolutions = [int(r) for name in arrays for r in re.findall(r'\bb(\d{1,9})\.', name)]
  if max(resolutions, default=0) > MAX_RESOLUTION:
    raise SnapshotError(f'resolution {max(resolutions)}: expected at most {MAX_RESOLUTION}')
  check_numbers(arrays)
  return arrays, module, settings


def _open_arrays(path, network):
  arrays, settings = read_arrays(path)
  if path.suffix == '.npz':  # which has no metadata
    settings = {name: str(arrays.pop(name)) for name in SETTINGS if name in arrays}
  prefix = f'{network}/'
  if any('/' in name for name in arrays):
    arrays = {name.removeprefix(prefix): x for name, x in arrays.items() if name.startswith(prefix)}
    if not arrays:
      raise SnapshotError(f'no {network} in it: give a file with names such as {prefix}...')
  return arrays, settings


def _open_module(path, network):
  snapshot = read(path)
  if type(snapshot) is not dict or network not in snapshot:
    raise SnapshotError(
      f'no {network} in it: expected a snapshot of stylegan2-ada-pytorch, with G, D and G_ema'
    )
  module = snapshot[network]
  if not isinstance(module, Module):
    raise SnapshotError(
      f'its {network} is not a network: expected a snapshot of stylegan2-ada-pytorch'
    )
  return module


def _check_parts(module, network, known):
  """Compares all parts of a network with what our network does; returns their shared conv_clamp."""
  clamps = {}
  for name, part in modules(module):
    full = f'{network}.{name}' if name else network
    _check_part(full, name, part, known)
    if part.class_name in _CLAMPED and 'skip' not in name:
      clamps[full] = part.state.get('conv_clamp', 'missing')
  first = next(iter(clamps.values()), None)
  for full, clamp in clamps.items():
    if type(clamp) not in (int, float, type(None)) or clamp != first:
      raise SnapshotError(
        f'{full} has conv_clamp={short(clamp)}, expected {short(first)} as elsewhere'
      )
  return first


def _check_part(full, name, part, known):
  """`full` is its name for messages, `name` its place in the network."""
  expected = [
    attributes
    for pattern, class_name, attributes in known
    if part.class_name == class_name and re.fullmatch(pattern, name)
  ]
  if not expected:
    raise SnapshotError(
      f'{full} is a {short(part.class_name)}, which is not part of the StyleGAN2 known here; '
      'expected a network of stylegan2-ada-pytorch'
    )
  for attribute, value in expected[0].items():
    _check_attribute(full, part, attribute, value)
  if part.class_name in _WEIGHTED:
    multiplier = part.state.get('bias_gain', 1)
    if type(multiplier) not in (int, float) or not 0 < multiplier < math.inf:
      raise SnapshotError(f'{full} has bias_gain={short(multiplier)}, expected a positive number')
    fan_in = math.prod(_weight(part).shape[1:])
    _check_attribute(full, part, 'weight_gain', multiplier / math.sqrt(fan_in))
  if part.class_name == 'MappingNetwork':
    layers = sum(re.fullmatch(r'fc\d+', child) is not None for child in part.state['_modules'])
    _check_attribute(full, part, 'num_layers', layers)


def _check_discriminator(module):
  """What the parts of a discriminator must share; returns its minibatch-std group."""
  parts = dict(modules(module))
  architecture = parts['b4'].state.get('architecture')
  if architecture not in ('orig', 'resnet'):
    raise SnapshotError(f'D has architecture={short(architecture)}, expected orig or resnet')
  for name, part in parts.items():
    if part.class_name == 'DiscriminatorBlock':
      _check_attribute(f'D.{name}', part, 'architecture', architecture)
  width, inputs = _weight(parts['b4.conv']).shape[:2]
  if 'b4.mbstd' not in parts:
    if inputs != width:
      raise SnapshotError('D.b4.mbstd is missing; it is damaged')
    return 1  # unused
  _check_attribute('D.b4.mbstd', parts['b4.mbstd'], 'num_channels', inputs - width)
  group = parts['b4.mbstd'].state.get('group_size', 'missing')
  return WHOLE_BATCH if group is None else group


def _common_multiplier(module, state):
  """The tensors with mapping layers rescaled to the learning rate multiplier of our networks.

  They are stored larger by 1 / lr_multiplier than they act.
  """
  scaled = {}
  for name, part in modules(module):
    if re.fullmatch(r'mapping\.fc\d+', name) and part.state['bias_gain'] != LR_MULTIPLIER:
      factor = np.float64(part.state['bias_gain'] / LR_MULTIPLIER)
      for kind in ('weight', 'bias'):
        scaled[f'{name}.{kind}'] = state[f'{name}.{kind}'] * factor
  check_numbers(scaled)
  return {**state, **scaled}


def _check_sizes(module, **sizes):
  """Sizes that the network's attributes and constructor arguments name, against its tensors'."""
  for source in (module.state, module.state.get('_init_kwargs', {})):
    for name, size in sizes.items():
      if source.get(name, size) != size:
        raise SnapshotError(
          f'{name} is {short(source[name])}, but its tensors say {size}; it is damaged'
        )


def _weight(part):
  frozen = part.state['_buffers'].get('weight')
  return part.state['_parameters'].get('weight', frozen)


def _check_attribute(name, part, attribute, expected):
  value = part.state.get(attribute, 'missing')
  if type(expected) in (int, float):
    same = type(value) in (int, float) and math.isclose(value, expected, rel_tol=1e-6)
  else:
    same = type(value) is type(expected) and value == expected
  if not same:
    raise SnapshotError(
      f'{name} has {attribute}={short(value)}, expected {expected}: a network of another kind, '
      'whose images would differ'
    )


def _clamp(settings):
  clamp = settings.get('conv_clamp')
  if clamp in (None, '', 'None'):
    return None
  clamp = float(clamp)
  if not 0 < clamp < math.inf:
    raise SnapshotError(f'conv_clamp={clamp}, expected a positive number')
  return clamp


def _group(settings):
  group = settings.get('mbstd_group', 4)
  if type(group) is str and group.isdecimal():
    group = int(group)
  if type(group) is not int or not 0 < group < 1 << 31:
    raise SnapshotError(
      f'mbstd_group={short(group)}, expected a positive number: a discriminator of another kind'
    )
  return group


def _log(path, network, module, more, variables):
  side = module.resolution
  count = sum(x.size for x in jax.tree.leaves(variables['params']))
  logging.info(
    f'{path}: {network}, {side} x {side} x {module.image_channels}, {module.num_classes} classes, '
    f'{more}, {module.mapping_layers} mapping layers, channels {module.channels}, '
    f'conv_clamp {module.conv_clamp}, {count} parameters'
  )
