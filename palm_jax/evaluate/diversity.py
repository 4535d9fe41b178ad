"""How much of the data an agent's play comes near to (PALM, Table 3).

Beside it stand independent draws of the same generator. The share of training images that are the
nearest of some generated image depends on the features and on the number of images, and identical
distributions are far from its ceiling; so other training images and test images are judged beside
the generated ones, at the same number.
"""

import time
from typing import Any

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from palm_jax import experience, pairs, pretrain, worlds
from palm_jax.base import checks, devices
from palm_jax.base.metrics import Progress
from palm_jax.base.tables import aligned, protocol_line
from palm_jax.evaluate import (
  diversity_sets,
  extractors,
  features,
  inception,
  play,
  preconditions,
  quality,
)
from palm_jax.evaluate.coverage import coverage, prdc
from palm_jax.evaluate.distances import frechet_distance, moments
from palm_jax.evaluate.diversity_sets import Pictures
from palm_jax.evaluate.extractors import Extractor
from palm_jax.evaluate.features import Encoder
from palm_jax.job import Job, Run

PREFIX = quality.PREFIX | {'encoder': 'encoder-'}
# Table 3, percent; 10,000 images of each set, Inception features
PAPER = {'explored': 58.87, 'independent': 50.16}
PAPER_IMAGES = 10_000
SHOWN = ('unique_nn', 'precision', 'recall', 'density', 'coverage', 'FID')


def default_config() -> ConfigDict:
  """Features, sizes, and whose play it is."""
  return ConfigDict(
    dict(
      # one or more: the run's own, which differ from run to run; neutral ones are 'inception',
      # 'proxy' (both with the settings of `quality`) and 'pixels'
      features=('encoder',),
      num_images=PAPER_IMAGES,  # of each set
      draws=3,  # of training images and of generated ones
      # of precision, recall, density and coverage: clovaai/generative-evaluation-prdc
      neighbours=5,
      batch_size=256,  # episodes and images at a time over all devices
    )
  )


RANGES = dict(
  num_images=checks.Range(2, 10**7),
  draws=checks.Range(2, 1000),
  neighbours=checks.SIZE,
  batch_size=checks.Range(1, 10**6),
)


def check(config: ConfigDict, num_devices: int) -> None:
  """Raises UserError on settings of the section `diversity` that the job would refuse."""
  pairs.require_policy(config, 'diversity')
  preconditions.check_single_pictures(config, 'diversity')
  c = config.diversity
  checks.choices('diversity.features', c.features, PREFIX)
  checks.ranges('diversity', c, RANGES)
  checks.at_least('diversity.num_images', c.num_images, c.neighbours + 1)
  for name in c.features:
    if name != 'encoder':
      quality.check(_quality_config(config, name), num_devices)


def run(this: Run) -> dict[str, Any]:
  """The job: coverage of the training images by what the agent explores.

  Sets of N images each: `explored`, one uniformly random step of each of N episodes that the last
  policy plays; `whole record`, N random frames of all that the policies of the run played, where
  pretrain.record kept them; `random actions`; `independent`, independent normal latents; and as
  references other training images and test images. All played ones but the record have the same
  labels.

  It reads seed, generator.path, diversity, quality (settings of features) and what pretraining
  reads of the config, and the newest checkpoint of the workdir's pretraining.

  Returns:
    `rows`, one dict a set and kind of features, with mean and standard deviation over the draws;
    `ceiling`; `paper`; `protocol`; `seconds`.

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
  experience.check_generator(this.workdir, generator)
  program = pretrain.make_program(config, generator, this.mesh)
  encoder = features.load_encoder(config, this.workdir, data.train.images.shape[1:])
  step = encoder.about['checkpoint_step']
  policy = play.load_policy(
    this.workdir / 'pretrain' / 'checkpoints', step, play.policy_template(program, this.mesh)
  )
  records = diversity_sets.records(this, generator) if config.pretrain.record else None
  n = diversity_sets.number(c, data, records)
  used = {name: make_extractor(this, encoder, name) for name in c.features}
  variables = devices.replicate(this.mesh, encoder.apply.args[0])
  arms = play.make_arms(program.setup, this.mesh, variables, policy)
  scores, widths = {}, {}
  progress = Progress('diversity: draws compared', c.draws * len(used), 'draws')
  for draw in range(c.draws):
    pictures, real = diversity_sets.draw(this, draw, n, arms, generator.num_classes, records)
    if len(used) > 1:  # played and drawn once for all of them
      batch = features.whole_batch(c.batch_size, n, this.mesh)
      pictures = {
        kind: diversity_sets.kept(drawn, n, batch, f'draw {draw + 1}, {kind}, drawing')
        for kind, drawn in pictures.items()
      }
    for name, extractor in used.items():
      what = f'draw {draw + 1}, {name} features, '
      h = extract(extractor, real, n, c.batch_size, this.mesh, what + 'training images')
      widths[name] = h.shape[1]
      for kind in pictures:
        fake = extract(extractor, pictures[kind], n, c.batch_size, this.mesh, what + kind)
        scores.setdefault((kind, name), []).append(score(h, fake, c.neighbours))
      share = 100 * scores['explored', name][-1]['unique_nn']
      done = draw * len(used) + list(used).index(name) + 1
      progress.update(done, {'explored, unique_nn %': share})
  order = sorted(scores, key=lambda key: list(used).index(key[1]))
  return dict(
    job='diversity',
    rows=[_row(kind, name, n, scores[kind, name]) for kind, name in order],
    ceiling=1 - (1 - 1 / n) ** n,
    paper=PAPER,
    protocol=_protocol(config, data, step, used, widths, n),
    **devices.describe(this.mesh),
    seconds=time.monotonic() - started,
  )


def score(real: np.ndarray, fake: np.ndarray, neighbours: int) -> dict[str, float]:
  """All numbers of one comparison of features (N, F): those of `coverage` and `prdc`, and FID."""
  a, b = moments([real]), moments([fake])
  return dict(
    coverage(real, fake),
    **prdc(real, fake, neighbours),
    FID=frechet_distance(a.mean, a.cov, b.mean, b.cov),
  )


def make_extractor(this: Run, encoder: Encoder, name: str) -> Extractor:
  """The extractor of a name of config.diversity.features; `encoder` is the run's own."""
  if name == 'encoder':
    variables = devices.replicate(this.mesh, encoder.apply.args[0])
    about = dict(encoder.about, network=encoder.name, sha256=encoder.sha256)
    return Extractor(encoder.apply.func, variables, about)
  config = _quality_config(this.config, name)
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


