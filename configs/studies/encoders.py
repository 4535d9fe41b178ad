r"""Every encoder and every objective, each beside its own untrained encoder.

  python -m palm_jax.main --config=configs/studies/encoders.py:smoke
  python -m palm_jax.main --config=configs/studies/encoders.py:digits

digits: configs/digits.py with half its env steps, 33 runs of 1 to 7 minutes of one core in one
generator, which is trained first. The Nature CNN needs pictures of 36 pixels a side and more, so it
is not here. VICReg diverged at the others' learning rate; the rates here were not searched.
"""

from ml_collections import ConfigDict

from configs import cifar
from configs.studies import scales

BASE = 'resnet18, simclr'
SLOWER = {'vicreg': 10, 'barlow': 10, 'vit_tiny': 3, 'vit_small': 3}  # by what the rate is divided


def get_config(variant: str = 'digits') -> ConfigDict:
  """The config of a scale; see above."""
  b = scales.base('encoders', variant)
  c = b.config
  c.simsiam.update(cifar.CONTRASTIVE)
  if b.scale == 'digits':
    c.pretrain.env_steps = 50_000
  few = b.train_images < 50_000  # pixels: 8 a side, not 32
  patches = {'vit_tiny': 2 if few else 4, 'vit_small': 4 if few else 8}

  def rate(name):
    return f' simsiam.lr={c.simsiam.lr / SLOWER[name]:.3g}' if name in SLOWER else ''

  objectives = [
    (
      f'resnet18, {name}',
      f'simsiam.objective={name} simsiam.mask_episode=False{rate(name)}',
    )
    for name in ('simsiam', 'byol', 'vicreg', 'barlow', 'supcon')
  ]
  names = 'resnet34', 'resnet50', *patches
  encoders = [
    (
      f'{name}, simclr',
      f'encoder.name={name}{rate(name)}'
      + (f' encoder.patch={patches[name]}' if name in patches else ''),
    )
    for name in names
  ]
  c.study.arms = ((BASE, ''), *objectives, *encoders, ('bfloat16', 'pretrain.dtype=bfloat16'))
  linear, knn, rank = c.study.measures
  c.study.measures = knn, linear, rank
  c.study.references = tuple(
    (f'untrained {name}', f'{name}, simclr', f'{measure} accuracy', b.row('untrained encoder', how))
    for name in ('resnet18', *names)
    for measure, how in (('linear', None), ('kNN', 'knn'))
  )
  c.study.orderings = tuple(
    f'{arm} > untrained {arm.split(",")[0]}' for arm, _ in c.study.arms if arm != 'bfloat16'
  )
  return c
