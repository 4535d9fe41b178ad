"""How much of the labels an encoder's features hold: linear probes, a nearest-neighbour vote, and
what labels alone give.

No setting is chosen on test images: L-BFGS chooses its L2 strength on a held-out tenth of the
training images, the other methods choose nothing, and the test images are read once, at the end.
probe.split='validation' leaves them alone altogether.
"""

import functools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from palm_jax.base import devices
from palm_jax.base.errors import UserError
from palm_jax.base.tables import aligned, protocol_line
from palm_jax.data.arrays import Split
from palm_jax.data.load import load as load_data
from palm_jax.evaluate import classifier, corruptions, features, linear
from palm_jax.job import Job, Run

KNN_K = 200  # PatrickHua/SimSiam tools/knn_monitor.py; lightly's benchmarks
KNN_TEMPERATURE = 0.1  # the same
# lbfgs, knn: cached features of clean images; sgd: augmented anew in every epoch, encoder frozen;
# finetune: the encoder, too; supervised: the same from random weights.
METHODS = ('lbfgs', 'knn', 'sgd', 'finetune', 'supervised')
FEW = 0.1  # up to this share of labels several draws are made


def default_config():
  supervised = classifier.default_config()
  return ConfigDict(
    dict(
      methods=('sgd', 'lbfgs', 'knn'),  # see METHODS
      split='test',  # 'validation': a tenth of the training images instead, to choose settings with
      pixels=True,  # raw pixels as features, for lbfgs and knn
      label_fractions=(1.0,),  # of the training labels: stratified and nested
      label_draws=3,  # at fractions up to 0.1
      coarse=False,  # CIFAR-100's 20 superclasses, beside its 100 classes
      corruptions=(),  # of test images: 'salt_pepper:SHARE', 'downsample:PIXELS'
      sgd=dict(
        lr=30.0,
        momentum=0.9,
        weight_decay=0.0,
        batch_size=256,
        epochs=100,
        schedule='cosine',
        augment='crop_flip',
      ),  # PatrickHua/SimSiam configs/simsiam_cifar_eval_sgd.yaml
      finetune=supervised,
      supervised=supervised.copy_and_resolve_references(),
    )
  )


def check(config, num_devices):
  """Raises UserError on settings of the whole config's section `probe` that cannot work."""
  features.check_single_pictures(config, 'probe')
  c = config.probe
  for method in c.methods:
    if method not in METHODS:
      raise UserError(f'probe.methods has {method!r}: choose some of {", ".join(METHODS)}')
  if not c.methods:
    raise UserError(f'probe.methods is empty: choose some of {", ".join(METHODS)}')
  if c.split not in ('test', 'validation'):
    raise UserError(f"probe.split={c.split!r} is unknown: choose 'test' or 'validation'")
  if not c.label_fractions or not all(0 < fraction <= 1 for fraction in c.label_fractions):
    raise UserError(
      f'probe.label_fractions={tuple(c.label_fractions)}: expected one or more shares in (0, 1]'
    )
  if c.label_draws < 1:
    raise UserError(f'probe.label_draws={c.label_draws} is too small: set it to 1 or more')
  for name in c.corruptions:
    corruptions.check(name)
  for method in ('sgd', 'finetune', 'supervised'):
    if method in c.methods:
      linear.check_sgd(c[method], f'probe.{method}')
      devices.check_divisible(
        f'probe.{method}.batch_size', c[method].batch_size, num_devices, 'devices'
      )


class Source(NamedTuple):
  """Features of all images, by one function."""

  name: str
  train: np.ndarray  # (N, F)
  tests: dict[str, np.ndarray]  # name of the test set ('clean', corruptions) -> (M, F)
  encoder: Any = None  # features.Encoder, where it is one of ours


class Task(NamedTuple):
  """What is to be learned, from which images."""

  labels: str  # 'fine' or 'coarse'
  fraction: float  # of the training labels
  draw: int
  rows: Any  # of the training images: their numbers, or a slice
  train_y: np.ndarray  # labels of those rows
  test_y: np.ndarray
  num_classes: int


