"""python -m palm_jax.main --config=configs/digits.py [--job=...] [--workdir=...]
[--config.x.y=value ...]"""

import ast
import contextlib
import difflib
import errno
import functools
import importlib
import json
import logging as python_logging
import pathlib
import sys

import numpy as np
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from palm_jax.base import devices
from palm_jax.base.errors import UserError

DEFAULT_CONFIG = 'configs/digits.py'
PATIENCE = 120  # seconds: so long a file server may hold what a lost machine had


def parse_flags(argv):
  """Defines the flags and reads them.

  Returns:
    What absl leaves of argv.

  Raises:
    UserError: a flag, config file, variant, key or value that cannot be; in one line.
  """
  define = functools.partial(
    config_flags.DEFINE_config_file,
    'config',
    DEFAULT_CONFIG,
    'Config file, with `:variant` where it has some.',
  )
  try:
    # First without the --config.key=value, because ml_collections meets an unknown key with a
    # traceback.
    plain = flags.FlagValues()
    plain.set_gnu_getopt(True)  # reads on beyond the values of flags that it does not know
    define(flag_values=plain, sys_argv=[])
    plain([arg for arg in argv if not arg.startswith('--config.')], known_only=True)
    check_keys(argv, plain.config, plain['config'].config_filename)
    define()
    flags.DEFINE_string('job', 'all', f'{", ".join(JOBS)}, or all: those of config.jobs, in order.')
    flags.DEFINE_string('workdir', None, 'Where everything is written; default runs/<config.name>.')
    flags.DEFINE_bool(
      'download', False, 'Allow the data set to be fetched from where it is published.'
    )
    flags.DEFINE_string(
      'coordinator_address',
      None,
      'HOST:PORT of process 0, where JAX cannot find the processes itself.',
    )
    flags.DEFINE_integer('num_processes', None, 'How many there are; with --coordinator_address.')
    flags.DEFINE_integer(
      'process_id', None, 'Which of them this is, from 0; with --coordinator_address.'
    )
    return flags.FLAGS(argv)
  except flags.Error as e:
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    raise UserError(
      ' '.join([lines[0], *lines[1:][-1:]])
    ) from e  # between the first and the last is a traceback


def check_keys(argv, config, path):
  """Raises UserError unless the config of `path` is there and has each key of argv's
  --config.key=value."""
  if not isinstance(config, ConfigDict):  # ml_collections' stand-in for a file that it cannot read
    raise UserError(
      f'--config={path} cannot be read (working folder: {pathlib.Path.cwd()}): give a config file, '
      f'such as {DEFAULT_CONFIG}'
    )
  keys = flatten(config.to_dict())
  for arg in argv:
    key, _, value = arg.removeprefix('--config.').partition('=')
    if not arg.startswith('--config.'):
      continue
    if key not in keys:
      raise UserError(f'--config.{key} is unknown: expected a key of {path}{nearest(key, keys)}')
    if isinstance(keys[key], tuple) and ',' in value and not is_literal(value):
      raise UserError(
        f'--config.{key}={value} is no list: write --config.{key}="{tuple(value.split(","))}", or '
        f'"{(value,)}" for one'
      )


def is_literal(text):
  try:
    ast.literal_eval(text)
  except (SyntaxError, ValueError):
    return False
  return True


def nearest(name, names):
  near = difflib.get_close_matches(name, names, 1)
  return f' (did you mean {near[0]}?)' if near else ''


def check(config, jobs, num_devices):
  """Raises UserError on settings that one of the jobs would refuse, before the first of them
  starts."""
  if 'generator' in jobs:
    from palm_jax.generator import train

    train.check_config(config.generator, num_devices)
  if 'pretrain' in jobs:
    from palm_jax import pretrain

    pretrain.check_config(config, num_devices)
  for name in ('diversity', 'plan', 'benchmark'):
    if name in jobs:
      from palm_jax import pairs

      pairs.require_policy(config, name)
  for name in ('probe', 'ood', 'diversity'):
    if name in jobs and config.environment.stack > 1:
      raise UserError(
        f'--job={name} shows single pictures, but environment.stack={config.environment.stack} '
        'trains an encoder '
        'of several: judge a run with 1'
      )
  for name in EVALUATIONS:
    if name in jobs:
      importlib.import_module(f'palm_jax.evaluate.{name}').check_config(config, num_devices)
  for name in ATARI:
    if name in jobs:
      if 'atari' not in config:
        raise UserError(
          f'job {name!r} plays a game of Atari, but {config.name} has none: give '
          '--config=configs/atari.py:GAME'
        )
      importlib.import_module(f'palm_jax.atari.{ATARI[name]}').check_config(
        _from_scratch(config, name), num_devices
      )
  if 'report' in jobs:
    from palm_jax import report

    report.check_config(config, num_devices)


