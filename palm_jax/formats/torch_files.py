"""PyTorch's files, read by numpy alone: nothing that a file names is imported, called or compiled.

Arrays are read-only views of the file's bytes, and everything else is counted before it is made.
So a file costs at most three times its size (or 32 MB beyond it, where that is more), whatever it
claims.
"""

import os
import pathlib
import re
import struct
import zlib
from typing import Any

import numpy as np

from palm_jax.formats.kinds import SnapshotError, kind_of
from palm_jax.formats.pickle_machine import Machine
from palm_jax.formats.pickle_values import Budget, Inert, Refusal, Storage, check, short
from palm_jax.formats.torch_legacy import ALL_CALLS, MAGIC, read_legacy

LEAST_BUDGET = 32 << 20  # bytes; small files are mostly instructions
ZIP_ENTRY = 1024  # bytes charged for the name of one
MAX_DEPTH = 64  # modules in modules
MAX_NAMES = 100_000  # attributes and modules
MAX_NAME = 200  # letters of a dotted name


def read(path: str | os.PathLike) -> Any:
  """The object in a PyTorch file: a pickle with tensors, or a file of torch.save or torch.jit.save.

  Returns:
    Nested dicts, lists, tuples, sets, scalars, strings, bytes (as memoryviews), `Inert`s and numpy
    arrays, which are read-only views of the file's bytes and may be unaligned. It may contain
    itself.

  Raises:
    SnapshotError: no such file, damage, or contents that no such file needs; in one line.
  """
  kind = kind_of(path)
  path = pathlib.Path(path)
  try:
    data = path.read_bytes()
  except (OSError, MemoryError) as e:
    why = getattr(e, 'strerror', 'it is larger than the memory')
    raise SnapshotError(f'{path} cannot be read ({why}): fix that, or give another file') from e
  try:
    check(kind == 'torch', f'is a .{kind} file; expected a pickle or a file of torch.save')
    view = memoryview(data)
    budget = Budget(max(2 * len(data), LEAST_BUDGET))
    if data.startswith(b'PK'):
      return _read_zip(data, budget)
    machine = Machine(view, 0, budget, ALL_CALLS)
    result = machine.run()
    if type(result) is int and result == MAGIC:
      return read_legacy(view, budget, ALL_CALLS)
    check(machine.at == len(view), f'{len(view) - machine.at} bytes follow its end')
    return result
  except Refusal as e:
    raise SnapshotError(f'{path}: {e}') from None
  except (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
    struct.error,
  ) as e:
    raise SnapshotError(f'{path}: damaged ({type(e).__name__}); fetch or save it again') from e


