"""What a study's numbers say: intervals, comparisons, claims, the long form, and the table."""

import csv
import io
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from scipy import special

from palm_jax.base.errors import UserError
from palm_jax.base.files import replacing
from palm_jax.base.tables import aligned, protocol_line

RESAMPLES = 10_000  # of a bootstrap interval
COLUMNS: tuple[str, ...] = ('study', 'arm', 'x', 'seed', 'measure', 'value', 'run')


def at(x: Any) -> str:
  """' @ x', or nothing without an axis."""
  return '' if x == '' else f' @ {x}'


def same(value: Any, text: str) -> bool:
  """Whether a value of a file is what a text names: numbers as numbers, all else as text."""
  if isinstance(value, (int, float)) and not isinstance(value, bool):
    try:
      return float(text) == value
    except ValueError:
      return False
  return str(value) == text


def contests(claim: str, values: Mapping[tuple[str, Any], Any]) -> list[tuple[Any, Any, Any]]:
  """What the claim 'a > b' compares.

  Args:
    claim: 'arm > arm'; an arm may be 'arm @ x'. Without it, arms are compared at each x that both
      have, and one of a single x with the other at all of its.
    values: {(arm, x): of any kind}.

  Returns:
    [(x or '', values of a, values of b)].

  Raises:
    UserError: not a claim, or an unknown arm.
  """
  names = claim.split(' > ')
  if len(names) != 2:
    raise UserError(
      f'study.orderings: {claim!r} is no claim: expected "arm > arm" or "arm @ x > arm @ x"'
    )
  a, b = (_places(name.strip(), values) for name in names)
  if min(len(a), len(b)) == 1:
    found = [(x, y) for x in a for y in b]
  else:
    found = [(x, x) for x in a if x in b]
  return [(_place_of_both(x, y, a, b), a[x], b[y]) for x, y in found]


def _place_of_both(x, y, a, b):
  """The x of a comparison of a at x with b at y: that of the arm which has several."""
  if len(a) > 1:
    return x
  if len(b) > 1:
    return y
  return x if x == y else ''


def _places(term, values):
  """{x: values} of the arm, or of the one place 'arm @ x'."""
  name, one, x = term.partition(' @ ')
  found = {
    place: numbers
    for (arm, place), numbers in values.items()
    if arm == name and (not one or same(place, x))
  }
  if not found:
    raise UserError(
      f'study: {term!r} is no arm with the first measure: expected one of '
      f'{", ".join(dict.fromkeys(arm for arm, _ in values))}, with @ and an x that it has where '
      'one is meant'
    )
  return found


def reference_of(reference: str, values: Mapping[tuple[str, Any], Any]) -> dict[Any, Any]:
  """{x: values} of the arm that others are compared with.

  Args:
    reference: 'arm' or 'arm @ x'; '' is the first.
    values: {(arm, x): of any kind}.

  Raises:
    UserError: an unknown arm.
  """
  return _places(reference or next(iter(values))[0], values)


def interval(
  values: Sequence[float], resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float] | None:
  """95% percentile bootstrap interval of the mean of values (n,).

  Returns:
    (low, high) computed in float64; None of fewer than two.
  """
  numbers = np.asarray(values, np.float64)
  if len(numbers) < 2:
    return None
  rows = np.random.default_rng(seed).integers(0, len(numbers), (resamples, len(numbers)))
  low, high = np.percentile(numbers[rows].mean(1), (2.5, 97.5))
  return float(low), float(high)


def student(values: Sequence[float]) -> tuple[float, float] | None:
  """95% interval of the mean of values (n,) by Student's t with n - 1 degrees of freedom.

  Returns:
    (low, high); None of fewer than two.
  """
  if len(values) < 2:
    return None
  quantile = float(special.stdtrit(len(values) - 1, 0.975))
  half = quantile * np.std(values, ddof=1) / np.sqrt(len(values))
  return float(np.mean(values) - half), float(np.mean(values) + half)


def difference(a: Mapping[int, float], b: Mapping[int, float]) -> dict[str, Any]:
  """a - b of {seed: value}, paired by seed.

  Returns:
    dict: `n` seeds that both have, mean `difference`, bootstrap interval `low` and `high`,
      Student's `t_low` and `t_high`.
  """
  paired = [a[seed] - b[seed] for seed in a if seed in b]
  low, high = interval(paired) or (None, None)
  t_low, t_high = student(paired) or (None, None)
  mean = float(np.mean(paired)) if paired else None
  return dict(n=len(paired), difference=mean, low=low, high=high, t_low=t_low, t_high=t_high)


