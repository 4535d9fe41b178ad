"""Files that are whole or as they were before, and files that one process holds."""
import contextlib
import importlib
import os
import pathlib

fcntl = importlib.import_module('fcntl') if os.name == 'posix' else None


@contextlib.contextmanager
def replacing(path, mode='wb'):
  """An open file whose content stands at `path` when the block has ended well; else nothing has changed there.

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
  finally:
    part.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path):
  """Yields whether this process alone holds the file at `path`, which is there only while the block lasts.

  The hold ends with the process, however that ends. Where the system or the file system has no locks, it is always given.
  """
  path = pathlib.Path(path)
  with path.open('a') as file:
    try:
      if fcntl:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      mine = path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno()))  # not what its last holder took away
    except OSError as e:
      mine = not isinstance(e, BlockingIOError)
    try:
      yield mine
    finally:
      if mine:
        path.unlink(missing_ok=True)
