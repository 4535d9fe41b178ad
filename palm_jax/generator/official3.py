"""The generator of NVlabs/stylegan3 (training/networks_stylegan3.py there) as ours.

A snapshot holds Python objects, whose source is not run. What they compute is known from their
classes and attributes: each that changes pictures is read, or must be what `StyleGAN3` does. The
design of filters is not repeated, they are tensors.
"""

import math
import re
from typing import Any

import jax
import numpy as np

from palm_jax.base.errors import UserError
from palm_jax.formats.arrays import check_numbers
from palm_jax.formats.pickle_values import Inert, short
from palm_jax.formats.torch_files import modules
from palm_jax.generator.layers3 import MAX_NUMBER, Layer, misfit
from palm_jax.generator.official import as_variables, our_names, rescaled
from palm_jax.generator.parts import kind_of
from palm_jax.generator.stylegan3 import StyleGAN3

_LAYER = r'synthesis\.L\d{1,2}_\d{1,5}_\d{1,5}'
_CLASSES = [
  (r'', 'Generator'),
  (r'mapping', 'MappingNetwork'),
  (r'mapping\.(embed|fc\d{1,2})', 'FullyConnectedLayer'),
  (r'synthesis', 'SynthesisNetwork'),
  (r'synthesis\.input', 'SynthesisInput'),
  (_LAYER, 'SynthesisLayer'),
  (rf'(synthesis\.input|{_LAYER})\.affine', 'FullyConnectedLayer'),
]


def stylegan3_from_official(
  state: dict[str, np.ndarray], module: Inert | None, *, dtype: Any = None
) -> tuple[StyleGAN3, dict]:
  """The generator of a G or G_ema.

  Args:
    state: {official name: array}, its `torch_files.state_dict`.
    module: the object itself, which `torch_files.read` gives.
    dtype: of the convolutions.

  Returns:
    StyleGAN3, variables as float32 numpy arrays.

  Raises:
    UserError: names the first part or tensor that does not fit, or that computes something else.
  """
  if module is None:
    raise UserError(
      'weights: the state_dict of a StyleGAN3 does not hold the paddings and sampling rates of its '
      'layers; give the .pkl snapshot instead.'
    )
  check_numbers(state)
  parts = _known_parts(module)
  mapping = _mapping_fields(state, parts)
  network = _network(parts, mapping, dtype)
  wrong = misfit(network)
  if wrong:
    raise UserError(f'weights: {wrong}; it is damaged, or of a kind that is not supported.')
  _check_sizes(parts, network)
  state = rescaled(state, _multipliers(state, parts))
  z = np.zeros((1, network.z_dim), np.float32)
  template = jax.eval_shape(network.init, jax.random.key(0), z, np.zeros(1, np.int32))
  variables = as_variables(our_names(state), template)
  for name, x in state.items():
    if name.endswith('.magnitude_ema') and not x > 0:
      raise UserError(f'weights: {name} is {x}, expected a positive number; it is damaged.')
  return network, variables


