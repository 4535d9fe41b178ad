"""What a person has set on the page, and the messages that change it: pure, without a server."""

import dataclasses
import math
import numbers
from typing import Any

import numpy as np

from palm_jax.base.errors import UserError

ENDLESS = 1_000_000  # frames of an episode: longer than anyone plays
# What the sliders can be set to.
BOUNDS = dict(alpha=(0.0, 1.0), beta=(0.0, 1.0), psi=(0.0, 2.0), rate=(1.0, 60.0))
WHOLE = dict(length=(2, ENDLESS), label=(-1, 10**6))
SWITCHES = 'paused', 'waits'
DEEDS = 'step', 'reset', 'turn'
LAST = 2**31 - 1  # of what is counted


@dataclasses.dataclass(frozen=True)
class Controls:
  """The settings of one tab.

  Attributes:
    alpha, beta, psi: of the world.
    length: frames of an episode.
    label: class of the pictures; -1 draws one for each episode.
    who: acts, one of the game's players.
    drag: (x, y) within the unit circle: how far the person pulls along the two directions.
    rate: most frames a second.
    paused: nothing moves but by `steps`; what psi and label change is shown.
    waits: the world stands still while the person does nothing.
    steps, resets, turns, draws: how often a step, a new episode, another pair of directions and a
      random class were asked for.
  """

  alpha: float
  beta: float
  psi: float
  length: int = ENDLESS
  label: int = -1
  who: str = 'person'
  drag: tuple[float, float] = (0.0, 0.0)
  rate: float = 30.0
  paused: bool = False
  waits: bool = True
  steps: int = 0
  resets: int = 0
  turns: int = 0
  draws: int = 0


def changed(
  controls: Controls, message: Any, players: tuple[str, ...], num_classes: int
) -> Controls:
  """The settings after a message of the page.

  Args:
    controls: as they were.
    message: {'do': 'drag', 'x', 'y'}, {'do': 'set', NAME: VALUE, ...}, or {'do': of DEEDS}.
    players: who may act.
    num_classes: of the generator.

  Raises:
    UserError: anything else, or a value that its setting cannot have; nothing is changed.
  """
  deed = message.get('do') if isinstance(message, dict) else None
  if deed == 'drag':
    x, y = (_number(name, message.get(name), -1e3, 1e3) for name in ('x', 'y'))
    far = max(1.0, math.hypot(x, y))
    return dataclasses.replace(controls, drag=(x / far, y / far))
  if deed in DEEDS:
    name = f'{deed}s'
    return dataclasses.replace(controls, **{name: (getattr(controls, name) + 1) % LAST})
  if deed != 'set':
    raise UserError(f'expected an object with do: drag, set, {", ".join(DEEDS)} or film')
  values = {name: value for name, value in message.items() if name != 'do'}
  new: dict[str, Any] = {
    name: _value(name, value, players, num_classes) for name, value in values.items()
  }
  if new.get('label') == -1:
    new['draws'] = (controls.draws + 1) % LAST
  if new.get('who', 'person') != 'person':
    new['drag'] = (0.0, 0.0)
  return dataclasses.replace(controls, **new)


def _value(name, value, players, num_classes):
  if name in BOUNDS:
    return _number(name, value, *BOUNDS[name])
  if name in WHOLE:
    low, high = WHOLE[name]
    high = min(high, max(num_classes, 1) - 1) if name == 'label' else high
    number = _number(name, value, low, high)
    if number != int(number):
      raise UserError(f'{name}: expected a whole number from {low} to {high}')
    return int(number)
  if name in SWITCHES:
    if not isinstance(value, bool):
      raise UserError(f'{name}: expected true or false')
    return value
  if name == 'who':
    if value not in players:
      raise UserError(f'who: expected one of {", ".join(players)}')
    return value
  raise UserError(f'there is no setting {str(name)[:40]!r}')


def _number(name, value, low, high):
  """The value as a float; UserError unless it is a finite number within the bounds."""
  known = isinstance(value, numbers.Real) and not isinstance(value, bool)
  if not known or not low <= value <= high:  # NaN is in no bounds
    raise UserError(f'{name}: expected a number from {low:g} to {high:g}')
  return float(value)


def seconds_of(message: dict[str, Any], most: float) -> float:
  """How long a film {'do': 'film', 'seconds'} shall be. Raises UserError."""
  return _number('seconds', message.get('seconds'), 0.1, most)


def directions(z_dim: int, seed: int) -> np.ndarray:
  """A random orthonormal pair (2, z_dim) float32; of a latent of one number, it and 0."""
  pair = np.random.default_rng(seed).normal(size=(z_dim, 2))
  rows = np.linalg.qr(pair)[0].T.astype(np.float32)
  return np.concatenate([rows, np.zeros((2 - len(rows), z_dim), np.float32)])


def action_of(pair: np.ndarray, drag: tuple[float, float]) -> np.ndarray:
  """The action (z_dim,) float32 in [-1, 1]^z_dim of a drag (x, y) within the unit circle.

  A pull to the circle's edge goes as far in its direction as the box allows, half a pull half as
  far.
  """
  x, y = drag
  way = x * pair[0] + y * pair[1]
  most = np.abs(way).max()
  if most < 1e-12:
    return np.zeros_like(pair[0])
  return np.clip(way * (min(1.0, math.hypot(x, y)) / most), -1, 1).astype(np.float32)
