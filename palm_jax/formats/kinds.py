"""Which kind of file of weights a file is, by what stands in it, not by its name."""

import os
import pathlib
import re
import stat

from palm_jax.base.errors import UserError

HEAD = 512  # bytes that tell
NOT_WEIGHTS = [  # how the file begins, what that is, what to do
  (rb'\s*<(!doctype|html|\?xml)', 'is a web page', 'the download failed; open it in a browser'),
  (rb'version https://git-lfs', 'is a pointer of Git LFS, not the file', 'run `git lfs pull`'),
  (rb'\x1f\x8b', 'is packed by gzip', 'unpack it first (gunzip)'),
  (rb'BZh', 'is packed by bzip2', 'unpack it first (bunzip2)'),
  (rb'\xfd7zXZ\0', 'is packed by xz', 'unpack it first (unxz)'),
  (rb'\x28\xb5\x2f\xfd', 'is packed by zstd', 'unpack it first (unzstd)'),
  (rb'7z\xbc\xaf\x27\x1c|Rar!', 'is an archive', 'unpack it first'),
  (rb'.{257}ustar', 'is a tar archive', 'unpack it first (tar xf)'),
  (rb'\x89HDF', 'is an HDF5 file, as Keras writes', 'save its arrays as .npz or .safetensors'),
  (rb'\x89PNG|\xff\xd8\xff|GIF8|RIFF', 'is a picture', 'give the file of the generator'),
  (rb'\x08[\x01-\x0a]\x12', 'is an ONNX file', 'give the file that it was exported from'),
]


class SnapshotError(UserError):
  """A file of weights that is damaged or holds what is not read from such files."""


class AbsentError(SnapshotError):
  """A file of weights without the network that is asked for."""


def check_file(path: str | os.PathLike) -> pathlib.Path:
  """The path of a file that can be read.

  Raises:
    SnapshotError: no such file, something else than a file, or an empty one.
  """
  path = pathlib.Path(path)
  try:
    found = path.stat()
  except (OSError, ValueError) as e:  # ValueError: a path with a NUL
    absent = isinstance(e, FileNotFoundError | NotADirectoryError)
    what = 'no such file' if absent else f'cannot be read ({getattr(e, "strerror", e)})'
    raise SnapshotError(f'{path}: {what}; expected a file of weights, such as network.pkl') from e
  if not stat.S_ISREG(found.st_mode):
    what = 'is a folder' if stat.S_ISDIR(found.st_mode) else 'is not a file'
    raise SnapshotError(f'{path}: {what}; expected a file of weights, such as network.pkl')
  if not found.st_size:
    raise SnapshotError(f'{path}: is empty; fetch it again')
  return path


def kind_of(path: str | os.PathLike) -> str:
  """What a file is: 'torch' (a pickle, or of torch.save or torch.jit.save), 'npz', 'safetensors'.

  Raises:
    SnapshotError: no such file, or one of another kind: names it, and the way out.
  """
  path = check_file(path)
  try:
    with path.open('rb') as file:
      head = file.read(HEAD)
      size = file.seek(-1, os.SEEK_END) + 1
      end = file.read()
  except OSError as e:
    raise SnapshotError(f'{path} cannot be read ({e.strerror}): fix that, or give another') from e
  # Its length, then a header of JSON.
  if head[8:9] == b'{' and 8 + int.from_bytes(head[:8], 'little') <= size:
    return 'safetensors'
  for pattern, what, remedy in NOT_WEIGHTS:
    if re.match(pattern, head, re.IGNORECASE | re.DOTALL):
      raise SnapshotError(f'{path} {what}: {remedy}')
  if head.startswith(b'PK'):
    name = head[30 : 30 + int.from_bytes(head[26:28], 'little')]
    return 'npz' if name.endswith(b'.npy') else 'torch'
  if head.startswith(b'\x80'):
    return 'torch'
  if end == b'.' and re.match(rb'[(c\])}lIFSVNL]', head):
    raise SnapshotError(
      f'{path} is a pickle of protocol 0 or 1, which is not read: load it where it was written, '
      'and save it again with protocol 2 to 5'
    )
  raise SnapshotError(
    f'{path} is none of the files of weights that are read: expected a pickle, a file of '
    'torch.save, an .npz or a .safetensors'
  )
