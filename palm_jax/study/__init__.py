"""The job `study`: arms of one base config with the same seeds, and what their results say.

A run is an ordinary one, in <study.runs>/<arm>/seed<k>. The study orders the runs, skips what is
done, reads results/*.json of each, and compares. All share one compilation cache: runs that differ
in traced values only (environment.alpha, environment.beta, seed) load the program that the first of
them compiled. They run one after another: two arms of `configs/benchmark.py` under vmap were 1.4
times faster at `tiny`, but 1.8 times slower at `small` (two cores).
"""

import pathlib
import re

from absl import logging
from ml_collections import ConfigDict

from palm_jax import workdir as workdirs
from palm_jax.base import checks, devices, programs
from palm_jax.base.errors import UserError
from palm_jax.base.files import user_path
from palm_jax.base.metrics import Progress
from palm_jax.base.processes import from_first, is_first
from palm_jax.base.results import write_result
from palm_jax.job import Job, Run, Runner, never
from palm_jax.study import figure, numbers
from palm_jax.study.arms import (
  GENERATOR,
  ArmRun,
  base_config,
  make_arms,
  make_runs,
  named_arm,
  needed_arms,
)
from palm_jax.study.numbers import RESAMPLES, at
from palm_jax.study.readings import Reading, look_up, make_readings, steps_of


def default_config() -> ConfigDict:
  """The config's section `study`."""
  return ConfigDict(
    dict(
      # (name, settings[, x]): `x` is its place on an axis, so one name may have several. Settings
      # are those unlike the base's, as on the command line, 'environment.alpha=0 reward.k=3'
      # without --config. '{name}' in a value is the folder of that arm's run with the same seed and
      # x, which then comes first.
      arms=(),
      seeds=(0, 1, 2),  # paper: three
      jobs=('pretrain', 'probe'),
      # (name, path[, x]): 'probe/rows[features=PALM encoder, method=lbfgs]/accuracy/clean' of
      # results/probe.json; the mean where the rows are draws of one thing. The first measure is the
      # one of the orderings.
      measures=(),
      # Folder of the runs; '': the workdir. Studies that have an arm in common can share it.
      runs='',
      # (name, arm, measure, path[, x]): another row of that arm's results, shown as an arm of its
      # own.
      references=(),
      reference='',  # arm, or 'arm @ x', that all others are compared with; '': the first
      orderings=(),  # 'arm > arm' or 'arm @ x > arm @ x': claims to be judged
      axis='',  # what x is, for the figure
      grid=False,  # the figure is a map, arms down and x across
    )
  )


RANGES = dict(seeds=checks.Range(0, 2**31 - 1, many=True))


def check(config: ConfigDict, num_devices: int) -> None:
  """Raises UserError where the config has no study."""
  del num_devices
  if 'study' not in config:
    raise UserError(
      f'the config {config.name!r} has no section study: give one of configs/studies/'
    )


def make_study(
  config: ConfigDict, place: pathlib.Path, num_devices: int, runner: Runner
) -> tuple[list[ArmRun], list[Reading]]:
  """The runs of a study and what is read of them, judged before any work.

  Args:
    config: the whole config.
    place: folder of the runs.
    num_devices: of the mesh.
    runner: finds jobs.

  Raises:
    UserError: an invalid part of the study, or settings that an arm's jobs refuse.
  """
  possible = [
    'pretrain',
    *(name for name in runner.names() if name in config and runner.find(name).judges),
  ]
  for job in config.study.jobs:
    if job not in possible:
      raise UserError(
        f'study.jobs: {job!r} is unknown{checks.nearest(job, runner.names())}: '
        f'choose some of {", ".join(possible)}'
      )
  arms = make_arms(config)
  runs, readings = make_runs(config, place, arms), make_readings(config, arms)
  configs = {run.arm: run.config for run in runs[: len(arms)]}  # of the first seed
  for arm in configs:
    _check_arm(arm, arms, configs, num_devices, runner)
  for reading in readings:
    _check_method(reading, configs)
  first_measure = config.study.measures[0][0]
  places = {
    (reading.arm, reading.x): [] for reading in readings if reading.measure == first_measure
  }
  for claim in config.study.orderings:
    if not numbers.contests(claim, places):
      raise UserError(
        f'study.orderings: {claim!r} compares nothing that is at the same x: expected "arm > arm"'
      )
  numbers.reference_of(config.study.reference, places)
  return runs, readings


def _check_arm(arm, arms, configs, num_devices, runner):
  """Raises UserError where a job refuses the arm's settings, or no record is kept that it reads."""
  try:
    runner.check(configs[arm], num_devices)
  except UserError as e:
    raise UserError(f'study, arm {arm.name!r}{at(arm.x)}: {e}') from e
  recorded = ' '.join(text for key, text in arm.settings if key == 'pairs.record')
  for name in re.findall(r'\{([^{}]*)\}', recorded):
    if not configs[named_arm(name, arm, arms)].pretrain.record:
      raise UserError(
        f'study.arms: {arm.name!r} reads the record of {name!r}, which keeps none: '
        f'add pretrain.record=True to {name!r}'
      )


def _check_method(reading, configs):
  """Raises UserError where a reading is of a method of the probe that its arm does not run."""
  (job, _), *steps = steps_of(reading.path)
  method = next((where['method'] for _, where in steps if where and 'method' in where), None)
  methods = configs[reading.source].probe.methods
  if job == 'probe' and method is not None and method not in methods:
    raise UserError(
      f'study: {reading.path} ({reading.measure!r}) has method {method}, which '
      f'{reading.source.name!r} does not run: add it to probe.methods={tuple(methods)}'
    )


