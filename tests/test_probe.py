import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits

from configs import cifar as cifar_config
from palm_jax.base import devices
from palm_jax.base.checkpoints import Checkpoints
from palm_jax.base.errors import UserError
from palm_jax.data.arrays import Data, Split
from palm_jax.data.load import load
from palm_jax.encoder import make_encoder
from palm_jax.evaluate import features, judge, knn, linear, probe
from palm_jax.evaluate.labels import Task, make_tasks
from palm_jax.job import Run
from tests import worlds
from tests.jobs import finish, saved_result
from tests.test_data import cifar, write_folder

N, M, F, C = 300, 120, 6, 3


@pytest.fixture(scope='module')
def blobs():
  return worlds.blobs(N, M, F, C)


@pytest.fixture(scope='module')
def digits():
  images, labels = load_digits(return_X_y=True)
  images = np.round(images / 16 * 255).astype(np.uint8).reshape(-1, 8, 8, 1)
  order = np.random.default_rng(0).permutation(len(images))
  train, test = order[:897], order[1297:]
  return images[train], labels[train], images[test], labels[test]


def judged(x, y, test_x, test_y, method='lbfgs', num_classes=C, name='raw', **settings):
  task = Task('fine', 1.0, 0, slice(None), y, test_y, num_classes)
  return judge.cached(judge.Source(name, x, {'clean': test_x}), task, method, **settings)


def test_shuffled_test_labels_change_the_score_and_nothing_else(blobs):
  x, y, test_x, test_y = blobs
  shuffled = np.random.default_rng(1).permutation(test_y)
  a, b = judged(x, y, test_x, test_y), judged(x, y, test_x, shuffled)
  read_from_test = ('accuracy', 'half_width', 'seconds')
  assert {k: v for k, v in a.items() if k not in read_from_test} == {
    k: v for k, v in b.items() if k not in read_from_test
  }
  assert a['accuracy']['clean'] > b['accuracy']['clean'] + 0.2


def test_digits_pixels(digits):
  train, train_y, test, test_y = digits
  # As wide as the pixels: one program fits both.
  noise = [
    np.random.default_rng(seed).normal(size=(len(x), 64)) for seed, x in enumerate((train, test))
  ]
  sets = {'pixels': (features.pixels(train), features.pixels(test)), 'noise': noise}
  rows = [
    judged(x, train_y, test_x, test_y, method, 10, name)
    for name, (x, test_x) in sets.items()
    for method in ('lbfgs', 'knn')
  ]
  share = {(row['features'], row['method']): row['accuracy']['clean'] for row in rows}
  assert (
    share['pixels', 'lbfgs'] > 0.94
    and share['pixels', 'knn'] > 0.9
    and share['noise', 'lbfgs'] < 0.2
  )
  results = dict(rows=rows, protocol=dict(data='scikit-learn digits', split='test', knn_k=200))
  assert json.loads(json.dumps(results)) == results
  assert (rows[0]['n_train'], rows[0]['n_test'], rows[1]['k']) == (897, 500, 200)
  assert rows[0]['n_fit'] + rows[0]['n_validation'] == 897

  text = probe.table(results)
  lines = text.splitlines()
  assert [line.split()[0] for line in lines[:5]] == [
    'features',
    'pixels',
    'pixels',
    'noise',
    'noise',
  ]
  assert len({len(line) for line in lines[:5]}) == 1
  assert (
    f'{100 * rows[0]["accuracy"]["clean"]:.2f} +- {100 * rows[0]["half_width"]:.2f}' in lines[1]
  )
  assert lines[-1].startswith('protocol: ')
  assert all(f'{key}={value}' in lines[-1] for key, value in results['protocol'].items())


def test_wilson_half_width():
  # Roots of (p - share)^2 = z^2 p (1 - p) / n, the interval's definition.
  z = 1.959964
  for share, n in [(0.5, 100), (0.97, 500), (1.0, 50), (0.0, 50)]:
    low, high = np.sort(np.roots([1 + z**2 / n, -(2 * share + z**2 / n), share**2]).real)
    assert judge.wilson_half_width(share, n) == pytest.approx((high - low) / 2, rel=1e-9)
  assert judge.wilson_half_width(0.9, 10000) == pytest.approx(
    1.96 * np.sqrt(0.09 / 10000), rel=1e-3
  )


def with_nan(x):
  x = x.copy()
  x[7, 2] = np.nan
  return x


