"""Folders and archives (.zip, .tar) as one thing: names of files, and their bytes.

Archives are read where they lie. Nothing is unpacked to the disk, and what only a hostile one
would hold is refused: names that lead out of it, links, more than pictures can be packed.
"""

import bz2
import contextlib
import gzip
import io
import lzma
import os
import pathlib
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from palm_jax.base.errors import UserError, one_line
from palm_jax.base.files import reading
from palm_jax.base.signals import raise_if_interrupted
from palm_jax.data.arrays import refuse_expansion
from palm_jax.data.decoding import Source, is_picture

LISTED = 'dataset.json'  # labels, as stylegan2-ada's dataset_tool.py writes them
TAR_SUFFIXES = '.tar', '.tar.gz', '.tgz', '.tar.bz2', '.tbz2', '.tar.xz', '.txz'
ARCHIVES = '.zip', *TAR_SUFFIXES
MOST_MEMBERS = 1 << 23
LARGEST_MEMBER = 1 << 28  # bytes


class Tree(NamedTuple):
  """Names below a root, with '/' between their parts; hidden ones are left out."""

  root: pathlib.Path
  files: list[str]  # in the order of their parts
  folders: list[str]
  open: Callable[[str], pathlib.Path | io.BytesIO]  # a file, for Pillow
  joint: str  # between the root and a name, in messages

  def where(self, name: str) -> str:
    """A file or folder for messages."""
    name = name.rstrip('/')
    return f'{self.root}{self.joint}{name}' if name else str(self.root)

  def source(self, name: str) -> Source:
    """A picture of it."""
    return Source(self.where(name), lambda: self.open(name))

  def read(self, name: str) -> bytes:
    """The bytes of a file. Raises OSError, or UserError where they are damaged."""
    opened = self.open(name)
    return opened.getvalue() if isinstance(opened, io.BytesIO) else opened.read_bytes()


def is_archive(path: pathlib.Path) -> bool:
  """Whether the name is that of an archive which `open_tree` reads."""
  return path.name.lower().endswith(ARCHIVES)


def is_listed(name: str) -> bool:
  """Whether the file has the labels."""
  return name.rpartition('/')[2] == LISTED


@contextlib.contextmanager
def open_tree(path: pathlib.Path) -> Iterator[Tree]:
  """A folder or archive, as long as the block lasts.

  Raises:
    UserError: a damaged archive, or one that should not be read.
  """
  if path.is_dir():
    yield _of_folder(path)
  elif path.name.lower().endswith('.zip'):
    with _opened_zip(path) as file:
      yield _of_zip(path, file)
  else:
    yield _of_tar(path)


def _is_hidden(name):
  return name.startswith(('.', '__MACOSX'))


def _in_order(root, files, folders):
  by_parts = lambda name: name.split('/')
  return root, sorted(files, key=by_parts), sorted(folders, key=by_parts)


def _parts(name):
  """Of a member's name; some programs write Windows' separators."""
  return [part for part in name.replace('\\', '/').split('/') if part not in ('', '.')]


def walk(root: pathlib.Path) -> Iterator[tuple[pathlib.Path, list[str], list[str]]]:
  """As os.walk in sorted order: (folder below root, its folders, its files), without hidden ones.

  Links are followed. Raises UserError where a folder cannot be listed.
  """

  def refuse(error):
    raise UserError(
      f'{error.filename} cannot be listed ({one_line(error)}); make it readable, or remove it'
    ) from error

  passed = {str(root): {os.path.realpath(root)}}  # by each folder, from the root down to it
  for here, subfolders, names in os.walk(root, followlinks=True, onerror=refuse):
    above = passed.pop(here)
    real = {name: os.path.realpath(os.path.join(here, name)) for name in subfolders}
    # A link to a folder that was passed on the way would have no end.
    subfolders[:] = sorted(x for x in subfolders if not _is_hidden(x) and real[x] not in above)
    passed |= {os.path.join(here, name): above | {real[name]} for name in subfolders}
    relative = pathlib.Path(here).relative_to(root)
    yield relative, subfolders, sorted(name for name in names if not name.startswith('.'))


def _of_folder(root):
  files = []
  folders = []
  for here, subfolders, names in walk(root):
    folders += [(here / name).as_posix() for name in subfolders]
    files += [(here / name).as_posix() for name in names]
  return Tree(*_in_order(root, files, folders), lambda name: root / name, os.sep)