def knn_accuracy(train_h, train_y, test_h, test_y, k=KNN_K, temperature=KNN_TEMPERATURE):
  """Accuracy of a vote of the k training features with the largest cosine, weighted by exp(cosine /
  temperature).

  The monitor of PatrickHua/SimSiam (tools/knn_monitor.py) and lightly. k is limited to the number
  of training rows; equal votes go to the smaller label.

  Args:
    train_h, test_h: (N, F) and (M, F) features.
    train_y, test_y: (N,) and (M,) non-negative integer labels.
    temperature: positive; infinity makes all k votes equal.
  Raises:
    UserError: features that are not finite or do not match the labels or each other, k below 1, or
      a temperature that is not positive.
  """
  train_h, train_y = linear.checked(train_h, train_y, 'training')
  test_h, test_y = linear.checked(test_h, test_y, 'test')
  linear.check_widths(train_h, test_h)
  if k < 1 or not temperature > 0:
    raise UserError(
      f'k is {k} and temperature {temperature}, expected k of at least 1 and a temperature above 0'
    )
  predicted = _vote(
    train_h,
    train_y,
    test_h,
    temperature,
    k=min(k, len(train_h)),
    num_classes=int(train_y.max()) + 1,
  )
  return float(np.mean(np.asarray(predicted) == test_y))


@functools.partial(jax.jit, static_argnames=('k', 'num_classes'))
def _vote(train_h, train_y, test_h, temperature, *, k, num_classes):
  normalise = lambda h: h / jnp.maximum(jnp.linalg.norm(h, axis=-1, keepdims=True), 1e-12)
  bank = normalise(train_h)

  def predict(h):  # (F,)
    cosines = jnp.dot(bank, h, precision=jax.lax.Precision.HIGHEST)
    cosines, rows = jax.lax.top_k(cosines, k)
    weights = jnp.exp(
      (cosines - cosines[0]) / temperature
    )  # relative to the largest, which cannot overflow
    return jnp.argmax(
      jnp.dot(
        weights, jax.nn.one_hot(train_y[rows], num_classes), precision=jax.lax.Precision.HIGHEST
      )
    )

  return jax.lax.map(predict, normalise(test_h), batch_size=256)  # (256, N) cosines at a time


def nested_rows(labels, fraction, seed):
  """Sorted row numbers of a stratified share of labels (N,): of each class `fraction`, rounded, two
  at least.

  Those of a smaller fraction with the same seed are among them.
  """
  rows = [
    np.random.default_rng([seed, label]).permutation(np.flatnonzero(labels == label))
    for label in np.unique(labels)
  ]
  return np.sort(
    np.concatenate([of_class[: max(2, round(fraction * len(of_class)))] for of_class in rows])
  )


def make_tasks(c, name, train_y, test_y, num_classes, seed):
  """The tasks of one set of labels: every fraction, and several draws of the small ones."""
  return [
    Task(name, float(fraction), draw, rows, train_y[rows], test_y, num_classes)
    for fraction in c.label_fractions
    for draw in range(c.label_draws if fraction <= FEW else 1)
    for rows in [slice(None) if fraction == 1 else nested_rows(train_y, fraction, seed + draw)]
  ]


def judge(
  source, task, method, seed=0, l2_grid=linear.L2_GRID, k=KNN_K, temperature=KNN_TEMPERATURE
):
  """One row of the results by a method on cached features, 'lbfgs' or 'knn'.

  Returns:
    dict, all of it JSON: who was judged, on what, and what `scored` gives; for lbfgs also the
    report of `linear.logistic_regression`.
  Raises:
    UserError: features or labels that the method cannot take; the message begins with the name of
      the features.
  """
  started = time.perf_counter()
  try:
    train_x, train_y = linear.checked(source.train[task.rows], task.train_y, 'training')
    for test_h in source.tests.values():
      test_x, test_y = linear.checked(test_h, task.test_y, 'test')
      linear.check_widths(train_x, test_x)
      if test_y.max() >= task.num_classes:
        raise UserError(
          f'a test label is {test_y.max()}, expected labels below num_classes = {task.num_classes}'
        )
    if method == 'lbfgs':
      model, report = linear.logistic_regression(
        train_x, train_y, task.num_classes, l2_grid, seed=seed
      )
      accuracy = lambda h: linear.accuracy(model, h, test_y)
    else:
      report = dict(k=min(k, len(train_x)), temperature=float(temperature))
      accuracy = lambda h: knn_accuracy(train_x, train_y, h, test_y, k, temperature)
    shares = {name: accuracy(h) for name, h in source.tests.items()}
  except UserError as error:
    raise UserError(f'{source.name}: {error}') from None
  return scored(source.name, train_x.shape[1], task, method, shares, started, **report)


def scored(name, width, task, method, shares, started, **report):
  """A row: `accuracy` {test set: share of right answers}, `half_width` of the clean one's 95%
  Wilson interval."""
  return dict(
    features=name,
    F=int(width),
    method=method,
    labels=task.labels,
    num_classes=int(task.num_classes),
    fraction=task.fraction,
    draw=task.draw,
    n_train=len(task.train_y),
    n_test=len(task.test_y),
    accuracy=shares,
    half_width=wilson_half_width(shares['clean'], len(task.test_y)),
    seconds=time.perf_counter() - started,
    **report,
  )


