"""SGD for classifiers, and linear softmax heads trained by it on a frozen encoder's features.

Heads may see a new view of each image in every epoch.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from palm_jax.augment import make_augment
from palm_jax.base import checks, devices
from palm_jax.base.errors import NonFiniteError, UserError
from palm_jax.base.metrics import Progress
from palm_jax.evaluate.features import Encoder
from palm_jax.evaluate.linear import LinearModel, plain_model

SCHEDULES = ('cosine', 'step')

RANGES = dict(
  lr=checks.RATE,
  momentum=checks.SHARE,
  weight_decay=checks.SHARE,
  batch_size=checks.Range(1, 10**6),
  epochs=checks.Range(1, 10**6),
)


def check(c: ConfigDict, name: str, num_devices: int = 1) -> None:
  """Raises UserError on settings that `fit_heads` or `classifier.fit` would refuse.

  Args:
    c: see `fit_heads`.
    name: of their section of the config.
    num_devices: by which a batch must be divisible.
  """
  make_augment(c.augment)
  checks.choice(f'{name}.schedule', c.schedule, SCHEDULES)
  checks.ranges(name, c, RANGES)
  checks.divisible(f'{name}.batch_size', c.batch_size, num_devices, 'devices')
  if not 0 <= c.get('warmup', 0.0) < 1:
    raise UserError(
      f'{name}.warmup={c.warmup} is no share of the run: set it to 0 or more and below 1'
    )


def make_optimizer(
  c: ConfigDict, steps_per_epoch: int, nesterov: bool
) -> optax.GradientTransformation:
  """SGD with c's learning rate and its schedule, momentum and weight decay.

  `warmup`, where c has it, is the share of the run in which the rate rises.
  """
  total = c.epochs * steps_per_epoch
  warmup = int(c.get('warmup', 0.0) * total)
  if c.schedule == 'cosine':
    first = 0.0 if warmup else c.lr
    schedule = optax.warmup_cosine_decay_schedule(first, c.lr, warmup, max(total, 1))
  else:
    drops = {int(share * total): 0.1 for share in (0.6, 0.75, 0.9)}
    schedule = optax.piecewise_constant_schedule(c.lr, drops)
  return optax.chain(
    optax.add_decayed_weights(c.weight_decay), optax.sgd(schedule, c.momentum or None, nesterov)
  )


def check_room(need: float, mesh: Mesh, name: str) -> None:
  """Raises UserError where a device cannot hold training images, or features, of so many bytes."""
  devices.check_fits(
    need,
    mesh,
    f'{name}: the training images, or their features, take',
    "lower data.size, leave the method out, or set its augment to 'none', which takes features",
  )


def fit_heads(
  source: np.ndarray | tuple[Encoder, np.ndarray],
  labels: np.ndarray,
  num_classes: int,
  c: ConfigDict,
  seeds: Sequence[int],
  mesh: Mesh,
  name: str = 'head',
) -> list[LinearModel]:
  """Linear softmax heads on frozen features, one a seed, all in one compiled program.

  Weights begin as N(0, 0.01), biases at 0 (facebookresearch/simsiam main_lincls.py). An epoch is
  one pass in a new order without the last incomplete batch.

  Args:
    source: (N, F) features; or an encoder and (N, H, W, C) uint8 images, which are augmented anew
      in every epoch.
    labels: (N,) integers in [0, num_classes).
    c: `lr`, `momentum`, `weight_decay`, `batch_size`, `epochs`, `schedule` ('cosine' to 0; 'step':
      a tenth each at 60, 75 and 90%, as alinlab/CSI), `augment` ('none', or what
      palm_jax.augment.make_augment knows).
    seeds: of the heads' weights, orders and augmentations.
    mesh: one-dimensional mesh, axis 'data'.
    name: for the progress line.

  Returns:
    One model a seed, on features as they are (mean 0, scale 1).

  Raises:
    UserError: invalid settings, fewer images than devices, or augmentation without images.
    NonFiniteError: it diverges.
  """
  check(c, name)
  encoder, inputs = source if isinstance(source, tuple) else (None, np.asarray(source, np.float32))
  if encoder is None and c.augment != 'none':
    raise UserError(
      f'{name}: augment={c.augment!r} needs an encoder and images, but these are features: '
      "set it to 'none'"
    )
  batch = min(c.batch_size, len(labels)) // mesh.size * mesh.size
  if not batch:
    raise UserError(
      f'{name}: batch_size={c.batch_size} and {len(labels)} images on {mesh.size} devices: '
      'expected one a device or more'
    )
  steps = len(labels) // batch
  optimizer = make_optimizer(c, steps, nesterov=False)
  variables = encoder.apply.args if encoder else ()
  represent = functools.partial(_represent, encoder, make_augment(c.augment))
  params = _initial(seeds, _width(represent, variables, inputs), num_classes)
  carry = devices.replicate(mesh, (params, optimizer.init(params)))
  check_room(inputs.nbytes, mesh, name)
  fixed = devices.replicate(mesh, (variables, inputs, np.asarray(labels, np.int32)))
  epoch = _compile_epoch(represent, optimizer, seeds, mesh)
  progress = Progress(name, c.epochs, 'epochs')
  for i in range(c.epochs):
    rows = devices.shard(mesh, _orders(seeds, i, len(labels), steps, batch), P(None, None, 'data'))
    # The seeds enter where a view is drawn.
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), i), steps)
    carry, losses = epoch(carry, *fixed, rows, keys)
    losses = np.asarray(losses.mean(0))
    if not np.isfinite(losses).all():
      value = losses[~np.isfinite(losses)][0]
      raise NonFiniteError(
        f'{name}: the loss became {value} in epoch {i + 1}: lower lr={c.lr} (--config.probe.sgd.lr '
        'or ood.head.lr); the same --workdir will do'
      )
    progress.update(i + 1, dict(loss=losses.mean()))
  weights, biases = jax.device_get(carry[0])
  return [plain_model(*head) for head in zip(weights, biases, strict=True)]


def _represent(encoder, augment, variables, inputs, rows, keys):
  """Features (S, b, F) of rows (S, b) of the inputs, one batch and one set of keys a head."""
  if encoder is None:
    return inputs[rows]
  images = augment(keys.reshape(-1), inputs[rows.reshape(-1)])
  return encoder.apply.func(*variables, images).reshape(*rows.shape, -1)


def _width(represent, variables, inputs):
  """How many features there are."""
  rows = np.zeros((1, 1), np.int32)
  keys = jax.random.split(jax.random.key(0), (1, 1))
  return jax.eval_shape(represent, variables, inputs, rows, keys).shape[-1]


def _initial(seeds, width, num_classes):
  """Weights (S, F, num_classes) and biases (S, num_classes), float32."""
  shape = width, num_classes
  weights = [0.01 * np.random.default_rng(seed).normal(size=shape) for seed in seeds]
  return np.stack(weights).astype(np.float32), np.zeros((len(seeds), num_classes), np.float32)


def _orders(seeds, epoch, count, steps, batch):
  """(steps, S, batch) int32: the rows of each head's batches in an epoch."""
  orders = [np.random.default_rng([seed, epoch]).permutation(count) for seed in seeds]
  rows = np.stack([order[: steps * batch] for order in orders])
  return rows.reshape(len(seeds), steps, batch).swapaxes(0, 1).astype(np.int32)


