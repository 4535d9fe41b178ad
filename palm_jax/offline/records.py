"""Records of what an agent did, and the environments they come from."""

import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from palm_jax.base.errors import UserError
from palm_jax.base.files import replacing
from palm_jax.base.signals import raise_if_interrupted
from palm_jax.world import origins
from palm_jax.world.config import from_config

WORLD = 'world'  # the latent world of the config
LONGEST = 10_000  # steps of an episode


class Record(NamedTuple):
  """N steps, none of which crosses an episode's end.

  Attributes:
    observations, next_observations: (N, O) float32.
    actions: (N, A) float32 in [-1, 1].
    rewards: (N,) float32.
    terminated: (N,) bool: a true end, after which nothing has a value.
    episode: (N,) int32 number of the episode that a step is of.
    ended: (N,) bool: the last step of its episode, by a true end or a cut of the environment's;
      None in what older versions recorded.
  """

  observations: Any
  actions: Any
  rewards: Any
  next_observations: Any
  terminated: Any
  episode: Any
  ended: Any = None


class Episode(NamedTuple):
  """The first episode of each of E environments.

  Attributes:
    returns, discounted: (E,) sums of rewards, as they are and by gamma.
    observations, actions: (E, O), (E, A) of their first steps.
  """

  returns: np.ndarray
  discounted: np.ndarray
  observations: np.ndarray
  actions: np.ndarray


def make_world(config: ConfigDict, workdir: pathlib.Path) -> Any:
  """(LatentManifold, Params) that all environments of a job share; None with Gymnasium's own.

  Raises:
    UserError: what `world.make` or `load_generator` refuse.
  """
  return from_config(config, workdir) if config.offline.environment == WORLD else None


def make_envs(config: ConfigDict, world: Any, count: int) -> Any:
  """Gymnasium environments, `count` at once, of flat float observations and actions in [-1, 1].

  Args:
    config: the whole config.
    world: of `make_world`.
    count: how many.

  Raises:
    UserError: gymnasium is missing, or the environment is unknown, not of that kind, or of actions
      without bounds.
  """
  name = config.offline.environment
  try:
    import gymnasium
    from gymnasium.wrappers.vector import FlattenObservation, RescaleAction
  except ImportError as e:
    raise UserError("--job=offline plays by Gymnasium: pip install 'gymnasium>=1.1'") from e
  if name == WORLD:
    from palm_jax.world.gym import LatentManifoldVectorEnv

    return LatentManifoldVectorEnv(count, world=world)
  try:
    envs = gymnasium.make_vec(name, num_envs=count, vectorization_mode='sync')
  except (gymnasium.error.Error, ImportError, TypeError) as e:
    raise UserError(
      f'offline.environment={name!r} cannot be made ({e}): give {WORLD!r} or the id of a Gymnasium '
      'environment that is installed'
    ) from e
  spaces, box = (envs.single_observation_space, envs.single_action_space), gymnasium.spaces.Box
  if not isinstance(spaces[0], box) or not isinstance(spaces[1], box):
    raise UserError(
      f'offline.environment={name!r} has observations {spaces[0]} and actions {spaces[1]}: both '
      'must be boxes of numbers'
    )
  if len(spaces[1].shape) != 1:
    raise UserError(
      f'offline.environment={name!r} has actions of shape {spaces[1].shape}: expected vectors'
    )
  if not spaces[1].is_bounded():
    raise UserError(
      f'offline.environment={name!r} has actions {spaces[1]} without bounds, which nothing can '
      'rescale from [-1, 1]: give an environment whose actions have bounds'
    )
  edge = np.ones(envs.single_action_space.shape or (), np.float32)
  return RescaleAction(FlattenObservation(envs), -edge, edge)


class Player:
  """Plays in environments, and remembers where it is.

  Args:
    envs: of `make_envs`, which begin an episode in the step after the last one's end.
  """

  def __init__(self, envs: Any):
    self.envs = envs

  def begin(self, seed: int) -> None:
    """New episodes in all environments."""
    self._seen, _ = self.envs.reset(seed=seed)
    self._seen = np.array(self._seen, np.float32)  # an array of the environment may be reused
    self._ended = np.zeros(self.envs.num_envs, bool)
    self._episode = np.arange(self.envs.num_envs, dtype=np.int32)

  def play(self, act: Callable, steps: int) -> Record:
    """Plays on.

    Args:
      act: (observations (E, O), step) -> (E, A) in [-1, 1].
      steps: of each environment.

    Returns:
      Record, without the steps that only begin an episode.
    """
    rows = []
    for t in range(steps):
      seen, begins, episode = self._seen, self._ended, self._episode
      actions = np.array(act(seen, t), np.float32)  # a copy: wrappers may write into it
      rewards, terminated = self._step(actions)
      row = seen, actions, rewards, self._seen, terminated, episode, self._ended
      rows.append([x[~begins] for x in row])
    return join([Record(*row) for row in rows])

  def _step(self, actions):
    seen, rewards, terminated, truncated, _ = self.envs.step(actions)
    self._seen = np.array(seen, np.float32)
    self._episode = self._episode + self.envs.num_envs * self._ended
    self._ended = (terminated | truncated) & ~self._ended
    return np.array(rewards, np.float32), np.array(terminated, bool)

  def episode(self, act: Callable, seed: int, gamma: float, most: int = LONGEST) -> Episode:
    """Plays one episode in each environment; those longer than `most` steps are cut there."""
    self.begin(seed)
    first, alive, begun = self._seen, np.ones(self.envs.num_envs, bool), None
    total, discounted = np.zeros(len(first)), np.zeros(len(first))
    for t in range(most):
      actions = np.array(act(self._seen, t), np.float32)
      begun = actions if begun is None else begun
      rewards, _ = self._step(actions)
      total += np.where(alive, rewards, 0)
      discounted += np.where(alive, gamma**t * rewards, 0)
      alive &= ~self._ended
      if not alive.any():
        break
    return Episode(total, discounted, first, np.asarray(begun))


def join(parts: Sequence[Record]) -> Record:
  """One record of several, in their order."""
  return Record(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def take(record: Record, count: int) -> Record:
  """The first steps."""
  return Record(*(x[:count] for x in record))


def mean_return(record: Record) -> float:
  """Of its whole episodes: those cut by the record's end are left out.

  Where it does not say which are whole, or none is, the longest are taken for them.
  """
  _, numbers = np.unique(record.episode, return_inverse=True)
  lengths = np.bincount(numbers)
  whole = np.zeros(len(lengths), bool)
  if record.ended is not None:
    whole[numbers[record.ended]] = True
  if not whole.any():
    whole = lengths == lengths.max()
  return float(np.bincount(numbers, record.rewards)[whole].mean())


def save(path: pathlib.Path, record: Record, origin: Mapping[str, str] | None = None) -> None:
  """Writes it whole, or nothing, and beside it its origin (`origins.of_world`). Raises OSError."""
  with replacing(path) as file:
    np.savez(file, **record._asdict(), origin=json.dumps(origin or {}))


def load(path: pathlib.Path, origin: Mapping[str, str] | None = None) -> Record:
  """What `save` wrote. Raises UserError where it is damaged, or of another origin."""
  try:
    with np.load(path) as file:
      arrays = dict(file)
    before = json.loads(str(arrays.pop('origin', '{}')))
    record = Record(**arrays)
  except Exception as e:  # numpy and zipfile raise a dozen kinds on damage
    raise_if_interrupted(e)
    raise UserError(
      f'{path} is damaged ({type(e).__name__}): delete it, and it is recorded again'
    ) from e
  origins.check(path, before, origin or {})
  return record
