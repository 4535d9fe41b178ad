"""Runs jobs by name, in order. It knows nothing else about any of them."""

import dataclasses
import functools
import importlib
import pathlib
import sys

import jax
from absl import logging
from ml_collections import ConfigDict

from palm_jax import provenance, settings
from palm_jax import workdir as workdirs
from palm_jax.base import checks, console, devices, digests, processes, programs
from palm_jax.base.errors import UserError
from palm_jax.base.processes import is_first
from palm_jax.base.results import write_result
from palm_jax.base.training import Stopped
from palm_jax.data import collected, published
from palm_jax.data.collected import COLLECTED, load_collected
from palm_jax.data.load import load as load_data
from palm_jax.job import Job, Run

# Each module ends with its JOB, or has one of that name in capitals and _JOB. Imported when used.
JOBS = {
  'collect': 'palm_jax.atari.collect',
  'generator': 'palm_jax.generator.train',
  'pretrain': 'palm_jax.train',
  'probe': 'palm_jax.evaluate.probe',
  'ood': 'palm_jax.evaluate.ood',
  'diversity': 'palm_jax.evaluate.diversity',
  'quality': 'palm_jax.evaluate.quality',
  'concepts': 'palm_jax.evaluate.concepts',
  'finetune': 'palm_jax.atari.finetune',
  'scratch': 'palm_jax.atari.finetune',
  'scores': 'palm_jax.atari.scores',
  'offline': 'palm_jax.offline.train',
  'meta': 'palm_jax.meta.train',
  'report': 'palm_jax.report',
  'study': 'palm_jax.study',
  'benchmark': 'palm_jax.speed.benchmark',
  'plan': 'palm_jax.speed.plan',
}


def names() -> tuple[str, ...]:
  """Of all jobs."""
  return tuple(JOBS)


def find(name: str) -> Job:
  """The job of a name. Raises UserError for an unknown one."""
  if name not in JOBS:
    known = ', '.join(JOBS)
    near = checks.nearest(name, (*JOBS, 'all'))
    raise UserError(f'job {name!r} is unknown: choose one of {known}, all{near}')
  module = importlib.import_module(JOBS[name])
  return next(x for x in vars(module).values() if isinstance(x, Job) and x.name == name)


def claim(workdir: pathlib.Path, config: ConfigDict) -> None:
  """Makes a workdir the config's. Raises UserError."""
  workdirs.claim(workdir, config, list(map(find, JOBS)))


def check(config: ConfigDict, num_devices: int) -> None:
  """Raises UserError where a number of the config means nothing, or one of its jobs refuses it."""
  settings.check(config)
  for name in config.jobs:
    find(name).check(config, num_devices)


def run(
  config: ConfigDict,
  job: str,
  workdir: str | pathlib.Path | None = None,
  download: bool = False,
  patience: float = workdirs.PATIENCE,
) -> bool:
  """Runs the jobs in order, skipping those that are complete in the workdir.

  Args:
    config: the whole config.
    job: name of one, or 'all' for those of config.jobs.
    workdir: where everything is written; None is runs/<config.name>.
    download: whether published data may be fetched.
    patience: seconds to wait for another command that does the same.

  Returns:
    Whether all are complete; False where a signal stopped one.

  Raises:
    UserError: invalid settings, data or workdir, before anything is computed or written.
    workdir.Busy: another command does the same.
  """
  settings.check(config)
  collected.check(config.data.name, config.data.get('size', 0))
  jobs = _wanted(config, job)
  workdir, mesh = workdirs.locate(config, workdir), devices.make_mesh()
  processes.agree({'the workdir': str(workdir)}, 'give all of them the same absolute --workdir')
  for each in jobs:
    each.check(config, mesh.size)
  for each in jobs:
    if download and each.fetch:
      processes.first_then_all(functools.partial(each.fetch, config), 'the download has failed')
  # One machine may hold them unpacked: that all are the same is seen below.
  digest = processes.from_first(provenance.data_digest(config, jobs, workdir))
  this = Run(config, workdir, mesh, None, download)
  this = dataclasses.replace(this, runner=sys.modules[__name__], data_digest=digest)
  waiting = provenance.waiting(jobs, this)
  if config.data.name != COLLECTED and any(each.needs_data(config) for each in waiting):
    c = config.data
    if download:
      fetch = functools.partial(published.fetch_missing, c.name, c.dir or None)
      processes.first_then_all(fetch, 'the download has failed')
    data = load_data(c.name, data_dir=c.dir or None, size=c.get('size', 0))
    this = dataclasses.replace(this, data=data)
    logging.info('data: %s', data.source)
    if jax.process_count() > 1:
      splits = digests.of_arrays(*data.train, *data.test)
      processes.agree({f'data {c.name}': splits}, 'give all of them the same files')
    for each in waiting:
      each.check_data(this)
  before = workdirs.is_claimed(workdir)
  claims = any(each.claims for each in jobs)
  if claims:
    claim(workdir, config)
    programs.keep(workdir)
    logging.info('%s: %d %s device(s)', workdir, mesh.size, mesh.devices.flat[0].platform)
  try:
    if claims:
      workdirs.check_shared(workdir)
    return _run_in_order(jobs, this, patience)
  except UserError:
    if not before:
      workdirs.release(workdir, names())
    raise


