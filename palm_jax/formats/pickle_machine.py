"""The part of Python's pickle machine that files of weights need, without importing or calling.

A pickle is a program for a stack machine. This one knows the globals that make tensors, small
arrays and containers; each is a name that has a meaning here. What any other global would make is
an `Inert` object: the name, and the attributes that the file gives it. What the program makes is
charged to a budget before it is made, and tensors are views of the file's bytes.
"""

import dataclasses
import math
import struct
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

# torch/serialization.py, of files that are not zip archives.
MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001
STORAGES = {
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
# Prices in bytes, each above what is really taken.
INSTRUCTION = 256  # its object, its place on the stack and in the memo
CALL = 512  # a view of a tensor
SET_ITEM = 128  # an item of a set, or an attribute
STORAGE_PICKLE = 1 << 16  # the few instructions around a storage that is a file of its own


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
class _Global:
  module: str
  name: str


@dataclasses.dataclass(eq=False)
class Storage:
  """Numbers of one type; data is None while their place is not known."""

  dtype: type
  numel: int
  data: memoryview | None


@dataclasses.dataclass(frozen=True, eq=False)
class _Dtype:
  name: str


@dataclasses.dataclass(eq=False)
class _Unfilled:
  """An array before its numbers come, and where the memo has it."""

  places: list[int]


def _is_size(x):
  return type(x) is int and x >= 0


def _is_place(x):
  """Whether it numbers a device."""
  return type(x) is int and abs(x) < 1 << 16


def _is_reconstructor(function):
  return type(function) is _Global and (function.module, function.name) in (
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
    and _is_size(offset)
    and type(size) is type(stride) is tuple
    and len(size) == len(stride) <= 32
    and all(map(_is_size, size))
    and all(_is_size(s) and s > 0 for s in stride),
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


def _load_from_bytes(data):
  check(isinstance(data, bytes | memoryview), 'a storage in it is not made of bytes')
  # No calls: storages in storages would never end.
  storage = read_legacy(memoryview(data), Budget(STORAGE_PICKLE), calls={})
  check(type(storage) is Storage, 'a storage in it is something else')
  return storage


def _dtype(name, align=False, copy=True):
  check(type(name) is str, 'a numpy type in it has no name')
  return _Dtype(name) if name in SCALARS else Inert('numpy.dtype', {})


def _scalar(dtype, data):
  if type(dtype) is Inert:
    return dtype
  check(type(dtype) is _Dtype and isinstance(data, bytes | memoryview), 'a number in it is damaged')
  (value,) = np.frombuffer(data, f'<{dtype.name}')
  return value.item()


def _unfilled(kind, shape, code):
  return _Unfilled([])


def _array(data, dtype, shape, order: Any = 'C', axis_order=None):
  """A numpy array; Inert unless it is of numbers in an order of C or Fortran."""
  if type(dtype) is Inert or axis_order is not None:
    return Inert('numpy.ndarray', {})
  check(
    type(dtype) is _Dtype
    and isinstance(data, bytes | memoryview)
    and type(shape) is tuple
    and len(shape) <= 32
    and all(map(_is_size, shape))
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


def _set(items):
  """Of its strings only: the hash of a deep tuple may never end."""
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


_CALLS = {
  ('__builtin__', 'bytes'): _empty_bytes,
  ('__builtin__', 'set'): _set,
  ('_codecs', 'encode'): _encode,
  ('builtins', 'set'): _set,
  ('collections', 'OrderedDict'): _dict,
  ('collections', 'defaultdict'): _dict,
  ('numpy', 'dtype'): _dtype,
  ('torch', 'Size'): _size,
  ('torch', 'device'): _text,
  ('torch._utils', '_rebuild_parameter'): _parameter,
  ('torch._utils', '_rebuild_parameter_with_state'): _parameter,
  ('torch._utils', '_rebuild_tensor_v2'): _tensor,
  ('torch.jit._pickle', 'restore_type_tag'): _tagged,
  ('torch.storage', '_load_from_bytes'): _load_from_bytes,
  ('torch_utils.persistence', '_reconstruct_persistent_obj'): _persistent,
}
_CALLS |= {
  ('torch.jit._pickle', f'build_{kind}list'): _list for kind in ('int', 'double', 'bool', 'tensor')
}
for core in ('numpy._core', 'numpy.core'):
  _CALLS |= {
    (f'{core}.multiarray', 'scalar'): _scalar,
    (f'{core}.multiarray', '_reconstruct'): _unfilled,
    (f'{core}.numeric', '_frombuffer'): _array,
  }
for path in ('PosixPath', 'PurePosixPath', 'WindowsPath', 'PureWindowsPath'):
  _CALLS |= {('pathlib', path): _text, ('pathlib._local', path): _text}
_DICTS = {('dnnlib.util', 'EasyDict')}  # made by NEWOBJ
_TYPES = {('torch', name) for name in STORAGES}


class Machine:
  """Runs one pickle of protocol 2 to 5.

  Args:
    view: the bytes.
    at: where to begin, and afterwards where the pickle ended.
    budget: what it may use.
    find_storage: (key, dtype, numel) -> Storage, for files that keep storages beside the pickle.
    calls: the functions that have a meaning, {(module, name): what it does}.
  """

  def __init__(
    self,
    view: memoryview,
    at: int,
    budget: Budget,
    find_storage: Callable | None = None,
    calls: dict[tuple[str, str], Callable] = _CALLS,
  ):
    self.view = view
    self.at = at
    self.budget = budget
    self.find_storage = find_storage
    self.calls = calls
    self.stack = []
    self.below = []  # the stacks below each mark
    self.memo = {}

  def run(self) -> Any:
    """The object that the pickle makes. Raises Refusal, and what damage leads to."""
    while True:
      self.budget.charge(INSTRUCTION)
      code = self.take(1)[0]
      if code == ord('.'):
        check(len(self.stack) == 1 and not self.below, 'ends in the middle')
        return self.stack.pop()
      check(code in _INSTRUCTIONS, f'instruction 0x{code:02x} in it is not one that weights need')
      _INSTRUCTIONS[code](self)

  def take(self, size):
    check(
      0 <= size <= len(self.view) - self.at,
      'is cut short or damaged: it continues beyond its end; fetch it again',
    )
    self.at += size
    return self.view[self.at - size : self.at]

  def unpack(self, form):
    return struct.unpack(f'<{form}', self.take(struct.calcsize(f'<{form}')))[0]

  def text(self, size):
    data = self.take(size)
    top = np.frombuffer(data, np.uint8).max(initial=0)
    # Python keeps a string in characters of 1, 2 or 4 bytes, as its largest needs.
    width = 4
    if top < 0xC4:
      width = 1
    elif top < 0xF0:
      width = 2
    self.budget.charge(size * width)
    return str(data, 'utf-8')

  def line(self):
    line, end, _ = bytes(self.view[self.at : self.at + 256]).partition(b'\n')
    check(end, 'a name in it has no end')
    self.at += len(line) + 1
    return str(line, 'utf-8')

  def push(self, value):
    self.stack.append(value)

  def pop(self):
    check(self.stack, 'takes a value where there is none')
    return self.stack.pop()

  def pop_mark(self):
    check(self.below, 'takes values where there are none')
    items, self.stack = self.stack, self.below.pop()
    return items

  def top(self, kind):
    """The value on the stack to put items in; what goes into an Inert list or set is lost."""
    check(
      self.stack and type(self.stack[-1]) in (kind, Inert),
      f'fills something that is not a {kind.__name__}',
    )
    return self.stack[-1] if type(self.stack[-1]) is kind else kind()

  # Instructions.

  def proto(self):
    version = self.unpack('B')
    check(2 <= version <= 5, f'is a pickle of protocol {version}; expected 2 to 5')

  def discard(self):
    """Pops a value, or a mark where nothing is above it."""
    if self.stack or not self.below:
      self.pop()
    else:
      self.pop_mark()

  def long(self, size):
    check(size <= 255, 'holds a number that is too long')
    self.push(int.from_bytes(self.take(size), 'little', signed=True))

  def frame(self):
    check(
      self.unpack('Q') <= len(self.view) - self.at,
      'is cut short or damaged: a frame continues beyond its end',
    )

  def mark(self):
    self.below.append(self.stack)
    self.stack = []

  def get(self, index):
    check(index in self.memo, 'refers to what it has not made')
    self.push(self.memo[index])

  def put(self, index):
    check(self.stack, 'remembers a value where there is none')
    self.budget.charge(INSTRUCTION)
    self.memo[index] = self.stack[-1]
    if type(self.stack[-1]) is _Unfilled:
      self.stack[-1].places.append(index)

  def tuple(self, size):
    check(len(self.stack) >= size, 'takes values where there are none')
    items = tuple(self.stack[-size:])
    del self.stack[-size:]
    self.push(items)

  def append(self):
    item = self.pop()
    self.top(list).append(item)

  def extend(self):
    items = self.pop_mark()
    self.top(list).extend(items)

  def fill_set(self):
    items = _set(self.pop_mark())
    self.top(set).update(items)

  def set_items(self, items):
    inert = self.stack and type(self.stack[-1]) is Inert
    target = self.stack[-1].state if inert else self.top(dict)
    check(len(items) % 2 == 0, 'has a key without a value')
    for key, value in zip(items[::2], items[1::2], strict=True):
      # Only plain keys: the hash of a deep tuple may never end, and large integers can collide. No
      # weights stand at others.
      if type(key) is str or type(key) is int and 0 <= key < 1 << 32:
        check(key not in target, f'key {short(key)} is set twice')
        target[key] = value

  def set_item(self):
    value, key = self.pop(), self.pop()
    self.set_items([key, value])

  def find_global(self, module, name):
    check(
      type(module) is type(name) is str and len(module) + len(name) <= 512,
      'a global in it has no name',
    )
    check(
      (module, name) != ('dnnlib.tflib.network', 'Network'),
      'is a snapshot of the TensorFlow releases of StyleGAN2 (dnnlib.tflib); convert it with '
      "stylegan2-ada-pytorch's legacy.py: python legacy.py --source=<this file> "
      '--dest=converted.pkl',
    )
    self.push(_Global(module, name))

  def find_global_on_stack(self):
    name, module = self.pop(), self.pop()
    self.find_global(module, name)

  def reduce(self):
    args, function = self.pop(), self.pop()
    check(type(args) is tuple, 'calls something without arguments')
    known = type(function) is _Global and (function.module, function.name) in self.calls
    items = sum(len(x) for x in args if type(x) is list)
    letters = sum(4 * len(x) for x in args if type(x) is str)
    self.budget.charge(CALL + SET_ITEM * items + letters)
    if not known:
      self.push(self.object_of(args[0] if _is_reconstructor(function) and args else function))
      return
    try:
      self.push(self.calls[function.module, function.name](*args))
    except TypeError:
      raise Refusal(
        f'{function.module}.{function.name} in it has other arguments than torch gives'
      ) from None

  def new_object(self):
    args, kind = self.pop(), self.pop()
    check(type(args) is tuple, 'makes an object without arguments')
    self.push(self.object_of(kind))

  def new_object_of_words(self):
    words = self.pop()
    check(type(words) is dict, 'makes an object without arguments')
    self.new_object()

  def object_of(self, kind):
    self.budget.charge(CALL)
    if type(kind) is not _Global:
      return Inert('unknown', {})
    is_dict = (kind.module, kind.name) in _DICTS
    return {} if is_dict else Inert(f'{kind.module}.{kind.name}', {})

  def build(self):
    state = self.pop()
    check(self.stack, 'takes a value where there is none')
    target = self.stack[-1]
    if type(target) is _Dtype:
      check(
        type(state) is tuple
        and len(state) > 1
        and type(state[1]) is str
        and state[1] in ('<', '|', '='),
        'holds big-endian numbers; expected little-endian',
      )
    elif type(target) is _Unfilled:
      check(type(state) is tuple and len(state) == 5, 'an array in it is damaged')
      _, shape, dtype, fortran, data = state
      array = _array(data, dtype, shape, 'F' if fortran is True else 'C')
      self.stack[-1] = array
      for place in target.places:
        self.memo[place] = array
    elif type(target) is Inert:
      if type(state) is dict and not target.state:
        self.budget.charge(SET_ITEM * len(state))  # one state can be given to many objects
        check(all(type(name) is str for name in state), 'an object in it has odd attributes')
        target.state = state
    else:  # a state dict carries its modules' versions
      check(type(target) is dict, 'refused: it gives attributes to what has none')

  def persistent(self):
    pid = self.pop()
    if self.find_storage is None or type(pid) is not tuple or len(pid) not in (5, 6):
      raise Refusal('refers to an unknown storage')
    tag, kind, key, device, numel, *view = pid
    check(
      type(tag) is str
      and tag == 'storage'
      and type(key) is str
      and type(device) is str
      and _is_size(numel)
      and all(part is None for part in view),
      'refers to an unknown storage',
    )
    check(type(kind) is _Global, 'refers to an unknown storage')
    self.budget.charge(CALL)
    known = (kind.module, kind.name) in _TYPES
    dtype = STORAGES[kind.name] if known else None
    self.push(self.find_storage(key, dtype, numel))


_OPCODES = {
  b'\x80': Machine.proto,
  b'\x95': Machine.frame,
  b'N': lambda m: m.push(None),
  b'\x88': lambda m: m.push(True),
  b'\x89': lambda m: m.push(False),
  b'K': lambda m: m.push(m.unpack('B')),
  b'M': lambda m: m.push(m.unpack('H')),
  b'J': lambda m: m.push(m.unpack('i')),
  b'\x8a': lambda m: m.long(m.unpack('B')),
  b'\x8b': lambda m: m.long(m.unpack('I')),
  b'G': lambda m: m.push(struct.unpack('>d', m.take(8))[0]),
  b'X': lambda m: m.push(m.text(m.unpack('I'))),
  b'\x8c': lambda m: m.push(m.text(m.unpack('B'))),
  b'\x8d': lambda m: m.push(m.text(m.unpack('Q'))),
  b'U': lambda m: m.push(m.text(m.unpack('B'))),  # names in files that Python 2 saved
  b'B': lambda m: m.push(m.take(m.unpack('I'))),
  b'C': lambda m: m.push(m.take(m.unpack('B'))),
  b'\x8e': lambda m: m.push(m.take(m.unpack('Q'))),
  b'\x96': lambda m: m.push(m.take(m.unpack('Q'))),
  b')': lambda m: m.push(()),
  b']': lambda m: m.push([]),
  b'}': lambda m: m.push({}),
  b'\x8f': lambda m: m.push(set()),
  b'(': Machine.mark,
  b'0': Machine.discard,
  b'1': Machine.pop_mark,
  b't': lambda m: m.push(tuple(m.pop_mark())),
  b'\x85': lambda m: m.tuple(1),
  b'\x86': lambda m: m.tuple(2),
  b'\x87': lambda m: m.tuple(3),
  b'a': Machine.append,
  b'e': Machine.extend,
  b'\x90': Machine.fill_set,
  b'\x91': lambda m: m.push(_set(m.pop_mark())),
  b's': Machine.set_item,
  b'u': lambda m: m.set_items(m.pop_mark()),
  b'q': lambda m: m.put(m.unpack('B')),
  b'r': lambda m: m.put(m.unpack('I')),
  b'\x94': lambda m: m.put(len(m.memo)),
  b'h': lambda m: m.get(m.unpack('B')),
  b'j': lambda m: m.get(m.unpack('I')),
  b'c': lambda m: m.find_global(m.line(), m.line()),
  b'\x93': Machine.find_global_on_stack,
  b'R': Machine.reduce,
  b'\x81': Machine.new_object,
  b'\x92': Machine.new_object_of_words,
  b'b': Machine.build,
  b'Q': Machine.persistent,
}
_INSTRUCTIONS = {code[0]: instruction for code, instruction in _OPCODES.items()}


def read_legacy(
  view: memoryview, budget: Budget, calls: dict[tuple[str, str], Callable] = _CALLS
) -> Any:
  """The object in a file of torch.save before 1.6: five pickles, then the storages' bytes.

  Each storage in a plain pickle is such a file too.

  Raises:
    Refusal: what is wrong with it.
  """

  def unpickle(at, find_storage=None):
    machine = Machine(view, at, budget, find_storage, calls=calls)
    return machine.run(), machine.at

  magic, at = unpickle(0)
  protocol, at = unpickle(at)
  system, at = unpickle(at)
  check((magic, protocol) == (MAGIC, PROTOCOL), 'is not a torch file of a known version')
  check(
    type(system) is dict and system.get('little_endian') is True,
    'holds big-endian numbers; expected little-endian',
  )

  # The tensors come before their bytes: a first pass finds the storages, a second makes tensors.
  storages = {}
  begin = at

  def note(key, dtype, numel):
    check(dtype is not None, f'storage {short(key)} is of a type that is not known')
    return storages.setdefault(key, Storage(dtype, numel, None))

  def find(key, dtype, numel):
    storage = storages[key]
    check(
      (storage.dtype, storage.numel) == (dtype, numel),
      f'storage {short(key)} has two different types',
    )
    return storage

  _, at = unpickle(begin, note)
  keys, at = unpickle(at)
  check(
    type(keys) is list
    and len(keys) == len(storages)
    and all(type(k) is str for k in keys)
    and set(keys) == storages.keys(),
    'lists other storages than its tensors use',
  )
  _fill_storages(view, at, [(key, storages[key]) for key in keys])
  return unpickle(begin, find)[0]


def _fill_storages(view, at, storages):
  """Gives each of [(name, Storage)] its bytes, which follow one another from `at` to the end."""
  for key, storage in storages:
    check(
      struct.unpack_from('<q', view, at)[0] == storage.numel,
      f'storage {short(key)} has two different sizes',
    )
    size = storage.numel * np.dtype(storage.dtype).itemsize
    at += 8
    check(size <= len(view) - at, f'storage {short(key)} goes beyond the end of the file')
    storage.data = view[at : at + size]
    at += size
  check(at == len(view), f'{len(view) - at} bytes follow its end')
