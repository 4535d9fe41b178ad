"""Parquet files as the Hugging Face Hub has them: encoded pictures and labels in columns."""

import io
import itertools
import json
import pathlib
import re
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from palm_jax.base.devices import machine_memory
from palm_jax.base.errors import UserError
from palm_jax.base.files import reading
from palm_jax.data import decoding, parts, published, trees
from palm_jax.data.arrays import Found, Split, refuse_expansion
from palm_jax.data.folders import log_skipped

SUFFIX = '.parquet'
IMAGES = 'image', 'img'
LABELS = {'fine': ('label', 'labels', 'fine_label'), 'coarse': ('coarse_label',)}


class _Columns(NamedTuple):
  image: str
  label: str  # '' where there is none
  names: list[str] | None  # of the classes


def matches(path: pathlib.Path) -> bool:
  """Whether the path is such a file, or a folder in which such files lie and no set of pictures."""
  if not path.is_dir():
    return path.suffix.lower() == SUFFIX
  found = False
  for folder, _, names in trees.walk(path):
    pictures = any(decoding.is_picture(pathlib.PurePath(name)) for name in names)
    if trees.LISTED in names or (pictures and folder.parts):  # beside the files it shows them
      return False
    found = found or any(name.lower().endswith(SUFFIX) for name in names)
  return found


def read(path: pathlib.Path, label_set: str = 'fine', size: int = 0) -> Found:
  """A file, or a folder of files of which those called train-* and test-* are the parts.

  A folder `train/` or `test/` around files says the same. Without such names all are train files.

  Args:
    path: for which `matches`.
    label_set: 'fine' or 'coarse'.
    size: see `decoding.read_all`.

  Raises:
    UserError: pyarrow is missing, the files do not fit the memory, or one is damaged or has other
      columns.
  """
  train, tests = _parts(path)
  read_now = itertools.chain(train, *tests[:1])
  need, memory = sum(file.stat().st_size for file in read_now), machine_memory()
  if need > memory:
    raise UserError(
      f'{path}: its files take {need / 2**30:.1f} GiB, of {memory / 2**30:.1f} GiB of memory: give '
      'fewer of them, or a folder of pictures'
    )
  read_parts = [[_read_file(file, label_set) for file in train]]
  test = _first_labelled(path, tests, label_set)
  read_parts += [test] if test else []
  columns = [file[2] for part in read_parts for file in part]
  for other in columns:
    if other.names != columns[0].names or bool(other.label) != bool(columns[0].label):
      raise UserError(
        f'{path}: its files name labels or classes differently, expected one set; give one file, '
        'or a folder with those of one set'
      )
  sources = [[source for file in part for source in file[0]] for part in read_parts]
  arrays, how = decoding.read_all(sources, size)
  labels = [np.concatenate([file[1] for file in part]) for part in read_parts]
  splits = [Split(*pair) for pair in zip(arrays, labels, strict=True)]
  first = columns[0]
  what = first.label or 'one class, as there are no labels'
  source = f'{published.describe(path)}: {first.image}, {what}{how}'
  return Found(splits[0], splits[1] if len(splits) > 1 else None, first.names, source)


def _first_labelled(path, tests, label_set):
  """The contents of the first test part that has labels; None where there is none."""
  for files in tests:
    part = [_read_file(file, label_set) for file in files]
    if any((labels >= 0).any() for _, labels, _ in part):
      return part
    logging.warning('%s is not read: its labels are all below 0', files[0])
  return None


def _parts(path):
  """(files of train, [files of each test part])."""
  if path.is_file():
    return [path], []
  below = (folder / name for folder, _, names in trees.walk(path) for name in names)
  by_part, places = {}, {}
  for file in sorted(file for file in below if file.suffix.lower() == SUFFIX):
    part, place = _part(file)
    by_part.setdefault(part, []).append(path / file)
    places.setdefault(part, set()).add(place)
  for part, found in places.items():
    if part and len(found) > 1:
      raise UserError(
        f'{path}: {part}{SUFFIX} files in {", ".join(map(str, sorted(found)))}, which are sets of '
        'their own: give one of these folders'
      )
  train = by_part.pop('train', None)
  if train is None:
    if set(by_part) - {''}:
      raise UserError(
        f'{path}: no train{SUFFIX} files, only {", ".join(filter(None, by_part))}; expected '
        f'train-*{SUFFIX}; give the file that is to be read'
      )
    train = by_part.pop('')
  tests = [by_part.pop(part) for part in parts.TESTS if part in by_part]
  rest = [str(file.relative_to(path)) for files in by_part.values() for file in files]
  log_skipped(path, rest, 'of neither part')
  return train, tests


