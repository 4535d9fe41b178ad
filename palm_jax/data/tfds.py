"""Sets that tensorflow-datasets has prepared as array_record: read without tensorflow."""

import difflib
import os
import shlex
from typing import Any

import numpy as np
from absl import logging

from palm_jax.base.errors import UserError, one_line
from palm_jax.base.files import reading
from palm_jax.base.signals import raise_if_interrupted
from palm_jax.data import decoding
from palm_jax.data.arrays import Found, Split
from palm_jax.data.published import PREPARE_NEEDS, prepare_command


def read(name: str, data_dir: str | os.PathLike | None, label_set: str, size: int = 0) -> Found:
  """A prepared set, its `test` or `validation` part as test.

  Args:
    name: what tensorflow-datasets calls it, without 'tfds:'.
    data_dir: its folder; None: its default.
    label_set: 'fine' reads the feature `label`, 'coarse' `coarse_label`.
    size: images become squares of it; 0 leaves them as they are, and refuses several sizes.

  Raises:
    UserError: not installed, unknown, not prepared, damaged, or without images and labels.
  """
  builder = _open(name, data_dir)
  features = builder.info.features
  key = 'coarse_label' if label_set == 'coarse' else 'label'
  if 'image' not in features or key not in features:
    raise UserError(f'tfds:{name} has the features {", ".join(features)}; expected image and {key}')
  sizes = set()
  train = _read_split(builder, 'train', key, size, sizes)
  if train is None:
    raise UserError(
      f'tfds:{name} {builder.info.version} is not prepared in {builder.data_dir}; run: '
      f'{prepare_command(name, data_dir)}'
    )
  source = f'{builder.info.full_name} of tensorflow-datasets, {key}'
  names = getattr(features[key], 'names', None)
  test = None
  for part in ('test', 'validation'):
    found = _read_split(builder, part, key, size, sizes)
    if found is not None and (found.labels < 0).all():
      logging.warning('tfds:%s: its %s part is not read: its labels are all below 0', name, part)
    elif found is not None:
      source += f', its {part} part as test'
      test = found
      break
  return Found(train, test, names, source + (decoding.fitted(sizes, size) if size else ''))


def _open(name, data_dir) -> Any:
  """The builder of a set; it reads only what is prepared, where tfds.load would download."""
  try:
    import tensorflow_datasets as tfds  # Here, because no other source needs it.
  except ImportError as error:
    raise UserError(
      f'tfds:{name} needs tensorflow-datasets; run: pip install tensorflow-datasets'
    ) from error
  try:
    return tfds.builder(name, data_dir=data_dir, file_format='array_record')
  except tfds.core.DatasetNotFoundError as error:
    folder = data_dir or tfds.core.constants.DATA_DIR  # pyright: ignore[reportAttributeAccessIssue]: lazy
    near = difflib.get_close_matches(name, tfds.list_builders(with_community_datasets=False), 1)
    hint = f'; did you mean tfds:{near[0]}?' if near else '; run tfds.list_builders() for the names'
    raise UserError(
      f'tfds:{name}: tensorflow-datasets {tfds.__version__} has no set of that name, and '
      f'{folder} holds none{hint}'
    ) from error
  # A wrong version, configuration or file format; a builder that imports tensorflow.
  except Exception as error:
    raise_if_interrupted(error)
    command = prepare_command(name, data_dir)
    if 'File format' in str(error):  # Prepared as tfrecord, which only tensorflow reads.
      folder = tfds.builder(name, data_dir=data_dir).data_dir
      command = (
        f'{PREPARE_NEEDS} && '
        f'tfds convert_format --dataset_version_dir={shlex.quote(str(folder))} '
        '--out_file_format=array_record'
      )
    raise UserError(f'tfds:{name} cannot be opened ({one_line(error)}); run: {command}') from error


def _read_split(builder, part, key, size, sizes):
  """None where the set has no such part; adds the (width, height) of its pictures to `sizes`."""
  try:
    examples = builder.as_data_source(split=part)
  except (AssertionError, KeyError, ValueError):
    return None
  if size:
    channels = builder.info.features['image'].shape[-1] or 3
    decoding.check_room(len(examples), (size, size, channels))
  where = f'tfds:{builder.info.full_name} ({part})'
  with reading(
    lambda why: f'{where}: damaged ({why}); remove {builder.data_dir} and prepare it again'
  ):
    pairs = []
    for example in examples:
      image = example['image']
      sizes.add(image.shape[1::-1])
      pairs.append((decoding.fit_array(image, size) if size else image, example[key]))
  if len({image.shape for image, _ in pairs}) != 1:
    raise UserError(
      f'{where} has images of several sizes or none; expected one size: --config.data.size=64, for '
      'example, crops and resizes them'
    )
  return Split(*(np.stack(column) for column in zip(*pairs, strict=True)))
