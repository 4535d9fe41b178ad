"""Mistakes end in one line that says what to do, before anything is compiled, and leave nothing
behind."""

import contextlib
import errno
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

import palm_jax.base.files
from palm_jax import main, runner, settings
from palm_jax.base import command as commands
from palm_jax.base.checkpoints import Checkpoints
from palm_jax.base.errors import UserError
from palm_jax.base.files import locked, write_json
from palm_jax.base.steps import list_steps
from palm_jax.generator import train
from tests.worlds import COMPILED, tiny_config

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope='module')
def files(tmp_path_factory):
  """A folder of data, most of it bad."""
  folder = tmp_path_factory.mktemp('files')
  images, labels = np.zeros((20, 8, 8, 3), np.uint8), np.arange(20) % 3
  np.savez(folder / 'good.npz', images=images, labels=labels)
  np.savez(folder / 'nchw.npz', images=images.transpose(0, 3, 1, 2), labels=labels)
  np.savez(folder / '28x28.npz', images=np.zeros((20, 28, 28, 1), np.uint8), labels=labels)
  np.savez(folder / 'from_1.npz', images=images, labels=labels + 1)
  np.savez(folder / 'one.npz', images=images, labels=0 * labels)
  np.savez(folder / 'negative.npz', images=images, labels=labels - 1)
  np.savez(folder / 'unnamed.npz', images=images, labels=labels, class_names=['cat', 'dog'])
  whole = (folder / 'good.npz').read_bytes()
  (folder / 'cut.npz').write_bytes(whole[: len(whole) // 2])
  (folder / 'cifar-10-binary.tar.gz').write_bytes(b'\x1f\x8b\x08\0half of it')
  (folder / 'file').write_text('no folder')
  return folder


def config_for(files, **changes):
  """Everything tiny and right on 8 devices, but for the changes: {'section__key': value}."""
  c = tiny_config()
  c.name, c.data.name = 'bad', str(files / 'good.npz')
  c.generator.update(
    dict(
      z_dim=4,
      w_dim=4,
      mapping_layers=1,
      channel_base=32,
      channel_max=4,
      conv_clamp=0.0,
      d_mapping_layers=0,
      mbstd_group=2,
      batch_size=16,
    )
  )
  c.update_from_flattened_dict({name.replace('__', '.'): value for name, value in changes.items()})
  return c


def save_generator(config, workdir, step=1):
  """What a finished generator job leaves of its network, untrained."""
  G, _ = train.make_networks(config.generator, (8, 8, 1), 3)
  variables = jax.jit(lambda key: G.init(key, np.zeros((1, 4), np.float32), np.zeros(1, np.int32)))(
    jax.random.key(step)
  )
  write_json(workdir / 'generator' / 'network.json', train.network_fields(G))
  with Checkpoints(workdir / 'generator' / 'checkpoints') as checkpoints:
    checkpoints.save(step, {'generator': variables}, {})


def refuse(capfd, config, job, workdir, **options):
  """Runs the jobs, which must end with code 2 and one line on stderr; returns the line."""
  entry = commands.exit_on_user_error(lambda _: runner.run(config, job, str(workdir), **options))
  with pytest.raises(SystemExit) as caught:
    entry([])
  assert caught.value.code == 2
  lines = capfd.readouterr().err.splitlines()
  assert len(lines) == 1, lines
  return lines[0]


def contents(folder):
  return {p.relative_to(folder): p.read_bytes() if p.is_file() else None for p in folder.rglob('*')}


@pytest.mark.parametrize(
  'job, changes, words',
  [
    (
      'generator',
      dict(data__name='{files}/none.npz'),
      ['none.npz: no such file', 'data may be digits'],
    ),
    ('all', dict(data__name='cifar-10'), ["unknown data 'cifar-10'", 'did you mean cifar10?']),
    (
      'probe',
      dict(data__name='cifar10', data__dir='{files}/empty'),
      ['cifar10 is not in', '--download', 'fetch by hand: curl'],
    ),
    (
      'generator',
      dict(data__name='{files}/nchw.npz'),
      ['(20, 3, 8, 8)', 'expected 1, 3 or 4 channels', 'images.transpose(0, 2, 3, 1)'],
    ),
    (
      'generator',
      dict(data__name='{files}/from_1.npz'),
      [
        'from_1.npz: no training image of class 0 (1 of 4 classes are empty)',
        'np.unique(labels, return_inverse=True)[1]',
      ],
    ),
    (
      'all',
      dict(data__name='{files}/one.npz'),
      ['the job probe tells classes apart', 'has one', 'label the pictures'],
    ),
    (
      'all',
      dict(data__name='{files}/28x28.npz', generator__path='cifar10-small'),
      ['generator.path=cifar10-small have 3 channels', '28x28.npz 1', 'train a generator on them'],
    ),
    (
      'generator',
      dict(data__name='{files}/28x28.npz'),
      ['28x28', 'generator.base_size=4', 'squares of 8, 16, 32', 'resize'],
    ),
    (
      'generator',
      dict(data__name='{files}/negative.npz'),
      ['labels hold -1', 'expected a class 0..K-1', 'drop'],
    ),
    (
      'all',
      dict(data__name='{files}/unnamed.npz'),
      ['labels hold 2', 'expected 0..1', 'name each'],
    ),
    ('all', dict(data__name='{files}/cut.npz'), ['cut.npz: not a readable .npz', 'write it again']),
    (
      'probe',
      dict(data__name='{files}/cifar-10-binary.tar.gz'),
      ['damaged or not a .tar.gz', 'fetch it again'],
    ),
    (
      'pretrian',
      {},
      [
        "job 'pretrian'",
        'did you mean pretrain?',
        'choose one of collect, generator, pretrain, probe, ood, diversity, quality, concepts, '
        'finetune, scratch, scores',
      ],
    ),
    ('all', dict(jobs=('prob',)), ["job 'prob'", 'did you mean probe?']),
    (
      'generator',
      dict(generator__batch_size=12),
      ['generator.batch_size=12', 'multiple of devices=8', 'set generator.batch_size to 16'],
    ),
    (
      'generator',
      dict(generator__batch_size=24),
      ['generator.mbstd_group=2', 'does not divide the 3 images', 'set it to 1'],
    ),
    (
      'generator',
      dict(generator__lr=-1.0),
      ['generator.lr=-1.0 is not positive', 'set it above 0'],
    ),
    (
      'all',
      dict(pretrain__num_envs=20),
      ['pretrain.num_envs=20', 'replay.num_shards=8', 'set pretrain.num_envs to 16'],
    ),
    (
      'pretrain',
      dict(replay__num_shards=4),
      ['replay.num_shards=4', 'shared by 8 devices: take 1, 2, 4 of them', 'set it to 8'],
    ),
    (
      'pretrain',
      dict(pretrain__batch_size=36),
      ['pretrain.batch_size=36', 'replay.num_shards=8', 'set pretrain.batch_size to 32'],
    ),
    (
      'pretrain',
      dict(replay__actions='int4'),
      ["replay.actions='int4'", 'choose one of float32, bfloat16, int8'],
    ),
    (
      'pretrain',
      dict(replay__capacity=100),
      ['replay.capacity=100', 'num_envs * rollout_length=64', 'set replay.capacity to 128'],
    ),
    (
      'pretrain',
      dict(pretrain__batch_size=128, replay__capacity=64),
      ['pretrain.batch_size=128', 'replay.capacity=64', 'lower the first'],
    ),
    (
      'pretrain',
      dict(pretrain__rollout_length=1, replay__capacity=32, pretrain__batch_size=16),
      ['replay.capacity=32', 'pretrain.num_envs=16', 'set it to 48'],
    ),
    (
      'pretrain',
      dict(environment__alpha=1.5),
      ['environment.alpha=1.5', 'not in [0, 1]', 'set it'],
    ),
    ('all', dict(environment__beta=-0.1), ['environment.beta=-0.1', 'not in [0, 1]', 'set it']),
    (
      'pretrain',
      dict(environment__beta=float('nan')),
      ['environment.beta=nan', 'is not finite', 'set it'],
    ),
    (
      'pretrain',
      dict(environment__episode_length=1),
      ['environment.episode_length=1', 'set it to 2 or more'],
    ),
    ('pretrain', dict(reward__k=32), ['reward.k=32', 'pretrain.batch_size=32', 'choose 1 to 31']),
    ('pretrain', dict(reward__k=0), ['reward.k=0 is not positive', 'set it to 1 or more']),
    (
      'pretrain',
      dict(reward__transform='sqrt'),
      ["reward.transform='sqrt'", 'choose one of log1p, log'],
    ),
    (
      'pretrain',
      dict(reward__on='previous'),
      ["reward.on='previous'", 'choose one of next, current'],
    ),
    (
      'pretrain',
      dict(simsiam__augment='simsaim'),
      ["augment 'simsaim'", 'expected one of', "did you mean 'simsiam'?"],
    ),
    ('pretrain', dict(simsiam__proj_layers=4), ['proj_layers=4', 'expected 2 (CIFAR) or 3']),
    (
      'all',
      dict(encoder__name='resnet81'),
      ["encoder.name='resnet81'", 'expected one of', "did you mean 'resnet18'?"],
    ),
    (
      'pretrain',
      dict(pretrain__dtype='float8'),
      ["pretrain.dtype='float8'", 'choose one of float32'],
    ),
    (
      'pretrain',
      dict(pretrain__env_steps=0),
      ['pretrain.env_steps=0 is not positive', 'set it to 1 or more'],
    ),
    (
      'pretrain',
      dict(sac__init_alpha=0.0),
      ['sac.init_alpha=0.0 is not positive', 'set it above 0'],
    ),
    (
      'pretrain',
      dict(pretrain__rollout_length=0),
      ['pretrain.rollout_length=0 is not positive', 'set it to 1 or more'],
    ),
    (
      'pretrain',
      dict(pretrain__num_envs=0),
      ['pretrain.num_envs=0 is not positive', 'set it to 1 or more'],
    ),
    (
      'pretrain',
      dict(pretrain__warmup_steps=16),
      ['pretrain.warmup_steps=16', 'too few frames', 'set it to 48'],
    ),
    (
      'pretrain',
      dict(pretrain__warmup_steps=1536),
      ['pretrain.warmup_steps=1536', 'not below pretrain.env_steps=1536'],
    ),
    ('pretrain', {}, ['holds no generator', 'give the workdir']),
    (
      'pretrain',
      dict(generator__path='{files}'),
      ['holds no generator', 'generator/network.json', 'give the workdir'],
    ),
    ('all', dict(generator__path='{files}/none'), ['none holds no generator', 'give the workdir']),
    ('probe', {}, ['pretrain/checkpoints has no checkpoint', 'run --job=pretrain first']),
    ('all', dict(jobs=()), ['jobs is empty', 'name some of collect']),
    ('collect', {}, ["job 'collect' plays a game of Atari", 'configs/atari.py']),
    ('finetune', {}, ["job 'finetune' plays a game of Atari", 'configs/atari.py']),
    (
      'all',
      dict(simsiam__proj_hidden=65_536, simsiam__proj_dim=65_536, data__name='digits'),
      ['networks of simsiam.(proj_hidden, proj_hidden, proj_dim, pred_hidden)=(65536, 65536'],
    ),
    (
      'generator',
      dict(data__name='digits', data__size=65_536),
      ['1797 pictures of (65536, 65536, 1)', 'lower --config.data.size'],
    ),
    (
      'generator',
      dict(generator__w_dim=65_536),
      ["the generator's training takes", 'lower generator.w_dim, z_dim or mapping_layers'],
    ),
    (
      'generator',
      dict(generator__d_channel_base=2**26, generator__d_channel_max=65_536),
      ["the generator's training takes", 'lower generator.d_channel_base or d_channel_max'],
    ),
    (
      'generator',
      dict(generator__channel_base=4),
      ['generator.channel_base=4', 'no channel at 8 pixels', 'set it to 8'],
    ),
    (
      'generator',
      dict(generator__pad=3),
      ['images of 14x14', 'generator.pad=3', 'squares of 8, 16, 32'],
    ),
    (
      'all',
      dict(replay__capacity=10**9 // 64 * 64),
      ["the replay's frames take", 'lower replay.capacity'],
    ),
  ],
)
def test_bad_input_is_one_line_before_any_work(capfd, files, tmp_path, job, changes, words):
  changes = {k: v.format(files=files) if isinstance(v, str) else v for k, v in changes.items()}
  workdir, compiled = tmp_path / 'run', len(COMPILED)
  line = refuse(capfd, config_for(files, **changes), job, workdir)
  assert all(word in line for word in words), line
  assert sum(COMPILED[compiled:]) <= (
    'generator__path' in changes
  )  # seconds: one that is loaded changes its arrays' type
  assert not contents(tmp_path)
  # The workdir is not bound to the mistake: the fixed config gets as far as it can without a
  # generator.
  assert 'holds no generator' in refuse(capfd, config_for(files), 'pretrain', workdir)


def test_a_workdir_of_another_config_names_what_differs(capfd, files, tmp_path):
  config = config_for(files)
  runner.claim(tmp_path, config)
  save_generator(config, tmp_path)
  before = contents(tmp_path)
  line = refuse(capfd, config_for(files, pretrain__batch_size=64, seed=3), 'pretrain', tmp_path)
  assert (
    'another config (pretrain.batch_size: 32 there, 64 now; seed: 0 there, 3 now): choose another '
    '--workdir' in line
  )
  assert contents(tmp_path) == before

  (tmp_path / 'config.json').write_text('{"seed": ')
  line = refuse(capfd, config, 'pretrain', tmp_path)
  assert 'config.json is damaged' in line and 'restore it or choose another --workdir' in line


def test_settings_of_an_evaluation_may_change_until_it_has_a_result(files, tmp_path):
  config, other = config_for(files), config_for(files, probe__methods=('knn',), jobs=('probe',))
  runner.claim(tmp_path, config)
  save_generator(config, tmp_path)
  runner.claim(tmp_path, other)
  assert json.loads((tmp_path / 'config.json').read_text())['probe']['methods'] == ['knn']
  write_json(tmp_path / 'results' / 'probe.json', {})
  with pytest.raises(
    UserError,
    match=r"another config \(probe.methods: \['knn'\] there.* or delete results/probe.json$",
  ):
    runner.claim(tmp_path, config)
  other.seed = 3
  with pytest.raises(UserError, match='seed.*or go back to its config$'):
    runner.claim(tmp_path, other)


def test_a_job_is_run_by_one_command_at_a_time(capfd, files, tmp_path, monkeypatch):
  config = config_for(files)
  with locked(tmp_path / '.generator.lock') as mine:
    assert mine
    assert f'the job generator of {tmp_path} is being run by another command' in refuse(
      capfd, config, 'generator', tmp_path, patience=0.5
    )
    assert (tmp_path / '.generator.lock').exists()
  assert not (tmp_path / '.generator.lock').exists()

  with contextlib.ExitStack() as stack:  # it is waited for, ends, and has left nothing to do
    stack.enter_context(locked(tmp_path / '.generator.lock'))
    slept = []

    def sleep(seconds):
      slept.append(seconds)
      write_json(tmp_path / 'results' / 'generator.json', {})
      stack.close()

    monkeypatch.setattr(palm_jax.base.files.time, 'sleep', sleep)
    runner.run(config, 'generator', str(tmp_path), patience=60)
  assert slept == [1.0] and not (tmp_path / 'generator').exists()


def test_checkpoints_of_another_config_or_damaged_ones(capfd, files, tmp_path):
  config = config_for(files)
  runner.claim(tmp_path, config)
  save_generator(config, tmp_path)
  with Checkpoints(tmp_path / 'pretrain' / 'checkpoints') as checkpoints:
    checkpoints.save(8, {'state': {'iteration': np.array(8, np.int32)}}, {})
  before, compiled = contents(tmp_path), len(COMPILED)
  line = refuse(capfd, config, 'pretrain', tmp_path)
  assert (
    'pretrain/checkpoints/8 is a checkpoint of another config' in line
    and 'choose another --workdir' in line
  )
  assert contents(tmp_path) == before and max(COMPILED[compiled:], default=0) < 10  # seconds

  (tmp_path / 'generator' / 'checkpoints' / '1' / '_CHECKPOINT_METADATA').write_text('{')
  line = refuse(capfd, config_for(files), 'pretrain', tmp_path)
  assert 'generator/checkpoints is damaged' in line and 'restore a copy' in line


@pytest.mark.parametrize('below', ['file/run', '/proc/run'])
def test_a_workdir_that_cannot_be_made(capfd, files, tmp_path, below):
  line = refuse(capfd, config_for(files), 'pretrain', files / below)
  assert f'{files / below} cannot be written' in line and 'choose another --workdir' in line


@pytest.mark.slow
def test_a_diverging_run_names_metric_and_iteration_and_keeps_its_checkpoint(
  capfd, files, tmp_path
):
  config = config_for(
    files,
    simsiam__lr=1000.0,
    simsiam__weight_decay=1.0,
    pretrain__iterations_per_call=2,
    pretrain__checkpoint_minutes=0.0,
    pretrain__monitor_fraction=1.0,
  )
  runner.claim(tmp_path, config)
  save_generator(config, tmp_path)
  line = refuse(capfd, config, 'pretrain', tmp_path)
  assert re.search(r'pretrain: \w+ is (nan|inf) at iteration \d+: lower the learning rates', line)
  assert (
    f'another --workdir, which plays in the same generator with --config.generator.path={tmp_path}'
    in line
  )
  assert str(tmp_path / 'pretrain' / 'checkpoints') in line
  assert list_steps(tmp_path / 'pretrain' / 'checkpoints')
  assert not (tmp_path / 'results').exists()
  assert not [*tmp_path.rglob('*.part'), *tmp_path.rglob('*orbax-checkpoint-tmp*')]

  save_generator(config, tmp_path, 2)  # it trains on, and the world would be another one
  assert 'pretrain began in the world of another generator' in refuse(
    capfd, config, 'pretrain', tmp_path
  )


def command(*args, limit='unlimited'):
  """python -m palm_jax.main, with files of at most `limit` blocks as on a full disk -> (code, lines
  of stderr)."""
  done = subprocess.run(
    [
      'sh',
      '-c',
      f'ulimit -f {limit}; exec "$@"',
      'sh',
      sys.executable,
      '-m',
      'palm_jax.main',
      *args,
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=120,
    env=dict(os.environ, JAX_PLATFORMS='cpu', PYTHONDONTWRITEBYTECODE='1'),
  )
  return done.returncode, done.stderr.splitlines()


@pytest.mark.parametrize(
  'message, words',
  [
    ("flag --n=x: invalid literal for int() with base 10: 'x'", '--n=x: expected a whole number'),
    ("flag --n=: could not convert string to float: ''", '--n=: expected a number'),
    (
      "flag --n=2: ('Non-boolean argument to boolean flag', '2')",
      '--n=2: expected True or False',
    ),
    ('Unknown command line flag', 'Unknown command line flag'),
  ],
)
def test_a_value_of_another_type_in_plain_words(message, words):
  assert commands._in_words(message) == words


@pytest.mark.parametrize(
  'args, words',
  [
    (
      ['--config.pretrain.batchsize=3'],
      ['--config.pretrain.batchsize is unknown', 'did you mean pretrain.batch_size?'],
    ),
    (
      ['--config=configs/digits.py', '--config.pretrain.batch_size=many'],
      ['--config.pretrain.batch_size=many: expected a whole number'],
    ),
    (
      ['--config.jobs=pretrain,probe'],
      [
        '--config.jobs=pretrain,probe is no list',
        '''write --config.jobs="('pretrain', 'probe')"''',
      ],
    ),
    (
      ['--job=generator', '--config.generator.path=cifar10-small'],
      ['would not be played in', 'give --config.generator.path='],
    ),
    (
      ['--config=configs/digit.py'],
      ['--config=configs/digit.py cannot be read', 'such as configs/digits.py'],
    ),
    (
      ['--job', 'probe', '--config', 'configs/cifar.py:smal'],
      ['configs/cifar.py:smal is unknown', 'variants are cifar100, small'],
    ),
    (
      ['--config=configs/digits.py:tiny'],
      ['--config=configs/digits.py has no variants: leave :tiny out'],
    ),
    (
      ['--config.probe.label_fractions=(nan,)'],
      ['--config.probe.label_fractions=(nan,) cannot be read: write numbers', 'such as (1.0,)'],
    ),
    (['--job=pretrian'], ["job 'pretrian' is unknown", 'did you mean pretrain?']),
  ],
)
def test_the_command_line_ends_with_code_2_and_one_line(tmp_path, monkeypatch, capfd, args, words):
  """In this process; the next test has the command itself."""
  argv = ['palm_jax.main', *args, f'--workdir={tmp_path / "run"}']
  monkeypatch.chdir(ROOT)
  monkeypatch.setattr(sys, 'argv', argv)  # where ml_collections looks for --config.KEY=VALUE

  def entry(argv):
    main.parse_flags(argv)
    f = flags.FLAGS
    runner.run(f.config, f.job, f.workdir, f.download)

  with flagsaver.flagsaver(), pytest.raises(SystemExit) as caught:
    commands.exit_on_user_error(entry)(argv)
  lines = capfd.readouterr().err.splitlines()
  assert caught.value.code == 2 and len(lines) == 1 and lines[0].startswith('palm_jax: '), lines
  assert all(word in lines[0] for word in words), lines
  assert not any(tmp_path.iterdir())


@pytest.mark.parametrize('args', [['--job=pretrian'], ['--config.pretrain.batch_size=many']])
def test_the_command_ends_with_code_2_and_one_line(tmp_path, args):
  code, lines = command(*args, f'--workdir={tmp_path / "run"}')
  assert code == 2 and len(lines) == 1 and lines[0].startswith('palm_jax: '), lines
  assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
  'text, words',
  [
    ('def get_config(:', 'line 1, ended in SyntaxError: invalid syntax'),
    ('\nimport nowhere_at_all', "line 2, ended in ModuleNotFoundError: No module named 'nowhere"),
    ('def get_config():\n  return {}[0]', 'line 2, ended in KeyError: 0'),
    ('x = 1', 'has no function get_config: add one'),
    ('def get_config(): pass', 'its get_config returned a NoneType, expected a ConfigDict'),
    ('def get_config(): return {}', 'its get_config returned a dict, expected a ConfigDict'),
    ('def get_config(): return 1 / "a"', 'TypeError'),
  ],
)
def test_mistakes_in_a_config_file_are_one_line(tmp_path, monkeypatch, text, words):
  path = tmp_path / 'mine.py'
  path.write_text(text)
  monkeypatch.setattr(flags, 'FLAGS', flags.FlagValues())
  with pytest.raises(UserError) as caught:
    commands.parse_config_flags(['main', f'--config={path}'], 'configs/digits.py')
  assert words in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize('name', settings.NEEDED)
def test_a_config_without_what_all_jobs_read(files, name):
  c = config_for(files)
  with c.unlocked():
    del c[name]
  with pytest.raises(UserError, match=f'the config has no {name}: take one of configs/'):
    settings.check(c)


def test_where_nothing_can_be_written_is_known_before_it_is_tried(files, tmp_path):
  palm_jax.base.files.check_writable(tmp_path / 'new' / 'folder' / 'x.png')
  assert not any(tmp_path.iterdir())
  with pytest.raises(UserError, match='file is no folder that can be written to'):
    palm_jax.base.files.check_writable(files / 'file' / 'x.png')


@pytest.mark.parametrize(
  'number, remedy',
  [
    (errno.ENOSPC, 'free space there'),
    (errno.EACCES, 'fix permissions there'),
    (errno.EROFS, 'have it mounted for writing'),
    (errno.EMFILE, 'raise `ulimit -n`'),
    (errno.ENOENT, 'see that it is where it should be'),
    (errno.ENOTDIR, 'make place for a folder or file of that name'),
    (errno.ESTALE, 'see that its disk or file server works'),
    (errno.EXDEV, 'see that its disk or file server works'),
    (errno.EIO, 'see that its disk or file server works'),
  ],
)
def test_what_a_disk_refuses_is_one_line(capsys, number, remedy):
  def main(argv):
    raise OSError(number, os.strerror(number), '/a/file')

  with pytest.raises(SystemExit) as caught:
    commands.exit_on_user_error(main)([])
  line = capsys.readouterr().err
  assert caught.value.code == 2 and line.count('\n') == 1
  assert line.startswith(f'palm_jax: {os.strerror(number)}: /a/file: {remedy}')


def test_an_output_that_nobody_reads_any_more_is_one_line():
  reader, writer = os.pipe()
  os.close(reader)
  done = subprocess.run(
    [sys.executable, '-m', 'palm_jax.main', '--help'],
    stdout=writer,
    stderr=subprocess.PIPE,
    cwd=ROOT,
    text=True,
    timeout=120,
  )
  os.close(writer)
  assert done.returncode == 141 and done.stderr == 'palm_jax: whoever read the output has ended\n'


def test_a_full_disk_is_one_line_and_leaves_no_half(tmp_path):
  code, lines = command('--config.jobs=("pretrain",)', f'--workdir={tmp_path / "run"}', limit=1)
  assert code == 2 and len(lines) == 1, lines
  assert (
    f'{tmp_path / "run"} cannot be written (File too large)' in lines[0]
    and 'choose another --workdir' in lines[0]
  )
  assert not any((tmp_path / 'run').iterdir())
