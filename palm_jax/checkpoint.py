"""What people read of a run's checkpoints: the pretrained encoder, or any saved item."""

import json
import pathlib
from typing import Any

from palm_jax.base.checkpoints import Checkpoints, load_item
from palm_jax.base.errors import UserError
from palm_jax.base.files import user_path
from palm_jax.base.steps import Restored, list_steps, one_line

__all__ = ['Checkpoints', 'Restored', 'list_steps', 'load_config', 'load_encoder', 'load_item']


def load_config(workdir: str | pathlib.Path) -> dict[str, Any]:
  """The config of a workdir. Raises UserError where there is none, or a damaged one."""
  path = user_path(workdir) / 'config.json'
  try:
    return json.loads(path.read_text())
  except (FileNotFoundError, NotADirectoryError):
    raise UserError(f'{path} is missing: give the --workdir of a pretraining run') from None
  except (OSError, ValueError, RecursionError) as e:
    raise UserError(
      f'{path} cannot be read ({one_line(e)}): give the --workdir of a pretraining run'
    ) from e


def load_encoder(
  workdir: str | pathlib.Path, step: int | None = None
) -> tuple[dict[str, Any], dict[str, Any], int]:
  """The pretrained encoder of a workdir, on any number of devices; the replay stays on the disk.

  Returns:
    (config dict of `<workdir>/config.json`, {'params', 'batch_stats'} as numpy arrays, step).

  Raises:
    UserError: no or damaged config or checkpoint.
  """
  workdir = user_path(workdir)
  config = load_config(workdir)
  step, variables = load_item(workdir / 'pretrain' / 'checkpoints', 'encoder', step)
  return config, variables, step
