"""Diversity of what an agent explores: whose frames are taken, from where in their episodes, and
the job."""

import functools
import json
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from palm_jax import environment, experience, pretrain, rollout, worlds
from palm_jax.base import devices
from palm_jax.base.checkpoints import Checkpoints
from palm_jax.base.errors import NonFiniteError, UserError
from palm_jax.base.steps import list_steps
from palm_jax.data.arrays import Data, Split
from palm_jax.evaluate import diversity, diversity_sets, play, quality
from palm_jax.evaluate.extractors import Extractor
from palm_jax.experience import Experience
from palm_jax.generator import load_generator
from palm_jax.generator.stylegan2 import Generator
from palm_jax.layers.pixels import to_uint8
from tests.jobs import finish, saved_result
from tests.worlds import LargeGenerator, nature_config, tiny_config

pytestmark = pytest.mark.usefixtures('shallow')

LENGTH = 7  # frames of an episode in tests/worlds.py
KEY = jax.random.key(0)  # the first and the last step of an episode are among the chosen
LABELS = np.arange(16, dtype=np.int32) % 3
IDS = np.arange(16, dtype=np.int32)


# ---- the frames


def make_arms(num_devices, state=None):
  """Arms of an untrained agent in the small world, and what it is made of."""
  config, generator, mesh = nature_config(), LargeGenerator(), devices.make_mesh(num_devices)
  program = pretrain.make_program(config, generator, mesh)
  world = worlds.make_world(config, generator, mesh)
  state = state or program.init(jax.random.key(0), world)
  encoder, actor = devices.replicate(
    mesh, jax.device_get((state.ssl['params']['encoder'], state.agent.actor))
  )
  return (
    play.make_arms(program.setup, mesh, {'params': encoder}, {'actor': actor}),
    program,
    world,
    state,
  )


@pytest.fixture(scope='module')
def played():
  return make_arms(2)


@pytest.fixture(scope='module')
def frames(played):
  return {name: played[0][name](KEY, IDS, LABELS) for name in ('policy', 'uniform', 'independent')}


def test_each_frame_is_that_of_the_chosen_step_of_its_episode(played, frames):
  """Against episodes played step by step, all frames kept, by the functions of pretraining and its
  whole state."""
  _, program, world, state = played
  generator, (start, steps, chosen) = LargeGenerator(), jax.random.split(KEY, 3)
  render = jax.jit(lambda z: to_uint8(generator.apply(world.variables, z, LABELS)))
  policy = jax.jit(functools.partial(rollout.act, program.setup))
  advance = jax.jit(
    lambda env, actions, key: environment.step(env, actions, key, IDS, world.dynamics, 1000, 3)
  )
  uniform = jax.jit(
    jax.vmap(lambda k: jax.random.uniform(k, (generator.z_dim,), minval=-1, maxval=1))
  )
  chosen = np.asarray(play.chosen_steps(chosen, IDS, LENGTH))
  assert {0, LENGTH - 1} < set(chosen)
  for name in ('policy', 'uniform'):
    env = environment.reset(start, IDS, 0 * IDS, generator.z_dim, 3, world.dynamics).replace(
      label=LABELS
    )
    seen = [np.asarray(render(env.z))]
    for t in range(LENGTH - 1):
      key_policy, key_env = jax.random.split(jax.random.fold_in(steps, t))
      keys = environment.env_keys(key_policy, IDS)
      env = advance(
        env,
        policy(state.ssl, state.agent, seen[-1], keys, IDS) if name == 'policy' else uniform(keys),
        key_env,
      )
      seen.append(np.asarray(render(env.z)))
    wanted = np.stack(seen)[chosen, IDS].astype(int)
    assert np.abs(frames[name] - wanted).max() <= 1  # of 255: another program may round otherwise
    others = np.stack(seen)[(chosen + 1) % LENGTH, IDS].astype(int)
    assert np.abs(frames[name] - others).max((1, 2, 3)).min() > 1


def test_frames_are_those_of_one_device_and_of_other_company(played, frames):
  arms = make_arms(1, played[3])[0]
  for name, wanted in frames.items():
    assert np.abs(arms[name](KEY, IDS, LABELS).astype(int) - wanted).max() <= 1
    later = np.roll(IDS, 5)  # the same episodes elsewhere in the batch
    assert np.abs(played[0][name](KEY, later, LABELS[later]).astype(int) - wanted[later]).max() <= 1
    other = played[0][name](jax.random.fold_in(KEY, 1), IDS, LABELS).astype(int)
    assert np.abs(other - wanted).max((1, 2, 3)).min() > 1
  assert np.abs(frames['independent'].astype(int) - frames['uniform']).max((1, 2, 3)).min() > 1


