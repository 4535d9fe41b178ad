"""Pretrained encoders by name, file or run, ready to be called."""

import dataclasses
import functools
import json
import os
import pathlib
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax.errors import FlaxError
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from palm_jax import export
from palm_jax.base import checks
from palm_jax.base.digests import file_digest
from palm_jax.base.errors import UserError
from palm_jax.base.files import user_path
from palm_jax.encoder import make_encoder
from palm_jax.evaluate.features import extract_batches
from palm_jax.formats.arrays import check_numbers
from palm_jax.formats.kinds import SnapshotError

BUNDLED = pathlib.Path(__file__).parent / 'bundled'
SUFFIX = '.safetensors'
SHAPE_KEY = 'image_shape'  # of a file's metadata: that of the pictures it was trained on, as JSON
BATCH_SIZE = 256  # images at once: activations of ResNet-18 at 32x32 take some 300 MB
ROUNDING = 1e-3  # by which floats may leave [-1, 1]


@dataclasses.dataclass(frozen=True, eq=False)
class LoadedEncoder:
  """A frozen encoder: `features = encoder(images)`.

  Attributes:
    name: the bundled one's, the file's without its suffix, or the workdir's.
    network: called as `network.apply(variables, images, train=False)`.
    settings: of which `encoder.make_encoder` makes the network.
    variables: {'params', 'batch_stats'} of float32 numpy arrays.
    image_shape: (H, W, C) that it was trained on; of a Nature CNN whose file does not say it, the
      smallest that its layers take. H and W are None where that is not known and images of any
      size are taken.
    sides: H and W that it takes, in words.
    features: F.
    card: how it was made and what was measured (card.py); None where there is none.
  """

  name: str
  network: nn.Module = dataclasses.field(repr=False)
  settings: dict[str, Any] = dataclasses.field(repr=False)
  variables: dict[str, Any] = dataclasses.field(repr=False)
  image_shape: tuple[int | None, int | None, int]
  sides: str = dataclasses.field(repr=False)
  features: int
  card: dict[str, Any] | None = dataclasses.field(repr=False, default=None)

  def apply(self, variables: Any, images: jax.Array) -> jax.Array:
    """The pure function behind a call, to be compiled into others: (N, H, W, C) -> (N, F)."""
    features: Any = self.network.apply(variables, images, train=False)
    return features

  def __call__(self, images: np.ndarray | jax.Array, batch_size: int = BATCH_SIZE) -> np.ndarray:
    """Features of images, batch normalisation in eval mode.

    Images are computed in compiled batches, so memory is bounded however many they are.

    Args:
      images: (N, H, W, C) uint8, or floats in [-1, 1] (uint8 / 127.5 - 1).
      batch_size: images at once.

    Returns:
      (N, F) float32, on the host.

    Raises:
      UserError: images of another shape, type or range.
    """
    images = self._checked(images)
    if batch_size < 1:
      raise UserError(f'batch_size is {batch_size}, expected at least 1')
    count = len(images)
    if not count:
      return np.zeros((0, self.features), np.float32)
    # A power of two, so that calls with few images, each another number, are compiled rarely.
    size = min(batch_size, 1 << (count - 1).bit_length())
    try:
      return extract_batches(self._frozen, _batches(images, size), count)
    except (FlaxError, UserError) as e:  # while it is compiled: the network refuses the size
      raise UserError(
        f'images are {images.shape[1]}x{images.shape[2]}: the encoder {self.name} takes '
        f'{self.sides}; resize them'
      ) from e

  @functools.cached_property
  def _frozen(self):
    """The network with its variables, which are brought to the device once."""
    return jax.tree_util.Partial(_forward(self.network), jax.device_put(self.variables))

  def _checked(self, images):
    channels = self.image_shape[2]
    expected = f'expected (N, H, W, {channels}) uint8, or floats in [-1, 1], {self.sides}'
    if not isinstance(images, np.ndarray | jax.Array):
      raise UserError(f'images are a {type(images).__name__}, {expected}: numpy.asarray(images)')
    given = f'images are {images.dtype} of shape {images.shape}, {expected}'
    if images.ndim == 3 and images.shape[2] == channels:
      raise UserError(f'{given}: images[None] is a batch of one')
    if images.ndim == 4 and images.shape[1] == channels != images.shape[3]:
      raise UserError(f'{given}: images.transpose(0, 2, 3, 1) has channels last')
    if images.ndim != 4 or images.shape[3] != channels or not min(images.shape[1:3]):
      raise UserError(given)
    if images.dtype == np.uint8:
      return np.asarray(images)
    if not jnp.issubdtype(images.dtype, jnp.floating):
      raise UserError(f'{given}: images.astype(numpy.uint8), if they are in 0..255')
    images = np.asarray(images, np.float32)
    low, high = images.min(initial=0), images.max(initial=0)
    if not (-1 - ROUNDING <= low and high <= 1 + ROUNDING):  # neither is NaN
      raise UserError(
        f'images are floats from {low:.3g} to {high:.3g}, expected [-1, 1]: scale them, pixels / '
        '127.5 - 1, or clip them'
      )
    return images


@functools.lru_cache(maxsize=16)
def _forward(network):
  """One function a network, so that encoders that differ in their numbers alone share programs."""
  return functools.partial(network.apply, train=False)


def _batches(images, size):
  """Images in batches of one shape, for which one program is compiled; the last is filled up."""
  for start in range(0, len(images), size):
    batch = images[start : start + size]
    yield np.pad(batch, ((0, size - len(batch)), (0, 0), (0, 0), (0, 0)))