def _row(kind, name, n, drawn):
  """Mean and standard deviation over the draws of each number of a set in features of a name."""
  row = dict(set=kind, features=name, n=n)
  for metric in drawn[0]:
    values = [numbers[metric] for numbers in drawn]
    row[f'{PREFIX[name]}{metric}'] = float(np.mean(values))
    row[f'{PREFIX[name]}{metric}_sd'] = float(np.std(values, ddof=1))
  return row


def _protocol(config, data, step, used, widths, n):
  """Every setting that made the numbers."""
  c = config.diversity
  return dict(
    data=data.source,
    generator=str(config.generator.path or 'own'),
    checkpoint_step=step,
    features=list(c.features),
    extractor={name: extractor.about for name, extractor in used.items()},
    num_features=widths,
    distance='Euclidean, features not normalised',
    n=n,
    num_images=c.num_images,
    draws=c.draws,
    seed=config.seed,
    neighbours=c.neighbours,
    explored=f'{_policies(config.sac)}, one uniformly random step of each episode',
    whole_record='uniformly random frames of all that were recorded, without replacement',
    episode_length=config.environment.episode_length,
    alpha=config.environment.alpha,
    beta=config.environment.beta,
    dynamics=config.environment.dynamics,
    start=config.environment.start,
    latent_space=config.environment.latent_space,
    style_mixing=config.environment.style_mixing,
    crop=config.environment.crop,
    truncation_psi=config.environment.truncation_psi,
    noise='const',
    labels='image i has i mod classes; those of the record are its episodes own',
    real='training images, drawn anew in each draw; other training images share none with them',
    spread='standard deviation over draws',
  )


def _policies(c):
  if c.policies == 1:
    return 'last policy'
  return f'the last policy and up to {c.policies - 1} earlier ones, one an episode'


def table(results: dict[str, Any]) -> str:
  """The results as text: a row for each set, the paper's numbers beside it, then the protocol."""
  protocol, papers = results['protocol'], results['paper']
  cells = [['set', 'features', 'n', 'unique_nn %', *SHOWN[1:], 'paper Table 3 %']]
  for row in results['rows']:
    prefix = PREFIX[row['features']]
    numbers = [_cell(name, row[prefix + name], row[f'{prefix}{name}_sd']) for name in SHOWN]
    alike = row['features'] == 'inception' and row['set'] in papers
    paper = f'{papers[row["set"]]:.2f}' if alike else ''
    cells.append([row['set'], row['features'], f'{row["n"]:,}', *numbers, paper])
  note = 'paper Table 3: PALM and uniform latents, Inception features, 10,000 images of each set'
  others = [name for name in protocol['features'] if name != 'inception']
  if others or protocol['n'] != PAPER_IMAGES:
    ours = f'{" and ".join(others or ["inception"])} features of {protocol["n"]:,} images'
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


def _quality_config(config, name):
  """The config with features of a name in the section that extractors.make_extractor reads."""
  copied = config.copy_and_resolve_references()
  copied.quality.features = name
  if copied.quality.features != 'inception':
    copied.quality.inception_path = ''
  return copied


JOB = Job(
  'diversity',
  run,
  check,
  table=table,
  reads=('generator', 'pretrain'),
  judges=True,
  judges_with='quality',
  reads_files=lambda this: inception.files_of(this.config, this.config.diversity.features),
)
