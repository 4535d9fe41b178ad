"""Out-of-distribution (OOD) detection: a classifier of the data's own classes meets pictures of
other kinds (paper Table 1).

The paper does not say how its classifiers were made. Protocol 'frozen' is the simplest reading, and
comparable with its baselines, which are CSI's: a linear head on the frozen encoder, and the largest
softmax probability (`msp`) as the score.
'finetune' trains encoder and head on the labels. `knn` and `ssd` need no labels: the paper reports
nothing like them. Nothing is chosen by a test or OOD set: the newest checkpoint, the head's last
epoch, settings of the literature.
"""

import collections
import difflib
import functools
import hashlib
import re
import time

import jax
import numpy as np
from ml_collections import ConfigDict

from palm_jax.base import devices
from palm_jax.base.errors import UserError
from palm_jax.base.metrics import Progress
from palm_jax.base.tables import aligned, protocol_line
from palm_jax.data.published import fetch_missing
from palm_jax.evaluate import classifier, features, linear
from palm_jax.evaluate.image_sets import check_source, image_set
from palm_jax.evaluate.scores import METRICS, SCORES
from palm_jax.job import Job, Run

# Liu et al. 2022, arXiv 2210.10913v2, Table 1: AUROC in percent, mean and standard deviation of
# five trials where given; classifiers (ResNet-18) of CIFAR-10. LSUN is ODIN's LSUN_resize, which
# CSI used.
TABLE_1 = {
  'PALM': {
    'SVHN': (97.9, 0.2),
    'LSUN': (96.1, 0.3),
    'CIFAR-100': (91.5, 0.2),
    'Interp.': (79.9, 0.2),
    'CelebA': (76.8, 0.4),
  },
  'CSI': {
    'SVHN': (96.5,),
    'LSUN': (96.3,),
    'CIFAR-100': (90.5,),
    'Interp.': (78.5,),
    'CelebA': (75.1,),
  },
  'SupCLR': {
    'SVHN': (97.3,),
    'LSUN': (92.8,),
    'CIFAR-100': (88.6,),
    'Interp.': (75.7,),
    'CelebA': (73.2,),
  },
  'Standard': {
    'SVHN': (88.6,),
    'LSUN': (90.7,),
    'CIFAR-100': (85.8,),
    'Interp.': (75.4,),
    'CelebA': (64.1,),
  },
}
CIFAR10 = {'airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck'}
PROTOCOLS = {
  'frozen': 'frozen encoder, linear softmax head',
  'finetune': 'encoder and head trained on the labels, end to end',
}


def default_config():
  return ConfigDict(
    dict(
      sets=(
        'interp:pairs',
      ),  # 'source' or 'name=source', see image_sets.py; Table 1's: SVHN, LSUN, CIFAR-100, Interp., CelebA
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
        augment='simsiam',
      ),  # the same; 'none' learns from features that are computed once
      finetune=classifier.default_config(),
    )
  )


def check(config, num_devices):
  """Raises UserError on settings of the whole config's section `ood` that cannot work."""
  features.check_single_pictures(config, 'ood')
  c = config.ood
  if c.protocol not in PROTOCOLS:
    raise UserError(f'ood.protocol={c.protocol!r} is unknown: choose one of {", ".join(PROTOCOLS)}')
  for score in c.scores:
    if score not in SCORES:
      near = difflib.get_close_matches(str(score), SCORES, 1, 0)[0]
      raise UserError(
        f'ood.scores={tuple(c.scores)}: {score!r} is unknown, expected some of '
        f'{", ".join(SCORES)}; '
        f'did you mean {near}?'
      )
  for name, least in dict(sets=1, scores=1).items():
    if len(c[name]) < least:
      raise UserError(f'ood.{name} is empty: name one or more')
  for name, least in dict(seeds=1, knn_k=1, supervised=0).items():
    if c[name] < least:
      raise UserError(f'ood.{name}={c[name]} is too small: set it to {least} or more')
  for source in named_sources(c.sets).values():
    check_source(source)
  used = {'head': c.protocol == 'frozen', 'finetune': c.protocol == 'finetune' or c.supervised}
  for name in filter(used.get, used):
    linear.check_sgd(c[name], f'ood.{name}')
    devices.check_divisible(f'ood.{name}.batch_size', c[name].batch_size, num_devices, 'devices')


def named_sources(sets):
  """{name: source} of 'name=source' or 'source', which is named by its last part.

  Raises:
    UserError: two of one name.
  """
  sources = {}
  for text in sets:
    name, found, source = text.partition('=')
    if not found or re.search(r'[/:,]', name):  # an = within a path
      source = text
      name = re.sub(r'^tfds:|^.*/|\.(npz|mat|tar\.gz|tgz)$', '', text.rstrip('/'))
      name = 'celeba' if text.startswith('celeba:') else name
    if name in sources or not name:
      raise UserError(
        f'ood.sets={tuple(sets)}: two sets are called {name!r}, or one has no name: write '
        f'NAME={source}'
      )
    sources[name] = source
  return sources


