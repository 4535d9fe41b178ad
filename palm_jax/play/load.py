"""The game of a command line: generator, run, real pictures; checked before anything compiles."""

import os
import pathlib
from typing import Any

from absl import logging
from ml_collections import ConfigDict

from palm_jax import (
  agent,
  encoder,
  environment,
  pairs,
  pretrain,
  replay,
  reward,
  sac,
  simsiam,
  worlds,
)
from palm_jax.base import devices
from palm_jax.base.errors import UserError, one_line
from palm_jax.base.files import user_path
from palm_jax.checkpoint import load_encoder
from palm_jax.data.arrays import Data
from palm_jax.data.load import load as load_data
from palm_jax.evaluate import play
from palm_jax.generator import load_generator
from palm_jax.play.game import Game, check_shape, open_game
from palm_jax.world import make
from palm_jax.world.config import settings_of
from palm_jax.world.views import pretrained

GENERATOR = 'cifar10-small'
# Sections of a run's config that its encoder, policy and world are made from.
SECTIONS = dict(
  encoder=encoder,
  environment=environment,
  pairs=pairs,
  pretrain=pretrain,
  replay=replay,
  reward=reward,
  sac=sac,
  simsiam=simsiam,
)
MEMORY = 512  # last frames that the reward compares with: 17 seconds at 30 frames/s
CLASSES = {  # of bundled generators, whose files have no names
  'cifar10-small': tuple(
    'airplane automobile bird cat deer dog frog horse ship truck'.split()  # CIFAR-10's
  )
}


def load_game(
  generator: str | None = None,
  workdir: str | os.PathLike | None = None,
  data: str | None = None,
) -> Game:
  """Reads what the flags name, compiles the world's step and opens the game.

  Args:
    generator: path or name for `load_generator`; None is the workdir's own, or GENERATOR.
    workdir: of a pretraining run, by whose encoder features and rewards are, and whose agent may
      play; None: an encoder with random weights.
    data: of real pictures, for `data.load`; None: there are none.

  Raises:
    UserError: whatever is missing, damaged or does not fit.
  """
  found = None if data is None else load_data(data)
  if workdir is None:
    config, step = ConfigDict(dict(environment=environment.default_config())), 0
    used = load_generator(generator or GENERATOR)
  else:
    workdir = user_path(workdir)
    config, step = run_config(workdir)
    config.generator.path = generator or config.generator.path
    used = worlds.load_world_generator(config, workdir)
  path = config.generator.path if workdir is not None else generator or GENERATOR
  if found is not None:
    check_shape(found, used.image_shape)
  e = config.environment
  policy, why_not = (), 'Start with --workdir= of a pretraining run to see its agent play.'
  features: Any = 'random'
  if workdir is not None:
    height, width, channels = used.image_shape
    features = pretrained(workdir, (height, width, channels * e.stack), step)
    policy, why_not = load_agent(config, workdir, used, step)
  settings: dict[str, Any] = settings_of(e)
  settings['episode_length'] = None  # the page has its own
  world, params = make(
    used,
    'entropy',
    encoder=features,
    **settings,
    memory=MEMORY,
  )
  about = dict(
    generator=str(path or workdir),
    features='an untrained encoder' if workdir is None else f'the encoder of {workdir}',
    trained=why_not,
    data=_about_data(found, used.image_shape),
  )
  logging.info('play: compiling one step of the world, then drawing a map of it')
  names = CLASSES.get(str(path), ()) or _names(found, used.num_classes)
  return open_game(world, params, policy, config.get('sac'), names, found, about)


def run_config(workdir: str | os.PathLike) -> tuple[ConfigDict, int]:
  """The config of a run, with today's defaults where an older run has no value; and its newest
  checkpoint's step.

  Raises:
    UserError: no pretraining there, or a config that is not one.
  """
  there, _, step = load_encoder(pathlib.Path(workdir))
  config = ConfigDict(dict(generator=dict(path='')))
  try:
    for name, module in SECTIONS.items():
      config[name] = module.default_config()
      config[name].update(there.get(name, {}))
    config.generator.path = there['generator']['path']
    config.seed = int(there.get('seed', 0))
  except (AttributeError, LookupError, TypeError, ValueError) as e:
    raise UserError(
      f'{workdir}/config.json is not the config of a pretraining ({one_line(e)}): give the '
      '--workdir of one'
    ) from e
  return config, step


def load_agent(
  config: ConfigDict, workdir: pathlib.Path, generator: Any, step: int
) -> tuple[Any, str]:
  """The agent of a run's checkpoint, as one that only acts, or (); and why there is none, or ''."""
  source = pairs.SOURCES.get(config.pairs.source)
  if source is None or not source.learns_policy:
    return (), f'{workdir} has no agent: its pairs are of pairs.source={config.pairs.source}.'
  mesh = devices.make_mesh(1)
  if config.reward.kind not in (*reward.OF_FEATURES, *reward.LEARNED):
    config.reward.kind = reward.default_config().kind  # someone's own; who only acts needs none
  try:
    program = pretrain.make_program(config, generator, mesh)
    template = play.policy_template(program, mesh)
    parts = play.load_policy(workdir / 'pretrain' / 'checkpoints', step, template)
  except UserError as e:
    logging.warning('play: no trained agent: %s', e)
    return (), f'No trained agent: {e}.'
  return agent.only_acting(parts), ''


def _about_data(data: Data | None, image_shape):
  if data is not None:
    return data.source.partition(';')[0]  # the rest counts pictures
  height, width, channels = image_shape
  kind = {1: 'grey', 3: 'colour'}.get(channels, f'{channels}-channel')
  known = {(8, 8, 1): ', or digits', (32, 32, 3): ', or cifar10'}.get(image_shape, '')
  return (
    f'Start with --data= of {height}x{width} {kind} pictures (an .npz, a folder of class '
    f'folders{known}) to see which are nearest.'
  )


def _names(data, num_classes):
  """The data's names of classes, where there are as many as the generator has."""
  return data.class_names if data is not None and len(data.class_names) == num_classes else ()
