"""What a run recorded, as a Minari data set for other people's agents.

  python -m palm_jax.world.dataset --workdir=runs/cifar_small --name=palm/explored-v0 out/

Pictures are drawn again, bit for bit; --observations=features writes an encoder's features of them.
`minari.load_dataset` reads it where MINARI_DATASETS_PATH names the folder.
"""

import contextlib
import copy
import os
import pathlib
import shutil
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags, logging
from ml_collections import ConfigDict

from palm_jax import environment, experience, replay, worlds
from palm_jax.base import command
from palm_jax.base.digests import digest
from palm_jax.base.errors import UserError
from palm_jax.base.files import scratch, user_path
from palm_jax.base.steps import one_line
from palm_jax.checkpoint import load_config
from palm_jax.world import NAME, LatentManifold, make
from palm_jax.world.config import settings_of, views_of
from palm_jax.world.manifold import OBSERVATIONS
from palm_jax.world.tasks import TASKS

EPISODES = 256  # that are held at once
OVERHEAD = 32_768  # bytes of an episode's HDF5 groups, besides its numbers
WORLD, FEATURES = 'palm_jax_world', 'palm_jax_features'  # digests in a data set's metadata


def identity(world: LatentManifold) -> dict[str, str]:
  """{name: digest} of the generator and, where observations are features, of the encoder."""
  found = {WORLD: digest(world.generator.variables, getattr(world.generator, 'changes', {}))}
  if world.observations == 'features' and world.features is not None:
    found[FEATURES] = digest(world.features.variables, {})
  return found


def write(
  workdir: str | os.PathLike,
  root: str | os.PathLike,
  name: str = 'palm/explored-v0',
  observations: str = 'pixels',
  task: str = 'none',
  encoder: str = '',
  goal: int = 0,
  label: int = -1,
) -> pathlib.Path:
  """Writes what a pretraining recorded (pretrain.record) as a Minari data set.

  Each episode holds one observation more than actions. Rewards are the task's; all episodes are
  cut, none terminates.

  Args:
    workdir: of the run.
    root: folder of Minari data sets.
    name: of the data set, as Minari wants it.
    observations, task, goal: of `world.make`.
    encoder: workdir of a pretraining, or 'random'; '' is the run's own.
    label: class of the episodes that are written, and of `world.make`; -1 writes all. Rewards of
      'entropy' are among the episodes of all classes.

  Returns:
    The folder of the data set.

  Raises:
    UserError: no record, one without actions or episodes of the class, a generator that is not
      there, or another than was played in, a data set that is there, or Minari is missing.
  """
  minari = import_minari()
  workdir, root = (user_path(path) for path in (workdir, root))
  target = root / name
  if target.exists():
    raise UserError(f'{target} holds something already: choose another --name, or delete it')
  config = ConfigDict(load_config(workdir))
  generator = worlds.load_world_generator(config, workdir)
  experience.check_generator(workdir, generator)
  needs = task != 'none' or observations == 'features'
  settings: dict[str, Any] = dict(
    task=task,
    observations=observations,
    label=label,
    **settings_of(config.environment),
    encoder=(encoder or str(workdir)) if needs else None,
  )
  if task == 'goal':
    settings['goal'] = goal
  world, params = make(generator, **settings)
  buffers = _episodes(world, params, workdir / 'pretrain' / 'experience', config)
  first = next(filter(None, buffers), None)
  if first is None:
    of_class = '' if label < 0 else f' of class {label}'
    raise UserError(f'{workdir} recorded no episode of two pictures{of_class}: pretrain longer')
  with scratch(root) as part:
    _check_space(root, first)
    with _minari_in(part):
      path = str(config.generator.path or workdir)
      named = _named_env(world, dict(settings, **views_of(config.environment), generator=path))
      with _refusals_of_minari(f'{workdir}: '):
        made = minari.create_dataset_from_buffers(
          name, first, env=named, algorithm_name='PALM', jpeg_encoding=False
        )
      for more in filter(None, buffers):
        _check_space(root, more)
        made.update_dataset_from_buffer(more)
      made.storage.update_metadata(identity(world))
    target.parent.mkdir(parents=True, exist_ok=True)
    os.rename(part / name, target)
  logging.info('%s: %d episodes of %d steps', target, made.total_episodes, made.total_steps)
  return target


def _episodes(world, params, folder, config) -> Iterator[list]:
  """Lists of Minari's EpisodeBuffer, in the order in which episodes end."""
  show = jax.jit(_show, static_argnums=0)
  open_episodes, ended, state = {}, [], None
  of_class = int(params.label)
  for part in experience.read(folder):
    if not part.action.shape[-1]:
      raise UserError(
        f'{folder} holds no actions: it was recorded by an older version; record again'
      )
    for row in zip(*part, strict=True):
      state, rewards = show(world, params, row, state)
      observed = np.asarray(world.observe(state))
      actions = np.asarray(replay.unpack(jnp.asarray(row[3]), jnp.float32))
      for env in range(len(observed)):
        if row[2][env] == 0 and env in open_episodes:
          ended.append(open_episodes.pop(env))
        if of_class in (-1, row[1][env]):
          step = observed[env], actions[env], float(rewards[env])
          open_episodes.setdefault(env, []).append(step)
      if len(ended) >= EPISODES:
        yield [buffer for buffer in map(_buffer, ended) if buffer]
        ended = []
  yield [buffer for buffer in map(_buffer, [*ended, *open_episodes.values()]) if buffer]