def wilson_half_width(share, n):
  """Half the width of the 95% Wilson interval of a share observed in n independent trials."""
  z = 1.959964  # normal quantile at 0.975
  return float(z * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n))


def table(results):
  """The results of `evaluate` as text: a row for each kind of features, method and labels, the
  protocol in one line beneath.

  Several draws of a fraction give one row: their mean, and after +- their standard deviation.
  """
  groups = {}
  for row in results['rows']:
    groups.setdefault((row['features'], row['method'], row['labels'], row['fraction']), []).append(
      row
    )
  tests = list(results['rows'][0]['accuracy'])
  varied = len({key[2:] for key in groups}) > 1
  header = [
    'features',
    'F',
    'method',
    *(['labels'] if varied else []),
    f'{results["protocol"]["split"]} %',
    *(test for test in tests if test != 'clean'),
    'val %',
    'l2',
    'seconds',
  ]
  cells, notes = [header], []
  for (name, method, labels, fraction), rows in groups.items():
    shares = {
      test: [100 * row['accuracy'][test] for row in rows if test in row['accuracy']]
      for test in tests
    }
    spread = np.std(shares['clean'], ddof=1) if len(rows) > 1 else 100 * rows[0]['half_width']
    first = rows[0]
    cells.append(
      [
        name,
        str(first['F']),
        method,
        *([f'{labels} {fraction:.0%}'] if varied else []),
        f'{np.mean(shares["clean"]):.2f} +- {spread:.2f}',
        *(
          f'{np.mean(shares[test]):.2f}' if shares[test] else '-'
          for test in tests
          if test != 'clean'
        ),
        f'{100 * np.mean([row["validation_accuracy"] for row in rows]):.2f}'
        if 'validation_accuracy' in first
        else '-',
        f'{first["l2"]:.0e}' if 'l2' in first else '-',
        f'{sum(row["seconds"] for row in rows):.1f}',
      ]
    )
    for row in rows:
      if not row.get('converged', True):
        notes.append(
          f'{name}: L-BFGS stopped after {row["iterations"]} iterations before it converged'
        )
  return '\n'.join([*aligned(cells), *notes, protocol_line(results['protocol'])])


