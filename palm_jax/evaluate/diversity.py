"""How much of the data an agent's play comes near to, beside independent draws of the same
generator (PALM, Table 3).

The share of training images that are the nearest of some generated image depends on the features
and on the number of images, and identical distributions are far from its ceiling; so other training
images and test images are judged beside the generated ones, at the same number.
"""

import time

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from palm_jax import pairs, pretrain, worlds
from palm_jax.base import devices
from palm_jax.base.errors import NonFiniteError, UserError
from palm_jax.base.metrics import Progress
from palm_jax.base.tables import aligned, protocol_line
from palm_jax.evaluate import extractors, features, play, quality
from palm_jax.evaluate.coverage import coverage, prdc
from palm_jax.evaluate.distances import frechet_distance, moments
from palm_jax.job import Job, Run

PREFIX = quality.PREFIX | {'encoder': 'encoder-'}
SETS = ('explored', 'random actions', 'independent', 'other training images', 'test images')
PAPER = {
  'explored': 58.87,
  'independent': 50.16,
}  # Table 3, percent; N = M = 10,000, Inception features
SHOWN = ('unique_nn', 'precision', 'recall', 'density', 'coverage', 'FID')


def default_config():
  return ConfigDict(
    dict(
      # the run's own; 'inception', 'proxy' (both with the settings of `quality`), 'pixels'
      features='encoder',
      num_images=10_000,  # of each set: paper Table 3
      draws=3,  # of training images and of generated ones
      # of precision, recall, density and coverage: clovaai/generative-evaluation-prdc
      neighbours=5,
      # the final agent plays again; 'record': pretrain.record's episodes, of the whole run
      explored='policy',
      batch_size=256,  # episodes and images at a time over all devices
    )
  )


def check(config, num_devices):
  """Raises UserError on settings of the whole config's section `diversity` that cannot work."""
  pairs.require_policy(config, 'diversity')
  features.check_single_pictures(config, 'diversity')
  c = config.diversity
  for name, known in (('features', PREFIX), ('explored', ('policy', 'record'))):
    if c[name] not in known:
      raise UserError(f'diversity.{name}={c[name]!r} is unknown: choose one of {", ".join(known)}')
  for name, least in dict(neighbours=1, num_images=c.neighbours + 1, draws=2, batch_size=1).items():
    if c[name] < least:
      raise UserError(f'diversity.{name}={c[name]} is too small: set it to {least} or more')
  if c.explored == 'record' and not config.pretrain.record:
    raise UserError(
      "diversity.explored='record' needs what the run lived through: pretrain with "
      '--config.pretrain.record'
    )
  if c.features != 'encoder':
    quality.check(_quality_config(config), num_devices)