def _show(world, params, row, before):
  """The pictures of a row of the record after those before it -> State, rewards (E,).

  Each environment shows its own class, whatever params.label is: a task's memory is of all.
  """
  z, label, step, _ = row
  if before is None:
    seen = jnp.zeros((len(step), *world.image_shape), jnp.uint8)
  else:
    seen = before.seen
  env = environment.EnvState(z=z, label=label, step=step)
  state = world.show(env, seen, params.replace(label=-1))
  memory = world.task.init(state.features) if before is None else before.memory
  if before is None:
    return state.replace(memory=memory), jnp.zeros(len(step))
  memory, rewards = world.task.reward(params.task, memory, state.features, step == 0)
  return state.replace(memory=memory), rewards


def _buffer(episode):
  """Minari's EpisodeBuffer of (observation, action, reward) a picture; None of a single one."""
  from minari.data_collector import EpisodeBuffer

  observations, actions, rewards = (list(x) for x in zip(*episode, strict=True))
  steps = len(observations) - 1
  if not steps:
    return None
  return EpisodeBuffer(
    observations=observations,
    actions=actions[:steps],  # that of the last picture was not done
    rewards=rewards[1:],
    terminations=[False] * steps,
    truncations=[i == steps - 1 for i in range(steps)],
    infos={},
  )


def _named_env(world, settings):
  """What Minari reads of an environment: its spaces, and how to make it."""
  import gymnasium

  from palm_jax.world.gym import action_space, observation_space

  class Named(gymnasium.Env):
    pass

  env = Named()
  env.observation_space, env.action_space = observation_space(world), action_space(world)
  spec = copy.deepcopy(gymnasium.spec(NAME))
  spec.kwargs.update({key: value for key, value in settings.items() if value is not None})
  env.spec = spec
  return env


@contextlib.contextmanager
def _minari_in(root):
  before = os.environ.get('MINARI_DATASETS_PATH')
  os.environ['MINARI_DATASETS_PATH'] = str(root)
  try:
    yield
  finally:
    os.environ.pop('MINARI_DATASETS_PATH')
    if before is not None:
      os.environ['MINARI_DATASETS_PATH'] = before


def _check_space(root, buffers):
  """Raises UserError where the disk could become full: HDF5 would end the process by a fault."""
  need = 0
  for buffer in buffers:
    step = [buffer.observations[0], buffer.actions[0], 0.0, True, True]
    need += OVERHEAD + len(buffer.rewards) * sum(np.asarray(x).nbytes for x in step)
  free = shutil.disk_usage(root).free
  if free < 1.1 * need:
    raise UserError(
      f'{root}: the disk has {free / 1e6:.2f} MB left, and {len(buffers)} episodes take some '
      f'{need / 1e6:.2f}: free space there, or name another folder'
    )


@contextlib.contextmanager
def _refusals_of_minari(words):
  """What Minari refuses, such as a name, in one line; it warns of all that is left out."""
  try:
    with warnings.catch_warnings(action='ignore', category=UserWarning):
      yield
  except (ValueError, TypeError) as e:
    raise UserError(f'{words}Minari refuses it: {one_line(e)}') from e


def import_minari() -> Any:
  """Minari. Raises UserError where it is not installed."""
  try:
    import minari
  except ImportError as e:
    raise UserError("Minari is not installed: pip install 'minari[hdf5]'") from e
  return minari


def parse_flags(argv: list[str]) -> list[str]:
  """Defines the flags and reads them; returns what absl leaves of argv. Raises UserError."""
  flags.DEFINE_string('workdir', '', 'Of the run that recorded (pretrain.record).')
  flags.DEFINE_string('name', 'palm/explored-v0', 'Of the data set, as Minari wants it.')
  flags.DEFINE_enum('observations', 'pixels', OBSERVATIONS, 'What is observed.')
  flags.DEFINE_enum('task', 'none', [x for x in TASKS if x != 'class'], 'What is rewarded.')
  flags.DEFINE_string('encoder', '', "A workdir, or 'random'; the run's own if empty.")
  flags.DEFINE_integer('goal', 0, 'Seed of the goal of --task=goal.')
  flags.DEFINE_integer('label', -1, 'Class of the episodes to write, and of the goal; -1: all.')
  return command.parse_flags(argv)


def main(argv: list[str]) -> None:
  """The command, after `parse_flags`. Raises UserError."""
  if len(argv) != 2:
    raise UserError(f'{len(argv) - 1} arguments: expected one, the folder to write to')
  given = flags.FLAGS
  if not given.workdir:
    raise UserError('--workdir is empty: give that of a run with --config.pretrain.record')
  command.start()
  path = write(
    given.workdir,
    argv[1],
    given.name,
    given.observations,
    given.task,
    given.encoder,
    given.goal,
    given.label,
  )
  print(f'{path}: MINARI_DATASETS_PATH={argv[1]} and minari.load_dataset({given.name!r}) read it')


if __name__ == '__main__':
  command.run(main, parse_flags)
