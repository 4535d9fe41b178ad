"""Every number of a config is finite, of the right type and in a range that can mean something."""

import importlib
from typing import Any

from ml_collections import ConfigDict

from palm_jax.base import checks
from palm_jax.base.errors import UserError

# section: the module that reads it, and says in RANGES what its numbers may be
SECTIONS = {
  'data': 'palm_jax.data.load',
  'environment': 'palm_jax.environment',
  'replay': 'palm_jax.replay',
  'pairs': 'palm_jax.pairs',
  'encoder': 'palm_jax.encoder',
  'simsiam': 'palm_jax.simsiam',
  'reward': 'palm_jax.reward',
  'sac': 'palm_jax.sac',
  'pretrain': 'palm_jax.pretrain',
  'generator': 'palm_jax.generator.networks',
  'plan': 'palm_jax.speed.plan',
  'benchmark': 'palm_jax.speed.benchmark',
  'world': 'palm_jax.world.config',
  'offline': 'palm_jax.offline.train',
  'meta': 'palm_jax.meta.train',
  'features': 'palm_jax.evaluate.features',
  'probe': 'palm_jax.evaluate.probe',
  'ood': 'palm_jax.evaluate.ood',
  'diversity': 'palm_jax.evaluate.diversity',
  'quality': 'palm_jax.evaluate.quality',
  'concepts': 'palm_jax.evaluate.concepts',
  'report': 'palm_jax.report',
  'collect': 'palm_jax.atari.collect',
  'finetune': 'palm_jax.atari.finetune',
  'scores': 'palm_jax.atari.scores',
  'study': 'palm_jax.study',
}
NEEDED = 'name', 'seed', 'jobs', 'data', 'generator', 'environment'  # what all jobs read
OWN = dict(seed=checks.Range(0, 2**32 - 1))  # jax.random.key takes no more bits


def check(config: ConfigDict) -> None:
  """Raises UserError on a number of the whole config that means nothing, whatever the job."""
  for name in NEEDED:
    if name not in config:
      raise UserError(f'the config has no {name}: take one of configs/ and change what differs')
  checks.finite(config)
  checks.ranges('', config, ranges(config))


def ranges(config: ConfigDict) -> dict[str, Any]:
  """{key or section: what its numbers may be} of the whole config."""
  there = [name for name in SECTIONS if name in config]
  return OWN | {name: importlib.import_module(SECTIONS[name]).RANGES for name in there}
