"""What a study reads of its runs: one number of each, at a path of a results file."""

import collections
import pathlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from palm_jax.base.errors import UserError
from palm_jax.base.results import read_result
from palm_jax.study.arms import Arm, entry_of
from palm_jax.study.numbers import at, same

# Of one step of a path: a key, and the rows that are meant.
PATH = re.compile(r'/?([^/\[\]]+)(?:\[([^\[\]]*)\])?')


class Reading(NamedTuple):
  """One number of each seed's run."""

  arm: str  # the name that it is shown under
  x: Any
  measure: str
  source: Arm  # whose run it is read from
  path: str


def make_readings(config: ConfigDict, arms: Sequence[Arm]) -> list[Reading]:
  """What is read: every measure of every arm, and the references.

  Raises:
    UserError: a measure or reference that these arms and jobs do not have, or one given twice.
  """
  c = config.study
  readings = []
  for arm in arms:
    for entry in c.measures:
      name, path, x = entry_of('measures', entry, ('name', 'path'))
      if '' not in (x, arm.x):
        raise UserError(
          f'study.measures: {name!r}{at(x)} is on an axis already, and so is '
          f'{arm.name!r}{at(arm.x)}: take one x away'
        )
      readings.append(Reading(arm.name, x if arm.x == '' else arm.x, name, arm, path))
  if not readings:
    raise UserError(
      "study.measures is empty: expected (name, 'job/path/to/a/number') for each measure"
    )
  measures = [entry[0] for entry in c.measures]
  for entry in c.references:
    name, source, measure, path, x = entry_of(
      'references', entry, ('name', 'arm', 'measure', 'path')
    )
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


def steps_of(path: str) -> list[tuple[str, dict[str, str] | None]]:
  """[(key, {field: text} or None)] of a path like 'probe/rows[method=lbfgs]/accuracy/clean'.

  Raises:
    UserError: it is no such path.
  """
  matches = list(PATH.finditer(path))
  if ''.join(match[0] for match in matches) != path or len(matches) < 2:
    raise UserError(
      f'study: {path!r} is no path to a number: expected job/key/..., with rows chosen by '
      '[field=value, ...]'
    )
  steps = []
  for match in matches:
    if match[2] is None:
      steps.append((match[1], None))
      continue
    fields = [part.partition('=') for part in re.split(r',\s*(?=[\w.]+=)', match[2])]
    if not all(equals for _, equals, _ in fields):
      raise UserError(
        f'study: [{match[2]}] in {path!r} chooses no row: expected [field=value, ...]'
      )
    steps.append((match[1], {name.strip(): value.strip() for name, _, value in fields}))
  return steps


def look_up(folder: pathlib.Path, path: str) -> float:
  """The number at a path of a run's results.

  Of several rows that differ in their `draw` it is the mean, in float64.

  Args:
    folder: of the run.
    path: see `steps_of`.

  Raises:
    UserError: no such file, row or number, or several that are not draws.
  """
  (job, _), *steps = steps_of(path)
  file = folder / 'results' / f'{job}.json'
  try:
    values: list[Any] = [read_result(file)]
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
  if not all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in values):
    raise UserError(
      f'{path} is no number in {file}: the path of the measure names something else or nothing'
    )
  return float(np.mean(values, dtype=np.float64))
