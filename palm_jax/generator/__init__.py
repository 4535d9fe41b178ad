"""Picture generators behind one protocol."""

import importlib.resources
import os
import re

from palm_jax.base import checks
from palm_jax.base.errors import UserError
from palm_jax.base.files import user_path
from palm_jax.formats.arrays import read_arrays
from palm_jax.formats.kinds import kind_of
from palm_jax.generator.loaded import LoadedGenerator
from palm_jax.generator.protocol import PictureGenerator
from palm_jax.generator.saved import (
  NETWORK_KEY,
  from_arrays,
  from_folder,
  network_fields,
  save_safetensors,
)
from palm_jax.generator.snapshots import load_snapshot

__all__ = [
  'LoadedGenerator',
  'PictureGenerator',
  'load_generator',
  'network_fields',
  'save_safetensors',
]


# Of files, if there is none.
SUFFIXES = '.pkl', '.pickle', '.pt', '.pth', '.ckpt', '.bin', '.npz', '.safetensors'


def load_generator(path_or_name: str | os.PathLike, network: str = 'G_ema') -> LoadedGenerator:
  """A generator out of a file, a run, or this package.

  Nothing in a file is executed, nothing is downloaded.

  Args:
    path_or_name: one of
      - a file that another program wrote (`snapshots.load_snapshot`): a snapshot, state_dict or
        arrays, whatever its suffix;
      - a file of `save_safetensors`;
      - the workdir of a palm_jax run whose generator job has saved at least once;
      - a folder that palm_jax.generator.convert wrote;
      - the name of a bundled generator.
    network: 'G_ema', the average over the training, or 'G', which only the files of the first kind
      hold.

  Returns:
    LoadedGenerator with variables as float32 numpy arrays (of a run: as they were trained).

  Raises:
    UserError: nothing of this kind there, damage, or a network of another kind than `Generator`.
  """
  path = _path(path_or_name)
  if path.is_file() or path.suffix in SUFFIXES:
    if kind_of(path) == 'safetensors':
      arrays, metadata = read_arrays(path)
      if NETWORK_KEY in metadata:
        _check_averaged(path, network)
        return from_arrays(path, arrays, metadata[NETWORK_KEY])
    return LoadedGenerator(*load_snapshot(path, network))
  if path.exists() or path.name != str(path_or_name):
    _check_averaged(path, network)
    return from_folder(path)
  return _load_bundled(path.name, network)


def _load_bundled(name, network):
  folder = importlib.resources.files(__name__) / 'bundled'
  files = folder.iterdir() if folder.is_dir() else ()
  networks = (file.name for file in files if file.name.endswith('.safetensors'))
  names = sorted(name.removesuffix('.safetensors') for name in networks)
  if name not in names:
    raise UserError(
      f'{name!r} is neither a path nor a bundled generator; bundled are '
      f'{", ".join(names) or "none"}{checks.nearest(name, names)}: give one of them, or a path'
    )
  with importlib.resources.as_file(folder / f'{name}.safetensors') as file:
    return load_generator(file, network)


def _path(path_or_name):
  """pathlib.Path, on which existence can be asked for."""
  if path_or_name == '':
    raise UserError("the generator's name is empty: give a path or the name of a bundled one")
  if re.match(r'[a-z][a-z0-9+.-]*://', str(path_or_name), re.IGNORECASE):
    raise UserError(
      f'{str(path_or_name)[:200]} is an address, and nothing is downloaded: fetch the file (with a '
      'browser, for example) and give its path'
    )
  try:
    path = user_path(path_or_name)
    path.stat()
  except FileNotFoundError:
    pass
  except (OSError, TypeError, ValueError) as e:
    raise UserError(
      f'generator {str(path_or_name)[:200]!r} cannot be looked for ({getattr(e, "strerror", e)}): '
      'give a path or the name of a bundled one'
    ) from e
  return path


def _check_averaged(path, network):
  if network != 'G_ema':
    raise UserError(
      f'network {network!r} of {path}: only G_ema, the average over the training, is read from '
      'there'
    )
