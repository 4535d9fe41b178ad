"""Quality of a generator: the statistics against other implementations, the features, the job."""

import dataclasses
import json
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from ml_collections import ConfigDict
from sklearn.metrics.pairwise import polynomial_kernel
from sklearn.neighbors import NearestNeighbors

from palm_jax.base import devices
from palm_jax.base.checkpoints import Checkpoints
from palm_jax.base.errors import NonFiniteError, UserError
from palm_jax.data.arrays import Data, Split
from palm_jax.evaluate import classifier, distances, extractors, features, quality
from palm_jax.generator.stylegan2 import Generator
from palm_jax.resnet import ResNet
from tests.jobs import finish, saved_result

pytestmark = pytest.mark.usefixtures('shallow')

FIELDS = dict(z_dim=8, w_dim=8, num_classes=3, channels=(4, 4), image_channels=1, mapping_layers=1)


def covariance(seed, size, samples=None):
  x = np.random.default_rng(seed).normal(size=(samples or 3 * size, size)) * np.logspace(
    -2, 1, size
  )
  return x.mean(0), np.cov(x, rowvar=False)


# ---- statistics


def test_moments_of_batches_are_those_of_all():
  x = np.random.default_rng(0).normal(size=(50, 7)).astype(np.float32) + np.float32(
    1e4
  )  # far from the origin
  for cuts in ([50], [1, 2, 30, 50], [3, 4, 5]):
    got = distances.moments(part for part in np.split(x, cuts) if len(part))
    np.testing.assert_allclose(got.mean, x.mean(0, dtype=np.float64), rtol=1e-13)
    np.testing.assert_allclose(
      got.cov, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-9, atol=1e-12
    )
    assert got.count == 50
  with pytest.raises(UserError, match='1 samples'):
    distances.moments([x[:1]])


@pytest.mark.parametrize('size', [1, 5, 64])
def test_frechet_distance_equals_the_matrix_root(size):
  (mean_a, a), (mean_b, b) = covariance(0, size), covariance(1, size)
  a, b = a.reshape(size, size), b.reshape(size, size)
  root = scipy.linalg.sqrtm(a @ b).real
  wanted = np.sum((mean_a - mean_b) ** 2) + np.trace(a + b - 2 * root)
  np.testing.assert_allclose(distances.frechet_distance(mean_a, a, mean_b, b), wanted, rtol=1e-6)


def test_frechet_distance_of_singular_covariances():
  # In one eigenbasis it is the sum of (root a - root b)^2, zeros or not.
  basis = np.linalg.qr(np.random.default_rng(0).normal(size=(40, 40)))[0]
  a, b = (
    np.r_[np.logspace(0, 4, 12), np.zeros(28)],
    np.r_[np.zeros(6), np.logspace(-3, 3, 10), np.zeros(24)],
  )
  got = distances.frechet_distance(
    np.zeros(40), basis * a @ basis.T, np.ones(40), basis * b @ basis.T
  )
  np.testing.assert_allclose(got, 40 + np.sum((np.sqrt(a) - np.sqrt(b)) ** 2), rtol=1e-9)

  # Fewer samples than features: as with the features turned into the subspace that both span.
  generator = np.random.default_rng(1)
  x, y = generator.normal(size=(15, 100)), generator.normal(size=(20, 100)) * 3
  subspace = np.linalg.qr(np.concatenate([x - x.mean(0), y - y.mean(0)]).T)[0]
  wide = [part for z in (x, y) for part in distances.moments([z])[:2]]
  narrow = [part for z in (x, y) for part in distances.moments([z @ subspace])[:2]]
  shift = np.sum((wide[0] - wide[2]) ** 2) - np.sum((narrow[0] - narrow[2]) ** 2)
  np.testing.assert_allclose(
    distances.frechet_distance(*wide), distances.frechet_distance(*narrow) + shift, rtol=1e-9
  )


@pytest.mark.parametrize('samples', [10, 200])
def test_frechet_distance_is_symmetric_and_zero_for_equals(samples):
  a, b = covariance(0, 50, samples), covariance(1, 50, samples)
  np.testing.assert_allclose(
    distances.frechet_distance(*a, *b), distances.frechet_distance(*b, *a), rtol=1e-12
  )
  scale = np.trace(a[1])
  assert (
    0 <= distances.frechet_distance(*a, *a) < 1e-12 * scale < distances.frechet_distance(*a, *b)
  )
  assert distances.frechet_distance(*a, a[0] + 2, a[1]) == pytest.approx(4 * 50, rel=1e-9)
  constant = np.zeros(50), np.zeros((50, 50))
  assert distances.frechet_distance(*constant, *constant) == 0


