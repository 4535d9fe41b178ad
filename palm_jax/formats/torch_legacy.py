"""What torch.save wrote before 1.6: five pickles and then the storages' bytes, in one file."""

import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from palm_jax.formats.pickle_machine import Machine
from palm_jax.formats.pickle_values import CALLS, Budget, Storage, check, short

# torch/serialization.py, of files that are not zip archives.
MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001
STORAGE_PICKLE = 1 << 16  # bytes charged for the few instructions around a storage that is a file


def read_legacy(view: memoryview, budget: Budget, calls: dict[tuple[str, str], Callable]) -> Any:
  """The object in a file of torch.save before 1.6: five pickles, then the storages' bytes.

  Each storage in a plain pickle is such a file too.

  Args:
    view: the bytes.
    budget: what it may use.
    calls: see `Machine`; `ALL_CALLS` for a whole file.

  Raises:
    Refusal: what is wrong with it.
  """

  def unpickle(at, find_storage=None):
    machine = Machine(view, at, budget, calls, find_storage)
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


def _load_from_bytes(data):
  check(isinstance(data, bytes | memoryview), 'a storage in it is not made of bytes')
  # No calls: storages in storages would never end.
  storage = read_legacy(memoryview(data), Budget(STORAGE_PICKLE), calls={})
  check(type(storage) is Storage, 'a storage in it is something else')
  return storage


# A storage in a plain pickle is a whole such file.
ALL_CALLS = CALLS | {('torch.storage', '_load_from_bytes'): _load_from_bytes}
