"""Networks of stylegan2-ada-pytorch out of files: its snapshots (.pkl), or arrays under its names
(.npz, .safetensors).

A snapshot is Python objects with their source code, which is not run: what such an object computes
is known from the class's name and attributes, and each attribute that changes the images must have
the value that our networks have.
"""

import contextlib
import math
import pathlib
import re
import tokenize
import zipfile
import zlib

import jax
import numpy as np
import safetensors
from absl import logging

from palm_jax.base.errors import UserError
from palm_jax.formats.pickle_machine import Module, short
from palm_jax.formats.torch_files import (
  MAX_NAME,
  SnapshotError,
  check_file,
  modules,
  read,
  state_dict,
)
from palm_jax.generator.stylegan2 import discriminator_from_official, generator_from_official

FLOATS = 'bfloat16', 'float16', 'float32', 'float64'
MAX_RESOLUTION = 2048
LR_MULTIPLIER = 0.01  # of the mapping in our networks
WHOLE_BATCH = 1 << 30  # minibatch-std group, which is at most the batch
MAX_HEADER = 1 << 20  # bytes of a .safetensors' header; those of a network take some 20 kB
MOST_PACKED = 8  # times that an .npz may grow when unpacked; float weights hardly shrink at all

# Place, class and attributes (training/networks.py there) of what our networks do. Gains of weights
# follow from shapes.
_LINEAR, _LRELU = dict(activation='linear'), dict(activation='lrelu')
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


def load_snapshot(path, network='G_ema'):
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
  with _said_of(path):
    state, module, settings = _open(path, network)
    if module is not None:
      settings['conv_clamp'] = _check_parts(module, network, _GENERATOR)
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


def load_discriminator(path):
  """The discriminator 'D' of a file as for `load_snapshot`; .npz and .safetensors may give
  'mbstd_group' (else 4) too.

  Returns:
    (Discriminator, variables): float32 numpy arrays.

  Raises:
    SnapshotError: as `load_snapshot`.
  """
  path = pathlib.Path(path)
  with _said_of(path):
    state, module, settings = _open(path, 'D')
    if module is not None:
      settings = dict(
        conv_clamp=_check_parts(module, 'D', _DISCRIMINATOR),
        mbstd_group=_check_discriminator(module),
      )
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


def read_arrays(path):
  """The arrays of an .npz or .safetensors file, which may be no larger in memory than such a file
  can be.

  Returns:
    {name: array}, {key: text}: the arrays, and what else the file says of them.

  Raises:
    SnapshotError: no such file, or damage.
  """
  path = check_file(path)
  try:
    if path.suffix == '.npz':
      return _read_npz(path)
    with path.open('rb') as file:
      if int.from_bytes(file.read(8), 'little') > MAX_HEADER:
        raise ValueError(f'its header is longer than {MAX_HEADER} bytes')
    with safetensors.safe_open(path, 'np') as file:
      return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
  except (
    OSError,
    EOFError,
    AttributeError,
    LookupError,
    MemoryError,
    NotImplementedError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
    safetensors.SafetensorError,
  ) as e:
    raise SnapshotError(
      f'{path}: not a readable {path.suffix} of weights ({" ".join(str(e).split())[:200]}); '
      'fetch or save it again'
    ) from e


def check_numbers(arrays):
  """Raises SnapshotError at the first of {name: array} that is not of floating-point numbers,
  finite in float32."""
  for name, x in arrays.items():
    if x.dtype.name not in FLOATS:
      raise SnapshotError(f'{name} is of type {x.dtype.name}, expected one of {", ".join(FLOATS)}')
    if not np.abs(x).max(initial=0) <= np.finfo(np.float32).max:
      raise SnapshotError(
        f'{name} holds NaN or infinite numbers; the file is damaged or the training had diverged'
      )


@contextlib.contextmanager
def _said_of(path):
  """Puts the path before what is wrong, once; what damaged sizes lead to becomes a SnapshotError
  too."""
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
  """{name: array} of a network, its Module (None of .npz and .safetensors), what is known of it
  besides."""
  if path.suffix in ('.npz', '.safetensors'):
    arrays, settings = read_arrays(path)
    module, prefix = None, f'{network}/'
    if any('/' in name for name in arrays):
      arrays = {
        name.removeprefix(prefix): x for name, x in arrays.items() if name.startswith(prefix)
      }
      if not arrays:
        raise SnapshotError(f'no {network} in it: give a file with names such as {prefix}...')
  else:
    snapshot, settings = read(path), {}
    if type(snapshot) is not dict or network not in snapshot:
      raise SnapshotError(
        f'no {network} in it: expected a snapshot of stylegan2-ada-pytorch, with G, D and G_ema'
      )
    module = snapshot[network]
    if not isinstance(module, Module):
      raise SnapshotError(
        f'its {network} is not a network: expected a snapshot of stylegan2-ada-pytorch'
      )
    arrays = state_dict(module)
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


