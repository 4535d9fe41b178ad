"""The 26 games of Atari-100k, many at a time, with the settings of the DQN line of work.

A step is four frames with one action; an observation is the maximum of the last two, grey, 84x84; a
stack is four of them. No FIRE is pressed at a reset and actions are not sticky, as in dopamine
(labs/atari_100k), dqn_zoo, SPR and SGI. The emulator is ale-py with the games in its wheel, an
optional extra: its licence is the GPL-2.0, so it is imported only when a game is opened.
"""

import difflib
import re
from typing import Any, NamedTuple, Self

import numpy as np
from ml_collections import ConfigDict

from palm_jax.base.errors import UserError

GAMES = (
  'Alien',
  'Amidar',
  'Assault',
  'Asterix',
  'BankHeist',
  'BattleZone',
  'Boxing',
  'Breakout',
  'ChopperCommand',
  'CrazyClimber',
  'DemonAttack',
  'Freeway',
  'Frostbite',
  'Gopher',
  'Hero',
  'Jamesbond',
  'Kangaroo',
  'Krull',
  'KungFuMaster',
  'MsPacman',
  'Pong',
  'PrivateEye',
  'Qbert',
  'RoadRunner',
  'Seaquest',
  'UpNDown',
)
FRAMES_A_STEP = 4
SETTINGS = (
  'frame skip 4, maximum of the last 2, cut off after 27,000 steps, 0..29 noops, no FIRE at reset, '
  'no sticky actions'
)


class Step(NamedTuple):
  """What a step of N games gave.

  A transition leads from the stacks before to these, unless `first`.

  Attributes:
    stacks: (N, 84, 84, 4) uint8, oldest frame first; zeros before a game's first frame.
    reward: (N,) float32, as the game counts: neither clipped nor scaled.
    life_lost: (N,) bool, the last life too; the game continues unless `game_over`.
    game_over: (N,) bool, the game ended by its own rules.
    truncated: (N,) bool, cut off at max_steps and not over.
    first: (N,) bool, the stack is a new game's first. Its action was ignored and has no reward, so
      there is no transition to store.
    score: (N,) float64, sum of the game's rewards so far.
  """

  stacks: np.ndarray
  reward: np.ndarray
  life_lost: np.ndarray
  game_over: np.ndarray
  truncated: np.ndarray
  first: np.ndarray
  score: np.ndarray


def rom_id(game: str) -> str:
  """ale-py's name of a game, such as 'ms_pacman' of 'MsPacman'.

  Raises:
    UserError: it is not one of GAMES.
  """
  if game not in GAMES:
    plain = {re.sub(r'[^a-z]', '', known.lower()): known for known in GAMES}
    near = difflib.get_close_matches(re.sub(r'[^a-z]', '', str(game).lower()), plain, 1)
    hint = f'did you mean {plain[near[0]]}? ' if near else ''
    raise UserError(f'unknown Atari game {game!r}: {hint}expected one of {", ".join(GAMES)}')
  return re.sub(r'(?<=.)([A-Z])', r'_\1', game).lower()


def require_game(config: ConfigDict, job: str) -> None:
  """Raises UserError where a config has no game, which a job plays."""
  if 'atari' not in config:
    raise UserError(
      f'job {job!r} plays a game of Atari, but {config.name} has none: give '
      '--config=configs/atari.py:GAME'
    )
  rom_id(config.atari.game)


