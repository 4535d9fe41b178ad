"""Writes the encoder of a pretraining run as one file for other programs.

  python -m palm_jax.export --workdir=runs/cifar --format=FORMAT [--out=FILE] [--step=N]

The formats:
  safetensors   our own names; `load` gives settings and variables back, bit for bit
  torchvision   .safetensors with the names of torchvision's ResNets, for a vision transformer of
                timm's, and for the encoder nature of a torch.nn.Sequential
  onnx          a graph from images (N, H, W, C) uint8, scaled inside, to features (N, F) float32

Each file's metadata say from which checkpoint it is, how images are scaled, the encoder's sha256 as
results have it, and, under 'usage', the Python that runs it.
"""

import functools
import importlib.metadata
import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors.numpy
from absl import flags
from flax import traverse_util
from ml_collections import ConfigDict

from palm_jax.base import checks, command, files
from palm_jax.base.digests import digest
from palm_jax.base.errors import UserError
from palm_jax.base.files import replacing, user_path
from palm_jax.checkpoint import load_encoder
from palm_jax.encoder import VITS, make_encoder
from palm_jax.formats import onnx_file, torch_encoders
from palm_jax.formats.arrays import read_arrays
from palm_jax.formats.torch_encoders import torch_state

# Format: the file's name where --out gives none.
FORMATS = {
  'safetensors': 'encoder.safetensors',
  'torchvision': 'encoder.torchvision.safetensors',
  'onnx': 'encoder.onnx',
}
ANY = 'any H and W'  # of images
ENCODER_KEY = 'palm_jax_encoder'  # of the metadata: the encoder's settings as JSON

# ---- 'usage' of the metadata; `path` and `images`, (N, H, W, C) uint8 numpy, are the reader's

FLAX_USAGE = """\
from ml_collections import ConfigDict
from palm_jax.encoder import make_encoder
from palm_jax.export import load

settings, variables, metadata = load(path)
features = make_encoder(ConfigDict(settings)).apply(variables, images, train=False)
"""
ONNX_USAGE = """\
import onnxruntime

features, = onnxruntime.InferenceSession(path).run(None, {'images': images})
"""


def export(
  workdir: str | pathlib.Path,
  format: str = 'safetensors',
  out: str | os.PathLike | None = None,
  step: int | None = None,
) -> tuple[pathlib.Path, int]:
  """Writes the pretrained encoder of a workdir; the file is whole or as it was before.

  Args:
    workdir: of a pretraining run.
    format: one of FORMATS.
    out: file in an existing folder; None is FORMATS' name in the workdir.
    step: of the checkpoint; None is the newest that is whole.

  Returns:
    Path of the file, and step of the checkpoint.

  Raises:
    UserError: an unknown format, no such workdir or checkpoint, a failure to write the file, or no
      onnx package.
  """
  if format not in FORMATS:
    raise UserError(
      f'--format={format} is unknown: expected one of '
      f'{", ".join(FORMATS)}{checks.nearest(format, FORMATS)}'
    )
  workdir = user_path(workdir)
  if out is not None:
    out = user_path(out)
    suffix = pathlib.Path(FORMATS[format]).suffix
    if not pathlib.Path(out).absolute().parent.is_dir():
      raise UserError(f'--out={out}: its folder is missing; make it, or name a file in another')
    if pathlib.Path(out).is_dir() or pathlib.Path(out).suffix != suffix:
      raise UserError(
        f'--out={out}: the format {format} is written as one file, expected a name that ends with '
        f'{suffix}'
      )
  if format == 'onnx':
    onnx_file.import_onnx()
  config, variables, step = load_run(workdir, step)
  path = pathlib.Path(out or workdir / FORMATS[format])
  try:
    save(path, format, config['encoder'], variables, step)
  except OSError as e:
    raise files.not_written(e, path) from e
  return path, step