class _Part:
  """A part of the network, whose attributes raise UserError unless they are as expected."""

  def __init__(self, name: str, inert: Inert):
    self.name, self.inert = name or 'the generator', inert

  def get(self, attribute):
    value = self.inert.state.get(attribute, 'missing')
    return value.item() if isinstance(value, np.generic) else value

  def wrong(self, attribute, expected):
    value = self.get(attribute)
    plain = isinstance(value, list) and all(type(x) in (int, float, str) for x in value[:8])
    few = isinstance(value, np.ndarray) and value.size <= 8 or plain and len(value) <= 8
    shown = str(value)[:80] if few else short(value)
    return UserError(f'weights: {self.name} has {attribute}={shown}, expected {expected}.')

  def expect(self, attribute, expected):
    value = self.get(attribute)
    same = type(value) is type(expected) and value == expected
    if type(expected) in (int, float):
      same = type(value) in (int, float) and abs(value) < MAX_NUMBER
      same = same and math.isclose(value, expected, rel_tol=1e-6)
    if not same:
      raise self.wrong(attribute, expected)

  def integer(self, attribute):
    value = self.get(attribute)
    if type(value) is not int:
      raise self.wrong(attribute, 'an integer')
    return value

  def number(self, attribute):
    value = self.get(attribute)
    if type(value) not in (int, float) or not 0 < value < MAX_NUMBER:
      raise self.wrong(attribute, 'a positive number')
    return float(value)

  def flag(self, attribute):
    value = self.get(attribute)
    if type(value) is not bool:
      raise self.wrong(attribute, 'True or False')
    return value

  def side(self, attribute):
    """Of a square picture: its width and height are an array."""
    value = self.get(attribute)
    if isinstance(value, np.ndarray) and value.shape == (2,) and value.dtype.kind in 'iu':
      value = value.tolist()
    if type(value) is int:
      value = [value, value]
    if type(value) is not list or len(value) != 2 or value[0] != value[1]:
      raise self.wrong(attribute, 'the same width and height')
    return value[0]

  def padding(self):
    value = self.get('padding')
    if type(value) not in (list, tuple) or [type(x) for x in value] != [int] * 4:
      raise self.wrong('padding', 'four integers')
    return tuple(value)

  def clamp(self):
    return None if self.get('conv_clamp') is None else self.number('conv_clamp')


def _known_parts(module):
  """{dotted name: _Part} of all parts, each of a class that is known at its place."""
  parts = {}
  for name, part in modules(module):
    if not any(kind_of(part) == kind and re.fullmatch(place, name) for place, kind in _CLASSES):
      raise UserError(
        f'weights: {name or "the generator"} is a {short(part.class_name)}, which is not part of '
        'the StyleGAN3 known here; expected a network of NVlabs/stylegan3.'
      )
    parts[name] = _Part(name, part)
  for name in ('mapping', 'synthesis', 'synthesis.input'):
    _part(parts, name)
  return parts


def _part(parts, name):
  if name not in parts:
    raise UserError(f'weights: {name} is missing; expected a network of NVlabs/stylegan3.')
  return parts[name]


def _mapping_fields(state, parts):
  """Fields of the network out of the mapping's tensors."""
  (w_dim,) = _shape(state, 'mapping.w_avg', 1)
  layers = sum(name.startswith('mapping.fc') for name in parts)
  num_classes = 0
  if 'mapping.embed' in parts:
    num_classes = _shape(state, 'mapping.embed.weight', 2)[1]
    _check_dense(_part(parts, 'mapping.embed'), num_classes)
  inputs = _shape(state, 'mapping.fc0.weight', 2)[1]
  z_dim = inputs - (w_dim if num_classes else 0)
  for i in range(layers):
    part = _part(parts, f'mapping.fc{i}')
    _check_dense(part, w_dim if i else inputs, 'lrelu', part.number('bias_gain'))
  return dict(z_dim=z_dim, w_dim=w_dim, num_classes=num_classes, mapping_layers=layers)


def _shape(state, name, ndim):
  if name not in state:
    raise UserError(f'weights: {name} is missing; expected a network of NVlabs/stylegan3.')
  shape = state[name].shape
  if len(shape) != ndim or 0 in shape:
    raise UserError(f'weights: {name} has shape {shape}, expected {ndim} axes; it is damaged.')
  return shape


def _check_dense(part, inputs, activation='linear', multiplier=1.0):
  part.expect('activation', activation)
  part.expect('weight_gain', multiplier / math.sqrt(inputs))
  part.expect('bias_gain', multiplier)


