"""Minari data sets as records to learn from."""

import os
import pathlib
from typing import Any

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from palm_jax.base.errors import UserError
from palm_jax.base.files import user_path
from palm_jax.base.signals import raise_if_interrupted
from palm_jax.base.steps import one_line
from palm_jax.environment import default_config
from palm_jax.offline.records import Record, join
from palm_jax.world import NAME
from palm_jax.world.config import settings_of
from palm_jax.world.dataset import WORLD, import_minari
from palm_jax.world.tasks import Entropy

DYNAMICS = 'alpha', 'beta', 'episode_length', 'dynamics', 'start'  # not what is seen or rewarded


def load(
  name: str,
  envs: Any,
  expected: dict[str, str] | None = None,
  config: ConfigDict | None = None,
  environment: str = NAME,
) -> Record:
  """A Minari data set of vectors as a Record.

  Actions are rescaled to [-1, 1] from the bounds of the set's own action space, where it has any.

  Args:
    name: of `minari.load_dataset`, or a data set's folder.
    envs: environments in which is played; observations and actions must have their sizes.
    expected: `identity` of the world in which is played; data sets that name none fit any.
    config: the whole config, of that world; None with Gymnasium's own environments.
    environment: Gymnasium's id of what is played; the log says where the set is of another.

  Raises:
    UserError: Minari is missing, the data set is not there, damaged, empty, not of vectors, of
      actions out of their bounds, or of another world.
  """
  minari = import_minari()
  try:
    folder = user_path(name)
    found = minari.MinariDataset(folder / 'data') if folder.is_dir() else minari.load_dataset(name)
    about, made_with = found.storage.metadata, _made_with(found.spec.env_spec)
    _check_spaces(name, found.observation_space, found.action_space)
    _note_environment(name, found.spec.env_spec, environment)
    space = found.action_space
    episodes = list(found.iterate_episodes())
  except UserError:
    raise
  except Exception as e:  # h5py and Minari raise a dozen kinds
    raise_if_interrupted(e)
    raise UserError(
      f'the data set {name!r} cannot be read ({one_line(e)}): give a name of `minari list local`, '
      'or the folder of a data set'
    ) from e
  for key, value in (expected or {}).items():
    if about.get(key, value) != value:
      what = 'in the pictures of another generator' if key == WORLD else 'through another encoder'
      raise UserError(
        f'the data set {name!r} was recorded {what} (digest {about[key][:12]}, here {value[:12]}): '
        'give that in the config, or another data set'
      )
  if made_with and config:
    _check_settings(name, made_with, config)
  if not episodes:
    raise UserError(f'the data set {name!r} holds no episodes: give another')
  # An episode of the latent world is cut at its length, and one that a record cut is shorter.
  whole = made_with['episode_length'] - 1 if made_with else None
  return join(
    [_record_of(i, episode, name, envs, space, whole) for i, episode in enumerate(episodes)]
  )


def _made_with(spec) -> dict[str, Any]:
  """Settings of the latent world that a data set is of; {} where it is of another environment."""
  if spec is None or spec.id != NAME:
    return {}
  given = {key: value for key, value in spec.kwargs.items() if value is not None}
  # Those of `world.make` where it names none.
  return dict(task='none', goal=0, label=-1, **settings_of(default_config())) | given


def _check_spaces(name, observations, actions):
  """Raises UserError where a data set is not of vectors, before it is read."""
  flat = lambda space: len(space.shape or ()) == 1
  if not flat(observations) or not flat(actions) or observations.dtype == np.uint8:
    raise UserError(
      f'the data set {name!r} has observations {observations.dtype}{observations.shape} and '
      f'actions {actions.shape}: expected vectors; write one with --observations=features'
    )


def _note_environment(name, spec, plays):
  if spec is not None and spec.id != plays:
    logging.warning(
      'the data set %r was recorded in %s: learning is judged in %s', name, spec.id, plays
    )


