"""How close a generator's pictures are to the training images: Frechet and kernel distance,
precision and recall.

The distances are between features. With the Inception network of the literature they are FID and
KID; that network's weights are a file which the user must give. Without it the features are those
of a classifier trained here on the same images, and every number is called proxy-: it compares
generators of one data set, and nothing in the literature.
"""

import hashlib
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from palm_jax.base import devices
from palm_jax.base.errors import NonFiniteError, UserError
from palm_jax.base.metrics import Progress
from palm_jax.base.steps import list_steps
from palm_jax.base.tables import aligned, protocol_line
from palm_jax.evaluate import extractors, features, inception
from palm_jax.evaluate.distances import frechet_distance, kernel_distance, moments, precision_recall
from palm_jax.generator import load_generator
from palm_jax.generator.train import padded
from palm_jax.job import Job, Run
from palm_jax.layers.pixels import to_uint8

PREFIX = {'inception': '', 'proxy': 'proxy-', 'pixels': 'pixel-'}


def default_config():
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


def check(config, num_devices):
  """Raises UserError on settings of the whole config's section `quality` that cannot work."""
  c = config.quality
  if c.features not in PREFIX:
    raise UserError(
      f'quality.features={c.features!r} is unknown: choose one of {", ".join(PREFIX)}'
    )
  if c.features == 'inception':
    inception.check_file(c.inception_path)
  elif c.inception_path:
    raise UserError(
      f'quality.inception_path is given but quality.features={c.features!r}: set quality.features '
      'to '
      "'inception', or leave the path empty"
    )
  if c.noise not in ('random', 'const', 'none'):
    raise UserError(f"quality.noise={c.noise!r} is unknown: choose 'random', 'const' or 'none'")
  for name, least in dict(
    num_images=2,
    num_real=0,
    batch_size=1,
    kid_subsets=1,
    kid_subset_size=2,
    neighbours=1,
    proxy_width=1,
    proxy_epochs=1,
    proxy_batch_size=1,
    proxy_lr=0,
    proxy_weight_decay=0,
  ).items():
    if not c[name] >= least:
      raise UserError(f'quality.{name}={c[name]} is too small: set it to {least} or more')
  devices.check_divisible('quality.proxy_batch_size', c.proxy_batch_size, num_devices, 'devices')


