"""Results of jobs as JSON files that show when a bit of them has changed."""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from palm_jax.base.digests import json_digest
from palm_jax.base.files import as_json, write_json

DIGEST = 'sha256'  # of all else in the file
MADE_FROM = 'made_from'
CONFIG = 'config'


def write_result(
  path: str | os.PathLike,
  result: Mapping[str, Any],
  made_from: Mapping[str, Any],
  config: Mapping[str, Any],
) -> None:
  """Writes a result, what it was made from, and its config: whole, or nothing is changed."""
  content = as_json({**result, MADE_FROM: made_from, CONFIG: config})
  write_json(path, {**content, DIGEST: json_digest(content)})


def read_result(path: str | os.PathLike) -> dict[str, Any]:
  """The content of a result, checked. Older ones have no digest.

  Raises:
    OSError: it cannot be read.
    ValueError: it is damaged; says how.
  """
  try:
    content = json.loads(pathlib.Path(path).read_text())
  except RecursionError:
    raise ValueError('it is nested too deeply') from None
  if not isinstance(content, dict):
    raise ValueError(f'expected a JSON object, found {type(content).__name__}')
  if DIGEST in content or MADE_FROM in content or CONFIG in content:
    digest = content.pop(DIGEST, None)
    if digest != json_digest(content):
      raise ValueError('it holds other values than were written')
  return content
