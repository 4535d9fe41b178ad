"""Linear softmax heads on frozen features: by L-BFGS on cached features, or by SGD with a new view
of each image an epoch."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize
from flax import struct
from jax.sharding import PartitionSpec as P

from palm_jax.augment import make_augment
from palm_jax.base import devices
from palm_jax.base.errors import NonFiniteError, UserError
from palm_jax.base.metrics import Progress

L2_GRID = tuple(10.0**e for e in range(-6, 3))
VALIDATION_FRACTION = 0.1
MAX_ITERATIONS = 200  # 10 to 90 were used in trials, see `_path`
GRADIENT_TOLERANCE = 1e-5  # scikit-learn's LogisticRegression stops at 1e-4
SCHEDULES = ('cosine', 'step')


@struct.dataclass
class LinearModel:
  """A softmax classifier: logits = (x - mean) / scale @ weight + bias."""

  weight: np.ndarray  # (F, num_classes), on standardised features
  bias: np.ndarray  # (num_classes,)
  mean: np.ndarray  # (F,), of the training features
  scale: np.ndarray  # (F,), their standard deviation; 1 where a feature is constant


def logits(model, x):
  """Logits (N, num_classes) float32 of features x (N, F)."""
  return (np.asarray(x, np.float32) - model.mean) / model.scale @ model.weight + model.bias


def accuracy(model, x, y):
  """Share of the rows of x (N, F) whose largest logit is at label y (N,)."""
  return float(np.mean(logits(model, x).argmax(1) == y))


def logistic_regression(
  train_x, train_y, num_classes, l2_grid=L2_GRID, max_iterations=MAX_ITERATIONS, seed=0
):
  """Multinomial logistic regression whose L2 strength is chosen without looking at any test data.

  Minimises mean cross-entropy + l2 / 2 * |weight|^2 (the bias is free) on features standardised by
  the mean and standard deviation of the rows fitted; scikit-learn's LogisticRegression(C) has the
  same minimum at C = 1 / (l2 * N). The grid is walked from strong to weak, each fit starting from
  the one before, on nine tenths of the rows; the l2 with the highest accuracy on the other tenth
  (the strongest of equals) is refitted on all rows.

  Args:
    train_x: (N, F) features.
    train_y: (N,) integer labels in [0, num_classes), each class at least twice.
    l2_grid: strengths to try, all positive.
    max_iterations: limit of L-BFGS iterations for each strength.
    seed: of the held-out tenth.
  Returns:
    (LinearModel, dict): the model refitted on all rows, and `l2`, `validation_accuracy`, `grid`
    (for each l2, from strong to weak, its validation accuracy, iterations and whether it
    converged), `iterations` and `converged` of the last fit, `n_fit`, `n_validation`.
  Raises:
    UserError: features that are not finite or do not match the labels, labels outside the range,
      fewer than two classes, a class with fewer than two examples, or an empty or non-positive
      grid.
  """
  x, y = checked(train_x, train_y, 'training')
  _check_classes(y, num_classes)
  grid = sorted((float(l2) for l2 in l2_grid), reverse=True)
  if not grid or not all(0 < l2 < np.inf for l2 in grid):
    raise UserError(f'l2_grid is {list(l2_grid)}, expected one or more positive finite numbers')

  fit, held_out = stratified_split(y, VALIDATION_FRACTION, seed)
  tried, models = [], []
  for model, iterations, converged in _path(x[fit], y[fit], num_classes, grid, max_iterations):
    tried.append(
      dict(
        l2=grid[len(tried)],
        validation_accuracy=accuracy(model, x[held_out], y[held_out]),
        iterations=iterations,
        converged=converged,
      )
    )
    models.append(model)
  best = int(
    np.argmax([t['validation_accuracy'] for t in tried])
  )  # the first, so the strongest of equals
  chosen = tried[best]
  [(model, iterations, converged)] = _path(
    x, y, num_classes, [chosen['l2']], max_iterations, start=models[best]
  )
  return model, dict(
    l2=chosen['l2'],
    validation_accuracy=chosen['validation_accuracy'],
    grid=tried,
    iterations=iterations,
    converged=converged,
    n_fit=len(fit),
    n_validation=len(held_out),
  )


def stratified_split(labels, fraction, seed=0):
  """Splits row numbers so that each class gives `fraction` of its rows (rounded, at least one) to
  the second part.

  Args:
    labels: (N,) integers.
    fraction: in (0, 1).
    seed: the split is a function of the labels, the fraction and this number.
  Returns:
    (rest, held_out): sorted int arrays, disjoint, together 0..N-1, each with every class.
  Raises:
    UserError: a class with one example.
  """
  labels = np.asarray(labels)
  generator = np.random.default_rng(seed)
  held_out = np.zeros(len(labels), bool)
  for label in np.unique(labels):
    rows = generator.permutation(np.flatnonzero(labels == label))
    if len(rows) < 2:
      raise UserError(
        f'class {label} has one training example, expected at least two so that one can be held '
        'out: '
        'give more labels'
      )
    held_out[rows[: np.clip(round(fraction * len(rows)), 1, len(rows) - 1)]] = True
  return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def fit_sgd(source, labels, num_classes, c, seeds, mesh, name='head'):
  """Linear softmax heads on frozen features by SGD, one a seed, all of them in one compiled
  program.

  Weights begin as N(0, 0.01), biases at 0 (facebookresearch/simsiam main_lincls.py); an epoch is
  one pass in a new order without the last incomplete batch.

  Args:
    source: (N, F) features; or (features.Encoder, (N, H, W, C) uint8 images), which are augmented
      anew in every epoch.
    labels: (N,) integers in [0, num_classes).
    c: `lr`, `momentum`, `weight_decay`, `batch_size`, `epochs`, `schedule` ('cosine' to 0; 'step':
      a tenth each at 60, 75 and 90%, as alinlab/CSI), `augment` ('none', or what
      palm_jax.augment.make_augment knows).
    seeds: of the heads' weights, orders and augmentations.
    mesh: one-dimensional mesh, axis 'data'.
    name: for the progress line.
  Returns:
    [LinearModel], one a seed, on features as they are (mean 0, scale 1).
  Raises:
    UserError: settings that cannot be, fewer images than devices, or augmentation without images.
    NonFiniteError: it diverges.
  """
  check_sgd(c, name)
  encoder, inputs = source if isinstance(source, tuple) else (None, np.asarray(source, np.float32))
  if encoder is None and c.augment != 'none':
    raise UserError(
      f'{name}: augment={c.augment!r} needs an encoder and images, but these are features: set it '
      "to 'none'"
    )
  seeds, count = list(seeds), len(labels)
  batch = min(c.batch_size, count) // mesh.size * mesh.size
  if not batch:
    raise UserError(
      f'{name}: batch_size={c.batch_size} and {count} images on {mesh.size} devices: expected one '
      'a device or more'
    )
  steps, augment = count // batch, make_augment(c.augment)
  optimizer = sgd(c, steps, nesterov=False)

  def represent(
    variables, inputs, rows, keys
  ):  # (S, b) row numbers and keys of S heads -> (S, b, F)
    if encoder is None:
      return inputs[rows]
    images = augment(keys.reshape(-1), inputs[rows.reshape(-1)])
    return encoder.apply.func(*variables, images).reshape(*rows.shape, -1)

  def update(carry, rows, key, variables, inputs, labels):
    params, state = carry
    ids = jax.lax.axis_index('data') * rows.shape[1] + jnp.arange(rows.shape[1])
    keys = jax.vmap(
      lambda s: jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(key, s), i))(ids)
    )(jnp.asarray(seeds))
    h = jax.lax.stop_gradient(represent(variables, inputs, rows, keys))

    def loss_fn(params):
      weight, bias = jax.lax.pcast(params, 'data', to='varying')
      out = jnp.einsum('sbf,sfk->sbk', h, weight) + bias[:, None]
      losses = jax.lax.pmean(
        optax.softmax_cross_entropy_with_integer_labels(out, labels[rows]).mean(1), 'data'
      )
      return (
        losses.sum(),
        losses,
      )  # the heads share nothing, so the sum's gradient is each one's own

    (_, losses), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    change, state = optimizer.update(grads, state, params)
    return (optax.apply_updates(params, change), state), losses

  def epoch(carry, variables, inputs, labels, rows, keys):
    return jax.lax.scan(
      lambda carry, x: update(carry, *x, variables, inputs, labels), carry, (rows, keys)
    )

  sharded = jax.shard_map(
    epoch, mesh=mesh, in_specs=(P(), P(), P(), P(), P(None, None, 'data'), P()), out_specs=P()
  )
  epoch = jax.jit(sharded, donate_argnums=0)
  variables = encoder.apply.args if encoder else ()
  one = np.zeros((1, 1), np.int32), jax.random.split(jax.random.key(0), (1, 1))
  width = jax.eval_shape(represent, variables, inputs, *one).shape[-1]
  weight = np.stack(
    [0.01 * np.random.default_rng(seed).normal(size=(width, num_classes)) for seed in seeds]
  )
  params = weight.astype(np.float32), np.zeros((len(seeds), num_classes), np.float32)
  carry = devices.replicate(mesh, (params, optimizer.init(params)))
  fixed = devices.replicate(mesh, (variables, inputs, np.asarray(labels, np.int32)))
  progress = Progress(name, c.epochs, 'epochs')
  for i in range(c.epochs):
    rows = np.stack(
      [np.random.default_rng([seed, i]).permutation(count)[: steps * batch] for seed in seeds]
    )
    rows = rows.reshape(len(seeds), steps, batch).swapaxes(0, 1).astype(np.int32)
    rows = devices.shard(mesh, rows, P(None, None, 'data'))
    keys = jax.random.split(
      jax.random.fold_in(jax.random.key(0), i), steps
    )  # the seed enters at each draw
    carry, losses = epoch(carry, *fixed, rows, keys)
    losses = np.asarray(losses.mean(0))
    if not np.isfinite(losses).all():
      raise NonFiniteError(
        f'{name}: the loss became {losses[~np.isfinite(losses)][0]} in epoch {i + 1}: lower '
        f'lr={c.lr}'
      )
    progress.update(i + 1, dict(loss=losses.mean()))
  weights, biases = jax.device_get(carry[0])
  zeros = np.zeros(width, np.float32)
  return [LinearModel(w, b, zeros, zeros + 1) for w, b in zip(weights, biases, strict=True)]


def sgd(c, steps_per_epoch, nesterov):
  """optax's SGD with c's learning rate and its schedule, momentum and weight decay; `warmup`, if
  there, is a share of the run."""
  total = c.epochs * steps_per_epoch
  warmup = int(c.get('warmup', 0.0) * total)
  if c.schedule == 'cosine':
    schedule = optax.warmup_cosine_decay_schedule(
      0.0 if warmup else c.lr, c.lr, warmup, max(total, 1)
    )
  else:
    schedule = optax.piecewise_constant_schedule(
      c.lr, {int(share * total): 0.1 for share in (0.6, 0.75, 0.9)}
    )
  return optax.chain(
    optax.add_decayed_weights(c.weight_decay), optax.sgd(schedule, c.momentum or None, nesterov)
  )


def check_sgd(c, name):
  """Raises UserError on settings of `fit_sgd` or `classifier.fit` that cannot be; `name` is their
  section of the config."""
  make_augment(c.augment)
  if c.schedule not in SCHEDULES:
    raise UserError(
      f'{name}.schedule={c.schedule!r} is unknown: choose one of {", ".join(SCHEDULES)}'
    )
  for key, least in dict(batch_size=1, epochs=1, lr=0, momentum=0, weight_decay=0).items():
    if not least <= c[key] < math.inf:
      raise UserError(f'{name}.{key}={c[key]} cannot be: set it to {least} or more')
  if not 0 <= c.get('warmup', 0.0) < 1:
    raise UserError(
      f'{name}.warmup={c.warmup} is no share of the run: set it to 0 or more and below 1'
    )


def checked(features, labels, what):
  """Features as (N, F) float32 and labels as (N,) int32; raises UserError where they do not match
  or are not finite."""
  features, labels = np.asarray(features, np.float32), np.asarray(labels)
  if features.ndim != 2 or labels.shape != features.shape[:1] or not features.size:
    raise UserError(
      f'{what} features are {features.shape} and labels {labels.shape}, '
      'expected (N, F) and (N,) with the same N of at least 1'
    )
  if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
    raise UserError(
      f'{what} labels are {labels.dtype} from {labels.min()}, expected integers from 0'
    )
  finite = np.isfinite(features).all(1)
  if not finite.all():
    raise UserError(
      f'{what} features are NaN or infinite in {np.sum(~finite)} of {len(finite)} rows, first in '
      'row '
      f'{np.argmin(finite)}: check the encoder that made them'
    )
  return features, labels.astype(np.int32)


def _check_classes(labels, num_classes):
  if num_classes < 2:
    raise UserError(f'num_classes is {num_classes}, expected at least 2')
  if labels.max() >= num_classes:
    raise UserError(
      f'a training label is {labels.max()}, expected labels below num_classes = {num_classes}'
    )
  counts = np.bincount(labels, minlength=num_classes)
  if not counts.all():
    raise UserError(
      f'class {np.argmin(counts)} has no training example, expected all {num_classes} classes: '
      'give more labels or set num_classes'
    )


def check_widths(train, test):
  """Raises UserError unless two sets of features have the same width."""
  if train.shape[1] != test.shape[1]:
    raise UserError(
      f'training features have width {train.shape[1]} and test features {test.shape[1]}, '
      'expected the same: use one encoder for both'
    )


def _path(x, y, num_classes, l2_grid, max_iterations, start=None):
  """Yields (LinearModel, iterations, converged) for each l2, each fit starting from the one before.

  L-BFGS runs in the eigenbasis of the features' covariance, each direction scaled by the inverse
  root of Boehning's bound on its curvature, eigenvalue / 2 + l2. The minimum is the same; with
  correlated features, of which collapsed encoders are the extreme, and a weak l2, plain L-BFGS does
  not reach it within MAX_ITERATIONS.
  """
  mean = x.mean(0, dtype=np.float64)
  scale = x.std(0, dtype=np.float64)
  scale[scale <= 1e-6 * np.abs(mean)] = 1  # constant up to float32's rounding
  mean, scale = mean.astype(np.float32), scale.astype(np.float32)
  x = (x - mean) / scale
  eigenvalues, basis = np.linalg.eigh((x.T @ x / np.float32(len(x))).astype(np.float64))
  x = jax.device_put(x @ basis.astype(np.float32))
  y = jax.device_put(y)
  theta = np.zeros((len(basis) + 1, num_classes))  # rows of weights in the eigenbasis, and the bias
  if start is not None:
    theta = np.concatenate([basis.T @ start.weight, start.bias[None]])
  for l2 in l2_grid:
    scaling = np.append(1 / np.sqrt(np.maximum(eigenvalues, 0) / 2 + l2), 1)[:, None]
    theta, iterations, converged = _minimise(x, y, theta, scaling, l2, max_iterations)
    model = LinearModel(
      (basis @ theta[:-1]).astype(np.float32), theta[-1].astype(np.float32), mean, scale
    )
    yield model, iterations, converged


def _minimise(x, y, theta, scaling, l2, max_iterations):
  def objective(flat):
    theta = scaling * flat.reshape(scaling.shape[0], -1)
    losses, gradient = _losses_and_gradient(theta.astype(np.float32), x, y)
    # Averaged in float64: float32's rounding of the mean stalls the line search near the minimum.
    value = np.asarray(losses).mean(dtype=np.float64) + l2 / 2 * np.sum(theta[:-1] ** 2)
    gradient = np.array(gradient, np.float64)
    gradient[:-1] += l2 * theta[:-1]
    return value, (scaling * gradient).ravel()

  found = scipy.optimize.minimize(
    objective,
    (theta / scaling).ravel(),
    jac=True,
    method='L-BFGS-B',
    options=dict(maxiter=max_iterations, ftol=1e-9, gtol=GRADIENT_TOLERANCE),
  )
  return scaling * found.x.reshape(theta.shape), int(found.nit), bool(found.success)


@jax.jit
def _losses_and_gradient(theta, x, y):
  """Cross-entropy of each row (N,), and the gradient of its mean with respect to theta (F + 1,
  num_classes)."""

  def loss(theta):
    out = jnp.dot(x, theta[:-1], precision=jax.lax.Precision.HIGHEST) + theta[-1]
    losses = optax.softmax_cross_entropy_with_integer_labels(out, y)
    return losses.mean(), losses

  gradient, losses = jax.grad(loss, has_aux=True)(theta)
  return losses, gradient