def run(this: Run) -> dict:
  """The job: judges a generator, and the same network untrained, against the training images;
  prints the table.

  Each is compared twice: all of it (FID's custom), and equally few reals and fakes, where test
  images and other training images show what a perfect generator would get: Frechet distances grow
  as samples get fewer, and the proxy knows its training images better than any others. Writes
  <workdir>/results/quality.json.

  Args:
    config: the whole config; read are seed, generator.path and quality.
    workdir: pathlib.Path.
    data: palm_jax.data.arrays.Data.
    mesh: one-dimensional mesh, axis 'data'.

  Returns:
    The dict that was written: `rows`, a list of one dict a comparison; `recognised`, where the
    feature network is a classifier, {set: share of its pictures that it gives their class};
    `initial_over_generator`; `protocol`; `seconds`.

  Raises:
    UserError: no generator, or one of other images or classes than the data's; see also `proxy` and
      `inception.load`.
    NonFiniteError: the generator or the feature function gives values that are not finite.
  """
  config, workdir, data, mesh = this.config, this.workdir, this.data, this.mesh
  started, c, prefix = time.monotonic(), config.quality, PREFIX[config.quality.features]
  path = c.path or config.generator.path or workdir
  G = load_generator(path)
  data = data._replace(
    **{
      part: split._replace(images=padded(split.images, config.generator.pad))
      for part, split in dict(train=data.train, test=data.test).items()
    }
  )  # as it was trained on them
  if tuple(G.image_shape) != data.train.images.shape[1:]:
    raise UserError(
      f'the generator of {path} makes images of {tuple(G.image_shape)}, but the data are '
      f'{data.train.images.shape[1:]} ({data.source}): give the data it was trained on'
    )
  if G.num_classes not in (0, len(data.class_names)):
    raise UserError(
      f'the generator of {path} has {G.num_classes} classes, but the data {len(data.class_names)} '
      f'({data.source}): give the data it was trained on'
    )
  order = np.random.default_rng(config.seed).permutation(len(data.train.images))[
    : c.num_real or None
  ]
  few = min(len(order) // 2, len(data.test.images), c.num_images)
  if few < 4 or few <= c.neighbours:
    raise UserError(
      f'{len(order)} training, {len(data.test.images)} test and {c.num_images} generated images '
      f'leave {few} for '
      'comparisons at equal numbers, expected 4 or more and more than '
      f'quality.neighbours={c.neighbours}: '
      'give more images'
    )

  extractor = extractors.make_extractor(config, workdir, data, mesh)
  real = extract(extractor, data.train.images[order], c.batch_size, mesh, 'training images')
  test_order = np.random.default_rng(config.seed).permutation(len(data.test.images))[:few]
  test = extract(extractor, data.test.images[test_order], c.batch_size, mesh, 'test images')
  draw = make_draw(config, G, extractor, data.train.labels, mesh)
  sets, drawn_labels = {}, {}
  sets['generator'], drawn_labels['generator'] = draw(G.variables, 'generated images')
  if c.compare_initial:
    initial = jax.jit(G.network.init)(
      jax.random.key(config.seed), jnp.zeros((1, G.z_dim)), jnp.zeros((1,), jnp.int32)
    )
    name = 'initial generator'
    sets[name], drawn_labels[name] = draw(initial, f'images of the {name}')

  compared = [(name, real, fake) for name, fake in sets.items()]
  references = {'test images': test, 'training images': real[-few:]}
  compared += [(name, real[:few], other[:few]) for name, other in {**sets, **references}.items()]
  subset_size = min(
    c.kid_subset_size, few // 2
  )  # at most half: subsets that are all alike have no spread
  rows = [
    dict(set=name, **score(a, b, prefix, subset_size, c, config.seed)) for name, a, b in compared
  ]
  steps = list_steps(f'{path}/generator/checkpoints')
  results = dict(
    job='quality',
    rows=rows,
    protocol=dict(
      data=data.source,
      generator=str(path),
      checkpoint_step=steps[-1] if steps else None,
      generator_sha256=hashlib.sha256(
        b''.join(np.asarray(x).tobytes() for x in jax.tree.leaves(G.variables))
      ).hexdigest(),
      num_images=c.num_images,
      num_real=len(order),
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
    ),
    **devices.describe(mesh),
  )
  if extractor.classify and G.num_classes:
    judged = {name: (sets[name], drawn_labels[name]) for name in sets} | {
      'test images': (test, data.test.labels[test_order])
    }
    results['recognised'] = {
      name: float(np.mean(extractor.classify(h).argmax(1) == labels))
      for name, (h, labels) in judged.items()
    }
  if c.compare_initial:
    results['initial_over_generator'] = rows[1][f'{prefix}FID'] / max(
      rows[0][f'{prefix}FID'], 1e-12
    )
  results['seconds'] = time.monotonic() - started
  return results


def score(real, fake, prefix, subset_size, c, seed):
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


def extract(extractor, images, batch_size, mesh, what):
  """Features (N, F) float32 of images, with progress in the log."""
  apply, chunks = jax.tree_util.Partial(extractor.apply, extractor.variables), []
  progress = Progress(f'quality: {what}', len(images), 'images')
  starts = list(range(0, len(images), 8 * batch_size))
  if len(starts) > 1 and len(images) - starts[-1] < batch_size:
    starts.pop()  # less than a batch would be compiled again
  for start, stop in zip(starts, [*starts[1:], len(images)], strict=True):
    chunks.append(features.extract(apply, images[start:stop], batch_size, mesh))
    progress.update(stop, {})
  return check_finite(np.concatenate(chunks), what)


def make_draw(config, G, extractor, labels, mesh):
  """f(variables of G, what they are) -> features (num_images, F) and labels of its pictures, which
  stay on the devices.

  A picture is a function of (seed, its number): latent, label of a random training image, and
  noise.
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
    return (
      extractor.apply(feature_variables, to_uint8(images)),
      drawn,
      jnp.isfinite(images).all((1, 2, 3)),
    )

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
          'infinity: '
          'the generator is broken; take an earlier checkpoint'
        )
      chunks.append(chunk)
      progress.update(min(start + batch, c.num_images), {})
    h, drawn = (np.concatenate(arrays)[: c.num_images] for arrays in zip(*chunks, strict=True))
    return check_finite(h, what), drawn

  return draw


def check_finite(h, what):
  """Returns h (N, F), or raises NonFiniteError."""
  finite = np.isfinite(h).all(1)
  if not finite.all():
    raise NonFiniteError(
      f'quality: features of {(~finite).sum()} of {len(h)} {what} are NaN or infinite: the '
      'feature network '
      'is broken; check its file, or remove the proxy below classifiers/'
    )
  return h


def table(results):
  """The results of `evaluate` as text: a row for each comparison, the whole protocol in one line
  beneath."""
  header = list(results['rows'][0])
  cells = [header] + [
    [
      v if isinstance(v, str) else f'{v:,}' if isinstance(v, int) else f'{v:.4g}'
      for v in row.values()
    ]
    for row in results['rows']
  ]
  lines = aligned(cells)
  if 'recognised' in results:
    shares = ', '.join(f'{name} {share:.1%}' for name, share in results['recognised'].items())
    lines.append(f'given their class by the proxy: {shares}')
  if 'initial_over_generator' in results:
    lines.append(
      f'{header[3]} of the initial generator over that of the trained: '
      f'{results["initial_over_generator"]:.3g}'
    )
  return '\n'.join([*lines, protocol_line(results['protocol'])])


JOB = Job('quality', run, check, table=table, judges=True)
