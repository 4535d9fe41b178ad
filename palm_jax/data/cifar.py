"""CIFAR-10 and CIFAR-100 as published: archives or folders, python or binary version.

Source: https://www.cs.toronto.edu/~kriz/cifar.html.
"""

import collections
import itertools
import pathlib
import posixpath
from typing import NamedTuple

import numpy as np

from palm_jax.base.errors import UserError, one_line
from palm_jax.base.files import reading
from palm_jax.base.signals import raise_if_interrupted
from palm_jax.data import published, safe_pickle, trees
from palm_jax.data.arrays import Found, Split, refuse_expansion


class _Layout(NamedTuple):
  train: tuple[str, ...]
  test: str
  names: str  # '{}' stands for the label set
  label_bytes: int  # labels before the pixels of a binary record; 0: a python pickle
  label_sets: tuple[str, ...]  # in the order of those bytes


_LARGEST = 1 << 30  # bytes of a file; the published ones have 154 MB at most
_ZIPPED = '.tar.gz', '.tgz'
_FIRST_MEMBERS = 1000  # among which CIFAR's folder is to be found
_LAYOUTS = {
  'cifar-10-batches-bin': _Layout(
    train=tuple(f'data_batch_{i}.bin' for i in range(1, 6)),
    test='test_batch.bin',
    names='batches.meta.txt',
    label_bytes=1,
    label_sets=('fine',),
  ),
  'cifar-10-batches-py': _Layout(
    train=tuple(f'data_batch_{i}' for i in range(1, 6)),
    test='test_batch',
    names='batches.meta',
    label_bytes=0,
    label_sets=('fine',),
  ),
  'cifar-100-binary': _Layout(
    train=('train.bin',),
    test='test.bin',
    names='{}_label_names.txt',
    label_bytes=2,
    label_sets=('coarse', 'fine'),
  ),
  'cifar-100-python': _Layout(
    train=('train',),
    test='test',
    names='meta',
    label_bytes=0,
    label_sets=('coarse', 'fine'),
  ),
}


def matches(path: pathlib.Path) -> bool:
  """Whether the path is an archive with CIFAR's folder, or a folder with CIFAR's files.

  So is a damaged .tar.gz, of which `read` says that it is.
  """
  if not path.is_file() or not path.name.endswith(('.tar', *_ZIPPED)):
    return bool(_folder_kind(path))
  try:
    with trees.opened_tar(path) as (_, tar):
      first = itertools.islice(tar, _FIRST_MEMBERS)
      return any(_place(member)[0] in _LAYOUTS for member in first)
  except Exception as error:  # gzip, zlib and tarfile each have their own.
    raise_if_interrupted(error)
    return path.name.endswith(_ZIPPED)


def _files_of(layout):
  labels = [layout.names.format(name) for name in layout.label_sets]
  return {*layout.train, layout.test, *labels}


def _place(member):
  """(folder, name) of an archive's member."""
  folder, _, name = posixpath.normpath(member.name).partition('/')
  return folder, name


def read(path: pathlib.Path, label_set: str) -> Found:
  """CIFAR from an archive or folder.

  Args:
    path: for which `matches`.
    label_set: 'fine' or 'coarse'.

  Raises:
    UserError: damaged, incomplete, not CIFAR, or no such labels.
  """
  if path.is_dir():
    kind = _folder_kind(path)
    present = {file.name for file in path.iterdir() if file.is_file()}
    read_file = lambda name: (path / name).read_bytes()
  else:
    kind, files = _unpack(path)
    present = files.keys()
    read_file = files.__getitem__
  layout = _LAYOUTS[kind]
  if label_set not in layout.label_sets:
    raise UserError(
      f"label_set 'coarse' with {path}: only CIFAR-100 has coarse labels; leave label_set at 'fine'"
    )
  names_file = layout.names.format(label_set)
  missing = [name for name in (*layout.train, layout.test, names_file) if name not in present]
  if missing:
    raise UserError(
      f'{path} lacks {", ".join(missing)} of {kind}; unpack or fetch the archive again'
    )
  try:
    names = _class_names(layout, label_set, read_file(names_file), f'{path}: {names_file}')
    if not names:
      raise UserError(f'{path}: {names_file} names no class; unpack or fetch the archive again')
    train = [_batch(layout, label_set, read_file(name), f'{path}: {name}') for name in layout.train]
    test = _batch(layout, label_set, read_file(layout.test), f'{path}: {layout.test}')
  except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
    raise UserError(
      f'{path}: not built like {kind} ({one_line(error)}); unpack or fetch the archive again'
    ) from error
  counts = [len(split.labels) for split in train]
  if len(set(counts)) > 1:
    raise UserError(
      f'{path}: {", ".join(layout.train)} hold {counts} images, expected the same number in each; '
      'unpack or fetch the archive again'
    )
  train = Split(*(np.concatenate(part) for part in zip(*train, strict=True)))
  note = ''  # for protocols: the published archives have no other number of images
  if (len(train.labels), len(test.labels)) != (50_000, 10_000):
    note = ', not the published number of images'
  source = f'{published.describe(path)}: {kind}, {label_set} labels{note}'
  return Found(train, test, names, source)


