"""Our own forms of a generator on disk: one .safetensors file, or a folder with a checkpoint."""

import dataclasses
import json
import os
import pathlib
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from flax import traverse_util

from palm_jax.base.checkpoints import load
from palm_jax.base.errors import UserError
from palm_jax.base.files import as_json, replacing
from palm_jax.formats.arrays import check_numbers
from palm_jax.formats.kinds import SnapshotError
from palm_jax.generator.loaded import LoadedGenerator
from palm_jax.generator.sines import SirenGenerator
from palm_jax.generator.stylegan2 import LR_MULTIPLIER, Generator
from palm_jax.generator.stylegan3 import StyleGAN3

MAX_SIZE = 1 << 16  # of any width, and of the number of classes
MAX_RESOLUTIONS = 17
MAX_POINTS = 1 << 13  # of a side that sines are computed at
MAX_MAPPING_LAYERS = 64
Network = Generator | StyleGAN3 | SirenGenerator
NETWORKS = dict(stylegan2=Generator, stylegan3=StyleGAN3, siren=SirenGenerator)
EXACT = 'freqs', 'phases', 'transform'  # of waves, whose phases show each lost bit
RARE = dict(base_width=None, class_averages=False)
NETWORK_KEY = 'palm_jax_network'  # in a .safetensors' metadata: the network's fields as JSON


def network_fields(network: Network) -> dict[str, Any]:
  """The fields of a network that its variables belong to, as JSON holds them.

  'network' names its class in NETWORKS, unless that is StyleGAN2. Those of RARE stand only where
  they differ, so that files keep what they were written with.
  """
  fields = {
    f.name: getattr(network, f.name)
    for f in dataclasses.fields(network)
    if f.name not in ('dtype', 'parent', 'name')
  }
  fields = {name: x for name, x in fields.items() if name not in RARE or x != RARE[name]}
  (kind,) = (name for name, made in NETWORKS.items() if type(network) is made)
  return fields if kind == 'stylegan2' else dict(fields, network=kind)


def save_safetensors(
  path: str | os.PathLike,
  network: Network,
  variables: Any,
  about: str,
  dtype: Any = np.float16,
) -> None:
  """Writes a generator as one file that `load_generator` reads.

  The file is whole, or as it was before.

  Args:
    path: *.safetensors.
    network: of NETWORKS.
    variables: {'params', 'buffers'}.
    about: for people: where it comes from, under which licence.
    dtype: of the numbers in the file; EXACT ones are as they are.

  Raises:
    UserError: numbers that dtype does not hold.
    OSError: the file cannot be written.
  """
  tensors = traverse_util.flatten_dict(variables, sep='/')
  with np.errstate(over='ignore'):
    stored = {
      name: np.array(x, None if name.endswith(EXACT) else dtype, order='C')
      for name, x in tensors.items()
    }
  for name, x in stored.items():
    if not np.isfinite(x).all():
      raise UserError(
        f'{name} has numbers that {np.dtype(dtype).name} does not hold: keep it in float32, '
        'as a folder of convert is'
      )
  settings = dict(lr_multiplier=f'{LR_MULTIPLIER}', activation='lrelu')
  if isinstance(network, Generator):
    settings['conv_clamp'] = f'{network.conv_clamp}'
  metadata = {NETWORK_KEY: json.dumps(network_fields(network)), 'about': about, **settings}
  content = safetensors.numpy.save(stored, metadata)
  with replacing(path) as file:
    file.write(content)


def from_arrays(path: pathlib.Path, arrays: dict[str, np.ndarray], fields: str) -> LoadedGenerator:
  """The generator of a file of `save_safetensors`.

  Args:
    path: for messages.
    arrays: {name: array} of the file, which is emptied.
    fields: the network's fields as JSON, at NETWORK_KEY of the metadata.

  Raises:
    SnapshotError: damage.
  """
  try:
    network = network_of(json.loads(fields))
    expected = _shapes(network)
  except (ArithmeticError, KeyError, TypeError, ValueError, RecursionError, UserError) as e:
    raise SnapshotError(
      f'{path}: its description of the network is damaged ({type(e).__name__}); fetch it again'
    ) from e
  misfit = _first_misfit({name: x.shape for name, x in arrays.items()}, expected)
  if misfit:
    raise SnapshotError(f'{path}: {misfit}; fetch it again')
  try:
    check_numbers(arrays)
  except SnapshotError as e:
    raise SnapshotError(f'{path}: {e}') from e
  # One at a time, so that no more than one array is in memory in both types.
  variables = {name: np.asarray(arrays.pop(name), np.float32) for name in expected}
  return LoadedGenerator(network, traverse_util.unflatten_dict(variables, sep='/'))


