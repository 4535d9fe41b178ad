"""A run's encoder as a small file with a card: what is bundled, and what is shared."""

import json
import os
import pathlib
import re
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from palm_jax import __version__, environment, export, worlds
from palm_jax.base.checkpoints import load
from palm_jax.base.digests import digest, file_digest
from palm_jax.base.errors import UserError, one_line
from palm_jax.base.files import not_written, replacing, user_path
from palm_jax.experience import world_digest
from palm_jax.generator import PictureGenerator, load_generator
from palm_jax.layers.pixels import to_uint8
from palm_jax.zoo import card as cards
from palm_jax.zoo.loaded import SHAPE_KEY, SUFFIX, LoadedEncoder, from_variables

TOLERANCE = 0.01  # of features, relative; measured were 3e-4 to 2.3e-3
PICTURES = 64  # of the run's own world, on which that is checked
AT_ONCE = 8  # that are drawn
STORED = 'float16, vectors float32'
NAME = re.compile(r'[A-Za-z0-9][\w.-]{0,95}')
LICENCE = re.compile(r'[\w.+-]*')


def write(
  workdir: str | os.PathLike,
  name: str,
  out: str | os.PathLike | None = None,
  step: int | None = None,
  licence: str = '',
  command: str = '',
) -> pathlib.Path:
  """Writes a run's encoder as NAME.safetensors, and its card as NAME.json beside it.

  The file is one of palm_jax.export --format=safetensors whose arrays of two axes and more are
  float16. The others, among them batch statistics, stay float32: they are few, and small variances
  would lose bits.

  Args:
    workdir: of a pretraining run, whose generator can be loaded.
    name: of the encoder.
    out: an existing folder; None is the workdir.
    step: of the checkpoint; None is the newest that is whole.
    licence: SPDX identifier; '' states none.
    command: that made the run, for the card.

  Returns:
    Path of the .safetensors.

  Raises:
    UserError: no encoder or generator, results of another encoder, numbers that float16 does not
      hold, features that change by more than TOLERANCE, or a NAME.json that is no card: nothing is
      written. Or no room for it.
  """
  workdir = user_path(workdir)
  folder = user_path(out or workdir)
  if not NAME.fullmatch(name) or name.endswith(SUFFIX):
    raise UserError(
      f'--name={name}: expected letters, digits, - . or _, without {SUFFIX}, such as '
      'palm-cifar10-small'
    )
  if not LICENCE.fullmatch(licence):
    raise UserError(f'--licence={licence}: expected an SPDX identifier, such as Apache-2.0')
  if not folder.is_dir():
    raise UserError(f'--out={folder}: no such folder; make it, or name another')
  path = folder / f'{name}{SUFFIX}'
  _check_is_card(path.with_suffix('.json'))
  config, variables, step = export.load_run(workdir, step)
  settings = config['encoder']
  images, generator = world_of(workdir, config, step)
  stored = halved(variables)
  before = from_variables(name, settings, variables)
  after = from_variables(name, settings, stored, images.shape[1:])
  found = difference(before, after, images)
  card = make_card(workdir, config, step, after, digest(variables, settings))
  card['made'] |= dict(generator=generator, command=command)
  card |= dict(licence=licence, difference=found)
  try:
    about = {SHAPE_KEY: json.dumps(images.shape[1:])}
    export.save(path, 'safetensors', settings, stored, step, about)
    card |= dict(file_sha256=file_digest(path), file_bytes=path.stat().st_size)
    with replacing(path.with_suffix('.json')) as file:
      file.write(cards.as_json(card))
  except OSError as e:
    raise not_written(e, e.filename or path) from e
  return path


def _check_is_card(path):
  """Raises UserError where there is anything but a card, such as config.json of a run."""
  try:
    there = json.loads(path.read_text())
  except FileNotFoundError:
    return
  except (OSError, ValueError, RecursionError):
    there = None
  if not isinstance(there, dict) or 'file_sha256' not in there:
    raise UserError(f'{path} is there and no card of an encoder: choose another --name or --out')


def halved(variables: Any) -> Any:
  """Variables whose arrays of two axes and more, of each block where they are stacked, are float16.

  Raises:
    UserError: numbers that float16 does not hold.
  """

  def half(path, x):
    stacked = any(getattr(part, 'key', '') == 'blocks' for part in path)  # of a transformer
    if np.ndim(x) - stacked < 2:
      return np.asarray(x)
    with np.errstate(over='ignore'):
      stored = np.asarray(x, np.float16)
    if not np.isfinite(stored).all():
      raise UserError(
        f'{jax.tree_util.keystr(path, simple=True, separator="/")} has numbers that float16 does '
        'not hold: share the file of palm_jax.export instead'
      )
    return stored

  return jax.tree_util.tree_map_with_path(half, variables)


