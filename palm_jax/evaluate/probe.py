"""How much of the labels frozen features hold: a linear probe and a nearest-neighbour vote.

The protocol is the deterministic one on cached, un-augmented features: multinomial logistic regression by L-BFGS,
its L2 strength chosen on a held-out tenth of the training set, the test set read once at the end.
"""
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize
from flax import struct

from palm_jax.checkpoint import load_encoder, write_json_atomic
from palm_jax.encoder import make_encoder
from palm_jax.errors import UserError
from palm_jax.evaluate import features

L2_GRID = tuple(10. ** e for e in range(-6, 3))
VALIDATION_FRACTION = 0.1
MAX_ITERATIONS = 200  # 10 to 90 were used in trials, see `_path`
GRADIENT_TOLERANCE = 1e-5  # scikit-learn's LogisticRegression stops at 1e-4
KNN_K = 200  # PatrickHua/SimSiam tools/knn_monitor.py; lightly's benchmarks
KNN_TEMPERATURE = 0.1  # the same


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


def logistic_regression(train_x, train_y, num_classes, l2_grid=L2_GRID, max_iterations=MAX_ITERATIONS, seed=0):
  """Multinomial logistic regression whose L2 strength is chosen without looking at any test data.

  Minimises mean cross-entropy + l2 / 2 * |weight|^2 (the bias is free) on features standardised by the mean and
  standard deviation of the rows fitted; scikit-learn's LogisticRegression(C) has the same minimum at
  C = 1 / (l2 * N). The grid is walked from strong to weak, each fit starting from the one before, on nine tenths of the
  rows; the l2 with the highest accuracy on the other tenth (the strongest of equals) is refitted on all rows.

  Args:
    train_x: (N, F) features.
    train_y: (N,) integer labels in [0, num_classes), each class at least twice.
    l2_grid: strengths to try, all positive.
    max_iterations: limit of L-BFGS iterations for each strength.
    seed: of the held-out tenth.
  Returns:
    (LinearModel, dict): the model refitted on all rows, and `l2`, `validation_accuracy`, `grid` (for each l2, from
    strong to weak, its validation accuracy, iterations and whether it converged), `iterations` and `converged` of the
    last fit, `n_fit`, `n_validation`.
  Raises:
    UserError: features that are not finite or do not match the labels, labels outside the range, fewer than two
      classes, a class with fewer than two examples, or an empty or non-positive grid.
  """
  x, y = _checked(train_x, train_y, 'training')
  _check_classes(y, num_classes)
  grid = sorted((float(l2) for l2 in l2_grid), reverse=True)
  if not grid or not all(0 < l2 < np.inf for l2 in grid):
    raise UserError(f'l2_grid is {list(l2_grid)}, expected one or more positive finite numbers')

  fit, held_out = stratified_split(y, VALIDATION_FRACTION, seed)
  tried, models = [], []
  for model, iterations, converged in _path(x[fit], y[fit], num_classes, grid, max_iterations):
    tried.append(dict(l2=grid[len(tried)], validation_accuracy=accuracy(model, x[held_out], y[held_out]),
                      iterations=iterations, converged=converged))
    models.append(model)
  best = int(np.argmax([t['validation_accuracy'] for t in tried]))  # the first, so the strongest of equals
  chosen = tried[best]
  [(model, iterations, converged)] = _path(x, y, num_classes, [chosen['l2']], max_iterations, start=models[best])
  return model, dict(l2=chosen['l2'], validation_accuracy=chosen['validation_accuracy'], grid=tried,
                     iterations=iterations, converged=converged, n_fit=len(fit), n_validation=len(held_out))


