"""The arms of a study, and the runs that they are made of."""

import ast
import copy
import pathlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from palm_jax.base import checks
from palm_jax.base.errors import UserError
from palm_jax.study.numbers import at

GENERATOR = 'base'  # folder of the generator that all arms share, where the config names none
# Folders that no arm can have.
TAKEN = (GENERATOR, 'features', 'results', 'compilation_cache')


class Arm(NamedTuple):
  """An arm of a study."""

  name: str
  settings: tuple[tuple[str, str], ...]  # (dotted key, value as text)
  x: Any  # '' without an axis


class ArmRun(NamedTuple):
  """A run of an arm."""

  arm: Arm
  seed: int
  folder: pathlib.Path
  config: ConfigDict


def make_arms(config: ConfigDict) -> list[Arm]:
  """The arms of config.study.

  Raises:
    UserError: there is none, two have one folder, or a setting is no key=value.
  """
  arms = []
  folders = {}
  for entry in config.study.arms:
    name, text, x = entry_of('arms', entry, ('name', 'settings'))
    settings = [part.partition('=') for part in re.split(r'\s+(?=[\w.]+=)', text.strip()) if part]
    bad = [key for key, equals, _ in settings if not equals]
    if bad:
      raise UserError(
        f'study.arms: {bad[0]!r} of {name!r} is no setting: expected key=value, such as '
        'environment.alpha=0'
      )
    arm = Arm(name, tuple((key, value) for key, _, value in settings), x)
    folder = _folder(arm)
    if folder in folders:
      raise UserError(
        f'study.arms: {name!r}{at(x)} has the folder of {folders[folder]!r}: give each arm its '
        'own name or x'
      )
    if folder.parts[0] in TAKEN or not folder.parts[0].strip('.'):
      raise UserError(
        f'study.arms: {name!r} cannot be a folder of its own: choose another name than '
        f'{", ".join(TAKEN)}'
      )
    folders[folder] = name
    arms.append(arm)
  if not arms:
    raise UserError("study.arms is empty: expected (name, 'key=value ...') for each arm")
  return arms


def in_order(arms: Sequence[Arm]) -> list[Arm]:
  """The arms, each after those whose folders it names. UserError where they wait for each other."""
  ordered = []
  while len(ordered) < len(arms):
    ready = [
      arm
      for arm in arms
      if arm not in ordered
      and all(named_arm(name, arm, arms) in ordered for name in needed_arms(arm))
    ]
    if not ready:
      stuck = next(arm for arm in arms if arm not in ordered)
      raise UserError(
        f'study.arms: {stuck.name!r} waits for {needed_arms(stuck)[0]!r}, which waits for it: '
        'take one {} away'
      )
    ordered += ready
  return ordered


def entry_of(where: str, entry: Any, names: Sequence[str]) -> tuple:
  """An entry of a tuple in config.study with its x, '' where it has none.

  Args:
    where: the tuple's name.
    entry: of it.
    names: of the entry's parts, but for x.

  Raises:
    UserError: other parts.
  """
  if (
    not isinstance(entry, (tuple, list))
    or len(entry) not in (len(names), len(names) + 1)
    or not all(isinstance(part, str) for part in entry[: len(names)])
  ):
    raise UserError(
      f'study.{where} has {entry!r}: expected ({", ".join(names)}) or ({", ".join(names)}, x), '
      'all but x in text'
    )
  return (*entry, '')[: len(names) + 1]


def _folder(arm):
  plain = lambda text: re.sub(r'[^\w.=+-]+', '_', str(text))
  folder = pathlib.Path(plain(arm.name))
  return folder if arm.x == '' else folder / plain(arm.x)


def needed_arms(arm: Arm) -> list[str]:
  """Names of the arms whose folders the arm's settings name."""
  return [name for _, value in arm.settings for name in re.findall(r'\{([^{}]*)\}', value)]


def named_arm(name: str, arm: Arm, arms: Sequence[Arm]) -> Arm:
  """The arm that {name} means in a setting of `arm`: one of the same x, or without any.

  Raises:
    UserError: there is none.
  """
  for other in arms:
    if other.name == name and other.x in (arm.x, '') and other != arm:
      return other
  raise UserError(
    f'study.arms: {{{name}}} in {arm.name!r} names no other arm{at(arm.x)}'
    f'{checks.nearest(name, [other.name for other in arms])}: expected one of study.arms'
  )


def make_runs(config: ConfigDict, place: pathlib.Path, arms: Sequence[Arm]) -> list[ArmRun]:
  """The runs: all arms with the first seed, then with the next.

  So a study that was stopped early has whole comparisons.

  Raises:
    UserError: invalid seeds, or settings that the base config does not have or that are of another
      type.
  """
  seeds = tuple(config.study.seeds)
  if (
    not seeds
    or len(set(seeds)) < len(seeds)
    or not all(isinstance(seed, int) and 0 <= seed < 2**31 for seed in seeds)
  ):
    raise UserError(
      f'study.seeds={seeds}: expected one or more different whole numbers of at least 0'
    )
  return [
    ArmRun(
      arm, seed, place / _folder(arm) / f'seed{seed}', _run_config(config, place, arm, arms, seed)
    )
    for seed in seeds
    for arm in in_order(arms)
  ]


def base_config(config: ConfigDict, place: pathlib.Path) -> ConfigDict:
  """What the arms start from: the config without its study, and with the study's jobs.

  All share one generator, and arms of a seed the untrained encoder. Settings that follow others
  still do, as on the command line.
  """
  base = copy.deepcopy(config)
  with base.unlocked():
    del base['study']
  base.jobs = tuple(config.study.jobs)
  base.generator.path = base.generator.path or str(place / GENERATOR)
  base.features.folder = base.features.folder or str(place / 'features')
  return base


def _value(text, known):
  """What a text means for a setting that has the value `known`; one word may be a tuple of it."""
  if isinstance(known, str):
    return text
  try:
    value = ast.literal_eval(text)
  except (ValueError, SyntaxError):
    if not isinstance(known, tuple):
      raise
    value = text
  if isinstance(known, tuple):
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)
  return value


def _run_config(config, place, arm, arms, seed):
  c = base_config(config, place)
  known = checks.flatten(c.to_dict())
  for key, text in arm.settings:
    shared = key in ('seed', 'jobs') or key.startswith('generator.') and key != 'generator.path'
    if key not in known or shared:
      hint = ': it is of the whole study' if shared and key in known else checks.nearest(key, known)
      raise UserError(f'study.arms: {key}={text} of {arm.name!r} is no setting of an arm{hint}')
    fill = lambda match: str(place / _folder(named_arm(match[1], arm, arms)) / f'seed{seed}')
    text = re.sub(r'\{([^{}]*)\}', fill, text)
    try:
      c.update_from_flattened_dict({key: _value(text, known[key])})
    except (TypeError, ValueError, SyntaxError) as e:
      raise UserError(
        f'study.arms: {key}={text} of {arm.name!r} is invalid: expected a value like {known[key]!r}'
      ) from e
  c = c.copy_and_resolve_references()
  c.seed = seed
  return c