def _part(relative):
  """'train', one of TESTS, or '', and the folder in which a name says so."""
  for at in reversed(range(len(relative.parts))):
    words = re.split(r'[-_.]', relative.parts[at].lower())
    found = next(filter(parts.is_part, words), '')
    if found:
      return 'train' if found in parts.TRAIN else found, pathlib.Path(*relative.parts[:at])
  return '', pathlib.Path()


def _read_file(path, label_set):
  """([Source], labels (N,), _Columns)."""
  try:
    import pyarrow
    import pyarrow.parquet  # Here, because no other source needs it.
  except ImportError as error:
    raise UserError(f'{path} needs pyarrow; run: pip install pyarrow') from error
  with reading(lambda why: f'{path}: damaged or not a {SUFFIX} ({why}); fetch it again'):
    with pyarrow.parquet.ParquetFile(path) as file:
      columns = _choose(path, file.schema_arrow, label_set, pyarrow.types)
      wanted = [name for name in (columns.image, columns.label) if name]
      encoded = []
      labels = []
      size = 0
      for batch in file.iter_batches(256, columns=wanted):
        pictures = batch.column(columns.image).to_pylist()
        pictures = [x.get('bytes') if isinstance(x, dict) else x for x in pictures]
        size += sum(len(x or b'') for x in pictures)
        refuse_expansion(path, size)
        encoded += pictures
        labels += batch.column(columns.label).to_pylist() if columns.label else [0] * len(pictures)
  if not encoded:
    raise UserError(f'{path} has no rows; expected one a picture; remove it or fetch it again')
  for row, (picture, label) in enumerate(zip(encoded, labels, strict=True)):
    if picture is None:
      raise UserError(
        f'{path}: row {row} has no bytes in {columns.image}, only a path or nothing; make the '
        'files with the pictures in them'
      )
    if label is None:
      raise UserError(
        f'{path}: row {row} has no {columns.label}, expected a class for every picture; drop '
        'such rows'
      )
  return [_source(path, row, x) for row, x in enumerate(encoded)], np.array(labels), columns


def _source(path, row, encoded):
  return decoding.Source(f'{path}: row {row}', lambda: io.BytesIO(encoded))


def _choose(path, schema, label_set, types):
  """The columns of pictures and labels."""

  def is_bytes(kind):
    return types.is_binary(kind) or types.is_large_binary(kind)

  def is_image(kind):
    if not types.is_struct(kind):
      return is_bytes(kind)
    return any(field.name == 'bytes' and is_bytes(field.type) for field in kind)

  found = ', '.join(f'{field.name} ({str(field.type)[:40]})' for field in schema) or 'none'
  possible = [field.name for field in schema if is_image(field.type)]
  image = next((name for name in IMAGES if name in possible), None)
  if image is None and len(possible) == 1:
    image = possible[0]
  if image is None:
    raise UserError(
      f'{path} has the columns {found[:300]}; expected pictures in one called image, of bytes or '
      'of {bytes, path}; rename it'
    )
  numbers = [field.name for field in schema if types.is_integer(field.type)]
  label = next((name for name in LABELS[label_set] if name in numbers), '')
  named = set(schema.names) & set(LABELS[label_set])
  if not label and (numbers or named or label_set == 'coarse'):
    raise UserError(
      f'{path} has the columns {found[:300]}; expected whole numbers in one called '
      f'{" or ".join(LABELS[label_set])}; number the classes '
      '(pandas: astype("category").cat.codes), rename their column, or drop such columns where '
      'pictures have no labels'
    )
  return _Columns(image, label, _class_names(schema.metadata, label) if label else None)


def _class_names(metadata: Any, label):
  """Those that Hugging Face's `datasets` writes beside the schema; None where there are none."""
  try:
    features = json.loads(metadata[b'huggingface'])['info']['features']
    names = features[label]['names']
  except (TypeError, KeyError, ValueError, RecursionError):
    return None
  if not isinstance(names, list) or not names:
    return None
  return [str(name) for name in names]
