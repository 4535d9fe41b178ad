"""Dicts of lists and arrays out of pickles, without running anything that a file asks for."""

import io
import pickle
import pickletools
from typing import Any

import numpy as np


class Array:
  """Stands for what numpy's own names make: keeps what the file says of it."""

  def __init__(self, *args):
    self.args = args

  def __setstate__(self, state):
    self.state = state


class _Scalar(Array):
  pass


class _FromBuffer(Array):
  pass


def _encode(text, encoding):
  """How Python 3 writes bytes in the protocols before 3."""
  if not isinstance(text, str) or encoding not in ('latin1', b'latin1'):
    raise pickle.UnpicklingError(f'it encodes a {type(text).__name__} as {encoding!r}')
  return text.encode('latin1')


# numpy 2 has moved `core` to `_core`.
_NAMES: dict[tuple[str, str], Any] = {
  ('numpy', 'ndarray'): Array,
  ('numpy', 'dtype'): Array,
  ('_codecs', 'encode'): _encode,
}
for _core in ('numpy.core', 'numpy._core'):
  _NAMES[f'{_core}.multiarray', '_reconstruct'] = Array
  _NAMES[f'{_core}.multiarray', 'scalar'] = _Scalar
  _NAMES[f'{_core}.numeric', '_frombuffer'] = _FromBuffer


class _Unpickler(pickle.Unpickler):
  def find_class(self, module, name):
    if (module, name) not in _NAMES:
      raise pickle.UnpicklingError(f'it asks for {module}.{name}, which was not run')
    return _NAMES[module, name]


def load(raw: bytes) -> Any:
  """The value of a pickle, arrays as `Array`, texts of Python 2 as bytes.

  Raises:
    Exception: any, where the pickle is damaged, or asks for other names than numpy's.
  """
  for operation, argument, _ in pickletools.genops(raw):
    # Python takes memory for as many values as the number says.
    if operation.name in ('PUT', 'LONG_BINPUT') and int(argument or 0) > len(raw):
      raise pickle.UnpicklingError(f'it numbers a value {argument}')
  return _Unpickler(io.BytesIO(raw), encoding='bytes').load()


def kind(value: Any) -> Any:
  """The type of an `Array`'s values as the file has it, such as 'u1' or b'u1'."""
  if isinstance(value, _FromBuffer):
    return value.args[1].args[0]
  return value.state[2].args[0]


def to_numpy(value: Any) -> np.ndarray:
  """An `Array` of integers, or a list of numbers, as an array.

  Raises:
    ValueError: of another type. What else a wrong value leads to.
  """
  if isinstance(value, list):
    return np.asarray([int(to_numpy(x)) if isinstance(x, _Scalar) else x for x in value])
  if not isinstance(value, Array):
    return np.asarray(value)
  if isinstance(value, _Scalar):
    dtype, content = value.args
    shape = ()
    fortran = False
  elif isinstance(value, _FromBuffer):
    content, dtype, shape, order = value.args
    fortran = order in ('F', b'F')
  else:
    _, shape, dtype, fortran, content = value.state
  name = _text(dtype.args[0])
  if name[:1] not in ('u', 'i') or name[1:] not in ('1', '2', '4', '8'):
    raise ValueError(f'it has values of type {name!r}, expected integers')
  # A dtype's state: version, byte order, and what integers do not have. One of bytes has none.
  state = getattr(dtype, 'state', None)
  endian = _text(state[1]) if state else '|'
  if isinstance(content, str):  # as Python 2 wrote it
    content = content.encode('latin1')
  order = 'F' if fortran else 'C'
  return np.frombuffer(content, np.dtype(endian + name)).reshape(shape, order=order)


def _text(value):
  return value.decode() if isinstance(value, bytes) else value
