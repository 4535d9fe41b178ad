"""Unlabelled image sets to compare a labelled one with: files, folders, named data sets, and
interpolations of its own images."""

import os
import pathlib
import re
from collections.abc import Iterable

import numpy as np
from PIL import Image

from palm_jax.base.errors import UserError
from palm_jax.base.files import reading, user_path
from palm_jax.base.metrics import Progress
from palm_jax.data import arrays, decoding, parts, published, trees
from palm_jax.data.arrays import Split
from palm_jax.data.load import load as load_data

INTERP = ('interp:pairs', 'interp:csi')
BATCH = 100  # alinlab/CSI's test batch, which its interpolation partners by
CELEBA_SIDE = 178  # the width of an aligned CelebA picture
RESIZED = 'then Pillow'  # in descriptions
UNMIXED = 'as they are'  # in that of interp:csi
# By whether it is Lanczos; both are antialiased.
FILTERS = {
  False: (Image.Resampling.BILINEAR, 'bilinear (antialiased)'),
  True: (Image.Resampling.LANCZOS, 'Lanczos (antialiased)'),
}
CELEBA_PARTS = 'list_eval_partition.txt'  # as published: '000001.jpg 0' a line, 2 for test


def image_set(
  source: str,
  id_split: Split,
  data_dir: str | os.PathLike | None = None,
  lanczos: bool = False,
) -> tuple[np.ndarray, str]:
  """Images to be told apart from those of `id_split`.

  Args:
    source: 'interp:pairs' or 'interp:csi', see `interpolate`; else what `load_images` reads.
    id_split: the in-distribution test images in their order.
    data_dir: where bare names lie, see palm_jax.data.load.
    lanczos: see `load_images`.

  Returns:
    (images (M, H, W, C) uint8, description for protocols).

  Raises:
    UserError: as `load_images` and `interpolate`.
  """
  check_source(source)
  if source in INTERP:
    return interpolate(id_split, source.removeprefix('interp:'))
  height, width, channels = id_split.images.shape[1:]
  if height != width:
    raise UserError(
      f'{source}: the in-distribution images are {height}x{width}, expected square ones for sets '
      f'other than {" and ".join(INTERP)}'
    )
  return load_images(source, height, data_dir, channels, lanczos)


def named_sources(sets: Iterable[str]) -> dict[str, str]:
  """{name: source} of 'name=source' or 'source', which is named by its last part.

  Raises:
    UserError: two of one name.
  """
  sources = {}
  for text in sets:
    name, found, source = text.partition('=')
    if not found or re.search(r'[/:,]', name):  # an = within a path
      source = text
      name = re.sub(r'^tfds:|^.*/|\.(npz|mat|tar\.gz|tgz)$', '', text.rstrip('/'))
      name = 'celeba' if text.startswith('celeba:') else name
    if name in sources or not name:
      raise UserError(
        f'ood.sets={tuple(sets)}: two sets are called {name!r}, or one has no name: '
        f'write NAME={source}'
      )
    sources[name] = source
  return sources


def check_source(source: str) -> None:
  """Refuses, before hours of other work, a source that certainly cannot be read.

  Raises:
    UserError: an unknown interpolation, or a path that does not exist.
  """
  if source.startswith('interp:') and source not in INTERP:
    raise UserError(
      f'image set {source!r} is unknown: expected {" or ".join(INTERP)}, or where images lie'
    )
  path = user_path(source.removeprefix('celeba:'))
  looks_like_a_path = source.startswith('celeba:') or path.suffix or '/' in source
  may_be_something_else = ',' in source or source.startswith(('interp:', 'tfds:'))
  if looks_like_a_path and not may_be_something_else and not path.exists():
    raise UserError(
      f'{path}: no such file or folder (working folder: {pathlib.Path.cwd()}); an image set may be '
      f'{" or ".join(INTERP)}, x.npz with images, a folder of images, celeba:FOLDER, or a data '
      'set with labels'
    )


