"""Out-of-distribution (OOD) detection: a classifier of the data's own classes meets other pictures.

This is the paper's Table 1, which does not say how its classifiers were made. Protocol 'frozen' is
the simplest reading, and comparable with its baselines, which are CSI's: a linear head on the
frozen encoder, and the largest softmax probability (`msp`) as the score. 'finetune' trains encoder
and head on the labels. `knn` and `ssd` need no labels: the paper reports nothing like them. Nothing
is chosen by a test or OOD set: the newest checkpoint, the head's last epoch, settings of the
literature.
"""

import collections
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from palm_jax.base import checks, devices, digests
from palm_jax.base.errors import UserError
from palm_jax.base.metrics import Progress
from palm_jax.data.arrays import Split
from palm_jax.data.published import fetch_missing
from palm_jax.evaluate import classifier, features, linear, preconditions, sgd, table_1
from palm_jax.evaluate.features import Encoder
from palm_jax.evaluate.foreign import load_foreign
from palm_jax.evaluate.image_sets import check_source, image_set, named_sources
from palm_jax.evaluate.linear import LinearModel
from palm_jax.evaluate.scores import METRICS, SCORES, of_features
from palm_jax.job import Job, Run

Fitted = dict[str, list[tuple[Encoder, list[LinearModel]]]]  # name: [(encoder, its heads)]

PROTOCOLS = {
  'frozen': 'frozen encoder, linear softmax head',
  'finetune': 'encoder and head trained on the labels, end to end',
}


def default_config() -> ConfigDict:
  """Sets, scores and protocol."""
  return ConfigDict(
    dict(
      # 'source' or 'name=source', see image_sets.py; Table 1's: SVHN, LSUN, CIFAR-100, Interp.,
      # CelebA
      sets=('interp:pairs',),
      protocol='frozen',  # or 'finetune'
      scores=tuple(SCORES),  # CSI's labelled table has msp
      seeds=5,  # Table 1: five trials; of the head, or of the fine-tuning
      knn_k=50,  # OpenOOD configs/postprocessors/knn.yml
      # the same network untrained, beside it; only where frozen: trained on labels it is
      # `supervised`
      untrained=True,
      # as many of the same network trained from scratch on the labels, by the settings of
      # `finetune`
      supervised=0,
      head=dict(
        lr=0.1,
        momentum=0.0,
        weight_decay=1e-6,
        batch_size=32,
        epochs=100,
        schedule='step',  # CSI --mode=sup_linear
        augment='simsiam',  # the same; 'none' learns from features that are computed once
      ),
      finetune=classifier.default_config(),
    )
  )


RANGES: dict[str, Any] = dict(seeds=checks.Range(1, 1000), knn_k=checks.COUNT)
RANGES |= dict(supervised=checks.Range(0, 1000), head=sgd.RANGES, finetune=classifier.RANGES)


def check(config: ConfigDict, num_devices: int) -> None:
  """Raises UserError on settings of the section `ood` that the job would refuse."""
  preconditions.check_single_pictures(config, 'ood')
  c = config.ood
  checks.choice('ood.protocol', c.protocol, PROTOCOLS)
  checks.choices('ood.scores', c.scores, SCORES)
  if not c.sets:
    raise UserError('ood.sets is empty: name one or more')
  checks.ranges('ood', c, RANGES)
  for source in named_sources(c.sets).values():
    check_source(source)
  if c.protocol == 'frozen':
    sgd.check(c.head, 'ood.head', num_devices)
  if c.protocol == 'finetune' or c.supervised:
    sgd.check(c.finetune, 'ood.finetune', num_devices)


def pictures(config: ConfigDict, test: Split) -> dict[str, tuple[np.ndarray, str]]:
  """{name: (images (N, H, W, C) uint8, how they were made)} of config.ood.sets.

  They are resized as the data were.

  Args:
    config: the whole config.
    test: the data's test images.

  Raises:
    UserError: an unreadable set, or two of one name.
  """
  lanczos, folder = bool(config.data.get('size', 0)), config.data.dir or None
  sources = named_sources(config.ood.sets)
  return {name: image_set(source, test, folder, lanczos) for name, source in sources.items()}


def download(config: ConfigDict) -> None:
  """Fetches the published sets among config.ood.sets that are missing.

  Raises:
    UserError: as palm_jax.data.published.fetch.
  """
  for source in named_sources(config.ood.sets).values():
    fetch_missing(source, config.data.dir or None)


