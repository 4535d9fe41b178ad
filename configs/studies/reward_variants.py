r"""Three readings of the exploration reward (ours, the paper's text, URLB) and random actions.

  python -m palm_jax.main --config=configs/studies/reward_variants.py:smoke
  python -m palm_jax.main --config=configs/studies/reward_variants.py:laptop \
    --config.data.name=train.npz,test.npz
  python -m palm_jax.main --config=configs/studies/reward_variants.py:paper

laptop: 4 arms x 3 seeds x 6 minutes: about 1.2 hours.
"""

from ml_collections import ConfigDict

from configs.studies import scales


def get_config(variant: str = 'laptop') -> ConfigDict:
  """The config of a scale; see above."""
  c = scales.base('reward_variants', variant).config
  c.study.arms = (
    # log(1 + mean distance to 12 neighbours of s', the sample itself left out).
    ('PALM', ''),
    # PALM 4.2: log of the distance to the k-th.
    ('text', 'reward.average=False reward.transform=log'),
    # rll-research/url_benchmark utils.PBE, icm_apt.py.
    ('URLB', 'reward.include_self=True reward.on=current'),
    ('random action', 'pairs.source=random_action'),
  )
  c.study.orderings = ('PALM > random action', 'PALM > text', 'PALM > URLB')
  return c