@pytest.mark.parametrize(
  'change, message',
  [
    (lambda x, y, test_x, test_y: (with_nan(x), y, test_x, test_y), 'training features.*row 7'),
    (lambda x, y, test_x, test_y: (x, y, with_nan(test_x), test_y), 'test features.*row 7'),
    (lambda x, y, test_x, test_y: (x[1:], y, test_x, test_y), r'training features are \(299, 6\)'),
    (lambda x, y, test_x, test_y: (x, y, test_x, test_y[1:]), r'test features are \(120, 6\)'),
    (lambda x, y, test_x, test_y: (x, y, test_x[:, 1:], test_y), 'width 6 and test features 5'),
    (
      lambda x, y, test_x, test_y: (x, np.minimum(y, 1), test_x, test_y),
      'class 2 has no training example',
    ),
    (lambda x, y, test_x, test_y: (x, y + 1, test_x, test_y), 'training label is 3'),
    (lambda x, y, test_x, test_y: (x, y, test_x, test_y + 1), 'test label is 3'),
    (lambda x, y, test_x, test_y: (x, y - 1, test_x, test_y), 'expected integers from 0'),
    (lambda x, y, test_x, test_y: (x, y / 2, test_x, test_y), 'expected integers from 0'),
  ],
)
def test_bad_input_is_named(blobs, change, message):
  x, y, test_x, test_y = change(*blobs)
  with pytest.raises(UserError, match=message) as caught:
    judged(x, y, test_x, test_y, name='PALM encoder')
  assert str(caught.value).startswith('PALM encoder: ')
  assert '\n' not in str(caught.value)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """(config, workdir with an encoder's checkpoint, data of three classes)."""
  c, workdir = cifar_config.get_config(), tmp_path_factory.mktemp('run')
  c.encoder.update(dict(name='nature', features=16))  # compiles in a tenth of ResNet-18's time
  c.probe.update(dict(methods=probe.METHODS, corruptions=('salt_pepper:1', 'downsample:2')))
  c.probe.sgd.update(dict(epochs=2, batch_size=32, lr=0.1))
  for method in ('finetune', 'supervised'):
    c.probe[method].update(dict(epochs=1, batch_size=32, augment='none'))
  generator = np.random.default_rng(0)
  labels = np.arange(160) % 3
  images = generator.integers(0, 60, (160, 36, 36, 1))
  for image, label in zip(images, labels, strict=True):
    image[12 * label : 12 * label + 12] += 150
  images = images.astype(np.uint8)
  data = Data(
    Split(images[:120], labels[:120]), Split(images[120:], labels[120:]), ('a', 'b', 'c'), 'stripes'
  )
  variables = jax.jit(
    lambda: make_encoder(c.encoder).init(jax.random.key(5), jnp.zeros((1, 36, 36, 1)), train=False)
  )()
  with Checkpoints(workdir / 'pretrain' / 'checkpoints') as checkpoints:
    checkpoints.save(7, {'encoder': variables}, {})
  (workdir / 'config.json').write_text(c.to_json_best_effort())
  return c, workdir, data


@pytest.fixture(scope='module')
def results(run):
  c, workdir, data = run
  return finish(probe.JOB, c, workdir, data, devices.make_mesh(2))


def test_the_job_judges_all_that_was_asked(run, results):
  c, workdir, data = run
  rows = results['rows']
  assert saved_result(workdir / 'results' / 'probe.json') == json.loads(json.dumps(results))
  ours = {'PALM encoder', 'untrained encoder'}
  names = lambda method: {row['features'] for row in rows if row['method'] == method}
  others = {'pixels', 'pixels, PCA to 16'}
  assert names('lbfgs') == names('knn') == ours | others and names('sgd') == ours
  assert names('finetune') == {'PALM encoder, fine-tuned'} and names('supervised') == {
    'supervised from scratch'
  }
  pixels = next(
    row
    for row in rows
    if row['features'] == 'pixels' and row['method'] == 'lbfgs' and row['fraction'] == 1
  )
  assert pixels['accuracy']['clean'] == 1 and pixels['accuracy']['salt_pepper:1'] < 0.7
  # All is noise there, for encoders too.
  sure = [row for row in rows if row['accuracy']['clean'] > 0.8]
  assert all(row['accuracy']['salt_pepper:1'] < 0.7 for row in sure)
  assert {'PALM encoder', 'untrained encoder'} & {row['features'] for row in sure}
  assert (
    results['protocol']['checkpoint_step'] == 7 and len(results['protocol']['encoder_sha256']) == 64
  )
  text = probe.table(results)
  assert 'downsample:2' in text.splitlines()[0]


