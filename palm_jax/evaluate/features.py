"""Features of whole image sets under a frozen encoder: computed once, then shared by every
probe."""

import functools
import hashlib
import pathlib
import zipfile
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from palm_jax import checkpoint
from palm_jax.base import devices
from palm_jax.base.digests import digest
from palm_jax.base.errors import UserError
from palm_jax.base.files import replacing
from palm_jax.base.processes import any_process
from palm_jax.encoder import make_encoder
from palm_jax.job import Run


def default_config():
  return ConfigDict(
    dict(
      # .npz of another encoder's features, judged beside ours: train_features, test_features,
      # ood_<set>
      path='',
      batch_size=512,  # images a step over all devices
      # where features are kept, named by what they are of; '': <workdir>/features. A study's runs
      # share one
      folder='',
    )
  )


class Encoder(NamedTuple):
  """A frozen encoder and where it comes from."""

  name: str
  apply: (
    jax.tree_util.Partial
  )  # Partial(function, variables): images (B, H, W, C) -> (B, F), batch statistics fixed
  sha256: str  # of variables and settings
  about: dict  # for protocols


def load_encoder(config, workdir, image_shape):
  """The encoder of the workdir's newest pretraining checkpoint.

  Args:
    config: the whole config; its section encoder is read.
    image_shape: (H, W, C) of the images that it shall see.
  Raises:
    UserError: no encoder in the workdir, or one for other images.
  """
  _, variables, step = checkpoint.load_encoder(workdir)
  shapes = lambda tree: {
    jax.tree_util.keystr(path): np.shape(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }
  there = shapes(variables)
  differ = [
    name
    for name, shape in shapes(jax.eval_shape(_init(config, image_shape))).items()
    if there.get(name) != shape
  ]
  if differ:
    raise UserError(
      f'the encoder of {workdir} does not take images of shape {image_shape}: {differ[0]} is '
      f'{there.get(differ[0], "absent")}; give the data it was pretrained for'
    )
  return _make(config, 'PALM encoder', variables, dict(checkpoint_step=step))


def untrained_encoder(config, image_shape):
  """The same network with the weights that config.seed draws."""
  return _make(
    config,
    'untrained encoder',
    jax.device_get(jax.jit(_init(config, image_shape))()),
    dict(weights_seed=config.seed),
  )


def _init(config, image_shape):
  return lambda: make_encoder(config.encoder).init(
    jax.random.key(config.seed), jnp.zeros((1, *image_shape)), train=False
  )


def _make(config, name, variables, about):
  apply = functools.partial(make_encoder(config.encoder).apply, train=False)
  sha256, about = (
    digest(variables, config.encoder.to_dict()),
    dict(about, layer='h, batch statistics fixed'),
  )
  return Encoder(name, jax.tree_util.Partial(apply, variables), sha256, about)


def assert_frozen(before, after):
  """Raises AssertionError, naming the leaf, unless two trees of variables are bit-identical.

  Args:
    before: parameters and batch statistics as they were, copied to the host (`jax.device_get`)
      before the probe.
    after: the same tree after it.
  """
  leaves = [
    {
      jax.tree_util.keystr(path): np.asarray(leaf)
      for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    for tree in (before, after)
  ]
  unmatched = sorted(leaves[0].keys() ^ leaves[1].keys())
  if unmatched:
    raise AssertionError(f'{unmatched[0]} is in one tree only: the encoder was not frozen')
  for name, old in leaves[0].items():
    new = leaves[1][name]
    if (old.shape, old.dtype) != (new.shape, new.dtype) or old.tobytes() != new.tobytes():
      raise AssertionError(f'{name} changed: the encoder was not frozen')


def check_single_pictures(config: ConfigDict, job: str) -> None:
  """Raises UserError where the encoder sees several pictures at once, and a job shows it one."""
  stack = config.environment.stack
  if stack > 1:
    raise UserError(
      f'--job={job} shows single pictures, but environment.stack={stack} trains an encoder of '
      'several: judge a run with 1'
    )


def check_classes(run: Run, job: str) -> None:
  """Raises UserError where the data of a job that tells classes apart have only one."""
  if len(run.data.class_names) < 2:
    raise UserError(
      f'the job {job} tells classes apart, but {run.config.data.name} has one: leave it out of '
      'config.jobs, or label the pictures'
    )


def folder_of(config, workdir):
  """Where features are kept: config.features.folder, or that of the workdir."""
  return pathlib.Path(config.features.folder or pathlib.Path(workdir) / 'features')


def cached(encoder, images, folder, mesh, batch_size=512):
  """`extract`, once for an encoder and its images: kept in a folder, in a file named by digests of
  both.

  Raises:
    UserError: a file there holds features of another encoder or other images; and what `extract`
      raises.
  """
  images = np.asarray(images)
  _check_images(images)
  images_sha256 = hashlib.sha256(repr(images.shape).encode() + images.tobytes()).hexdigest()
  about = dict(encoder_sha256=encoder.sha256, images_sha256=images_sha256)
  path = pathlib.Path(folder) / f'{about["encoder_sha256"][:12]}_{about["images_sha256"][:12]}.npz'
  if any_process(path.exists()):
    damage = None
    try:
      with np.load(path) as file:
        h, saved = file['features'], {name: str(file[name]) for name in (*about, 'features_sha256')}
      if hashlib.sha256(h.tobytes()).hexdigest() != saved.pop('features_sha256'):
        raise ValueError('its digest differs')
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
      damage = error
    if any_process(damage):  # all together, as they compute together
      logging.warning(
        '%s: damaged (%s), computed again', path, damage or 'another process says why'
      )
    else:
      for name, value in about.items():
        if saved[name] != value:
          raise UserError(
            f'{path} holds features whose {name} is {saved[name][:12]}..., expected '
            f'{value[:12]}...: remove it'
          )
      return h
  h = extract(encoder.apply, images, batch_size, mesh)
  if jax.process_index() == 0:
    with replacing(path) as file:
      np.savez(file, features=h, features_sha256=hashlib.sha256(h.tobytes()).hexdigest(), **about)
  return h


def load_foreign(config, counts):
  """Features of another encoder, from the .npz that config.features.path names: {part: (N, F)
  float32}; {} without one.

  The file holds train_features, test_features and, for --job=ood, an ood_<set> for each of its
  sets.

  Args:
    counts: {'train': images, 'test': images, 'ood_<set>': images, ...}, the parts that are needed.
  Raises:
    UserError: no such file, a damaged one, one without a part, or features that are not (images of
      that part, F).
  """
  path, parts = config.features.path, {}
  if not path:
    return parts
  try:
    with np.load(path, allow_pickle=False) as file:
      arrays = dict(file)
  except (OSError, ValueError, zipfile.BadZipFile) as error:
    raise UserError(
      f'features.path={path} cannot be read ({" ".join(str(error).split())}): give an .npz file '
      'with '
      'train_features and test_features'
    ) from error
  for part, count in counts.items():
    name = part if part.startswith('ood_') else f'{part}_features'
    if name not in arrays:
      raise UserError(
        f'features.path={path} holds {", ".join(sorted(arrays))}: expected also {name}'
      )
    parts[part] = arrays[name].astype(np.float32)
    if parts[part].ndim != 2 or parts[part].shape != (count, parts['train'].shape[1]):
      raise UserError(
        f'features.path={path}: {name} is {arrays[name].shape}, expected ({count}, F), a row for '
        'each image in '
        'order, with the same F in all'
      )
  return parts


def extract(apply_fn, images, batch_size=512, mesh=None):
  """Features of `images`, in their order.

  Args:
    apply_fn: images (B, H, W, C) uint8 -> features (B, F), with its variables frozen and batch
      normalisation in evaluation mode. Either a plain function or `jax.tree_util.Partial(function,
      variables)`; the second is compiled once for all values of `variables`, so a monitor that is
      called again during training should use it.
    images: (N, H, W, C) uint8, the whole set on every process.
    batch_size: images a step, over all devices together; rounded up to a multiple of the mesh's
      size.
    mesh: a mesh with the axis 'data', over which a batch is split; None computes on the default
      device.
  Returns:
    (N, F) float32, on the host of every process.
  Raises:
    UserError: images that are not (N, H, W, C) uint8, an empty set, a batch size below 1, or
      features that are not (B, F).
  """
  images = np.asarray(images)
  _check_images(images)
  if batch_size < 1:
    raise UserError(f'batch_size is {batch_size}, expected at least 1')
  if not isinstance(apply_fn, jax.tree_util.Partial):
    apply_fn = jax.tree_util.Partial(apply_fn)
  num_devices = 1
  if mesh is not None:
    num_devices = mesh.shape['data']
    apply_fn = jax.device_put(apply_fn, NamedSharding(mesh, PartitionSpec()))
  batch_size = -(-min(batch_size, len(images)) // num_devices) * num_devices

  features = []
  for start in range(0, len(images), batch_size):
    batch = images[start : start + batch_size]
    missing = batch_size - len(batch)
    batch = np.pad(batch, ((0, missing), (0, 0), (0, 0), (0, 0)))  # one shape, so one compilation
    if mesh is not None:
      batch = devices.shard(mesh, batch, PartitionSpec('data'))
    features.append(_apply(apply_fn, batch))
    if features[-1].ndim != 2:
      raise UserError(
        f'the encoder returned features of shape {features[-1].shape}, expected (batch, F): '
        'pool or flatten them first'
      )
    if len(features) > 1:  # fetched one step late: the device computes while the host copies
      features[-2] = _fetch(features[-2])
  features[-1] = _fetch(features[-1])
  return np.concatenate(features)[: len(images)]


def pixels(images):
  """The images themselves as features, x / 127.5 - 1: (N, H, W, C) uint8 -> (N, H * W * C)
  float32."""
  images = np.asarray(images)
  _check_images(images)
  return images.reshape(len(images), -1).astype(np.float32) / np.float32(127.5) - np.float32(1)


@jax.jit
def _apply(apply_fn, images):
  return apply_fn(images)


def _fetch(features):
  if not features.is_fully_addressable:
    features = multihost_utils.process_allgather(features, tiled=True)
  return np.asarray(features).astype(np.float32)


def _check_images(images):
  if images.ndim != 4 or images.dtype != np.uint8 or not len(images):
    raise UserError(
      f'images are {images.shape} {images.dtype}, expected a non-empty (N, H, W, C) uint8 array'
    )
