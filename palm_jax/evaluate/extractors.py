"""What a generator is judged by: Inception, a classifier trained here on the data's own labels, or pixels."""
import functools
import hashlib
import json
import math
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from flax import linen as nn
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from palm_jax import augment, devices
from palm_jax.checkpoint import Checkpoints
from palm_jax.encoder import ResNet18
from palm_jax.errors import NonFiniteError, UserError
from palm_jax.evaluate import features, inception
from palm_jax.metrics import Progress


class Extractor(NamedTuple):
  """A feature function and where it comes from."""
  apply: Callable  # (variables, images (B, H, W, C) uint8) -> (B, F)
  variables: Any  # on every device of the mesh
  about: dict  # for the protocol
  classify: Callable | None = None  # (variables, features (B, F)) -> logits (B, num_classes), where it knows the classes


def make_extractor(config, workdir, data, mesh):
  """The feature function that config.quality.features names; trains or reads the proxy."""
  c = config.quality
  if c.features == 'inception':
    digest = hashlib.sha256(pathlib.Path(c.inception_path).read_bytes()).hexdigest()
    about = dict(network='Inception-v3 2015-12-05, last pool', file=c.inception_path, sha256=digest,
                 resize='299x299, TensorFlow 1 bilinear')
    return Extractor(inception.Inception().apply, devices.replicate(mesh, inception.load(c.inception_path)), about)
  if c.features == 'proxy':
    return proxy(config, workdir, data, mesh)
  flatten = lambda _, images: images.reshape(len(images), -1) / 127.5 - 1
  return Extractor(flatten, {}, dict(network='none: pixels as features'))


class Classifier(nn.Module):
  """ResNet-18 and a linear layer: images (B, H, W, C) -> logits (B, num_classes)."""
  width: int
  num_classes: int
  axis_name: str | None = None

  def setup(self):
    self.encoder = ResNet18(self.width, self.axis_name)
    self.head = nn.Dense(self.num_classes)

  def __call__(self, images, train=False):
    return self.head(self.encoder(images, train))

  def features(self, images):
    return self.encoder(images, False)

  def classify(self, h):
    return self.head(h)


def proxy(config, workdir, data, mesh):
  """Extractor of a classifier trained on the training images and labels, or read from <workdir>/quality/.

  Its folder is named by a digest of all that makes it: settings, seed, images and labels. One killed trains again.

  Raises:
    UserError: a data set of one class, or fewer images than devices.
    NonFiniteError: its training diverges.
  """
  c, num_classes = config.quality, len(data.class_names)
  if num_classes < 2:
    raise UserError('quality.features=proxy learns from labels, but the data have one class: give the Inception file '
                    "(quality.features=inception, quality.inception_path=...), or set quality.features to 'pixels'")
  settings = {name: c[name] for name in c if name.startswith('proxy_')} | dict(
      seed=config.seed, num_classes=num_classes,
      data_sha256=hashlib.sha256(data.train.images.tobytes() + data.train.labels.tobytes()).hexdigest())
  digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
  network = Classifier(c.proxy_width, num_classes)
  init = lambda key: network.init(key, jnp.zeros((1, *data.train.images.shape[1:])))
  template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P())),
                          jax.eval_shape(init, jax.random.key(0)))
  with Checkpoints(workdir / 'quality' / f'proxy_{digest[:12]}', keep=1) as checkpoints:
    restored = checkpoints.restore({'classifier': template})
    if restored:
      logging.info('quality: the proxy encoder of %s', checkpoints.folder)
      variables, about = restored.items['classifier'], restored.metadata
    else:
      variables, steps = train_proxy(c, data, mesh, init, config.seed)
      apply = jax.tree_util.Partial(network.apply, variables)
      predicted = features.extract(apply, data.test.images, c.batch_size, mesh).argmax(1)
      about = dict(network=f'ResNet-18 of width {c.proxy_width}, trained on the labels of these training images', **settings,
                   updates=steps, test_accuracy=float(np.mean(predicted == data.test.labels)))
      checkpoints.save(steps, {'classifier': variables}, about)
  return Extractor(functools.partial(network.apply, method='features'), variables, about,
                   functools.partial(network.apply, method='classify'))