def difference(before: LoadedEncoder, after: LoadedEncoder, images: np.ndarray) -> dict[str, Any]:
  """How far features are from what they were, at most over images (N, H, W, C) uint8.

  Raises:
    UserError: more than TOLERANCE.
  """
  was, now = before(images), after(images)
  norm = np.linalg.norm(was, axis=1)
  change = np.linalg.norm(now - was, axis=1) / np.maximum(norm, np.finfo(np.float32).tiny)
  largest = float(change.max())
  if not largest <= TOLERANCE:
    raise UserError(
      f'features in float16 differ by {largest:.1e} of their length from those in float32, more '
      f'than {TOLERANCE}: share the file of palm_jax.export instead'
    )
  what = '|h16 - h32| / |h32|, the largest over random pictures of its world'
  return dict(largest=largest, tolerance=TOLERANCE, what=what, n=len(images))


def world_of(
  workdir: pathlib.Path, config: dict[str, Any], step: int
) -> tuple[np.ndarray, dict[str, str]]:
  """Random pictures (PICTURES, H, W, C) uint8 as the encoder was trained on, and whose they are.

  Raises:
    UserError: no generator there, a damaged one, or a config that is not a pretraining's.
  """
  try:
    path = config['generator']['path']
    there = ConfigDict(dict(environment=environment.default_config()))  # older runs lack settings
    there.environment.update(config['environment'])
  except (AttributeError, LookupError, TypeError, ValueError) as e:
    raise UserError(
      f'{workdir}/config.json is not the config of a pretraining ({one_line(e)}): give the '
      '--workdir of one'
    ) from e
  generator = worlds.as_world(there, load_generator(path or workdir))
  saved = load(workdir / 'pretrain' / 'checkpoints', 'encoder', step).metadata
  sha256 = saved.get('world') or world_digest(generator)
  about = dict(name=pathlib.Path(path).name if path else "the run's own", sha256=sha256)
  psi, stack = there.environment.truncation_psi, there.environment.stack
  return _draw(generator, psi, stack), about


def _draw(generator: PictureGenerator, psi, stack):
  """Pictures of random latents of all classes; `stack` of them are the channels of one."""
  draw = jax.jit(
    lambda v, z, labels: to_uint8(generator.apply(v, z, labels, truncation_psi=psi)),
  )
  count = PICTURES * stack
  z = np.random.default_rng(0).standard_normal((count, generator.z_dim), np.float32)
  labels = np.arange(count, dtype=np.int32) % max(1, generator.num_classes)
  images = np.concatenate(
    [
      draw(generator.variables, z[i : i + AT_ONCE], labels[i : i + AT_ONCE])
      for i in range(0, count, AT_ONCE)
    ]
  )
  return np.concatenate(np.split(images, stack), axis=-1)


def make_card(
  workdir: pathlib.Path, config: dict[str, Any], step: int, encoder: LoadedEncoder, sha256: str
) -> dict[str, Any]:
  """What is known of a run's encoder: all of it JSON.

  Args:
    workdir: of the run, whose results/ are read.
    config: of the run.
    step: of the checkpoint.
    encoder: as it is stored.
    sha256: digest of the encoder as it was trained, by which results name it.

  Raises:
    UserError: damaged results, or results of another encoder.
  """
  made = cards.read_pretraining(workdir, step)
  p = config.get('pretrain', {})
  env_steps = step * p.get('num_envs', 0) * p.get('rollout_length', 0)  # a step is an iteration
  return dict(
    name=encoder.name,
    kind='encoder',
    encoder=encoder.settings,
    features=encoder.features,
    image_shape=list(encoder.image_shape),
    sides=encoder.sides,
    parameters=sum(x.size for x in jax.tree.leaves(encoder.variables['params'])),
    stored=STORED,
    encoder_sha256=sha256,
    palm_jax_version=__version__,
    made=dict(
      config_name=config.get('name'),
      seed=config.get('seed'),
      checkpoint_step=step,
      env_steps=made.pop('env_steps', env_steps),
      **made,
    ),
    results=dict(
      probe=cards.read_probe(workdir, sha256), ood=cards.read_ood(workdir, sha256, step)
    ),
    config=config,
  )