def state_dict(module: Inert | dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The tensors of a module under torch's names and in its order.

  The order is parameters, buffers, then the modules inside.

  Args:
    module: a state dict {name: array} is given back.

  Returns:
    {dotted name: array}.

  Raises:
    SnapshotError: not a module or a state dict, or one that contains itself.
  """
  if isinstance(module, Inert):
    tensors = {}
    for name, part in modules(module):
      prefix = f'{name}.' if name else ''
      tensors |= {prefix + key: value for key, value in _own_tensors(part)}
    return tensors
  if type(module) is not dict:
    raise SnapshotError(
      f'weights: found a {type(module).__name__}, expected a module or a state dict'
    )
  for name, value in module.items():
    if type(name) is not str or not isinstance(value, np.ndarray):
      raise SnapshotError(
        f'weights: {short(name)} is a {type(value).__name__}, expected the tensors of a state dict'
      )
  return module


def modules(module: Inert) -> list[tuple[str, Inert]]:
  """[(dotted name, Inert)]: the module itself, named '', and all those inside, in torch's order.

  Raises:
    SnapshotError: a module that contains itself, or more than any network has.
  """
  found = []
  attributes = 0

  def visit(name, module, depth):
    nonlocal attributes
    found.append((name, module))
    attributes += sum(
      len(_members(module, kind)) for kind in ('_parameters', '_buffers', '_modules')
    )
    if (
      attributes > MAX_NAMES
      or depth > MAX_DEPTH
      or len(found) > MAX_NAMES
      or len(name) > MAX_NAME
      or not name.isprintable()
    ):
      raise SnapshotError(
        'weights: the modules are nested too deeply or oddly named, or one contains itself; '
        'expected a network'
      )
    for key, value in _members(module, '_modules'):
      if isinstance(value, Inert):
        visit(f'{name}.{key}' if name else key, value, depth + 1)

  visit('', module, 0)
  return found


def _read_zip(data, budget):
  """A file of torch.save since 1.6, or of torch.jit.save.

  It holds <name>/data.pkl and <name>/data/<key>, not compressed.
  """
  entries = _zip_entries(data, budget)
  names = [name for name in entries if re.fullmatch('[^/]+/data[.]pkl', name)]
  check(len(names) == 1, 'is a zip archive without <name>/data.pkl; expected a file of torch.save')
  root = names[0].removesuffix('data.pkl')
  check(
    bytes(entries.get(f'{root}byteorder', b'little')) == b'little',
    'holds big-endian numbers; expected little-endian',
  )
  storages = {}

  def find_storage(key, dtype, numel):
    if dtype is None:
      return Inert('torch storage', {})
    storage = storages.setdefault(key, Storage(dtype, numel, entries.get(f'{root}data/{key}')))
    size = numel * np.dtype(dtype).itemsize
    check(
      storage.data is not None and storage.dtype == dtype and len(storage.data) == size,
      f'storage {short(key)} is missing, compressed or of another size',
    )
    return storage

  return Machine(entries[names[0]], 0, budget, ALL_CALLS, find_storage).run()


def _zip_entries(data, budget):
  """{name: memoryview} of a zip archive that is not compressed.

  PKWARE's APPNOTE.TXT, 4.3 and 4.5.3.
  """
  view = memoryview(data)
  end = data.rfind(b'PK\5\6', max(0, len(data) - 65557))
  check(end >= 0, 'is a zip archive without its end: fetch it again')
  count, _, at = struct.unpack_from('<HLL', data, end + 10)
  if data[max(0, end - 20) : end][:4] == b'PK\6\7':
    (where,) = struct.unpack_from('<Q', data, end - 12)
    check(data[where : where + 4] == b'PK\6\6', 'is a damaged zip archive: fetch it again')
    count, _, at = struct.unpack_from('<3Q', data, where + 32)
  entries = {}
  room = len(data)
  for _ in range(count):
    budget.charge(ZIP_ENTRY)
    check(data[at : at + 4] == b'PK\1\2', 'is a damaged zip archive: fetch it again')
    flags, method, _, _, crc, *sizes = struct.unpack_from('<8x4H3L', data, at)
    name_size, extra_size, comment_size, local = struct.unpack_from('<28x3H8xL', data, at)
    budget.charge(4 * name_size)
    name = str(view[at + 46 : at + 46 + name_size], 'utf-8')
    begin = at + 46 + name_size
    size, packed, local = _zip64(view[begin : begin + extra_size], [sizes[1], sizes[0], local])
    at = begin + extra_size + comment_size
    if method != 0 or flags & 1 or size != packed:
      check(
        not name.endswith('/data.pkl'),
        'is a compressed zip archive; expected one that is stored, as torch.save does',
      )
      continue  # TorchScript compresses its code, which is not read
    check(data[local : local + 4] == b'PK\3\4', 'is a damaged zip archive: fetch it again')
    start = local + 30 + sum(struct.unpack_from('<26x2H', data, local))
    room -= size
    check(
      room >= 0 and start + size <= len(data),
      f'{short(name)} in it goes beyond the end of the file',
    )
    check(name not in entries, f'{short(name)} is in it twice')
    entries[name] = view[start : start + size]
    check(
      zlib.crc32(entries[name]) == crc, f'{short(name)} in it is damaged (CRC-32): fetch it again'
    )
  return entries


def _zip64(extra, numbers):
  """Size, packed size and offset of an entry.

  Those that do not fit into 32 bits stand in its extra field.
  """
  at = 0
  while at + 4 <= len(extra):
    kind, size = struct.unpack_from('<2H', extra, at)
    if kind == 1:
      wide = iter(struct.unpack_from(f'<{size // 8}Q', extra, at + 4))
      return [next(wide, -1) if n == 0xFFFFFFFF else n for n in numbers]
    at += 4 + size
  return numbers


def _members(module, kind):
  """[(name, value)] of a module's `kind`: '_parameters', '_buffers' or '_modules'.

  Of TorchScript it is all attributes.
  """
  members = module.state.get(kind, module.state if '_modules' not in module.state else {})
  if type(members) is not dict or not all(
    type(name) is str and len(name) <= MAX_NAME for name in members
  ):
    raise SnapshotError(f'weights: {kind} of a {short(module.class_name)} is not a dict of names')
  return members.items()


def _own_tensors(module):
  hidden = module.state.get('_non_persistent_buffers_set')
  if type(hidden) is not set:
    hidden = set()
  kinds = ('_parameters', '_buffers') if '_modules' in module.state else ('TorchScript',)
  return [
    (name, value)
    for kind in kinds
    for name, value in _members(module, kind)
    if isinstance(value, np.ndarray) and name not in hidden
  ]
