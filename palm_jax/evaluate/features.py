"""Features of a whole image set under a frozen encoder: computed once, then shared by every probe."""
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from palm_jax.errors import UserError


def extract(apply_fn, images, batch_size=512, mesh=None):
  """Features of `images`, in their order.

  Args:
    apply_fn: images (B, H, W, C) uint8 -> features (B, F), with its variables frozen and batch normalisation in
      evaluation mode. Either a plain function or `jax.tree_util.Partial(function, variables)`; the second is compiled
      once for all values of `variables`, so a monitor that is called again during training should use it.
    images: (N, H, W, C) uint8, the whole set on every process.
    batch_size: images a step, over all devices together; rounded up to a multiple of the mesh's size.
    mesh: a mesh with the axis 'data', over which a batch is split; None computes on the default device.
  Returns:
    (N, F) float32, on the host of every process.
  Raises:
    UserError: images that are not (N, H, W, C) uint8, an empty set, a batch size below 1, or features that are not
      (B, F).
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
    batch = images[start:start + batch_size]
    missing = batch_size - len(batch)
    batch = np.pad(batch, ((0, missing), (0, 0), (0, 0), (0, 0)))  # one shape, so one compilation
    if mesh is not None:
      sharding = NamedSharding(mesh, PartitionSpec('data'))
      batch = jax.make_array_from_callback(batch.shape, sharding, lambda index, batch=batch: batch[index])
    features.append(_apply(apply_fn, batch))
    if features[-1].ndim != 2:
      raise UserError(f'the encoder returned features of shape {features[-1].shape}, expected (batch, F): '
                      'pool or flatten them first')
    if len(features) > 1:  # fetched one step late: the device computes while the host copies
      features[-2] = _fetch(features[-2])
  features[-1] = _fetch(features[-1])
  return np.concatenate(features)[:len(images)]


def pixels(images):
  """The images themselves as features, x / 127.5 - 1: (N, H, W, C) uint8 -> (N, H * W * C) float32."""
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
    raise UserError(f'images are {images.shape} {images.dtype}, expected a non-empty (N, H, W, C) uint8 array')
