"""The job `study`: several arms of one base config, each with the same seeds, and what their
results say together.

A run is an ordinary one, in <study.runs>/<arm>/seed<k>; the study orders the runs, skips what is
done, reads results/*.json of each, and compares. All share one compilation cache: runs that differ
in traced values only (environment.alpha, environment.beta, seed) load the program that the first of
them compiled. Two arms of `configs/benchmark.py` under vmap are 1.4 times faster at `tiny` and 1.8
times slower at `small` than one after another (two cores): so they go in order.
"""

import ast
import collections
import json
import pathlib
import re
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from palm_jax.base import devices
from palm_jax.base.errors import UserError
from palm_jax.base.metrics import Progress
from palm_jax.checkpoint import any_process, write_json_atomic
from palm_jax.study import figure as study_figures
from palm_jax.study.figure import RESAMPLES, at, same

GENERATOR = 'base'  # folder of the generator that all arms share, where the config names none
TAKEN = (GENERATOR, 'features', 'results', 'compilation_cache')  # folders that no arm can have
PATH = re.compile(
  r'/?([^/\[\]]+)(?:\[([^\[\]]*)\])?'
)  # of one step: a key, and the rows that are meant


def default_config():
  return ConfigDict(
    dict(
      # (name, settings[, x]): `x` is its place on an axis, so one name may have several. Settings
      # are those unlike the base's, as on the command line, 'environment.alpha=0 reward.k=3'
      # without --config.; '{name}' in a value is the folder of that arm's run, of the same seed and
      # x, which then comes first.
      arms=(),
      seeds=(0, 1, 2),  # paper: three
      jobs=('pretrain', 'probe'),
      # (name, path[, x]): 'probe/rows[features=PALM encoder, method=lbfgs]/accuracy/clean' of
      # results/probe.json; the mean where the rows are draws of one thing. The first measure is the
      # one of the orderings.
      measures=(),
      # folder of the runs; '': the workdir. Studies that have an arm in common can share it
      runs='',
      # (name, arm, measure, path[, x]): what another row of that arm's results shows as an arm of
      # its own
      references=(),
      reference='',  # arm, or 'arm @ x', that all others are compared with; '': the first
      orderings=(),  # 'arm > arm' or 'arm @ x > arm @ x': claims to be judged
      axis='',  # what x is, for the figure
      grid=False,  # the figure is a map, arms down and x across
    )
  )


class Arm(NamedTuple):
  name: str
  settings: tuple[tuple[str, str], ...]  # (dotted key, value as text)
  x: Any  # '' without an axis


class Run(NamedTuple):
  arm: Arm
  seed: int
  folder: pathlib.Path
  config: ConfigDict


class Reading(NamedTuple):
  """One number of each seed's run."""

  arm: str  # the name that it is shown under
  x: Any
  measure: str
  source: Arm  # whose run it is read from
  path: str


def make_arms(config):
  """[Arm] of config.study; UserError where there is none, one is there twice, or a setting is no
  key=value."""
  arms, folders = [], {}
  for entry in config.study.arms:
    name, text, x = _entry('arms', entry, ('name', 'settings'))
    settings = [part.partition('=') for part in re.split(r'\s+(?=[\w.]+=)', text.strip()) if part]
    bad = [key for key, equals, _ in settings if not equals]
    if bad:
      raise UserError(
        f'study.arms: {bad[0]!r} of {name!r} is no setting: expected key=value, such as '
        'environment.alpha=0'
      )
    arm = Arm(name, tuple((key, value) for key, _, value in settings), x)
    folder = _folder(arm)
    if folder in folders:
      raise UserError(
        f'study.arms: {name!r}{at(x)} has the folder of {folders[folder]!r}: give each arm its '
        'own name or x'
      )
    if folder.parts[0] in TAKEN or not folder.parts[0].strip('.'):
      raise UserError(
        f'study.arms: {name!r} cannot be a folder of its own: choose another name than '
        f'{", ".join(TAKEN)}'
      )
    folders[folder] = name
    arms.append(arm)
  if not arms:
    raise UserError("study.arms is empty: expected (name, 'key=value ...') for each arm")
  return arms


def in_order(arms):
  """The arms, each after those whose folders it names; UserError where they wait for each other."""
  ordered = []
  while len(ordered) < len(arms):
    ready = [
      arm
      for arm in arms
      if arm not in ordered and all(_named(name, arm, arms) in ordered for name in _needs(arm))
    ]
    if not ready:
      stuck = next(arm for arm in arms if arm not in ordered)
      raise UserError(
        f'study.arms: {stuck.name!r} waits for {_needs(stuck)[0]!r}, which waits for it: take one '
        f'{{}} away'
      )
    ordered += ready
  return ordered


