"""`Data` and `Split`, the checks that all images pass, and arrays from .npz and .mat files."""

import math
import pathlib
import zipfile
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.io
from absl import logging

from palm_jax.base.errors import UserError, one_line
from palm_jax.base.files import reading
from palm_jax.base.signals import raise_if_interrupted
from palm_jax.data import published

# What `load` understands, for messages.
FORMS = (
  'digits, cifar10, cifar100, svhn, tfds:<name>, x.npz, train.npz,test.npz, train.mat,test.mat, '
  'a CIFAR archive or folder as published, x.parquet or a folder of such files, or a folder, .zip '
  'or .tar of class folders or with a dataset.json'
)
_MAX_CLASSES = 2**16  # only bounds the names made up for a set without names
LARGE = 1 << 30  # bytes of an .npz, unpacked
MAX_EXPANSION = 100  # of a large one


class Split(NamedTuple):
  """Images and their labels."""

  images: np.ndarray  # (N, H, W, C) uint8, C = 1 or 3
  labels: np.ndarray  # (N,) int64 in 0..len(class_names)-1


class Data(NamedTuple):
  """A labelled image set."""

  train: Split
  test: Split
  class_names: tuple[str, ...]
  source: str  # what was read and how it was split, for printing in protocols


class Found(NamedTuple):
  """What a reader found, before `check`."""

  train: Split
  test: Split | None
  class_names: Sequence[str] | None
  source: str  # what was read


def check(name: str, found: Found, stacks: bool = False) -> Data:
  """What a reader found, checked, with a test part and names.

  Without a test part a stratified fifth of the images is held out. Without names they are numbers.

  Args:
    name: of the set, for messages.
    found: by a reader.
    stacks: whether four channels are a stack of grey frames; else they are refused.

  Raises:
    UserError: wrong shape, dtype or label; the message says what to do.
  """
  train = check_split(f'{name} (train)', found.train, found.class_names, stacks)
  how = ''
  if found.test is not None:
    test = check_split(f'{name} (test)', found.test, found.class_names, stacks)
    if test.images.shape[1:] != train.images.shape[1:]:
      raise UserError(
        f'{name}: test images are {test.images.shape[1:]}, train images {train.images.shape[1:]} '
        '(height, width, channels); expected one shape'
      )
  else:
    chosen = _test_fifth(train.labels)
    if not chosen.any():
      raise UserError(
        f'{name}: {len(chosen)} images with no two of a class leave none for a test part; '
        'give more images, or a test part of its own'
      )
    test = Split(train.images[chosen], train.labels[chosen])
    train = Split(train.images[~chosen], train.labels[~chosen])
    how = ' (a fixed stratified fifth held out as test)'
  names = found.class_names
  if names is None:
    names = range(max(train.labels.max(), test.labels.max()) + 1)
  _log_gaps(name, train.labels, test.labels, len(names))
  source = f'{found.source}; {len(train.labels)} train, {len(test.labels)} test{how}'
  return Data(train, test, tuple(str(name) for name in names), source)


def _log_gaps(name, train_labels, test_labels, num_classes):
  """Says which classes have no image: their numbers stay, and networks have outputs for them."""
  there = np.union1d(train_labels, test_labels)
  absent = np.setdiff1d(np.arange(num_classes), there)
  if len(absent):
    shown = ', '.join(map(str, absent[:3])) + (', ...' if len(absent) > 3 else '')
    logging.warning(
      '%s: %d of %d classes have no image (%s); labels stay as they are',
      name,
      len(absent),
      num_classes,
      shown,
    )


def check_split(
  where: str, split: Split, class_names: Sequence[str] | None, stacks: bool = False
) -> Split:
  """The split with contiguous images and int64 labels.

  Args:
    where: what it is, for messages.
    split: images and labels as read.
    class_names: None where they are not known.
    stacks: see `check`.

  Raises:
    UserError: wrong shape, dtype or label; the message says what to do.
  """
  images = np.asarray(split.images)
  labels = np.asarray(split.labels)
  _check_images(where, images, stacks)
  _check_labels(where, labels, len(images), class_names)
  return Split(np.ascontiguousarray(images), labels.astype(np.int64))


