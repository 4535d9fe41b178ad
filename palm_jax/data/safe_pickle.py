"""Dicts of lists and arrays out of pickles, without running anything that a file asks for."""

import io
import pickle
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


# numpy 2 has moved `core` to `_core`.
_NAMES: dict[tuple[str, str], Any] = {
  ('numpy', 'ndarray'): Array,
  ('numpy', 'dtype'): Array,
  ('_codecs', 'encode'): None,  # its own
}
for _core in ('numpy.core', 'numpy._core'):
  _NAMES[f'{_core}.multiarray', '_reconstruct'] = Array
  _NAMES[f'{_core}.multiarray', 'scalar'] = _Scalar
  _NAMES[f'{_core}.numeric', '_frombuffer'] = _FromBuffer


_KEYS = slice(0, None, 2)  # on the stack above a mark, before their values


def _of_plain_keys(code, keys):
  """The instruction, for texts as keys alone: tuples of tuples take for ever to hash."""

  def checked(self):
    if not all(isinstance(key, str | bytes) for key in self.stack[keys]):
      raise pickle.UnpicklingError('a key in it is no text')
    pickle._Unpickler.dispatch[code](self)

  return checked


def _bytes(self):
  """BYTEARRAY8 without room for more bytes than there are."""
  self.append(bytearray(self.read(int.from_bytes(self.read(8), 'little'))))


# What dicts, lists and arrays do not need, and what takes memory or time for a few bytes.
_LEFT_OUT = 'DUP EMPTY_SET ADDITEMS FROZENSET PERSID BINPERSID'.split()


class _Unpickler(pickle._Unpickler):  # Python's own: what it does can be left out
  def __init__(self, raw):
    super().__init__(io.BytesIO(raw), encoding='bytes')
    self._left = 2 * len(raw)  # letters to encode

  def find_class(self, module, name):
    if (module, name) not in _NAMES:
      raise pickle.UnpicklingError(f'it asks for {module}.{name}, which was not run')
    return _NAMES[module, name] or self._encode

  def _encode(self, text, encoding):
    """How Python 3 writes bytes in the protocols before 3."""
    if not isinstance(text, str) or encoding not in ('latin1', b'latin1'):
      raise pickle.UnpicklingError(f'it encodes a {type(text).__name__} as {encoding!r}')
    self._left -= len(text)
    if self._left < 0:
      raise pickle.UnpicklingError('it encodes more text than it holds')
    return text.encode('latin1')

  dispatch = dict(pickle._Unpickler.dispatch)
  for _name in _LEFT_OUT:
    del dispatch[getattr(pickle, _name)[0]]
  dispatch[pickle.BYTEARRAY8[0]] = _bytes
  for _name, _keys in dict(SETITEM=slice(-2, -1), SETITEMS=_KEYS, DICT=_KEYS).items():
    dispatch[getattr(pickle, _name)[0]] = _of_plain_keys(getattr(pickle, _name)[0], _keys)


def load(raw: bytes) -> Any:
  """The value of a pickle, arrays as `Array`, texts of Python 2 as bytes.

  Raises:
    Exception: any, where the pickle is damaged, or asks for other names than numpy's.
  """
  return _Unpickler(raw).load()


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
