"""Three readings of the exploration reward: the package's, that of the paper's text, and URLB's;
and none, by random actions.

  python -m palm_jax.main --config=configs/studies/reward_variants.py:smoke
  python -m palm_jax.main --config=configs/studies/reward_variants.py:laptop --config.data.name=train.npz,test.npz
  python -m palm_jax.main --config=configs/studies/reward_variants.py:paper

laptop: 4 arms x 3 seeds x 6 minutes: about 1.2 hours.
"""

from configs.studies import scales


def get_config(variant='laptop'):
  c = scales.base('reward_variants', variant).config
  c.study.arms = (
    ('PALM', ''),  # log(1 + mean distance to 12 neighbours of s', the sample itself left out)
    (
      'text',
      'reward.average=False reward.transform=log',
    ),  # PALM 4.2: log of the distance to the k-th
    (
      'URLB',
      'reward.include_self=True reward.on=current',
    ),  # rll-research/url_benchmark utils.PBE, icm_apt.py
    ('random action', 'pairs.source=random_action'),
  )
  c.study.orderings = ('PALM > random action', 'PALM > text', 'PALM > URLB')
  return c
