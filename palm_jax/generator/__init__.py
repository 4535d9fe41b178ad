"""Picture generators behind one protocol."""

import dataclasses
import difflib
import importlib.resources
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import traverse_util

from palm_jax.base.checkpoints import load_item
from palm_jax.base.errors import UserError
from palm_jax.base.files import replacing
from palm_jax.formats.torch_files import SnapshotError
from palm_jax.generator.snapshots import check_numbers, load_snapshot, read_arrays
from palm_jax.generator.stylegan2 import Generator

MAX_SIZE = 1 << 16  # of any width, and of the number of classes
NETWORK_KEY = (
  'palm_jax_network'  # of the metadata of our .safetensors: the Generator's fields as JSON
)


@dataclasses.dataclass(frozen=True)
class LoadedGenerator:
  """A network with its variables; `apply` is pure, so that variables can be arguments of a compiled
  function.

  Precision is the caller's: accelerators multiply float32 in fewer bits unless the call is compiled
  within `jax.default_matmul_precision('highest')`, with which images agree with the original's to
  1e-5 of their range.
  """

  network: Generator
  variables: Any  # {'params', 'buffers'}

  @property
  def z_dim(self):
    return self.network.z_dim

  @property
  def num_classes(self):
    return self.network.num_classes

  @property
  def image_shape(self):
    return self.network.image_shape

  def with_dtype(self, dtype):
    """The same generator with its convolutions computed in `dtype`; None is that of the
    variables."""
    return dataclasses.replace(self, network=self.network.clone(dtype=dtype))

  def apply(
    self,
    variables,
    z,
    labels,
    truncation_psi=1.0,
    truncation_cutoff=None,
    noise='const',
    noise_keys=None,
  ):
    """z (N, z_dim), labels (N,) int -> (N, H, W, C) images, nominally in [-1, 1], at least float32.

    noise 'random' takes noise_keys, (N,) typed keys. UserError for inputs of other shapes or types,
    and, outside of compiled functions, for labels that are no class.
    """
    self._check_inputs(z, labels, truncation_cutoff)
    return self.network.apply(
      variables, z, labels, truncation_psi, truncation_cutoff, noise, noise_keys
    )

  def __call__(
    self, z, labels, truncation_psi=1.0, truncation_cutoff=None, noise='const', noise_keys=None
  ):
    return self.apply(
      self.variables, z, labels, truncation_psi, truncation_cutoff, noise, noise_keys
    )

  def _check_inputs(self, z, labels, truncation_cutoff):
    if not _is_array(z, jnp.floating) or z.shape != (len(z), self.z_dim):
      raise UserError(
        f'z is {_described(z)}, expected floating-point numbers of shape (N, {self.z_dim})'
      )
    if (
      truncation_cutoff is not None and _is_known(truncation_cutoff) and not truncation_cutoff >= 0
    ):
      raise UserError(
        f'truncation_cutoff={truncation_cutoff}, expected a number of layers, or None for all'
      )
    N, C = len(z), self.num_classes
    if not C or _is_array(labels, jnp.number) and labels.shape == (N, C):
      return
    if not _is_array(labels, jnp.integer) or labels.shape != (N,):
      raise UserError(
        f'labels are {_described(labels)}, expected integers of shape ({N},), or vectors of shape '
        f'({N}, {C})'
      )
    if _is_known(labels):
      for i in np.flatnonzero((np.asarray(labels) < 0) | (np.asarray(labels) >= C)):
        raise UserError(f'labels[{i}] is {labels[i]}, expected 0 to {C - 1}')


def load_generator(path_or_name, network='G_ema'):
  """A generator out of a file, a run, or this package. Nothing in a file is executed, nothing is
  downloaded.

  Args:
    path_or_name: one of - a .pkl snapshot of stylegan2-ada-pytorch, or an .npz or .safetensors with
      its names (`snapshots.load_snapshot`); - a .safetensors file of `save_safetensors`; - the
      workdir of a palm_jax run whose generator job has saved at least once; - a folder that
      palm_jax.generator.convert wrote; - the name of a bundled generator.
    network: 'G_ema', the average over the training, or 'G', which only the files of the first kind
      hold.

  Returns:
    LoadedGenerator with variables as float32 numpy arrays (of a run: as they were trained).

  Raises:
    UserError: nothing of this kind is there, it is damaged, or its network is not one that
      `Generator` is.
  """
  path = _path(path_or_name)
  if path.suffix == '.safetensors':
    arrays, metadata = read_arrays(path)
    if NETWORK_KEY in metadata:
      _check_averaged(path, network)
      return _from_arrays(path, arrays, metadata[NETWORK_KEY])
  if path.suffix in ('.pkl', '.npz', '.safetensors'):
    return LoadedGenerator(*load_snapshot(path, network))
  if path.is_file():
    raise UserError(
      f'{path}: generators are read from .pkl, .npz and .safetensors files; give one of those, or '
      'a folder'
    )
  if path.exists() or path.name != str(path_or_name):
    _check_averaged(path, network)
    return _from_folder(path)
  bundled = importlib.resources.files(__name__) / 'bundled'
  names = (
    sorted(file.name.removesuffix('.safetensors') for file in bundled.iterdir())
    if bundled.is_dir()
    else []
  )
  if path.name not in names:
    near = difflib.get_close_matches(path.name, names, 1)
    raise UserError(
      f'{path_or_name!r} is neither a path nor a bundled generator; bundled are '
      f'{", ".join(names) or "none"}{f" (did you mean {near[0]}?)" if near else ""}'
    )
  with importlib.resources.as_file(bundled / f'{path.name}.safetensors') as file:
    return load_generator(file, network)


