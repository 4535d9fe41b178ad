"""What the studies start from, at four scales.

  smoke   digits of scikit-learn, seconds a run: shows that a study works; its numbers say nothing
  digits  configs/digits.py with SimSiam's loss, some 2 minutes a run on one core
  laptop  configs/cifar.py:small on two CPU cores, about 6 minutes a run (5 of pretraining, 1 of
          probe); needs --config.data.name or --download
  paper   configs/cifar.py: accelerators; trains its generator first

A study's variant is one of them; laptop and paper may be followed by variants of configs/cifar.py,
for example configs/studies/figure3.py:paper,cifar100. PALM is alpha 0.95 and beta 0.75 in all
studies, the best cell of the paper's Figure 5; configs/studies/figure3.py:paper,paper_text takes
the numbers of its text instead. Some arms have budgets that are worked out from the scale's, so
change the config file, not --config.pretrain.env_steps.
"""

import math
from typing import NamedTuple

from ml_collections import ConfigDict

from configs import cifar, digits
from palm_jax import study
from palm_jax.base.errors import UserError

SCALES = ('smoke', 'digits', 'laptop', 'paper')
WITHOUT_WORDS = SCALES[:2]


class Base(NamedTuple):
  """What a study starts from."""

  config: ConfigDict  # of a run, with an empty section study
  scale: str
  train_images: int  # of the scale's data
  method: str  # of the linear probe

  @property
  def style_mixing(self) -> str:
    """Setting of an arm: fine layers take a new style; pictures of 8x8 have four layers in all."""
    return f'environment.style_mixing={2 if self.scale in WITHOUT_WORDS else 4}'

  def row(self, features: str = 'PALM encoder', method: str | None = None, rest: str = '') -> str:
    """Path of an accuracy in results/probe.json.

    Args:
      features: that were probed; not read of supervised training.
      method: None is the linear probe.
      rest: what else chooses the row.
    """
    chosen = f'features={features}, method={method or self.method}'
    if method == 'supervised':
      chosen = 'method=supervised'
    return f'probe/rows[{chosen}{rest}]/accuracy/clean'


def base(name: str, variant: str) -> Base:
  """What the study `name` starts from at the scale that its variant begins with.

  Raises:
    UserError: it begins with none, or a word behind it is unknown.
  """
  scale, *words = variant.split(',')
  if scale not in SCALES or (scale in WITHOUT_WORDS and words):
    raise UserError(
      f'configs/studies/{name}.py:{variant} is unknown: scales are {", ".join(SCALES)}, the last '
      'two followed by variants of configs/cifar.py'
    )
  if scale == 'smoke':
    c = smoke()
  elif scale == 'digits':
    c = small_pictures()
  elif scale == 'laptop':
    c = cifar.get_config(','.join(['small', *words]))
    c.pretrain.monitor_fraction = 0.5  # at 0.05 they take a sixth of so short a run
  else:
    c = cifar.get_config(','.join(words))
  if not set(words) & set(cifar.PRESETS):
    c.environment.alpha, c.environment.beta = cifar.PRESETS['paper_fig5']
  if scale != 'paper':
    c.probe.methods = ('lbfgs', 'knn')
  c.probe.pixels = False  # they are the same in every run
  c.name = f'{name}_{variant.replace(",", "_")}'
  c.jobs = ('study',)
  c.study = study.default_config()
  train_images = 1437 if scale in WITHOUT_WORDS else 50_000
  b = Base(c, scale, train_images, 'sgd' if scale == 'paper' else 'lbfgs')
  if scale == 'smoke':
    c.study.seeds = (0, 1)
  c.study.measures = (
    ('linear accuracy', b.row()),
    ('kNN accuracy', b.row(method='knn')),
    ('effective rank of h', 'pretrain/metrics/h_effective_rank'),
  )
  c.study.references = (
    ('untrained', 'PALM', 'linear accuracy', b.row('untrained encoder')),
    ('untrained', 'PALM', 'kNN accuracy', b.row('untrained encoder', 'knn')),
  )
  return b


def small_pictures() -> ConfigDict:
  """configs/digits.py with the paper's loss."""
  c = digits.get_config()
  c.simsiam.update(dict(objective='simsiam', temperature=0.5, mask_episode=False))
  c.diversity.num_images = 300
  return c


def smoke() -> ConfigDict:
  """Digits, everything small: the generator trains for seconds."""
  c = small_pictures()
  c.generator.update(
    dict(
      z_dim=8,
      w_dim=8,
      mapping_layers=2,
      channel_base=64,
      channel_max=8,
      d_channel_base=64,
      d_channel_max=8,
      kimg=3.2,
      ema_kimg=1.0,
      iterations_per_call=20,
    )
  )
  c.replay.capacity = 8192
  c.encoder.width = 4
  c.simsiam.update(dict(proj_hidden=32, proj_dim=32, pred_hidden=16))
  c.sac.update(dict(hidden=(32, 32), trunk=16))
  c.pretrain.update(
    dict(
      env_steps=7168,
      batch_size=64,
      updates_per_iteration=2,
      warmup_steps=1024,
      iterations_per_call=4,
      monitor_fraction=1.0,
    )
  )
  for method in ('finetune', 'supervised'):
    c.probe[method].update(dict(epochs=2, warmup=0.2))
  return c


def with_samples(c: ConfigDict, times: int) -> tuple[int, str]:
  """The run with a `times`-th of the samples and as many updates: each is seen `times` as often.

  Returns:
    (env steps, settings of a study's arm).

  Raises:
    UserError: the number of updates is no multiple of `times`.
  """
  p = c.pretrain
  block = p.num_envs * p.rollout_length
  iterations = math.ceil(p.env_steps / block / p.iterations_per_call) * p.iterations_per_call
  warm = math.ceil(p.warmup_steps / block)
  blocks, rest = divmod(iterations - warm, times)
  if rest:
    raise UserError(
      f'{iterations - warm} iterations with updates are no multiple of {times}: choose other sizes'
    )
  iterations = blocks + warm
  # No more updates a call, and so a line of progress, than the base run has.
  most = max(1, p.iterations_per_call // times)
  per_call = max(n for n in range(1, most + 1) if iterations % n == 0)
  return iterations * block, (
    f'pretrain.env_steps={iterations * block} pretrain.iterations_per_call={per_call} '
    f'pretrain.updates_per_iteration={times * p.updates_per_iteration}'
  )