def _check_images(where, images, stacks):
  if images.dtype != np.uint8:
    raise UserError(
      f'{where}: images are {images.dtype}, expected uint8 in 0..255; {_image_advice(images)}'
    )
  if images.ndim != 4:
    hint = '; grey images need a channel axis: images[..., None]' if images.ndim == 3 else ''
    raise UserError(
      f'{where}: images have shape {images.shape}, expected (N, height, width, channels){hint}'
    )
  if images.shape[3] == 4 and not stacks:
    raise UserError(
      f'{where}: images have shape {images.shape}, 4 channels, expected 1 or 3; of RGBA take '
      "images[..., :3]; stacks of an Atari game's frames are data.name='collect'"
    )
  if images.shape[3] not in (1, 3, 4):
    hint = ''
    if images.shape[1] in (1, 3):
      hint = '; it looks like (N, C, H, W): images.transpose(0, 2, 3, 1)'
    raise UserError(
      f'{where}: images have shape {images.shape}, expected 1, 3 or 4 channels in the last '
      f'place{hint}'
    )
  if not images.size:
    raise UserError(
      f'{where}: images have shape {images.shape}: nothing in it; expected at least one image'
    )
  if images.max() == 1:
    raise UserError(
      f'{where}: all pixels are 0 or 1, expected 0..255: black pictures; multiply by 255 before '
      'they become uint8'
    )


def _check_labels(where, labels, num_images, class_names):
  if labels.ndim != 1 or labels.dtype.kind not in 'iu':
    raise UserError(
      f'{where}: labels have shape {labels.shape} and dtype {labels.dtype}, expected (N,) '
      f'integers; {_label_advice(labels)}'
    )
  if len(labels) != num_images:
    raise UserError(
      f'{where}: {len(labels)} labels for {num_images} images, expected one label per image'
    )
  if labels.min() < 0:
    raise UserError(
      f'{where}: labels hold {labels.min()} (unlabelled?), expected a class 0..K-1 for every '
      'image; drop those images, or give all of them label 0 where labels do not matter'
    )
  limit = _MAX_CLASSES if class_names is None else len(class_names)
  if labels.max() >= limit:
    raise UserError(
      f'{where}: labels hold {labels.max()}, expected 0..{limit - 1}; '
      'number the classes from 0, and name each of them where class_names are given'
    )


def _image_advice(images):
  """How images of another type become uint8."""
  if images.dtype.kind not in 'iuf' or not images.size:
    return 'save the pixels themselves as numbers'
  low, high = images.min(), images.max()
  if not np.isfinite([low, high]).all():
    return 'some pixels are NaN or infinite: drop those images'
  if images.dtype.kind == 'f' and -1 <= low < 0 and high <= 1:
    return 'save ((images + 1) * 127.5).round().astype(np.uint8)'
  if images.dtype.kind == 'f' and 0 <= low and high <= 1:
    return 'save (images * 255).round().astype(np.uint8)'
  if 0 <= low and 1 < high <= 255:
    return 'save images.round().astype(np.uint8)'
  if images.dtype == np.uint16:
    return 'save (images / 257).round().astype(np.uint8) where they are in 0..65535'
  return f'they are from {low} to {high}: scale them to 0..255 and save them as uint8'


def _label_advice(labels):
  """How labels of another form become integers."""
  if labels.dtype.kind not in 'iufb':
    return 'number the names: names, labels = np.unique(labels, return_inverse=True)'
  if labels.dtype.kind == 'f' and not np.isfinite(labels).all():
    return f'{np.sum(~np.isfinite(labels))} of them are NaN or infinite: drop those images'
  if labels.dtype.kind == 'f' and (labels % 1).any():
    return 'they are no whole numbers: give the number of a class to each image'
  if labels.ndim == 2 and labels.shape[1] > 1:
    return 'where each row has one entry for each class: labels.argmax(1)'
  return "one way: labels.reshape(-1).astype('int64')"


def _test_fifth(labels):
  """(N,) bool: ceil(N/5) images, of each class a fifth, rounded up or down.

  Every class keeps train images.
  """
  count = np.bincount(labels)
  take = count // 5
  rest = count % 5
  order = np.argsort(-rest, kind='stable')
  order = order[count[order] > 1]
  take[order[: math.ceil(len(labels) / 5) - take.sum()]] += 1
  # NumPy promises to keep a bit generator's raw bits across versions, but not shuffle's results.
  shuffled = np.lexsort((np.random.PCG64(0).random_raw(len(labels)), labels))
  rank = np.arange(len(labels)) - (np.cumsum(count) - count)[labels[shuffled]]
  chosen = np.zeros(len(labels), bool)
  chosen[shuffled] = rank < take[labels[shuffled]]
  return chosen