def files(name: str) -> list[pathlib.Path]:
  """Those that a data set lies in; none where it is not there."""
  folder = user_path(name)
  if not folder.is_dir():
    folder = pathlib.Path(os.environ.get('MINARI_DATASETS_PATH', '~/.minari/datasets')) / name
  return [path for path in sorted(folder.expanduser().glob('data/*')) if path.is_file()]


def _check_settings(name, there, config):
  """Raises UserError where others are seen or rewarded; the log says where only dynamics differ."""
  w = config.world
  here = dict(task=w.task, label=w.label, **settings_of(config.environment))
  if w.task == 'goal':
    here['goal'] = w.goal
  # The config has none of these: rewards here are dense, and of the task's own k and memory.
  usual = Entropy()
  here |= dict(threshold=None, k=usual.k, memory=usual.memory)
  there = here | there
  differ = {
    key: f'{_section(key, config)}{key}={there[key]!r} there, {value!r} here'
    for key, value in here.items()
    if there[key] != value
  }
  dynamics = [differ.pop(key) for key in DYNAMICS if key in differ]
  if differ:
    raise UserError(
      f'the data set {name!r} is of another world ({"; ".join(differ.values())}): give that in the '
      'config, or another data set'
    )
  if dynamics:
    logging.warning(
      'the data set %r was recorded in other dynamics (%s): learning is judged in those here',
      name,
      '; '.join(dynamics),
    )


def _section(key, config):
  """The section of the config that has a key, and a point; '' where none has it."""
  return next((f'{name}.' for name in ('world', 'environment') if key in config[name]), '')


def check_there(name: str) -> None:
  """Raises UserError where no data set has the name, or Minari is missing; reads none."""
  minari = import_minari()
  if user_path(name).is_dir() or name in minari.list_local_datasets():
    return
  raise UserError(
    f'the data set {name!r} is not there: give a name of `minari list local`, or the folder of a '
    'data set'
  )


def _record_of(number, episode, name, envs, space, whole):
  seen, done = np.asarray(episode.observations), np.asarray(episode.actions)
  sizes = seen.shape[1], done.shape[1]
  expected = envs.single_observation_space.shape[0], envs.single_action_space.shape[0]
  if sizes != expected:
    raise UserError(
      f'the data set {name!r} has observations and actions of {sizes} numbers, the environment '
      f'has {expected}: set offline.environment to the one it was recorded in'
    )
  rewards = np.asarray(episode.rewards, np.float32)
  for what, values in dict(observations=seen, rewards=rewards).items():
    if not np.isfinite(values).all():
      raise UserError(
        f'the data set {name!r} has {what} that are not finite: give another data set'
      )
  seen, done = seen.astype(np.float32), _rescaled(done, space, name)
  terminated = np.asarray(episode.terminations, bool)
  ended = terminated | np.asarray(episode.truncations, bool)
  if whole is not None:
    ended[-1:] = len(done) == whole
  return Record(
    seen[:-1],
    done,
    rewards,
    seen[1:],
    terminated,
    np.full(len(done), number, np.int32),
    ended,
  )


def _rescaled(actions, space, name):
  """Actions (N, A) of a set's own space as the environments take them: float32 in [-1, 1]."""
  # Float32 like the actions, so that those at a bound come to -1 or 1 and not beyond; NaN: none.
  low, high = (
    np.asarray(getattr(space, bound, np.nan), np.float32).astype(np.float64)
    for bound in ('low', 'high')
  )
  bounded = bool((np.isfinite(low) & np.isfinite(high) & (low < high)).all())
  actions = actions.astype(np.float32)
  if bounded:  # changes no bit where they are -1 and 1
    actions = ((actions - (high + low) / 2) / ((high - low) / 2)).astype(np.float32)
  if not np.abs(actions).max(initial=0) <= 1:
    where = (
      'the bounds of its action space: clip them'
      if bounded
      else '[-1, 1], and its action space has no bounds to rescale them by: rescale them'
    )
    raise UserError(f'the data set {name!r} has actions outside {where}, or give another data set')
  return actions
