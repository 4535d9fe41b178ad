"""Files that are whole or as they were before."""
import contextlib
import os
import pathlib


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