def test_recorded_latents_are_drawn_again(played):
  z = np.random.default_rng(0).normal(size=(16, 6)).astype(np.float32)
  wanted = to_uint8(LargeGenerator().apply(LargeGenerator().variables, z, LABELS))
  assert np.abs(played[0]['record'](KEY, z, LABELS).astype(int) - wanted).max() <= 1


@pytest.mark.parametrize('length', [2, 7])
def test_chosen_steps_are_uniform(length):
  steps = np.asarray(play.chosen_steps(KEY, np.arange(7000), length))
  counts = np.bincount(steps, minlength=length)
  assert len(counts) == length
  assert (
    np.sum((counts - 7000 / length) ** 2) / (7000 / length) < 22
  )  # chi-squared with 6 degrees: 0.1%
  np.testing.assert_array_equal(play.chosen_steps(KEY, np.arange(100, 110), length), steps[100:110])


def test_generated_sets_have_the_same_classes():
  """Through arms that show what they were asked for."""
  asked = lambda arm: lambda key, which, labels: (arm, which, labels)
  arms = {arm: asked(arm) for arm in ('policy', 'uniform', 'independent', 'record')}
  rows = np.array([4, 5, 6, 0])
  record = np.arange(30.0).reshape(10, 3), np.arange(10)[::-1] % 4
  ids = play.by_chosen_step(KEY, np.arange(7), LENGTH)
  assert sorted(ids) == list(range(7))
  chosen = np.asarray(play.chosen_steps(jax.random.split(KEY, 3)[2], ids, LENGTH))
  assert (np.diff(chosen) >= 0).all()
  names = {'explored': 'policy', 'random actions': 'uniform', 'independent': 'independent'}
  for given in (None, record):
    sets = diversity_sets.generated(arms, KEY, 7, 3, LENGTH, given)
    kept = sets.pop('whole record', None)
    assert {name: pictures(rows)[0] for name, pictures in sets.items()} == names
    for pictures in sets.values():
      np.testing.assert_array_equal(pictures(rows)[1], ids[rows])
      np.testing.assert_array_equal(pictures(rows)[2], ids[rows] % 3)
  arm, z, labels = kept(rows)
  assert arm == 'record'
  np.testing.assert_array_equal(z, record[0][rows])
  np.testing.assert_array_equal(labels, record[1][rows])
  assert not diversity_sets.generated(arms, KEY, 7, 0, LENGTH)['explored'](rows)[2].any()


# ---- recorded frames


def write_record(folder, rows=43, num_envs=6, rows_a_file=10):
  """A latent is (its row, its environment); a label is of both."""
  row, env = np.meshgrid(np.arange(rows), np.arange(num_envs), indexing='ij')
  whole = Experience(
    np.stack([row, env], -1).astype(np.float32), label_of(row, env), row.astype(np.int32)
  )
  for first in range(0, rows, rows_a_file):
    experience.write(
      folder, first, Experience(*(jnp.asarray(x[first : first + rows_a_file]) for x in whole[:3]))
    )


def label_of(row, env):
  return ((7 * row + env) % 5).astype(np.int32)


def test_every_recorded_frame_is_drawn_once(tmp_path):
  write_record(tmp_path)
  z, labels = play.recorded(tmp_path, 1000, 0)
  row, env = z.astype(int).T
  assert sorted(zip(row, env, strict=True)) == [(r, e) for r in range(43) for e in range(6)]
  np.testing.assert_array_equal(labels, label_of(row, env))
  assert labels.dtype == np.int32


@pytest.mark.parametrize('rows_a_file', [2, 50])
def test_recorded_frames_are_uniform(tmp_path, rows_a_file):
  write_record(tmp_path, rows=7, num_envs=3, rows_a_file=rows_a_file)
  counts, n = np.zeros((7, 3)), 300
  for seed in range(n):
    z, labels = play.recorded(tmp_path, 5, seed)
    row, env = z.astype(int).T
    assert len(set(zip(row, env, strict=True))) == 5
    np.testing.assert_array_equal(labels, label_of(row, env))
    counts[row, env] += 1
  expected = 5 * n / counts.size
  assert np.abs(counts - expected).max() < 4.5 * np.sqrt(expected)
  np.testing.assert_array_equal(z, play.recorded(tmp_path, 5, n - 1)[0])


def test_a_record_without_frames(tmp_path):
  with pytest.raises(UserError, match='holds no experience'):
    play.recorded(tmp_path, 5, 0)


