"""A world as a config describes it: its sections `world`, `environment` and `generator`."""

import pathlib
from typing import Any

from ml_collections import ConfigDict

from palm_jax.base import checks
from palm_jax.base.errors import UserError
from palm_jax.generator import load_generator
from palm_jax.world import make
from palm_jax.world.manifold import OBSERVATIONS, LatentManifold, Params
from palm_jax.world.tasks import TASKS


def default_config() -> ConfigDict:
  return ConfigDict(
    dict(
      task='goal',  # of world/tasks.py
      observations='features',  # what the agent sees: 'pixels' or 'features'
      encoder='random',  # whose features: workdir of a pretraining, or 'random'
      label=-1,  # class of all episodes; -1 draws one for each
      goal=0,  # seed of the goal's latent
    )
  )


RANGES = dict(label=checks.Range(-1, 10**6), goal=checks.Range(0, 2**31 - 1))


def check(c: ConfigDict) -> None:
  """Raises UserError on invalid settings of the config's section `world`."""
  checks.ranges('world', c, RANGES)
  checks.choice('world.task', c.task, TASKS)
  if c.task == 'class':
    raise UserError("world.task='class' needs a head, which no config has: call world.make")
  checks.choice('world.observations', c.observations, OBSERVATIONS)


def settings_of(e: ConfigDict) -> dict[str, Any]:
  """A config's section `environment` as settings of `world.make`."""
  names = 'alpha', 'beta', 'truncation_psi', 'episode_length', 'dynamics', 'start', 'stack'
  return {name: e[name] for name in names}


def views_of(e: ConfigDict) -> dict[str, Any]:
  """The rest of that section: what `world.make` makes of a generator that is not seen so yet."""
  return {name: e[name] for name in ('latent_space', 'style_mixing', 'crop')}


def from_config(
  config: ConfigDict, workdir: pathlib.Path, **others: Any
) -> tuple[LatentManifold, Params]:
  """The world of a config, in the generator of config.generator.path or the workdir's own.

  Args:
    config: the whole config.
    workdir: pathlib.Path.
    **others: of `make`, in place of what the config says.

  Raises:
    UserError: what `make` or `load_generator` refuse.
  """
  w = config.world
  settings = dict(
    task=w.task,
    observations=w.observations,
    encoder=w.encoder,
    label=w.label,
    **settings_of(config.environment),
    **views_of(config.environment),
  )
  if w.task == 'goal':
    settings['goal'] = w.goal
  return make(load_generator(config.generator.path or workdir), **(settings | others))
