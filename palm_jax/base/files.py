"""Files that are whole or as they were before, and files that one process holds."""

import contextlib
import errno
import importlib
import json
import os
import pathlib
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from typing import IO, Any

from absl import logging

from palm_jax.base import signals
from palm_jax.base.errors import UserError, one_line

try:
  import fcntl
except ImportError:  # Windows
  fcntl = None

# Of the disk, its server or permissions: the user can do something about them.
REMEDIES = {
  'free space there': (errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
  'fix permissions there': (errno.EACCES, errno.EPERM),
  'have it mounted for writing': (errno.EROFS,),
  'raise `ulimit -n`': (errno.EMFILE, errno.ENFILE),
  'see that it is where it should be': (errno.ENOENT,),
  'make place for a folder or file of that name': (
    errno.EEXIST,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ELOOP,
  ),
  'see that its disk or file server works, then run again': (
    errno.EIO,
    errno.ESTALE,
    errno.EXDEV,
    errno.EBUSY,
    errno.ENOTEMPTY,
    errno.ETIMEDOUT,
    errno.ENOTCONN,
    errno.EHOSTDOWN,
  ),
}
UNKNOWN = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)  # to a file system
SEEN_SECONDS = 120  # after which all machines see what one has written


def _part_of(path):
  return path.with_name(f'.{path.name}.{_host()}.{os.getpid()}.part')


@contextlib.contextmanager
def scratch(folder: str | os.PathLike) -> Iterator[pathlib.Path]:
  """An empty folder within `folder` for what is being made there; it is removed at the end.

  So is what killed processes left of theirs.

  Raises:
    OSError: it cannot be written.
  """
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  for left in folder.glob('.scratch.*.part'):
    if abandoned(left):
      shutil.rmtree(left, ignore_errors=True)
  part = _part_of(folder / 'scratch')
  signals.unfinished.add(part)
  try:
    part.mkdir()
    yield part
  finally:
    shutil.rmtree(part, ignore_errors=True)
    signals.unfinished.discard(part)


@contextlib.contextmanager
def replacing(path: str | os.PathLike, mode: str = 'wb') -> Iterator[IO]:
  """An open file that replaces the one at `path` when the block has ended without an error.

  Raises:
    OSError: it cannot be written.
    UserError: there is something else than a file.
  """
  path = pathlib.Path(path)
  if path.exists() and not path.is_file():
    raise UserError(f'{path} is no file that can be replaced: name another')
  path.parent.mkdir(parents=True, exist_ok=True)
  part = _part_of(path)
  signals.unfinished.add(part)
  try:
    with part.open(mode) as file:
      yield file
      file.flush()
      os.fsync(file.fileno())
    os.replace(part, path)
    sync(path.parent)
  finally:
    part.unlink(missing_ok=True)
    signals.unfinished.discard(part)


@contextlib.contextmanager
def reading(tell: Callable[[str], str]) -> Iterator[None]:
  """Reads by a library that damaged bytes may lead into any error.

  Args:
    tell: the library's error in one line -> the message about the file.

  Raises:
    UserError: where the library raises anything, unless it was an interruption that led to it.
  """
  try:
    yield
  except UserError:
    raise
  except Exception as error:
    signals.raise_if_interrupted(error)
    raise UserError(tell(one_line(error))) from error


def remedy(error: OSError) -> str:
  """What to do about what the disk refused; '' where that is not known."""
  return next((words for words, numbers in REMEDIES.items() if error.errno in numbers), '')


def not_written(error: OSError, path: str | os.PathLike) -> UserError:
  """What to say of a file, named by --out, that the disk refused."""
  what_to_do = remedy(error) or 'fix that'
  return UserError(
    f'{path} cannot be written ({error.strerror}): {what_to_do}, or choose another --out'
  )


def user_path(path: str | os.PathLike) -> pathlib.Path:
  """A path as people give it, ~ for a home folder; pathlib's own fails where there is none."""
  return pathlib.Path(os.path.expanduser(path))


def check_writable(path: str | os.PathLike) -> None:
  """Raises UserError where a file or folder could not be made at `path`; makes nothing."""
  folder = pathlib.Path(path).absolute().parent
  while not os.path.lexists(folder):
    folder = folder.parent
  if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
    raise UserError(f'{path}: {folder} is no folder that can be written to: name another place')