def load_images(
  path_or_name: str,
  size: int,
  data_dir: str | os.PathLike | None = None,
  channels: int = 3,
  lanczos: bool = False,
) -> tuple[np.ndarray, str]:
  """Images whose labels do not matter, all of one shape.

  A folder's pictures are cropped to their central square and then resized by Pillow's bilinear
  filter, which averages over all pixels when it makes pictures smaller. Of LSUN, whose shorter side
  is 256, that makes the very pictures of CSI's LSUN_FIX. Images of all other sources must have the
  right size.

  Args:
    path_or_name: `x.npz` with `images` (all are taken, whatever `labels` are) or `test_images`; a
      folder with pictures at any depth, of which `test/` (or `val/`, see palm_jax.data.parts) is
      taken if `train/` is beside it; `celeba:FOLDER`, the same with the central 178x178 pixels, of
      the test part if list_eval_partition.txt is in the folder or beside it; or anything that
      palm_jax.data.load understands, its test part.
    size: height and width of the result.
    data_dir: where bare names lie, see palm_jax.data.load.
    channels: of the result, 3 or 1.
    lanczos: resize by the filter of data.size. Pictures that another filter made smaller are told
      apart by their sharpness alone.

  Returns:
    (images (N, size, size, channels) uint8, description: what was read, how many, how resized).

  Raises:
    UserError: nothing there, no images, damaged ones, or another size or number of channels.
  """
  check_source(path_or_name)
  celeba = path_or_name.startswith('celeba:')
  path = user_path(path_or_name.removeprefix('celeba:'))
  files = _image_files(path) if path.is_dir() else []
  if files:
    images, description = _read_folder(path, files, size, channels, celeba, lanczos)
  elif celeba:
    raise UserError(
      f'{path} holds no {decoding.SHOWN_SUFFIXES} files: name the folder of the aligned '
      'CelebA pictures'
    )
  elif path.suffix == '.npz' and ',' not in path_or_name:
    images, description = _read_npz(path)
  else:
    images, description = _read_data(path_or_name, path, data_dir)
  _check_shape(path_or_name, images.shape[1:], (size, size, channels))
  return images, f'{description}; {len(images)} images'


def interpolate(split: Split, mode: str) -> tuple[np.ndarray, str]:
  """Averages of two images each, which show no single thing (alinlab/CSI's set "Interp.").

  'pairs': every image with the one before it on a fixed random cycle through all images, so that
  the order of the data (sorted by class, in some) means nothing.
  'csi': image i with image i - 100, but the first 100 stay as they are: with its batches of 100 in
  the order of the test set, CSI averages each with the one before. Those are not out of
  distribution: an AUROC of A becomes .99 A + .005 at N = 10,000. Averages are rounded to whole
  levels, halves to the even one (CSI averages floats, and does not round).

  Args:
    split: N images; labels only for the description.
    mode: 'pairs' or 'csi'.

  Returns:
    (images (N, H, W, C) uint8, description).

  Raises:
    UserError: fewer than 2 images for 'pairs', 101 for 'csi'.
  """
  images = split.images
  count = len(images)
  least = {'pairs': 2, 'csi': BATCH + 1}[mode]
  if count < least:
    raise UserError(
      f'interp:{mode} needs {least} in-distribution test images or more, but there are {count}: '
      'give more of them, or leave that set out'
    )
  rows = np.arange(count)
  if mode == 'pairs':
    # Raw bits are the same in all versions of numpy.
    order = np.argsort(np.random.PCG64(0).random_raw(count))
    partners = np.empty_like(order)
    partners[order] = np.roll(order, 1)
    how = 'each image with another, on a fixed random cycle'
  else:
    partners = np.maximum(rows - BATCH, 0)
    partners[:BATCH] = rows[:BATCH]
    how = f'images i and i - {BATCH}, the first {BATCH} {UNMIXED}'
  mixed = np.empty_like(images)
  for start in range(0, count, 1024):
    part = slice(start, start + 1024)
    mixed[part] = np.rint((images[part].astype(np.float32) + images[partners[part]]) / 2)
  within = np.mean((split.labels == split.labels[partners])[partners != rows])
  return mixed, (
    f'averages of in-distribution test images, {how}, halves rounded to even; {within:.1%} of the '
    f'pairs within one class; {count} images'
  )