def download(config):
  """Fetches the published sets among config.ood.sets that are not there yet; UserError as of
  palm_jax.data.published.fetch."""
  for source in named_sources(config.ood.sets).values():
    fetch_missing(source, config.data.dir or None)


def published(name):
  """The column of Table 1 that a set's name stands for ('svhn', 'CIFAR100', 'interp:pairs', ...),
  or None."""
  plain = lambda text: re.sub(r'[^a-z0-9]', '', text.lower().split(':')[0])
  return next((column for column in TABLE_1['PALM'] if plain(column) == plain(name)), None)


def run(this: Run) -> dict:
  """The job: data.test against each set of config.ood.sets, by every score; prints the AUROCs in
  the layout of Table 1.

  Writes <workdir>/results/ood.json.

  Args:
    config: the whole config; read are seed, data.dir, encoder, features and ood.
    workdir: pathlib.Path of a run with a checkpoint of its pretraining.
    data: palm_jax.data.arrays.Data.
    mesh: one-dimensional mesh, axis 'data'.

  Returns:
    The dict that was written: `rows`, one an (encoder, score, set), with {mean, sd, values} of each
    number of scores.METRICS and how many `trials`; `accuracy` of the heads on data.test, {encoder:
    {mean, sd, values}}; `paper`, Table 1's numbers where the data are CIFAR-10 and a set has a
    column there; `protocol`; `seconds`.

  Raises:
    UserError: a set that cannot be read, no encoder, or one of other images; more neighbours than
      training images.
  """
  config, workdir, data, mesh = this.config, this.workdir, this.data, this.mesh
  started, c = time.monotonic(), config.ood
  if 'knn' in c.scores and c.knn_k > len(data.train.images):
    raise UserError(
      f'ood.knn_k={c.knn_k}, but there are {len(data.train.images)} training images: set it to '
      'fewer'
    )
  sets = {
    name: image_set(source, data.test, config.data.dir or None)
    for name, source in named_sources(c.sets).items()
  }
  images = {
    'train': data.train.images,
    'test': data.test.images,
    **{f'ood_{name}': found for name, (found, _) in sets.items()},
  }
  foreign = features.load_foreign(config, {name: len(found) for name, found in images.items()})

  def represent(encoder, part):
    if encoder.apply is None:
      return foreign[part]
    return features.cached(
      encoder, images[part], features.folder_of(config, workdir), mesh, config.features.batch_size
    )

  shape = data.train.images.shape[1:]
  encoders = [features.load_encoder(config, workdir, shape)]
  if c.untrained and c.protocol == 'frozen':
    encoders.append(features.untrained_encoder(config, shape))
  before = jax.tree.map(np.copy, [encoder.apply.args for encoder in encoders])
  if foreign and c.protocol == 'frozen':
    sha256 = hashlib.sha256(b''.join(foreign[part].tobytes() for part in images)).hexdigest()
    encoders.append(
      features.Encoder('foreign features', None, sha256, dict(file=config.features.path))
    )
  fitted = fit(config, workdir, data, mesh, encoders, represent)
  numbers, accuracies = collections.defaultdict(list), collections.defaultdict(list)
  progress, done = Progress('ood: scores', sum(map(len, fitted.values())) * len(sets), 'sets'), 0
  for name, trials in fitted.items():
    for encoder, heads in trials:
      test_h = represent(encoder, 'test')
      accuracies[name] += [linear.accuracy(head, test_h, data.test.labels) for head in heads]
      known = score_functions(c, heads, represent(encoder, 'train'), data.train.labels)
      id_scores = {
        score: [function(test_h) for function in functions] for score, functions in known.items()
      }
      for ood in sets:
        h = represent(encoder, f'ood_{ood}')
        for score, functions in known.items():
          numbers[name, score, ood] += [
            {metric: number(of_id, function(h)) for metric, number in METRICS.items()}
            for of_id, function in zip(id_scores[score], functions, strict=True)
          ]
        done += 1
        progress.update(done, {})
  features.assert_frozen(before, [encoder.apply.args for encoder in encoders if encoder.apply])

  rows = [
    dict(
      encoder=name,
      score=score,
      set=ood,
      n_id=len(data.test.images),
      n=len(sets[ood][0]),
      trials=len(trials),
      **{metric: summary([trial[metric] for trial in trials]) for metric in METRICS},
    )
    for (name, score, ood), trials in numbers.items()
  ]
  results = dict(
    job='ood', rows=rows, accuracy={name: summary(values) for name, values in accuracies.items()}
  )
  columns = {name: published(name) for name in sets if published(name)}
  if columns and {name.lower() for name in data.class_names} == CIFAR10:
    results['paper'] = dict(
      source='arXiv 2210.10913v2, Table 1, AUROC in percent',
      rows={
        method: {name: list(known[column]) for name, column in columns.items()}
        for method, known in TABLE_1.items()
      },
    )
  digest = lambda array: hashlib.sha256(array.tobytes()).hexdigest()
  results.update(
    protocol=dict(
      protocol=f'{c.protocol}: {PROTOCOLS[c.protocol]}',
      data=data.source,
      id_set="the data's test images",
      n_train=len(data.train.images),
      n_id=len(data.test.images),
      sets={
        name: dict(
          source=source,
          n=len(sets[name][0]),
          description=sets[name][1],
          images_sha256=digest(sets[name][0]),
        )
        for name, source in named_sources(c.sets).items()
      },
      encoders={
        name: [dict(sha256=encoder.sha256, **encoder.about) for encoder, _ in trials]
        for name, trials in fitted.items()
      },
      layer='h, batch normalisation in eval mode',
      scores=list(c.scores),
      knn_k=c.knn_k,
      knn_bank='all training images',
      seeds=[config.seed + i for i in range(c.seeds)],
      sd='over trials, n - 1; one trial has none',
      head=c.head.to_dict(),
      finetune=c.finetune.to_dict(),
      test_images='not augmented, one pass',
      auroc='Mann-Whitney, average ranks',
      aupr='average precision',
      fpr_at_95_tpr='share of OOD at or above the threshold that keeps 95% of ID',
      selection='none: newest checkpoint, last epoch, nothing chosen by test or OOD images',
    ),
    **devices.describe(mesh),
    seconds=time.monotonic() - started,
  )
  return results