def stratified_split(labels, fraction, seed=0):
  """Splits row numbers so that each class gives `fraction` of its rows (rounded, at least one) to the second part.

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
      raise UserError(f'class {label} has one training example, expected at least two so that one can be held out: '
                      'give more labels')
    held_out[rows[:np.clip(round(fraction * len(rows)), 1, len(rows) - 1)]] = True
  return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def knn_accuracy(train_h, train_y, test_h, test_y, k=KNN_K, temperature=KNN_TEMPERATURE):
  """Accuracy of a vote of the k training features with the largest cosine, weighted by exp(cosine / temperature).

  The monitor of PatrickHua/SimSiam (tools/knn_monitor.py) and lightly. k is limited to the number of training rows;
  equal votes go to the smaller label.

  Args:
    train_h, test_h: (N, F) and (M, F) features.
    train_y, test_y: (N,) and (M,) non-negative integer labels.
    temperature: positive; infinity makes all k votes equal.
  Raises:
    UserError: features that are not finite or do not match the labels or each other, k below 1, or a temperature that
      is not positive.
  """
  train_h, train_y = _checked(train_h, train_y, 'training')
  test_h, test_y = _checked(test_h, test_y, 'test')
  _check_widths(train_h, test_h)
  if k < 1 or not temperature > 0:
    raise UserError(f'k is {k} and temperature {temperature}, expected k of at least 1 and a temperature above 0')
  predicted = _vote(train_h, train_y, test_h, temperature, k=min(k, len(train_h)), num_classes=int(train_y.max()) + 1)
  return float(np.mean(np.asarray(predicted) == test_y))


def run(feature_sets, train_y, test_y, num_classes, *, protocol, l2_grid=L2_GRID, k=KNN_K,
        temperature=KNN_TEMPERATURE, seed=0):
  """Probes several kinds of features of the same images, side by side.

  Args:
    feature_sets: name ('PALM encoder', 'untrained encoder', 'pixels') -> ((N, F) training, (M, F) test features).
    train_y, test_y: (N,) and (M,) integer labels in [0, num_classes).
    protocol: what the caller knows of how the features were made; it must name the source of the images, `data`.
    l2_grid, seed: see `logistic_regression`.
    k, temperature: see `knn_accuracy`.
  Returns:
    dict, all of it JSON: `sets`, name -> `features` (F), `linear` (test and validation accuracy, the 95% half width of
    the test accuracy, and what `logistic_regression` reports), `knn` (test accuracy and half width), `seconds`; and
    `protocol`, the caller's with every setting of this function added.
  Raises:
    UserError: no feature sets, a protocol without `data`, or what the two probes object to.
  """
  if not feature_sets:
    raise UserError('there are no feature sets to probe, expected at least one')
  if 'data' not in protocol:
    raise UserError(f'the protocol names {sorted(protocol)}, expected also `data`: say where the images come from')
  sets = {}
  for name, (train_h, test_h) in feature_sets.items():
    started = time.perf_counter()
    try:
      train_x, train_labels = _checked(train_h, train_y, 'training')
      test_x, test_labels = _checked(test_h, test_y, 'test')
      _check_widths(train_x, test_x)
      if test_labels.max() >= num_classes:
        raise UserError(f'a test label is {test_labels.max()}, expected labels below num_classes = {num_classes}')
      model, linear = logistic_regression(train_x, train_labels, num_classes, l2_grid, seed=seed)
      knn = knn_accuracy(train_x, train_labels, test_x, test_labels, k, temperature)
    except UserError as error:
      raise UserError(f'{name}: {error}') from None
    test = accuracy(model, test_x, test_labels)
    n_test = len(test_labels)
    sets[name] = dict(
        features=train_x.shape[1],
        linear=dict(test_accuracy=test, half_width=wilson_half_width(test, n_test), **linear),
        knn=dict(test_accuracy=knn, half_width=wilson_half_width(knn, n_test)),
        seconds=time.perf_counter() - started)
  settings = dict(
      n_train=len(train_labels), n_fit=linear['n_fit'], n_validation=linear['n_validation'], n_test=n_test,
      num_classes=int(num_classes), seed=int(seed),
      linear='multinomial logistic regression on cached features, mean cross-entropy + l2/2 |weight|^2',
      solver='L-BFGS (scipy), preconditioned, strong to weak l2 with warm starts',
      max_iterations=MAX_ITERATIONS, gradient_tolerance=GRADIENT_TOLERANCE,
      standardisation='per feature by training mean and standard deviation',
      l2_grid=sorted(float(l2) for l2 in l2_grid),
      l2_selection='accuracy on a held-out stratified tenth of train, strongest of equals; refitted on all of train',
      test='read once, after l2 was chosen',
      knn_k=min(k, len(train_labels)), knn_temperature=float(temperature), knn_vote='exp(cosine / temperature)',
      interval='95% Wilson half width')
  return dict(sets=sets, protocol={**protocol, **settings})


def table(results):
  """The results of `run` as text: a row for each feature set, the whole protocol in one line beneath."""
  percent = lambda part: f'{100 * part["test_accuracy"]:.2f} +- {100 * part["half_width"]:.2f}'
  rows = [('features', 'F', 'linear test %', 'linear val %', 'l2', 'kNN test %', 'seconds')]
  notes = []
  for name, result in results['sets'].items():
    linear = result['linear']
    rows.append((name, str(result['features']), percent(linear), f'{100 * linear["validation_accuracy"]:.2f}',
                 f'{linear["l2"]:.0e}', percent(result['knn']), f'{result["seconds"]:.1f}'))
    if not linear['converged']:
      notes.append(f'{name}: L-BFGS stopped after {linear["iterations"]} iterations before it converged')
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
  lines = ['  '.join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths,
                                                                                             strict=True)))
           for row in rows]
  settings = '; '.join(f'{key}={value}' for key, value in results['protocol'].items())
  return '\n'.join([*lines, *notes, f'protocol: {settings}'])


def assert_frozen(before, after):
  """Raises AssertionError, naming the leaf, unless two trees of variables are bit-identical.

  Args:
    before: parameters and batch statistics as they were, copied to the host (`jax.device_get`) before the probe.
    after: the same tree after it.
  """
  leaves = [{jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
            for tree in (before, after)]
  unmatched = sorted(leaves[0].keys() ^ leaves[1].keys())
  if unmatched:
    raise AssertionError(f'{unmatched[0]} is in one tree only: the encoder was not frozen')
  for name, old in leaves[0].items():
    new = leaves[1][name]
    if (old.shape, old.dtype) != (new.shape, new.dtype) or old.tobytes() != new.tobytes():
      raise AssertionError(f'{name} changed: the encoder was not frozen')


def wilson_half_width(share, n):
  """Half the width of the 95% Wilson interval of a share observed in n independent trials."""
  z = 1.959964  # normal quantile at 0.975
  return float(z * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n))


def _path(x, y, num_classes, l2_grid, max_iterations, start=None):
  """Yields (LinearModel, iterations, converged) for each l2, each fit starting from the one before.

  L-BFGS runs in the eigenbasis of the features' covariance, each direction scaled by the inverse root of Boehning's
  bound on its curvature, eigenvalue / 2 + l2. The minimum is the same; with correlated features, of which collapsed
  encoders are the extreme, and a weak l2, plain L-BFGS does not reach it within MAX_ITERATIONS.
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
    model = LinearModel((basis @ theta[:-1]).astype(np.float32), theta[-1].astype(np.float32), mean, scale)
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

  found = scipy.optimize.minimize(objective, (theta / scaling).ravel(), jac=True, method='L-BFGS-B',
                                  options=dict(maxiter=max_iterations, ftol=1e-9, gtol=GRADIENT_TOLERANCE))
  return scaling * found.x.reshape(theta.shape), int(found.nit), bool(found.success)