def _read_npz(path):
  tell = lambda why: (
    f'{path}: not a readable .npz of plain arrays ({why}); write it again with '
    'numpy.savez_compressed'
  )
  with reading(tell), np.load(path, allow_pickle=False) as file:
    found = file.files
    key = next((key for key in ('images', 'test_images') if key in file), None)
    images = file[key] if key else None
  if images is None:
    raise UserError(
      f'{path} holds {", ".join(found) or "nothing"}; expected images (N, H, W, C) uint8'
    )
  unlabelled = Split(images, np.zeros(images.shape[:1], np.int64))
  images = arrays.check_split(str(path), unlabelled, None).images
  return images, f'{key} of {published.describe(path)}'


def _read_data(name, path, data_dir):
  """The test part of a labelled set; `path` is what `name` would be as a path."""
  try:
    data = load_data(name, data_dir=data_dir)
  except UserError as error:
    if path.is_dir():
      raise UserError(
        f'{path} holds no {decoding.SHOWN_SUFFIXES} files, nor labelled data: {error}'
      ) from error
    raise
  return data.test.images, f'test part of {data.source}'


def _check_shape(name, shape, expected):
  if shape == expected:
    return
  if shape[:2] != expected[:2]:
    what = 'resize'
  elif expected[2] == 3:
    what = 'make colour of grey in'
  else:
    what = 'make grey of colour in'
  raise UserError(
    f'{name}: images are {shape}, expected {expected} as the in-distribution images are: {what} '
    'them first, or give a folder of pictures, where that is done'
  )


def _image_files(root):
  """All picture files below `root`, sorted; of the test part where a train part is beside it."""
  with trees.open_tree(root) as tree:
    top = [name for name in tree.folders if '/' not in name]
    part = parts.first(top, parts.TESTS) if parts.first(top, parts.TRAIN) else ''
    files = [file for file in map(pathlib.PurePosixPath, tree.files) if decoding.is_picture(file)]
  return [root / file for file in files if not part or file.parts[0] == part]


def _read_folder(root, files, size, channels, celeba, lanczos):
  part = root.name
  if celeba:
    files, part = _celeba_test(root, files)
  images = np.empty((len(files), size, size, channels), np.uint8)
  mode = 'L' if channels == 1 else 'RGB'
  sides = set()
  progress = Progress(f'reading {root.name}', len(files), 'pictures')
  for i, file in enumerate(files):
    pixels = decoding.read_pixels(file, mode)
    side = CELEBA_SIDE if celeba else min(pixels.shape[:2])
    if side > min(pixels.shape[:2]):
      raise UserError(
        f'{file} is {pixels.shape[1]}x{pixels.shape[0]}, expected {side}x{side} or more: '
        'give the aligned CelebA pictures (178x218), or leave out `celeba:`'
      )
    # Halves go to the even number, as in torchvision's CenterCrop.
    top, left = (round((length - side) / 2) for length in pixels.shape[:2])
    square = Image.fromarray(pixels[top : top + side, left : left + side])
    resized = np.asarray(square.resize((size, size), FILTERS[lanczos][0]))
    images[i] = resized.reshape(size, size, channels)
    sides.add(side)
    progress.update(i + 1, {})
  if sides == {size}:
    return images, f'folder {part}, as they are'
  span = f'{min(sides)}' if len(sides) == 1 else f'{min(sides)} to {max(sides)}'
  how = f'central squares of side {span}, {RESIZED} {FILTERS[lanczos][1]} to {size}'
  return images, f'folder {part}, {how}'


def _celeba_test(root, files):
  """(files of the test part, or all without its list; description)."""
  lists = [
    folder / CELEBA_PARTS for folder in (root, root.parent) if (folder / CELEBA_PARTS).is_file()
  ]
  if not lists:
    return files, f'{root.name}, all pictures ({CELEBA_PARTS} not found)'
  lines = [line.split() for line in lists[0].read_text().splitlines()]
  parts = dict(line for line in lines if len(line) == 2)
  chosen = [file for file in files if parts.get(file.name) == '2']
  if not chosen:
    raise UserError(
      f'{root} holds none of the test pictures that {lists[0]} names: '
      'give the folder of the aligned CelebA pictures'
    )
  return chosen, f'{root.name}, test part of {CELEBA_PARTS}'
