"""A workdir: whose it is, which of its jobs are complete, and who works on one now."""

import contextlib
import json
import os
import pathlib
import re
import shutil
from collections.abc import Collection, Iterator, Sequence

import jax
from absl import logging
from ml_collections import ConfigDict

from palm_jax.base import checks, programs
from palm_jax.base.errors import UserError, one_line
from palm_jax.base.files import abandoned, held, locked, seen, user_path, write_json
from palm_jax.base.processes import (
  any_process,
  from_first,
  is_first,
  locked_by_first,
  together,
)
from palm_jax.job import Job

PATIENCE = 120  # seconds: so long a file server may hold what a lost machine had
# Sections that may change at any time.
FREE = 'name', 'jobs', 'plan', 'benchmark', 'features', 'report'
# But for these, once one of their jobs has a result.
BOUND = {'features.path': ('probe', 'ood')}
# Settings that change nothing of what is learned.
FREE_KEYS = (
  'collect.checkpoint_minutes',
  'finetune.checkpoint_minutes',
  'generator.checkpoint_minutes',
  'generator.snapshot_kimg',
  'generator.truncation_psi',
  'meta.checkpoint_minutes',
  'offline.checkpoint_minutes',
  'pretrain.checkpoint_minutes',
  'pretrain.monitor_fraction',
)
ABSENT = '(absent)'
# Settings that came later: what was made without them was made as with these values.
ADDED = {
  'data.size': 0,
  'generator.data_on': 'auto',
  'generator.d_alone_kimg': 0.0,
  'encoder.stem': 'cifar',
  'encoder.patch': 4,
  'encoder.pool': 'token',
  'simsiam.tau': 0.996,
  'simsiam.vicreg_weights': [25.0, 25.0, 1.0],
  'simsiam.barlow_lambda': 0.0051,
}
CONFIG = 'config.json'
RESTORE = 'restore it or choose another --workdir (each of results/*.json has it as "config")'
CLAIM = '.claim.lock'  # of whoever reads or writes config.json


def locate(config: ConfigDict, workdir: str | pathlib.Path | None) -> pathlib.Path:
  """The absolute path of a workdir; None is runs/<config.name>. UserError for an empty one."""
  if workdir == '':
    raise UserError('--workdir= is empty (an unset variable?): name a folder, or leave it out')
  if not workdir and not config.name.strip('/.'):
    raise UserError(f'name={config.name!r} is no name of a folder: set --config.name, or --workdir')
  return user_path(workdir or f'runs/{config.name}').absolute()


def result_path(workdir: pathlib.Path, job: Job) -> pathlib.Path:
  """The file of a job's result."""
  return workdir / (job.result or f'results/{job.name}.json')


def is_complete(workdir: pathlib.Path, job: Job) -> bool:
  """Whether a job's result is there."""
  return job.claims and any_process(result_path(workdir, job).exists())


def is_bound(workdir: pathlib.Path, job: Job) -> bool:
  """Whether a job has a result, or is at work on it, by settings that may no longer change."""
  return result_path(workdir, job).exists() or held(_lock_path(workdir, job.name))


def is_claimed(workdir: pathlib.Path) -> bool:
  """Whether the workdir is a config's."""
  return (workdir / CONFIG).exists()


def claim(
  workdir: pathlib.Path,
  config: ConfigDict,
  jobs: Sequence[Job],
) -> None:
  """Writes config.json, or compares: all that the workdir's content depends on must be the same.

  That is nothing where no job has written yet, or is at work. `name`, `jobs` and the sections of
  jobs that judge and have no result may change later. What killed commands left is removed.

  Args:
    workdir: absolute path.
    config: the whole config.
    jobs: all there are: their folders would lie in the workdir, and the sections of those that
      judge may change until they have a result.

  Raises:
    UserError: the workdir cannot be made, or belongs to another config; the message names the
      keys that differ.
  """
  names = [job.name for job in jobs]
  now = json.loads(config.to_json_best_effort())
  refused = None
  try:
    if is_first():
      workdir.mkdir(parents=True, exist_ok=True)
      with _locked(workdir / CLAIM):
        working = [name for name in names if held(_lock_path(workdir, name))]
        begun = any((workdir / name).exists() for name in (*names, 'results'))
        begun = begun or bool(working and is_claimed(workdir))
        if not begun or not _fits(workdir, _saved(workdir), now, jobs):
          write_json(workdir / CONFIG, now)
        if not working:
          _tidy(workdir, names)
  except UserError as e:
    refused = e
  except FileExistsError as e:
    what = 'a link to nothing' if os.path.islink(e.filename) else 'a file'
    refused = UserError(f'{e.filename} is {what}, expected a folder: choose another --workdir')
  except OSError as e:
    refused = UserError(
      f'{e.filename or workdir} cannot be written ({e.strerror}): fix that or choose another '
      '--workdir'
    )
  together(refused, f'{workdir} cannot be had')
  compare(workdir, config, jobs)