def claim_workdir(workdir, config):
  """Writes config.json, or checks that the one there is the same in all that the workdir's content
  depends on.

  That is nothing where no job has written yet; `name`, `jobs` and sections of evaluations without a
  result may change later.

  Raises:
    UserError: the workdir cannot be made, or belongs to another config; the message names the keys
      that differ.
  """
  import jax

  from palm_jax.checkpoint import any_process, write_json_atomic

  path, now = workdir / 'config.json', json.loads(config.to_json_best_effort())
  if any_process(path.exists() and any((workdir / name).exists() for name in (*JOBS, 'results'))):
    try:
      saved = flatten(json.loads(path.read_text()))
    except (OSError, ValueError) as e:
      raise UserError(f'{path} is damaged ({e}): restore it or choose another --workdir') from e
    unread = (
      name
      for name in (*EVALUATIONS, 'scores')
      if not (workdir / 'results' / f'{name}.json').exists()
    )
    free = ('name', 'jobs', 'plan', 'features', 'report', *unread)
    wanted, missing = flatten(now), '(absent)'
    if saved == wanted:
      return
    section = lambda key: key.partition('.')[0]
    differ = {
      k: f'{k}: {saved.get(k, missing)} there, {wanted.get(k, missing)} now'
      for k in sorted(saved.keys() | wanted.keys())
      if saved.get(k, missing) != wanted.get(k, missing) and section(k) not in free
    }
    if differ:
      judged = sorted(set(map(section, differ)))
      again = (
        ', or delete ' + ' and '.join(f'results/{name}.json' for name in judged)
        if set(judged) <= {*EVALUATIONS, 'scores'}
        else ''
      )
      same_generator = not {'seed', 'data', 'generator'} & set(judged) and any_process(
        (workdir / 'generator').exists()
      )
      there = (
        f' (--config.generator.path={workdir} plays in the generator of this one)'
        if same_generator
        else ''
      )
      raise UserError(
        f'{workdir} was made with another config ({"; ".join(differ.values())}): '
        f'choose another --workdir{there}, or go back to its config{again}'
      )
  try:
    if jax.process_index() == 0:
      workdir.mkdir(parents=True, exist_ok=True)
      write_json_atomic(path, now)
  except OSError as e:
    raise UserError(
      f'{workdir} cannot be written ({e.strerror}): mend that or choose another --workdir'
    ) from e


def flatten(tree, prefix=''):
  """{'a': {'b': 1}} -> {'a.b': 1}."""
  if not isinstance(tree, dict):
    return {prefix[:-1]: tree}
  return {k: v for name, sub in tree.items() for k, v in flatten(sub, f'{prefix}{name}.').items()}


def load_data(config, download):
  from palm_jax.data.load import load as data

  return data.load(config.data.name, download=download, data_dir=config.data.dir or None)


def check_data(config, jobs, data, workdir):
  """Raises UserError on data that one of the jobs would refuse, before the first of them starts;
  logs what they are."""
  logging.info('data: %s', data.source)
  empty = np.flatnonzero(np.bincount(data.train.labels, minlength=len(data.class_names)) == 0)
  if len(empty) and 'generator' in jobs:
    raise UserError(
      f'{config.data.name}: no training image of class {empty[0]} ({len(empty)} of '
      f'{len(data.class_names)} classes are '
      'empty), which a world would draw all the same; number those that are there from 0: '
      'np.unique(labels, return_inverse=True)[1]'
    )
  if len(data.class_names) < 2 and (lone := [name for name in ('probe', 'ood') if name in jobs]):
    raise UserError(
      f'the job {lone[0]} tells classes apart, but {config.data.name} has one: leave it out of '
      'config.jobs, or '
      'label the pictures'
    )
  if 'pretrain' not in jobs or not set(EVALUATIONS) & set(jobs) or not config.generator.path:
    return
  from palm_jax import pretrain

  seen, given = (
    pretrain.seen_shape(config, pretrain.load_world_generator(config, workdir)),
    data.train.images.shape[1:],
  )
  if seen[2] != given[2]:
    raise UserError(
      f'the pictures of generator.path={config.generator.path} have {seen[2]} channels, those of '
      f'{config.data.name} {given[2]}: its encoder could not see them; give others, or train a '
      'generator on them'
    )
  if seen != given:
    logging.warning(
      'the encoder will be trained on pictures of %s and judged on pictures of %s', seen, given
    )