def names() -> tuple[str, ...]:
  """The bundled encoders."""
  return tuple(sorted(path.stem for path in BUNDLED.glob(f'*{SUFFIX}')))


def load_encoder(name_or_path: str | os.PathLike) -> LoadedEncoder:
  """A pretrained encoder out of this package, a file, or a run.

  Nothing is downloaded: `palm pull` does that.

  Args:
    name_or_path: one of
      - the name of a bundled encoder, see `names`;
      - a file of palm_jax.zoo, of `palm pull`, or of palm_jax.export --format=safetensors;
      - the workdir of a pretraining run, whose newest whole checkpoint is read.

  Raises:
    UserError: nothing of this kind there, or damage.
  """
  if not isinstance(name_or_path, (str, os.PathLike)) or not os.fspath(name_or_path):
    raise UserError(
      f"encoder {name_or_path!r}: expected the name of a bundled one, a file or a run's workdir"
    )
  text = os.fspath(name_or_path)
  _refuse_addresses(text)
  path = user_path(text)
  try:
    path.stat()
  except (FileNotFoundError, NotADirectoryError):
    return _load_named(text, path)
  except (OSError, ValueError) as e:  # a name that is too long, or has a NUL
    raise UserError(
      f'encoder {text[:200]!r} cannot be looked for ({getattr(e, "strerror", e)}): give a path or '
      'the name of a bundled one'
    ) from e
  return _load_run(path) if path.is_dir() else load_file(path)


def _refuse_addresses(text):
  if text.startswith('hf:'):
    repo = text.removeprefix('hf:').strip('/')
    file = f'{repo.rpartition("/")[2] or "encoder"}{SUFFIX}'
    raise UserError(
      f'{text[:200]}: nothing is downloaded unasked; run `palm pull --repo={repo[:200]} '
      f'--out={file[:200]}` and load {file[:200]}'
    )
  if re.match(r'[a-z][a-z0-9+.-]*://', text, re.IGNORECASE):
    raise UserError(
      f'{text[:200]} is an address, and nothing is downloaded: fetch the file and give its path'
    )


def _load_named(text, path):
  """The bundled encoder of a name. UserError for other names, and paths where nothing is."""
  bundled = names()
  if text in bundled:
    return load_file(BUNDLED / f'{text}{SUFFIX}')
  there = f'bundled are {", ".join(bundled) or "none"}{checks.nearest(text, bundled)}'
  if path.name == text and path.suffix != SUFFIX:
    raise UserError(
      f'{text[:200]!r} is neither a bundled encoder nor a path; {there}: give one of them, a file '
      "of palm_jax.export or a run's workdir"
    )
  hub = re.fullmatch(r'[\w.-]+/[\w.-]+', text) and path.suffix != SUFFIX
  pull = f'; if it is on the hub, run `palm pull --repo={text}` first' if hub else ''
  raise UserError(f'{text[:200]}: no such file or folder{pull}; {there}')


def _load_run(workdir):
  config, variables, _ = export.load_run(workdir)
  return from_variables(workdir.absolute().name, config['encoder'], variables)


def load_file(path: str | os.PathLike) -> LoadedEncoder:
  """The encoder of a file, and the card beside it.

  Args:
    path: *.safetensors; a card is the .json of the same name that has this file's SHA-256.

  Raises:
    UserError: no such file, one of another kind, or damage.
  """
  path = pathlib.Path(path)
  settings, variables, metadata = export.load(path)
  try:
    flat: dict[str, Any] = flatten_dict(variables, sep='/')
    check_numbers(flat)
  except SnapshotError as e:
    raise UserError(f'{path}: {e}') from e
  encoder = from_variables(path.stem, settings, variables, _shape_in(path, metadata))
  return dataclasses.replace(encoder, card=read_card(path))


def _shape_in(path, metadata):
  """(H, W, C) that metadata say it was trained on, or None."""
  text = metadata.get(SHAPE_KEY)
  if text is None:
    return None
  try:
    height, width, channels = map(int, json.loads(text))
  except (TypeError, ValueError) as e:
    raise UserError(f'{path} is damaged ({SHAPE_KEY}={text[:80]!r}): fetch it again') from e
  return height, width, channels


def from_variables(
  name: str,
  settings: dict[str, Any],
  variables: dict[str, Any],
  trained_on: tuple[int, int, int] | None = None,
) -> LoadedEncoder:
  """LoadedEncoder without a card.

  Args:
    name: for messages.
    settings: dict with the keys of `encoder.default_config`.
    variables: {'params', 'batch_stats'} of arrays; computed with are their float32.
    trained_on: (H, W, C), where that is known.

  Raises:
    UserError: settings and variables that do not belong together.
  """
  needs = export.sizes(settings, variables)
  # Of a ResNet the smallest shape says nothing about what it was trained on.
  shape = (None, None, needs.image_shape[2]) if needs.any_size else needs.image_shape
  variables = jax.tree.map(lambda x: np.asarray(x, np.float32), variables)
  network = make_encoder(ConfigDict(settings))
  shape = trained_on or shape
  return LoadedEncoder(name, network, settings, variables, shape, needs.sides, needs.features)


def read_card(path: pathlib.Path) -> dict[str, Any] | None:
  """The card beside a file of weights; None where there is none, or one of another file."""
  beside = path.with_suffix('.json')
  try:
    card = json.loads(beside.read_text())
  except (OSError, ValueError, RecursionError):
    return None
  if not isinstance(card, dict) or 'file_sha256' not in card:
    return None
  if card['file_sha256'] != file_digest(path):
    logging.warning('%s is the card of another file than %s: left out', beside, path.name)
    return None
  return card