def _entry(where, entry, names):
  """An entry of a tuple in config.study with its x, '' where it has none."""
  if (
    not isinstance(entry, (tuple, list))
    or len(entry) not in (len(names), len(names) + 1)
    or not all(isinstance(part, str) for part in entry[: len(names)])
  ):
    raise UserError(
      f'study.{where} has {entry!r}: expected ({", ".join(names)}) or ({", ".join(names)}, x), '
      'all but x in text'
    )
  return (*entry, '')[: len(names) + 1]


def _folder(arm):
  plain = lambda text: re.sub(r'[^\w.=+-]+', '_', str(text))
  return pathlib.Path(plain(arm.name), *([plain(arm.x)] if arm.x != '' else []))


def _needs(arm):
  return [name for _, value in arm.settings for name in re.findall(r'\{([^{}]*)\}', value)]


def _named(name, arm, arms):
  """The arm that {name} means in a setting of another one: that of the same x, or without any."""
  for other in arms:
    if other.name == name and other.x in (arm.x, '') and other != arm:
      return other
  from palm_jax import main

  raise UserError(
    f'study.arms: {{{name}}} in {arm.name!r} names no other arm{at(arm.x)}'
    f'{main.nearest(name, [other.name for other in arms])}: expected one of study.arms'
  )


def make_runs(config, place, arms):
  """[Run]: all arms with the first seed, then with the next, so that one that was stopped early has
  whole comparisons.

  Raises:
    UserError: seeds that cannot be, or settings that the base config does not have or that are of
      another type.
  """
  seeds = tuple(config.study.seeds)
  if (
    not seeds
    or len(set(seeds)) < len(seeds)
    or not all(isinstance(seed, int) and 0 <= seed < 2**31 for seed in seeds)
  ):
    raise UserError(
      f'study.seeds={seeds}: expected one or more different whole numbers of at least 0'
    )
  return [
    Run(
      arm, seed, place / _folder(arm) / f'seed{seed}', _run_config(config, place, arm, arms, seed)
    )
    for seed in seeds
    for arm in in_order(arms)
  ]


def base_config(config, place):
  """What the arms start from: the config without its study, with the study's jobs, and a generator
  that all share."""
  base = config.copy_and_resolve_references()
  with base.unlocked():
    del base['study']
  base.jobs = tuple(config.study.jobs)
  base.generator.path = base.generator.path or str(place / GENERATOR)
  base.features.folder = base.features.folder or str(
    place / 'features'
  )  # arms of a seed share the untrained encoder
  return base


def _run_config(config, place, arm, arms, seed):
  from palm_jax import main

  c = base_config(config, place)
  known = main.flatten(c.to_dict())
  for key, text in arm.settings:
    shared = key in ('seed', 'jobs') or key.startswith('generator.') and key != 'generator.path'
    if key not in known or shared:
      hint = ': it is of the whole study' if shared and key in known else main.nearest(key, known)
      raise UserError(f'study.arms: {key}={text} of {arm.name!r} is no setting of an arm{hint}')
    fill = lambda match: str(place / _folder(_named(match[1], arm, arms)) / f'seed{seed}')
    text = re.sub(r'\{([^{}]*)\}', fill, text)
    try:
      value = text if isinstance(known[key], str) else ast.literal_eval(text)
      c.update_from_flattened_dict({key: tuple(value) if isinstance(known[key], tuple) else value})
    except (TypeError, ValueError, SyntaxError) as e:
      raise UserError(
        f'study.arms: {key}={text} of {arm.name!r} cannot be: expected a value like {known[key]!r}'
      ) from e
  c.seed = seed
  return c


