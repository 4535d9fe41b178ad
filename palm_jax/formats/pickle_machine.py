"""The part of Python's pickle machine that files of weights need, without importing or calling.

A pickle is a program for a stack machine; `pickle_values` says what it may make. All of it is
charged to a budget before it is made.
"""

import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from palm_jax.formats.pickle_values import (
  DICTS,
  MOVED,
  STORAGES,
  Budget,
  Dtype,
  Global,
  Inert,
  Refusal,
  Unfilled,
  array,
  check,
  is_reconstructor,
  is_size,
  short,
  strings_of,
)

# Prices in bytes, each above what is really taken.
INSTRUCTION = 256  # its object, its place on the stack and in the memo
CALL = 512  # a view of a tensor
SET_ITEM = 128  # an item of a set, or an attribute


class Machine:
  """Runs one pickle of protocol 2 to 5.

  Args:
    view: the bytes.
    at: where to begin, and afterwards where the pickle ended.
    budget: what it may use.
    calls: the globals that may be called, {(module, name): what it does here}.
    find_storage: (key, dtype, numel) -> Storage, for files that keep storages beside the pickle.
  """

  def __init__(
    self,
    view: memoryview,
    at: int,
    budget: Budget,
    calls: dict[tuple[str, str], Callable],
    find_storage: Callable | None = None,
  ):
    self.view = view
    self.at = at
    self.budget = budget
    self.calls = calls
    self.find_storage = find_storage
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
    if type(self.stack[-1]) is Unfilled:
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
    items = strings_of(self.pop_mark())
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
    for known in MOVED:
      if module.endswith(f'.{known}'):
        module = known
    self.push(Global(module, name))

  def find_global_on_stack(self):
    name, module = self.pop(), self.pop()
    self.find_global(module, name)

  def reduce(self):
    args, function = self.pop(), self.pop()
    check(type(args) is tuple, 'calls something without arguments')
    known = type(function) is Global and (function.module, function.name) in self.calls
    items = sum(len(x) for x in args if type(x) is list)
    letters = sum(4 * len(x) for x in args if type(x) is str)
    self.budget.charge(CALL + SET_ITEM * items + letters)
    if not known:
      self.push(self.object_of(args[0] if is_reconstructor(function) and args else function))
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
    if type(kind) is not Global:
      return Inert('unknown', {})
    is_dict = (kind.module, kind.name) in DICTS
    return {} if is_dict else Inert(f'{kind.module}.{kind.name}', {})

  def build(self):
    state = self.pop()
    check(self.stack, 'takes a value where there is none')
    target = self.stack[-1]
    if type(target) is Dtype:
      check(
        type(state) is tuple
        and len(state) > 1
        and type(state[1]) is str
        and state[1] in ('<', '|', '='),
        'holds big-endian numbers; expected little-endian',
      )
    elif type(target) is Unfilled:
      check(type(state) is tuple and len(state) == 5, 'an array in it is damaged')
      _, shape, dtype, fortran, data = state
      filled = array(data, dtype, shape, 'F' if fortran is True else 'C')
      self.stack[-1] = filled
      for place in target.places:
        self.memo[place] = filled
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
      and is_size(numel)
      and all(part is None for part in view),
      'refers to an unknown storage',
    )
    check(type(kind) is Global, 'refers to an unknown storage')
    self.budget.charge(CALL)
    known = kind.module == 'torch' and kind.name in STORAGES
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
  b'\x91': lambda m: m.push(strings_of(m.pop_mark())),
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