def check_expansion(path: pathlib.Path) -> None:
  """Raises UserError where a small .npz would fill the memory; what zipfile raises on damage."""
  with zipfile.ZipFile(path) as file:
    size = sum(member.file_size for member in file.infolist())
  refuse_expansion(path, size)


def refuse_expansion(path: pathlib.Path, size: int) -> None:
  """Raises UserError where a file that holds `size` bytes is much too small for them."""
  if size > LARGE and size > MAX_EXPANSION * path.stat().st_size:
    raise UserError(
      f'{path} of {path.stat().st_size / 1e6:.1f} MB says that it holds {size / 1e9:.1f} GB: no '
      'pictures or features are packed so much; make it again'
    )


def read_npz(path: pathlib.Path) -> Found:
  """A .npz: `images` and `labels`, or those of `train_` and `test_`; perhaps `class_names`.

  Other arrays in it are not read.

  Raises:
    UserError: damaged, not of plain arrays, or with other keys.
  """
  whole = ('images', 'labels')
  train = ('train_images', 'train_labels')
  test = ('test_images', 'test_labels')
  try:
    check_expansion(path)
    with np.load(path, allow_pickle=False) as file:
      found = file.files
      wanted = (*whole, *train, *test, 'class_names')
      arrays = {key: file[key] for key in found if key in wanted}
  except UserError:
    raise
  except MemoryError as error:
    raise UserError(f'{path}: its arrays do not fit the memory ({one_line(error)})') from error
  except Exception as error:  # A damaged zip or header raises nearly anything.
    raise_if_interrupted(error)
    if 'Object arrays' in str(error):
      raise UserError(
        f'{path} holds arrays of Python objects (dtype object), which are not read; save images '
        'as uint8 and labels as integers, such as np.unique(labels, return_inverse=True)[1]'
      ) from error
    raise UserError(
      f'{path}: not a readable .npz of plain arrays ({one_line(error)}); '
      'write it again with numpy.savez_compressed'
    ) from error
  class_names = None
  if 'class_names' in arrays:
    names = arrays['class_names'].reshape(-1).tolist()
    class_names = [x.decode('utf-8', 'replace') if isinstance(x, bytes) else str(x) for x in names]

  def split(keys):
    return Split(*(arrays[key] for key in keys)) if set(keys) <= set(arrays) else None

  of_test = split(test)
  of_train = (split(train) if of_test else None) or split(whole)
  if of_train is None:
    raise UserError(
      f'{path} holds {", ".join(found) or "nothing"}; expected the keys {", ".join(whole)}, '
      f'or {", ".join(train + test)}'
    )
  return Found(of_train, of_test, class_names, published.describe(path))


def read_mat(path: pathlib.Path) -> Found:
  """A .mat of SVHN's format 2, whose label 10 is the digit 0.

  Raises:
    UserError: damaged, or of another form.
  """
  form = 'expected SVHN format 2: X (height, width, 3, N) uint8 and y (N, 1) with 1..10'
  with reading(lambda why: f'{path}: not a readable MATLAB 5 file ({why}); {form}; fetch it again'):
    content = scipy.io.loadmat(path, variable_names=('X', 'y'))
  if not {'X', 'y'} <= content.keys() or content['X'].ndim != 4:
    found = ', '.join(f'{key} {content[key].shape}' for key in content if key in ('X', 'y'))
    raise UserError(f'{path} holds {found or "neither X nor y"}; {form}')
  labels = content['y'].reshape(-1)
  labels = np.where(labels == 10, 0, labels).astype(labels.dtype)
  images = content['X'].transpose(3, 0, 1, 2)
  return Found(Split(images, labels), None, [str(i) for i in range(10)], published.describe(path))


def join(paths: Sequence[pathlib.Path], train: Found, test: Found) -> Found:
  """One set of two files: train, and test.

  Raises:
    UserError: one of them has both parts, or they name the classes differently.
  """
  for path, part in zip(paths, (train, test), strict=True):
    if part.test:
      raise UserError(f'{path} holds both train and test; give it alone')
  names = [part.class_names for part in (train, test) if part.class_names is not None]
  if len(names) == 2 and names[0] != names[1]:
    raise UserError(
      f'{paths[1]}: class_names differ from those of {paths[0]}; expected the same list in both'
    )
  class_names = names[0] if names else None
  return Found(train.train, test.train, class_names, f'{train.source}, {test.source}')
