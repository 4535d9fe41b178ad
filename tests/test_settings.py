"""Every number of every config has a range, and what is outside of it is refused in one line."""

import functools
import importlib
import math
import pathlib

import pytest

from palm_jax import runner, settings
from palm_jax.base import checks
from palm_jax.base.errors import UserError

CONFIGS = pathlib.Path(__file__).parents[1] / 'configs'
VALUES = math.nan, math.inf, -math.inf, -1, 0, 1e300, 10**12, 'x', None, (1,), True


@functools.cache
def configs():
  """{name: config} of all that the repository has."""
  found = {}
  for path in sorted(CONFIGS.rglob('*.py')):
    name = '.'.join(path.relative_to(CONFIGS.parent).with_suffix('').parts)
    module = importlib.import_module(name)
    if hasattr(module, 'get_config'):
      found[name] = module.get_config()
  return found


def is_number(value):
  return isinstance(value, (int, float)) and not isinstance(value, bool)


def numeric_keys(config):
  """Of numbers, and of lists with numbers in them."""
  flat = checks.flatten(config.to_dict())
  return [
    key
    for key, value in flat.items()
    if is_number(value) or (isinstance(value, (tuple, list)) and any(map(is_number, value)))
  ]


def range_of(config, key):
  found = settings.ranges(config)
  for part in key.split('.'):
    found = found.get(part, {}) if isinstance(found, dict) else {}
  return found


def test_every_number_of_every_config_has_a_range_and_is_in_it():
  assert len(configs()) > 10
  for name, config in configs().items():
    settings.check(config)
    ranges = {key: range_of(config, key) for key in numeric_keys(config)}
    without = [key for key, found in ranges.items() if not isinstance(found, checks.Range)]
    assert not without, f'{name}: say in RANGES of their modules what {without} may be'


@pytest.mark.parametrize('name', ['cifar', 'atari', 'meta', 'studies.figure4'])
def test_numbers_are_refused_in_one_line_or_in_their_range(name):
  config = configs()[f'configs.{name}']
  jobs = [runner.find(job) for job in runner.JOBS if job != 'benchmark' and config.get(job)]
  accepted = 0
  for key in numeric_keys(config):
    low, high, above, many = range_of(config, key)
    for value in VALUES:
      changed = config.copy_and_resolve_references()
      section, _, last = key.rpartition('.')
      target = changed
      for part in section.split('.') if section else ():
        target = target[part]
      with target.ignore_type(), target.unlocked():
        del target[last]
        target[last] = value
      try:
        settings.check(changed)
      except UserError as e:
        assert '\n' not in str(e) and str(e).startswith(key), e
        continue
      assert many == isinstance(value, tuple)
      items = value if many else (value,)
      assert all(is_number(x) and low <= x <= high and (x > low or not above) for x in items), key
      accepted += 1
      for job in jobs:
        try:
          job.check(changed, 1)
        except UserError as e:
          assert '\n' not in str(e), e
  assert accepted > 20
