"""Features of whole image sets under a frozen encoder: computed once, shared by all who judge."""

import functools
import pathlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import Mesh, PartitionSpec
from ml_collections import ConfigDict

from palm_jax import checkpoint
from palm_jax.base import checks, devices, digests
from palm_jax.base.errors import NonFiniteError, UserError
from palm_jax.base.files import replacing, user_path
from palm_jax.base.metrics import Progress
from palm_jax.base.processes import any_process, is_first
from palm_jax.base.signals import raise_if_interrupted
from palm_jax.encoder import make_encoder


def default_config() -> ConfigDict:
  """Where features come from and go to."""
  return ConfigDict(
    dict(
      # .npz of another encoder's features, judged beside ours: train_features, test_features and
      # ood_<set>
      path='',
      batch_size=512,  # images a step over all devices
      # where features are kept, named by what they are of; '': <workdir>/features. A study's runs
      # share one
      folder='',
    )
  )


RANGES = dict(batch_size=checks.Range(1, 10**6))


class Encoder(NamedTuple):
  """A frozen encoder and where it comes from.

  Attributes:
    name: of it in results.
    apply: jax.tree_util.Partial(function, variables), images (B, H, W, C) -> (B, F), batch
      statistics fixed; None where only features are known.
    sha256: of variables and settings.
    about: for protocols.
  """

  name: str
  apply: Any
  sha256: str
  about: dict[str, Any]


def load_encoder(
  config: ConfigDict, workdir: pathlib.Path, image_shape: tuple[int, int, int]
) -> Encoder:
  """The encoder of the workdir's newest pretraining checkpoint.

  Args:
    config: the whole config; its section encoder is read.
    image_shape: (H, W, C) of the images that it shall see.

  Raises:
    UserError: no encoder in the workdir, or one for other images.
  """
  _, variables, step = checkpoint.load_encoder(workdir)
  shapes = lambda tree: {name: np.shape(leaf) for name, leaf in _named_leaves(tree).items()}
  there, wanted = shapes(variables), shapes(jax.eval_shape(_init(config, image_shape)))
  differ = [name for name, shape in wanted.items() if there.get(name) != shape]
  if differ:
    raise UserError(
      f'the encoder of {workdir} does not take images of shape {image_shape}: {differ[0]} is '
      f'{there.get(differ[0], "absent")}; give the data it was pretrained for'
    )
  return _make(config, 'PALM encoder', variables, dict(checkpoint_step=step))


def untrained_encoder(config: ConfigDict, image_shape: tuple[int, int, int]) -> Encoder:
  """The same network with the weights that config.seed draws."""
  variables = jax.device_get(devices.jit_once(_init(config, image_shape))())
  return _make(config, 'untrained encoder', variables, dict(weights_seed=config.seed))


def _init(config, image_shape):
  return lambda: make_encoder(config.encoder).init(
    jax.random.key(config.seed), jnp.zeros((1, *image_shape)), train=False
  )


def _make(config, name, variables, about):
  apply = _frozen(make_encoder(config.encoder))
  sha256 = digests.digest(variables, config.encoder.to_dict())
  about = dict(about, layer='h, batch statistics fixed')
  return Encoder(name, jax.tree_util.Partial(apply, variables), sha256, about)


@functools.lru_cache
def _frozen(network):
  # One function of equal networks, which are then compiled once.
  return functools.partial(network.apply, train=False)


def _named_leaves(tree):
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def assert_frozen(before: Any, after: Any) -> None:
  """Raises AssertionError, naming the leaf, unless two trees of variables are bit-identical.

  Args:
    before: parameters and batch statistics as they were, copied to the host (`jax.device_get`)
      before the probe.
    after: the same tree after it.
  """
  old, new = _named_leaves(before), _named_leaves(after)
  unmatched = sorted(old.keys() ^ new.keys())
  if unmatched:
    raise AssertionError(f'{unmatched[0]} is in one tree only: the encoder was not frozen')
  for name in old:
    was, now = np.asarray(old[name]), np.asarray(new[name])
    if (was.shape, was.dtype) != (now.shape, now.dtype) or was.tobytes() != now.tobytes():
      raise AssertionError(f'{name} changed: the encoder was not frozen')


