"""A workdir: whose it is, which of its jobs are complete, and who works on one now."""

import contextlib
import json
import pathlib
from collections.abc import Callable, Iterator

import jax
from ml_collections import ConfigDict

from palm_jax.base import checks
from palm_jax.base.errors import UserError
from palm_jax.base.files import locked, write_json
from palm_jax.base.processes import any_process, is_first
from palm_jax.job import Job

PATIENCE = 120  # seconds: so long a file server may hold what a lost machine had
FREE = 'name', 'jobs', 'plan', 'features', 'report'  # sections that may change at any time
ABSENT = '(absent)'


def locate(config: ConfigDict, workdir: str | pathlib.Path | None) -> pathlib.Path:
  """The absolute path of a workdir; None is runs/<config.name>."""
  return pathlib.Path(workdir or f'runs/{config.name}').expanduser().absolute()


def result_path(workdir: pathlib.Path, job: Job) -> pathlib.Path:
  """The file of a job's result."""
  return workdir / (job.result or f'results/{job.name}.json')


def is_complete(workdir: pathlib.Path, job: Job) -> bool:
  """Whether a job's result is there."""
  return job.claims and any_process(result_path(workdir, job).exists())


def claim(
  workdir: pathlib.Path,
  config: ConfigDict,
  names: tuple[str, ...],
  find: Callable[[str], Job],
) -> None:
  """Writes config.json, or compares: all that the workdir's content depends on must be the same.

  That is nothing where no job has written yet. `name`, `jobs` and the sections of jobs that judge
  and have no result may change later.

  Args:
    workdir: absolute path.
    config: the whole config.
    names: of all jobs, whose folders would lie in the workdir.
    find: the job of a name.

  Raises:
    UserError: the workdir cannot be made, or belongs to another config; the message names the
      keys that differ.
  """
  path, now = workdir / 'config.json', json.loads(config.to_json_best_effort())
  written = any((workdir / name).exists() for name in (*names, 'results'))
  if any_process(path.exists() and written):
    try:
      saved = json.loads(path.read_text())
    except (OSError, ValueError) as e:
      raise UserError(f'{path} is damaged ({e}): restore it or choose another --workdir') from e
    if saved == now:
      return
    judges = [find(name) for name in names if find(name).judges]
    _refuse_differences(workdir, checks.flatten(saved), checks.flatten(now), judges)
  try:
    if is_first():
      workdir.mkdir(parents=True, exist_ok=True)
      write_json(path, now)
  except OSError as e:
    raise UserError(
      f'{workdir} cannot be written ({e.strerror}): fix that or choose another --workdir'
    ) from e


def _refuse_differences(workdir, saved, wanted, judges):
  """Raises UserError where a setting differs that something in the workdir was made with."""
  free = [*FREE, *(job.name for job in judges if not result_path(workdir, job).exists())]
  differ = {}
  for key in sorted(saved.keys() | wanted.keys()):
    there, now = saved.get(key, ABSENT), wanted.get(key, ABSENT)
    if there != now and _section(key) not in free:
      differ[key] = f'{key}: {there} there, {now} now'
  if not differ:
    return
  sections = sorted({_section(key) for key in differ})
  advice = 'choose another --workdir'
  same_generator = not {'seed', 'data', 'generator'} & set(sections)
  if same_generator and any_process((workdir / 'generator').exists()):
    advice += f' (--config.generator.path={workdir} plays in the generator of this one)'
  advice += ', or go back to its config'
  if set(sections) <= {job.name for job in judges}:
    advice += ', or delete ' + ' and '.join(f'results/{name}.json' for name in sections)
  raise UserError(
    f'{workdir} was made with another config ({"; ".join(differ.values())}): {advice}'
  )


def _section(key):
  return key.partition('.')[0]


def keep_compiled(workdir: pathlib.Path) -> None:
  """Keeps compiled programs in the workdir, unless JAX_COMPILATION_CACHE_DIR names a place."""
  if not jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update('jax_compilation_cache_dir', str(workdir / 'compilation_cache'))


@contextlib.contextmanager
def only_one(workdir: pathlib.Path, job: str) -> Iterator[None]:
  """Holds a job of the workdir while the block lasts.

  Raises:
    UserError: another command has it; each would overwrite the other's files.
  """
  path = workdir / f'.{job}.lock'
  with locked(path, PATIENCE) if is_first() else contextlib.nullcontext(True) as mine:
    if any_process(not mine):
      raise UserError(
        f'the job {job} of {workdir} is being run by another command: wait for its end or stop '
        f'it, or choose another --workdir (where it ended with its machine, remove {path})'
      )
    yield
