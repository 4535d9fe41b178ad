"""`load(name_or_path)`: labelled images from where they lie, checked.

Nothing is downloaded unless asked for, and no code that a file may hold is run.
"""

import collections
import difflib
import gzip
import hashlib
import http.client
import io
import json
import logging
import math
import os
import pathlib
import pickle
import shlex
import shutil
import tarfile
import tempfile
import urllib.request
from typing import NamedTuple

import numpy as np
import scipy.io
from PIL import Image

from palm_jax.base.errors import UserError

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


class _Layout(NamedTuple):
  train: tuple[str, ...]
  test: str
  names: str  # '{}' stands for the label set
  label_bytes: int  # labels before the pixels of a binary record; 0: a python pickle
  label_sets: tuple[str, ...]  # in the order of those bytes


_LAYOUTS = {
  'cifar-10-batches-bin': _Layout(
    tuple(f'data_batch_{i}.bin' for i in range(1, 6)),
    'test_batch.bin',
    'batches.meta.txt',
    1,
    ('fine',),
  ),
  'cifar-10-batches-py': _Layout(
    tuple(f'data_batch_{i}' for i in range(1, 6)), 'test_batch', 'batches.meta', 0, ('fine',)
  ),
  'cifar-100-binary': _Layout(
    ('train.bin',), 'test.bin', '{}_label_names.txt', 2, ('coarse', 'fine')
  ),
  'cifar-100-python': _Layout(('train',), 'test', 'meta', 0, ('coarse', 'fine')),
}


class _Place(NamedTuple):
  groups: tuple[tuple[str, ...], ...]  # any one of these, complete, will do
  download: tuple[str, ...]
  tfds: str


_BARE = {
  'cifar10': _Place(
    (
      ('cifar-10-batches-bin',),
      ('cifar-10-batches-py',),
      ('cifar-10-binary.tar.gz',),
      ('cifar-10-python.tar.gz',),
    ),
    ('cifar-10-binary.tar.gz',),
    'cifar10',
  ),
  'cifar100': _Place(
    (
      ('cifar-100-binary',),
      ('cifar-100-python',),
      ('cifar-100-binary.tar.gz',),
      ('cifar-100-python.tar.gz',),
    ),
    ('cifar-100-binary.tar.gz',),
    'cifar100',
  ),
  'svhn': _Place(
    (('train_32x32.mat', 'test_32x32.mat'),), ('train_32x32.mat', 'test_32x32.mat'), 'svhn_cropped'
  ),
}
_FORMS = (
  'digits, cifar10, cifar100, svhn, tfds:<name>, x.npz, train.npz,test.npz, train.mat,test.mat, '
  'a CIFAR archive or folder as published, or a folder of class folders'
)
_IMAGE_SUFFIXES = ('.png', '.jpg', '.jpeg', '.webp')
# tensorflow-datasets needs both to prepare a set, and declares neither.
_PREPARE_NEEDS = "pip install 'tensorflow>=2.19' importlib_resources"
_MAX_CLASSES = 2**16  # only bounds the names made up for a set without names


class Split(NamedTuple):
  images: np.ndarray  # (N, H, W, C) uint8, C = 1 or 3
  labels: np.ndarray  # (N,) int64 in 0..len(class_names)-1


class Data(NamedTuple):
  train: Split
  test: Split
  class_names: tuple[str, ...]
  source: str  # what was read and how it was split, for printing in protocols


