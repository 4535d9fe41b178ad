"""Checks of settings: each raises UserError that names the value, what was expected and what to do.

`name` is the key as people write it, 'pretrain.num_envs', without --config.
"""

import difflib
import math
from collections.abc import Collection, Iterable
from typing import Any

from ml_collections import ConfigDict

from palm_jax.base.errors import UserError

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


def ranges(
  name: str,
  section: ConfigDict,
  above_0: Iterable[str] = (),
  from_0: Iterable[str] = (),
  shares: Iterable[str] = (),
) -> None:
  """The usual ranges of numbers in a section of the config, by their keys.

  Args:
    name: of the section.
    section: of the config.
    above_0: keys of numbers above 0.
    from_0: keys of numbers of 0 or more.
    shares: keys of numbers in [0, 1].
  """
  for key in above_0:
    positive(f'{name}.{key}', section[key])
  for key in from_0:
    not_negative(f'{name}.{key}', section[key])
  for key in shares:
    share(f'{name}.{key}', section[key])


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
        raise UserError(f'{name}={item} is too large for its type: set it to a smaller number')


def flatten(tree: Any, prefix: str = '') -> dict[str, Any]:
  """{'a': {'b': 1}} -> {'a.b': 1}."""
  if not isinstance(tree, dict):
    return {prefix[:-1]: tree}
  found = {}
  for name, branch in tree.items():
    found |= flatten(branch, f'{prefix}{name}.')
  return found
