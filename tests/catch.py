"""Catch as an Atari environment: a ball falls through 11 rows of 7 columns, and must be met by the
paddle below."""

from typing import NamedTuple

import numpy as np

ROWS, COLUMNS = 11, 7


class Step(NamedTuple):
  stacks: np.ndarray
  reward: np.ndarray
  life_lost: np.ndarray
  game_over: np.ndarray
  truncated: np.ndarray
  first: np.ndarray
  score: np.ndarray


class Catch:
  """The members of palm_jax.atari.environment.Environment; a game is `balls` balls, each missed one
  a lost life.

  Args:
    game: not read.
    num_envs: E.
    seed: of the balls' columns.
    size: pixels a side.
    balls: of a game.
    prize: reward of a ball that is caught, and price of one that is missed.
    max_steps: a game is cut off after so many steps; one number, or one an environment.
  """

  num_actions = 3

  def __init__(self, game, num_envs, seed, size=84, balls=1, max_steps=27_000, prize=1):
    self._generators = [np.random.default_rng([seed, e]) for e in range(num_envs)]
    self._size, self._balls, self._max_steps, self._prize, self._n = (
      size,
      balls,
      max_steps,
      prize,
      num_envs,
    )

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()

  def close(self):
    pass

  def reset(self):
    self._ball = np.zeros((self._n, 2), int)  # row, column
    self._paddle, self._left, self._steps = (np.zeros(self._n, int) for _ in range(3))
    self.score, self._over = np.zeros(self._n), np.ones(self._n, bool)
    self._stacks = np.zeros((self._n, self._size, self._size, 4), np.uint8)
    return self.step(np.zeros(self._n, int)).stacks

  def step(self, actions):
    first = self._over.copy()
    reward, life_lost = np.zeros(self._n, np.float32), np.zeros(self._n, bool)
    for e in range(self._n):
      if first[e]:
        self._paddle[e], self._left[e], self._steps[e], self.score[e] = (
          COLUMNS // 2,
          self._balls,
          0,
          0,
        )
        self._ball[e] = 0, self._generators[e].integers(COLUMNS)
        self._stacks[e] = 0
      else:
        self._steps[e] += 1
        self._paddle[e] = np.clip(self._paddle[e] + actions[e] - 1, 0, COLUMNS - 1)
        self._ball[e, 0] += 1
        if self._ball[e, 0] == ROWS - 1:
          reward[e] = self._prize if self._ball[e, 1] == self._paddle[e] else -self._prize
          self._left[e] -= 1
          life_lost[e] = reward[e] < 0 or not self._left[e]
      self._stacks[e] = np.concatenate([self._stacks[e][..., 1:], self._picture(e)[..., None]], -1)
      if reward[e]:
        self._ball[e] = 0, self._generators[e].integers(COLUMNS)
    self.score = self.score + reward
    game_over = ~first & (self._left == 0)
    truncated = ~first & ~game_over & (self._steps == self._max_steps)
    self._over = game_over | truncated
    return Step(
      self._stacks.copy(), reward, life_lost, game_over, truncated, first, self.score.copy()
    )

  def _picture(self, e):
    picture = np.zeros((self._size, self._size), np.uint8)
    h, w = self._size // ROWS, self._size // COLUMNS
    for row, column in (self._ball[e], (ROWS - 1, self._paddle[e])):
      picture[row * h : (row + 1) * h, column * w : (column + 1) * w] = 255
    return picture