def train_proxy(c, data, mesh, init, seed):
  """Trains the classifier by SGD, one compiled call an epoch -> (variables, updates)."""
  images, labels = data.train.images, data.train.labels.astype(np.int32)
  batch = min(c.proxy_batch_size, len(images) // mesh.size * mesh.size)
  if not batch:
    raise UserError(f'{len(images)} training images on {mesh.size} devices: the proxy needs one a device; take fewer devices')
  steps, colour = len(images) // batch, images.shape[-1] == 3
  schedule = optax.warmup_cosine_decay_schedule(0., c.proxy_lr, c.proxy_epochs * steps // 5, c.proxy_epochs * steps)
  optimizer = optax.chain(optax.add_decayed_weights(c.proxy_weight_decay), optax.sgd(schedule, 0.9, nesterov=True))
  network = Classifier(c.proxy_width, len(data.class_names), 'data')

  def update(carry, inputs, images, labels):
    variables, state = carry
    indices, key = inputs
    x = images[indices] / 127.5 - 1
    if colour:  # left, right and a few pixels mean nothing in photographs, but may in drawn signs
      ids = jax.lax.axis_index('data') * len(indices) + jnp.arange(len(indices))
      x = jax.vmap(shift_and_flip)(jax.vmap(lambda i: jax.random.fold_in(key, i))(ids), x)

    def loss_fn(params):
      params = jax.lax.pcast(params, 'data', to='varying')  # at once: one all-reduce a parameter
      logits, updated = network.apply({**variables, 'params': params}, x, True, mutable=['batch_stats'])
      losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels[indices])
      return jax.lax.pmean(losses.mean(), 'data'), updated

    (loss, updated), grads = jax.value_and_grad(loss_fn, has_aux=True)(variables['params'])
    change, state = optimizer.update(grads, state, variables['params'])
    return ({**updated, 'params': optax.apply_updates(variables['params'], change)}, state), loss

  def epoch(carry, images, labels, indices, key):
    inputs = indices, jax.random.split(key, len(indices))
    return jax.lax.scan(lambda carry, x: update(carry, x, images, labels), carry, inputs)

  epoch = jax.jit(jax.shard_map(epoch, mesh=mesh, in_specs=(P(), P(), P(), P(None, 'data'), P()), out_specs=P()),
                  donate_argnums=0)
  def start(key):
    variables = init(key)
    return variables, optimizer.init(variables['params'])
  key = jax.random.key(seed)
  carry = jax.jit(start, out_shardings=NamedSharding(mesh, P()))(key)
  images, labels = devices.replicate(mesh, (images, labels))
  progress = Progress('quality: proxy encoder', c.proxy_epochs * steps * batch, 'images')
  for i in range(c.proxy_epochs):
    order = np.random.default_rng([seed, i]).permutation(len(images))[:steps * batch].reshape(steps, batch).astype(np.int32)
    order = jax.make_array_from_callback(order.shape, NamedSharding(mesh, P(None, 'data')), lambda at, order=order: order[at])
    carry, losses = epoch(carry, images, labels, order, jax.random.fold_in(key, i))
    loss = float(losses.mean())
    if not math.isfinite(loss):
      raise NonFiniteError(f'quality: the loss of the proxy encoder became {loss} in epoch {i + 1}: lower quality.proxy_lr')
    progress.update((i + 1) * steps * batch, dict(loss=loss))
  return carry[0], c.proxy_epochs * steps


def shift_and_flip(key, image):
  """Moves by up to an eighth of the side, zeros around, and mirrors half of the images. image (H, W, C)."""
  key, key_shift = jax.random.split(key)
  reach = image.shape[0] // 8
  corner = jax.random.randint(key_shift, (2,), 0, 2 * reach + 1)
  padded = jnp.pad(image, ((reach, reach), (reach, reach), (0, 0)))
  return augment.hflip(key, jax.lax.dynamic_slice(padded, (*corner, 0), image.shape))
