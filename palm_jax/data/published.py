"""Image sets that are known by name: where they are published, their digests, and the download."""

import http.client
import logging
import os
import pathlib
import shlex
import shutil
import tempfile
import urllib.request
from typing import NamedTuple

from palm_jax.base.digests import file_digest
from palm_jax.base.errors import UserError, one_line
from palm_jax.base.files import user_path

_KRIZ = 'https://www.cs.toronto.edu/~kriz/'
_HOUSENUMBERS = 'http://ufldl.stanford.edu/housenumbers/'

# File name: (address, bytes, sha256). The two python archives as in keras.datasets, the rest as
# registered in tensorflow-datasets (datasets/*/checksums.tsv, url_checksums/).
PUBLISHED = {
  'cifar-10-binary.tar.gz': (
    _KRIZ + 'cifar-10-binary.tar.gz',
    170_052_171,
    'c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd',
  ),
  'cifar-10-python.tar.gz': (
    _KRIZ + 'cifar-10-python.tar.gz',
    170_498_071,
    '6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce',
  ),
  'cifar-100-binary.tar.gz': (
    _KRIZ + 'cifar-100-binary.tar.gz',
    168_513_733,
    '58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec',
  ),
  'cifar-100-python.tar.gz': (
    _KRIZ + 'cifar-100-python.tar.gz',
    169_001_437,
    '85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7',
  ),
  'train_32x32.mat': (
    _HOUSENUMBERS + 'train_32x32.mat',
    182_040_794,
    '435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8',
  ),
  'test_32x32.mat': (
    _HOUSENUMBERS + 'test_32x32.mat',
    64_275_384,
    'cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b',
  ),
}


class _Set(NamedTuple):
  files: tuple[tuple[str, ...], ...]  # groups of files or folders: any complete one will do
  download: tuple[str, ...]
  tfds: str  # its name there


_SVHN_FILES = ('train_32x32.mat', 'test_32x32.mat')

SETS = {
  'cifar10': _Set(
    (
      ('cifar-10-batches-bin',),
      ('cifar-10-batches-py',),
      ('cifar-10-binary.tar.gz',),
      ('cifar-10-python.tar.gz',),
    ),
    ('cifar-10-binary.tar.gz',),
    'cifar10',
  ),
  'cifar100': _Set(
    (
      ('cifar-100-binary',),
      ('cifar-100-python',),
      ('cifar-100-binary.tar.gz',),
      ('cifar-100-python.tar.gz',),
    ),
    ('cifar-100-binary.tar.gz',),
    'cifar100',
  ),
  'svhn': _Set((_SVHN_FILES,), _SVHN_FILES, 'svhn_cropped'),
}

# tensorflow-datasets needs both to prepare a set, and declares neither.
PREPARE_NEEDS = "pip install 'tensorflow>=2.19' importlib_resources"


def locate(
  name: str, data_dir: str | os.PathLike | None = None, download: bool = False
) -> tuple[pathlib.Path, ...]:
  """The files or folders of a set that is known by name.

  Args:
    name: a key of SETS.
    data_dir: where they lie; default $PALM_DATA, else ~/.cache/palm_jax.
    download: fetch what is missing.

  Raises:
    UserError: not all there, with the commands that provide it; or a failed download.
  """
  known = SETS[name]
  root = user_path(data_dir or os.environ.get('PALM_DATA') or '~/.cache/palm_jax')
  for group in known.files:
    if all((root / part).exists() for part in group):
      return tuple(root / part for part in group)
  missing = [part for part in known.download if not (root / part).exists()]
  if not download:
    looked_for = ' or '.join(' with '.join(group) for group in known.files)
    by_hand = ' && '.join(
      f'curl -L --create-dirs -o {shlex.quote(str(root / part))} {PUBLISHED[part][0]}'
      for part in missing
    )
    raise UserError(
      f'{name} is not in {root}: looked for {looked_for} (missing: {", ".join(missing)}). Run '
      f'again with --download; or fetch by hand: {by_hand}; or have tensorflow-datasets prepare it '
      f'and say tfds:{known.tfds}: {prepare_command(known.tfds, None)}'
    )
  for part in missing:
    fetch(*PUBLISHED[part], root / part)
  return tuple(root / part for part in known.download)


def fetch_missing(name: str, data_dir: str | os.PathLike | None = None) -> None:
  """Downloads what `load` needs of a set that is known by name; other names need nothing."""
  if name in SETS:
    locate(name, data_dir, download=True)


def fetch(url: str, size: int, sha256: str, target: pathlib.Path) -> None:
  """Downloads `url` to `target`, which appears only when complete: of `size` bytes and `sha256`.

  Raises:
    UserError: no connection, or other content than published.
  """
  logging.getLogger(__name__).info('downloading %s (%d MB) to %s', url, size // 1_000_000, target)
  by_hand = f'fetch {target.name} in another way and put it into {target.parent}'
  try:
    target.parent.mkdir(parents=True, exist_ok=True)
    # A folder beside the target, because a rename is atomic within one file system only; each
    # process has its own.
    with tempfile.TemporaryDirectory(prefix='.download-', dir=target.parent) as folder:
      part = pathlib.Path(folder) / target.name
      with urllib.request.urlopen(url, timeout=60) as response, part.open('wb') as out:
        shutil.copyfileobj(response, out, 1 << 20)
      received = part.stat().st_size
      if received != size:
        raise UserError(
          f'{url} gave {received} bytes, expected {size}: cut off or not that file; try again, or '
          f'{by_hand}'
        )
      digest = file_digest(part)
      if digest != sha256:
        raise UserError(
          f'{url} has sha256 {digest}, expected {sha256}: damaged or changed; {by_hand}'
        )
      part.replace(target)
  except (OSError, http.client.HTTPException) as error:
    raise UserError(f'cannot download {url} to {target} ({one_line(error)}); {by_hand}') from error


def describe(path: pathlib.Path) -> str:
  """The name of a file or folder for protocols.

  A file's has its digest, and whether that is the published one.
  """
  if path.is_dir():
    return path.resolve().name
  digest = file_digest(path)
  note = ''
  if path.name in PUBLISHED:
    _, _, expected = PUBLISHED[path.name]
    note = ', as published' if digest == expected else ', not the published file'
  return f'{path.name} (sha256 {digest[:12]}{note})'


def prepare_command(name: str, data_dir: str | os.PathLike | None) -> str:
  """The command by which tensorflow-datasets prepares a set that is read without tensorflow."""
  where = f' --data_dir={shlex.quote(str(data_dir))}' if data_dir else ''
  return f'{PREPARE_NEEDS} && tfds build {name} --file_format=array_record{where}'
