r"""Figure 4: what matters in PALM: readings of alpha and beta, each at 0, and random actions.

  python -m palm_jax.main --config=configs/studies/figure4.py:smoke
  python -m palm_jax.main --config=configs/studies/figure4.py:laptop \
    --config.data.name=train.npz,test.npz
  python -m palm_jax.main --config=configs/studies/figure4.py:paper,cifar100

laptop: 6 arms x 3 seeds x 6 minutes: about 2 hours. All arms but one compile one program. The paper
has CIFAR-100, three seeds.
"""

from ml_collections import ConfigDict

from configs import cifar
from configs.studies import scales


def get_config(variant: str = 'laptop') -> ConfigDict:
  """The config of a scale; see above."""
  c = scales.base('figure4', variant).config
  alpha, beta = cifar.PRESETS['paper_text']
  c.study.arms = (
    ('PALM', ''),
    ('paper_text', f'environment.alpha={alpha} environment.beta={beta}'),
    ('random action', 'pairs.source=random_action'),
    ('alpha 0.5, beta 0.5', 'environment.alpha=0.5 environment.beta=0.5'),
    ('beta 0', 'environment.beta=0'),
    ('alpha 0', 'environment.alpha=0'),
  )
  c.study.orderings = (
    'PALM > random action',
    'PALM > paper_text',
    'PALM > alpha 0.5, beta 0.5',
    'PALM > beta 0',
    'PALM > alpha 0',
  )
  return c