def run(this: Run) -> dict | None:
  """The job: the runs that are not complete, then study.csv, study.json and figure.png.

  Returns:
    What stands in results/study.json, in the first process; None when stopped.

  Raises:
    UserError: anything invalid, before the first run; after it, a measure that is not in its
      results.
  """
  config = this.config
  workdir = this.workdir
  runner = this.runner
  assert runner is not None  # the runner gives itself to the jobs
  place = user_path(config.study.runs or workdir).absolute()
  runs, readings = make_study(config, place, this.mesh.size, runner)
  base = base_config(config, place).copy_and_resolve_references()
  base.generator.path = config.generator.path
  runner.claim(workdir, base)
  programs.keep(place)
  if not base.generator.path and not _run_jobs(this, base, place / GENERATOR, ('generator',)):
    return None

  csv = workdir / 'results' / 'study.csv'
  before = numbers.runs_in(csv)
  lines = {}  # of each run that is complete
  progress = Progress('study', len(runs), 'runs')
  for i in _completed(this, runs):
    lines[i] = []
    if is_first():
      lines[i] = [
        _line(config.name, reading, runs[i], place)
        for reading in readings
        if reading.source == runs[i].arm
      ]
      table = _in_order(lines)
      if len(lines) == len(runs) or before <= {line['run'] for line in table}:
        numbers.write_lines(csv, table)  # never fewer than were there
      progress.update(len(lines), {})
  if len(lines) < len(runs):
    return None
  if not is_first():
    return {}
  results = _results(config, runs, _in_order(lines)) | devices.describe(this.mesh)
  print(numbers.table(results), flush=True)
  workdirs.restore(workdir, base)
  write_result(workdir / 'results' / 'study.json', results, {}, config.to_dict())
  figure.draw(results, workdir / 'figure.png')
  return results


def _completed(this, runs):
  """Brings the runs to their ends -> yields the number of each; not of all where it is stopped.

  What another command is at comes last, and what reads that. Where it still is, the study ends.
  """
  jobs, arms = tuple(this.config.study.jobs), [run.arm for run in runs]
  done, left = 0, list(range(len(runs)))
  for patience in (0.0, workdirs.PATIENCE):
    turns, left = left, []
    for i in turns:
      arm, seed = runs[i].arm, runs[i].seed
      needed = [(named_arm(name, arm, arms), seed) for name in needed_arms(arm)]
      if any((runs[j].arm, runs[j].seed) in needed for j in left):
        left.append(i)
        continue
      logging.info(
        'study: run %d of %d, %s%s, seed %d', i + 1, len(runs), arm.name, at(arm.x), seed
      )
      try:
        complete = _run_jobs(this, runs[i].config, runs[i].folder, jobs, patience)
      except workdirs.Busy as e:
        logging.info('study: %s', e)
        left.append(i)
        if patience:
          break
        continue
      if not complete:
        logging.info(
          'study: stopped after %d of %d runs; the same command resumes it', done, len(runs)
        )
        return
      done += 1
      yield i
  if left:
    logging.info(
      'study: %d of %d runs wait for other commands: when these have ended, the same command makes '
      'what is left, and the table of all',
      len(runs) - done,
      len(runs),
    )


def _in_order(lines):
  return [line for i in sorted(lines) for line in lines[i]]


def _run_jobs(this, config, folder, jobs, patience: float = workdirs.PATIENCE):
  """Runs jobs in a folder, those of its config or one -> whether they are complete.

  Raises workdir.Busy where another command is at one of them.
  """
  config = workdirs.as_there(folder, config, _unread(this.runner, config, folder, jobs))
  which = 'all' if jobs == tuple(config.jobs) else jobs[0]
  return this.runner.run(config, which, folder, this.download, patience)


def _unread(runner, config, folder, jobs):
  """Sections of the config that the jobs do not read, and another study's may have in a folder."""
  if jobs == ('generator',):
    sections = [name for name, part in config.items() if isinstance(part, ConfigDict)]
    return set(sections) - {'data', 'generator'}
  found = [runner.find(name) for name in runner.names() if name in config]
  judged = [job.name for job in found if job.judges and workdirs.is_bound(folder, job)]
  unread = set(judged) - {*jobs, *(runner.find(name).judges_with for name in jobs)}
  return set(from_first(sorted(unread)))  # others may judge at any moment


def _line(study, reading, arm_run, place):
  """A line of study.csv."""
  return dict(
    study=study,
    arm=reading.arm,
    x=reading.x,
    seed=arm_run.seed,
    measure=reading.measure,
    value=look_up(arm_run.folder, reading.path),
    run=str(arm_run.folder.relative_to(place)),
  )


def _results(config, runs, lines):
  """What stands in results/study.json, but for the devices."""
  c = config.study
  protocol = dict(
    seeds=list(c.seeds),
    jobs=list(c.jobs),
    arms={f'{r.arm.name}{at(r.arm.x)}': ' '.join(map('='.join, r.arm.settings)) for r in runs},
    measures={f'{name}{at((*x, "")[0])}': path for name, path, *x in c.measures},
    references={
      f'{name}, {measure}{at((*x, "")[0])}': f'{arm}: {path}'
      for name, arm, measure, path, *x in c.references
    },
    reference=c.reference or lines[0]['arm'],
    interval=f'95%, percentile bootstrap of the mean over seeds, {RESAMPLES:,} resamples, '
    'differences paired by seed; never wider than the range of the seeds: of three it is their '
    'range and covers less than 95%',
    orderings="hold where the 95% interval of the paired difference by Student's t is above 0",
  )
  return dict(
    job='study',
    study=config.name,
    axis=c.axis,
    grid=c.grid,
    **numbers.summarise(c, lines),
    protocol=protocol,
  )


JOB = Job('study', run, check, never, claims=False)
