"""Whether data are the same as before, without decoding them."""

import hashlib
import os
import stat

from palm_jax.base.digests import file_digest
from palm_jax.base.errors import UserError
from palm_jax.data import cifar, decoding, parts, published, trees
from palm_jax.data.load import files_of, find
from palm_jax.data.trees import LISTED


def fingerprint(name: str, data_dir: str | os.PathLike | None = None, size: int = 0) -> str | None:
  """A digest of what `load(name)` reads: of files and lists of labels their bytes, of folders of
  pictures names and sizes.

  None where there is nothing of that name, or it cannot be told.

  Args:
    name: of the data.
    data_dir: where bare names lie.
    size: that pictures are resized to; 0 where they are not.
  """
  found = _of_name(name, data_dir)
  if not found or not size:
    return found
  return hashlib.sha256(f'{found} at {size}'.encode()).hexdigest()


def _of_name(name, data_dir):
  if name == 'digits' or name.startswith('tfds:'):  # with a version of their own, said in results
    return hashlib.sha256(name.encode()).hexdigest()
  try:
    paths = published.locate(name, data_dir) if name in published.SETS else files_of(find(name))
    return hashlib.sha256(' '.join(map(_of_path, paths)).encode()).hexdigest()
  except (OSError, UserError):
    return None


def _of_path(path):
  if not path.is_dir():
    return file_digest(path) if stat.S_ISREG(path.stat().st_mode) else path.name
  whole = cifar.matches(path)  # a file has many pictures
  new = _read_only_now(path)
  lines = []
  for folder, _, names in trees.walk(path):
    for name in names:
      file = path / folder / name
      line = f'{folder / name} {file.stat().st_size}{" read" if new(folder / name) else ""}'
      lines.append(f'{line} {file_digest(file)}' if whole or name == LISTED else line)
  return hashlib.sha256('\n'.join(lines).encode()).hexdigest()


def _read_only_now(root):
  """Whether a file is a picture that older versions skipped: then the data are not as before."""
  listed = (root / LISTED).is_file()
  train = root / 'train'
  in_parts = train.is_dir() and any(x.is_dir() and x.name[0] != '.' for x in train.iterdir())
  depth = 3 if in_parts else 2  # of a picture directly in its class folder

  def new(relative):
    if not decoding.is_picture(relative):
      return False
    skipped = relative.suffix.lower() not in decoding.FIRST_SUFFIXES
    if listed:
      return skipped
    if parts.is_part(relative.parts[0]) and relative.parts[0] not in ('train', 'test', 'val'):
      return True  # of a part that older versions took for a class, or for none
    if in_parts and not parts.is_part(relative.parts[0]):
      return False
    return len(relative.parts) > depth or (skipped and len(relative.parts) == depth)

  return new
