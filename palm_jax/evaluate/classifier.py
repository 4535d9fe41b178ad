"""Image classifiers trained end to end by SGD: from scratch, or from a pretrained encoder."""

import functools
import math
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from palm_jax.augment import make_augment
from palm_jax.base import devices, digests
from palm_jax.base.checkpoints import Checkpoints
from palm_jax.base.errors import NonFiniteError, UserError
from palm_jax.base.metrics import Progress
from palm_jax.base.processes import any_process
from palm_jax.data.arrays import Split
from palm_jax.encoder import make_encoder
from palm_jax.evaluate import features, sgd
from palm_jax.evaluate.linear import LinearModel, plain_model

STEPS_PER_CALL = 64  # at most: progress is shown between two calls


def default_config() -> ConfigDict:
  """OpenOOD's recipe for CIFAR.

  configs/pipelines/train/baseline.yml, configs/preprocessors/base_preprocessor.yml.
  """
  return ConfigDict(
    dict(
      lr=0.1,
      momentum=0.9,
      weight_decay=5e-4,
      batch_size=128,
      epochs=100,
      schedule='cosine',
      warmup=0.0,
      augment='shift_flip',
      checkpoint_minutes=5.0,
    )
  )


class Classifier(nn.Module):
  """An encoder and a linear layer: images (B, H, W, C) -> logits (B, num_classes)."""

  encoder: nn.Module
  num_classes: int

  def setup(self):
    self.head = nn.Dense(self.num_classes)

  def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
    return self.head(self.encoder(images, train))


def fit(
  config: ConfigDict,
  c: ConfigDict,
  split: Split,
  num_classes: int,
  seed: int,
  mesh: Mesh,
  workdir: pathlib.Path,
  name: str,
  start: features.Encoder | None = None,
) -> tuple[features.Encoder, LinearModel]:
  """Trains config.encoder and a linear head, or reads what the same call left in the workdir.

  A killed training resumes from its last saved epoch (every c.checkpoint_minutes). The folder is
  named by a digest of all that makes the result: settings, seed, images, labels and start.

  Args:
    config: the whole config; its section encoder is read.
    c: see `default_config`; `warmup` is the share of the run in which the rate rises.
    split: labels in [0, num_classes).
    seed: of the weights, the order and the augmentation.
    mesh: one-dimensional mesh, axis 'data'.
    name: of its folder and in progress lines.
    start: what to fine-tune; None draws the weights.

  Raises:
    UserError: invalid settings, fewer than two classes, or fewer images than devices.
    NonFiniteError: the training diverges.
  """
  if num_classes < 2:
    raise UserError(
      f'{name} learns from labels, but the data have one class: give labelled data of two classes '
      'or more'
    )
  settings = dict(
    c.to_dict(),
    encoder=config.encoder.to_dict(),
    seed=seed,
    num_classes=num_classes,
    start=start.sha256 if start else 'random weights',
    data_sha256=digests.of_arrays(split.images, split.labels),
  )
  network = Classifier(make_encoder(config.encoder), num_classes)
  variables = _initial(network, split.images.shape[1:], seed, mesh, start)
  folder = workdir / 'classifiers' / f'{name}_{digests.json_digest(settings)[:12]}'
  with Checkpoints(folder, keep=1) as checkpoints:
    in_step = Classifier(make_encoder(config.encoder, 'data'), num_classes)
    variables = train(in_step, variables, c, split, seed, mesh, name, checkpoints)
  variables = jax.device_get(variables)
  of_encoder = {part: tree['encoder'] for part, tree in variables.items()}
  encoder = features.Encoder(
    name,
    jax.tree_util.Partial(functools.partial(network.encoder.apply, train=False), of_encoder),
    digests.digest(of_encoder, config.encoder.to_dict()),
    dict(
      network=f'{config.encoder.name} trained end to end on the labels of these training images',
      **settings,
    ),
  )
  head = variables['params']['head']
  return encoder, plain_model(head['kernel'], head['bias'])