def load_run(
  workdir: str | os.PathLike, step: int | None = None
) -> tuple[dict[str, Any], dict[str, Any], int]:
  """`checkpoint.load_encoder` of a run whose config has the encoder's settings, at 'encoder'.

  Raises:
    UserError: no or damaged config or checkpoint, or a config without an encoder.
  """
  config, variables, step = load_encoder(pathlib.Path(workdir), step)
  if not isinstance(config, dict) or not isinstance(config.get('encoder'), dict):
    raise UserError(
      f'{workdir}/config.json has no settings of an encoder: give the --workdir of a pretraining '
      'run'
    )
  return config, variables, step


def save(
  path: str | os.PathLike,
  format: str,
  settings: dict[str, Any],
  variables: dict[str, Any],
  step: int,
  about: Mapping[str, str] | None = None,
) -> None:
  """Writes an encoder to a file that is whole or as it was before.

  Args:
    path: of the file.
    format: one of FORMATS.
    settings: dict with the keys of `encoder.default_config`.
    variables: {'params', 'batch_stats'} of arrays; the second where the encoder has them.
    step: of the checkpoint, for the metadata.
    about: more of the metadata.

  Raises:
    UserError: settings and variables that do not belong together, or no onnx package.
    OSError: the file cannot be written.
  """
  shape, sides, features = sizes(settings, variables)
  normalised = ', batch normalisation in eval mode' if 'batch_stats' in variables else ''
  metadata = {
    **(about or {}),
    ENCODER_KEY: json.dumps(settings),
    'format': format,
    'checkpoint_step': str(step),
    'preprocessing': f'images (N, H, W, {shape[2]}) uint8, {sides}; uint8 / 127.5 - 1 in float32',
    'features': f'(N, {features}){normalised}',
    'sha256': digest(variables, settings),
    'palm_jax_version': _version(),
    'usage': _usage(format, settings, variables, shape, features),
  }
  if format == 'onnx':
    state = torch_state(variables)
    content = onnx_file.build(settings, state, shape, features, metadata)
  else:
    tensors = torch_state(variables) if format == 'torchvision' else _flat(variables)
    arrays = {name: np.array(x, order='C') for name, x in tensors.items()}
    content = safetensors.numpy.save(arrays, metadata)
  with replacing(path) as file:
    file.write(content)


def _usage(format, settings, variables, image_shape, features):
  """The Python that runs an encoder of this format."""
  if format == 'torchvision':
    return torch_encoders.usage(settings, variables, image_shape, features)
  return FLAX_USAGE if format == 'safetensors' else ONNX_USAGE


def load(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Any], dict[str, str]]:
  """The encoder in a file of the format safetensors.

  Returns:
    Settings, of which `encoder.make_encoder(ConfigDict(settings))` makes the network; variables
    {'params', 'batch_stats'} of numpy arrays, bit-equal to those exported; metadata.

  Raises:
    UserError: no such file, one of another kind, or damage.
  """
  arrays, metadata = read_arrays(user_path(path))
  if metadata.get('format') != 'safetensors' or ENCODER_KEY not in metadata:
    raise UserError(
      f'{path} is no encoder under the names of palm_jax: give a file that palm_jax.export wrote '
      'with --format=safetensors'
    )
  try:
    settings = json.loads(metadata[ENCODER_KEY])
    variables = traverse_util.unflatten_dict(arrays, sep='/')
    if digest(variables, settings) != metadata.get('sha256'):
      raise ValueError('it holds other numbers or settings than were saved')
  except (LookupError, TypeError, ValueError, RecursionError) as e:
    raise UserError(f'{path} is damaged ({e}): fetch it or export it again') from e
  return settings, variables, metadata


class Sizes(NamedTuple):
  """What an encoder takes and gives.

  Attributes:
    image_shape: (H, W, C) of the smallest images that it surely takes; a transformer takes no
      others.
    sides: H and W that it takes, in words.
    features: F of its (N, F).
  """

  image_shape: tuple[int, int, int]
  sides: str
  features: int

  @property
  def any_size(self) -> bool:
    return self.sides == ANY