def _run_in_order(jobs, this, patience):
  for i, each in enumerate(jobs):
    if provenance.is_current(each, this):
      path = workdirs.result_path(this.workdir, each)
      logging.info('%s: complete, skipped (delete %s to run it again)', each.name, path)
      if is_first():
        each.clean(this)  # the last command may have been killed before it
      continue
    this = _with_collected(jobs[i:], this)
    if not _run_alone(each, this, patience):
      logging.info('%s: stopped and saved; the same command resumes it', each.name)
      return False
    if this.data is None and this.config.data.name == COLLECTED:  # it may be there only now
      digest = processes.from_first(provenance.data_digest(this.config, jobs, this.workdir))
      this = dataclasses.replace(this, data_digest=digest)
  return True


def _wanted(config, job):
  """[Job] of --job; a generator that is given is not trained."""
  if job == 'all' and not config.jobs:
    raise UserError(f'jobs is empty: name some of {", ".join(JOBS)}, or give --job')
  jobs = [find(name) for name in (config.jobs if job == 'all' else (job,))]
  if job == 'all' and config.generator.path:
    logging.info('generator: that of %s', config.generator.path)
    jobs = [each for each in jobs if each.name != 'generator']
  return jobs


def _with_collected(jobs, this):
  """The Run with what the job `collect` left, from the first job on that needs data.

  They are judged then by all jobs that wait.
  """
  if this.data or this.config.data.name != COLLECTED or not jobs[0].needs_data(this.config):
    return this
  data = load_collected(this.workdir, newest=this.config.environment.stack > 1)
  this = dataclasses.replace(this, data=data)
  for each in provenance.waiting(jobs, this):
    each.check_data(this)
  return this


def _run_alone(job, this, patience):
  """Brings a job to its end, unless who was waited for has -> whether it is there."""
  if not job.claims:
    return execute(job, this) is not None
  with workdirs.only_one(this.workdir, job.name, patience):
    workdirs.compare(this.workdir, this.config, list(map(find, JOBS)))
    return not provenance.waiting([job], this) or execute(job, this) is not None


def execute(job: Job, run: Run) -> dict | None:
  """Runs a job, prints its table and writes its result, which it returns; None where stopped."""
  origin, claimed = provenance.begin(job, run), workdirs.is_claimed(run.workdir)
  try:
    result = job.run(run)
  except Stopped:
    return None
  if result is None or not is_first():
    return result
  try:  # the file first: nobody may read the output any more
    if claimed and not run.workdir.is_dir():
      raise UserError(f'{run.workdir} was removed while {job.name} ran: its result is lost')
    if job.claims:
      workdirs.restore(run.workdir, run.config)
      write_result(workdirs.result_path(run.workdir, job), result, origin, run.config.to_dict())
  finally:
    if job.table:
      console.rest()
      print(job.table(result), flush=True)
  job.clean(run)
  return result