def _network(parts, mapping, dtype):
  """The network that the attributes of the synthesis describe."""
  synthesis, features = parts['synthesis'], parts['synthesis.input']
  inside = [name for name in synthesis.inert.state['_modules'] if name != 'input']
  synthesis.expect('layer_names', inside)
  layers = []
  before = dict(sampling_rate=features.number('sampling_rate'), cutoff=features.number('bandwidth'))
  _check_dense(_part(parts, 'synthesis.input.affine'), mapping['w_dim'])
  for name in inside:
    part = _part(parts, f'synthesis.{name}')
    _check_dense(_part(parts, f'synthesis.{name}.affine'), mapping['w_dim'])
    layers.append(_layer(part))
    before = _check_rates(part, before)
  if not layers:
    raise synthesis.wrong('layer_names', 'the name of a layer or more')
  return StyleGAN3(
    **mapping,
    layers=tuple(layers),
    sampling_rate=features.number('sampling_rate'),
    bandwidth=features.number('bandwidth'),
    output_scale=synthesis.number('output_scale'),
    dtype=dtype,
  )


def _layer(part):
  if part.flag('is_critically_sampled'):
    part.expect('down_radial', False)
  return Layer(
    in_channels=part.integer('in_channels'),
    out_channels=part.integer('out_channels'),
    in_size=part.side('in_size'),
    out_size=part.side('out_size'),
    kernel=part.integer('conv_kernel'),
    up=part.integer('up_factor'),
    down=part.integer('down_factor'),
    padding=part.padding(),
    up_taps=part.integer('up_taps'),
    down_taps=part.integer('down_taps'),
    down_radial=part.flag('down_radial'),
    is_torgb=part.flag('is_torgb'),
    conv_clamp=part.clamp(),
  )


def _check_rates(part, before):
  """Compares rates with the factors and the layer before; returns what the next one follows on."""
  for kind, value in before.items():
    part.expect(f'in_{kind}', value)
  part.expect('tmp_sampling_rate', part.number('in_sampling_rate') * part.integer('up_factor'))
  part.expect('tmp_sampling_rate', part.number('out_sampling_rate') * part.integer('down_factor'))
  return {k: part.number(f'out_{k}') for k in ('sampling_rate', 'cutoff', 'half_width')}


def _check_sizes(parts, network):
  """Compares the sizes that parts name with those of the network."""
  sizes = dict(z_dim=network.z_dim, c_dim=network.num_classes, w_dim=network.w_dim)
  image = dict(img_resolution=network.resolution, img_channels=network.image_channels)
  layers = len(network.layers)
  first = network.layers[0]
  expected = {
    '': dict(sizes, **image, num_ws=network.num_ws),
    'mapping': dict(sizes, num_ws=network.num_ws, num_layers=network.mapping_layers),
    'synthesis': dict(
      image,
      w_dim=network.w_dim,
      num_ws=network.num_ws,
      num_layers=layers - 1,
      layer_names=[*network.layer_names],
    ),
    'synthesis.input': dict(w_dim=network.w_dim, channels=first.in_channels),
    **{f'synthesis.{name}': dict(w_dim=network.w_dim) for name in network.layer_names},
  }
  for name, attributes in expected.items():
    for attribute, size in attributes.items():
      _part(parts, name).expect(attribute, size)
  if parts['synthesis.input'].side('size') != first.in_size:
    raise parts['synthesis.input'].wrong('size', f'{first.in_size} as the first layer')
  arguments = parts[''].inert.state.get('_init_kwargs')
  for name, size in expected[''].items():
    if type(arguments) is dict and arguments.get(name, size) != size:
      raise UserError(
        f'weights: {name} is {short(arguments[name])}, but its tensors say {size}; it is damaged.'
      )


def _multipliers(state, parts):
  """{layer of the mapping: its learning rate multiplier}, of layers that have both tensors."""
  layers = [name for name in parts if name.startswith('mapping.fc')]
  for name in layers:
    _shape(state, f'{name}.weight', 2)
    _shape(state, f'{name}.bias', 1)
  return {name: parts[name].number('bias_gain') for name in layers}