def check_shared(workdir: pathlib.Path) -> None:
  """Raises UserError where a process does not see the config that the first one has written."""
  unseen = UserError(
    f'process {jax.process_index()} does not see {workdir / CONFIG}: choose a --workdir that all '
    'processes share'
  )
  together(None if seen(workdir / CONFIG) else unseen, f'{workdir} is not shared')


def as_there(workdir: pathlib.Path, config: ConfigDict, sections: Collection[str]) -> ConfigDict:
  """The config with some sections as the workdir's config.json has them, where it has them.

  For sections that the jobs at hand do not read: what others made with theirs there stays theirs.
  """
  saved = None
  try:
    if is_first():
      saved = checks.flatten(json.loads((workdir / CONFIG).read_text()))
  except (OSError, ValueError, AttributeError, RecursionError):
    pass  # nobody's yet, or damaged: `claim` says so
  saved = from_first(saved) or {}
  now = checks.flatten(config.to_dict())
  there = {
    key: tuple(saved[key]) if isinstance(value, tuple) else saved[key]
    for key, value in now.items()
    if _section(key) in sections and key in saved
  }
  config = config.copy_and_resolve_references()
  config.update_from_flattened_dict(there)
  return config


def restore(workdir: pathlib.Path, config: ConfigDict) -> None:
  """Writes config.json again where it was removed while a job of its config ran."""
  if not is_claimed(workdir):
    logging.warning('%s was removed while a job ran: it is written again', workdir / CONFIG)
    write_json(workdir / CONFIG, json.loads(config.to_json_best_effort()))


def release(workdir: pathlib.Path, jobs: Sequence[str]) -> None:
  """Takes back what `claim` wrote where a job was refused before any has written."""
  if not is_first() or not is_claimed(workdir):
    return
  with _locked(workdir / CLAIM):
    folders = [workdir / name for name in (*jobs, 'results')]
    written = any(path.is_file() for folder in folders for path in folder.rglob('*'))
    written = written or any(path.parent != workdir for path in workdir.rglob(CONFIG))  # a study's
    if written or any(held(_lock_path(workdir, name)) for name in jobs):
      return
    (workdir / CONFIG).unlink(missing_ok=True)
    compiled = workdir / programs.FOLDER
    programs.forget(compiled)
    for folder in (*folders, compiled):
      shutil.rmtree(folder, ignore_errors=True)
  with contextlib.suppress(OSError):  # there is something of the user's
    workdir.rmdir()


def compare(workdir: pathlib.Path, config: ConfigDict, jobs: Sequence[Job]) -> None:
  """Raises UserError where another command, or process, has the workdir with another config."""
  saved = refused = None
  if is_first():  # to the others a file server may not show yet what this one has written
    try:
      # Not between another command's look at who works here and its claim.
      with _locked(workdir / CLAIM):
        saved = _saved(workdir)
    except UserError as e:
      refused = e
  together(refused, f'{workdir} cannot be had')
  saved = from_first(saved)
  try:
    _fits(workdir, saved, json.loads(config.to_json_best_effort()), jobs)
  except UserError as e:
    refused = e
  together(refused, f'{workdir} cannot be had')


def _saved(workdir):
  """What config.json says. Raises UserError where it cannot be read."""
  path = workdir / CONFIG
  try:
    saved = json.loads(path.read_text())
    if not isinstance(saved, dict):
      raise ValueError('it holds no object')
  except FileNotFoundError:
    raise UserError(f'{path} is missing, but jobs have written there: {RESTORE}') from None
  except (OSError, ValueError, RecursionError) as e:
    raise UserError(f'{path} is damaged ({one_line(e)}): {RESTORE}') from e
  return saved