def load_collected(workdir, newest=False):
  """The Data that the job `collect` left: stacks of frames, or the newest frame of each."""
  from palm_jax.data.load import load as data

  path = workdir / COLLECTED / 'stacks.npz'
  if not path.exists():
    raise UserError(f'{path} is not there: run --job=collect first, or give --config.data.name')
  stacks = data.load(path)
  if not newest:
    return stacks
  of = lambda split: split._replace(images=np.ascontiguousarray(split.images[..., -1:]))
  return stacks._replace(
    train=of(stacks.train),
    test=of(stacks.test),
    source=f'{stacks.source}, the newest frame of each',
  )


def run_job(job, config, workdir, data, mesh):
  """Runs one job to its end. Returns False if it was asked to stop before (its state is saved)."""
  # Imported here: a job loads only what it needs, and nothing before the flags are read.
  if job == 'generator':
    from palm_jax.generator import train

    return train.train(config, workdir, data, mesh)
  if job == 'pretrain':
    from palm_jax import train

    return train.train(config, workdir, mesh, data)
  if job in EVALUATIONS:
    return importlib.import_module(f'palm_jax.evaluate.{job}').evaluate(config, workdir, data, mesh)
  if (
    job == 'scratch'
  ):  # the control of finetune: all alike but the convolutions that it begins with
    return run_job('finetune', _from_scratch(config, job), workdir / 'scratch', data, mesh)
  if job == 'scores':
    from palm_jax.atari import scores

    return scores.evaluate(config, workdir, data, mesh)
  if job in ATARI:
    return getattr(importlib.import_module(f'palm_jax.atari.{job}'), job)(config, workdir, mesh)
  if job == 'report':
    from palm_jax import report

    return report.evaluate(config, workdir, data, mesh)
  from palm_jax.speed import benchmark

  return benchmark.benchmark(config, workdir, data, mesh)


def _from_scratch(config, job):
  config = config.copy_and_resolve_references()
  if job == 'scratch':
    config.finetune.trunk = 'scratch'
  return config


def needs_data(job, config):
  if job in ATARI:
    return False
  if job == 'report':  # without them it has no map of the features
    return bool(config.data.name)
  if job == 'pretrain':
    from palm_jax import pairs

    return pairs.SOURCES[config.pairs.source].needs == 'images'
  from palm_jax.speed.benchmark import trains_generator

  return trains_generator(config) if job == 'benchmark' else True


EVALUATIONS = ('probe', 'ood', 'diversity', 'quality')  # modules of palm_jax.evaluate
ATARI = {
  'collect': 'collect',
  'finetune': 'finetune',
  'scratch': 'finetune',
  'scores': 'scores',
}  # modules of palm_jax.atari
COLLECTED = 'collect'  # as config.data.name: what that job left in the workdir
JOBS = (
  'collect',
  'generator',
  'pretrain',
  *EVALUATIONS,
  'finetune',
  'scratch',
  'scores',
  'report',
  'study',
  'benchmark',
  'plan',
)


