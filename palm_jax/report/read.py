"""What workdirs hold: configs, results and metrics, read from their files."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from absl import logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from palm_jax.base import checks, metrics
from palm_jax.base.errors import UserError
from palm_jax.base.results import CONFIG, MADE_FROM, read_result
from palm_jax.base.steps import list_steps
from palm_jax.data.arrays import Data
from palm_jax.workdir import ADDED, FREE, FREE_KEYS

JUDGES = 'probe', 'ood', 'diversity', 'quality', 'concepts', 'scores'  # sections of such jobs
ORIGIN = MADE_FROM, CONFIG  # in results, for programs
STEPS = {'pretrain': 'env_steps', 'generator': 'images'}  # jobs with metrics, and their x


class RunFiles(NamedTuple):
  """What a workdir holds, as read."""

  name: str
  folder: pathlib.Path
  config: dict
  metrics: dict[str, list[dict]]  # job -> lines
  results: dict[str, dict]  # name of the file -> content
  notes: list[str]  # what could not be read


@dataclasses.dataclass(frozen=True)
class Report:
  """What sections are made of.

  Attributes:
    runs: those that a section shows.
    config: of the report.
    workdir: of the report.
    mesh: for the map.
    data: whose test images are mapped; None leaves the map out.
    notes: what is left out and why; sections append.
  """

  runs: list[RunFiles]
  config: ConfigDict
  workdir: pathlib.Path
  mesh: Mesh
  data: Data | None
  notes: list[str]


def read_runs(folders: Sequence[pathlib.Path | str]) -> list[RunFiles]:
  """Workdirs, named by as much of the ends of their paths as tells them apart.

  Raises:
    UserError: a config.json that is missing or damaged, or a workdir given twice.
  """
  folders = [pathlib.Path(folder).absolute() for folder in folders]
  if len(set(folders)) < len(folders):
    raise UserError(f'report.compare names a workdir twice: {", ".join(map(str, folders))}')
  length = next(
    n for n in range(1, 100) if len({folder.parts[-n:] for folder in folders}) == len(folders)
  )
  return [read_run('/'.join(folder.parts[-length:]), folder) for folder in folders]


def read_run(name: str, folder: pathlib.Path) -> RunFiles:
  """One workdir. What cannot be read of its results and metrics becomes a note.

  Raises:
    UserError: a config.json that is missing or damaged.
  """
  try:
    config = _parse_json(folder / 'config.json')
  except (OSError, ValueError, RecursionError) as e:
    reason = getattr(e, 'strerror', None) or e
    raise UserError(
      f'{folder / "config.json"} cannot be read ({reason}): name the workdir of a run'
    ) from e
  run = RunFiles(name, folder, config, {}, {}, [])
  for path in sorted((folder / 'results').glob('*.json')):
    content = _read(run, path, read_result)
    if content is not None:
      run.results[path.stem] = {key: value for key, value in content.items() if key not in ORIGIN}
      _note_origin(run, path.stem, content.get(MADE_FROM, {}))
      _note_config(run, path.stem, content.get(CONFIG))
  for job, x in STEPS.items():
    path = folder / job / 'metrics.jsonl'
    if path.exists():
      lines, damaged = _read(run, path, metrics.check_jsonl) or ([], [])
      _note_metrics(run, job, lines, damaged)
      run.metrics[job] = [line for line in lines if is_finite(line.get(x))]
    elif job in run.results and list_steps(folder / job / 'checkpoints'):
      _note(run, f'{job}/metrics.jsonl is missing')
  return run


def _note_origin(run, job, made_from):
  """Where a result is not of what is there now, or of a pretraining that is not complete."""
  for name in ('generator', 'pretrain'):
    of = made_from.get(name, {}).get('step')
    there = list_steps(run.folder / name / 'checkpoints')
    if of is None or not there:
      continue
    if of != there[-1] and not (name == 'generator' and run.config['generator'].get('path')):
      _note(run, f'{job} is of step {of} of {name}, whose newest is {there[-1]}: run it again')
    elif name == 'pretrain' and not (run.folder / 'results' / 'pretrain.json').exists():
      _note(run, f'{job} is of step {of} of a pretraining that is not complete')


def _note_config(run, job, then):
  """Where config.json is not what the job had, in sections that must not change."""
  if then is None:
    return
  before, now = checks.flatten(then), checks.flatten(run.config)
  free = ({*FREE, *JUDGES} - {job}) | {'study'}  # a study's config.json is that of its runs
  fixed = lambda key: key.partition('.')[0] not in free and key not in FREE_KEYS
  value = lambda config, key: config.get(key, ADDED.get(key))
  keys = sorted(before.keys() | now.keys())
  differ = [key for key in keys if fixed(key) and value(before, key) != value(now, key)]
  if differ:
    _note(run, f'config.json is not what {job} had: {", ".join(differ)}; one of them was changed')


def _note_metrics(run, job, lines, damaged):
  """What metrics lack."""
  if damaged:
    _note(run, f'{job}/metrics.jsonl: {metrics.left_out(damaged)}')
  reached = max(list_steps(run.folder / job / 'checkpoints'), default=0)
  last = lines[-1]['step'] if lines else 0  # each call writes its line before it is saved
  if last < reached:
    _note(run, f'{job}/metrics.jsonl ends at step {last}, the run at step {reached}')


def _note(run, text):
  run.notes.append(f'{run.name}: {text}')
  logging.warning('report: %s', run.notes[-1])


def _parse_json(path):
  content = json.loads(path.read_text())
  if not isinstance(content, dict):
    raise ValueError(f'expected a JSON object, found {type(content).__name__}')
  return content


def _read(run, path, parse):
  """The content of a file, or None with a note."""
  try:
    return parse(path)
  except (OSError, ValueError) as e:
    reason = ' '.join(str(e).split())
    _note(run, f'{path.relative_to(run.folder)} cannot be read and is left out ({reason})')
    return None


def is_number(x: Any) -> bool:
  """Whether a value of a file is a number; true and false are not."""
  return isinstance(x, (int, float)) and not isinstance(x, bool)


def is_finite(x: Any) -> bool:
  """Whether a value of a file is a number, and neither NaN nor infinite."""
  return is_number(x) and math.isfinite(x)