def _folder_kind(path):
  """The key of _LAYOUTS that the folder is built like; '' where there is none."""
  if path.is_dir():
    for kind, layout in _LAYOUTS.items():
      if path.name == kind or (path / layout.train[0]).is_file():
        return kind
  return ''


def _unpack(path):
  """(key of _LAYOUTS, {file: bytes}) of an archive."""
  found, total = collections.defaultdict(dict), 0
  kind = '.tar.gz' if path.name.endswith(_ZIPPED) else '.tar'
  with reading(lambda why: f'{path}: damaged or not a {kind} ({why}); fetch it again'):
    with trees.opened_tar(path) as (unpacked, tar):
      for member in tar:
        if member.size > _LARGEST:
          raise UserError(
            f'{path}: {member.name} has {member.size:,} bytes, which no file of CIFAR has; fetch '
            'the archive again'
          )
        total += member.size
        refuse_expansion(path, total)
        folder, name = _place(member)
        if folder in _LAYOUTS and member.isfile() and name in _files_of(_LAYOUTS[folder]):
          content = tar.extractfile(member)
          assert content is not None  # it is a file
          found[folder][name] = content.read()
      while unpacked.read(1 << 20):
        pass
  if len(found) != 1:
    raise UserError(
      f'{path} holds {" and ".join(found) or "no CIFAR folder"}; expected one of '
      f'{", ".join(_LAYOUTS)}'
    )
  return next(iter(found.items()))


def _key(layout, label_set, name):
  """A key of the python version; CIFAR-100 has one for each label set."""
  prefix = f'{label_set}_' if len(layout.label_sets) > 1 else ''
  return f'{prefix}{name}'


def _class_names(layout, label_set, raw, where):
  if layout.label_bytes:
    return raw.decode().split()
  names = _item(_unpickle(raw, where), _key(layout, label_set, 'label_names'), where)
  return [name.decode() if isinstance(name, bytes) else str(name) for name in names]


def _batch(layout, label_set, raw, where):
  """The images and labels of one file."""
  if layout.label_bytes:
    planes, labels = _binary_batch(layout, label_set, raw, where)
  else:
    planes, labels = _python_batch(raw, where, _key(layout, label_set, 'labels'))
  images = planes.reshape(len(planes), 3, 32, 32).transpose(0, 2, 3, 1)
  if labels.shape != (len(images),):
    raise UserError(
      f'{where}: {labels.size} labels for {len(images)} images, of shape {labels.shape}; expected '
      'one label for each image; fetch the archive again'
    )
  return Split(images, labels)


def _binary_batch(layout, label_set, raw, where):
  record = layout.label_bytes + 3072
  if not raw or len(raw) % record:
    raise UserError(
      f'{where} has {len(raw)} bytes, expected a whole number of {record}-byte records; '
      'unpack or fetch the archive again'
    )
  records = np.frombuffer(raw, np.uint8).reshape(-1, record)
  return records[:, layout.label_bytes :], records[:, layout.label_sets.index(label_set)]


def _python_batch(raw, where, key):
  batch = _unpickle(raw, where)
  data = _item(batch, 'data', where)
  if not isinstance(data, safe_pickle.Array):
    raise UserError(
      f'{where} has pixels in a {type(data).__name__}, expected an array; fetch the archive again'
    )
  kind = safe_pickle.kind(data)
  if kind not in (b'u1', 'u1'):
    raise UserError(f'{where} has pixels of type {kind!r}, expected u1; fetch the archive again')
  return safe_pickle.to_numpy(data), safe_pickle.to_numpy(_item(batch, key, where))


def _item(content, key, where):
  """Of a dict whose keys are bytes, as Python 2 wrote them, or texts."""
  for name in (key, key.encode()):
    if isinstance(content, dict) and name in content:
      return content[name]
  raise ValueError(f'{where.rpartition(": ")[2]} has no {key!r}, expected a dict with it')


def _unpickle(raw, where):
  with reading(
    lambda why: f'{where}: damaged, or not a CIFAR pickle ({why}); fetch the archive again'
  ):
    return safe_pickle.load(raw)