# ---- the job


@pytest.fixture(scope='module')
def data():
  def split(seed, n):
    rng = np.random.default_rng(seed)
    return Split(rng.integers(0, 256, (n, 8, 8, 1), dtype=np.uint8), rng.integers(0, 3, n))

  return Data(split(0, 80), split(1, 33), ('a', 'b', 'c'), 'noise')


def job_config(**changes):
  c = tiny_config()
  c.encoder.width = 2
  c.quality = quality.default_config()
  c.diversity = diversity.default_config()
  c.pretrain.record = True
  c.diversity.update(dict(num_images=24, batch_size=8) | changes)
  return c


@pytest.fixture(scope='module')
def mesh():
  return devices.make_mesh(2)


@pytest.fixture(scope='module')
def saved(tmp_path_factory, mesh):
  """Workdir of a run with a generator and a pretraining, nobody trained, and the pretraining's
  state."""
  workdir = tmp_path_factory.mktemp('run')
  fields = dict(
    z_dim=4, w_dim=4, num_classes=3, channels=(4, 4), image_channels=1, mapping_layers=1
  )
  network = Generator(**fields)
  variables = jax.jit(network.init)(
    jax.random.key(5), jnp.zeros((1, 4)), jnp.zeros((1,), jnp.int32)
  )
  with Checkpoints(workdir / 'generator' / 'checkpoints') as checkpoints:
    checkpoints.save(7, {'generator': jax.device_get(variables)}, {})
  (workdir / 'generator' / 'network.json').write_text(json.dumps(fields))
  (workdir / 'config.json').write_text('{}')
  config, generator = job_config(), load_generator(workdir)
  program = pretrain.make_program(config, generator, mesh)
  state = program.init(jax.random.key(1), worlds.make_world(config, generator, mesh))
  encoder = {
    'params': state.ssl['params']['encoder'],
    'batch_stats': state.ssl['batch_stats']['encoder'],
  }
  with Checkpoints(workdir / 'pretrain' / 'checkpoints') as checkpoints:
    checkpoints.save(40, {'state': state, 'encoder': encoder}, {})
  rng, step = np.random.default_rng(0), np.arange(29)[:, None] + np.zeros((1, 6), int)
  whole = Experience(
    rng.normal(size=(29, 6, 4)),
    np.repeat(rng.integers(0, 3, (5, 6)), LENGTH, 0)[:29],
    step % LENGTH,
  )
  experience.write(workdir / 'pretrain' / 'experience', 0, Experience(*map(jnp.asarray, whole[:3])))
  return workdir, program, generator, state


COMPARED = []  # (real, pictures compared with it) of each comparison of the job


@pytest.fixture(scope='module')
def finished(data, saved, mesh):
  def score(real, fake, neighbours):
    COMPARED.append((real, fake))
    return own(real, fake, neighbours)

  own = diversity.score
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(diversity, 'score', score)
    return finish(diversity.JOB, job_config(), saved[0], data, mesh)


def test_all_sets_of_a_draw_are_compared_with_its_real_pictures(finished):
  reals, fakes = ({x.tobytes() for x in each} for each in zip(*COMPARED, strict=True))
  draws = job_config().diversity.draws
  assert len(reals) == draws < len(fakes) and not reals & fakes
  real, noise = np.random.default_rng(0).normal(size=(2, 40, 3))
  few = np.tile(real[:10], (4, 1)) + 1e-3 * noise
  assert diversity.score(real, few, 3)['unique_nn'] == 10 / 40  # of the real ones
  assert diversity.score(few, real, 3)['unique_nn'] > 10 / 40


def test_the_job_reports_every_set(finished, saved):
  assert saved_result(saved[0] / 'results' / 'diversity.json') == finished
  rows = {row['set']: row for row in finished['rows']}
  assert list(rows) == [
    'explored',
    'whole record',
    'random actions',
    'independent',
    'other training images',
    'test images',
  ]
  metrics = [
    'unique_nn',
    'symmetric',
    'hit_once',
    'precision',
    'recall',
    'density',
    'coverage',
    'FID',
  ]
  for row in rows.values():
    assert list(row) == [
      'set',
      'features',
      'n',
      *(f'encoder-{m}{ending}' for m in metrics for ending in ('', '_sd')),
    ]
    assert row['n'] == 24 and np.isfinite(list(row.values())[2:]).all()
    assert 0 < row['encoder-unique_nn'] < 1
  generated, real = [[rows[name] for name in names] for names in (list(rows)[:4], list(rows)[4:])]
  assert min(row['encoder-FID'] for row in generated) > max(row['encoder-FID'] for row in real)
  assert len({row['encoder-FID'] for row in generated}) == 4
  assert finished['ceiling'] == pytest.approx(1 - (23 / 24) ** 24)
  protocol = finished['protocol']
  assert [
    protocol[name] for name in ('checkpoint_step', 'n', 'num_images', 'draws', 'num_features')
  ] == [40, 24, 24, 3, dict(encoder=16)]
  assert finished['devices'].startswith('2 x ')