def verdict(found: Mapping[str, Any]) -> str:
  """What a `difference` says of a claim: 'holds', 'does not hold' or 'undecided'.

  It is undecided where Student's interval includes 0, is no number, or has no width: seeds that
  agree to the last picture say nothing of how they vary. The bootstrap's interval of three seeds is
  their range, so it would decide whenever three signs agree.
  """
  low, high = found['t_low'], found['t_high']
  if low is None or not high - low > 1e-9 * max(abs(low), abs(high)) or low <= 0 <= high:
    return 'undecided'
  return 'holds' if low > 0 else 'does not hold'


def summarise(c: ConfigDict, lines: Iterable[Mapping[str, Any]]) -> dict[str, list[dict]]:
  """What the numbers say.

  Args:
    c: the config's section `study`.
    lines: of COLUMNS, long form.

  Returns:
    {'rows': [dict] for each measure, arm and x, with `minus_reference` of `difference`;
    'orderings': [dict]}, all of it JSON.
  """
  measures = {}
  for line in lines:
    by_place = measures.setdefault(line['measure'], {})
    by_place.setdefault((line['arm'], line['x']), {})[line['seed']] = line['value']
  rows = [row for measure, values in measures.items() for row in _rows(c, measure, values)]
  first = c.measures[0][0]
  orderings = []
  for claim in c.orderings:
    for x, a, b in contests(claim, measures[first]):
      found = difference(a, b)
      orderings.append(dict(ordering=claim, x=x, measure=first, **found, verdict=verdict(found)))
  return dict(rows=rows, orderings=orderings)


def _rows(c, measure, values):
  """A row for each place of one measure; values: {(arm, x): {seed: value}}."""
  try:
    references = reference_of(c.reference, values)
  except UserError:  # the reference has no such measure
    references = {}
  only = next(iter(references.values())) if len(references) == 1 else None
  for (arm, x), numbers in values.items():
    low, high = interval(list(numbers.values())) or (None, None)
    reference = references.get(x, only)
    minus_reference = None
    if reference is not None and reference is not numbers:
      minus_reference = difference(numbers, reference)
    yield dict(
      measure=measure,
      arm=arm,
      x=x,
      n=len(numbers),
      mean=float(np.mean(list(numbers.values()))),
      low=low,
      high=high,
      minus_reference=minus_reference,
    )


def table(results: Mapping[str, Any]) -> str:
  """A study's results as text: a block for each measure, the claims, the protocol in one line."""
  lines = []
  reference = results['protocol']['reference']
  for measure in dict.fromkeys(row['measure'] for row in results['rows']):
    cells = [[measure, 'x', 'n', 'mean', 'bootstrap', f'minus {reference}', 'bootstrap']]
    cells += [_cells(row) for row in results['rows'] if row['measure'] == measure]
    lines += [*aligned(cells), '']
  lines += [
    f'{found["ordering"]}{at(found["x"])}: {_number(found["difference"])}, t '
    f'{_ends(found["t_low"], found["t_high"])}, '
    f'{found["verdict"]} ({found["measure"]}, {found["n"]} seeds)'
    for found in results['orderings']
  ]
  return '\n'.join([*lines, protocol_line(results['protocol'])])


def _cells(row):
  minus = row['minus_reference'] or dict(difference=None, low=None, high=None)
  return [
    row['arm'],
    str(row['x']),
    str(row['n']),
    _number(row['mean']),
    _ends(row['low'], row['high']),
    _number(minus['difference']),
    _ends(minus['low'], minus['high']),
  ]


def _number(value):
  return '-' if value is None else f'{value:.4g}'


def _ends(low, high):
  return '-' if low is None else f'[{_number(low)}, {_number(high)}]'


def runs_in(path: pathlib.Path) -> set[str]:
  """Folders of the runs of which a file of `write_lines` has lines; none where it cannot tell."""
  try:
    with path.open(newline='') as file:
      return {line['run'] for line in csv.DictReader(file)}
  except (OSError, ValueError, KeyError, csv.Error):
    return set()


def write_lines(path: pathlib.Path, lines: Iterable[Mapping[str, Any]]) -> None:
  """Long form as CSV: one line for each arm, x, seed and measure. Raises OSError."""
  text = io.StringIO()
  writer = csv.DictWriter(text, COLUMNS, lineterminator='\n')
  writer.writeheader()
  writer.writerows(lines)
  with replacing(path) as file:
    file.write(text.getvalue().encode())
