"""How much of the data an agent's play comes near to (PALM, Table 3).

Beside it stand independent draws of the same generator. The share of training images that are the
nearest of some generated image depends on the features and on the number of images, and identical
distributions are far from its ceiling; so other training images and test images are judged beside
the generated ones, at the same number.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from palm_jax import pairs, pretrain, worlds
from palm_jax.base import checks, devices
from palm_jax.base.errors import UserError
from palm_jax.base.metrics import Progress
from palm_jax.base.tables import aligned, protocol_line
from palm_jax.evaluate import extractors, features, play, preconditions, quality
from palm_jax.evaluate.coverage import coverage, prdc
from palm_jax.evaluate.distances import frechet_distance, moments
from palm_jax.evaluate.extractors import Extractor
from palm_jax.evaluate.features import Encoder
from palm_jax.job import Job, Run

PREFIX = quality.PREFIX | {'encoder': 'encoder-'}
SETS = ('explored', 'random actions', 'independent', 'other training images', 'test images')
# Table 3, percent; 10,000 images of each set, Inception features
PAPER = {'explored': 58.87, 'independent': 50.16}
PAPER_IMAGES = 10_000
SHOWN = ('unique_nn', 'precision', 'recall', 'density', 'coverage', 'FID')
EXPLORED = {
  'policy': 'final agent, one uniformly random step of each episode',
  'record': 'of all complete recorded episodes, one uniformly random step of each',
}
LABELS = {
  'policy': 'image i has i mod classes',
  'record': 'of the recorded episodes, in all generated sets',
}

Pictures = Callable[[np.ndarray], np.ndarray]  # rows (B,) int -> (B, H, W, C) uint8


def default_config() -> ConfigDict:
  """Features, sizes, and whose play it is."""
  return ConfigDict(
    dict(
      # the run's own; 'inception', 'proxy' (both with the settings of `quality`), 'pixels'
      features='encoder',
      num_images=PAPER_IMAGES,  # of each set
      draws=3,  # of training images and of generated ones
      # of precision, recall, density and coverage: clovaai/generative-evaluation-prdc
      neighbours=5,
      # the final agent plays again; 'record': pretrain.record's episodes, of the whole run
      explored='policy',
      batch_size=256,  # episodes and images at a time over all devices
    )
  )


RANGES = dict(num_images=checks.Range(2, 10**7), draws=checks.Range(2, 1000))
RANGES |= dict(neighbours=checks.SIZE, batch_size=checks.Range(1, 10**6))


def check(config: ConfigDict, num_devices: int) -> None:
  """Raises UserError on settings of the section `diversity` that the job would refuse."""
  pairs.require_policy(config, 'diversity')
  preconditions.check_single_pictures(config, 'diversity')
  c = config.diversity
  checks.choice('diversity.features', c.features, PREFIX)
  checks.choice('diversity.explored', c.explored, EXPLORED)
  checks.ranges('diversity', c, RANGES)
  checks.at_least('diversity.num_images', c.num_images, c.neighbours + 1)
  if c.explored == 'record' and not config.pretrain.record:
    raise UserError(
      "diversity.explored='record' needs the record of the run: pretrain with "
      '--config.pretrain.record'
    )
  if c.features != 'encoder':
    quality.check(_quality_config(config), num_devices)


def run(this: Run) -> dict[str, Any]:
  """The job: coverage of the training images by what the agent explores.

  Sets of N images each: `explored`, one uniformly random step of each of N episodes; `random
  actions`, the same with uniformly random actions; `independent`, independent normal latents; and
  as references other training images and test images. The first three have the same labels.

  It reads seed, generator.path, diversity, quality (settings of features) and what pretraining
  reads of the config, and the newest checkpoint of the workdir's pretraining.

  Returns:
    `rows`, one dict a set with mean and standard deviation over the draws; `ceiling`; `paper`;
    `protocol`; `seconds`.

  Raises:
    UserError: no encoder, agent or record in the workdir, other images or classes than the
      generator's, or too few.
    NonFiniteError: features that are not finite.
  """
  started, config, data = time.monotonic(), this.config, this.data
  c = config.diversity
  generator = worlds.load_world_generator(config, this.workdir)
  worlds.check_pictures(config, generator)
  preconditions.check_generator(generator, config.generator.path or this.workdir, data)
  program = pretrain.make_program(config, generator, this.mesh)
  encoder = features.load_encoder(config, this.workdir, data.train.images.shape[1:])
  step = encoder.about['checkpoint_step']
  actor = play.load_actor(
    this.workdir / 'pretrain' / 'checkpoints', step, play.actor_template(program, this.mesh)
  )
  records = _records(this, generator) if c.explored == 'record' else None
  n = _number(c, data, records)
  extractor = make_extractor(this, encoder)
  variables = devices.replicate(this.mesh, encoder.apply.args[0])
  arms = play.make_arms(program.setup, this.mesh, variables, actor)
  scores = {name: [] for name in SETS}
  progress = Progress('diversity: sets compared', c.draws * len(SETS), 'sets')
  for draw in range(c.draws):
    pictures, real = _draw(this, draw, n, arms, generator.num_classes, records)
    real = extract(extractor, real, n, c.batch_size, this.mesh, f'draw {draw + 1}, training images')
    for i, name in enumerate(SETS):
      what = f'draw {draw + 1}, {name}'
      h = extract(extractor, pictures[name], n, c.batch_size, this.mesh, what)
      scores[name].append(score(real, h, c.neighbours))
      share = 100 * scores[name][-1]['unique_nn']
      progress.update(draw * len(SETS) + i + 1, {'unique_nn %': share})
  return dict(
    job='diversity',
    rows=[_row(name, n, PREFIX[c.features], drawn) for name, drawn in scores.items()],
    ceiling=1 - (1 - 1 / n) ** n,
    paper=PAPER,
    protocol=_protocol(config, data, step, extractor, real.shape[1], n),
    **devices.describe(this.mesh),
    seconds=time.monotonic() - started,
  )


def _records(this, generator):
  """(z, labels) of recorded episodes, one pair a draw."""
  c, folder = this.config.diversity, this.workdir / 'pretrain' / 'experience'
  length = this.config.environment.episode_length
  records = [
    play.recorded(folder, length, c.num_images, [this.config.seed, draw]) for draw in range(c.draws)
  ]
  shape = records[0][0].shape[1:]
  if shape != (generator.z_dim,):
    raise UserError(
      f'{folder} holds latents of {shape}, but the generator takes ({generator.z_dim},): '
      'give the generator that was played in'
    )
  return records


def _number(c, data, records):
  """Images of each set: as many as asked for, or as there are."""
  available = {
    'half of the training images': len(data.train.images) // 2,
    'test images': len(data.test.images),
  }
  if records:
    available['recorded episodes'] = len(records[0][0])
  least = min(available, key=lambda name: available[name])
  n = min(c.num_images, available[least])
  if n <= c.neighbours:
    raise UserError(
      f'there are {n} {least}, expected more than diversity.neighbours={c.neighbours}: give more'
    )
  if n < c.num_images:
    logging.warning(
      'diversity: %s images of each set instead of diversity.num_images=%s, because there are %s '
      '%s',
      n,
      c.num_images,
      available[least],
      least,
    )
  return n


def _draw(this, draw, n, arms, num_classes, records):
  """The sets of one draw, {set: Pictures}, and the training images that they are compared with."""
  train, test = this.data.train.images, this.data.test.images
  rng = np.random.default_rng([this.config.seed, draw])
  key = jax.random.fold_in(jax.random.key(this.config.seed), draw)
  order, test_order = rng.permutation(len(train)), rng.permutation(len(test))
  record = records[draw] if records else None
  length = this.config.environment.episode_length
  pictures = generated(arms, key, n, num_classes, length, record)
  pictures['other training images'] = _shown(train, order[n : 2 * n])
  pictures['test images'] = _shown(test, test_order)
  return pictures, _shown(train, order)


def _shown(images, order):
  return lambda rows: images[order[rows]]


def generated(
  arms: dict[str, play.Arm],
  key: jax.Array,
  n: int,
  num_classes: int,
  episode_length: int,
  record: tuple[np.ndarray, np.ndarray] | None = None,
) -> dict[str, Pictures]:
  """One draw of the generated sets, n images each, with the same labels in all.

  Args:
    arms: see `play.make_arms`.
    key: of the draw; `explored` and `random actions` begin alike and differ by their actions only.
    n: images of each.
    num_classes: of the generator; 0 is unconditional. Image i is of all classes in turn.
    episode_length: frames an episode.
    record: (z, labels) of `play.recorded`, n or more, which are then the explored ones, and their
      labels those of all.

  Returns:
    {set: pictures of rows in [0, n)}.
  """
  ids = play.by_chosen_step(key, np.arange(n, dtype=np.int32), episode_length)
  explored, which, labels = 'policy', ids, ids % max(num_classes, 1)
  if record:
    explored, (which, labels) = 'record', record
  pictures = lambda arm, which: lambda rows: arms[arm](key, which[rows], labels[rows])
  return {
    'explored': pictures(explored, which),
    'random actions': pictures('uniform', ids),
    'independent': pictures('independent', ids),
  }


def score(real: np.ndarray, fake: np.ndarray, neighbours: int) -> dict[str, float]:
  """All numbers of one comparison of features (N, F): those of `coverage` and `prdc`, and FID."""
  a, b = moments([real]), moments([fake])
  return dict(
    coverage(real, fake),
    **prdc(real, fake, neighbours),
    FID=frechet_distance(a.mean, a.cov, b.mean, b.cov),
  )


def make_extractor(this: Run, encoder: Encoder) -> Extractor:
  """The extractor that config.diversity.features names; `encoder` is the run's own."""
  if this.config.diversity.features == 'encoder':
    variables = devices.replicate(this.mesh, encoder.apply.args[0])
    about = dict(encoder.about, network=encoder.name, sha256=encoder.sha256)
    return Extractor(encoder.apply.func, variables, about)
  config = _quality_config(this.config)
  return extractors.make_extractor(config, this.workdir, this.data, this.mesh)


