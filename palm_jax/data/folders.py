"""Pictures in folders or archives: a folder for each class, or the labels in a dataset.json.

The classes are the first level of folders at which there are several: a folder that holds one
folder and no picture is passed through. Pictures lie at any depth below their class.
"""

import json
import pathlib
from collections.abc import Sequence

import numpy as np
from absl import logging

from palm_jax.base.errors import UserError, one_line
from palm_jax.data import decoding, parts, published
from palm_jax.data.arrays import FORMS, Found, Split
from palm_jax.data.decoding import SHOWN_SUFFIXES
from palm_jax.data.trees import LISTED, Tree, is_archive, is_listed, open_tree

SHOWN = 3  # names in a line about many


class _Levels:
  """The folders of a Tree, each by its path with a '/' at the end; '' is the root."""

  def __init__(self, tree: Tree):
    self.subfolders: dict[str, list[str]] = {}
    self.with_pictures = set()
    for folder in tree.folders:
      parent, _, name = folder.rpartition('/')
      self.subfolders.setdefault(parent and parent + '/', []).append(name)
    for file in tree.files:
      if decoding.is_picture(pathlib.PurePosixPath(file)):
        self.with_pictures.add(file[: file.rfind('/') + 1])

  def of(self, folder: str) -> list[str]:
    return self.subfolders.get(folder, [])

  def parts_in(self, folder: str) -> tuple[str, str]:
    """The folders of train and test in it, '' for what is not there."""
    train = parts.first(self.of(folder), parts.TRAIN)
    if not train or not self.of(f'{folder}{train}/'):
      return '', ''
    # A test part without class folders may be of pictures without labels.
    labelled = [name for name in self.of(folder) if self.of(f'{folder}{name}/')]
    return train, parts.first(labelled, parts.TESTS) or parts.first(self.of(folder), parts.TESTS)

  def descend(self, folder: str, stop: set[str]) -> str:
    """The first folder from there down with several in it, or with pictures, or in `stop`."""
    while folder not in stop and len(self.of(folder)) == 1:
      below = f'{folder}{self.of(folder)[0]}/'
      passable = below in stop or self.of(below)
      if parts.is_part(self.of(folder)[0]) or below in self.with_pictures - stop or not passable:
        break
      folder = below
    return folder


def read(path: pathlib.Path, size: int = 0) -> Found:
  """The pictures of a folder or archive.

  Args:
    path: holds class folders; or `train/` and `test/` folders of class folders (or as `parts` has
      them); or a dataset.json.
    size: see `decoding.read_all`.

  Raises:
    UserError: no classes, no pictures, damaged ones, or several sizes.
  """
  with open_tree(path) as tree:
    levels = _Levels(tree)
    listed = {file[: -len(LISTED)] for file in tree.files if is_listed(file)}
    if not is_archive(path):  # a folder with pictures of its own may be a class
      listed -= levels.with_pictures - {''}
    top = '' if levels.parts_in('')[0] else levels.descend('', listed)
    if top in listed:
      return _read_listed(tree, top, size)
    return _read_classes(tree, levels, top, size)


def _read_classes(tree, levels, top, size):
  train_folder = top
  test_folder = None
  train, test = levels.parts_in(top)
  if train:
    train_folder = levels.descend(f'{top}{train}/', set())
    inner = train_folder.removeprefix(f'{top}{train}/')
    test_folder = f'{top}{test}/{inner}' if test else None
  names = levels.of(train_folder)
  if not names:
    nothing = 'has no folders' if tree.root.is_dir() else 'holds no CIFAR folder and no folders'
    raise UserError(
      f'{tree.where(train_folder)} {nothing}; expected one folder of images per class, and '
      f'pictures without labels in one folder; or data may be {FORMS}'
    )
  if all(map(parts.is_part, names)):
    raise UserError(
      f'{tree.where(top)} would have the classes {", ".join(names)}; expected a folder per class, '
      'also within those of train and test; pictures without labels go into one folder with '
      'another name'
    )
  folders = [train_folder] if test_folder is None else [train_folder, test_folder]
  listed = [_list_classes(tree, levels, folder, names) for folder in folders]
  both = f', {train} and {test}' if test else ''
  source = f'{published.describe(tree.root)}: {len(names)} class folders{both}'
  return _read_pictures(tree, listed, names, source, size)