def fit(config, workdir, data, mesh, encoders, represent):
  """{name: [(encoder, its heads), ...]}: frozen, one encoder with a head a seed; trained on labels,
  a pair a seed.

  Args:
    encoders: what config.ood.protocol starts from.
    represent: (encoder, 'train') -> (N, F).
  """
  c, labels, num_classes = config.ood, data.train.labels, len(data.class_names)
  seeds, fitted = [config.seed + i for i in range(c.seeds)], {}

  def train(name, seeds, start=None):
    pairs = (
      classifier.fit(config, c.finetune, data.train, num_classes, seed, mesh, workdir, name, start)
      for seed in seeds
    )
    return [(encoder, [head]) for encoder, head in pairs]

  for encoder in encoders:
    if c.protocol == 'finetune':
      fitted[f'{encoder.name}, fine-tuned'] = train('finetune', seeds, encoder)
    else:
      head = c.head.copy_and_resolve_references()
      if encoder.apply is None:  # there are no images to augment
        head.augment = 'none'
      source = (
        represent(encoder, 'train') if head.augment == 'none' else (encoder, data.train.images)
      )
      fitted[encoder.name] = [
        (
          encoder,
          linear.fit_sgd(
            source, labels, num_classes, head, seeds, mesh, f'ood: heads of the {encoder.name}'
          ),
        )
      ]
  if c.supervised:
    fitted['supervised'] = train('supervised', [config.seed + i for i in range(c.supervised)])
  return fitted


def score_functions(c, heads, train_h, train_labels):
  """{score: functions of features (N, F) -> (N,)}: for a score of logits one a head, for one of
  features one."""

  def of_logits(function):
    return [lambda h, head=head: function(linear.logits(head, h)) for head in heads]

  return {
    name: of_logits(SCORES[name].function)
    if SCORES[name].needs == 'logits'
    else [SCORES[name].function(train_h, train_labels, c.knn_k)]
    for name in c.scores
  }


def summary(values):
  return dict(
    mean=float(np.mean(values)),
    sd=float(np.std(values, ddof=1)) if len(values) > 1 else None,
    values=values,
  )


def table(results):
  """The AUROCs of `evaluate` as text: a row an encoder and score, a column a set; below it the
  paper's and the protocol."""

  def cell(mean, sd=None):
    return f'{mean:.1f}' if sd is None else f'{mean:.1f} +- {sd:.1f}'

  def percent(part):
    return cell(*(value and 100 * value for value in (part['mean'], part['sd'])))

  sets = list(results['protocol']['sets'])
  rows = collections.defaultdict(dict)
  for row in results['rows']:
    rows[row['encoder'], row['score']][row['set']] = percent(row['auroc'])
  cells = [['AUROC %', 'score', *sets, 'ID accuracy %']]
  cells += [
    [*key, *(row[name] for name in sets), percent(results['accuracy'][key[0]])]
    for key, row in rows.items()
  ]
  for method, numbers in results.get('paper', dict(rows={}))['rows'].items():
    cells.append(
      [
        f'paper: {method}',
        '-',
        *(cell(*numbers[name]) if name in numbers else '-' for name in sets),
        '-',
      ]
    )
  return '\n'.join([*aligned(cells, left=2), protocol_line(results['protocol'])])


JOB = Job(
  'ood',
  run,
  check,
  check_data=functools.partial(features.check_classes, job='ood'),
  fetch=download,
  table=table,
  judges=True,
)
