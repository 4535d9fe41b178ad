"""Folders of pictures: a folder for each class, or the labels in a dataset.json."""

import collections
import json
import pathlib

import numpy as np
from PIL import Image

from palm_jax.base.errors import UserError, one_line
from palm_jax.base.signals import raise_if_interrupted
from palm_jax.data import published
from palm_jax.data.arrays import FORMS, Found, Split

IMAGE_SUFFIXES = ('.png', '.jpg', '.jpeg', '.webp')


def read(root: pathlib.Path) -> Found:
  """The pictures of a folder.

  Args:
    root: holds class folders; or `train/` and `test/` (or `val/`) folders of class folders; or a
      dataset.json.

  Raises:
    UserError: no classes, no pictures, damaged ones, or several sizes.
  """
  if (root / 'dataset.json').is_file():
    return _read_listed(root)
  train_folder = root
  test_folder = None
  if _subfolders(root / 'train'):
    train_folder = root / 'train'
    parts = [root / part for part in ('test', 'val') if (root / part).is_dir()]
    test_folder = parts[0] if parts else None
  names = [folder.name for folder in _subfolders(train_folder)]
  if not names:
    raise UserError(
      f'{train_folder} has no folders; expected one folder of images per class; or data may be '
      f'{FORMS}'
    )
  if set(names) <= {'train', 'test', 'val'}:
    raise UserError(
      f'{root} would have the classes {", ".join(names)}; expected a folder per class, also '
      'within those of train and test; pictures without labels go into one folder with another '
      'name'
    )
  parts = [_list_classes(part, names) for part in (train_folder, test_folder) if part]
  both = f', train and {test_folder.name}' if test_folder else ''
  source = f'{published.describe(root)}: {len(names)} class folders{both}'
  train, test = _read_pictures(parts)
  return Found(train, test, names, source)


def is_picture(path: pathlib.Path) -> bool:
  """Whether the name is that of a picture file."""
  return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith('.')


def read_pixels(file: pathlib.Path, mode: str) -> np.ndarray:
  """(H, W) or (H, W, 3) uint8 of a picture file.

  Args:
    file: path of it.
    mode: Pillow's: 'L' grey, 'RGB' colour.

  Raises:
    UserError: not readable, or transparent.
  """
  try:
    with Image.open(file) as image:
      see_through = False
      if image.has_transparency_data:
        see_through = np.asarray(image.convert('RGBA'))[..., 3].min() < 255
      pixels = np.asarray(image.convert(mode))
  except Exception as error:  # Pillow raises whatever the damaged bytes lead to.
    raise_if_interrupted(error)
    raise UserError(
      f'{file}: not a readable image ({one_line(error)}); replace or remove it'
    ) from error
  if see_through:
    raise UserError(
      f'{file} has transparent pixels, whose colour means nothing; paint it onto a background first'
    )
  return pixels


def _read_listed(root):
  """What stylegan2-ada's dataset_tool.py makes: pictures at any depth, labels in dataset.json.

  There are no labels where all pictures are of one kind.
  """
  try:
    listed = json.loads((root / 'dataset.json').read_text())['labels']
    labels = {name: int(label) for name, label in listed} if listed else {}
  except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
    raise UserError(
      f'{root / "dataset.json"} cannot be read ({one_line(error)}); expected "labels": [[file, '
      'class], ...] or null; fix it, or remove it if folders are classes'
    ) from error
  files = sorted(path for path in root.rglob('*') if is_picture(path))
  if not files:
    raise UserError(f'{root}: no image in it; make the folder again')
  source = f'{published.describe(root)}: labels of dataset.json'
  if labels:
    names = [path.relative_to(root).as_posix() for path in files]
    missing = [name for name in names if name not in labels]
    if missing:
      raise UserError(f'{root}: {missing[0]} has no label in dataset.json; make the folder again')
    numbers = [labels[name] for name in names]
  else:
    numbers = [0] * len(files)
    source = f'{published.describe(root)}: one class, as dataset.json has no labels'
  train, test = _read_pictures([(files, numbers)])
  return Found(train, test, None, source)


def _read_pictures(parts):
  """[(files, labels)] of train, and of test where there is one -> (Split, Split or None)."""
  headers = [_header(file) for files, _ in parts for file in files]
  size = collections.Counter(header[1] for header in headers).most_common(1)[0][0]
  for file, its_size, mode in headers:
    if its_size != size:
      raise UserError(
        f'{file} is {its_size[0]}x{its_size[1]}, most images are {size[0]}x{size[1]}; '
        'expected one size: resize or remove it'
      )
    if mode.startswith(('I', 'F')):
      raise UserError(f'{file} has pixels of type {mode}, expected 8 bits a channel; convert it')
  mode = 'L' if all(header[2] in ('1', 'L', 'LA') for header in headers) else 'RGB'
  splits = []
  for files, labels in parts:
    images = np.empty((len(files), size[1], size[0], len(mode)), np.uint8)
    for image, file in zip(images, files, strict=True):
      image[:] = read_pixels(file, mode).reshape(image.shape)
    splits.append(Split(images, np.asarray(labels)))
  train = splits[0]
  test = splits[1] if len(splits) == 2 else None
  return train, test


def _subfolders(root):
  if not root.is_dir():
    return []
  return sorted(
    path for path in root.iterdir() if path.is_dir() and not path.name.startswith(('.', '__MACOSX'))
  )


def _list_classes(root, names):
  """(files, labels) of a folder of class folders; labels are places in `names`."""
  files = []
  labels = []
  for folder in _subfolders(root):
    if folder.name not in names:
      raise UserError(
        f'{folder}: class {folder.name} is not among the train classes; expected the same folder '
        'names'
      )
    images = sorted(path for path in folder.iterdir() if is_picture(path))
    if not images:
      raise UserError(
        f'{folder} holds no image; expected {", ".join(IMAGE_SUFFIXES)} files directly in the '
        'class folder; fill or remove it'
      )
    files += images
    labels += [names.index(folder.name)] * len(images)
  if not files:
    raise UserError(f'{root} has no class folders; expected the same folder names as in train')
  return files, labels


def _header(file):
  """(file, (width, height), Pillow's mode)."""
  try:
    with Image.open(file) as image:
      frames, depth = getattr(image, 'n_frames', 1), str([tile[3] for tile in image.tile])
      size, mode = image.size, image.mode
  except Exception as error:  # Pillow raises whatever the damaged bytes lead to.
    raise_if_interrupted(error)
    raise UserError(
      f'{file}: not a readable image ({one_line(error)}); replace or remove it'
    ) from error
  if frames > 1:
    raise UserError(f'{file} has {frames} frames, expected one; save those wanted one by one')
  if '16' in depth and not mode.startswith('I'):  # Pillow would cut them
    raise UserError(f'{file} has 16 bits a channel, expected 8; convert it')
  return file, size, mode
