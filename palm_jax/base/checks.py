"""Checks of settings: each raises UserError that names the value, what was expected and what to do.

`name` is the key as people write it, 'pretrain.num_envs', without --config.
"""

import difflib
import math
import numbers
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from palm_jax.base.errors import UserError

LONGEST_NAME = 255  # bytes, of a file
LARGEST_INT = 2**63 - 1
LARGEST_FLOAT = 3.4e38  # of float32, in which settings reach the devices


def nearest(name: Any, names: Iterable[str]) -> str:
  """' (did you mean X?)' with the known name that looks most like it, or nothing."""
  near = difflib.get_close_matches(str(name), names, 1)
  return f' (did you mean {near[0]}?)' if near else ''


def choice(name: str, value: Any, choices: Collection[str]) -> None:
  """The value is one of the choices."""
  if value not in choices:
    raise UserError(
      f'{name}={value!r} is unknown{nearest(value, choices)}: choose one of {", ".join(choices)}'
    )


def choices(name: str, values: Collection[str], known: Collection[str]) -> None:
  """The values are one or more of those known."""
  if not values:
    raise UserError(f'{name} is empty: choose some of {", ".join(known)}')
  for value in values:
    if value not in known:
      raise UserError(
        f'{name}={tuple(values)}: {value!r} is unknown{nearest(value, known)}: '
        f'choose some of {", ".join(known)}'
      )


def positive(name: str, value: float, hint: str = '') -> None:
  """The value is above 0."""
  if not value > 0:
    least = 'set it to 1 or more' if isinstance(value, int) else 'set it above 0'
    raise UserError(f'{name}={value} is not positive: {least}{hint and "; " + hint}')


def at_least(name: str, value: float, least: float, reason: str = 'is too small') -> None:
  """The value is `least` or more."""
  if not value >= least:
    raise UserError(f'{name}={value} {reason}: set it to {least} or more')


def not_negative(name: str, value: float) -> None:
  """The value is 0 or more."""
  at_least(name, value, 0, 'is negative')


def between(name: str, value: float, low: float, high: float, hint: str = '') -> None:
  """The value is in [low, high]."""
  if not low <= value <= high:
    raise UserError(f'{name}={value} is impossible: choose {low} to {high}{hint and ", " + hint}')


def share(name: str, value: float, what: str = 'a share') -> None:
  """The value is in [0, 1]."""
  if not 0 <= value <= 1:
    raise UserError(f'{name}={value} is not in [0, 1]: it is {what}; set it there')


def divisible(name: str, value: int, divisor: int, divisor_name: str) -> None:
  """The value is a positive multiple of the divisor."""
  if value < 1 or value % divisor:
    raise UserError(
      f'{name}={value} is not a positive multiple of {divisor_name}={divisor}: '
      f'set {name} to {max(1, round(value / divisor)) * divisor}, for example'
    )


class Range(NamedTuple):
  """Numbers from `low` to `high`; `above` leaves `low` itself out; `many` is a list of them."""

  low: float
  high: float
  above: bool = False
  many: bool = False


SHARE = Range(0, 1)
RATE = Range(0, 1000)  # of learning
SIZE = Range(1, 65_536)  # of an axis of an array
SIZES = SIZE._replace(many=True)
SIZE_OR_0 = Range(0, 65_536)
COUNT = Range(1, 10**9)  # of what is done one after the other
COUNT_OR_0 = Range(0, 10**9)
AMOUNT = Range(0, 10**9)
ABOVE_0 = Range(0, 10**9, above=True)
MINUTES = Range(0, 10**6)


def within(name: str, value: Any, expected: Range) -> None:
  """The value is a number in the range."""
  low, high, above, _ = expected
  if not isinstance(value, (int, float)) or isinstance(value, bool):
    raise UserError(f'{name}={value!r} is not a number: choose {low:,} to {high:,}')
  if expected == SHARE:
    share(name, value)
  if (low, above) in ((0, True), (1, False)) and not value > 0:
    positive(name, value)
  if low == 0:
    not_negative(name, value)
  at_least(name, value, low)
  if not value <= high:
    raise UserError(f'{name}={value} is too large: set it to {high:,} or less')


def whole(name: str, value: Any, expected: Range) -> int:
  """The value, Python's or NumPy's, as a whole number in the range."""
  value = int(value) if isinstance(value, numbers.Integral) else value
  within(name, value, expected)
  if not isinstance(value, int):
    raise UserError(f'{name}={value}: expected a whole number')
  return value


def ranges(name: str, section: ConfigDict, expected: Mapping[str, Any]) -> None:
  """Every number in a section of the config is in its range, and every text can be a name.

  Args:
    name: of the section.
    section: of the config.
    expected: {key: Range} of its numbers, and of the numbers in its lists; {key: such a mapping} of
      sections in it.
  """
  for key, value in section.items():
    full = f'{name}.{key}' if name else key
    if isinstance(value, ConfigDict):
      ranges(full, value, expected.get(key, {}))
      continue
    listed = isinstance(value, (tuple, list))
    if key in expected and listed != expected[key].many:
      wanted = 'numbers, such as (1, 2)' if expected[key].many else 'one number'
      raise UserError(f'{full}={value!r}: expected {wanted}')
    if key in expected and listed and not value:
      raise UserError(f'{full} is empty: give one number or more')
    for item in value if listed else (value,):
      if isinstance(item, str):
        _text(full, item)
      if key in expected:
        within(full, item, expected[key])
      elif listed and isinstance(item, (int, float)):
        raise UserError(f'{full}={value!r} has the number {item}: expected texts in quotes')


def _text(name, value):
  """It may be the name of a file: no part of a path is longer than file systems allow."""
  longest = max(value.split('/'), key=len)
  if len(longest.encode(errors='replace')) > LONGEST_NAME and ('/' in value or ' ' not in value):
    raise UserError(
      f'{name}={value[:40]!r}... has a part of {len(longest)} letters: expected names of '
      f'{LONGEST_NAME} at most'
    )


def finite(config: ConfigDict) -> None:
  """Every number of a config, in lists too, is finite and fits its type."""
  for name, value in flatten(config.to_dict()).items():
    for item in value if isinstance(value, (tuple, list)) else (value,):
      if not isinstance(item, (int, float)) or isinstance(item, bool):
        continue
      if isinstance(item, int):
        large = abs(item) > LARGEST_INT
      elif not math.isfinite(item):
        raise UserError(f'{name}={item} is not finite: set it to a number')
      else:
        large = abs(item) > LARGEST_FLOAT
      if large:
        raise UserError(f'{name}={item} is too large for its type: set it nearer to 0')


def flatten(tree: Any, prefix: str = '') -> dict[str, Any]:
  """{'a': {'b': 1}} -> {'a.b': 1}."""
  if not isinstance(tree, dict):
    return {prefix[:-1]: tree}
  found = {}
  for name, branch in tree.items():
    found |= flatten(branch, f'{prefix}{name}.')
  return found