def run(this: Run) -> dict[str, Any]:
  """The job: data.test against each set of config.ood.sets, by every score.

  It reads seed, data.dir, encoder, features and ood of the config, and the newest checkpoint of the
  workdir's pretraining.

  Returns:
    `rows`, one an (encoder, score, set), with {mean, sd, values} of each number of scores.METRICS
    and how many `trials`; `accuracy` of the heads on data.test, {encoder: {mean, sd, values}};
    `paper`, Table 1's numbers where the data are CIFAR-10 and a set has a column there; `protocol`;
    `seconds`.

  Raises:
    UserError: an unreadable set, no encoder, or one of other images.
  """
  started, config, data = time.monotonic(), this.config, this.data
  sets = pictures(config, data.test)
  images = dict(train=data.train.images, test=data.test.images)
  images |= {f'ood_{name}': found for name, (found, _) in sets.items()}
  foreign = load_foreign(config, {name: len(found) for name, found in images.items()})
  represent = functools.partial(_represent, this, images, foreign)
  encoders = _encoders(this, foreign)
  networks = [encoder for encoder in encoders if encoder.apply]
  before = jax.tree.map(np.copy, [encoder.apply.args for encoder in networks])
  fitted = fit(this, encoders, represent)
  numbers, accuracies = judge(this, fitted, list(sets), represent)
  features.assert_frozen(before, [encoder.apply.args for encoder in networks])
  rows = []
  for (name, score, ood), trials in numbers.items():
    sizes = dict(n_id=len(data.test.images), n=len(sets[ood][0]), trials=len(trials))
    metrics = {metric: summary([trial[metric] for trial in trials]) for metric in METRICS}
    rows.append(dict(encoder=name, score=score, set=ood, **sizes, **metrics))
  described = {name: description for name, (_, description) in sets.items()}
  paper = table_1.papers(described, data.class_names)
  return dict(
    job='ood',
    rows=rows,
    accuracy={name: summary(values) for name, values in accuracies.items()},
    **(dict(paper=paper) if paper else {}),
    protocol=_protocol(config, data, sets, fitted),
    **devices.describe(this.mesh),
    seconds=time.monotonic() - started,
  )


def _represent(this, images, foreign, encoder, part):
  """Features (N, F) of a part of the images, 'train', 'test' or 'ood_<set>'."""
  if encoder.apply is None:
    return foreign[part]
  folder = features.folder_of(this.config, this.workdir)
  return features.cached(encoder, images[part], folder, this.mesh, this.config.features.batch_size)


def _encoders(this, foreign):
  """What config.ood.protocol starts from: ours, beside it an untrained one and foreign features."""
  config, shape = this.config, this.data.train.images.shape[1:]
  encoders = [features.load_encoder(config, this.workdir, shape)]
  if config.ood.protocol == 'frozen':
    if config.ood.untrained:
      encoders.append(features.untrained_encoder(config, shape))
    if foreign:
      about = dict(file=config.features.path, head_augment='none')  # there are no images
      sha256 = digests.of_arrays(*foreign.values())
      encoders.append(Encoder('foreign features', None, sha256, about))
  return encoders


def fit(this: Run, encoders: Sequence[Encoder], represent: Callable) -> Fitted:
  """Heads on the encoders, or encoders trained with them, and names for both.

  Frozen, an encoder has a head a seed; trained on labels, there is an encoder with a head a seed.

  Args:
    encoders: what config.ood.protocol starts from.
    represent: (encoder, 'train') -> (N, F).
  """
  c, fitted = this.config.ood, {}
  for encoder in encoders:
    if c.protocol == 'finetune':
      fitted[f'{encoder.name}, fine-tuned'] = _train(this, 'finetune', c.seeds, encoder)
    else:
      fitted[encoder.name] = [(encoder, _fit_heads(this, encoder, represent))]
  if c.supervised:
    fitted['supervised'] = _train(this, 'supervised', c.supervised)
  return fitted


def _train(this, name, count, start=None):
  """[(encoder, [head])] trained end to end, one a seed."""
  config, data, pairs = this.config, this.data, []
  for seed in _seeds(config, count):
    encoder, head = classifier.fit(
      config,
      config.ood.finetune,
      data.train,
      len(data.class_names),
      seed,
      this.mesh,
      this.workdir,
      name,
      start,
    )
    pairs.append((encoder, [head]))
  return pairs