@jax.jit
def _losses_and_gradient(theta, x, y):
  """Cross-entropy of each row (N,), and the gradient of its mean with respect to theta (F + 1, num_classes)."""
  def loss(theta):
    out = jnp.dot(x, theta[:-1], precision=jax.lax.Precision.HIGHEST) + theta[-1]
    losses = optax.softmax_cross_entropy_with_integer_labels(out, y)
    return losses.mean(), losses
  gradient, losses = jax.grad(loss, has_aux=True)(theta)
  return losses, gradient


@functools.partial(jax.jit, static_argnames=('k', 'num_classes'))
def _vote(train_h, train_y, test_h, temperature, *, k, num_classes):
  normalise = lambda h: h / jnp.maximum(jnp.linalg.norm(h, axis=-1, keepdims=True), 1e-12)
  bank = normalise(train_h)

  def predict(h):  # (F,)
    cosines = jnp.dot(bank, h, precision=jax.lax.Precision.HIGHEST)
    cosines, rows = jax.lax.top_k(cosines, k)
    weights = jnp.exp((cosines - cosines[0]) / temperature)  # relative to the largest, which cannot overflow
    return jnp.argmax(jnp.dot(weights, jax.nn.one_hot(train_y[rows], num_classes), precision=jax.lax.Precision.HIGHEST))

  return jax.lax.map(predict, normalise(test_h), batch_size=256)  # (256, N) cosines at a time