def test_frechet_distance_refuses_what_does_not_match():
  mean, cov = covariance(0, 4)
  for other in ((mean[:3], cov), (mean, cov[:3]), (mean * np.nan, cov), (mean, cov + np.inf)):
    with pytest.raises(UserError, match=r'expected finite \(F,\)'):
      distances.frechet_distance(mean, cov, *other)


def test_kernel_distance_equals_a_double_loop_and_scikit_learn():
  generator = np.random.default_rng(0)
  x, y = generator.normal(size=(12, 5)) * 2, generator.normal(size=(12, 5)) + 1
  k = lambda a, b: (a @ b / 5 + 1) ** 3
  within = sum(k(x[i], x[j]) + k(y[i], y[j]) for i in range(12) for j in range(12) if i != j) / (
    12 * 11
  )
  across = sum(k(a, b) for a in x for b in y) / 144
  got, spread = distances.kernel_distance(x, y, 12, 3, seed=0)  # a subset of all is all
  np.testing.assert_allclose(got, within - 2 * across, rtol=1e-12)
  assert spread < 1e-12

  kernel = lambda a, b: polynomial_kernel(a, b, degree=3, coef0=1)
  off = lambda m: m[~np.eye(len(m), dtype=bool)].mean()
  np.testing.assert_allclose(
    got, off(kernel(x, x)) + off(kernel(y, y)) - 2 * kernel(x, y).mean(), rtol=1e-12
  )


def test_kernel_distance_over_subsets():
  generator = np.random.default_rng(0)
  x, y, z = (
    generator.normal(size=(400, 8)),
    generator.normal(size=(300, 8)),
    generator.normal(size=(300, 8)) + 0.5,
  )
  all_of_it, _ = distances.kernel_distance(x[:300], z, 300, 1, seed=0)
  mean, spread = distances.kernel_distance(x, z, 40, 200, seed=0)
  assert spread > 0
  assert abs(mean - all_of_it) < 5 * spread / np.sqrt(200) + 0.1 * all_of_it
  same, spread = distances.kernel_distance(x, y, 40, 200, seed=0)
  assert abs(same) < mean / 5  # unbiased: around zero
  assert distances.kernel_distance(x, z, 40, 5, seed=0) == distances.kernel_distance(
    x, z, 40, 5, seed=0
  )
  assert distances.kernel_distance(x, z, 40, 5, seed=0) != distances.kernel_distance(
    x, z, 40, 5, seed=1
  )
  for size in (1, 301):
    with pytest.raises(UserError, match='subset_size'):
      distances.kernel_distance(x, y, size, 5, seed=0)
  with pytest.raises(UserError, match='features are'):
    distances.kernel_distance(x, y[:, :3], 40, 5, seed=0)


def by_scikit_learn(real, fake, k):
  """By the tree, which subtracts coordinates; its brute force goes by Gram matrices."""

  def covered(points, centres):
    tree = NearestNeighbors(algorithm='kd_tree').fit(centres)
    radii = tree.kneighbors(centres, k + 1)[0][:, k]  # the first is itself, or its double
    distances = np.sqrt(((points[:, None] - centres[None]) ** 2).sum(-1))
    return np.mean((distances <= radii).any(1))

  return covered(fake, real), covered(real, fake)


@pytest.mark.parametrize('pairs', [2**22, 200])
@pytest.mark.parametrize('k', [1, 3, 10])
def test_precision_and_recall_equal_scikit_learn(k, pairs, monkeypatch):
  monkeypatch.setattr(distances, 'PAIRS_AT_ONCE', pairs)  # all at once, or a few rows
  generator = np.random.default_rng(k)
  real, fake = generator.normal(size=(90, 6)), generator.normal(size=(70, 6)) * 0.7 + 0.8
  got = distances.precision_recall(real, fake, k)
  np.testing.assert_allclose(got, by_scikit_learn(real, fake, k), atol=1e-12)
  assert 0 < got[1] < got[0] < 1
  np.testing.assert_allclose(distances.precision_recall(fake, real, k), got[::-1], atol=1e-12)


def test_precision_and_recall_of_near_duplicates():
  """Groups of points 1e-6 apart, 1000 from the origin, where Gram matrices see nothing: their
  errors are 1e-9 squared."""
  generator = np.random.default_rng(0)
  groups = generator.normal(size=(8, 16)) * 1000
  draw = lambda n: groups[generator.integers(0, 8, n)] + generator.normal(size=(n, 16)) * 1e-6
  real, fake = draw(120), draw(100)
  wanted = by_scikit_learn(real, fake, 3)
  assert 0.1 < wanted[0] < 1
  np.testing.assert_allclose(distances.precision_recall(real, fake, 3), wanted, atol=1e-12)