def network_fields(network):
  """The fields of a Generator that its variables belong to, as JSON holds them."""
  return {
    f.name: getattr(network, f.name)
    for f in dataclasses.fields(network)
    if f.name not in ('dtype', 'parent', 'name')
  }


def save_safetensors(path, network, variables, about, dtype=np.float16):
  """Writes a generator as one file that `load_generator` reads; the file is whole or as it was
  before.

  Args:
    path: *.safetensors.
    network: Generator.
    variables: {'params', 'buffers'}.
    about: str for people: where it comes from, under which licence.
    dtype: of the numbers in the file.

  Raises:
    UserError: numbers that dtype does not hold. OSError: the file cannot be written.
  """
  tensors = {
    '/'.join(name): np.asarray(x) for name, x in traverse_util.flatten_dict(variables).items()
  }
  with np.errstate(over='ignore'):
    stored = {name: np.array(x, dtype, order='C') for name, x in tensors.items()}
  for name, x in stored.items():
    if not np.isfinite(x).all():
      raise UserError(
        f'{name} has numbers that {np.dtype(dtype).name} does not hold: save it as float32'
      )
  content = safetensors.numpy.save(
    stored, {NETWORK_KEY: json.dumps(network_fields(network)), 'about': about}
  )
  with replacing(path) as file:
    file.write(content)


def _path(path_or_name):
  """pathlib.Path, on which existence can be asked for."""
  try:
    path = pathlib.Path(path_or_name)
    path.stat()
  except FileNotFoundError:
    pass
  except (OSError, TypeError, ValueError) as e:
    raise UserError(
      f'generator {str(path_or_name)[:200]!r} cannot be looked for ({getattr(e, "strerror", e)}): '
      'give a path or '
      'the name of a bundled one'
    ) from e
  return path


def _is_known(x):
  """Whether its numbers can be looked at: not inside a compiled function."""
  return not isinstance(x, jax.core.Tracer)


def _is_array(x, kind):
  return isinstance(x, np.ndarray | jax.Array) and x.ndim > 0 and jnp.issubdtype(x.dtype, kind)


def _described(x):
  return (
    f'{x.dtype} of shape {x.shape}'
    if isinstance(x, np.ndarray | jax.Array)
    else f'a {type(x).__name__}'
  )


def _check_averaged(path, network):
  if network != 'G_ema':
    raise UserError(
      f'network {network!r} of {path}: only G_ema, the average over the training, is read from '
      'there'
    )


def _from_arrays(path, arrays, fields):
  """Our own names -> LoadedGenerator."""
  try:
    network = _network(json.loads(fields))
    template = jax.eval_shape(
      network.init,
      jax.random.key(0),
      jax.ShapeDtypeStruct((1, network.z_dim), np.float32),
      jax.ShapeDtypeStruct((1,), np.int32),
    )
  except (KeyError, TypeError, ValueError, RecursionError, UserError) as e:
    raise SnapshotError(
      f'{path}: its description of the network is damaged ({type(e).__name__}); fetch it again'
    ) from e
  expected = {'/'.join(name): x.shape for name, x in traverse_util.flatten_dict(template).items()}
  shapes = {name: x.shape for name, x in arrays.items()}
  for name in sorted(expected.keys() | shapes.keys()):
    if shapes.get(name) != expected.get(name):
      raise SnapshotError(
        f'{path}: {name} is {shapes.get(name, "absent")}, expected {expected.get(name, "absent")}; '
        'fetch it again'
      )
  try:
    check_numbers(arrays)
  except SnapshotError as e:
    raise SnapshotError(f'{path}: {e}') from e
  variables = {name: np.asarray(arrays.pop(name), np.float32) for name in shapes}
  return LoadedGenerator(network, traverse_util.unflatten_dict(variables, sep='/'))


def _from_folder(path):
  """A workdir (its folder generator/), or a folder that convert wrote -> LoadedGenerator."""
  folder = path if (path / 'network.json').is_file() else path / 'generator'
  try:
    network = _network(json.loads((folder / 'network.json').read_text()))
  except (OSError, ValueError, TypeError, KeyError, RecursionError) as e:
    raise UserError(
      f'{path} holds no generator ({type(e).__name__} on generator/network.json): give the '
      'workdir of a '
      'palm_jax run whose generator job has started'
    ) from e
  return LoadedGenerator(network, load_item(folder / 'checkpoints', 'generator')[1])


def _network(fields):
  """Generator of the fields in a file. Raises ValueError for sizes that no generator has, before
  they cost anything."""
  sizes = [n for n in (*fields['channels'], *fields.values()) if type(n) is int]
  if (
    not all(0 <= n <= MAX_SIZE for n in sizes)
    or not len(fields['channels']) <= 10
    or fields['mapping_layers'] > 64
  ):
    raise ValueError('sizes')
  return Generator(**dict(fields, channels=tuple(fields['channels'])))
