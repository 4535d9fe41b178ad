"""What a pickle of weights may hold, and what the globals that it names mean here.

Nothing that a file names is imported or called: each known global is a function of this module,
which judges what it is given. What any other global would make is an `Inert` object: the name, and
the attributes that the file gives it. Tensors are views of the file's bytes.
"""

import dataclasses
import math
from typing import Any

import ml_dtypes
import numpy as np

STORAGES = {  # of torch
  'BFloat16Storage': ml_dtypes.bfloat16,
  'BoolStorage': np.bool_,
  'ByteStorage': np.uint8,
  'CharStorage': np.int8,
  'DoubleStorage': np.float64,
  'FloatStorage': np.float32,
  'HalfStorage': np.float16,
  'IntStorage': np.int32,
  'LongStorage': np.int64,
  'ShortStorage': np.int16,
}
SCALARS = 'f2', 'f4', 'f8', 'i1', 'i2', 'i4', 'i8', 'u1', 'u2', 'u4', 'u8', 'b1'


class Refusal(Exception):
  """What is wrong with a file, without its path."""


def check(condition: Any, message: str) -> None:
  """Raises Refusal with the message unless the condition holds."""
  if not condition:
    raise Refusal(message)


def short(value: Any) -> str:
  """A value out of the file for a message: one line, not too long."""
  if isinstance(value, str):
    return repr(value[:80])
  if isinstance(value, int | float | None):
    return repr(value)[:80]
  return f'a {type(value).__name__}'  # a container may be larger than it looks


class Budget:
  """Bytes that may still be taken."""

  def __init__(self, size: int):
    self.left = size

  def charge(self, size: int) -> None:
    """Raises Refusal where `size` bytes are more than is left."""
    self.left -= size
    check(
      self.left >= 0, 'asks for more memory than a file of its size needs; it is damaged or hostile'
    )


@dataclasses.dataclass(eq=False)
class Inert:
  """An object as the file describes it: the name of its class, its attributes and items.

  A network's modules are such objects.
  """

  class_name: str
  state: dict = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True, eq=False)
class Global:
  """A name that the file gives; what it means is looked up where it is called."""

  module: str
  name: str


@dataclasses.dataclass(eq=False)
class Storage:
  """Numbers of one type; data is None while their place is not known."""

  dtype: type
  numel: int
  data: memoryview | None


@dataclasses.dataclass(frozen=True, eq=False)
class Dtype:
  """A numpy type of `SCALARS`."""

  name: str


@dataclasses.dataclass(eq=False)
class Unfilled:
  """An array before its numbers come, and where the memo has it."""

  places: list[int]


def is_size(x: Any) -> bool:
  """Whether it counts something."""
  return type(x) is int and x >= 0


def _is_place(x):
  """Whether it numbers a device."""
  return type(x) is int and abs(x) < 1 << 16


def is_reconstructor(function: Any) -> bool:
  """Whether it makes objects of the class that it is given, as protocols 0 and 1 do."""
  return type(function) is Global and (function.module, function.name) in (
    ('copyreg', '_reconstructor'),
    ('copy_reg', '_reconstructor'),
  )


def _persistent(meta):
  """Modules and functions that carry their source; it stays a string.

  torch_utils/persistence.py of stylegan2-ada-pytorch.
  """
  if type(meta) is dict:
    class_name = meta.get('class_name')
    state = meta.get('state')
    if type(class_name) is str and type(state) is dict:
      return Inert(class_name, state)
  raise Refusal('a persistent object in it is damaged')


def _tensor(storage, offset, size, stride, requires_grad=False, hooks=None, metadata=None):
  if type(storage) is Inert:
    return storage
  check(
    type(storage) is Storage
    and is_size(offset)
    and type(size) is type(stride) is tuple
    and len(size) == len(stride) <= 32
    and all(map(is_size, size))
    and all(is_size(s) and s > 0 for s in stride),
    'a tensor in it has an impossible offset, size or stride',
  )
  if storage.data is None:
    return np.empty(0)
  dtype = np.dtype(storage.dtype)
  if 0 in size:
    check(max(size) <= 1 << 32, 'a tensor in it has an impossible size')
    return np.empty(size, dtype)
  reach = 1
  for step, n in sorted(zip(stride, size, strict=True)):
    check(n == 1 or step >= reach, 'a tensor in it overlaps itself')
    reach += (n - 1) * step
  check(offset + reach <= storage.numel, 'a tensor in it goes beyond its storage')
  return np.ndarray(
    size, dtype, storage.data, offset * dtype.itemsize, [s * dtype.itemsize for s in stride]
  )