def _initial(network, image_shape, seed, mesh, start):
  """A classifier's variables on the mesh, its encoder's those of `start` where there is one."""

  def init(key, encoder):
    variables = network.init(key, jnp.zeros((1, *image_shape)))
    if encoder:
      variables = {part: {**tree, 'encoder': encoder[part]} for part, tree in variables.items()}
    return variables

  init = jax.jit(init, out_shardings=NamedSharding(mesh, P()))
  return init(jax.random.key(seed), start.apply.args[0] if start else None)


def train(
  network: Classifier,
  variables: Any,
  c: ConfigDict,
  split: Split,
  seed: int,
  mesh: Mesh,
  name: str,
  checkpoints: Checkpoints | None = None,
) -> Any:
  """SGD on all of a classifier's variables -> the variables. Arguments and errors as in `fit`.

  An epoch is a pass in a new order without the last incomplete batch, in compiled calls of at most
  STEPS_PER_CALL updates.
  """
  sgd.check(c, name)
  images, labels = split.images, split.labels.astype(np.int32)
  batch = min(c.batch_size, len(images)) // mesh.size * mesh.size
  if not batch:
    raise UserError(
      f'{name}: batches of {c.batch_size} from {len(images)} images on {mesh.size} devices: need '
      'one a device'
    )
  calls = -(-(len(images) // batch) // STEPS_PER_CALL)
  steps, augment = len(images) // batch // calls, make_augment(c.augment)
  optimizer = sgd.make_optimizer(c, calls * steps, nesterov=True)

  def update(carry, inputs, images, labels):
    variables, state = carry
    rows, key = inputs
    ids = jax.lax.axis_index('data') * len(rows) + jnp.arange(len(rows))
    x = augment(jax.vmap(lambda i: jax.random.fold_in(key, i))(ids), images[rows])

    def loss_fn(params):
      params = jax.lax.pcast(params, 'data', to='varying')  # at once: one all-reduce a parameter
      logits, updated = network.apply(
        {**variables, 'params': params}, x, True, mutable=['batch_stats']
      )
      losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows])
      return jax.lax.pmean(losses.mean(), 'data'), updated

    (loss, updated), grads = jax.value_and_grad(loss_fn, has_aux=True)(variables['params'])
    change, state = optimizer.update(grads, state, variables['params'])
    return ({**updated, 'params': optax.apply_updates(variables['params'], change)}, state), loss

  def call(carry, images, labels, rows, keys):
    return jax.lax.scan(lambda carry, x: update(carry, x, images, labels), carry, (rows, keys))

  sharded = jax.shard_map(
    call, mesh=mesh, in_specs=(P(), P(), P(), P(None, 'data'), P()), out_specs=P()
  )
  call = jax.jit(sharded, donate_argnums=0)
  carry, done = (
    (
      variables,
      jax.jit(optimizer.init, out_shardings=NamedSharding(mesh, P()))(variables['params']),
    ),
    0,
  )
  restored = checkpoints.restore({'classifier': carry}) if checkpoints else None
  if restored:
    carry, done = restored.items['classifier'], restored.step
    logging.info('%s: epoch %d of %s', name, done, checkpoints.folder)
  images, labels = devices.replicate(mesh, (images, labels))
  progress, saved = Progress(name, c.epochs * calls * steps * batch, 'images'), time.monotonic()
  for epoch in range(done, c.epochs):
    order = np.random.default_rng([seed, epoch]).permutation(len(images))[: calls * steps * batch]
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), epoch), (calls, steps))
    for i, rows in enumerate(order.reshape(calls, steps, batch).astype(np.int32)):
      carry, losses = call(
        carry, images, labels, devices.shard(mesh, rows, P(None, 'data')), keys[i]
      )
      loss = float(losses.mean())
      if not math.isfinite(loss):
        raise NonFiniteError(
          f'{name}: the loss became {loss} in epoch {epoch + 1}: lower lr={c.lr}'
        )
      progress.update(((epoch * calls + i + 1) * steps) * batch, dict(loss=loss))
    due = time.monotonic() - saved > 60 * c.checkpoint_minutes
    if checkpoints and any_process(due or epoch + 1 == c.epochs):
      checkpoints.save(epoch + 1, {'classifier': carry}, dict(loss=loss))
      saved = time.monotonic()
  return carry[0]