def sizes(settings: dict[str, Any], variables: dict[str, Any]) -> Sizes:
  """What the encoder takes and gives that settings and variables make.

  Raises:
    UserError: settings and variables that do not belong together.
  """
  shapes = lambda tree: {name: np.shape(x) for name, x in _flat(tree).items()}
  try:
    encoder = make_encoder(ConfigDict(settings))
    params = variables['params']
    if settings['name'] == 'nature':
      side = math.isqrt(params['dense']['kernel'].shape[0] // params['conv3']['kernel'].shape[-1])
      # Strides 4, 2 and 1 without padding; generators draw squares.
      shape = (8 * side + 28, 8 * side + 28, params['conv1']['kernel'].shape[2])
    elif settings['name'] in VITS:
      side, _, channels, _ = params['patch']['kernel'].shape
      count = params['position'].shape[1] - ('class_token' in params)
      shape = (math.isqrt(count) * side, math.isqrt(count) * side, channels)  # squares again
    else:  # a ResNet, or an encoder of someone's own that says its pictures as they do
      if 'stem_conv' not in params:
        raise UserError(
          f'encoder {settings["name"]!r} has no stem_conv: call its first convolution so, and have '
          'it take pictures of 8x8 or more, to export and load it'
        )
      shape = (8, 8, params['stem_conv']['kernel'].shape[2])
    images = jax.ShapeDtypeStruct((1, *shape), np.uint8)
    init = functools.partial(encoder.init_with_output, train=False)
    h, template = jax.eval_shape(init, jax.random.key(0), images)
    expected, found = shapes(template), shapes(variables)
  except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as e:
    raise UserError(
      f'the settings of the encoder, {settings}, do not belong to its variables '
      f'({type(e).__name__}): give the config and the checkpoint of one run'
    ) from e
  for name in sorted(expected.keys() | found.keys()):
    if found.get(name) != expected.get(name):
      raise UserError(
        f'{name} is {found.get(name, "absent")}, expected {expected.get(name, "absent")} for an '
        f'encoder of {settings}: give the config and the checkpoint of one run'
      )
  sides = ANY
  if settings['name'] in VITS:
    sides = f'H and W {shape[0]}'
  elif settings['name'] == 'nature':
    sides = f'H and W {shape[0]} to {shape[0] + 7}'
  return Sizes(shape, sides, h.shape[-1])


def _flat(variables) -> dict[str, Any]:
  return traverse_util.flatten_dict(variables, sep='/')


def _version():
  try:
    return importlib.metadata.version('palm_jax')
  except importlib.metadata.PackageNotFoundError:
    return 'a clone that is not installed'


def parse_flags(argv: list[str]) -> list[str]:
  """Defines the flags and reads them; returns what absl leaves of argv. Raises UserError."""
  flags.DEFINE_string('workdir', None, 'Of the pretraining run whose encoder is wanted.')
  flags.DEFINE_string('format', 'safetensors', f'One of {", ".join(FORMATS)}.')
  flags.DEFINE_string(
    'out', None, f'File to write; default: in the workdir, {", ".join(FORMATS.values())}.'
  )
  flags.DEFINE_integer('step', None, 'Of the checkpoint; default: the newest.')
  return command.parse_flags(argv)


def main(argv: list[str]) -> None:
  """The command, after `parse_flags`. Raises UserError."""
  command.no_arguments(argv)
  if not flags.FLAGS.workdir:
    raise UserError('--workdir is missing: give that of a pretraining run, such as runs/cifar')
  command.start()
  out, step = export(flags.FLAGS.workdir, flags.FLAGS.format, flags.FLAGS.out, flags.FLAGS.step)
  about = f'the encoder of {flags.FLAGS.workdir} at checkpoint step {step}'
  print(f'{out}: {about}, format {flags.FLAGS.format}')


if __name__ == '__main__':
  command.run(main, parse_flags)
