"""Reading what fine-tunings left: results/finetune.json of workdirs."""

import glob
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from palm_jax.atari.environment import rom_id
from palm_jax.base.errors import UserError
from palm_jax.base.results import read_result
from palm_jax.job import Run

RESULT = pathlib.Path('results', 'finetune.json')


class FineTuned(NamedTuple):
  """What is read of a fine-tuning's result."""

  variant: str  # 'pretrained' or 'scratch'
  game: str
  seed: int
  score: float  # raw, mean of the evaluation's games
  episodes: int  # of the evaluation
  agent_steps: int
  frames: int
  agent: dict  # settings of the learner, {} where the file does not say
  trunk_step: int  # of the pretraining's checkpoint; -1 from scratch
  folder: str


def find(patterns: Sequence[str], workdir: pathlib.Path) -> list[pathlib.Path]:
  """Folders that hold results/finetune.json, sorted, each once.

  Args:
    patterns: of glob; () is the workdir and the folders in it.
    workdir: of the job that asks.

  Raises:
    UserError: a pattern that names none, or none at all.
  """
  here = glob.escape(str(workdir))
  found = set()
  for pattern in patterns or (here, os.path.join(here, '*')):
    matches = {
      path.resolve()
      for path in map(pathlib.Path, glob.glob(os.path.expanduser(pattern), recursive=True))
      if (path / RESULT).is_file()
    }
    if patterns and not matches:
      raise UserError(
        f'scores.runs: {pattern!r} names no folder with {RESULT} (working folder: '
        f'{pathlib.Path.cwd()}): name workdirs whose job finetune is complete'
      )
    found |= matches
  if not found:
    raise UserError(
      f'neither {workdir} nor a folder in it has {RESULT}: run the job finetune, or name its '
      'workdirs in scores.runs'
    )
  return sorted(found)


def read_files(this: Run) -> list[pathlib.Path]:
  """The results that the job `scores` would read now."""
  try:
    return [folder / RESULT for folder in find(this.config.scores.runs, this.workdir)]
  except UserError:  # there are none yet
    return []


def read_runs(folders: Iterable[str | os.PathLike]) -> list[FineTuned]:
  """The results of fine-tunings in these workdirs.

  Raises:
    UserError: an unreadable or incomplete file, or two of the same variant, game and seed.
  """
  runs: dict[tuple[str, str, int], FineTuned] = {}
  for folder in folders:
    path = pathlib.Path(folder) / RESULT
    try:
      run = _fine_tuned(read_result(path), str(folder))
      if not np.isfinite(run.score) or not run.episodes:
        raise ValueError(f'score={run.score} of {run.episodes} episodes')
    except KeyError as e:
      raise UserError(f'{path} lacks {e}: expected a result of the job finetune') from e
    except (OSError, ValueError, TypeError, AttributeError) as e:
      raise UserError(
        f'{path} cannot be read ({e}): run the job finetune there again, or leave it out'
      ) from e
    rom_id(run.game)
    key = run.variant, run.game, run.seed
    if key in runs:
      raise UserError(
        f'{runs[key].folder} and {folder} are both {run.variant}, {run.game}, seed {run.seed}: a '
        'run counts once, name one of them in scores.runs'
      )
    runs[key] = run
  return list(runs.values())


def _fine_tuned(content: Any, folder: str) -> FineTuned:
  """Raises KeyError, ValueError, TypeError or AttributeError for what is missing or invalid."""
  protocol = content.get('protocol', {})
  episodes = content['episodes']  # their scores, or how many they were
  trunk = protocol.get('trunk')
  return FineTuned(
    variant=str(content['variant']),
    game=content['game'],
    seed=int(content['seed']),
    score=float(content['score']),
    episodes=len(episodes) if isinstance(episodes, list) else int(episodes),
    agent_steps=int(content['agent_steps']),
    frames=int(content['frames']),
    agent=dict(protocol.get('agent', {})),
    trunk_step=int(trunk['checkpoint_step']) if isinstance(trunk, dict) else -1,
    folder=folder,
  )