def test_the_table_never_shows_other_features_as_the_papers(finished):
  text = diversity.table(finished)
  lines = text.splitlines()
  assert len({len(line) for line in lines[:7]}) == 1
  assert lines[0].split()[:5] == ['set', 'features', 'n', 'unique_nn', '%']
  assert [line.split('  ')[0] for line in lines[1:7]] == [row['set'] for row in finished['rows']]
  assert all('encoder' in line and line.endswith(' ') for line in lines[1:7])  # no paper's number
  row = finished['rows'][3]
  share = f'{100 * row["encoder-unique_nn"]:.2f} +- {100 * row["encoder-unique_nn_sd"]:.2f}'
  assert share in lines[4]
  assert '63.99%' in lines[7] and 'not comparable with these encoder features of 24' in lines[8]
  assert lines[-1].startswith('protocol: ') and 'episode_length=7' in lines[-1]
  # In the paper's features its numbers stand beside, and in its number nothing forbids to compare.
  rows = [
    {name.removeprefix('encoder-'): value for name, value in row.items()}
    | dict(features='inception')
    for row in finished['rows']
  ]
  inception = finished['protocol'] | dict(features=['inception'])
  papers = diversity.table(finished | dict(rows=rows, protocol=inception | dict(n=10_000)))
  assert 'not comparable' not in papers
  ends = [line.split()[-1] for line in papers.splitlines()[1:5]]
  assert ends[0] == '58.87' and ends[3] == '50.16'
  fewer = diversity.table(finished | dict(rows=rows, protocol=inception | dict(n=9_999)))
  assert 'not comparable with these inception features of 9,999 images' in fewer


def test_several_features_judge_and_too_few_are_told(data, saved, mesh, finished, tmp_path, caplog):
  workdir = tmp_path / 'run'
  shutil.copytree(saved[0], workdir)
  with caplog.at_level(logging.WARNING):
    results = finish(
      diversity.JOB,
      job_config(features=('pixels', 'encoder'), num_images=40),
      workdir,
      data,
      mesh,
    )
  assert (
    '33 images of each set instead of diversity.num_images=40, because there are 33 test images'
    in caplog.text
  )
  assert [row['n'] for row in results['rows']] == [33] * 12
  assert [row['features'] for row in results['rows']] == ['pixels'] * 6 + ['encoder'] * 6
  assert 'pixel-unique_nn' in results['rows'][0] and 'encoder-unique_nn' in results['rows'][6]
  assert results['protocol']['num_features'] == dict(pixels=64, encoder=16)
  few = data._replace(test=Split(data.test.images[:9], data.test.labels[:9]))
  caplog.clear()
  with caplog.at_level(logging.WARNING):
    results = finish(diversity.JOB, job_config(features=('pixels',)), workdir, few, mesh)
  assert (
    '9 images of each set instead of diversity.num_images=24, because there are 9 test images'
    in caplog.text
  )
  assert [row['n'] for row in results['rows']] == [9] * 6


# ---- the policy out of a checkpoint


def test_the_policy_is_read_without_the_rest(saved, mesh, tmp_path):
  workdir, program, generator, state = saved
  template = play.policy_template(program, mesh)
  folder = tmp_path / 'checkpoints'
  shutil.copytree(workdir / 'pretrain' / 'checkpoints', folder)
  policy = play.load_policy(folder, 40, template)
  assert policy.keys() == {'actor'}
  actor = policy['actor']
  assert jax.tree.structure(actor) == jax.tree.structure(state.agent.actor)
  for a, b in zip(jax.tree.leaves(actor), jax.tree.leaves(state.agent.actor), strict=True):
    assert a.dtype == b.dtype and a.sharding.is_fully_replicated
    np.testing.assert_array_equal(a, b)

  config = job_config()
  config.sac.hidden = (8, 16)
  other = play.policy_template(pretrain.make_program(config, generator, mesh), mesh)
  with pytest.raises(
    UserError,
    match=r'agent/actor/.* is float32\[16\], expected float32\[8\]: give the config of that run',
  ):
    play.load_policy(folder, 40, other)

  metadata = folder / '40' / '_CHECKPOINT_METADATA'
  content = json.loads(metadata.read_text())
  record = content['custom_metadata']['record']['items']['state']
  name = next(name for name in record if name.startswith('agent/actor/params'))
  record[name]['blocks'][0][1] = '0' * 64  # as if the values had changed
  metadata.write_text(json.dumps(content))
  with pytest.raises(UserError, match=f'policy.*is damaged .{name} holds other values'):
    play.load_policy(folder, 40, template)
  shutil.rmtree(folder / '40' / 'state' / 'ocdbt.process_0')
  with pytest.raises(UserError, match='policy.*is damaged'):
    play.load_policy(folder, 40, template)
  assert list_steps(folder) == [40]