def _of_members(path, members, open):
  """A Tree of an archive's members: {name: whether it is a folder}, as they stand in the file."""
  files = set()
  folders = set()
  for name, is_folder in members.items():
    parts = _parts(name)
    if '..' in parts or name.startswith(('/', '\\')) or name[1:2] == ':':
      raise UserError(
        f'{path}: the name {name[:80]!r} leads out of the archive, expected names below it; make '
        'it again'
      )
    if not parts or any(map(_is_hidden, parts)):
      continue
    if not is_folder:
      files.add('/'.join(parts))
    for n in range(1, len(parts) + is_folder):
      folders.add('/'.join(parts[:n]))
  return Tree(*_in_order(path, files, folders), open, ': ')


def _damaged(path, error):
  raise_if_interrupted(error)
  kind = next(suffix for suffix in ARCHIVES if path.name.lower().endswith(suffix))
  return UserError(f'{path}: damaged or not a {kind} ({one_line(error)}); make or fetch it again')


def _opened_zip(path):
  try:
    return zipfile.ZipFile(path)
  except Exception as error:  # zipfile raises nearly anything
    raise _damaged(path, error) from error


def _of_zip(path, file):
  infos = file.infolist()
  _check_count(path, len(infos))
  for info in infos:
    if info.flag_bits & 1:
      raise UserError(
        f'{path}: {info.filename[:80]!r} is encrypted, expected plain files; unpack it and pack it '
        'without a password'
      )
    _check_member(path, info.filename, info.file_size, stat.S_IFMT(info.external_attr >> 16))
  refuse_expansion(path, sum(info.file_size for info in infos))
  by_name = {'/'.join(_parts(info.filename)): info for info in infos if not info.is_dir()}

  def read(name):
    with reading(lambda why: f'{path}: {name} is damaged ({why}); make or fetch the archive again'):
      return io.BytesIO(file.read(by_name[name]))

  return _of_members(path, {info.filename: info.is_dir() for info in infos}, read)


class _Bounded:
  """A file without large reads: a header of a tar may ask for any number of bytes."""

  def __init__(self, file):
    self._file = file
    self.seek = file.seek
    self.tell = file.tell

  def read(self, size: int) -> bytes:
    if size > LARGEST_MEMBER:
      raise tarfile.ReadError(f'{size:,} bytes in one piece')
    return self._file.read(size)


@contextlib.contextmanager
def opened_tar(path: pathlib.Path) -> Iterator[tuple[Any, tarfile.TarFile]]:
  """A .tar as it was before it was packed, and its members; no header can ask for memory.

  Who has read all members reads the file to its end: checksums are compared only there.
  """
  kinds = {'gz': gzip.open, 'z2': bz2.open, 'xz': lzma.open}
  with kinds.get(path.name.lower()[-2:], open)(path, 'rb') as unpacked:
    bounded: Any = _Bounded(unpacked)  # all that is used of a file
    with tarfile.open(fileobj=bounded, mode='r:') as tar:
      yield unpacked, tar


def _of_tar(path):
  """Its pictures are held as they are packed: a .tar.gz can only be read from first to last."""
  members = {}
  held = {}
  total = 0
  try:
    with opened_tar(path) as (unpacked, tar):
      for member in tar:
        if not (member.isfile() or member.isdir()):
          _check_member(path, member.name, 0, stat.S_IFLNK)
        _check_member(path, member.name, member.size, 0)
        total += member.size
        refuse_expansion(path, total)
        members[member.name] = member.isdir()
        _check_count(path, len(members))
        name = '/'.join(_parts(member.name))
        if member.isfile() and (is_picture(pathlib.PurePosixPath(name)) or is_listed(name)):
          content = tar.extractfile(member)
          assert content is not None  # it is a file
          held[name] = content.read()
          if len(held[name]) != member.size:
            raise EOFError(f'{member.name} is cut off')
      while unpacked.read(1 << 20):
        pass
  except UserError:
    raise
  except Exception as error:  # tarfile, gzip, bz2 and lzma each have their own
    raise _damaged(path, error) from error
  return _of_members(path, members, lambda name: io.BytesIO(held[name]))


def _check_count(path, count):
  if count > MOST_MEMBERS:
    raise UserError(f'{path} holds {count:,} files, expected {MOST_MEMBERS:,} at most; split it')


def _check_member(path, name, size, kind):
  """`kind` as stat has it, 0 where it is not said."""
  if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
    raise UserError(
      f'{path}: {name[:80]!r} is a link or device, expected files only; pack what it stands for'
    )
  if size > LARGEST_MEMBER:
    raise UserError(
      f'{path}: {name[:80]!r} has {size:,} bytes, expected {LARGEST_MEMBER:,} at most for a '
      'picture; remove it from the archive'
    )