def test_precision_and_recall_of_doubles():
  """A ball of radius zero holds its own doubles."""
  points = np.random.default_rng(0).normal(size=(6, 40)).astype(np.float32) + 7
  real = np.repeat(points, 5, 0)
  assert distances.precision_recall(real, np.concatenate([points, points + 1e-3]), 3) == (0.5, 1.0)
  assert distances.precision_recall(real, real, 3) == (1.0, 1.0)
  assert distances.precision_recall(np.ones((5, 3)), np.ones((6, 3)), 3) == (1.0, 1.0)
  assert distances.precision_recall(np.ones((5, 3)), np.zeros((6, 3)), 3) == (0.0, 0.0)
  for k in (0, 6):
    with pytest.raises(UserError, match='k is'):
      distances.precision_recall(real, points, k)


# ---- pictures drawn


@dataclasses.dataclass(frozen=True)
class Stripes:
  """A generator whose first pixel tells the label and whose others tell z, psi and noise."""

  variables: Any = None
  z_dim, num_classes, image_shape = 4, 3, (2, 4, 1)

  def apply(self, variables, z, labels, truncation_psi, noise, noise_keys):
    assert noise == 'random'
    drawn = jax.vmap(lambda key: jax.random.uniform(key, (3,)))(noise_keys)
    first = (labels[:, None] * 10 - 128) / 127.5
    return (
      jnp.concatenate([first, jnp.tanh(z * truncation_psi), drawn], 1).reshape(-1, 2, 4, 1)
      + variables['shift']
    )


def drawn(count, num_devices, num_images, labels, shift=0.0, **settings):
  c = ConfigDict(dict(seed=3, quality=quality.default_config()))
  c.quality.update(dict(batch_size=8, num_images=num_images, features='pixels', **settings))
  mesh = devices.make_mesh(num_devices)
  extractor = extractors.make_extractor(c, None, None, mesh)
  draw = quality.make_draw(c, Stripes(), extractor, np.asarray(labels), mesh)
  h, classes = draw({'shift': np.float32(shift)}, 'images')
  assert h.shape == (count, 8)
  levels = np.round((h + 1) * 127.5)
  np.testing.assert_allclose(levels[:, 0] / 10, classes, atol=0.11)
  return levels


def test_pictures_depend_on_seed_and_number_only():
  labels = [0, 2, 2, 2]
  one = drawn(29, 1, 29, labels)
  for num_devices in (2, 8):
    np.testing.assert_allclose(
      drawn(29, num_devices, 29, labels), one, atol=1.01
    )  # rounding may tip a level
  np.testing.assert_array_equal(drawn(13, 1, 13, labels), one[:13])  # a ragged tail is cut
  assert len(np.unique(one, axis=0)) == 29
  half = drawn(29, 1, 29, labels, truncation_psi=0.0)
  np.testing.assert_array_equal(half[:, 1:5], np.full((29, 4), 128))
  np.testing.assert_array_equal(half[:, 5:], one[:, 5:])


def test_labels_are_those_of_random_training_images():
  labels = np.round(drawn(400, 8, 400, [0, 2, 2, 2])[:, 0] / 10)
  counts = np.bincount(labels.astype(int), minlength=3)
  assert counts[1] == 0
  assert abs(counts[2] - 300) < 5 * np.sqrt(400 * 0.75 * 0.25)


def test_pictures_that_are_not_finite():
  with pytest.raises(NonFiniteError, match='8 of images 0 to 7 hold NaN'):
    drawn(8, 1, 8, [0], shift=np.nan)


def test_features_that_are_not_finite():
  with pytest.raises(
    NonFiniteError, match='test images are NaN .* in 1 of 3 rows, first in row 1: look'
  ):
    features.check_finite(np.array([[1.0], [np.inf], [2.0]]), 'test images', 'look')


# ---- the job


@pytest.fixture(scope='module')
def data():
  """Three classes of 8x8 grey pictures: bright rows at the top, in the middle, at the bottom, with
  noise."""

  def split(seed, n):
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 3, n)
    images = generator.integers(0, 120, (n, 8, 8, 1))
    for i, label in enumerate(labels):
      images[i, 3 * label : 3 * label + 2] += 120
    return Split(images.astype(np.uint8), labels)

  return Data(split(0, 96), split(1, 40), ('top', 'middle', 'bottom'), 'rows')


