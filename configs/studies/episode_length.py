r"""How long an episode should be, for which a label is kept; the paper does not say.

  python -m palm_jax.main --config=configs/studies/episode_length.py:smoke
  python -m palm_jax.main --config=configs/studies/episode_length.py:laptop \
    --config.data.name=train.npz,test.npz
  python -m palm_jax.main --config=configs/studies/episode_length.py:paper

laptop: 6 lengths x 3 seeds x 6 minutes: about 2 hours. Each length compiles its own program.
"""

from ml_collections import ConfigDict

from configs.studies import scales

LENGTHS = 4, 8, 16, 64, 256, 1024


def get_config(variant: str = 'laptop') -> ConfigDict:
  """The config of a scale; see above."""
  b = scales.base('episode_length', variant)
  c = b.config
  lengths = (4, 64) if b.scale == 'smoke' else LENGTHS
  c.study.arms = tuple(
    ('PALM', f'environment.episode_length={length}', length) for length in lengths
  )
  c.study.reference = 'PALM @ 64'
  c.study.axis = 'frames an episode'
  c.study.orderings = ('PALM @ 64 > PALM @ 4',)
  return c