def run(config, job, workdir, download=False):
  """The jobs in order, skipping those whose results are complete in the workdir.

  Raises:
    UserError: settings, data or a workdir that cannot be, before anything is computed or written.
  """
  import jax

  from palm_jax.checkpoint import any_process

  for name in config.jobs if job == 'all' else (job,):
    if name not in JOBS:
      raise UserError(
        f'job {name!r} is unknown: choose one of {", ".join(JOBS)}, '
        f'all{nearest(name, (*JOBS, "all"))}'
      )
  if 'study' in (config.jobs if job == 'all' else (job,)):
    from palm_jax import study

    study.run(config, workdir, download)
    return
  workdir = pathlib.Path(workdir or f'runs/{config.name}').expanduser().absolute()
  result = lambda name: (
    workdir / ('scratch/results/finetune.json' if name == 'scratch' else f'results/{name}.json')
  )
  complete = lambda name: any_process(result(name).exists())
  jobs = config.jobs if job == 'all' else (job,)
  if job == 'all' and config.generator.path:
    logging.info('generator: that of %s', config.generator.path)
    jobs = [name for name in jobs if name != 'generator']
  if job == 'generator' and config.generator.path:
    raise UserError(
      f'--job=generator with generator.path={config.generator.path}: what it trains would not be '
      'played in; '
      'give --config.generator.path='
    )
  mesh = devices.make_mesh()
  check(config, jobs, mesh.size)
  if 'plan' in jobs:  # leaves no trace in a workdir that other settings may be for
    from palm_jax.speed import plan

    plan.plan(config, workdir, mesh)
    jobs = [name for name in jobs if name != 'plan']
  if not jobs:
    return
  if download and 'ood' in jobs:
    from palm_jax.evaluate import ood

    ood.download(config)
  wanted = lambda name: needs_data(name, config) and not complete(name)
  data = (
    load_data(config, download)
    if config.data.name != COLLECTED and any(map(wanted, jobs))
    else None
  )
  if tuple(jobs) == ('report',):  # it reads; settings of the workdir are those in its config.json
    run_job('report', config, workdir, data, mesh)
    return
  if data:
    check_data(config, [name for name in jobs if not complete(name)], data, workdir)
  claim_workdir(workdir, config)
  if not jax.config.jax_compilation_cache_dir:  # JAX_COMPILATION_CACHE_DIR
    jax.config.update('jax_compilation_cache_dir', str(workdir / 'compilation_cache'))
  logging.info('%s: %d %s device(s)', workdir, mesh.size, mesh.devices.flat[0].platform)
  for name in jobs:
    if complete(name):
      logging.info('%s: complete, skipped (delete %s to run it again)', name, result(name))
      continue
    if config.data.name == COLLECTED and data is None and needs_data(name, config):
      data = load_collected(workdir, newest=config.environment.stack > 1)
    with only_one(workdir, name):
      if not complete(name) and not run_job(
        name, config, workdir, data, mesh
      ):  # the one that was waited for may have ended it
        logging.info('%s: stopped and saved; the same command goes on', name)
        return


@contextlib.contextmanager
def only_one(workdir, job):
  """Holds a job of the workdir while the block lasts; UserError where another command has it: each
  would overwrite the other's."""
  import jax

  from palm_jax.base.files import locked
  from palm_jax.checkpoint import any_process

  path = workdir / f'.{job}.lock'
  with locked(path, PATIENCE) if jax.process_index() == 0 else contextlib.nullcontext(True) as mine:
    if any_process(not mine):
      raise UserError(
        f'the job {job} of {workdir} is being run by another command: wait for its end or stop '
        'it, or choose another '
        f'--workdir (where it ended with its machine, remove {path})'
      )
    yield


def main(argv):
  if len(argv) > 1:
    raise UserError(f'unexpected argument {argv[1]!r}: flags begin with --')
  devices.configure()
  python_logging.getLogger('jax').setLevel(
    python_logging.WARNING
  )  # it tells of every backend that is not there
  devices.initialize_distributed(
    flags.FLAGS.coordinator_address, flags.FLAGS.num_processes, flags.FLAGS.process_id
  )
  run(flags.FLAGS.config, flags.FLAGS.job, flags.FLAGS.workdir, flags.FLAGS.download)
  devices.wait_for_all()


def fail(message):
  print(f'palm_jax: {message}', file=sys.stderr)
  sys.exit(2)


def exit_on_user_error(main):
  """Wraps a main function: a UserError, a full disk or a forbidden path becomes one line and exit
  code 2."""

  def wrapped(argv):
    try:
      return main(argv)
    except UserError as e:
      fail(e)
    except OSError as e:
      if e.errno not in (
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EFBIG,
        errno.EACCES,
        errno.EPERM,
        errno.EROFS,
      ):
        raise
      fail(
        f'{e.strerror}: {e.filename or "the file being written"}: free space there or choose '
        'another --workdir'
      )
    except RuntimeError as e:  # JaxRuntimeError, which names no kind
      import jax

      if (
        'RESOURCE_EXHAUSTED' not in str(e) or jax.process_count() > 1
      ):  # where only dying at once ends the others
        raise
      fail(
        f'a device has not enough memory ({" ".join(str(e).split())[:200]}): lower '
        'pretrain.batch_size, encoder.width or '
        'replay.capacity, raise generator.accumulate, or take more devices; --job=plan shows what '
        'takes how much'
      )

  return wrapped


if __name__ == '__main__':
  app.run(exit_on_user_error(main), flags_parser=exit_on_user_error(parse_flags))