def from_folder(path: pathlib.Path) -> LoadedGenerator:
  """The generator of a workdir (its folder generator/), or of a folder that convert wrote.

  Raises:
    UserError: no generator there, or damage.
  """
  folder = path if (path / 'network.json').is_file() else path / 'generator'
  try:
    network = network_of(json.loads((folder / 'network.json').read_text()))
    expected = _shapes(network)
  except (OSError, ValueError, TypeError, KeyError, RecursionError, AttributeError) as e:
    reason = 'is missing' if isinstance(e, FileNotFoundError) else f'ended in {type(e).__name__}'
    raise UserError(
      f'{path} holds no generator (generator/network.json {reason}): run --job=generator there, or '
      'give the workdir of a run that has one, a file or a bundled one (--config.generator.path)'
    ) from e
  loaded = load(folder / 'checkpoints', 'generator')
  variables = loaded.items['generator']
  flat: dict[str, Any] = traverse_util.flatten_dict(variables, sep='/')
  trained = loaded.metadata.get('fields', as_json(network_fields(network)))
  misfit = _first_misfit({name: x.shape for name, x in flat.items()}, expected)
  if misfit or trained != as_json(network_fields(network)):
    raise UserError(
      f'{folder / "network.json"} is not of the network in checkpoint {loaded.step} beside it '
      f'({misfit or f"which was trained as {json.dumps(trained)}"}): restore that file'
    )
  try:
    check_numbers(flat)
  except SnapshotError as e:
    raise UserError(f'{folder / "checkpoints"}, step {loaded.step}: {e}') from e
  return LoadedGenerator(network, variables)


def _shapes(network):
  """{name: shape} of a Generator's variables."""
  z = jax.ShapeDtypeStruct((1, network.z_dim), np.float32)
  label = jax.ShapeDtypeStruct((1,), np.int32)
  template: Any = jax.eval_shape(network.init, jax.random.key(0), z, label)
  flat: dict[str, Any] = traverse_util.flatten_dict(template, sep='/')
  return {name: x.shape for name, x in flat.items()}


def _first_misfit(there, expected):
  for name in sorted(expected.keys() | there.keys()):
    if there.get(name) != expected.get(name):
      return f'{name} is {there.get(name, "absent")}, expected {expected.get(name, "absent")}'
  return ''


def network_of(fields: dict[str, Any]) -> Network:
  """The network of `network_fields`, as JSON gives them back.

  Raises:
    KeyError, TypeError, ValueError: fields that no network has, before they cost anything.
  """
  fields = dict(fields)
  kind = fields.pop('network', 'stylegan2')
  if kind == 'stylegan3':
    return StyleGAN3.from_fields(fields)
  if kind not in NETWORKS:
    raise ValueError('network')
  fields = {name: tuple(x) if isinstance(x, list) else x for name, x in fields.items()}
  channels = fields.get('channels', ())
  sizes = [n for n in (*channels, *fields.values()) if type(n) is int]
  plausible = (
    all(0 <= n <= MAX_SIZE for n in sizes)
    and all(n > 0 for n in channels)
    and len(channels) <= MAX_RESOLUTIONS
    and fields['mapping_layers'] <= MAX_MAPPING_LAYERS
    and fields.get('layers', 1) <= MAX_MAPPING_LAYERS
    and (kind != 'siren' or 1 <= fields['resolution'] * fields['samples'] <= MAX_POINTS)
    and fields.get('base_size', 1) << len(channels) <= MAX_SIZE
  )
  if not plausible:
    raise ValueError('sizes')
  return NETWORKS[kind](**fields)