@pytest.fixture(scope='module')
def generator_run(tmp_path_factory):
  """Workdir of a run with a generator, which nobody trained."""
  workdir = tmp_path_factory.mktemp('generator')
  network = Generator(**FIELDS)
  variables = jax.device_get(
    jax.jit(network.init)(jax.random.key(5), jnp.zeros((1, 8)), jnp.zeros((1,), jnp.int32))
  )
  with Checkpoints(workdir / 'generator' / 'checkpoints') as checkpoints:
    (workdir / 'generator' / 'network.json').write_text(json.dumps(FIELDS))
    checkpoints.save(7, {'generator': variables}, {})
  return workdir


def job_config(path, **changes):
  c = ConfigDict(dict(seed=0, generator=dict(path='', pad=0), quality=quality.default_config()))
  c.quality.update(
    dict(
      path=str(path),
      num_images=50,
      batch_size=16,
      kid_subsets=5,
      proxy_width=2,
      proxy_epochs=8,
      proxy_batch_size=16,
      **changes,
    )
  )
  return c


@pytest.fixture(scope='module')
def mesh():
  return devices.make_mesh(2)


@pytest.fixture(scope='module')
def finished(data, generator_run, mesh, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('quality')
  return workdir, finish(quality.JOB, job_config(generator_run), workdir, data, mesh)


def test_the_job_reports_every_comparison(finished):
  workdir, results = finished
  assert saved_result(workdir / 'results' / 'quality.json') == results
  rows = results['rows']
  assert [(row['set'], row['n_real'], row['n']) for row in rows] == [
    ('generator', 96, 50),
    ('initial generator', 96, 50),
    ('generator', 40, 40),
    ('initial generator', 40, 40),
    ('test images', 40, 40),
    ('training images', 40, 40),
  ]
  names = ['proxy-FID', 'proxy-KID', 'proxy-KID_sd', 'proxy-precision', 'proxy-recall']
  for row in rows:
    assert list(row)[3:] == names
    assert all(np.isfinite(row[name]) for name in names)
  assert min(row['proxy-FID'] for row in rows[:4]) > 2 * max(row['proxy-FID'] for row in rows[4:])
  # Other training images than those that they stand against.
  assert rows[5]['proxy-FID'] > 1e-3 * rows[0]['proxy-FID'] and rows[5]['proxy-recall'] < 1
  assert results['initial_over_generator'] == pytest.approx(
    rows[1]['proxy-FID'] / rows[0]['proxy-FID']
  )
  recognised = results['recognised']
  assert (
    recognised.keys() == {'generator', 'initial generator', 'test images'}
    and max(recognised.values()) <= 1
  )
  assert (
    recognised['test images'] == results['protocol']['extractor']['test_accuracy']
  )  # all of them
  protocol = results['protocol']
  assert [
    protocol[name] for name in ('checkpoint_step', 'num_images', 'equal_n', 'kid_subset_size')
  ] == [7, 50, 40, 20]
  assert protocol['extractor']['test_accuracy'] > 0.9
  assert results['versions']['jax'] == jax.__version__

  text = quality.table(results)
  lines = text.splitlines()
  assert len({len(line) for line in lines[:7]}) == 1
  assert lines[0].split() == ['set', 'n_real', 'n', *names]
  assert 'FID' not in text.replace('proxy-FID', '')
  assert lines[-1].startswith('protocol: ') and 'truncation_psi=1.0' in lines[-1]


def test_the_proxy_is_trained_once(finished, data, generator_run, mesh):
  workdir, results = finished
  before = {
    path: path.stat().st_mtime_ns for path in (workdir / 'classifiers').rglob('*') if path.is_file()
  }
  again = finish(quality.JOB, job_config(generator_run), workdir, data, mesh)
  assert {
    path: path.stat().st_mtime_ns for path in (workdir / 'classifiers').rglob('*') if path.is_file()
  } == before
  assert again['rows'] == results['rows']
  config = job_config(generator_run)
  config.seed = 1
  extractors.proxy(config, workdir, data, mesh)
  assert len(list((workdir / 'classifiers').iterdir())) == 2


@pytest.mark.slow
def test_the_proxy_does_not_depend_on_the_number_of_devices(data, mesh, tmp_path):
  """In float64; its batch normalisation sees the batch of all devices."""
  config = job_config('')
  config.quality.proxy_epochs = 1
  colour = data._replace(
    train=Split(np.repeat(data.train.images[:32], 3, -1), data.train.labels[:32]),
    test=Split(np.repeat(data.test.images, 3, -1), data.test.labels),
  )
  jax.config.update(
    'jax_disable_most_optimizations', True
  )  # these few steps cost far less than their compilation
  try:
    with jax.enable_x64(True):
      network = classifier.Classifier(ResNet(2, 'data'), 3)
      c = classifier.default_config()
      c.update(dict(epochs=1, batch_size=config.quality.proxy_batch_size))
      draw = lambda: jax.tree.map(
        lambda x: x.astype(jnp.float64), network.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
      )
      first = jax.device_get(jax.jit(draw)())

      def train(on):
        variables, folder = devices.replicate(on, first), tmp_path / str(on.size)
        return jax.device_get(
          classifier.train(network, variables, c, colour.train, 0, on, 'proxy', folder)
        )

      one, two = train(devices.make_mesh(1)), train(mesh)
  finally:
    jax.config.update('jax_disable_most_optimizations', False)
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)
  assert any(
    np.abs(a - b).max() > 1e-3
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(first), strict=True)
  )