class Environment:
  """N games side by side; a context manager.

  A new game follows a game over or a truncation: the next step only starts it (`first`). Everything
  is a function of seed, a game's number in the batch, and the actions; game i is the same whatever
  num_envs is.

  Args:
    game: one of GAMES.
    num_envs: N.
    seed: whole number of at least 0. It decides how many frames without action a game starts with,
      and sticky actions.
    max_steps: agent steps after which a game is cut off; 27,000 are the 108,000 frames, or half an
      hour, of the literature.
    noop_max: a game starts with 0 to noop_max - 1 frames without action, evenly (dqn_zoo and SPR
      have 1 to 30).
    sticky: probability that a frame repeats the action before; 0 in Atari-100k, dopamine's 200M
      frames have 0.25.

  Attributes:
    num_actions: of the game's own minimal set, 3 to 18; actions are 0 to num_actions - 1, and 0
      does nothing.

  Raises:
    UserError: an unknown game, invalid settings, or no ale-py.
  """

  def __init__(
    self,
    game: str,
    num_envs: int,
    seed: int,
    max_steps: int = 27_000,
    noop_max: int = 30,
    sticky: float = 0.0,
  ) -> None:
    rom = rom_id(game)
    for name, value, least in (
      ('num_envs', num_envs, 1),
      ('seed', seed, 0),
      ('max_steps', max_steps, 1),
      ('noop_max', noop_max, 0),
    ):
      if not isinstance(value, (int, np.integer)) or value < least:
        raise UserError(
          f'{name}={value!r} of the Atari environment: expected a whole number of at least {least}'
        )
    if not 0 <= sticky <= 1:
      raise UserError(f'sticky={sticky!r} of the Atari environment: expected a probability, 0 to 1')
    try:
      from ale_py.vector_env import AtariVectorEnv
    except ImportError as e:
      raise UserError(
        f"Atari games need ale-py 0.12 and gymnasium ({e}): pip install 'ale-py>=0.12' "
        "'gymnasium>=1.0', or this package with its extra, palm_jax[atari]"
      ) from e
    self._emulator = AtariVectorEnv(
      rom,
      int(num_envs),
      frameskip=FRAMES_A_STEP,
      max_num_frames_per_episode=FRAMES_A_STEP * int(max_steps),
      noop_max=int(noop_max),
      repeat_action_probability=float(sticky),
      autoreset_mode='NextStep',
      life_loss_info=True,  # episodic_life=True would start the whole game anew at each lost life
      use_fire_reset=False,
      reward_clipping=False,
    )
    actions: Any = self._emulator.single_action_space
    self.num_actions = int(actions.n)
    self._max_steps = max_steps
    self._num_envs = int(num_envs)
    # ale-py's own seeds, seed + i, would give runs with neighbouring seeds the same games.
    seeds = np.random.SeedSequence(seed).generate_state(self._num_envs)
    self._seeds = seeds.astype(np.int64) % 2**31

  def reset(self) -> np.ndarray:
    """Starts all games, each time in the same way; stacks (N, 84, 84, 4) uint8."""
    observations, info = self._emulator.reset(seed=self._seeds)
    self._lives = info['lives'].copy()
    self._steps = np.zeros(self._num_envs, np.int64)
    self._score = np.zeros(self._num_envs)
    self._ended = np.zeros(self._num_envs, bool)
    return _stacks(observations)

  def step(self, actions: np.ndarray) -> Step:
    """Plays actions (N,), whole numbers.

    Raises:
      UserError: actions of another shape or type, or that the game does not have.
    """
    actions = np.asarray(actions)
    if actions.shape != (self._num_envs,) or not np.issubdtype(actions.dtype, np.integer):
      raise UserError(
        f'actions are {actions.dtype} {actions.shape}, expected whole numbers '
        f'({self._num_envs},): one a game'
      )
    if not ((0 <= actions) & (actions < self.num_actions)).all():
      raise UserError(
        f'actions {actions.min()} to {actions.max()}, expected 0 to {self.num_actions - 1}: '
        'the game has no others'
      )
    observations, reward, terminated, _, info = self._emulator.step(actions.astype(np.int64))
    first, lives = self._ended, info['lives'].copy()
    # ale-py says nothing when lives fall to 0 and play goes on, as in BankHeist; dopamine counts
    # that as a lost life, too.
    life_lost = terminated | ((lives < self._lives) & ~first)
    game_over = terminated & ((lives == 0) | (lives >= self._lives))
    self._steps = np.where(first, 0, self._steps + 1)
    # Counted here: ale-py ends the game but does not call it truncated when a life is lost in the
    # last step.
    truncated = (self._steps >= self._max_steps) & ~game_over
    self._score = np.where(first, 0.0, self._score + reward)
    self._lives, self._ended = lives, game_over | truncated
    return Step(
      _stacks(observations),
      reward.astype(np.float32),
      life_lost,
      game_over,
      truncated,
      first,
      self._score.copy(),
    )

  def close(self) -> None:
    """Ends the emulators' threads; there are no steps after it."""
    self._emulator.close()
    del self._emulator

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()


def _stacks(observations):
  """(N, 4, 84, 84) of the emulator -> (N, 84, 84, 4)."""
  return np.ascontiguousarray(observations.transpose(0, 2, 3, 1))