def _fits(workdir, saved, now, jobs):
  """Whether config.json, which is `saved`, says the same. Raises UserError where it may not differ
  so."""
  if saved != now:
    free = () if _reads_data(workdir, now, jobs) else ('data',)
    _refuse_differences(workdir, checks.flatten(saved), checks.flatten(now), jobs, free)
  return saved == now


def _reads_data(workdir, now, jobs):
  """Whether anything there was, or is being, made from the data of the config."""
  config = ConfigDict(now)
  return any(
    (is_bound(workdir, job) or (workdir / job.name).exists()) and job.needs_data(config)
    for job in jobs
  )


def _tidy(workdir, names):
  """Removes what killed commands left; no other command works here."""
  for path in (_lock_path(workdir, name) for name in names):
    if path.exists():
      with locked(path):  # removes it; but not where another command has begun meanwhile
        pass
  programs.remove_damaged(workdir / programs.FOLDER)
  for folder, folders, files in os.walk(workdir):
    for name in [name for name in folders if re.fullmatch(r'\d+\.damaged', name)]:
      shutil.rmtree(pathlib.Path(folder, name), ignore_errors=True)
    # Not into steps of checkpoints, which have hundreds of files.
    folders[:] = [name for name in folders if name != programs.FOLDER and not name[0].isdigit()]
    for name in files:
      part = pathlib.Path(folder, name)
      if name.startswith('.') and name.endswith('.part') and abandoned(part):
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(path):
  """Holds the lock; where nobody can write, and in a folder that is gone, there is no need."""
  if not os.access(path.parent, os.W_OK):
    yield
    return
  with locked(path, PATIENCE) as mine:
    if not mine:
      raise UserError(
        f'{path} is held by another command: stop it (where it ended with its machine, remove '
        f'{path})'
      )
    yield


def _refuse_differences(workdir, saved, wanted, jobs, free):
  """Raises UserError where a setting differs that something in the workdir was made with.

  `free` are sections from which nothing there was made.
  """
  judges = {job.name: is_bound(workdir, job) for job in jobs if job.judges}
  free = {*FREE, *free, *(name for name, judged in judges.items() if not judged)}
  differ, owners = {}, set()
  for key in sorted(saved.keys() | wanted.keys()):
    there, now = (config.get(key, ADDED.get(key, ABSENT)) for config in (saved, wanted))
    section = _section(key)
    readers = section, *(job.name for job in jobs if job.judges_with == section)
    of = {name for name in BOUND.get(key, readers) if judges.get(name)} or {section}
    if there != now and not of <= free and key not in FREE_KEYS:
      differ[key] = f'{key}: {there} there, {now} now'
      owners |= of
  if not differ:
    return
  sections = sorted({_section(key) for key in differ})
  advice = 'choose another --workdir'
  same_generator = not {'seed', 'data', 'generator'} & set(sections)
  if same_generator and (workdir / 'generator').exists():
    advice += f' (--config.generator.path={workdir} plays in the generator of this one)'
  advice += ', or go back to its config'
  if owners <= judges.keys():
    done = {job.name for job in jobs if result_path(workdir, job).exists()}
    if results := [f'results/{name}.json' for name in sorted(owners & done)]:
      advice += f', or delete {" and ".join(results)}'
    if owners - done:
      advice += f', or wait for the end of {" and ".join(sorted(owners - done))}'
  raise UserError(
    f'{workdir} was made with another config ({"; ".join(differ.values())}): {advice}'
  )


def _lock_path(workdir, job):
  return workdir / f'.{job}.lock'


def _section(key):
  return key.partition('.')[0]


class Busy(UserError):
  """Another command does the same."""


@contextlib.contextmanager
def only_one(workdir: pathlib.Path, job: str, patience: float = PATIENCE) -> Iterator[None]:
  """Holds a job of the workdir while the block lasts.

  Raises:
    Busy: another command has it, also after `patience` seconds; each would overwrite the other's
      files.
  """
  path = _lock_path(workdir, job)
  with locked_by_first(path, patience) as mine:
    if not mine:
      raise Busy(
        f'the job {job} of {workdir} is being run by another command: wait for its end or stop '
        f'it, or choose another --workdir (where it ended with its machine, remove {path})'
      )
    yield
