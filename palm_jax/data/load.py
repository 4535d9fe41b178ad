"""`load(name)`: labelled images from where they lie, checked.

Nothing is downloaded unless asked for, and no code that a file may hold is run.
"""

import difflib
import os
import pathlib
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from palm_jax.base import checks
from palm_jax.base.errors import UserError
from palm_jax.base.files import user_path
from palm_jax.data import arrays, cifar, decoding, folders, parquet, published, tfds, trees
from palm_jax.data.arrays import Data, Found, Split

RANGES = dict(size=checks.SIZE_OR_0)


def default_config() -> ConfigDict:
  """The section `data` of a config."""
  return ConfigDict(
    dict(
      name='cifar10',  # see `load`
      dir='',  # where bare names lie
      size=0,  # side of the squares that pictures are cropped and resized to; 0: as they are
    )
  )


def load(
  name_or_path: str | os.PathLike,
  *,
  download: bool = False,
  data_dir: str | os.PathLike | None = None,
  label_set: str = 'fine',
  stacks: bool = False,
  size: int = 0,
) -> Data:
  """Reads a labelled image set.

  Args:
    name_or_path: one of
      `digits`: scikit-learn's 1797 digits, 8x8 grey, split 1437/360.
      `x.npz`: `images` (N, H, W, C) uint8 and `labels` (N,) integer, or `train_images`,
        `train_labels`, `test_images`, `test_labels`; optionally `class_names`.
      `train.npz,test.npz`: two files with `images` and `labels`.
      A folder of class folders of pictures, or `train/` and `test/` (or `val/`, see `parts`)
        folders of class folders, or pictures with a dataset.json of stylegan2-ada; or a .zip or
        .tar (.gz, .bz2, .xz) of such a folder.
      `x.parquet`, or a folder of `train-*.parquet` and `test-*.parquet`, as of the Hugging Face
        Hub.
      A CIFAR-10/100 `.tar.gz` or folder as published, python or binary version.
      `train.mat,test.mat`: SVHN format 2; a folder with train_32x32.mat and test_32x32.mat, or
        either of the two.
      `tfds:<name>`: a set that tensorflow-datasets has prepared as array_record.
      `cifar10`, `cifar100`, `svhn`: the published files in `data_dir`.
    download: fetch the published files of a bare name that `data_dir` lacks.
    data_dir: where bare names lie (default: $PALM_DATA, else ~/.cache/palm_jax), or
      tensorflow-datasets' own folder.
    label_set: 'fine', or 'coarse' for CIFAR-100's 20 superclasses.
    stacks: whether four channels are a stack of grey frames.
    size: pictures are cropped to their central square and resized to this side; 0 leaves them as
      they are, and refuses several sizes.

  Returns:
    Data. A source without a test part gives a stratified fifth of its images, the same on every
    machine.

  Raises:
    UserError: missing or damaged file, wrong shape, dtype or label; the message says what to do.
  """
  name = os.fspath(name_or_path)
  if label_set not in ('fine', 'coarse'):
    raise UserError(f"label_set is {label_set!r}, expected 'fine' or 'coarse'")
  if name.startswith('tfds:'):
    found = tfds.read(name.removeprefix('tfds:'), data_dir, label_set, size)
    return _resized(arrays.check(name, found), size)
  if name == 'digits':
    paths = ()
  elif name in published.SETS:
    paths = published.locate(name, data_dir, download)
  else:
    paths = find(name)
  for path in paths:
    if not path.is_file() and not path.is_dir():
      raise UserError(f'{path} is neither a file nor a folder: data may be {arrays.FORMS}')
  if len(paths) == 1 and cifar.matches(paths[0]):
    return _resized(arrays.check(name, cifar.read(paths[0], label_set)), size)
  if len(paths) == 1 and parquet.matches(paths[0]):
    return arrays.check(name, parquet.read(paths[0], label_set, size))
  if label_set == 'coarse':
    raise UserError(
      f"label_set 'coarse' with {name}: only CIFAR-100 has coarse labels; leave label_set at 'fine'"
    )
  found = _read_paths(paths, size) if paths else _read_digits()
  return _resized(arrays.check(name, found, stacks), size)


def find(name: str) -> tuple[pathlib.Path, ...]:
  """The one path that the name is, or its two: train and test. Raises UserError."""
  path = user_path(name)
  if name and path.exists():
    return (path,)
  if ',' in name:
    paths = tuple(user_path(part.strip()) for part in name.split(','))
    if len(paths) != 2 or {path.suffix for path in paths} not in ({'.npz'}, {'.mat'}):
      raise UserError(f'{name}: a list with commas must be two .npz or two .mat files, train first')
    for path in paths:
      if not path.is_file():
        raise UserError(f'{path}: no such file; {name} was read as the files of train and test')
    return paths
  if path.suffix or os.sep in name:
    raise UserError(
      f'{path}: no such file or folder (working folder: {pathlib.Path.cwd()}); data may be '
      f'{arrays.FORMS}'
    )
  near = difflib.get_close_matches(name.lower(), ('digits', *published.SETS), 1, 0.4)
  hint = f'did you mean {near[0]}? ' if near else ''
  raise UserError(f'unknown data {name!r}: {hint}expected {arrays.FORMS}')


def files_of(paths: tuple[pathlib.Path, ...]) -> tuple[pathlib.Path, ...]:
  """SVHN's two files where the path is one of them or their folder; else the paths."""
  if len(paths) == 1:
    folder = paths[0] if paths[0].is_dir() else paths[0].parent
    svhn = tuple(folder / name for name in published.SETS['svhn'].download)
    if paths[0] in (folder, *svhn) and all(file.is_file() for file in svhn):
      return svhn
  return paths


def _resized(data, size):
  """Squares of that side, where size is not 0."""
  height, width = data.train.images.shape[1:3]
  how = decoding.fitted({(width, height)}, size) if size else ''
  if not how:
    return data
  count = len(data.train.images) + len(data.test.images)
  decoding.check_room(count, (size, size, data.train.images.shape[3]))
  fit = lambda images: np.stack([decoding.fit_array(image, size) for image in images])
  train, test = (split._replace(images=fit(split.images)) for split in (data.train, data.test))
  return data._replace(train=train, test=test, source=data.source + how)


def _read_paths(paths, size):
  """A folder, a file, or the two files of train and test."""
  paths = files_of(paths)
  if paths[0].is_dir() or (len(paths) == 1 and trees.is_archive(paths[0])):
    return folders.read(paths[0], size)
  suffix = paths[0].suffix
  read = {'.npz': arrays.read_npz, '.mat': arrays.read_mat}.get(suffix)
  if read is None:
    raise UserError(
      f'{paths[0]}: do not know what a {suffix or "file without suffix"} holds; data may be '
      f'{arrays.FORMS}'
    )
  if len(paths) == 1:
    return read(paths[0])
  train, test = paths
  return arrays.join(paths, read(train), read(test))


def _read_digits():
  import sklearn  # Here, because it takes a second that no other source needs.
  import sklearn.datasets

  digits: Any = sklearn.datasets.load_digits()
  images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
  names = [str(i) for i in range(10)]
  source = f'digits of scikit-learn {sklearn.__version__}'
  return Found(Split(images, digits.target), None, names, source)
