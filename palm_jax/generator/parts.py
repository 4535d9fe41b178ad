"""What the objects in a snapshot of stylegan2-ada-pytorch say that they compute.

A snapshot is Python objects with their source code, which is not run. What such an object computes
is known from its class's name and its attributes, so each attribute that changes the images must
have the value that our networks have.
"""

import math
import re
from typing import Any

from palm_jax.formats.kinds import SnapshotError
from palm_jax.formats.pickle_values import Inert, short
from palm_jax.formats.torch_files import modules

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
_STYLED = dict(_LRELU, act_gain=2**0.5)
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


def check_generator(module: Inert, label: str) -> dict[str, Any]:
  """The settings of a generator that stand beside its tensors: {'conv_clamp': number or None}.

  Args:
    module: the generator.
    label: its name for messages.

  Raises:
    SnapshotError: names the part that computes something else than ours.
  """
  return dict(conv_clamp=_check_parts(module, label, _GENERATOR))


def check_discriminator(module: Inert, label: str) -> dict[str, Any]:
  """As `check_generator`: {'conv_clamp', 'mbstd_group'} of a discriminator."""
  clamp = _check_parts(module, label, _DISCRIMINATOR)
  return dict(conv_clamp=clamp, mbstd_group=_check_discriminator(module))


def check_sizes(module: Inert, **sizes: int) -> None:
  """Compares the sizes that a network's attributes and constructor arguments name.

  Args:
    module: the network.
    **sizes: what its tensors say.

  Raises:
    SnapshotError: they differ.
  """
  for source in (module.state, module.state.get('_init_kwargs')):
    if isinstance(source, Inert):
      source = source.state
    if type(source) is not dict:
      continue
    for name, size in sizes.items():
      if source.get(name, size) != size:
        raise SnapshotError(
          f'{name} is {short(source[name])}, but its tensors say {size}; it is damaged'
        )


def lr_multipliers(module: Inert) -> dict[str, float]:
  """{name of a layer of the mapping: its learning rate multiplier}."""
  return {
    name: part.state['bias_gain']
    for name, part in modules(module)
    if re.fullmatch(r'mapping\.fc\d+', name)
  }


def without_noise(module: Inert) -> list[str]:
  """Names of the layers that add no noise, whatever tensors they have.

  Raises:
    SnapshotError: a layer that does not say.
  """
  silent = []
  for name, part in modules(module):
    if kind_of(part) == 'SynthesisLayer':
      use = part.state.get('use_noise', 'missing')
      if type(use) is not bool or use and 'noise_strength' not in part.state['_parameters']:
        raise SnapshotError(
          f'{name} has use_noise={short(use)}, expected False, or True and a noise_strength'
        )
      if not use:
        silent.append(name)
  return silent


def kind_of(part: Inert) -> str:
  """The name of its class, without the module that other people's copies have."""
  return part.class_name.rpartition('.')[2]


def _check_parts(module, network, known):
  """Compares all parts of a network with what our network does; returns their shared conv_clamp."""
  clamps = {}
  for name, part in modules(module):
    full = f'{network}.{name}' if name else network
    _check_part(full, name, part, known)
    if kind_of(part) in _CLAMPED and 'skip' not in name:
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
    if kind_of(part) == class_name and re.fullmatch(pattern, name)
  ]
  if not expected:
    raise SnapshotError(
      f'{full} is a {short(part.class_name)}, which is not part of the StyleGAN2 known here; '
      'expected a network of stylegan2-ada-pytorch'
    )
  for attribute, value in expected[0].items():
    _check_attribute(full, part, attribute, value)
  if kind_of(part) in _WEIGHTED:
    multiplier = part.state.get('bias_gain', 1)
    if type(multiplier) not in (int, float) or not 0 < multiplier < math.inf:
      raise SnapshotError(f'{full} has bias_gain={short(multiplier)}, expected a positive number')
    fan_in = math.prod(_weight(part).shape[1:])
    _check_attribute(full, part, 'weight_gain', multiplier / math.sqrt(fan_in))
  if kind_of(part) == 'MappingNetwork':
    layers = sum(re.fullmatch(r'fc\d+', child) is not None for child in part.state['_modules'])
    _check_attribute(full, part, 'num_layers', layers)


def _check_discriminator(module):
  """What the parts of a discriminator must share; returns its minibatch-std group."""
  parts = dict(modules(module))
  architecture = parts['b4'].state.get('architecture')
  if architecture not in ('orig', 'resnet'):
    raise SnapshotError(f'D has architecture={short(architecture)}, expected orig or resnet')
  for name, part in parts.items():
    if kind_of(part) == 'DiscriminatorBlock':
      _check_attribute(f'D.{name}', part, 'architecture', architecture)
  width, inputs = _weight(parts['b4.conv']).shape[:2]
  if 'b4.mbstd' not in parts:
    if inputs != width:
      raise SnapshotError('D.b4.mbstd is missing; it is damaged')
    return 1  # unused
  _check_attribute('D.b4.mbstd', parts['b4.mbstd'], 'num_channels', inputs - width)
  group = parts['b4.mbstd'].state.get('group_size', 'missing')
  return WHOLE_BATCH if group is None else group


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