def extract(
  extractor: Extractor, pictures: Pictures, n: int, batch_size: int, mesh: Mesh, what: str
) -> np.ndarray:
  """Features (n, F) float32 of n pictures, with progress in the log.

  Raises:
    NonFiniteError: some are not finite.
  """
  batch = features.whole_batch(batch_size, n, mesh)
  rows = (np.arange(start, start + batch) % n for start in range(0, n, batch))
  progress = Progress(f'diversity: {what}', n, 'images')
  h = features.extract_batches(extractor.partial(), map(pictures, rows), n, mesh, progress)
  advice = 'the generator or the feature network is broken'
  features.check_finite(h, f'diversity: features ({what})', advice)
  return h


def _row(name, n, prefix, drawn):
  """Mean and standard deviation over the draws of each number of a set."""
  row = dict(set=name, n=n)
  for metric in drawn[0]:
    values = [numbers[metric] for numbers in drawn]
    row[f'{prefix}{metric}'] = float(np.mean(values))
    row[f'{prefix}{metric}_sd'] = float(np.std(values, ddof=1))
  return row


def _protocol(config, data, step, extractor, num_features, n):
  """Every setting that made the numbers."""
  c = config.diversity
  return dict(
    data=data.source,
    generator=str(config.generator.path or 'own'),
    checkpoint_step=step,
    features=c.features,
    extractor=extractor.about,
    num_features=num_features,
    distance='Euclidean, features not normalised',
    n=n,
    num_images=c.num_images,
    draws=c.draws,
    seed=config.seed,
    neighbours=c.neighbours,
    explored=EXPLORED[c.explored],
    episode_length=config.environment.episode_length,
    alpha=config.environment.alpha,
    beta=config.environment.beta,
    truncation_psi=config.environment.truncation_psi,
    noise='const',
    labels=LABELS[c.explored],
    real='training images, drawn anew in each draw; other training images share none with them',
    spread='standard deviation over draws',
  )