# ---- refusals


def test_what_does_not_fit_is_refused(saved, data, mesh, tmp_path):
  workdir = saved[0]
  larger = data._replace(train=Split(np.zeros((80, 16, 16, 1), np.uint8), data.train.labels))
  for other, message in (
    (larger, r'\(8, 8, 1\) in 3 classes, but the data are \(16, 16, 1\) in 3'),
    (data._replace(class_names=('a', 'b')), 'in 3 classes, but the data are .* in 2'),
    (
      data._replace(test=Split(data.test.images[:5], data.test.labels[:5])),
      'there are 5 test images, expected more than diversity.neighbours=5',
    ),
  ):
    with pytest.raises(UserError, match=message) as caught:
      finish(diversity.JOB, job_config(), workdir, other, mesh)
    assert '\n' not in str(caught.value)
  shutil.copytree(workdir / 'generator', tmp_path / 'generator')
  with pytest.raises(UserError, match='pretraining run'):
    finish(diversity.JOB, job_config(), tmp_path, data, mesh)
  shutil.copytree(workdir / 'pretrain' / 'checkpoints', tmp_path / 'pretrain' / 'checkpoints')
  shutil.copy(workdir / 'config.json', tmp_path)
  with pytest.raises(UserError, match='holds no experience: give .* --config.pretrain.record'):
    finish(diversity.JOB, job_config(explored='record'), tmp_path, data, mesh)
  experience.write(
    tmp_path / 'pretrain' / 'experience',
    0,
    Experience(
      jnp.zeros((14, 6, 5)),
      jnp.zeros((14, 6), jnp.int32),
      jnp.arange(14)[:, None] % 7 + jnp.zeros((1, 6), jnp.int32),
    ),
  )
  with pytest.raises(UserError, match=r'latents of \(5,\), but the generator takes \(4,\)'):
    finish(diversity.JOB, job_config(explored='record'), tmp_path, data, mesh)
  assert not (tmp_path / 'results').exists()


def test_features_that_are_not_finite(data, mesh):
  broken = Extractor(
    lambda _, images: jnp.where(images[:, :1, 0, 0] == 1, jnp.nan, images[:, :2, 0, 0]), {}, {}
  )
  pictures = lambda rows: (
    np.ones((len(rows), 8, 8, 1), np.uint8) * (rows == 2)[:, None, None, None].astype(np.uint8)
  )
  with pytest.raises(NonFiniteError, match='features .noise. are NaN or infinite in 1 of 5'):
    diversity.extract(broken, pictures, 5, 4, mesh, 'noise')


@pytest.mark.parametrize(
  'changes, message',
  [
    (
      dict(features=('fid',)),
      "'fid' is unknown.*: choose some of inception, proxy, pixels, encoder",
    ),
    (dict(features=('inception',)), 'is no file'),
    (dict(draws=1), 'diversity.draws=1 is too small: set it to 2 or more'),
    (dict(num_images=5), 'diversity.num_images=5 is too small: set it to 6 or more'),
    (dict(neighbours=0), 'diversity.neighbours=0'),
    (dict(batch_size=0), 'diversity.batch_size=0'),
  ],
)
def test_settings_that_cannot_work(changes, message):
  config = job_config()
  config.diversity.update(changes)
  config.quality.update(dict(features='inception', inception_path='absent.pth'))  # of another job
  with pytest.raises(UserError, match=message) as caught:
    diversity.check(config, 2)
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize('features', ['encoder', 'pixels', 'proxy'])
def test_defaults_work_whatever_the_other_job_is_set_to(features):
  config = job_config(features=(features,))
  config.quality.update(dict(features='inception', inception_path='absent.pth'))
  diversity.check(config, 8)
  assert config.quality.features == 'inception'
