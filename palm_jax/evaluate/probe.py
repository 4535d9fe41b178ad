"""How much of the labels an encoder's features hold.

Linear probes, a nearest-neighbour vote, and what labels alone give. No setting is chosen on test
images: L-BFGS chooses its L2 strength on a held-out tenth of the training images, the other methods
choose nothing, and the test images are read once, at the end. probe.split='validation' leaves them
alone altogether.
"""

import time
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from palm_jax.base import checks, devices, digests
from palm_jax.base.errors import UserError
from palm_jax.base.files import user_path
from palm_jax.base.tables import aligned, protocol_line
from palm_jax.data.arrays import Split
from palm_jax.data.load import load as load_data
from palm_jax.evaluate import (
  classifier,
  corruptions,
  features,
  judge,
  knn,
  linear,
  preconditions,
  sgd,
)
from palm_jax.evaluate.components import pixels_fit, principal_components
from palm_jax.evaluate.foreign import load_foreign
from palm_jax.evaluate.judge import Source
from palm_jax.evaluate.labels import make_tasks, stratified_split
from palm_jax.job import Job, Run

# lbfgs, knn: cached features of clean images; sgd: augmented anew in every epoch, encoder frozen;
# finetune: the encoder, too; supervised: the same from random weights.
METHODS = ('lbfgs', 'knn', 'sgd', 'finetune', 'supervised')
ON_CACHED, BY_SGD = METHODS[:2], METHODS[2:]