def run(this: Run) -> dict:
  """The job: probes the workdir's newest encoder beside the same encoder untrained, raw pixels, and
  other references.

  Writes `<workdir>/results/probe.json`; features and trained classifiers stay in the workdir for
  the next job.

  Args:
    config: the whole config; read are seed, data, encoder, features and probe.
    workdir: pathlib.Path of a run with a checkpoint of its pretraining.
    dataset: palm_jax.data.arrays.Data.
    mesh: one-dimensional mesh, axis 'data'.
  Returns:
    The dict that was written: `rows`, see `judge`; `protocol`; `seconds`.
  Raises:
    UserError: no encoder in the workdir, images unlike those that it was trained on, or settings
      that cannot be.
  """
  config, workdir, dataset, mesh = this.config, this.workdir, this.data, this.mesh
  started, c = time.monotonic(), config.probe
  train, test = dataset.train, dataset.test
  shape = train.images.shape[1:]
  encoders = [
    features.load_encoder(config, workdir, shape),
    features.untrained_encoder(config, shape),
  ]
  before = jax.tree.map(np.copy, [encoder.apply.args for encoder in encoders])
  label_sets = {'fine': (train.labels, test.labels, len(dataset.class_names))}
  if c.coarse:
    coarse = load_data(config.data.name, data_dir=config.data.dir or None, label_set='coarse')
    label_sets['coarse'] = coarse.train.labels, coarse.test.labels, len(coarse.class_names)
  if c.split == 'validation':  # from here on the tenth is called test
    rest, held_out = linear.stratified_split(train.labels, linear.VALIDATION_FRACTION, config.seed)
    take = lambda split, rows: split._replace(images=split.images[rows], labels=split.labels[rows])
    train, test = take(train, rest), take(train, held_out)
    label_sets = {name: (y[rest], y[held_out], count) for name, (y, _, count) in label_sets.items()}
  test_images = {
    'clean': test.images,
    **{name: corruptions.corrupt(name, test.images, config.seed) for name in c.corruptions},
  }
  tasks = [
    task
    for name, labels in label_sets.items()
    for task in make_tasks(c, name, *labels, config.seed)
  ]

  sources = []
  for encoder in encoders:
    h = functools.partial(
      features.cached,
      encoder,
      folder=features.folder_of(config, workdir),
      mesh=mesh,
      batch_size=config.features.batch_size,
    )
    sources.append(
      Source(
        encoder.name,
        h(train.images),
        {name: h(images) for name, images in test_images.items()},
        encoder,
      )
    )
  foreign = features.load_foreign(
    config, dict(train=len(dataset.train.labels), test=len(dataset.test.labels))
  )
  if foreign and c.split == 'validation':
    foreign = dict(train=foreign['train'][rest], test=foreign['train'][held_out])
  if foreign:
    sources.append(Source('foreign features', foreign['train'], {'clean': foreign['test']}))
  if c.pixels:
    flat = {name: features.pixels(images) for name, images in test_images.items()}
    sources.append(Source('pixels', features.pixels(train.images), flat))

  rows = []
  for method in c.methods:
    for task in tasks:
      if method in ('lbfgs', 'knn'):
        rows += [judge(source, task, method, config.seed) for source in sources]
      elif method == 'sgd':
        rows += [
          _judge_sgd(source, task, train.images, config, mesh)
          for source in sources
          if source.encoder
        ]
      else:
        rows.append(
          _judge_end_to_end(method, encoders[0], task, train, test_images, config, workdir, mesh)
        )
      for row in rows[-len(sources) :]:
        logging.info(
          'probe: %s, %s, %s %.0f%%: %.2f%%',
          row['features'],
          method,
          task.labels,
          100 * task.fraction,
          100 * row['accuracy']['clean'],
        )
  features.assert_frozen(before, [encoder.apply.args for encoder in encoders])

  results = dict(
    job='probe',
    rows=rows,
    protocol=dict(
      data=dataset.source,
      split=c.split,
      n_train=len(train.labels),
      n_test=len(test.labels),
      seed=int(config.seed),
      **encoders[0].about,
      encoder_sha256=encoders[0].sha256,
      **({'foreign_features': config.features.path} if foreign else {}),
      images='not augmented',
      lbfgs='multinomial logistic regression on cached features, mean cross-entropy + l2/2 '
      '|weight|^2',
      solver='L-BFGS (scipy), preconditioned, strong to weak l2 with warm starts',
      max_iterations=linear.MAX_ITERATIONS,
      gradient_tolerance=linear.GRADIENT_TOLERANCE,
      standardisation='per feature by training mean and standard deviation',
      l2_grid=sorted(linear.L2_GRID),
      l2_selection='accuracy on a held-out stratified tenth of train, strongest of equals; '
      'refitted on all of train',
      test='read once, after l2 was chosen',
      knn_k=KNN_K,
      knn_temperature=KNN_TEMPERATURE,
      knn_vote='exp(cosine / temperature)',
      **{
        method: dict(c[method])
        for method in c.methods
        if method in ('sgd', 'finetune', 'supervised')
      },
      interval='95% Wilson half width; standard deviation over draws',
    ),
    **devices.describe(mesh),
    seconds=time.monotonic() - started,
  )
  return results


def _judge_sgd(source, task, images, config, mesh):
  c, started = config.probe.sgd, time.perf_counter()
  of = (source.encoder, images[task.rows]) if c.augment != 'none' else source.train[task.rows]
  name = f'probe: sgd, {source.name}'
  [head] = linear.fit_sgd(of, task.train_y, task.num_classes, c, [config.seed], mesh, name)
  shares = {test: linear.accuracy(head, h, task.test_y) for test, h in source.tests.items()}
  return scored(source.name, source.train.shape[1], task, 'sgd', shares, started)


def _judge_end_to_end(method, pretrained, task, train, test_images, config, workdir, mesh):
  started, start = time.perf_counter(), pretrained if method == 'finetune' else None
  split = Split(train.images[task.rows], task.train_y)
  encoder, head = classifier.fit(
    config, config.probe[method], split, task.num_classes, config.seed, mesh, workdir, method, start
  )
  shares = {
    name: linear.accuracy(
      head, features.extract(encoder.apply, images, config.features.batch_size, mesh), task.test_y
    )
    for name, images in test_images.items()
  }
  name = f'{pretrained.name}, fine-tuned' if start else 'supervised from scratch'
  return scored(name, head.weight.shape[0], task, method, shares, started)


JOB = Job(
  'probe',
  run,
  check,
  check_data=functools.partial(features.check_classes, job='probe'),
  table=table,
  judges=True,
)