def table(results: dict[str, Any]) -> str:
  """The results as text: a row for each set, the paper's numbers beside it, then the protocol."""
  protocol, papers = results['protocol'], results['paper']
  prefix = PREFIX[protocol['features']]
  names = [f'{prefix}unique_nn %', *(prefix + name for name in SHOWN[1:])]
  cells = [['set', 'n', *names, 'paper Table 3 %']]
  for row in results['rows']:
    numbers = [_cell(name, row[prefix + name], row[f'{prefix}{name}_sd']) for name in SHOWN]
    paper = f'{papers[row["set"]]:.2f}' if row['set'] in papers else ''
    cells.append([row['set'], f'{row["n"]:,}', *numbers, paper])
  note = 'paper Table 3: PALM and uniform latents, Inception features, 10,000 images of each set'
  if protocol['features'] != 'inception' or protocol['n'] != PAPER_IMAGES:
    ours = f'{protocol["features"]} features of {protocol["n"]:,} images'
    note += f'; not comparable with these {ours}'
  ceiling = (
    'ceiling of unique_nn, hits spread uniformly over the training images: '
    f'{results["ceiling"]:.2%}'
  )
  return '\n'.join([*aligned(cells), ceiling, note, protocol_line(protocol)])


def _cell(name, mean, sd):
  if name == 'unique_nn':
    return f'{100 * mean:.2f} +- {100 * sd:.2f}'
  return f'{mean:.4g} +- {sd:.2g}'


def _quality_config(config):
  """The config with this section's features in the section that extractors.make_extractor reads."""
  copied = config.copy_and_resolve_references()
  copied.quality.features = copied.diversity.features
  if copied.quality.features != 'inception':
    copied.quality.inception_path = ''
  return copied


JOB = Job('diversity', run, check, table=table, reads=('generator', 'pretrain'), judges=True)