def make_readings(config, arms):
  """[Reading] of every measure of every arm, and of the references.

  Raises:
    UserError: a measure or reference that cannot be read from these arms and jobs, or that is there
      twice.
  """
  c, readings = config.study, []
  for arm in arms:
    for entry in c.measures:
      name, path, x = _entry('measures', entry, ('name', 'path'))
      if '' not in (x, arm.x):
        raise UserError(
          f'study.measures: {name!r}{at(x)} is on an axis already, and so is '
          f'{arm.name!r}{at(arm.x)}: '
          'take one x away'
        )
      readings.append(Reading(arm.name, x if arm.x == '' else arm.x, name, arm, path))
  if not readings:
    raise UserError(
      "study.measures is empty: expected (name, 'job/path/to/a/number') for each measure"
    )
  measures = [entry[0] for entry in c.measures]
  for entry in c.references:
    name, source, measure, path, x = _entry('references', entry, ('name', 'arm', 'measure', 'path'))
    for what, value, there in (
      ('arm', source, [arm.name for arm in arms]),
      ('measure', measure, measures),
    ):
      if value not in there:
        raise UserError(
          f'study.references: {what} {value!r} of {name!r} is unknown: expected one of '
          f'{", ".join(dict.fromkeys(there))}'
        )
    readings += [
      Reading(name, arm.x if x == '' else x, measure, arm, path)
      for arm in arms
      if arm.name == source
    ]
  counts = collections.Counter((reading.measure, reading.arm, reading.x) for reading in readings)
  (measure, name, x), count = counts.most_common(1)[0]
  if count > 1:
    raise UserError(
      f'study: {measure!r} of {name!r}{at(x)} is there {count} times: give each its own name or x'
    )
  for reading in readings:
    job = steps_of(reading.path)[0][0]
    if job not in c.jobs:
      raise UserError(
        f'study: {reading.path} ({reading.measure!r}) is of the job {job}, which no arm runs: '
        f'add it to study.jobs={tuple(c.jobs)}'
      )
  return readings


def steps_of(path):
  """[(key, {field: text} or None)] of a path like 'probe/rows[method=lbfgs]/accuracy/clean';
  UserError where it is none."""
  matches = list(PATH.finditer(path))
  if ''.join(match[0] for match in matches) != path or len(matches) < 2:
    raise UserError(
      f'study: {path!r} is no path to a number: expected job/key/..., with rows chosen by '
      '[field=value, ...]'
    )
  steps = []
  for match in matches:
    fields = [part.partition('=') for part in match[2].split(',')] if match[2] is not None else None
    if fields and not all(equals for _, equals, _ in fields):
      raise UserError(
        f'study: [{match[2]}] in {path!r} chooses no row: expected [field=value, ...]'
      )
    steps.append((match[1], fields and {name.strip(): value.strip() for name, _, value in fields}))
  return steps


def check_config(config, place, num_devices):
  """Everything of a study that can be judged before any work -> ([Run], [Reading]).

  Raises:
    UserError: what a part of the study cannot be; settings that an arm's jobs refuse.
  """
  from palm_jax import main

  for job in config.study.jobs:
    if job not in ('pretrain', *main.EVALUATIONS):
      raise UserError(
        f'study.jobs: {job!r} is unknown{main.nearest(job, main.JOBS)}: '
        f'choose some of pretrain, {", ".join(main.EVALUATIONS)}'
      )
  arms = make_arms(config)
  runs, readings = make_runs(config, place, arms), make_readings(config, arms)
  first = {run.arm: run.config for run in runs[: len(arms)]}
  for arm, c in first.items():
    try:
      main.check(c, config.study.jobs, num_devices)
    except UserError as e:
      raise UserError(f'study, arm {arm.name!r}{at(arm.x)}: {e}') from e
    recorded = ' '.join(text for key, text in arm.settings if key == 'pairs.record')
    for name in re.findall(r'\{([^{}]*)\}', recorded):
      if not first[_named(name, arm, arms)].pretrain.record:
        raise UserError(
          f'study.arms: {arm.name!r} reads the record of {name!r}, which keeps none: '
          f'add pretrain.record=True to {name!r}'
        )
  for reading in readings:
    job, *steps = steps_of(reading.path)
    method = next((where['method'] for _, where in steps if where and 'method' in where), None)
    methods = first[reading.source].probe.methods
    if job[0] == 'probe' and method is not None and method not in methods:
      raise UserError(
        f'study: {reading.path} ({reading.measure!r}) has method {method}, which '
        f'{reading.source.name!r} does not '
        f'run: add it to probe.methods={tuple(methods)}'
      )
  places = {
    (reading.arm, reading.x): []
    for reading in readings
    if reading.measure == config.study.measures[0][0]
  }
  for claim in config.study.orderings:
    if not study_figures.contests(claim, places):
      raise UserError(
        f'study.orderings: {claim!r} compares nothing that is at the same x: expected "arm > arm"'
      )
  study_figures.reference_of(config.study.reference, places)
  return runs, readings


