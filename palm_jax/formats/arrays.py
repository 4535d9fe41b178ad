"""The arrays of .npz and .safetensors files, read within bounds; nothing in them is unpickled."""

import math
import os
import pathlib
import tokenize
import zipfile
import zlib

import numpy as np
import safetensors

from palm_jax.formats.kinds import SnapshotError, kind_of

FLOATS = 'bfloat16', 'float16', 'float32', 'float64'
MAX_HEADER = 1 << 20  # bytes of a .safetensors' header; those of a network take some 20 kB
MAX_EXPANSION = 8  # times that an .npz may grow when unpacked; float weights hardly shrink at all
NPY_HEADERS = {
  (1, 0): np.lib.format.read_array_header_1_0,
  (2, 0): np.lib.format.read_array_header_2_0,
}
# What zipfile, numpy and safetensors raise at damaged files.
DAMAGE = (
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
)


def read_arrays(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  """The arrays of an .npz or .safetensors file.

  The file may claim no more memory than weights of its size need.

  Returns:
    {name: array}, and the metadata {key: text} of a .safetensors.

  Raises:
    SnapshotError: no such file, or damage.
  """
  kind = kind_of(path)
  path = pathlib.Path(path)
  try:
    return (_read_npz(path), {}) if kind == 'npz' else _read_safetensors(path)
  except DAMAGE as e:
    raise SnapshotError(
      f'{path}: not a readable .{kind} of weights ({" ".join(str(e).split())[:200]}); '
      'fetch or save it again'
    ) from e


def check_numbers(arrays: dict[str, np.ndarray]) -> None:
  """Checks that arrays are of floating-point numbers, finite in float32.

  Raises:
    SnapshotError: names the first array that is not.
  """
  for name, x in arrays.items():
    if x.dtype.name not in FLOATS:
      raise SnapshotError(f'{name} is of type {x.dtype.name}, expected one of {", ".join(FLOATS)}')
    if not np.abs(x).max(initial=0) <= np.finfo(np.float32).max:  # neither is NaN
      raise SnapshotError(
        f'{name} holds NaN or infinite numbers; the file is damaged or the training had diverged'
      )


def _read_safetensors(path):
  with path.open('rb') as file:
    if int.from_bytes(file.read(8), 'little') > MAX_HEADER:
      raise ValueError(f'its header is longer than {MAX_HEADER} bytes')
  with safetensors.safe_open(path, 'np') as file:
    return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}


def _read_npz(path):
  arrays = {}
  room = MAX_EXPANSION * path.stat().st_size + (1 << 20)
  with zipfile.ZipFile(path) as archive:
    for info in archive.infolist():
      room -= info.file_size
      if room < 0:
        raise ValueError(f'it unpacks to more than {MAX_EXPANSION} times its size')
      # Other methods unpack without a bound.
      if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f'{info.filename[:80]!r} is packed in another way than numpy does')
      with archive.open(info) as file:
        arrays[info.filename.removesuffix('.npy')] = _read_npy(file, info)
  return arrays


def _read_npy(file, info):
  read_header = NPY_HEADERS[np.lib.format.read_magic(file)]
  shape, fortran_order, dtype = read_header(file)
  size = info.file_size - file.tell()
  if dtype.hasobject or math.prod(shape) * dtype.itemsize != size:
    raise ValueError(f'{info.filename} is not as long as its header says')
  data = file.read(size + 1)  # to its end, where the checksum is compared
  return np.frombuffer(data, dtype).reshape(shape, order='F' if fortran_order else 'C')