def test_other_data_are_refused(data, generator_run, tmp_path, mesh):
  config = job_config(generator_run, features='pixels')
  larger = data._replace(train=Split(np.zeros((96, 16, 16, 1), np.uint8), data.train.labels))
  with pytest.raises(
    UserError, match=r'makes images of \(8, 8, 1\) in 3 classes, but the data are \(16, 16, 1\)'
  ):
    finish(quality.JOB, config, tmp_path, larger, mesh)
  with pytest.raises(UserError, match='in 3 classes, but the data are .* in 4'):
    finish(quality.JOB, config, tmp_path, data._replace(class_names=('a', 'b', 'c', 'd')), mesh)
  with pytest.raises(UserError, match='leave 3 for comparisons at equal numbers'):
    finish(
      quality.JOB,
      config,
      tmp_path,
      data._replace(test=Split(data.test.images[:3], data.test.labels[:3])),
      mesh,
    )
  config.quality.features = 'proxy'
  one_class = data._replace(train=Split(data.train.images, np.zeros(96, int)), class_names=('all',))
  with pytest.raises(UserError, match='one class.*inception_path.*pixels'):
    extractors.proxy(config, tmp_path, one_class, mesh)
  assert not (tmp_path / 'results').exists()


@pytest.mark.parametrize(
  'changes, message',
  [
    (
      dict(features='fid'),
      "quality.features='fid' is unknown: choose one of inception, proxy, pixels",
    ),
    (dict(features='inception', inception_path='absent.pth'), 'absent.pth.*is no file'),
    (dict(inception_path='absent.pth'), "quality.features='proxy'"),
    (dict(noise='some'), "quality.noise='some'"),
    (dict(num_images=1), 'quality.num_images=1 is too small'),
    (dict(proxy_lr=float('nan')), 'quality.proxy_lr=nan'),
    (dict(proxy_batch_size=15), 'quality.proxy_batch_size=15'),
  ],
)
def test_settings_that_cannot_work(changes, message):
  config = ConfigDict(dict(quality=quality.default_config()))
  config.quality.update(changes)
  with pytest.raises(UserError, match=message) as caught:
    quality.check(config, 2)
  assert '\n' not in str(caught.value)


def test_precision_is_of_the_generated_and_recall_of_the_real():
  c, real = quality.default_config(), np.random.default_rng(0).normal(size=(60, 2))
  few = np.repeat(real[:1], 60, 0) + 1e-3 * np.random.default_rng(1).normal(size=(60, 2))
  found = quality.score(real, few, 'x-', 30, c, 0)
  assert found['x-precision'] == 1 and found['x-recall'] < 0.2


def test_each_set_is_of_its_own_weights(monkeypatch):
  draw = lambda variables, what: (variables, what)
  monkeypatch.setattr(quality, 'make_draw', lambda *_: draw)
  init = lambda key, z, label: {'first': z.sum() + label.sum()}
  network = types.SimpleNamespace(init=init)
  G = types.SimpleNamespace(network=network, variables='trained', z_dim=3)
  config = ConfigDict(dict(seed=0, quality=quality.default_config()))
  config.quality.compare_initial = True
  sets, _ = quality._generated(config, G, None, None, None)
  assert sets['generator'] == 'trained' and set(sets['initial generator']) == {'first'}


def test_defaults_work():
  quality.check(ConfigDict(dict(quality=quality.default_config())), 8)
