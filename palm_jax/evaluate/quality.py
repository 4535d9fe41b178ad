"""How close a generator's pictures are to the training images.

By Frechet and kernel distance, precision and recall, all between features. With the Inception
network of the literature the distances are FID and KID; that network's weights are a file which the
user must give. Without it the features are those of a classifier trained here on the same images,
and every number is called proxy-: it compares generators of one data set, and nothing in the
literature.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from palm_jax.base import checks, devices, digests
from palm_jax.base.errors import NonFiniteError, UserError
from palm_jax.base.files import user_path
from palm_jax.base.metrics import Progress
from palm_jax.base.steps import list_steps
from palm_jax.base.tables import aligned, protocol_line
from palm_jax.evaluate import extractors, features, inception, preconditions
from palm_jax.evaluate.distances import frechet_distance, kernel_distance, moments, precision_recall
from palm_jax.evaluate.extractors import Extractor
from palm_jax.generator import load_generator
from palm_jax.generator.samples import padded
from palm_jax.generator.stylegan3 import StyleGAN3
from palm_jax.job import Job, Run
from palm_jax.layers.pixels import to_uint8

PREFIX = {'inception': '', 'proxy': 'proxy-', 'pixels': 'pixel-'}
BROKEN = 'the feature network is broken; check its file, or remove the proxy below classifiers/'

# (variables of the generator, what they are) -> features (N, F), labels (N,) of its pictures
Draw = Callable[[Any, str], tuple[np.ndarray, np.ndarray]]


def default_config() -> ConfigDict:
  """Features, sizes and settings of the distances."""
  return ConfigDict(
    dict(
      # 'inception': needs the file below; 'proxy': a classifier trained here; 'pixels'
      features='proxy',
      inception_path='',  # weight file of palm_jax/evaluate/inception.py
      path='',  # workdir whose generator to judge; empty: generator.path, else this workdir
      num_images=50_000,  # generated; FID's custom
      # training images to compare with; 0: all, as in stylegan2-ada-pytorch's fid50k_full
      num_real=0,
      truncation_psi=1.0,
      noise='random',  # stylegan2-ada-pytorch's metrics; 'const' is what PALM's world renders
      compare_initial=True,  # judge the same network before training, too
      batch_size=128,  # images a step over all devices
      kid_subsets=100,  # stylegan2-ada-pytorch, metrics/metric_main.py
      kid_subset_size=1000,  # the same
      neighbours=3,  # the same, pr50k3
      proxy_width=16,  # of a ResNet-18: 8 times as many features
      proxy_epochs=2,  # two CPU cores: about three minutes on CIFAR-10
      proxy_batch_size=128,
      proxy_lr=0.1,  # SGD with momentum: kuangliu/pytorch-cifar
      proxy_weight_decay=5e-4,  # the same
    )
  )


RANGES = dict(
  num_images=checks.Range(2, 10**7),
  num_real=checks.Range(0, 10**7),
  truncation_psi=checks.Range(0, 2),
  batch_size=checks.Range(1, 10**6),
  kid_subsets=checks.Range(1, 10**6),
  kid_subset_size=checks.Range(2, 10**6),
  neighbours=checks.SIZE,
  proxy_width=checks.Range(1, 1024),
  proxy_epochs=checks.Range(1, 10**6),
  proxy_batch_size=checks.Range(1, 10**6),
  proxy_lr=checks.RATE,
  proxy_weight_decay=checks.SHARE,
)


def check(config: ConfigDict, num_devices: int) -> None:
  """Raises UserError on settings of the section `quality` that the job would refuse."""
  c = config.quality
  checks.choice('quality.features', c.features, PREFIX)
  if c.features == 'inception':
    inception.check_file(c.inception_path)
  elif c.inception_path:
    raise UserError(
      f'quality.inception_path is given but quality.features={c.features!r}: set quality.features '
      "to 'inception', or leave the path empty"
    )
  checks.choice('quality.noise', c.noise, ('random', 'const', 'none'))
  checks.ranges('quality', c, RANGES)
  if c.features == 'proxy':
    checks.divisible('quality.proxy_batch_size', c.proxy_batch_size, num_devices, 'devices')


def run(this: Run) -> dict[str, Any]:
  """The job: judges a generator, and the same network untrained, against the training images.

  Each is compared twice: all of it (FID's custom), and equally few reals and fakes, where test
  images and other training images show what a perfect generator would get: Frechet distances grow
  as samples get fewer, and the proxy knows its training images better than any others.

  It reads seed, generator.path, generator.pad and quality of the config.

  Returns:
    `rows`, one dict a comparison; `recognised`, where the feature network is a classifier, {set:
    share of its pictures that it gives their class}; `initial_over_generator`; `protocol`;
    `seconds`.

  Raises:
    UserError: no generator, or one of other images or classes than the data's; see also
      extractors.proxy and inception.load.
    NonFiniteError: the generator or the feature function gives values that are not finite.
  """
  started, config, mesh = time.monotonic(), this.config, this.mesh
  c, prefix = config.quality, PREFIX[config.quality.features]
  path = c.path or config.generator.path or this.workdir
  G = load_generator(path)
  data = _as_trained_on(this.data, config.generator.pad)
  preconditions.check_generator(G, path, data)
  shuffled = lambda split: np.random.default_rng(config.seed).permutation(len(split.images))
  order = shuffled(data.train)[: c.num_real or None]
  few = _equal_number(c, len(order), len(data.test.images))
  test_order = shuffled(data.test)[:few]
  extractor = extractors.make_extractor(config, this.workdir, data, mesh)
  real = extract(extractor, data.train.images[order], c.batch_size, mesh, 'training images')
  test = extract(extractor, data.test.images[test_order], c.batch_size, mesh, 'test images')
  sets, drawn_labels = _generated(config, G, extractor, data.train.labels, mesh)
  compared = [(name, real, fake) for name, fake in sets.items()]
  others = sets | {'test images': test, 'training images': real[-few:]}
  compared += [(name, real[:few], other[:few]) for name, other in others.items()]
  # At most half: subsets that are all alike have no spread.
  subset_size = min(c.kid_subset_size, few // 2)
  rows = [
    dict(set=name, **score(a, b, prefix, subset_size, c, config.seed)) for name, a, b in compared
  ]
  results: dict[str, Any] = dict(
    job='quality',
    rows=rows,
    protocol=_protocol(config, G, path, data, extractor, real, few, subset_size),
    **devices.describe(mesh),
  )
  if extractor.classify and G.num_classes:
    judged = {name: (h, drawn_labels[name]) for name, h in sets.items()}
    judged['test images'] = test, data.test.labels[test_order]
    results['recognised'] = {
      name: float(np.mean(extractor.classify(h).argmax(1) == labels))
      for name, (h, labels) in judged.items()
    }
  if c.compare_initial:
    trained, initial = (row[f'{prefix}FID'] for row in rows[:2])
    results['initial_over_generator'] = initial / max(trained, 1e-12)
  return results | dict(seconds=time.monotonic() - started)


def _as_trained_on(data, pad):
  """The data with the margin that the generator was trained with."""
  train, test = (
    split._replace(images=padded(split.images, pad)) for split in (data.train, data.test)
  )
  return data._replace(train=train, test=test)


def _equal_number(c, num_train, num_test):
  """Images a side where equally many are compared."""
  few = min(num_train // 2, num_test, c.num_images)
  if few < 4 or few <= c.neighbours:
    raise UserError(
      f'{num_train} training, {num_test} test and {c.num_images} generated images leave {few} for '
      'comparisons at equal numbers, expected 4 or more and more than '
      f'quality.neighbours={c.neighbours}: give more images'
    )
  return few


def _generated(config, G, extractor, labels, mesh):
  """{set: features (N, F)} and {set: labels (N,)} of the generator, and of it before training."""
  draw = make_draw(config, G, extractor, labels, mesh)
  sets, drawn_labels = {}, {}
  sets['generator'], drawn_labels['generator'] = draw(G.variables, 'generated images')
  if config.quality.compare_initial:
    initial = devices.jit_once(G.network.init)(
      jax.random.key(config.seed), jnp.zeros((1, G.z_dim)), jnp.zeros((1,), jnp.int32)
    )
    if isinstance(G.network, StyleGAN3):  # whose filters are not initialised but designed
      initial = {**initial, 'buffers': G.variables['buffers']}
    name = 'initial generator'
    sets[name], drawn_labels[name] = draw(initial, f'images of the {name}')
  return sets, drawn_labels


def score(
  real: np.ndarray, fake: np.ndarray, prefix: str, subset_size: int, c: ConfigDict, seed: int
) -> dict[str, float]:
  """All numbers of one comparison: {'n_real', 'n', '<prefix>FID', '<prefix>KID', ...}."""
  batches = lambda h: (h[i : i + 4096] for i in range(0, len(h), 4096))
  a, b = moments(batches(real)), moments(batches(fake))
  kid, kid_sd = kernel_distance(real, fake, subset_size, c.kid_subsets, seed)
  precision, recall = precision_recall(real, fake, c.neighbours)
  numbers = dict(
    FID=frechet_distance(a.mean, a.cov, b.mean, b.cov),
    KID=kid,
    KID_sd=kid_sd,
    precision=precision,
    recall=recall,
  )
  return dict(
    n_real=len(real), n=len(fake), **{prefix + name: value for name, value in numbers.items()}
  )


def extract(
  extractor: Extractor, images: np.ndarray, batch_size: int, mesh: Mesh, what: str
) -> np.ndarray:
  """Features (N, F) float32 of images, with progress in the log.

  Raises:
    NonFiniteError: some are not finite.
  """
  progress = Progress(f'quality: {what}', len(images), 'images')
  h = features.extract(extractor.partial(), images, batch_size, mesh, progress)
  features.check_finite(h, f'quality: features of {what}', BROKEN)
  return h


def make_draw(
  config: ConfigDict, G: Any, extractor: Extractor, labels: np.ndarray, mesh: Mesh
) -> Draw:
  """How quality.num_images pictures are drawn; the pictures stay on the devices.

  A picture is a function of (seed, its number): latent, label of a random training image, and
  noise.

  Args:
    labels: of the training images.
  """
  c = config.quality
  batch = -(-c.batch_size // mesh.size) * mesh.size

  @jax.default_matmul_precision('highest')  # stylegan2-ada-pytorch, calc_metrics.py: no TF32
  def call(variables, feature_variables, labels, ids):
    keys = jax.vmap(
      lambda i: jax.random.split(jax.random.fold_in(jax.random.key(config.seed), i), 3)
    )(ids)
    z = jax.vmap(lambda key: jax.random.normal(key, (G.z_dim,)))(keys[:, 0])
    drawn = labels[jax.vmap(lambda key: jax.random.randint(key, (), 0, len(labels)))(keys[:, 1])]
    images = G.apply(variables, z, drawn, c.truncation_psi, noise=c.noise, noise_keys=keys[:, 2])
    h = extractor.apply(feature_variables, to_uint8(images))
    return h, drawn, jnp.isfinite(images).all((1, 2, 3))

  sharded = jax.shard_map(call, mesh=mesh, in_specs=(P(), P(), P(), P('data')), out_specs=P('data'))
  call = jax.jit(sharded, out_shardings=NamedSharding(mesh, P()))
  labels = devices.replicate(mesh, labels.astype(np.int32))

  def draw(variables, what):
    variables, chunks = devices.replicate(mesh, variables), []
    progress = Progress(f'quality: {what}', c.num_images, 'images')
    for start in range(0, c.num_images, batch):
      ids = np.arange(start, start + batch, dtype=np.int32)
      *chunk, finite = jax.device_get(
        call(variables, extractor.variables, labels, devices.shard(mesh, ids, P('data')))
      )
      if not finite.all():
        raise NonFiniteError(
          f'quality: {(~finite).sum()} of {what} {start} to {start + batch - 1} hold NaN or '
          'infinity: the generator is broken; give another with --config.generator.path, or remove '
          'its newest step below generator/checkpoints'
        )
      chunks.append(chunk)
      progress.update(min(start + batch, c.num_images), {})
    h, drawn = (np.concatenate(arrays)[: c.num_images] for arrays in zip(*chunks, strict=True))
    features.check_finite(h, f'quality: features of {what}', BROKEN)
    return h, drawn

  return draw


def _protocol(config, G, path, data, extractor, real, few, subset_size):
  """Every setting that made the numbers."""
  c = config.quality
  steps = list_steps(user_path(path) / 'generator' / 'checkpoints')
  return dict(
    data=data.source,
    generator=str(path),
    checkpoint_step=steps[-1] if steps else None,
    generator_sha256=digests.of_arrays(*jax.tree.leaves(G.variables)),
    num_images=c.num_images,
    num_real=len(real),
    equal_n=few,
    seed=config.seed,
    latents='normal, by global sample id',
    labels='of random training images' if G.num_classes else 'none',
    truncation_psi=c.truncation_psi,
    noise=c.noise,
    images='uint8, clip(x * 127.5 + 128)',
    features=c.features,
    extractor=extractor.about,
    num_features=real.shape[1],
    frechet='squared; covariances divided by n - 1',
    kid_subsets=c.kid_subsets,
    kid_subset_size=subset_size,
    kernel='(x.y / F + 1)^3, unbiased',
    neighbours=c.neighbours,
    references='test images, and training images that share none with the other side, at '
    'equal_n a side',
  )


def table(results: dict[str, Any]) -> str:
  """The results as text: a row for each comparison, then the protocol."""
  header = list(results['rows'][0])
  lines = aligned([header, *([_cell(v) for v in row.values()] for row in results['rows'])])
  if 'recognised' in results:
    shares = ', '.join(f'{name} {share:.1%}' for name, share in results['recognised'].items())
    lines.append(f'given their class by the proxy: {shares}')
  if 'initial_over_generator' in results:
    lines.append(
      f'{header[3]} of the initial generator over that of the trained: '
      f'{results["initial_over_generator"]:.3g}'
    )
  return '\n'.join([*lines, protocol_line(results['protocol'])])


def _cell(value):
  if isinstance(value, str):
    return value
  return f'{value:,}' if isinstance(value, int) else f'{value:.4g}'


JOB = Job(
  'quality',
  run,
  check,
  table=table,
  reads=('generator',),
  judges=True,
  reads_files=lambda this: inception.files_of(this.config, (this.config.quality.features,)),
)
