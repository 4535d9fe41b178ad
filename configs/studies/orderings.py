r"""The paper's orderings, each beside its own noise: acting, persistence, exploring.

  python -m palm_jax.main --config=configs/studies/orderings.py:smoke
  python -m palm_jax.main --config=configs/studies/orderings.py:laptop \
    --config.data.name=train.npz,test.npz
  python -m palm_jax.main --config=configs/studies/orderings.py:paper

laptop: 11 arms x 6 seeds x 6 minutes: 6.6 hours. Two arms are one world and so an A/A test, which
says how far two arms that are alike differ: `random action` and `alpha 0`. A walk of random actions
shows pairs of latents at cosine beta, so `D75` are plain pairs of that cosine: Gaussian neighbours
of standard deviation s have cosine 1 / sqrt(1 + s^2). `able` has larger learning rates, a shorter
horizon and a small first temperature: less than configs/cifar.py:able changes. `unit` and `skills`
are able agents, too: one rewarded in features without contrast, one told a direction an episode
beside that, of as many dimensions as CIC has (arXiv 2202.00161).
`orderings.py:laptop,contrastive` has five of the arms, three seeds, with the contrastive loss.
"""

import math

from ml_collections import ConfigDict

from configs.studies import scales

COSINES = (0.75, 0.5, 0.95)  # the first is PALM's beta
ABLE = 'sac.gamma=0.8 sac.init_alpha=0.003 sac.lr_actor=1e-3 sac.lr_critic=1e-3'
UNIT = f'{ABLE} reward.space=unit'
SKILLS = f'{UNIT} sac.skill_dim=64'
RECORDED = 'pretrain.record=True'  # so that table3 can share these runs


def neighbours(cosine: float) -> str:
  """Settings of pairs of latents at a cosine."""
  std = round(math.sqrt(1 / cosine**2 - 1), 3)
  return f'pairs.source=jahanian_gaussian pairs.truncation_psi=1.0 pairs.std={std}'


def get_config(variant: str = 'laptop') -> ConfigDict:
  """The config of a scale; see above."""
  words = variant.split(',')
  contrastive = 'contrastive' in words
  words = [word for word in words if word != 'contrastive']
  c = scales.base('orderings', ','.join(words)).config
  c.study.arms = (
    ('PALM', RECORDED),
    ('random action', 'pairs.source=random_action'),
    ('alpha 0', 'environment.alpha=0'),
    ('able', f'{ABLE} {RECORDED}'),
    ('skills', f'{SKILLS} {RECORDED}'),
    ('unit', f'{UNIT} {RECORDED}'),
    ('D0', 'pairs.source=jahanian_random'),
    ('static', 'pairs.source=static'),
    *((f'D{100 * cosine:.0f}', neighbours(cosine)) for cosine in COSINES),
  )
  orderings = (
    'PALM > random action',
    'able > random action',
    'skills > random action',
    'unit > random action',
    'D75 > D0',
    'random action > D75',
    *(f'{arm} > {pairs}' for arm in ('PALM', 'able', 'skills') for pairs in ('D75', 'static')),
    'random action > alpha 0',
    'alpha 0 > random action',
  )
  if contrastive:
    c.name += '_contrastive'
    c.simsiam.objective = 'simclr'
    kept = 'PALM', 'random action', 'D0', 'D75', 'static'
    c.study.arms = tuple(arm for arm in c.study.arms if arm[0] in kept)
    orderings = tuple(claim for claim in orderings if set(claim.split(' > ')) <= set(kept))
  elif words[0] != 'smoke':
    c.study.seeds = (0, 1, 2, 3, 4, 5)
  c.study.orderings = orderings
  return c
