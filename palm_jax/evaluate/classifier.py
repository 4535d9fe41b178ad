"""Image classifiers trained end to end by SGD: from scratch, or from a pretrained encoder."""

import contextlib
import functools
import math
import os
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from palm_jax.augment import make_augment
from palm_jax.base import checks, devices, digests
from palm_jax.base.errors import NonFiniteError, UserError
from palm_jax.base.processes import from_first, locked_by_first
from palm_jax.base.training import Training
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


RANGES = dict(sgd.RANGES, warmup=checks.SHARE, checkpoint_minutes=checks.MINUTES)


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

  A killed training is resumed where it last saved (every c.checkpoint_minutes). The folder is
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
  in_step = Classifier(make_encoder(config.encoder, 'data'), num_classes)
  with _alone(folder):
    variables = jax.device_get(train(in_step, variables, c, split, seed, mesh, name, folder))
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


@contextlib.contextmanager
def _alone(folder):
  """Holds a training: two jobs of a workdir may ask for the same, and who waits finds it there."""
  folder.parent.mkdir(parents=True, exist_ok=True)
  path = folder.with_name(f'.{folder.name}.lock')
  if not from_first(os.access(folder.parent, os.W_OK)):  # it is complete, and only read
    yield
    return
  while True:  # all processes meet now and then: none waits too long for the others' devices
    with locked_by_first(path, 60.0) as mine:
      if mine:
        yield
        return


def _initial(network, image_shape, seed, mesh, start):
  """A classifier's variables on the mesh, its encoder's those of `start` where there is one."""

  def init(key, encoder):
    variables = network.init(key, jnp.zeros((1, *image_shape)))
    if encoder:
      variables = {part: {**tree, 'encoder': encoder[part]} for part, tree in variables.items()}
    return variables

  init = devices.jit_once(init, NamedSharding(mesh, P()))
  return init(jax.random.key(seed), start.apply.args[0] if start else None)


class Passes(NamedTuple):
  """How a training goes through its images: `calls` compiled calls an epoch, `steps` updates each.

  An epoch is a pass in a new order, without the last incomplete batch, and without as many more as
  make all calls alike (5 of CIFAR's 390 batches of 128).
  """

  calls: int
  steps: int
  batch: int

  @property
  def images_per_call(self) -> int:
    """How many images a call sees."""
    return self.steps * self.batch


def plan_passes(c: ConfigDict, num_images: int, mesh: Mesh, name: str) -> Passes:
  """Passes over so many images. Raises UserError where there is not one a device."""
  batch = min(c.batch_size, num_images) // mesh.size * mesh.size
  if not batch:
    raise UserError(
      f'{name}: batches of {c.batch_size} from {num_images} images on {mesh.size} devices: need '
      'one a device'
    )
  calls = -(-(num_images // batch) // STEPS_PER_CALL)
  return Passes(calls, num_images // batch // calls, batch)


def check_room(need: float, mesh: Mesh, name: str) -> None:
  """Raises UserError where a device cannot hold training images of so many bytes."""
  remedy = 'lower data.size, or leave out what trains an encoder on labels'
  devices.check_fits(need, mesh, f'{name}: the training images take', remedy)


def train(
  network: Classifier,
  variables: Any,
  c: ConfigDict,
  split: Split,
  seed: int,
  mesh: Mesh,
  name: str,
  folder: pathlib.Path,
) -> Any:
  """SGD on all of a classifier's variables -> the variables.

  Arguments and errors as in `fit`; `folder` holds the checkpoints.

  Raises:
    Stopped: by a signal; everything is saved.
  """
  sgd.check(c, name)
  passes = plan_passes(c, len(split.images), mesh, name)
  check_room(split.images.nbytes, mesh, name)
  optimizer = sgd.make_optimizer(c, passes.calls * passes.steps, nesterov=True)
  call = make_call(network, optimizer, make_augment(c.augment), mesh)
  everywhere = NamedSharding(mesh, P())
  carry = variables, jax.jit(optimizer.init, out_shardings=everywhere)(variables['params'])
  with Training(
    name,
    folder,
    c.epochs * passes.calls,
    unit='images',
    per_step=passes.images_per_call,
    checkpoint_minutes=c.checkpoint_minutes,
    keep=1,
    writes_metrics=False,
  ) as training:
    restored = training.resume({'classifier': carry})
    if restored:
      carry = restored.items['classifier']
      if 'calls' not in restored.metadata:  # older checkpoints count epochs
        training.step *= passes.calls
    training_set = devices.replicate(mesh, (split.images, split.labels.astype(np.int32)))
    while not training.over:
      epoch, i = divmod(training.step, passes.calls)
      rows, keys = call_inputs(seed, epoch, i, len(split.images), passes)
      rows = devices.shard(mesh, rows, P(None, 'data'))
      carry, losses = call(carry, *training_set, rows, keys)
      loss = float(losses.mean())
      if not math.isfinite(loss):
        raise NonFiniteError(
          f'{name}: the loss became {loss} in epoch {epoch + 1}: lower lr={c.lr} (--config.'
          'probe.finetune.lr, probe.supervised.lr or ood.finetune.lr); the same --workdir will do'
        )
      training.advance()
      training.show(dict(loss=loss))
      if training.should_save:
        training.save({'classifier': carry}, loss=loss, calls=passes.calls)
  return carry[0]


def call_inputs(
  seed: int, epoch: int, i: int, num_images: int, passes: Passes
) -> tuple[np.ndarray, jax.Array]:
  """Call i of an epoch: (steps, batch) int32 rows of the training set, and (steps,) keys."""
  shape = passes.calls, passes.steps
  order = np.random.default_rng([seed, epoch]).permutation(num_images)
  rows = order[: passes.calls * passes.images_per_call].reshape(*shape, passes.batch)
  keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), epoch), shape)
  return rows[i].astype(np.int32), keys[i]


def make_call(
  network: Classifier, optimizer: optax.GradientTransformation, augment: Callable, mesh: Mesh
) -> Callable:
  """Updates in one compiled, donated call.

  Returns:
    f((variables, opt_state), images, labels, rows (steps, batch), keys (steps,)) -> the first
    argument after as many updates, (steps,) losses.
  """

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
  return jax.jit(sharded, donate_argnums=0)