def default_config() -> ConfigDict:
  """Methods, and what each does."""
  supervised = classifier.default_config()
  return ConfigDict(
    dict(
      methods=('sgd', 'lbfgs', 'knn'),  # see METHODS
      split='test',  # 'validation': a tenth of the training images instead, to choose settings with
      # raw pixels as features, for lbfgs and knn, and their principal components, as many as the
      # encoder has features, where there are more pixels; of pictures of up to 64x64
      pixels=True,
      # of the training labels: stratified and nested; SGD makes about as many updates
      label_fractions=(1.0,),
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


RANGES = dict(
  label_fractions=checks.SHARE._replace(many=True),
  label_draws=checks.Range(1, 1000),
  sgd=sgd.RANGES,
  finetune=classifier.RANGES,
  supervised=classifier.RANGES,
)


def check(config: ConfigDict, num_devices: int) -> None:
  """Raises UserError on settings of the section `probe` that the job would refuse."""
  preconditions.check_single_pictures(config, 'probe')
  c = config.probe
  checks.choices('probe.methods', c.methods, METHODS)
  checks.choice('probe.split', c.split, ('test', 'validation'))
  if not c.label_fractions or not all(0 < fraction <= 1 for fraction in c.label_fractions):
    raise UserError(
      f'probe.label_fractions={tuple(c.label_fractions)}: expected one or more shares in (0, 1]'
    )
  checks.ranges('probe', c, RANGES)
  for name in c.corruptions:
    corruptions.check(name)
  for method in BY_SGD:
    if method in c.methods:
      sgd.check(c[method], f'probe.{method}', num_devices)


def check_data(this: Run) -> None:
  """Raises UserError where the data have one class, or lbfgs cannot hold out one of each."""
  c = this.config.probe
  preconditions.check_classes(this, 'probe')
  preconditions.check_features_file(this.config)
  held_out = c.split == 'validation'
  if 'lbfgs' in c.methods or held_out:
    preconditions.check_examples(this, 'lbfgs' in c.methods, held_out)
  for name in c.corruptions:
    corruptions.check(name, min(this.data.test.images.shape[1:3]))
  preconditions.check_one_a_device(this, min(c.label_fractions), set(BY_SGD) & set(c.methods))
  need = max(c.label_fractions) * this.data.train.images.nbytes
  for method in {*BY_SGD} & {*c.methods}:
    if method != 'sgd' or c.sgd.augment != 'none':
      check_room = (sgd if method == 'sgd' else classifier).check_room
      check_room(need, this.mesh, f'probe.{method}')


class Images(NamedTuple):
  """What the probes learn from and are tested on."""

  train: Split
  test: Split
  corrupted: dict[str, np.ndarray]  # name -> test images; 'clean' is first
  rest: np.ndarray | slice  # rows of the data's training images that train has
  held_out: np.ndarray | None  # rows of the data's training images that test has, if any


def run(this: Run) -> dict[str, Any]:
  """The job: probes the workdir's newest encoder, and references beside it.

  They are the same encoder untrained, raw pixels, and foreign features. It reads seed, data,
  encoder, features and probe of the config. Features and trained classifiers stay in the workdir
  for the next job.

  Returns:
    `rows`, see judge.py; `protocol`; `seconds`.

  Raises:
    UserError: no encoder in the workdir, images unlike those that it was trained on, or invalid
      settings.
  """
  started, config, data = time.monotonic(), this.config, this.data
  shape = data.train.images.shape[1:]
  encoders = [
    features.load_encoder(config, this.workdir, shape),
    features.untrained_encoder(config, shape),
  ]
  before = jax.tree.map(np.copy, [encoder.apply.args for encoder in encoders])
  images = _images(config, data)
  tasks = _tasks(config, data, images)
  sources = [_encoded(this, encoder, images) for encoder in encoders]
  sources += _others(this, images, sources[0].train.shape[1])
  rows = []
  for method in config.probe.methods:
    for task in tasks:
      found = _rows(this, method, task, sources, images)
      for row in found:
        share, accuracy = 100 * task.fraction, 100 * row['accuracy']['clean']
        line = f'{row["features"]}, {method}, {task.labels} {share:.0f}%: {accuracy:.2f}%'
        logging.info('probe: %s', line)
      rows += found
  features.assert_frozen(before, [encoder.apply.args for encoder in encoders])
  return dict(
    job='probe',
    rows=rows,
    protocol=_protocol(config, data, images, encoders[0]),
    **devices.describe(this.mesh),
    seconds=time.monotonic() - started,
  )


def _images(config, data):
  """Images; with probe.split='validation' a tenth of the training images is called test."""
  train, test = data.train, data.test
  rest, held_out = slice(None), None
  if config.probe.split == 'validation':
    fraction = linear.VALIDATION_FRACTION
    rest, held_out = stratified_split(data.train.labels, fraction, config.seed)
    train, test = _take(data.train, rest), _take(data.train, held_out)
  corrupted = {'clean': test.images}
  for name in config.probe.corruptions:
    corrupted[name] = corruptions.corrupt(name, test.images, config.seed)
  return Images(train, test, corrupted, rest, held_out)


def _take(split, rows):
  return split._replace(images=split.images[rows], labels=split.labels[rows])


def _tasks(config, data, images):
  """Every task of every set of labels."""
  sets = {'fine': data}
  if config.probe.coarse:
    c = config.data
    sets['coarse'] = load_data(
      c.name, data_dir=c.dir or None, label_set='coarse', size=c.get('size', 0)
    )
  tasks = []
  for name, labelled in sets.items():
    train_y, test_y = labelled.train.labels[images.rest], labelled.test.labels
    if images.held_out is not None:
      test_y = labelled.train.labels[images.held_out]
    num_classes = len(labelled.class_names)
    tasks += make_tasks(config.probe, name, train_y, test_y, num_classes, config.seed)
  return tasks


def _encoded(this, encoder, images):
  """The Source of one of our encoders."""
  folder = features.folder_of(this.config, this.workdir)
  size = this.config.features.batch_size
  h = lambda images: features.cached(encoder, images, folder, this.mesh, size)
  tests = {name: h(corrupted) for name, corrupted in images.corrupted.items()}
  return Source(encoder.name, h(images.train.images), tests, encoder)


def _others(this, images, width):
  """Sources without an encoder: foreign features, where they are given, and pixels, all of them
  and in `width` components."""
  config, data, sources = this.config, this.data, []
  counts = dict(train=len(data.train.labels), test=len(data.test.labels))
  foreign = load_foreign(config, counts)
  if foreign:
    test = foreign['test']
    if images.held_out is not None:
      test = foreign['train'][images.held_out]
    sources.append(Source('foreign features', foreign['train'][images.rest], {'clean': test}))
  methods = set(ON_CACHED) & set(config.probe.methods)
  if config.probe.pixels and methods and pixels_fit(images.train.images):
    flat = {name: features.pixels(corrupted) for name, corrupted in images.corrupted.items()}
    raw = Source('pixels', features.pixels(images.train.images), flat)
    sources.append(raw)
    if raw.train.shape[1] > width:
      components = principal_components(raw.train, width)
      tests = {name: components(x) for name, x in flat.items()}
      sources.append(Source(f'pixels, PCA to {width}', components(raw.train), tests))
  return sources


def _rows(this, method, task, sources, images):
  """The rows of one method and task."""
  if method in ON_CACHED:
    return [judge.cached(source, task, method, this.config.seed) for source in sources]
  ours, train = [source for source in sources if source.encoder], images.train.images
  if method == 'sgd':
    return [judge.by_sgd(source, task, train, this.config, this.mesh) for source in ours]
  return [judge.end_to_end(this, method, ours[0].encoder, task, train, images.corrupted)]


def _protocol(config, data, images, encoder):
  """Every setting that made the numbers."""
  c = config.probe
  more = {}
  if config.features.path:
    path = user_path(config.features.path)
    more = dict(foreign_features=config.features.path, foreign_sha256=digests.file_digest(path))
  if c.split == 'validation' and config.pairs.source == 'static':
    more['held_out'] = 'from the probe alone: the encoder learned from the labels of these images'
  if min(c.label_fractions) < 1:
    more['epochs_of_a_share'] = 'so many that there are about as many updates as with all labels'
  return dict(
    data=data.source,
    split=c.split,
    n_train=len(images.train.labels),
    n_test=len(images.test.labels),
    seed=int(config.seed),
    **encoder.about,
    encoder_sha256=encoder.sha256,
    **more,
    images='not augmented',
    lbfgs='multinomial logistic regression on cached features, '
    'mean cross-entropy + l2/2 |weight|^2',
    solver='L-BFGS (scipy), preconditioned, strong to weak l2 with warm starts',
    max_iterations=linear.MAX_ITERATIONS,
    gradient_tolerance=linear.GRADIENT_TOLERANCE,
    standardisation='per feature by training mean and standard deviation',
    l2_grid=sorted(linear.L2_GRID),
    l2_selection='accuracy on a held-out stratified tenth of train, strongest of equals; '
    'refitted on all of train',
    test='read once, after l2 was chosen',
    knn_k=knn.K,
    knn_temperature=knn.TEMPERATURE,
    knn_vote='exp(cosine / temperature)',
    **{method: dict(c[method]) for method in c.methods if method in BY_SGD},
    interval='95% Wilson half width; standard deviation over draws',
  )


def table(results: dict[str, Any]) -> str:
  """The results as text: a row for each kind of features, method and labels, then the protocol.

  Several draws of a fraction give one row: their mean, and after +- their standard deviation.
  """
  groups = {}
  for row in results['rows']:
    key = row['features'], row['method'], row['labels'], row['fraction']
    groups.setdefault(key, []).append(row)
  corrupted = [name for name in results['rows'][0]['accuracy'] if name != 'clean']
  varied = len({(labels, fraction) for _, _, labels, fraction in groups}) > 1
  labels = ['labels'] if varied else []
  split = f'{results["protocol"]["split"]} %'
  cells = [['features', 'F', 'method', *labels, split, *corrupted, 'val %', 'l2', 'seconds']]
  cells += [_cells(rows, corrupted, varied) for rows in groups.values()]
  notes = [
    f'{row["features"]}: L-BFGS stopped after {row["iterations"]} iterations before it converged'
    for rows in groups.values()
    for row in rows
    if not row.get('converged', True)
  ]
  return '\n'.join([*aligned(cells), *notes, protocol_line(results['protocol'])])


def _cells(rows, corrupted, varied):
  """The cells of the draws of one kind."""
  first, percent = rows[0], {}
  for name in ('clean', *corrupted):
    percent[name] = [100 * row['accuracy'][name] for row in rows if name in row['accuracy']]
  spread = 100 * first['half_width']
  if len(rows) > 1:
    spread = np.std(percent['clean'], ddof=1)
  validation = l2 = '-'
  if 'validation_accuracy' in first:
    validation = f'{100 * np.mean([row["validation_accuracy"] for row in rows]):.2f}'
  if 'l2' in first:
    l2 = f'{first["l2"]:.0e}'
  return [
    first['features'],
    str(first['F']),
    first['method'],
    *([f'{first["labels"]} {first["fraction"]:.0%}'] if varied else []),
    f'{np.mean(percent["clean"]):.2f} +- {spread:.2f}',
    *(f'{np.mean(percent[name]):.2f}' if percent[name] else '-' for name in corrupted),
    validation,
    l2,
    f'{sum(row["seconds"] for row in rows):.1f}',
  ]


JOB = Job(
  'probe',
  run,
  check,
  check_data=check_data,
  table=table,
  reads=('pretrain',),
  judges=True,
  reads_files=preconditions.features_files,
)
