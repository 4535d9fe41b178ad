"""python -m palm_jax.main --config=configs/digits.py [--job=...] [--workdir=...] [--config.x.y=value ...]"""
import difflib
import errno
import json
import logging as python_logging
import pathlib
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from palm_jax import devices
from palm_jax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file('config', 'configs/digits.py', 'Config file, with `:variant` where it has some.')
_JOB = flags.DEFINE_string('job', 'all', 'generator, pretrain, probe, or all: those of config.jobs, in order.')
_WORKDIR = flags.DEFINE_string('workdir', None, 'Where everything is written; default runs/<config.name>.')
_DOWNLOAD = flags.DEFINE_bool('download', False, 'Allow the data set to be fetched from where it is published.')


def claim_workdir(workdir, config):
  """Writes config.json, or checks that the one there is the same.

  Raises:
    UserError: the workdir belongs to another config; the message names the keys that differ.
  """
  from palm_jax.checkpoint import write_json_atomic
  path, now = workdir / 'config.json', json.loads(config.to_json_best_effort())
  if not path.exists():
    workdir.mkdir(parents=True, exist_ok=True)
    write_json_atomic(path, now)
    return
  try:
    saved = flatten(json.loads(path.read_text()))
  except ValueError as e:
    raise UserError(f'{path} is damaged ({e}): restore it or choose another --workdir') from e
  now, missing = flatten(now), '(absent)'
  differ = [f'{k}: {saved.get(k, missing)} there, {now.get(k, missing)} now'
            for k in sorted(saved.keys() | now.keys()) if saved.get(k, missing) != now.get(k, missing)]
  if differ:
    raise UserError(f'{workdir} was made with another config ({"; ".join(differ)}): choose another --workdir, or go back to its config')


def flatten(tree, prefix=''):
  """{'a': {'b': 1}} -> {'a.b': 1}."""
  if not isinstance(tree, dict):
    return {prefix[:-1]: tree}
  return {k: v for name, sub in tree.items() for k, v in flatten(sub, f'{prefix}{name}.').items()}


def load_data(config):
  from palm_jax import data
  return data.load(config.data.name, download=_DOWNLOAD.value, data_dir=config.data.dir or None)


def run_job(job, config, workdir, mesh):
  """Runs one job to its end. Returns False if it was asked to stop before (its state is saved)."""
  # Imported here: a job loads only what it needs, and nothing before the flags are read.
  if job == 'generator':
    from palm_jax.generator import train
    return train.train(config, workdir, load_data(config), mesh)
  if job == 'pretrain':
    from palm_jax import pretrain
    return pretrain.train(config, workdir, mesh)
  from palm_jax.evaluate import probe
  return probe.evaluate(config, workdir, load_data(config), mesh)


JOBS = ('generator', 'pretrain', 'probe')


def run(config, job, workdir):
  """The jobs in order, skipping those whose results are complete in the workdir."""
  names = (*JOBS, 'all')
  if job not in names:
    near = difflib.get_close_matches(job, names, 1)
    raise UserError(f'--job={job} is unknown: choose one of {", ".join(names)}' + (f' (did you mean {near[0]}?)' if near else ''))
  workdir = pathlib.Path(workdir or f'runs/{config.name}').absolute()
  claim_workdir(workdir, config)
  mesh = devices.make_mesh()
  logging.info('%s: %d %s device(s)', workdir, mesh.size, mesh.devices.flat[0].platform)
  for name in config.jobs if job == 'all' else (job,):
    result = workdir / 'results' / f'{name}.json'
    if job == 'all' and name == 'generator' and config.generator.path:
      logging.info('generator: that of %s', config.generator.path)
    elif result.exists():
      logging.info('%s: complete, skipped (delete %s to run it again)', name, result)
    elif not run_job(name, config, workdir, mesh):
      logging.info('%s: stopped and saved; the same command goes on', name)
      return


def main(argv):
  if len(argv) > 1:
    raise UserError(f'unexpected argument {argv[1]!r}: flags begin with --')
  devices.configure()
  python_logging.getLogger('jax').setLevel(python_logging.WARNING)  # it tells of every backend that is not there
  run(_CONFIG.value, _JOB.value, _WORKDIR.value)


def fail(message):
  print(f'palm_jax: {message}', file=sys.stderr)
  sys.exit(2)


def exit_on_user_error(main):
  """Wraps a main function: a UserError, a full disk or a forbidden path becomes one line and exit code 2."""
  def wrapped(argv):
    try:
      main(argv)
    except UserError as e:
      fail(e)
    except OSError as e:
      if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS):
        raise
      fail(f'{e.strerror}: {e.filename}: free space there or choose another --workdir')
  return wrapped


if __name__ == '__main__':
  app.run(exit_on_user_error(main))