def run(this: Run) -> dict:
  """The job: coverage of the training images by what the agent explores; prints the table.

  Sets of N images each: `explored`, one uniformly random step of each of N episodes; `random
  actions`, the same with uniformly random actions; `independent`, independent normal latents; and
  as references other training images and test images. The first three have the same labels. Writes
  <workdir>/results/diversity.json.

  Args:
    config: the whole config; read are seed, generator.path, diversity, quality (settings of
      features) and what pretraining reads.
    workdir: pathlib.Path of a run with a checkpoint of its pretraining.
    data: palm_jax.data.arrays.Data.
    mesh: one-dimensional mesh, axis 'data'.

  Returns:
    The dict that was written: `rows`, one dict a set with mean and standard deviation over the
    draws; `ceiling`; `paper`; `protocol`; `seconds`.

  Raises:
    UserError: no encoder, agent or record in the workdir, other images or classes than the
      generator's, or too few.
    NonFiniteError: features that are not finite.
  """
  config, workdir, data, mesh = this.config, this.workdir, this.data, this.mesh
  started, c, prefix = time.monotonic(), config.diversity, PREFIX[config.diversity.features]
  generator = worlds.load_world_generator(config, workdir)
  shape, num_classes = data.train.images.shape[1:], len(data.class_names)
  if tuple(generator.image_shape) != shape or generator.num_classes not in (0, num_classes):
    raise UserError(
      f'the generator of {config.generator.path or workdir} makes images of '
      f'{tuple(generator.image_shape)} in '
      f'{generator.num_classes} classes, but the data are {shape} in {num_classes} '
      f'({data.source}): '
      'give the data it was trained on'
    )
  program = pretrain.make_program(config, generator, mesh)
  encoder = features.load_encoder(config, workdir, shape)
  step = encoder.about['checkpoint_step']
  actor = play.load_actor(
    workdir / 'pretrain' / 'checkpoints',
    step,
    play.actor_template(config, generator, program, mesh),
  )
  available = {
    'half of the training images': len(data.train.images) // 2,
    'test images': len(data.test.images),
  }
  records = []
  if c.explored == 'record':
    records = [
      play.recorded(
        workdir / 'pretrain' / 'experience',
        config.environment.episode_length,
        c.num_images,
        [config.seed, draw],
      )
      for draw in range(c.draws)
    ]
    available['recorded episodes'] = len(records[0][0])
    if records[0][0].shape[1:] != (generator.z_dim,):
      raise UserError(
        f'{workdir / "pretrain" / "experience"} holds latents of {records[0][0].shape[1:]}, but '
        'the generator '
        f'takes ({generator.z_dim},): give the generator that was played in'
      )
  least = min(available, key=available.get)
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

  extractor = make_extractor(config, workdir, data, mesh, encoder)
  arms = play.make_arms(
    config, generator, program, mesh, devices.replicate(mesh, encoder.apply.args[0]), actor
  )
  batch = -(-min(c.batch_size, n) // mesh.size) * mesh.size
  scores, progress = (
    {name: [] for name in SETS},
    Progress('diversity: sets compared', c.draws * len(SETS), 'sets'),
  )
  for draw in range(c.draws):
    rng, key = (
      np.random.default_rng([config.seed, draw]),
      jax.random.fold_in(jax.random.key(config.seed), draw),
    )
    order, test_order = (
      rng.permutation(len(data.train.images)),
      rng.permutation(len(data.test.images)),
    )
    show = lambda images, order: lambda rows: images[order[rows]]
    pictures = generated(
      arms,
      key,
      n,
      generator.num_classes,
      config.environment.episode_length,
      records[draw] if records else None,
    ) | {
      'other training images': show(data.train.images, order[n : 2 * n]),
      'test images': show(data.test.images, test_order),
    }
    real = extract(
      extractor, show(data.train.images, order), n, batch, mesh, f'draw {draw + 1}, training images'
    )
    for i, name in enumerate(SETS):
      h = extract(extractor, pictures[name], n, batch, mesh, f'draw {draw + 1}, {name}')
      scores[name].append(score(real, h, c.neighbours))
      progress.update(
        draw * len(SETS) + i + 1, {'unique_nn %': 100 * scores[name][-1]['unique_nn']}
      )

  rows = []
  for name, drawn in scores.items():
    rows.append(dict(set=name, n=n))
    for metric in drawn[0]:
      values = [numbers[metric] for numbers in drawn]
      rows[-1] |= {
        f'{prefix}{metric}': float(np.mean(values)),
        f'{prefix}{metric}_sd': float(np.std(values, ddof=1)),
      }
  results = dict(
    job='diversity',
    rows=rows,
    ceiling=1 - (1 - 1 / n) ** n,
    paper=PAPER,
    protocol=dict(
      data=data.source,
      generator=str(config.generator.path or 'own'),
      checkpoint_step=step,
      features=c.features,
      extractor=extractor.about,
      num_features=real.shape[1],
      distance='Euclidean, features not normalised',
      n=n,
      num_images=c.num_images,
      draws=c.draws,
      seed=config.seed,
      neighbours=c.neighbours,
      explored={
        'policy': 'final agent, one uniformly random step of each episode',
        'record': 'of all complete recorded episodes, one uniformly random step of each',
      }[c.explored],
      episode_length=config.environment.episode_length,
      alpha=config.environment.alpha,
      beta=config.environment.beta,
      truncation_psi=config.environment.truncation_psi,
      noise='const',
      labels='image i has i mod classes'
      if c.explored == 'policy'
      else 'of the recorded episodes, in all generated sets',
      real='training images, drawn anew in each draw; other training images share none with them',
      spread='standard deviation over draws',
    ),
    **devices.describe(mesh),
    seconds=time.monotonic() - started,
  )
  return results


def generated(arms, key, n, num_classes, episode_length, record=None):
  """One draw of the generated sets, n images each: the same labels in all, image i of all classes
  in turn.

  Args:
    arms: see `play.make_arms`.
    key: of the draw; `explored` and `random actions` begin alike and differ by their actions only.
    n: images of each.
    num_classes: of the generator; 0 is unconditional.
    episode_length: frames an episode.
    record: (z, labels) of `play.recorded`, n or more, which are then the explored ones, and their
      labels those of all.

  Returns:
    {set: f(rows (B,) int in [0, n)) -> (B, H, W, C) uint8}.
  """
  ids = play.by_chosen_step(key, np.arange(n, dtype=np.int32), episode_length)
  explored, which, labels = (
    ('record', *record) if record else ('policy', ids, ids % max(num_classes, 1))
  )
  pictures = lambda arm, which: lambda rows: arms[arm](key, which[rows], labels[rows])
  return {
    'explored': pictures(explored, which),
    'random actions': pictures('uniform', ids),
    'independent': pictures('independent', ids),
  }


def score(real, fake, neighbours):
  """All numbers of one comparison of features (N, F): those of `coverage` and `prdc`, and FID."""
  a, b = moments([real]), moments([fake])
  return dict(
    coverage(real, fake),
    **prdc(real, fake, neighbours),
    FID=frechet_distance(a.mean, a.cov, b.mean, b.cov),
  )


def make_extractor(config, workdir, data, mesh, encoder):
  """The extractors.Extractor that config.diversity.features names; `encoder` is the run's own, a
  features.Encoder."""
  if config.diversity.features == 'encoder':
    return extractors.Extractor(
      encoder.apply.func,
      devices.replicate(mesh, encoder.apply.args[0]),
      dict(encoder.about, network=encoder.name, sha256=encoder.sha256),
    )
  return extractors.make_extractor(_quality_config(config), workdir, data, mesh)


def extract(extractor, pictures, n, batch, mesh, what):
  """Features (n, F) float32 of pictures (rows (batch,) int) -> (batch, H, W, C) uint8, with
  progress in the log."""
  apply, chunks = jax.tree_util.Partial(extractor.apply, extractor.variables), []
  progress = Progress(f'diversity: {what}', n, 'images')
  for start in range(0, n, batch):
    rows = np.arange(start, start + batch) % n  # one shape, so one compilation
    chunks.append(features.extract(apply, pictures(rows), batch, mesh))
    progress.update(min(start + batch, n), {})
  h = np.concatenate(chunks)[:n]
  finite = np.isfinite(h).all(1)
  if not finite.all():
    raise NonFiniteError(
      f'diversity: features of {(~finite).sum()} of {n} images ({what}) are NaN or infinite: '
      'the generator or the feature network is broken'
    )
  return h


def table(results):
  """The results of `evaluate` as text: a row for each set, the paper's numbers beside, the whole
  protocol in one line beneath."""
  prefix, protocol = PREFIX[results['protocol']['features']], results['protocol']
  cells = [
    [
      'set',
      'n',
      *(prefix + name + (' %' if name == 'unique_nn' else '') for name in SHOWN),
      'paper Table 3 %',
    ]
  ]
  for row in results['rows']:
    cells.append([row['set'], f'{row["n"]:,}'])
    for name in SHOWN:
      mean, sd = (row[prefix + name + ending] for ending in ('', '_sd'))
      cells[-1].append(
        f'{100 * mean:.2f} +- {100 * sd:.2f}' if name == 'unique_nn' else f'{mean:.4g} +- {sd:.2g}'
      )
    cells[-1].append(
      f'{results["paper"][row["set"]]:.2f}' if row['set'] in results['paper'] else ''
    )
  comparable = protocol['features'] == 'inception' and protocol['n'] == 10_000
  return '\n'.join(
    [
      *aligned(cells),
      'ceiling of unique_nn, hits spread uniformly over the training images: '
      f'{results["ceiling"]:.2%}',
      'paper Table 3: PALM and uniform latents, Inception features, 10,000 images of each set'
      + (
        ''
        if comparable
        else f'; not comparable with these {protocol["features"]} features of {protocol["n"]:,} images'
      ),
      protocol_line(protocol),
    ]
  )


def _quality_config(config):
  """The config with this section's features in the section that extractors.make_extractor reads."""
  copied = config.copy_and_resolve_references()
  copied.quality.features = copied.diversity.features
  if copied.quality.features != 'inception':
    copied.quality.inception_path = ''
  return copied


JOB = Job('diversity', run, check, table=table, judges=True)