def look_up(folder, path):
  """The number at a path of a run's results, in float64; the mean of several rows that differ in
  their `draw`.

  Args:
    folder: pathlib.Path of the run.
    path: see `steps_of`.

  Raises:
    UserError: no such file, row or number, or several that are not draws.
  """
  (job, _), *steps = steps_of(path)
  file = folder / 'results' / f'{job}.json'
  try:
    values = [json.loads(file.read_text())]
  except (OSError, ValueError) as e:
    raise UserError(f'{file} cannot be read ({e}): remove it to make it again') from e
  for key, where in steps:
    there = [value.get(key) if isinstance(value, dict) else None for value in values]
    if where is None:
      values = there
      continue
    rows = [row for rows in there if isinstance(rows, list) for row in rows]
    values = [
      row
      for row in rows
      if isinstance(row, dict) and all(same(row.get(name), text) for name, text in where.items())
    ]
    if len({row.get('draw') for row in values}) < max(1, len(values)):
      known = '; '.join(
        ', '.join(f'{name}={row.get(name)}' for name in where)
        for row in rows
        if isinstance(row, dict)
      )
      raise UserError(
        f'{path} is {len(values)} rows of {file}: expected one, or draws of one; there are '
        f'{known or "none"}'
      )
  if not all(isinstance(value, (int, float)) for value in values):
    raise UserError(
      f'{path} is no number in {file}: the path of the measure names something else or nothing'
    )
  return float(np.mean(values, dtype=np.float64))


def run(config, workdir=None, download=False):
  """The job: the runs that are not complete, then results/study.csv, results/study.json and
  figure.png of the workdir.

  Args:
    config: the whole config, with its section `study`.
    workdir: path; default runs/<config.name>.
    download: as of main.run.

  Returns:
    True when complete, False when it was asked to stop before; then all that was done is saved.

  Raises:
    UserError: no study in the config, or anything that cannot be, before the first run; after it, a
      measure that is not in its results.
  """
  from palm_jax import main  # which imports this module to run the job

  if 'study' not in config:
    raise UserError(
      f'the config {config.name!r} has no section study: give one of configs/studies/'
    )
  workdir, mesh = (
    pathlib.Path(workdir or f'runs/{config.name}').expanduser().absolute(),
    devices.make_mesh(),
  )
  place = pathlib.Path(config.study.runs or workdir).expanduser().absolute()
  runs, readings = check_config(config, place, mesh.size)
  base = base_config(config, place)
  base.generator.path = config.generator.path
  main.claim_workdir(workdir, base)
  if not jax.config.jax_compilation_cache_dir:
    jax.config.update('jax_compilation_cache_dir', str(place / 'compilation_cache'))
  done = lambda folder, jobs: all(
    any_process((folder / 'results' / f'{job}.json').exists()) for job in jobs
  )
  if not base.generator.path:
    main.run(base, 'generator', place / GENERATOR, download)
    if not done(place / GENERATOR, ('generator',)):
      return False

  lines, progress, first_process = (
    [],
    Progress('study', len(runs), 'runs'),
    jax.process_index() == 0,
  )
  for i, r in enumerate(runs):
    logging.info(
      'study: run %d of %d, %s%s, seed %d', i + 1, len(runs), r.arm.name, at(r.arm.x), r.seed
    )
    main.run(r.config, 'all', r.folder, download)
    if not done(r.folder, config.study.jobs):
      logging.info('study: stopped after %d of %d runs; the same command goes on', i, len(runs))
      return False
    if first_process:
      lines += [
        dict(
          study=config.name,
          arm=reading.arm,
          x=reading.x,
          seed=r.seed,
          measure=reading.measure,
          value=look_up(r.folder, reading.path),
          run=str(r.folder.relative_to(place)),
        )
        for reading in readings
        if reading.source == r.arm
      ]
      study_figures.write_lines(workdir / 'results' / 'study.csv', lines)
      progress.update(i + 1, {})
  if not first_process:
    return True

  c = config.study
  results = dict(
    job='study',
    study=config.name,
    axis=c.axis,
    grid=c.grid,
    **study_figures.summarise(c, lines),
    protocol=dict(
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
      'differences paired by seed; never '
      'wider than the range of the seeds: of three it is their range and covers less than 95%',
      orderings="hold where the 95% interval of the paired difference by Student's t is above 0",
    ),
    **devices.describe(mesh),
  )
  print(study_figures.table(results), flush=True)
  write_json_atomic(workdir / 'results' / 'study.json', results)
  study_figures.draw(results, workdir / 'figure.png')
  return True
