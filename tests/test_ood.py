"""The job: what it reports against the same from parts and scikit-learn, what it leaves alone, what
it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from sklearn.metrics import roc_auc_score

from palm_jax import encoder as encoders
from palm_jax import environment
from palm_jax.base import devices
from palm_jax.base.checkpoints import Checkpoints
from palm_jax.base.errors import UserError
from palm_jax.data import published
from palm_jax.data.arrays import Data, Split
from palm_jax.evaluate import features, image_sets, linear, ood, scores, sgd, table_1
from tests.jobs import finish, saved_result

pytestmark = pytest.mark.usefixtures('shallow')

CLASSES = ('airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck')
LOGITS, FEATURES = ('msp', 'mls', 'energy'), ('knn', 'mahalanobis', 'ssd')


@pytest.fixture(scope='module')
def data():
  """Ten classes of 8x8 pictures, each of a colour of its own, with noise."""
  colours = np.random.default_rng(9).integers(40, 210, (10, 3))

  def split(seed, n):
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 10, n)
    return Split(
      (colours[labels][:, None, None] + generator.integers(-40, 41, (n, 8, 8, 3))).astype(np.uint8),
      labels,
    )

  return Data(split(0, 160), split(1, 120), CLASSES, 'colours')


@pytest.fixture(scope='module')
def folder(data, tmp_path_factory):
  """Image sets: the test images themselves, noise, grey pictures, pictures of another size."""
  folder, generator = tmp_path_factory.mktemp('sets'), np.random.default_rng(2)
  np.savez(folder / 'same.npz', images=data.test.images[::-1])
  np.savez(
    folder / 'noise.npz',
    images=generator.integers(0, 256, (33, 8, 8, 3), np.uint8),
    labels=np.full(33, -1),
  )
  np.savez(folder / 'grey.npz', images=np.zeros((4, 8, 8, 1), np.uint8))
  np.savez(folder / 'large.npz', images=np.zeros((4, 16, 16, 3), np.uint8))
  return folder


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """Workdir with a checkpoint of an encoder, which nobody trained."""
  workdir, config = tmp_path_factory.mktemp('run'), job_config()
  (workdir / 'config.json').write_text(config.to_json())
  network = encoders.make_encoder(config.encoder)
  variables = jax.jit(
    lambda: network.init(jax.random.key(77), jnp.zeros((1, 8, 8, 3)), train=False)
  )()
  with Checkpoints(workdir / 'pretrain' / 'checkpoints') as checkpoints:
    checkpoints.save(30, {'encoder': variables}, {})
  return workdir


def job_config(sets=('interp:pairs',), head=(), finetune=(), **changes):
  c = ConfigDict(
    dict(
      seed=3,
      data=dict(name='colours', dir=''),
      encoder=encoders.default_config(),
      environment=environment.default_config(),
      features=features.default_config(),
      ood=ood.default_config(),
    )
  )
  c.encoder.width = 2
  c.features.batch_size = 64
  c.ood.update(dict(sets=tuple(map(str, sets)), seeds=2, knn_k=5, **changes))
  c.ood.head.update(dict(lr=1.0, batch_size=32, epochs=40, augment='none') | dict(head))
  c.ood.finetune.update(dict(batch_size=32, epochs=1) | dict(finetune))
  return c


@pytest.fixture(scope='module')
def mesh():
  return devices.make_mesh(2)


@pytest.fixture(scope='module')
def config(folder):
  return job_config(['interp:pairs', f'SVHN={folder}/noise.npz', folder / 'same.npz'])


@pytest.fixture(scope='module')
def finished(config, run, data, mesh):
  return finish(ood.JOB, config, run, data, mesh)


def test_the_job_reports_every_encoder_score_and_set(finished, run, config):
  assert saved_result(run / 'results' / 'ood.json') == finished
  rows = finished['rows']
  names = ['PALM encoder', 'untrained encoder']
  assert {(row['encoder'], row['score'], row['set']) for row in rows} == {
    (name, score, where)
    for name in names
    for score in LOGITS + FEATURES
    for where in ('interp:pairs', 'SVHN', 'same')
  }
  assert len(rows) == 2 * 6 * 3
  for row in rows:
    assert (
      row['n_id'] == 120 and row['n'] == {'interp:pairs': 120, 'SVHN': 33, 'same': 120}[row['set']]
    )
    assert row['trials'] == (
      2 if row['score'] in LOGITS else 1
    )  # the heads differ, the features do not
    for metric in scores.METRICS:
      values = row[metric]['values']
      assert len(values) == row['trials'] and all(0 <= value <= 1 for value in values)
      assert row[metric]['mean'] == pytest.approx(np.mean(values), abs=1e-12)
      assert row[metric]['sd'] == (
        pytest.approx(np.std(values, ddof=1), abs=1e-12) if len(values) > 1 else None
      )
  assert finished['accuracy'].keys() == set(names)
  assert all(len(part['values']) == 2 for part in finished['accuracy'].values())
  assert finished['accuracy']['PALM encoder']['mean'] > 0.2  # of 10 classes

  protocol = finished['protocol']
  assert [protocol[name] for name in ('n_train', 'n_id', 'knn_k', 'seeds')] == [160, 120, 5, [3, 4]]
  assert protocol['protocol'].startswith('frozen') and protocol['head'] == config.ood.head.to_dict()
  [about] = protocol['encoders']['PALM encoder']
  assert about['checkpoint_step'] == 30 and len(about['sha256']) == 64
  assert (
    protocol['sets']['SVHN']['n'] == 33 and 'noise.npz' in protocol['sets']['SVHN']['description']
  )
  assert finished['versions']['jax'] == jax.__version__


def test_a_set_equal_to_the_test_images_cannot_be_told_apart(finished):
  for row in finished['rows']:
    if row['set'] == 'same':
      # The same images in another order: where a matrix product rounds a row by its place, the
      # last bit of a score differs, and a tie of 120 x 120 pairs may break.
      np.testing.assert_allclose(row['auroc']['values'], 0.5, atol=3 / 120**2)
      assert min(row['fpr_at_95_tpr']['values']) >= 0.95


def test_numbers_equal_those_from_parts(finished, run, config, data, mesh, folder):
  """Features by the network itself, heads by the same fit, areas by scikit-learn."""
  encoder = features.load_encoder(config, run, (8, 8, 3))
  h = lambda images: np.asarray(jax.jit(encoder.apply)(images))
  train_h, test_h, noise_h = (
    h(data.train.images),
    h(data.test.images),
    h(np.load(folder / 'noise.npz')['images']),
  )
  heads = sgd.fit_heads(train_h, data.train.labels, 10, config.ood.head, [3, 4], mesh)
  found = {
    row['score']: row
    for row in finished['rows']
    if (row['encoder'], row['set']) == ('PALM encoder', 'SVHN')
  }
  is_id = np.r_[np.ones(120), np.zeros(33)]
  for score, row in found.items():
    if score in LOGITS:
      functions = [
        lambda h, head=head, of=scores.SCORES[score].function: of(linear.logits(head, h))
        for head in heads
      ]
    else:
      functions = [scores.SCORES[score].function(train_h, data.train.labels, 5)]
    wanted = [
      roc_auc_score(is_id, np.r_[function(test_h), function(noise_h)]) for function in functions
    ]
    np.testing.assert_allclose(
      row['auroc']['values'], wanted, atol=2e-3
    )  # rounding of features may swap neighbours
  wanted = [
    np.mean((test_h @ head.weight + head.bias).argmax(1) == data.test.labels) for head in heads
  ]
  np.testing.assert_allclose(finished['accuracy']['PALM encoder']['values'], wanted, atol=0.01)


def test_the_table_is_the_papers(finished):
  lines = table_1.table(finished).splitlines()
  assert len(lines) == 1 + 12 + 4 + 2
  assert lines[-2].endswith('not that of interp:pairs')
  assert len({len(line) for line in lines[:-2]}) == 1
  assert lines[0].split() == [
    'AUROC',
    '%',
    'score',
    'interp:pairs',
    'SVHN',
    'same',
    'ID',
    'accuracy',
    '%',
  ]
  row = next(
    row
    for row in finished['rows']
    if (row['encoder'], row['score'], row['set']) == ('PALM encoder', 'msp', 'SVHN')
  )
  assert f'{100 * row["auroc"]["mean"]:.1f} +- {100 * row["auroc"]["sd"]:.1f}' in lines[1]
  assert lines[13].split() == [
    'paper:',
    'PALM',
    '-',
    '79.9',
    '+-',
    '0.2',
    '97.9',
    '+-',
    '0.2',
    '-',
    '-',
  ]
  assert lines[14].split() == ['paper:', 'CSI', '-', '78.5', '96.5', '-', '-']
  assert lines[-1].startswith('protocol: ') and 'knn_k=5' in lines[-1]


def test_table_1():
  """Sums over the five sets of the figures as the paper prints them; best on all but LSUN, where
  CSI is."""
  columns = ['SVHN', 'LSUN', 'CIFAR-100', 'Interp.', 'CelebA']
  assert all(list(row) == columns for row in table_1.TABLE_1.values())
  sums = {name: sum(value[0] for value in row.values()) for name, row in table_1.TABLE_1.items()}
  assert {name: round(total, 1) for name, total in sums.items()} == {
    'PALM': 442.2,
    'CSI': 436.9,
    'SupCLR': 427.6,
    'Standard': 404.6,
  }
  best = {
    column: max(table_1.TABLE_1, key=lambda name, column=column: table_1.TABLE_1[name][column][0])
    for column in columns
  }
  assert best == {
    'SVHN': 'PALM',
    'LSUN': 'CSI',
    'CIFAR-100': 'PALM',
    'Interp.': 'PALM',
    'CelebA': 'PALM',
  }


def test_lsun_that_was_resized_here_is_not_the_papers(tmp_path):
  Image.new('RGB', (300, 256)).save(tmp_path / 'x.png')
  resized = image_sets.load_images(str(tmp_path), 32)[1]
  found = table_1.papers({'LSUN': resized, 'svhn': ''}, table_1.CIFAR10)
  assert list(found['rows']['PALM']) == ['svhn']
  Image.new('RGB', (32, 32)).save(tmp_path / 'x.png')
  as_it_is = image_sets.load_images(str(tmp_path), 32)[1]
  found = table_1.papers({'LSUN': as_it_is, 'LSUN_FIX': resized}, table_1.CIFAR10)
  assert list(found['rows']['PALM']) == ['LSUN']


def test_interpolations_of_our_own_are_not_csis(data):
  sets = {f'interp:{mode}': image_sets.interpolate(data.test, mode)[1] for mode in ('pairs', 'csi')}
  found = table_1.papers(sets, table_1.CIFAR10)
  assert found['note'].endswith('not that of interp:pairs')
  assert 'note' not in table_1.papers({'x': '', 'interp:csi': sets['interp:csi']}, table_1.CIFAR10)


def test_the_papers_numbers_stand_beside_cifar10_only(run, data, mesh):
  """And scores may be some; the untrained encoder may be left out."""
  other = data._replace(class_names=tuple('abcdefghij'))
  config = job_config(scores=('knn',), untrained=False, head=dict(epochs=1))
  results = finish(ood.JOB, config, run, other, mesh)
  assert 'paper' not in results and 'paper' not in table_1.table(results)
  assert [(row['encoder'], row['score'], row['set']) for row in results['rows']] == [
    ('PALM encoder', 'knn', 'interp:pairs')
  ]


def test_the_encoder_and_its_checkpoint_are_left_alone(finished, run, config, data, mesh):
  files = lambda: {
    path: path.read_bytes() for path in (run / 'pretrain').rglob('*') if path.is_file()
  }
  before, sha256 = files(), finished['protocol']['encoders']['PALM encoder'][0]['sha256']
  again = finish(ood.JOB, config, run, data, mesh)
  assert files() == before
  assert features.load_encoder(config, run, (8, 8, 3)).sha256 == sha256
  assert again['rows'] == finished['rows'] and again['accuracy'] == finished['accuracy']


def test_ood_images_choose_nothing(finished, run, data, mesh, folder):
  """Heads, accuracy, and the numbers of one set do not depend on the other sets."""
  alone = finish(ood.JOB, job_config([f'SVHN={folder}/noise.npz']), run, data, mesh)
  assert alone['accuracy'] == finished['accuracy']
  assert alone['rows'] == [row for row in finished['rows'] if row['set'] == 'SVHN']


def test_heads_may_learn_from_augmented_images(finished, run, data, mesh, monkeypatch):
  fit, given = ood.sgd.fit_heads, []

  def fit_heads(source, labels, classes, settings, *rest):
    given.append((source, settings.augment))
    return fit(source, labels, classes, settings, *rest)

  monkeypatch.setattr(ood.sgd, 'fit_heads', fit_heads)
  results = finish(
    ood.JOB,
    job_config(head=dict(augment='shift_flip', epochs=2), untrained=False, scores=('msp',)),
    run,
    data,
    mesh,
  )
  [((encoder, images), augment)] = given
  assert augment == 'shift_flip' and encoder.name == 'PALM encoder'
  np.testing.assert_array_equal(images, data.train.images)
  assert results['protocol']['head']['augment'] == 'shift_flip'
  assert results['rows'][0]['trials'] == 2


@pytest.mark.slow
def test_fine_tuning(finished, run, data, mesh):
  config = job_config(protocol='finetune', scores=('msp', 'knn'), finetune=dict(epochs=4, lr=0.05))
  results = finish(ood.JOB, config, run, data, mesh)
  name, pretrained = (
    'PALM encoder, fine-tuned',
    finished['protocol']['encoders']['PALM encoder'][0]['sha256'],
  )
  assert [(row['encoder'], row['score'], row['trials']) for row in results['rows']] == [
    (name, 'msp', 2),
    (name, 'knn', 2),
  ]
  assert (
    len(set(results['rows'][1]['auroc']['values'])) == 2
  )  # the features of each trial are its own
  digests = [about['sha256'] for about in results['protocol']['encoders'][name]]
  assert len({*digests, pretrained}) == 3
  assert [about['start'] for about in results['protocol']['encoders'][name]] == [pretrained] * 2
  assert len(results['accuracy'][name]['values']) == 2
  assert results['protocol']['protocol'].startswith('finetune')
  assert features.load_encoder(config, run, (8, 8, 3)).sha256 == pretrained


@pytest.mark.slow
@pytest.mark.parametrize(
  'protocol, other', [('frozen', 'untrained encoder'), ('finetune', 'PALM encoder, fine-tuned')]
)
def test_supervised_from_scratch(run, data, mesh, protocol, other):
  config = job_config(protocol=protocol, supervised=2, scores=('msp',), finetune=dict(epochs=30))
  results = finish(ood.JOB, config, run, data, mesh)
  assert [row['encoder'] for row in results['rows']][-2:] == [other, 'supervised']
  assert results['rows'][-1]['trials'] == 2
  assert [about['start'] for about in results['protocol']['encoders']['supervised']] == [
    'random weights'
  ] * 2
  assert results['accuracy']['supervised']['mean'] > 0.5


@pytest.mark.parametrize(
  'text, name, source',
  [
    ('svhn', 'svhn', 'svhn'),
    ('interp:csi', 'interp:csi', 'interp:csi'),
    ('/a/b/LSUN_FIX/', 'LSUN_FIX', '/a/b/LSUN_FIX/'),
    ('SVHN=tfds:svhn_cropped', 'SVHN', 'tfds:svhn_cropped'),
    ('tfds:svhn_cropped', 'svhn_cropped', 'tfds:svhn_cropped'),
    ('/a/c100_test.npz', 'c100_test', '/a/c100_test.npz'),
    ('celeba:/a/img', 'celeba', 'celeba:/a/img'),
    ('/runs/lr=0.1/x.npz', 'x', '/runs/lr=0.1/x.npz'),
    ('Interp.=interp:csi', 'Interp.', 'interp:csi'),
    ('LSUN=/a/b=c', 'LSUN', '/a/b=c'),
    ('a/train.npz,b/test.npz', 'test', 'a/train.npz,b/test.npz'),
  ],
)
def test_names_of_sets(text, name, source):
  assert image_sets.named_sources([text]) == {name: source}


def test_download_fetches_the_sets_that_have_a_publisher(monkeypatch, tmp_path):
  asked = []
  monkeypatch.setattr(published, 'fetch', lambda url, size, sha256, target: asked.append(target))
  config = job_config(sets=('svhn', 'SVHN again=svhn', 'interp:pairs', 'LSUN=folder'))
  config.data.dir = str(tmp_path)
  ood.download(config)
  assert {path.parent for path in asked} == {tmp_path} and {'test_32x32.mat'} <= {
    path.name for path in asked
  }


def test_columns_of_table_1():
  wanted = {
    'svhn': 'SVHN',
    'SVHN': 'SVHN',
    'LSUN': 'LSUN',
    'cifar100': 'CIFAR-100',
    'CIFAR-100': 'CIFAR-100',
    'celeba': 'CelebA',
    'interp:pairs': 'Interp.',
    'interp:csi': 'Interp.',
    'Interp.': 'Interp.',
    'LSUN_FIX': None,
    'tinyimagenet': None,
  }
  assert {name: table_1.column(name) for name in wanted} == wanted


@pytest.mark.parametrize(
  'changes, message',
  [
    (dict(protocol='linear'), "ood.protocol='linear' is unknown: choose one of frozen, finetune"),
    (dict(scores=('msp', 'mahalanobi')), "'mahalanobi' is unknown .did you mean mahalanobis"),
    (dict(scores=()), 'ood.scores is empty'),
    (dict(sets=()), 'ood.sets is empty'),
    (dict(sets=('interp:pairs', 'interp:pairs')), "two sets are called 'interp:pairs'"),
    (dict(sets=('a/x.npz', 'b/x.npz')), "two sets are called 'x'.*write NAME=b/x.npz"),
    (dict(sets=('interp:half',)), "'interp:half' is unknown"),
    (dict(sets=('/nowhere/lsun',)), '/nowhere/lsun: no such file'),
    (dict(head=dict(schedule='linear')), 'ood.head.schedule'),
    (dict(head=dict(augment='cutout')), "augment 'cutout'"),
    (dict(supervised=1, finetune=dict(warmup=5)), 'ood.finetune.warmup=5.0 is not in .0, 1.'),
    (
      dict(head=dict(batch_size=31)),
      'ood.head.batch_size=31 is not a positive multiple of devices=2',
    ),
    (dict(protocol='finetune', finetune=dict(batch_size=31)), 'ood.finetune.batch_size=31'),
    (dict(supervised=1, finetune=dict(epochs=0)), 'ood.finetune.epochs=0'),
  ],
)
def test_settings_that_cannot_work(changes, message):
  with pytest.raises(UserError, match=message) as error:
    ood.check(job_config(**changes), 2)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('name', ['seeds', 'knn_k'])
def test_numbers_that_are_too_small(name):
  config = job_config()
  config.ood[name] = 0
  with pytest.raises(UserError, match=f'ood.{name}=0 is not positive'):
    ood.check(config, 1)


def test_settings_of_what_is_not_done_do_not_matter():
  ood.check(job_config(finetune=dict(batch_size=31)), 2)
  ood.check(job_config(protocol='finetune', head=dict(batch_size=31)), 2)


def test_data_that_cannot_work(run, data, mesh, folder, tmp_path):
  with pytest.raises(UserError, match=r'grey.npz: .*\(8, 8, 1\), expected \(8, 8, 3\)'):
    finish(ood.JOB, job_config([folder / 'grey.npz']), run, data, mesh)
  with pytest.raises(UserError, match=r'large.npz: .*\(16, 16, 3\), expected \(8, 8, 3\)'):
    finish(ood.JOB, job_config([folder / 'large.npz']), run, data, mesh)
  config = job_config()
  config.ood.knn_k = 161
  with pytest.raises(UserError, match='knn_k=161, but there are 160'):
    finish(ood.JOB, config, run, data, mesh)
  one = data._replace(class_names=('all',), train=data.train._replace(labels=data.train.labels * 0))
  with pytest.raises(UserError, match='but colours has one'):
    finish(ood.JOB, job_config(), run, one, mesh)
  with pytest.raises(UserError, match='config.json is missing'):
    finish(ood.JOB, job_config(), tmp_path, data, mesh)


def test_foreign_features_stand_beside_ours(run, data, mesh, tmp_path, folder):
  path = tmp_path / 'foreign.npz'
  one_hot = np.eye(10)
  noise = np.full((33, 10), 0.1)
  np.savez(
    path,
    train_features=one_hot[data.train.labels],
    test_features=one_hot[data.test.labels],
    ood_noise=noise,
  )
  c = job_config([f'noise={folder / "noise.npz"}'], untrained=False, scores=('msp', 'knn'))
  c.features.path = str(path)
  c.ood.head.update(dict(epochs=20, augment='none'))
  results = finish(ood.JOB, c, run, data, mesh)
  numbers = {(row['encoder'], row['score']): row['auroc']['mean'] for row in results['rows']}
  assert numbers['foreign features', 'msp'] == numbers['foreign features', 'knn'] == 1
  assert results['accuracy']['foreign features']['mean'] == 1
  c.ood.sets = ('interp:pairs',)
  with pytest.raises(UserError, match='expected also ood_interp:pairs'):
    finish(ood.JOB, c, run, data, mesh)
