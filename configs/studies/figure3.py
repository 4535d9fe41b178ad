r"""Figure 3: accuracy of PALM beside SimSiam, SimCLR and supervised training on real images.

  python -m palm_jax.main --config=configs/studies/figure3.py:smoke
  python -m palm_jax.main --config=configs/studies/figure3.py:laptop \
    --config.data.name=train.npz,test.npz
  python -m palm_jax.main --config=configs/studies/figure3.py:paper,cifar100

laptop: 6 arms x 3 seeds x 6 minutes, and 3 supervised trainings: about 2 hours. The paper has three
seeds, CIFAR-10 and CIFAR-100, and the first two arms and the last two. All arms have the same
number of updates and pairs; SimSiam and SimCLR see two augmented views of real images, the others
no real image. The contrastive arms have the loss of configs/cifar.py:small,best, the second its
augmentation, too, the first style mixing instead; env steps and updates are the scale's own.
"""

from ml_collections import ConfigDict

from configs import cifar
from configs.studies import scales

CONTRASTIVE = ' '.join(f'simsiam.{key}={value}' for key, value in cifar.CONTRASTIVE.items())


def get_config(variant: str = 'laptop') -> ConfigDict:
  """The config of a scale; see above."""
  b = scales.base('figure3', variant)
  c = b.config
  methods = (*c.probe.methods, 'supervised')
  c.study.arms = (
    ('PALM', f'probe.methods={methods}'),
    ('PALM + data aug', 'simsiam.augment=simsiam'),
    ('PALM, contrastive', f'{CONTRASTIVE} {b.style_mixing}'),
    ('PALM, contrastive + data aug', f'{CONTRASTIVE} simsiam.augment=simsiam'),
    ('SimSiam', 'pairs.source=two_views simsiam.augment=simsiam'),
    ('SimCLR', 'pairs.source=two_views simsiam.augment=simsiam simsiam.objective=simclr'),
  )
  c.study.references += (('supervised', 'PALM', 'linear accuracy', b.row(method='supervised')),)
  c.study.orderings = (
    'PALM > untrained',
    'PALM > SimSiam',
    'PALM > SimCLR',
    'PALM + data aug > PALM',
    'PALM, contrastive > PALM',
    'PALM, contrastive > SimCLR',
    'PALM, contrastive + data aug > SimCLR',
    'supervised > PALM',
  )
  return c