def check_finite(h: np.ndarray, what: str, advice: str) -> None:
  """Raises NonFiniteError where rows of features (N, F) hold NaN or infinity."""
  finite = np.isfinite(h).all(1)
  if not finite.all():
    raise NonFiniteError(
      f'{what} are NaN or infinite in {np.sum(~finite)} of {len(h)} rows, first in row '
      f'{np.argmin(finite)}: {advice}'
    )


def folder_of(config: ConfigDict, workdir: pathlib.Path) -> pathlib.Path:
  """Where features are kept: config.features.folder, or that of the workdir."""
  return user_path(config.features.folder or pathlib.Path(workdir) / 'features')


def cached(
  encoder: Encoder, images: np.ndarray, folder: pathlib.Path, mesh: Mesh, batch_size: int = 512
) -> np.ndarray:
  """`extract`, once for an encoder and its images.

  They are kept in a folder, in a file named by digests of both.

  Raises:
    UserError: a file there holds features of another encoder or other images; and what `extract`
      raises.
  """
  images = np.asarray(images)
  _check_images(images)
  shape = np.frombuffer(repr(images.shape).encode(), np.uint8)
  about = dict(encoder_sha256=encoder.sha256, images_sha256=digests.of_arrays(shape, images))
  path = pathlib.Path(folder) / f'{about["encoder_sha256"][:12]}_{about["images_sha256"][:12]}.npz'
  if any_process(path.exists()):
    h = _read(path, about)
    if h is not None:
      return h
  h = extract(encoder.apply, images, batch_size, mesh)
  if is_first():
    with replacing(path) as file:
      saved: dict[str, Any] = dict(about, features=h, features_sha256=digests.of_arrays(h))
      np.savez(file, **saved)
  return h


def _read(path, about):
  """Features of a file of `cached`, None of a damaged one; UserError where it is of others."""
  damage = None
  try:
    with np.load(path) as file:
      h = file['features']
      saved = {name: str(file[name]) for name in (*about, 'features_sha256')}
    if digests.of_arrays(h) != saved.pop('features_sha256'):
      raise ValueError('its digest differs')
  except Exception as e:  # numpy and zipfile raise a dozen kinds on damage
    raise_if_interrupted(e)
    damage = e
  if any_process(damage):  # all together, as they compute together
    reason = damage or 'another process says why'
    logging.warning('%s: damaged (%s), computed again', path, reason)
    return None
  for name, value in about.items():
    if saved[name] != value:
      raise UserError(
        f'{path} holds features whose {name} is {saved[name][:12]}..., expected {value[:12]}...: '
        'remove it'
      )
  return h


def extract(
  apply_fn: Callable,
  images: np.ndarray,
  batch_size: int = 512,
  mesh: Mesh | None = None,
  progress: Progress | None = None,
) -> np.ndarray:
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
    progress: in images.

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
  batch_size = whole_batch(batch_size, len(images), mesh)

  def batches():
    for start in range(0, len(images), batch_size):
      batch = images[start : start + batch_size]
      missing = batch_size - len(batch)
      yield np.pad(batch, ((0, missing), (0, 0), (0, 0), (0, 0)))  # one shape: one compilation

  return extract_batches(apply_fn, batches(), len(images), mesh, progress)


def whole_batch(batch_size: int, count: int, mesh: Mesh | None) -> int:
  """The batch size for so many images, rounded up to a multiple of the mesh's size."""
  num_devices = mesh.shape['data'] if mesh else 1
  return -(-min(batch_size, count) // num_devices) * num_devices


def extract_batches(
  apply_fn: Callable,
  batches: Iterable[np.ndarray],
  count: int,
  mesh: Mesh | None = None,
  progress: Progress | None = None,
) -> np.ndarray:
  """As `extract`, of images that come in batches of one shape; of them the first `count` count."""
  if not isinstance(apply_fn, jax.tree_util.Partial):
    apply_fn = jax.tree_util.Partial(apply_fn)
  if mesh is not None:
    apply_fn = devices.replicate(mesh, apply_fn)
  features, done = [], 0
  for batch in batches:
    done = min(done + len(batch), count)
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
    if progress:
      progress.update(done, {})
  features[-1] = _fetch(features[-1])
  return np.concatenate(features)[:count]


def pixels(images: np.ndarray) -> np.ndarray:
  """The images as features, x / 127.5 - 1: (N, H, W, C) uint8 -> (N, H * W * C) float32."""
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