def _list_classes(tree, levels, folder, names):
  """(files, labels) of a folder of class folders; labels are places in `names`."""
  place = {name: i for i, name in enumerate(names)}
  there = levels.of(folder)
  for name in there:
    if name not in place:
      raise UserError(
        f'{tree.where(folder + name)}: class {name} is not among the train classes; expected the '
        'same folder names'
      )
  files = []
  labels = []
  for file in tree.files:
    name, below, _ = file[len(folder) :].partition('/')
    if file.startswith(folder) and below and decoding.is_picture(pathlib.PurePosixPath(file)):
      files.append(file)
      labels.append(place[name])
  found = set(labels)
  for name in there:
    if place[name] not in found:
      raise UserError(
        f'{tree.where(folder + name)} holds no image; expected {SHOWN_SUFFIXES} files '
        'in the class folder; fill or remove it'
      )
  if not files:
    raise UserError(
      f'{tree.where(folder)} has no class folders; expected the same folder names as in train'
    )
  return files, labels


def _read_listed(tree, top, size):
  """What stylegan2-ada's dataset_tool.py makes: pictures at any depth, labels in dataset.json.

  There are no labels where all pictures are of one kind.
  """
  where = tree.where(f'{top}{LISTED}')
  try:
    listed = json.loads(tree.read(f'{top}{LISTED}'))['labels']
    labels = {name: int(label) for name, label in listed} if listed else {}
  except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
    raise UserError(
      f'{where} cannot be read ({one_line(error)}); expected "labels": [[file, class], ...] or '
      'null; fix it, or remove it if folders are classes'
    ) from error
  files = [
    file
    for file in tree.files
    if file.startswith(top) and decoding.is_picture(pathlib.PurePosixPath(file))
  ]
  if not files:
    raise UserError(f'{tree.where(top)}: no image in it; make it again')
  source = f'{published.describe(tree.root)}: labels of {LISTED}'
  if labels:
    names = [file[len(top) :] for file in files]
    missing = [name for name in names if name not in labels]
    if missing:
      raise UserError(f'{tree.root}: {missing[0]} has no label in {LISTED}; make it again')
    absent = sorted(labels.keys() - set(names))
    if absent:
      raise UserError(
        f'{where} names {_some(absent)}, which {"is" if len(absent) == 1 else "are"} not there; '
        'make it again, or remove those lines'
      )
    numbers = [labels[name] for name in names]
  else:
    numbers = [0] * len(files)
    source = f'{published.describe(tree.root)}: one class, as {LISTED} has no labels'
  return _read_pictures(tree, [(files, numbers)], None, source, size)


def _read_pictures(tree, listed, class_names, source, size):
  """[(files, labels)] of train, and of test where there is one -> Found."""
  arrays, how = decoding.read_all([[tree.source(x) for x in files] for files, _ in listed], size)
  splits = [
    Split(images, np.asarray(labels)) for images, (_, labels) in zip(arrays, listed, strict=True)
  ]
  read_now = {file for files, _ in listed for file in files}
  log_skipped(
    tree.root,
    [x for x in tree.files if x not in read_now and not is_listed(x)],
    'no pictures of a class',
  )
  test = splits[1] if len(splits) == 2 else None
  return Found(splits[0], test, class_names, source + how)


def log_skipped(root: pathlib.Path, names: Sequence[str], what: str) -> None:
  """One line about files that are not read, where there are any."""
  if names:
    logging.warning('%s: %d files skipped, %s: %s', root, len(names), what, _some(names))


def _some(names):
  more = len(names) - SHOWN
  return ', '.join(names[:SHOWN]) + (f' and {more} more' if more > 0 else '')
