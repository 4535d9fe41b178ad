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

from palm_jax.base import metrics
from palm_jax.base.errors import UserError
from palm_jax.data.arrays import Data

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
  except (OSError, ValueError) as e:
    raise UserError(
      f'{folder / "config.json"} cannot be read ({e}): name the workdir of a run'
    ) from e
  run = RunFiles(name, folder, config, {}, {}, [])
  for path in sorted((folder / 'results').glob('*.json')):
    content = _read(run, path, _parse_json)
    if content is not None:
      run.results[path.stem] = content
  for job, x in STEPS.items():
    path = folder / job / 'metrics.jsonl'
    if path.exists():
      lines = _read(run, path, metrics.read_jsonl) or []
      run.metrics[job] = [
        line for line in lines if isinstance(line, dict) and is_finite(line.get(x))
      ]
  return run


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
    run.notes.append(
      f'{run.name}: {path.relative_to(run.folder)} cannot be read and is left out '
      f'({" ".join(str(e).split())})'
    )
    logging.warning('report: %s', run.notes[-1])
    return None


def is_number(x: Any) -> bool:
  """Whether a value of a file is a number; true and false are not."""
  return isinstance(x, (int, float)) and not isinstance(x, bool)


def is_finite(x: Any) -> bool:
  """Whether a value of a file is a number, and neither NaN nor infinite."""
  return is_number(x) and math.isfinite(x)
