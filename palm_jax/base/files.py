"""Files that are whole or as they were before, and files that one process holds."""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import time
from collections.abc import Iterator
from typing import IO, Any

from absl import logging

UNKNOWN = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)  # to a file system


@contextlib.contextmanager
def replacing(path: str | os.PathLike, mode: str = 'wb') -> Iterator[IO]:
  """An open file that replaces the one at `path` when the block has ended without an error.

  Raises:
    OSError: it cannot be written.
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  part = path.with_name(f'.{path.name}.{os.getpid()}.part')
  try:
    with part.open(mode) as file:
      yield file
      file.flush()
      os.fsync(file.fileno())
    os.replace(part, path)
    sync(path.parent)
  finally:
    part.unlink(missing_ok=True)


def sync(*paths: str | os.PathLike) -> None:
  """Brings files, and the names in folders, to the disk.

  Without it a loss of power can keep a name without its content, or lose both.

  Raises:
    OSError: what was written before did not get there.
  """
  for path in paths:
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
            path.unlink(missing_ok=True)
        return
    logging.log_every_n_seconds(logging.INFO, '%s is held by another command: waiting', 30, path)
    time.sleep(min(1.0, patience))


def _lock(path, file):
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return os.path.samestat(path.stat(), os.fstat(file.fileno()))
  except (BlockingIOError, FileNotFoundError):  # another has it, or took it away just now
    return False
  except OSError:
    return True


def write_json(path: str | os.PathLike, obj: Any) -> None:
  """Writes JSON, also of NumPy's and JAX's numbers and arrays: whole, or nothing is changed."""
  with replacing(path, 'w') as f:
    json.dump(obj, f, indent=2, default=lambda x: x.tolist())