def _fit_heads(this, encoder, represent):
  """Heads on a frozen encoder, one a seed."""
  config, data = this.config, this.data
  settings = config.ood.head.copy_and_resolve_references()
  if encoder.apply is None:  # there are no images to augment
    settings.augment = 'none'
  source = encoder, data.train.images
  if settings.augment == 'none':
    source = represent(encoder, 'train')
  return sgd.fit_heads(
    source,
    data.train.labels,
    len(data.class_names),
    settings,
    _seeds(config, config.ood.seeds),
    this.mesh,
    f'ood: heads of the {encoder.name}',
  )


def _seeds(config, count):
  return [config.seed + i for i in range(count)]


def judge(
  this: Run, fitted: Fitted, sets: Sequence[str], represent: Callable
) -> tuple[dict[tuple[str, str, str], list[dict[str, float]]], dict[str, list[float]]]:
  """All numbers: how well each score tells each set apart, and what the heads get right.

  Args:
    sets: their names.
    represent: (encoder, 'train', 'test' or 'ood_<set>') -> (N, F).

  Returns:
    {(encoder, score, set): [{metric: value} of each trial]}, and {encoder: [accuracy of each head
    on the test images]}.
  """
  c, data = this.config.ood, this.data
  numbers, accuracies = collections.defaultdict(list), collections.defaultdict(list)
  progress, done = Progress('ood: scores', sum(map(len, fitted.values())) * len(sets), 'sets'), 0
  for name, trials in fitted.items():
    for encoder, heads in trials:
      test_h = represent(encoder, 'test')
      accuracies[name] += [linear.accuracy(head, test_h, data.test.labels) for head in heads]
      train_h = represent(encoder, 'train')
      known = of_features(c.scores, heads, train_h, data.train.labels, c.knn_k)
      of_id = {score: [of(test_h) for of in functions] for score, functions in known.items()}
      for ood in sets:
        h = represent(encoder, f'ood_{ood}')
        for score, functions in known.items():
          for id_scores, function in zip(of_id[score], functions, strict=True):
            ood_scores = function(h)
            trial = {metric: number(id_scores, ood_scores) for metric, number in METRICS.items()}
            numbers[name, score, ood].append(trial)
        done += 1
        progress.update(done, {})
  return numbers, accuracies


def summary(values: list[float]) -> dict[str, Any]:
  """Mean, standard deviation (of n - 1, None of one value), and the values."""
  sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
  return dict(mean=float(np.mean(values)), sd=sd, values=values)


def _protocol(config, data, sets, fitted):
  """Every setting that made the numbers."""
  c = config.ood
  described = {}
  for name, source in named_sources(c.sets).items():
    images, description = sets[name]
    described[name] = dict(
      source=source,
      n=len(images),
      description=description,
      images_sha256=digests.of_arrays(images),
    )
  return dict(
    protocol=f'{c.protocol}: {PROTOCOLS[c.protocol]}',
    data=data.source,
    id_set="the data's test images",
    n_train=len(data.train.images),
    n_id=len(data.test.images),
    sets=described,
    encoders={
      name: [dict(sha256=encoder.sha256, **encoder.about) for encoder, _ in trials]
      for name, trials in fitted.items()
    },
    layer='h, batch normalisation in eval mode',
    scores=list(c.scores),
    knn_k=c.knn_k,
    knn_bank='all training images',
    seeds=_seeds(config, c.seeds),
    sd='over trials, n - 1; one trial has none',
    head=c.head.to_dict(),
    finetune=c.finetune.to_dict(),
    test_images='not augmented, one pass',
    auroc='Mann-Whitney, average ranks',
    aupr='average precision',
    fpr_at_95_tpr='share of OOD at or above the threshold that keeps 95% of ID',
    selection='none: newest checkpoint, last epoch, nothing chosen by test or OOD images',
  )


def check_data(this: Run) -> None:
  """Raises UserError on data that the job would refuse, and where they are fewer than ood.knn_k."""
  preconditions.check_classes(this, 'ood')
  preconditions.check_features_file(this.config)
  k, count = this.config.ood.knn_k, len(this.data.train.images)
  if 'knn' in this.config.ood.scores and k > count:
    raise UserError(f'ood.knn_k={k}, but there are {count} training images: set it to fewer')


JOB = Job(
  'ood',
  run,
  check,
  check_data=check_data,
  fetch=download,
  table=table_1.table,
  reads=('pretrain',),
  judges=True,
  reads_files=preconditions.features_files,
)
