r"""Figure 3: accuracy of PALM beside SimSiam, SimCLR and supervised training on real images.

  python -m palm_jax.main --config=configs/studies/figure3.py:smoke
  python -m palm_jax.main --config=configs/studies/figure3.py:laptop \
    --config.data.name=train.npz,test.npz
  python -m palm_jax.main --config=configs/studies/figure3.py:paper,cifar100

laptop: 4 arms x 3 seeds x 6 minutes, and 3 supervised trainings: about 1.5 hours. The paper has
three seeds, CIFAR-10 and CIFAR-100. All arms have the same number of updates and pairs; SimSiam and
SimCLR see two augmented views of real images.
"""

from ml_collections import ConfigDict

from configs.studies import scales


def get_config(variant: str = 'laptop') -> ConfigDict:
  """The config of a scale; see above."""
  b = scales.base('figure3', variant)
  c = b.config
  methods = (*c.probe.methods, 'supervised')
  c.study.arms = (
    ('PALM', f'probe.methods={methods}'),
    ('PALM + data aug', 'simsiam.augment=simsiam'),
    ('SimSiam', 'pairs.source=two_views simsiam.augment=simsiam'),
    ('SimCLR', 'pairs.source=two_views simsiam.augment=simsiam simsiam.objective=simclr'),
  )
  c.study.references += (('supervised', 'PALM', 'linear accuracy', b.row(method='supervised')),)
  c.study.orderings = (
    'PALM > untrained',
    'PALM > SimSiam',
    'PALM > SimCLR',
    'PALM + data aug > PALM',
    'supervised > PALM',
  )
  return c