@pytest.mark.parametrize('method', ['finetune', 'supervised'])
def test_only_fine_tuning_begins_with_the_encoder(run, monkeypatch, method):
  class Begun(Exception):
    pass

  def fit(*arguments):
    raise Begun(arguments)

  c, workdir, data = run
  monkeypatch.setattr(judge.classifier, 'fit', fit)
  this = Run(c, workdir, devices.make_mesh(2), data)
  encoder = features.load_encoder(c, workdir, (36, 36, 1))
  task = make_tasks(c.probe, 'fine', data.train.labels, data.test.labels, 3, 0)[0]
  with pytest.raises(Begun) as caught:
    judge.end_to_end(this, method, encoder, task, data.train.images, {})
  *_, named, start = caught.value.args[0]
  assert named == method and start is (encoder if method == 'finetune' else None)


@pytest.mark.parametrize('method', ['none', 'crop_flip', 'finetune'])
def test_a_share_of_labels_is_of_its_own_images(run, monkeypatch, method):
  """Rows of the training set, whichever way they are learned from."""
  c, workdir, _ = run
  c, seen = c.copy_and_resolve_references(), []
  y, rows = np.arange(40) % 2, np.arange(1, 40, 3)
  x, images = np.arange(40.0)[:, None], np.arange(40, dtype=np.uint8)[:, None, None, None]
  head = linear.plain_model(np.zeros((1, 2)), np.zeros(2))
  task = Task('fine', 0.3, 0, rows, y[rows], y, 2)
  if method == 'finetune':

    def fit(config, settings, split, *_):
      seen.append((split.images, split.labels))
      return encoder, head

    encoder = features.load_encoder(c, workdir, (36, 36, 1))
    monkeypatch.setattr(judge.classifier, 'fit', fit)
    monkeypatch.setattr(judge.features, 'extract', lambda *_: x)
    this = Run(c, workdir, devices.make_mesh(1))
    judge.end_to_end(this, method, encoder, task, images, {'clean': images})
  else:
    c.probe.sgd.augment = method
    monkeypatch.setattr(judge.sgd, 'fit_heads', lambda of, y, *_: seen.append((of, y)) or [head])
    judge.by_sgd(judge.Source('x', x, {'clean': x}, 'encoder'), task, images, c, None)
    if method != 'none':
      (encoder, pictures), labels = seen.pop()
      assert encoder == 'encoder'
      seen.append((pictures, labels))
  [(of, labels)] = seen
  np.testing.assert_array_equal(np.ravel(of), rows)
  np.testing.assert_array_equal(labels, y[rows])