def _host():
  """Without dots, which part the names of what is being written."""
  return socket.gethostname()[:32].replace('.', '-')


def abandoned(part: pathlib.Path) -> bool:
  """Whether what `replacing` or `scratch` began is of a process that has ended.

  Of another machine's it is taken to be after a day, or where it is of a day to come.
  """
  *_, host, process, _ = ('..' + part.name).rsplit('.', 3)
  if host != _host() or not process.isdecimal():
    try:
      return abs(time.time() - part.stat().st_mtime) > 86_400
    except FileNotFoundError:  # that machine has finished it just now
      return False
  try:
    os.kill(int(process), 0)
  except ProcessLookupError:
    return True
  except OSError:  # another user's
    pass
  return int(process) == os.getpid() and part not in signals.unfinished


def sync(*paths: str | os.PathLike) -> None:
  """Brings files, and the names in folders, to the disk.

  Without it a loss of power can keep a name without its content, or lose both.

  Raises:
    OSError: what was written before did not get there.
  """
  for path in paths:
    if os.name == 'nt' and os.path.isdir(path):
      continue  # Windows opens no folders
    handle = os.open(path, os.O_RDONLY)
    try:
      os.fsync(handle)
    except OSError as e:
      if e.errno not in UNKNOWN:
        raise
    finally:
      os.close(handle)


@contextlib.contextmanager
def locked(path: str | os.PathLike, patience: float = 0.0) -> Iterator[bool]:
  """Yields whether this process alone holds the lock at `path`.

  The lock ends with the process, however that ends. Where the file system has no locks, it is
  always given.

  Args:
    path: of the lock's file, which exists only while the block lasts.
    patience: seconds to wait for another process that holds it.
  """
  path = pathlib.Path(path)
  deadline = time.monotonic() + patience
  while True:
    with path.open('a') as file:
      mine = _lock(path, file)
      if mine or time.monotonic() >= deadline:
        try:
          yield mine
        finally:
          if mine:
            with contextlib.suppress(PermissionError):  # Windows removes no file that is open
              path.unlink(missing_ok=True)
        return
    logging.log_every_n_seconds(
      logging.INFO,
      '%s is held by another command: waiting (where that ended with its machine, remove the file)',
      30,
      path,
    )
    time.sleep(min(1.0, patience))


def seen(path: str | os.PathLike) -> bool:
  """Whether there is something at a path that another machine has written.

  File servers show each machine what is new up to a minute later: for so long it is waited for.
  """
  deadline = time.monotonic() + SEEN_SECONDS
  while not os.path.exists(path):
    if time.monotonic() >= deadline:
      return False
    time.sleep(0.5)
  return True


def held(path: str | os.PathLike) -> bool:
  """Whether some process holds the lock at `path`."""
  try:
    with open(path, 'r+') as file:  # does not make it
      return not _lock(pathlib.Path(path), file)
  except FileNotFoundError:
    return False


def _lock(path, file):
  try:
    if fcntl:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    else:
      importlib.import_module('msvcrt').locking(file.fileno(), 2, 1)  # LK_NBLCK
    return os.path.samestat(path.stat(), os.fstat(file.fileno()))
  except (BlockingIOError, FileNotFoundError):  # another has it, or took it away just now
    return False
  except OSError as e:
    if fcntl is None:
      return False  # msvcrt says PermissionError where another has it
    logging.log_first_n(
      logging.WARNING,
      '%s: this file system has no locks (%s): let no other command work there',
      1,
      path.parent,
      e.strerror,
    )
    return True


def as_json(obj: Any) -> Any:
  """An object as it is read again from JSON: numbers and arrays of NumPy and JAX are lists."""
  return json.loads(json.dumps(obj, default=lambda x: x.tolist()))


def write_json(path: str | os.PathLike, obj: Any) -> None:
  """Writes JSON, also of NumPy's and JAX's numbers and arrays: whole, or nothing is changed."""
  with replacing(path, 'w') as f:
    json.dump(obj, f, indent=2, default=lambda x: x.tolist())
