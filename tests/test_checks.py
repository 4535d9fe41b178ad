"""Checks of settings name the key, the value and what to do."""

import pytest
from ml_collections import ConfigDict

from palm_jax.base import checks
from palm_jax.base.errors import UserError
from tests.worlds import tiny_config


@pytest.mark.parametrize(
  'check, arguments, message',
  [
    (
      checks.choice,
      ('a.b', 'tow', ('one', 'two')),
      r"a.b='tow' is unknown \(did you mean two\?\): choose one of one, two",
    ),
    (checks.choices, ('a.b', (), ('one', 'two')), 'a.b is empty: choose some of one, two'),
    (checks.choices, ('a.b', ('x',), ('one',)), "a.b=.'x',.: 'x' is unknown"),
    (checks.positive, ('a.b', 0), 'a.b=0 is not positive: set it to 1 or more'),
    (checks.positive, ('a.b', 0.0), 'a.b=0.0 is not positive: set it above 0'),
    (checks.positive, ('a.b', float('nan')), 'a.b=nan is not positive'),
    (checks.at_least, ('a.b', 1, 2), 'a.b=1 is too small: set it to 2 or more'),
    (checks.at_least, ('a.b', float('nan'), 2), 'a.b=nan is too small'),
    (checks.not_negative, ('a.b', -1), 'a.b=-1 is negative: set it to 0 or more'),
    (
      checks.between,
      ('a.b', 5, 1, 4, 'or more data'),
      'a.b=5 is impossible: choose 1 to 4, or more data',
    ),
    (checks.between, ('a.b', float('nan'), 1, 4), 'a.b=nan is impossible'),
    (checks.share, ('a.b', 1.5), r'a.b=1.5 is not in \[0, 1\]: it is a share'),
    (checks.share, ('a.b', float('nan')), r'a.b=nan is not in \[0, 1\]'),
    (
      checks.divisible,
      ('a.b', 12, 8, 'devices'),
      'a.b=12 is not a positive multiple of devices=8: set a.b to 16, for example',
    ),
    (checks.divisible, ('a.b', 0, 8, 'devices'), 'a.b=0 is not a positive .* set a.b to 8'),
  ],
)
def test_what_is_refused(check, arguments, message):
  with pytest.raises(UserError, match=f'^{message}'):
    check(*arguments)


def test_what_is_accepted():
  checks.choice('a.b', 'one', ('one', 'two'))
  checks.choices('a.b', ('two', 'one'), ('one', 'two'))
  checks.positive('a.b', 1e-9)
  checks.at_least('a.b', 2, 2)
  checks.not_negative('a.b', 0)
  checks.between('a.b', 4, 1, 4)
  checks.share('a.b', 1)
  checks.divisible('a.b', 16, 8, 'devices')


RANGES = dict(
  lr=checks.ABOVE_0,
  decay=checks.AMOUNT,
  psi=checks.SHARE,
  count=checks.SIZE,
  counts=checks.SIZES,
  sub=dict(k=checks.SIZE),
)


@pytest.mark.parametrize(
  'key, value, message',
  [
    ('lr', 0.0, 'is not positive: set it above 0'),
    ('decay', -1.0, 'is negative: set it to 0 or more'),
    ('psi', 1.5, r'is not in \[0, 1\]'),
    ('count', 0, 'is not positive: set it to 1 or more'),
    ('count', 10**12, 'is too large: set it to 65,536 or less'),
    ('count', 'x', 'is not a number: choose 1 to 65,536'),
    ('count', (3,), ': expected one number'),
    ('counts', (), ' is empty'),
    ('counts', 3, ': expected numbers, such as'),
    ('counts', (3, 'x'), "='x' is not a number"),
    ('counts', (3, 0), '=0 is not positive'),
    ('names', ('a', 3), 'has the number 3: expected texts in quotes'),
    ('names', 'x' * 300, 'has a part of 300 letters: expected names of 255 at most'),
  ],
)
def test_ranges_of_a_section(key, value, message):
  good = dict(lr=0.1, decay=0.0, psi=1.0, count=1, counts=(1, 2), names=('b',))
  checks.ranges('a', ConfigDict(good), RANGES)
  with pytest.raises(UserError, match=f'^a.{key}.*{message}'):
    checks.ranges('a', ConfigDict({key: value}), RANGES)
  if key == 'count':
    with pytest.raises(UserError, match=f'^a.sub.k.*{message}'):
      checks.ranges('a', ConfigDict(dict(sub=dict(k=value))), RANGES)


@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf'), 1e300])
def test_every_number_of_a_config_is_finite(value):
  """Whatever its section: no part has to think of it."""
  keys = {k: v for k, v in checks.flatten(tiny_config().to_dict()).items() if type(v) is float}
  assert len(keys) > 30
  for key in keys:
    c = tiny_config()
    checks.finite(c)
    c.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=f'^{key}=.* is (not finite|too large)'):
      checks.finite(c)


def test_numbers_in_lists_and_whole_numbers():
  with pytest.raises(UserError, match='a.shares=nan is not finite'):
    checks.finite(ConfigDict(dict(a=dict(shares=(0.5, float('nan'))))))
  with pytest.raises(UserError, match='a.n=.* is too large for its type'):
    checks.finite(ConfigDict(dict(a=dict(n=2**63))))
  checks.finite(ConfigDict(dict(a=dict(n=2**63 - 1, flag=True, name='x', shares=(1, 0.5)))))


def test_flatten():
  assert checks.flatten({'a': {'b': 1, 'c': {'d': 2}}, 'e': {}}) == {'a.b': 1, 'a.c.d': 2}