def _compile_epoch(
  represent: Callable, optimizer: optax.GradientTransformation, seeds: Sequence[int], mesh: Mesh
) -> Callable[..., Any]:
  """f(carry, variables, inputs, labels, rows, keys) -> carry, losses (steps, S); donates carry."""

  def epoch(carry, variables, inputs, labels, rows, keys):
    fixed = variables, inputs, labels
    step = lambda carry, x: _update(represent, optimizer, seeds, fixed, carry, *x)
    return jax.lax.scan(step, carry, (rows, keys))

  in_specs = P(), P(), P(), P(), P(None, None, 'data'), P()
  sharded = jax.shard_map(epoch, mesh=mesh, in_specs=in_specs, out_specs=P())
  return jax.jit(sharded, donate_argnums=0)


def _update(represent, optimizer, seeds, fixed, carry, rows, key):
  """A step of all heads on rows (S, b), this device's share -> carry, losses (S,)."""
  variables, inputs, labels = fixed
  params, state = carry
  ids = jax.lax.axis_index('data') * rows.shape[1] + jnp.arange(rows.shape[1])
  h = jax.lax.stop_gradient(represent(variables, inputs, rows, _view_keys(key, seeds, ids)))

  def loss_fn(params):
    weight, bias = jax.lax.pcast(params, 'data', to='varying')
    logits = jnp.einsum('sbf,sfk->sbk', h, weight) + bias[:, None]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows])
    losses = jax.lax.pmean(losses.mean(1), 'data')
    return losses.sum(), losses  # the heads share nothing: the sum's gradient is each one's own

  (_, losses), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
  change, state = optimizer.update(grads, state, params)
  return (optax.apply_updates(params, change), state), losses


def _view_keys(key, seeds, ids):
  """(S, b) keys, each of a head's seed and a place in the batch."""
  of_place = lambda seed, i: jax.random.fold_in(jax.random.fold_in(key, seed), i)
  of_head = jax.vmap(of_place, (None, 0))
  return jax.vmap(of_head, (0, None))(jnp.asarray(seeds), ids)