def load(name_or_path, *, download=False, data_dir=None, label_set='fine'):
  """Reads a labelled image set.

  Args:
    name_or_path: one of `digits`: scikit-learn's 1797 digits, 8x8 grey, split 1437/360. `x.npz`:
      `images` (N, H, W, C) uint8 and `labels` (N,) integer, or `train_images`, `train_labels`,
      `test_images`,
        `test_labels`; optionally `class_names`. `train.npz,test.npz`: two files with `images` and
        `labels`.
      a folder of class folders of PNG/JPEG/WEBP, or `train/` and `test/` (or `val/`) folders of
      class folders. a CIFAR-10/100 `.tar.gz` or folder as published, python or binary version.
      `train.mat,test.mat`: SVHN format 2; a folder with train_32x32.mat and test_32x32.mat, or
      either of the two. `tfds:<name>`: a set that tensorflow-datasets has prepared as array_record.
      `cifar10`, `cifar100`, `svhn`: the published files in `data_dir`.
    download: fetch the published files of a bare name that `data_dir` lacks.
    data_dir: where bare names lie (default: $PALM_DATA, else ~/.cache/palm_jax), or
      tensorflow-datasets' own folder.
    label_set: 'fine', or 'coarse' for CIFAR-100's 20 superclasses.

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
    return _checked(name, _tfds(name.removeprefix('tfds:'), data_dir, label_set))
  if name == 'digits':
    paths = ()
  elif name in _BARE:
    paths = _bare(name, _root(data_dir), download)
  else:
    paths = _paths(name)
  if len(paths) == 1 and (paths[0].name.endswith(('.tar.gz', '.tgz')) or _folder_layout(paths[0])):
    return _checked(name, _cifar(paths[0], label_set))
  if label_set == 'coarse':
    raise UserError(
      f"label_set 'coarse' with {name}: only CIFAR-100 has coarse labels; leave label_set at 'fine'"
    )
  return _checked(name, _files(paths) if paths else _digits())


def _paths(name):
  path = pathlib.Path(name).expanduser()
  if name and path.exists():
    return (path,)
  if ',' in name:
    paths = tuple(pathlib.Path(part.strip()).expanduser() for part in name.split(','))
    if len(paths) != 2 or {path.suffix for path in paths} not in ({'.npz'}, {'.mat'}):
      raise UserError(f'{name}: a list with commas must be two .npz or two .mat files, train first')
    for path in paths:
      if not path.is_file():
        raise UserError(f'{path}: no such file; {name} was read as the files of train and test')
    return paths
  if path.suffix or os.sep in name:
    raise UserError(
      f'{path}: no such file or folder (working folder: {pathlib.Path.cwd()}); data may be {_FORMS}'
    )
  near = difflib.get_close_matches(name.lower(), ('digits', *_BARE), 1, 0.4)
  hint = f'did you mean {near[0]}? ' if near else ''
  raise UserError(f'unknown data {name!r}: {hint}expected {_FORMS}')


def fetch_missing(name, data_dir=None):
  """Downloads what `load` would want of a set that it knows by name, to where that looks; other
  names need nothing."""
  if name in _BARE:
    _bare(name, _root(data_dir), True)


def _root(data_dir):
  return pathlib.Path(data_dir or os.environ.get('PALM_DATA') or '~/.cache/palm_jax').expanduser()


def _bare(name, root, download):
  place = _BARE[name]
  for group in place.groups:
    if all((root / part).exists() for part in group):
      return tuple(root / part for part in group)
  missing = [part for part in place.download if not (root / part).exists()]
  if not download:
    looked_for = ' or '.join(' with '.join(group) for group in place.groups)
    by_hand = ' && '.join(
      f'curl -L --create-dirs -o {shlex.quote(str(root / part))} {PUBLISHED[part][0]}'
      for part in missing
    )
    raise UserError(
      f'{name} is not in {root}: looked for {looked_for} (missing: {", ".join(missing)}). Run '
      'again with --download; '
      f'or fetch by hand: {by_hand}; or have tensorflow-datasets prepare it and say '
      f'tfds:{place.tfds}: '
      f'{_prepare_command(place.tfds, None)}'
    )
  for part in missing:
    fetch(*PUBLISHED[part], root / part)
  return tuple(root / part for part in place.download)


def fetch(url, size, sha256, target):
  """Downloads `url` to `target` (pathlib.Path), which appears only when complete and equal in bytes
  and sha256.

  Raises:
    UserError: no connection, or other content than published.
  """
  logging.getLogger(__name__).info('downloading %s (%d MB) to %s', url, size // 1_000_000, target)
  by_hand = f'fetch {target.name} in another way and put it into {target.parent}'
  try:
    target.parent.mkdir(parents=True, exist_ok=True)
    # A folder beside the target: a rename within one file system is atomic, and is its own per
    # process.
    with tempfile.TemporaryDirectory(prefix='.download-', dir=target.parent) as folder:
      part = pathlib.Path(folder) / target.name
      with urllib.request.urlopen(url, timeout=60) as response, part.open('wb') as out:
        shutil.copyfileobj(response, out, 1 << 20)
      got = part.stat().st_size
      if got != size:
        raise UserError(
          f'{url} gave {got} bytes, expected {size}: cut off or not that file; try again, or '
          f'{by_hand}'
        )
      digest = _sha256(part)
      if digest != sha256:
        raise UserError(
          f'{url} has sha256 {digest}, expected {sha256}: damaged or changed; {by_hand}'
        )
      part.replace(target)
  except (OSError, http.client.HTTPException) as error:
    raise UserError(f'cannot download {url} to {target} ({_one_line(error)}); {by_hand}') from error


def _sha256(path):
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def _one_line(error):
  return f'{type(error).__name__}: {" ".join(str(error).split())[:160]}'


def _described(path):
  if path.is_dir():
    return path.resolve().name
  digest = _sha256(path)
  published = PUBLISHED.get(path.name)
  note = (
    ''
    if published is None
    else ', as published'
    if digest == published[2]
    else ', not the published file'
  )
  return f'{path.name} (sha256 {digest[:12]}{note})'


# ---- checks and the split, common to all sources


def _checked(name, data):
  """`data` may lack test (None) and class_names (None)."""
  train = _checked_split(f'{name} (train)', data.train, data.class_names)
  test = data.test and _checked_split(f'{name} (test)', data.test, data.class_names)
  if test and test.images.shape[1:] != train.images.shape[1:]:
    raise UserError(
      f'{name}: test images are {test.images.shape[1:]}, train images {train.images.shape[1:]} '
      '(height, width, channels); expected one shape'
    )
  how = ''
  if not test:
    chosen = _test_fifth(train.labels)
    if not chosen.any():
      raise UserError(
        f'{name}: {len(chosen)} images with no two of a class leave none for a test part; '
        'give more images, or a test part of its own'
      )
    train, test = (Split(train.images[mask], train.labels[mask]) for mask in (~chosen, chosen))
    how = ' (a fixed stratified fifth held out as test)'
  names = data.class_names
  if names is None:
    names = [str(i) for i in range(max(train.labels.max(), test.labels.max()) + 1)]
  source = f'{data.source}; {len(train.labels)} train, {len(test.labels)} test{how}'
  return Data(train, test, tuple(str(name) for name in names), source)


def _checked_split(where, split, class_names):
  images, labels = np.asarray(split.images), np.asarray(split.labels)
  if images.dtype != np.uint8:
    hint = 'convert and save again'
    if images.dtype.kind == 'f' and images.size and images.min() >= 0 and images.max() <= 1:
      hint = 'save (images * 255).round().astype(np.uint8)'
    raise UserError(f'{where}: images are {images.dtype}, expected uint8 in 0..255; {hint}')
  if images.ndim != 4:
    hint = '; grey images need a channel axis: images[..., None]' if images.ndim == 3 else ''
    raise UserError(
      f'{where}: images have shape {images.shape}, expected (N, height, width, channels){hint}'
    )
  if images.shape[3] not in (1, 3, 4):  # 4: a stack of grey frames
    hint = (
      '; it looks like (N, C, H, W): images.transpose(0, 2, 3, 1)'
      if images.shape[1] in (1, 3)
      else ''
    )
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
  if labels.ndim != 1 or labels.dtype.kind not in 'iu':
    raise UserError(
      f'{where}: labels have shape {labels.shape} and dtype {labels.dtype}, expected (N,) '
      'integers; '
      "one way: labels.reshape(-1).astype('int64')"
    )
  if len(labels) != len(images):
    raise UserError(
      f'{where}: {len(labels)} labels for {len(images)} images, expected one label per image'
    )
  limit = _MAX_CLASSES if class_names is None else len(class_names)
  if labels.min() < 0:
    raise UserError(
      f'{where}: labels hold {labels.min()} (unlabelled?), expected a class 0..K-1 for every '
      'image; '
      'drop those images, or give all of them label 0 where labels do not matter'
    )
  if labels.max() >= limit:
    raise UserError(
      f'{where}: labels hold {labels.max()}, expected 0..{limit - 1}; '
      'number the classes from 0, and name each of them where class_names are given'
    )
  return Split(np.ascontiguousarray(images), labels.astype(np.int64))


def _test_fifth(labels):
  """(N,) bool: ceil(N/5) images, from each class its fifth rounded up or down; every class keeps
  train images."""
  count = np.bincount(labels)
  take, rest = count // 5, count % 5
  order = np.argsort(-rest, kind='stable')
  order = order[count[order] > 1]
  take[order[: math.ceil(len(labels) / 5) - take.sum()]] += 1
  # numpy keeps the raw bits of a bit generator across versions; it does not promise that of shuffle
  # or permutation.
  shuffled = np.lexsort((np.random.PCG64(0).random_raw(len(labels)), labels))
  rank = np.arange(len(labels)) - (np.cumsum(count) - count)[labels[shuffled]]
  chosen = np.zeros(len(labels), bool)
  chosen[shuffled] = rank < take[labels[shuffled]]
  return chosen


# ---- sources


def _digits():
  import sklearn  # Here, because it takes a second that no other source needs.
  import sklearn.datasets

  digits = sklearn.datasets.load_digits()
  images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
  names = [str(i) for i in range(10)]
  return Data(
    Split(images, digits.target), None, names, f'digits of scikit-learn {sklearn.__version__}'
  )


def _files(paths):
  train, *rest = paths
  if train.is_dir():
    mats = [train / part for part in _BARE['svhn'].download]
    return _files(mats) if all(mat.is_file() for mat in mats) else _class_folders(train)
  if not rest and train.name in _BARE['svhn'].download:
    mats = [train.with_name(part) for part in _BARE['svhn'].download]
    train, *rest = mats if all(mat.is_file() for mat in mats) else [train]
  reader = {'.npz': _npz, '.mat': _mat}.get(train.suffix)
  if reader is None:
    raise UserError(
      f'{train}: do not know what a {train.suffix or "file without suffix"} holds; data may be '
      f'{_FORMS}'
    )
  data = reader(train)
  if rest:
    test = reader(rest[0])
    for path, part in ((train, data), (rest[0], test)):
      if part.test:
        raise UserError(f'{path} holds both train and test; give it alone')
    if (
      test.class_names is not None
      and data.class_names is not None
      and data.class_names != test.class_names
    ):
      raise UserError(
        f'{rest[0]}: class_names differ from those of {train}; expected the same list in both'
      )
    names = data.class_names if data.class_names is not None else test.class_names
    data = Data(data.train, test.train, names, f'{data.source}, {test.source}')
  return data


def _npz(path):
  try:
    with np.load(path, allow_pickle=False) as file:
      arrays = {key: file[key] for key in file.files}
  except Exception as error:  # A damaged zip or header raises nearly anything.
    raise UserError(
      f'{path}: not a readable .npz of plain arrays ({_one_line(error)}); '
      'write it again with numpy.savez_compressed'
    ) from error
  names = arrays.get('class_names')
  names = names if names is None else [str(name) for name in names.reshape(-1)]
  whole, train, test = (
    tuple(prefix + key for key in ('images', 'labels')) for prefix in ('', 'train_', 'test_')
  )
  if all(key in arrays for key in train + test):
    split = [Split(*(arrays[key] for key in keys)) for keys in (train, test)]
  elif all(key in arrays for key in whole):
    split = [Split(*(arrays[key] for key in whole)), None]
  else:
    raise UserError(
      f'{path} holds {", ".join(arrays) or "nothing"}; expected the keys {", ".join(whole)}, '
      f'or {", ".join(train + test)}'
    )
  return Data(*split, names, _described(path))


def _mat(path):
  form = 'expected SVHN format 2: X (height, width, 3, N) uint8 and y (N, 1) with 1..10'
  try:
    content = scipy.io.loadmat(path, variable_names=('X', 'y'))
  except Exception as error:  # scipy raises whatever the damaged bytes lead to.
    raise UserError(
      f'{path}: not a readable MATLAB 5 file ({_one_line(error)}); {form}; fetch it again'
    ) from error
  if not {'X', 'y'} <= content.keys() or content['X'].ndim != 4:
    shapes = ', '.join(
      f'{key} {value.shape}' for key, value in content.items() if key in ('X', 'y')
    )
    raise UserError(f'{path} holds {shapes or "neither X nor y"}; {form}')
  labels = content['y'].reshape(-1)
  labels = np.where(labels == 10, 0, labels).astype(labels.dtype)
  return Data(
    Split(content['X'].transpose(3, 0, 1, 2), labels),
    None,
    [str(i) for i in range(10)],
    _described(path),
  )


def _class_folders(root):
  if (root / 'dataset.json').is_file():
    return _listed(root)
  train, test = root, None
  if _subfolders(root / 'train'):
    train = root / 'train'
    test = next((root / part for part in ('test', 'val') if (root / part).is_dir()), None)
  names = [folder.name for folder in _subfolders(train)]
  if not names:
    raise UserError(
      f'{train} has no folders; expected one folder of images per class; or data may be {_FORMS}'
    )
  if set(names) <= {'train', 'test', 'val'}:
    raise UserError(
      f'{root} would have the classes {", ".join(names)}; expected a folder per class, also '
      'within those of train '
      'and test; pictures without labels go into one folder with another name'
    )
  parts = [_list_images(part, names) for part in (train, test) if part]
  source = (
    f'{_described(root)}: {len(names)} class folders{f", train and {test.name}" if test else ""}'
  )
  return Data(*_read_pictures(parts), names, source)


def _listed(root):
  """What stylegan2-ada's dataset_tool.py leaves: pictures at any depth, their labels in
  dataset.json, none where all are one kind."""
  try:
    labels = json.loads((root / 'dataset.json').read_text())['labels']
    labels = labels and {name: int(label) for name, label in labels}
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise UserError(
      f'{root / "dataset.json"} cannot be read ({_one_line(error)}); expected "labels": [[file, '
      'class], ...] or null; '
      'mend it, or remove it if folders are classes'
    ) from error
  files = sorted(
    path
    for path in root.rglob('*')
    if path.suffix.lower() in _IMAGE_SUFFIXES and not path.name.startswith('.')
  )
  names = [path.relative_to(root).as_posix() for path in files]
  if not files or labels and (missing := [name for name in names if name not in labels]):
    raise UserError(
      f'{root}: {f"{missing[0]} has no label in dataset.json" if files else "no image in it"}; '
      'make the folder again'
    )
  source = (
    f'{_described(root)}: labels of dataset.json'
    if labels
    else f'{_described(root)}: one class, as dataset.json has no labels'
  )
  return Data(
    *_read_pictures([(files, [labels[name] if labels else 0 for name in names])]), None, source
  )


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
      image[:] = _pixels(file, mode).reshape(image.shape)
    splits.append(Split(images, np.asarray(labels)))
  return (*splits, None)[:2]


def _subfolders(root):
  if not root.is_dir():
    return []
  return sorted(
    path for path in root.iterdir() if path.is_dir() and not path.name.startswith(('.', '__MACOSX'))
  )


def _list_images(root, names):
  files, labels = [], []
  for folder in _subfolders(root):
    if folder.name not in names:
      raise UserError(
        f'{folder}: class {folder.name} is not among the train classes; expected the same folder '
        'names'
      )
    images = sorted(
      path
      for path in folder.iterdir()
      if path.suffix.lower() in _IMAGE_SUFFIXES and not path.name.startswith('.')
    )
    if not images:
      raise UserError(
        f'{folder} holds no image; expected {", ".join(_IMAGE_SUFFIXES)} files directly in the '
        'class '
        'folder; fill or remove it'
      )
    files += images
    labels += [names.index(folder.name)] * len(images)
  if not files:
    raise UserError(f'{root} has no class folders; expected the same folder names as in train')
  return files, labels


def _header(file):
  try:
    with Image.open(file) as image:
      return file, image.size, image.mode
  except Exception as error:  # Pillow raises whatever the damaged bytes lead to.
    raise UserError(
      f'{file}: not a readable image ({_one_line(error)}); replace or remove it'
    ) from error


def _pixels(file, mode):
  try:
    with Image.open(file) as image:
      see_through = (
        image.has_transparency_data and image.convert('RGBA').getchannel('A').getextrema()[0] < 255
      )
      pixels = np.asarray(image.convert(mode))
  except Exception as error:
    raise UserError(
      f'{file}: not a readable image ({_one_line(error)}); replace or remove it'
    ) from error
  if see_through:
    raise UserError(
      f'{file} has transparent pixels, whose colour means nothing; paint it onto a background first'
    )
  return pixels


# ---- CIFAR as published: https://www.cs.toronto.edu/~kriz/cifar.html


def _folder_layout(path):
  return next(
    (
      key
      for key, layout in _LAYOUTS.items()
      if path.is_dir() and (path.name == key or (path / layout.train[0]).is_file())
    ),
    None,
  )


def _cifar(path, label_set):
  if path.is_dir():
    key = _folder_layout(path)
    read = lambda name: (path / name).read_bytes()
    present = {file.name for file in path.iterdir() if file.is_file()}
  else:
    key, files = _archive(path)
    read, present = files.__getitem__, files.keys()
  layout = _LAYOUTS[key]
  if label_set not in layout.label_sets:
    raise UserError(
      f"label_set 'coarse' with {path}: only CIFAR-100 has coarse labels; leave label_set at 'fine'"
    )
  names_file = layout.names.format(label_set)
  missing = [name for name in (*layout.train, layout.test, names_file) if name not in present]
  if missing:
    raise UserError(
      f'{path} lacks {", ".join(missing)} of {key}; unpack or fetch the archive again'
    )
  prefix = f'{label_set}_' if len(layout.label_sets) > 1 else ''
  where = lambda name: f'{path}: {name}'
  try:
    if layout.label_bytes:
      names = read(names_file).decode().split()
      batch = lambda name: _binary_batch(read(name), where(name), layout, label_set)
    else:
      meta = _unpickle(read(names_file), where(names_file))
      names = [name.decode() for name in meta[f'{prefix}label_names'.encode()]]
      batch = lambda name: _python_batch(read(name), where(name), f'{prefix}labels'.encode())
    train = [batch(name) for name in layout.train]
    test = batch(layout.test)
  except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
    raise UserError(
      f'{path}: not built like {key} ({_one_line(error)}); unpack or fetch the archive again'
    ) from error
  counts = [len(split.labels) for split in train]
  if len(set(counts)) > 1:
    raise UserError(
      f'{path}: {", ".join(layout.train)} hold {counts} images, expected the same number in each; '
      'unpack or fetch the archive again'
    )
  train = Split(*(np.concatenate(part) for part in zip(*train, strict=True)))
  # The published archives have no other number, so a protocol must not call another set by their
  # name unmarked.
  note = (
    ''
    if (len(train.labels), len(test.labels)) == (50_000, 10_000)
    else ', not the published number of images'
  )
  return Data(train, test, names, f'{_described(path)}: {key}, {label_set} labels{note}')


def _archive(path):
  found = collections.defaultdict(dict)
  try:
    with gzip.open(path) as unzipped, tarfile.open(fileobj=unzipped, mode='r|') as tar:
      for member in tar:
        folder, _, name = member.name.removeprefix('./').partition('/')
        if folder in _LAYOUTS and member.isfile():
          found[folder][name] = tar.extractfile(member).read()
      while unzipped.read(1 << 20):  # gzip compares its checksum only at the end of the stream.
        pass
  except Exception as error:  # gzip, zlib and tarfile each have their own.
    raise UserError(
      f'{path}: damaged or not a .tar.gz ({_one_line(error)}); fetch it again'
    ) from error
  if len(found) != 1:
    raise UserError(
      f'{path} holds {" and ".join(found) or "no CIFAR folder"}; expected one of '
      f'{", ".join(_LAYOUTS)}'
    )
  return next(iter(found.items()))


def _binary_batch(raw, where, layout, label_set):
  record = layout.label_bytes + 3072
  if not raw or len(raw) % record:
    raise UserError(
      f'{where} has {len(raw)} bytes, expected a whole number of {record}-byte records; '
      'unpack or fetch the archive again'
    )
  records = np.frombuffer(raw, np.uint8).reshape(-1, record)
  return _from_planes(
    records[:, layout.label_bytes :], records[:, layout.label_sets.index(label_set)]
  )


def _python_batch(raw, where, key):
  batch = _unpickle(raw, where)
  _, shape, dtype, fortran, pixels = batch[b'data'].state
  if dtype.args[0] != b'u1':
    raise UserError(
      f'{where} has pixels of type {dtype.args[0]!r}, expected u1; fetch the archive again'
    )
  planes = np.frombuffer(pixels, np.uint8).reshape(shape, order='F' if fortran else 'C')
  return _from_planes(planes, np.asarray(batch[key]))


def _from_planes(planes, labels):
  return Split(planes.reshape(len(planes), 3, 32, 32).transpose(0, 2, 3, 1), labels)


class _Inert:
  """Takes the place of numpy's classes in a pickle: keeps what the file says of an array, and runs
  nothing."""

  def __init__(self, *args):
    self.args = args

  def __setstate__(self, state):
    self.state = state


class _Unpickler(pickle.Unpickler):
  def find_class(self, module, name):
    if (module, name) in (
      ('numpy.core.multiarray', '_reconstruct'),
      ('numpy', 'ndarray'),
      ('numpy', 'dtype'),
    ):
      return _Inert
    raise pickle.UnpicklingError(f'it asks for {module}.{name}, which was not run')


def _unpickle(raw, where):
  try:
    return _Unpickler(io.BytesIO(raw), encoding='bytes').load()
  except Exception as error:  # The pickle module's own documentation: any exception may be raised.
    raise UserError(
      f'{where}: damaged, or not a CIFAR pickle ({_one_line(error)}); fetch the archive again'
    ) from error


# ---- tensorflow-datasets


def _prepare_command(name, data_dir):
  where = f' --data_dir={shlex.quote(str(data_dir))}' if data_dir else ''
  return f'{_PREPARE_NEEDS} && tfds build {name} --file_format=array_record{where}'


def _tfds(name, data_dir, label_set):
  try:
    import tensorflow_datasets as tfds  # Here, because no other source needs it.
  except ImportError as error:
    raise UserError(
      f'tfds:{name} needs tensorflow-datasets; run: pip install tensorflow-datasets'
    ) from error
  try:
    # tfds.load and tfds.data_source download by default; a builder reads only what is there.
    builder = tfds.builder(name, data_dir=data_dir, file_format='array_record')
  except tfds.core.DatasetNotFoundError as error:
    near = difflib.get_close_matches(name, tfds.list_builders(with_community_datasets=False), 1)
    hint = f'; did you mean tfds:{near[0]}?' if near else '; run tfds.list_builders() for the names'
    raise UserError(
      f'tfds:{name}: tensorflow-datasets {tfds.__version__} has no set of that name, and '
      f'{data_dir or tfds.core.constants.DATA_DIR} holds none{hint}'
    ) from error
  except (
    Exception
  ) as error:  # A wrong version, configuration or file format; a builder that imports tensorflow.
    command = _prepare_command(name, data_dir)
    if 'File format' in str(error):  # Prepared as tfrecord, which only tensorflow reads.
      folder = tfds.builder(name, data_dir=data_dir).data_dir
      command = (
        f'{_PREPARE_NEEDS} && '
        f'tfds convert_format --dataset_version_dir={shlex.quote(str(folder))} '
        '--out_file_format=array_record'
      )
    raise UserError(f'tfds:{name} cannot be opened ({_one_line(error)}); run: {command}') from error
  features = builder.info.features
  key = 'coarse_label' if label_set == 'coarse' else 'label'
  if 'image' not in features or key not in features:
    raise UserError(f'tfds:{name} has the features {", ".join(features)}; expected image and {key}')
  train = _tfds_split(builder, 'train', key)
  if train is None:
    raise UserError(
      f'tfds:{name} {builder.info.version} is not prepared in {builder.data_dir}; run: '
      f'{_prepare_command(name, data_dir)}'
    )
  part, test = next(
    ((part, test) for part in ('test', 'validation') if (test := _tfds_split(builder, part, key))),
    (None, None),
  )
  return Data(
    train,
    test,
    getattr(features[key], 'names', None),
    f'{builder.info.full_name} of tensorflow-datasets, '
    f'{key}{f", its {part} part as test" if test else ""}',
  )


def _tfds_split(builder, part, key):
  """None where the set has no such part."""
  try:
    examples = builder.as_data_source(split=part)
  except (AssertionError, KeyError, ValueError):
    return None
  where = f'tfds:{builder.info.full_name} ({part})'
  try:
    pairs = [(example['image'], example[key]) for example in examples]
  except (
    Exception
  ) as error:  # array_record and the image decoder raise whatever the damaged bytes lead to.
    raise UserError(
      f'{where}: damaged ({_one_line(error)}); remove {builder.data_dir} and prepare it again'
    ) from error
  if len({image.shape for image, _ in pairs}) != 1:
    raise UserError(f'{where} has images of several sizes or none; expected one size')
  return Split(*(np.stack(column) for column in zip(*pairs, strict=True)))
