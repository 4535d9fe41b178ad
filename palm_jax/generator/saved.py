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
from palm_jax.generator.stylegan2 import LR_MULTIPLIER, Generator

MAX_SIZE = 1 << 16  # of any width, and of the number of classes
MAX_RESOLUTIONS = 10
MAX_MAPPING_LAYERS = 64
RARE = dict(base_width=None, class_averages=False)
NETWORK_KEY = 'palm_jax_network'  # in a .safetensors' metadata: the Generator's fields as JSON


def network_fields(network: Generator) -> dict[str, Any]:
  """The fields of a Generator that its variables belong to, as JSON holds them.

  Those of RARE stand only where they differ, so that files keep what they were written with.
  """
  fields = {
    f.name: getattr(network, f.name)
    for f in dataclasses.fields(network)
    if f.name not in ('dtype', 'parent', 'name')
  }
  return {name: x for name, x in fields.items() if name not in RARE or x != RARE[name]}


def save_safetensors(
  path: str | os.PathLike,
  network: Generator,
  variables: Any,
  about: str,
  dtype: Any = np.float16,
) -> None:
  """Writes a generator as one file that `load_generator` reads.

  The file is whole, or as it was before.

  Args:
    path: *.safetensors.
    network: Generator.
    variables: {'params', 'buffers'}.
    about: for people: where it comes from, under which licence.
    dtype: of the numbers in the file.

  Raises:
    UserError: numbers that dtype does not hold.
    OSError: the file cannot be written.
  """
  tensors = traverse_util.flatten_dict(variables, sep='/')
  with np.errstate(over='ignore'):
    stored = {name: np.array(x, dtype, order='C') for name, x in tensors.items()}
  for name, x in stored.items():
    if not np.isfinite(x).all():
      raise UserError(
        f'{name} has numbers that {np.dtype(dtype).name} does not hold: save it as float32'
      )
  settings = dict(
    conv_clamp=f'{network.conv_clamp}', lr_multiplier=f'{LR_MULTIPLIER}', activation='lrelu'
  )
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
    network = _network(json.loads(fields))
    expected = _shapes(network)
  except (KeyError, TypeError, ValueError, RecursionError, UserError) as e:
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
    network = _network(json.loads((folder / 'network.json').read_text()))
    expected = _shapes(network)
  except (OSError, ValueError, TypeError, KeyError, RecursionError, AttributeError) as e:
    raise UserError(
      f'{path} holds no generator ({type(e).__name__} on generator/network.json): give the '
      'workdir of a palm_jax run whose generator job has started'
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


def _network(fields: dict[str, Any]) -> Generator:
  """Generator of the fields in a file.

  Raises ValueError for sizes that no generator has, before they cost anything.
  """
  channels = tuple(fields['channels'])
  sizes = [n for n in (*channels, *fields.values()) if type(n) is int]
  plausible = (
    all(0 <= n <= MAX_SIZE for n in sizes)
    and len(channels) <= MAX_RESOLUTIONS
    and fields['mapping_layers'] <= MAX_MAPPING_LAYERS
  )
  if not plausible:
    raise ValueError('sizes')
  return Generator(**{**fields, 'channels': channels})