def _parameter(tensor, requires_grad, hooks, state=None):
  check(isinstance(tensor, np.ndarray | Inert), 'a parameter in it is no tensor')
  return tensor


def _dtype(name, align=False, copy=True):
  check(type(name) is str, 'a numpy type in it has no name')
  return Dtype(name) if name in SCALARS else Inert('numpy.dtype', {})


def _scalar(dtype, data):
  if type(dtype) is Inert:
    return dtype
  check(type(dtype) is Dtype and isinstance(data, bytes | memoryview), 'a number in it is damaged')
  (value,) = np.frombuffer(data, f'<{dtype.name}')
  return value.item()


def _unfilled(kind, shape, code):
  return Unfilled([])


def array(data: Any, dtype: Any, shape: Any, order: Any = 'C', axis_order: Any = None) -> Any:
  """A numpy array; Inert unless it is of numbers in an order of C or Fortran. Raises Refusal."""
  if type(dtype) is Inert or axis_order is not None:
    return Inert('numpy.ndarray', {})
  check(
    type(dtype) is Dtype
    and isinstance(data, bytes | memoryview)
    and type(shape) is tuple
    and len(shape) <= 32
    and all(map(is_size, shape))
    and order in ('C', 'F'),
    'an array in it is damaged',
  )
  numbers = np.frombuffer(data, f'<{dtype.name}')
  check(math.prod(shape) == numbers.size, 'an array in it is not of its size')
  return numbers.reshape(shape, order=order)


def _encode(text, encoding):
  """How protocol 2 writes bytes."""
  check(
    type(text) is str and type(encoding) is str and encoding == 'latin1',
    'an encoding in it is not latin1',
  )
  return text.encode('latin1')


def _empty_bytes():
  return b''


def strings_of(items: Any) -> set[str]:
  """A set, of its strings only: the hash of a deep tuple may never end. Raises Refusal."""
  check(type(items) is list, 'a set in it is damaged')
  return {x for x in items if type(x) is str}


def _list(items):
  check(type(items) is list, 'a list in it is damaged')
  return items


def _tagged(value, tag):
  return value


def _dict(default=None):
  return {}


def _text(*parts):
  """Paths and devices."""
  few = len(parts) <= 64 and all(type(x) is str or _is_place(x) for x in parts)
  check(few and sum(map(len, map(str, parts))) <= 4096, 'a path or device in it is damaged')
  return '/'.join(map(str, parts))


def _size(items):
  check(type(items) in (list, tuple), 'a size in it is damaged')
  return tuple(items)


CALLS = {
  ('__builtin__', 'bytes'): _empty_bytes,
  ('__builtin__', 'set'): strings_of,
  ('_codecs', 'encode'): _encode,
  ('builtins', 'set'): strings_of,
  ('collections', 'OrderedDict'): _dict,
  ('collections', 'defaultdict'): _dict,
  ('numpy', 'dtype'): _dtype,
  ('torch', 'Size'): _size,
  ('torch', 'device'): _text,
  ('torch._utils', '_rebuild_parameter'): _parameter,
  ('torch._utils', '_rebuild_parameter_with_state'): _parameter,
  ('torch._utils', '_rebuild_tensor_v2'): _tensor,
  ('torch.jit._pickle', 'restore_type_tag'): _tagged,
  ('torch_utils.persistence', '_reconstruct_persistent_obj'): _persistent,
}
CALLS |= {
  ('torch.jit._pickle', f'build_{kind}list'): _list for kind in ('int', 'double', 'bool', 'tensor')
}
for core in ('numpy._core', 'numpy.core'):
  CALLS |= {
    (f'{core}.multiarray', 'scalar'): _scalar,
    (f'{core}.multiarray', '_reconstruct'): _unfilled,
    (f'{core}.numeric', '_frombuffer'): array,
  }
for path in ('PosixPath', 'PurePosixPath', 'WindowsPath', 'PureWindowsPath'):
  CALLS |= {('pathlib', path): _text, ('pathlib._local', path): _text}
DICTS = {('dnnlib.util', 'EasyDict')}  # made by NEWOBJ
MOVED = 'torch_utils.persistence', 'dnnlib.util'  # NVIDIA's, which forks have in a package