@pytest.mark.parametrize(
  'changes, memory, words',
  [
    (dict(methods=('sgd',)), 1 << 10, 'probe.sgd: the training images'),
    (dict(methods=('sgd',), augment='none'), 1 << 10, None),
    (dict(methods=('lbfgs', 'knn')), 1 << 10, None),
    (dict(methods=('supervised',)), 1 << 10, 'probe.supervised: the training images'),
    (dict(methods=('supervised',), label_fractions=(0.1,)), 120 * 36 * 36 // 2, None),
    (dict(methods=('finetune',), label_fractions=(0.01,)), None, None),  # two of each class
    (dict(methods=('lbfgs',), label_fractions=(0.01,)), None, None),
  ],
)
def test_what_sgd_cannot_hold_is_said_before_any_job(run, monkeypatch, changes, memory, words):
  c, workdir, data = run
  c = c.copy_and_resolve_references()
  c.probe.sgd.augment = changes.pop('augment', 'crop_flip')
  c.probe.update(changes)
  if memory:
    monkeypatch.setattr(devices, 'memory_bytes', lambda mesh: memory)
  this = Run(c, workdir, devices.make_mesh(2), data)
  if words is None:
    return probe.check_data(this)
  with pytest.raises(UserError, match=words):
    probe.check_data(this)


def test_pixels_wait_for_methods_that_have_them(run, results, tmp_path, monkeypatch):
  c, workdir, data = run
  c = c.copy_and_resolve_references()
  c.probe.update(dict(methods=('sgd',), corruptions=()))
  (tmp_path / 'pretrain').symlink_to(workdir / 'pretrain')
  (tmp_path / 'config.json').write_text(c.to_json_best_effort())
  monkeypatch.setattr(features, 'pixels', None)  # not called
  rows = finish(probe.JOB, c, tmp_path, data, devices.make_mesh(2))['rows']
  assert {row['features'] for row in rows} == {'PALM encoder', 'untrained encoder'}


def test_validation_leaves_the_test_images_alone(run, results, tmp_path):
  c, workdir, data = run
  c = c.copy_and_resolve_references()
  c.probe.update(dict(methods=('lbfgs', 'knn'), split='validation', corruptions=(), pixels=False))
  (tmp_path / 'pretrain').symlink_to(workdir / 'pretrain')
  (tmp_path / 'config.json').write_text(c.to_json_best_effort())
  seen = lambda test: finish(probe.JOB, c, tmp_path, data._replace(test=test), devices.make_mesh(2))
  one, two = seen(data.test), seen(Split(data.test.images[::-1] // 2, data.test.labels))
  strip = lambda result: [
    {k: v for k, v in row.items() if k != 'seconds'} for row in result['rows']
  ]
  assert strip(one) == strip(two) and {row['n_test'] for row in one['rows']} == {12}


def test_features_are_computed_once_and_those_of_another_encoder_are_refused(
  run, results, monkeypatch
):
  c, workdir, data = run
  encoder, mesh = features.load_encoder(c, workdir, (36, 36, 1)), devices.make_mesh(2)
  elsewhere = c.copy_and_resolve_references()
  elsewhere.features.folder = 'shared'
  assert (
    features.folder_of(c, workdir) == workdir / 'features' != features.folder_of(elsewhere, workdir)
  )
  monkeypatch.setattr(features, 'extract', None)  # not called
  h = features.cached(encoder, data.train.images, workdir / 'features', mesh)
  with pytest.raises(TypeError):
    features.cached(encoder, data.train.images[1:], workdir / 'features', mesh)
  [path] = [
    path
    for path in (workdir / 'features').iterdir()
    if len(np.load(path)['features']) == 120
    and str(np.load(path)['encoder_sha256']) == encoder.sha256
  ]
  np.testing.assert_array_equal(np.load(path)['features'], h)
  other = encoder._replace(sha256='0' * 64)
  path.rename(path.with_name(path.name.replace(encoder.sha256[:12], '0' * 12)))
  with pytest.raises(UserError, match='encoder_sha256 is .* expected 000000000000.*remove it'):
    features.cached(other, data.train.images, workdir / 'features', mesh)
  path.with_name(path.name.replace(encoder.sha256[:12], '0' * 12)).rename(path)


def test_damaged_features_are_computed_again(run, results):
  c, workdir, data = run
  encoder, mesh = features.load_encoder(c, workdir, (36, 36, 1)), devices.make_mesh(2)
  h = features.cached(encoder, data.test.images, workdir / 'features', mesh)
  path = max(
    (workdir / 'features').glob(f'{encoder.sha256[:12]}_*'),
    key=lambda path: len(np.load(path)['features']) == 40,
  )
  whole = path.read_bytes()
  flipped = lambda place: bytes([*whole[:place], whole[place] ^ 1, *whole[place + 1 :]])
  encrypted = flipped(whole.index(b'PK\x01\x02') + 8)  # as a flag of zip's says now
  for damage in (whole[:-200], flipped(600), encrypted):
    path.write_bytes(damage)
    np.testing.assert_allclose(
      features.cached(encoder, data.test.images, workdir / 'features', mesh), h, atol=1e-6
    )


def test_foreign_features_stand_beside_ours(run, tmp_path):
  c, workdir, data = run
  c = c.copy_and_resolve_references()
  c.probe.update(dict(methods=('knn',), corruptions=(), pixels=False))
  (tmp_path / 'pretrain').symlink_to(workdir / 'pretrain')
  (tmp_path / 'config.json').write_text(c.to_json_best_effort())
  c.features.path = str(tmp_path / 'foreign.npz')
  one_hot = lambda labels: np.eye(3)[labels]
  np.savez(
    c.features.path,
    train_features=one_hot(data.train.labels),
    test_features=one_hot(data.test.labels),
  )
  rows = finish(probe.JOB, c, tmp_path, data, devices.make_mesh(2))['rows']
  assert {row['features']: row['accuracy']['clean'] for row in rows}['foreign features'] == 1
  np.savez(
    c.features.path,
    train_features=one_hot(data.train.labels)[1:],
    test_features=one_hot(data.test.labels),
  )
  with pytest.raises(UserError, match=r'train_features is \(119, 3\), expected \(120, F\)'):
    finish(probe.JOB, c, tmp_path, data, devices.make_mesh(2))
  np.savez(c.features.path, train_features=one_hot(data.train.labels))
  with pytest.raises(UserError, match='holds train_features: expected also test_features'):
    finish(probe.JOB, c, tmp_path, data, devices.make_mesh(2))


def test_small_shares_of_labels_are_drawn_several_times(blobs):
  x, y, test_x, test_y = blobs
  c = cifar_config.get_config().probe
  c.update(dict(label_fractions=(0.1, 0.5, 1.0), label_draws=3))
  tasks = make_tasks(c, 'fine', y, test_y, C, 0)
  assert [(task.fraction, task.draw) for task in tasks] == [
    (0.1, 0),
    (0.1, 1),
    (0.1, 2),
    (0.5, 0),
    (1.0, 0),
  ]
  rows = [
    judge.cached(judge.Source('raw', x, {'clean': test_x}), task, 'knn', k=5) for task in tasks
  ]
  shares = [100 * row['accuracy']['clean'] for row in rows[:3]]
  lines = probe.table(dict(rows=rows, protocol=dict(split='test'))).splitlines()
  assert [line.split()[3:5] for line in lines[1:4]] == [
    ['fine', '10%'],
    ['fine', '50%'],
    ['fine', '100%'],
  ]
  assert f'{np.mean(shares):.2f} +- {np.std(shares, ddof=1):.2f}' in lines[1]
  assert set(tasks[0].rows) < set(tasks[3].rows)


def test_sgd_makes_as_many_updates_with_fewer_labels():
  c = cifar_config.get_config().probe.sgd
  assert judge.for_share(c, 50_000, 50_000) == c
  for count in (5000, 500, 20):  # fewer than a batch are one
    epochs, steps = judge.for_share(c, count, 50_000).epochs, max(count // c.batch_size, 1)
    np.testing.assert_allclose(epochs * steps, c.epochs * (50_000 // c.batch_size), rtol=1e-2)


def test_a_class_of_which_none_can_be_held_out_is_refused(run):
  c, workdir, data = run
  labels = np.zeros(len(data.train.labels), np.int64)
  labels[:3] = 1, 1, 2
  data = data._replace(train=data.train._replace(labels=labels))
  with pytest.raises(UserError, match='class c has 1 training image.*needs 2 of each'):
    probe.check_data(Run(c, workdir, devices.make_mesh(1), data))
  c = c.copy_and_resolve_references()
  c.probe.methods = ('knn',)
  probe.check_data(Run(c, workdir, devices.make_mesh(1), data))


@pytest.mark.parametrize(
  'changes, message',
  [
    (dict(methods=('lbfgs', 'svm')), "'svm' is unknown: choose some of lbfgs, knn, sgd"),
    (dict(methods=()), 'probe.methods is empty'),
    (dict(split='train'), "probe.split='train'"),
    (dict(label_fractions=(0.0, 1.0)), 'label_fractions'),
    (dict(label_draws=0), 'label_draws=0'),
    (dict(corruptions=('fog',)), "corruption 'fog' is unknown: expected 'salt_pepper:SHARE'"),
    (dict(sgd=dict(batch_size=12)), 'probe.sgd.batch_size=12'),
    (dict(sgd=dict(schedule='linear')), 'probe.sgd.schedule'),
  ],
)
def test_settings_are_checked_before_any_work(changes, message):
  c = cifar_config.get_config()
  c.probe.update(changes)
  with pytest.raises(UserError, match=message):
    probe.check(c, 8)


@pytest.mark.slow
def test_the_two_granularities_of_cifar100(tmp_path):
  """Pixels and their own labels: the vote of one neighbour among the training images is right in
  both label sets."""
  files, _, _ = cifar('cifar-100-binary', n=40)
  files['test.bin'] = files['train.bin']
  c = cifar_config.get_config()
  c.data.name, c.encoder.width = str(write_folder(tmp_path / 'cifar-100-binary', files)), 1
  c.probe.update(dict(methods=('knn',), coarse=True))
  variables = jax.jit(
    lambda: make_encoder(c.encoder).init(jax.random.key(5), jnp.zeros((1, 32, 32, 3)), train=False)
  )()
  with Checkpoints(tmp_path / 'pretrain' / 'checkpoints') as checkpoints:
    checkpoints.save(7, {'encoder': variables}, {})
  (tmp_path / 'config.json').write_text(c.to_json_best_effort())
  rows = finish(probe.JOB, c, tmp_path, load(c.data.name), devices.make_mesh(2))['rows']
  pixels = {row['labels']: row for row in rows if row['features'] == 'pixels'}
  assert (pixels['fine']['num_classes'], pixels['coarse']['num_classes']) == (100, 20)
  # With all 40 training images voting, the class of an image wins by its own vote and those of its
  # class.
  images, coarse = load(c.data.name), load(c.data.name, label_set='coarse')
  for name, labels in (('fine', images.train.labels), ('coarse', coarse.train.labels)):
    flat = features.pixels(images.train.images)
    truth = knn.accuracy(flat, labels, flat, labels)
    assert pixels[name]['accuracy']['clean'] == truth
  assert len({row['accuracy']['clean'] for row in rows if row['features'] == 'PALM encoder'}) == 2