def _checked(features, labels, what):
  """Features as (N, F) float32 and labels as (N,) int32, or a UserError."""
  features, labels = np.asarray(features, np.float32), np.asarray(labels)
  if features.ndim != 2 or labels.shape != features.shape[:1] or not features.size:
    raise UserError(f'{what} features are {features.shape} and labels {labels.shape}, '
                    'expected (N, F) and (N,) with the same N of at least 1')
  if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
    raise UserError(f'{what} labels are {labels.dtype} from {labels.min()}, expected integers from 0')
  finite = np.isfinite(features).all(1)
  if not finite.all():
    raise UserError(f'{what} features are NaN or infinite in {np.sum(~finite)} of {len(finite)} rows, first in row '
                    f'{np.argmin(finite)}: check the encoder that made them')
  return features, labels.astype(np.int32)


def _check_classes(labels, num_classes):
  if num_classes < 2:
    raise UserError(f'num_classes is {num_classes}, expected at least 2')
  if labels.max() >= num_classes:
    raise UserError(f'a training label is {labels.max()}, expected labels below num_classes = {num_classes}')
  counts = np.bincount(labels, minlength=num_classes)
  if not counts.all():
    raise UserError(f'class {np.argmin(counts)} has no training example, expected all {num_classes} classes: '
                    'give more labels or set num_classes')


def _check_widths(train, test):
  if train.shape[1] != test.shape[1]:
    raise UserError(f'training features have width {train.shape[1]} and test features {test.shape[1]}, '
                    'expected the same: use one encoder for both')


def evaluate(config, workdir, dataset, mesh):
  """The job: probes the workdir's newest encoder, the same encoder untrained, and raw pixels; prints the table.

  Writes `<workdir>/results/probe.json`.

  Args:
    config: the whole config.
    workdir: pathlib.Path of a run with a checkpoint of its pretraining.
    dataset: palm_jax.data.Data.
    mesh: one-dimensional mesh, axis 'data'.
  Returns:
    True.
  Raises:
    UserError: no encoder in the workdir, or images unlike those that it was trained on.
  """
  _, variables, step = load_encoder(workdir)
  train, test = dataset.train, dataset.test
  encoder = make_encoder(config.encoder)
  shape = (1, *train.images.shape[1:])
  untrained = jax.device_get(jax.jit(lambda key: encoder.init(key, jnp.zeros(shape), train=False))(jax.random.key(config.seed)))
  shapes = lambda tree: {jax.tree_util.keystr(path): np.shape(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
  differ = [name for name, shape in shapes(untrained).items() if shapes(variables).get(name) != shape]
  if differ:
    raise UserError(f'the encoder of {workdir} does not take images of shape {train.images.shape[1:]} ({dataset.source}): '
                    f'{differ[0]} is {shapes(variables).get(differ[0], "absent")}; give the data it was pretrained for')

  before = jax.tree.map(np.copy, variables)
  apply = functools.partial(encoder.apply, train=False)
  extract = lambda of, split: features.extract(jax.tree_util.Partial(apply, of), split.images, mesh=mesh)
  feature_sets = {name: (extract(of, train), extract(of, test))
                  for name, of in (('PALM encoder', variables), ('untrained encoder', untrained))}
  assert_frozen(before, variables)
  feature_sets['pixels'] = features.pixels(train.images), features.pixels(test.images)
  results = run(feature_sets, train.labels, test.labels, len(dataset.class_names), seed=config.seed, protocol=dict(
      data=dataset.source, checkpoint_step=step, layer='h, batch normalisation in eval mode, frozen', images='not augmented'))
  if jax.process_index() == 0:
    print(table(results), flush=True)
    write_json_atomic(workdir / 'results' / 'probe.json', results)
  return True