def _read_npz(path):
  arrays, room = {}, MOST_PACKED * path.stat().st_size + (1 << 20)
  with zipfile.ZipFile(path) as archive:
    for info in archive.infolist():
      room -= info.file_size
      if room < 0:
        raise ValueError(f'it unpacks to more than {MOST_PACKED} times its size')
      if info.compress_type not in (
        zipfile.ZIP_STORED,
        zipfile.ZIP_DEFLATED,
      ):  # others unpack without a bound
        raise ValueError(f'{info.filename[:80]!r} is packed in another way than numpy does')
      with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        header = {
          (1, 0): np.lib.format.read_array_header_1_0,
          (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, fortran_order, dtype = header(file)
        size = info.file_size - file.tell()
        if dtype.hasobject or math.prod(shape) * dtype.itemsize != size:
          raise ValueError(f'{info.filename} is not as long as its header says')
        data = file.read(size + 1)  # to its end, where the checksum is compared
      arrays[info.filename.removesuffix('.npy')] = np.frombuffer(data, dtype).reshape(
        shape, order='F' if fortran_order else 'C'
      )
  return arrays, {
    name: str(arrays.pop(name)) for name in ('conv_clamp', 'mbstd_group') if name in arrays
  }


def _check_parts(module, network, known):
  """Compares all parts of a network with what our network does; returns the conv_clamp that they
  share."""
  clamps = {}
  for name, part in modules(module):
    full = f'{network}.{name}' if name else network
    place = next(
      (
        attributes
        for pattern, kind, attributes in known
        if part.class_name == kind and re.fullmatch(pattern, name)
      ),
      None,
    )
    if place is None:
      raise SnapshotError(
        f'{full} is a {short(part.class_name)}, which is not part of the StyleGAN2 known here; '
        'expected a network of stylegan2-ada-pytorch'
      )
    for attribute, value in place.items():
      _check_attribute(full, part, attribute, value)
    if part.class_name in ('FullyConnectedLayer', 'Conv2dLayer', 'ToRGBLayer'):
      multiplier = part.state.get('bias_gain', 1)
      if type(multiplier) not in (int, float) or not 0 < multiplier < math.inf:
        raise SnapshotError(f'{full} has bias_gain={short(multiplier)}, expected a positive number')
      _check_attribute(
        full, part, 'weight_gain', multiplier / math.sqrt(math.prod(_weight(part).shape[1:]))
      )
    if (
      part.class_name in ('SynthesisLayer', 'ToRGBLayer')
      or part.class_name == 'Conv2dLayer'
      and 'skip' not in name
    ):
      clamps[full] = part.state.get('conv_clamp', 'missing')
    if part.class_name == 'MappingNetwork':
      layers = sum(re.fullmatch(r'fc\d+', child) is not None for child in part.state['_modules'])
      _check_attribute(full, part, 'num_layers', layers)
  first = next(iter(clamps.values()), None)
  for full, clamp in clamps.items():
    if type(clamp) not in (int, float, type(None)) or clamp != first:
      raise SnapshotError(
        f'{full} has conv_clamp={short(clamp)}, expected {short(first)} as elsewhere'
      )
  return first


def _check_discriminator(module):
  """What the parts of a discriminator must share; returns the group of its minibatch standard
  deviation."""
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
  """Stored mapping layers are larger by 1 / lr_multiplier than they act: rescaled to the one that
  our networks have."""
  scaled = {}
  for name, part in modules(module):
    if re.fullmatch(r'mapping\.fc\d+', name) and part.state['bias_gain'] != LR_MULTIPLIER:
      for kind in ('weight', 'bias'):
        scaled[f'{name}.{kind}'] = state[f'{name}.{kind}'] * np.float64(
          part.state['bias_gain'] / LR_MULTIPLIER
        )
  check_numbers(scaled)
  return {**state, **scaled}


def _check_sizes(module, **sizes):
  """The sizes that the network names, in its attributes and constructor arguments, against those of
  its tensors."""
  for source in (module.state, module.state.get('_init_kwargs', {})):
    for name, size in sizes.items():
      if source.get(name, size) != size:
        raise SnapshotError(
          f'{name} is {short(source[name])}, but its tensors say {size}; it is damaged'
        )


def _weight(part):
  return part.state['_parameters'].get(
    'weight', part.state['_buffers'].get('weight')
  )  # a buffer where it was frozen


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
  count = sum(x.size for x in jax.tree.leaves(variables['params']))
  logging.info(
    '%s: %s, %d x %d x %d, %d classes, %s, %d mapping layers, channels %s, conv_clamp %s, %d '
    'parameters',
    path,
    network,
    module.resolution,
    module.resolution,
    module.image_channels,
    module.num_classes,
    more,
    module.mapping_layers,
    module.channels,
    module.conv_clamp,
    count,
  )
