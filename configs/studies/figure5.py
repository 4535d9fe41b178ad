r"""Figure 5: accuracy over alpha (share of the action) and beta (persistence of the latent).

  python -m palm_jax.main --config=configs/studies/figure5.py:smoke
  python -m palm_jax.main --config=configs/studies/figure5.py:laptop \
    --config.data.name=train.npz,test.npz
  python -m palm_jax.main --config=configs/studies/figure5.py:paper,cifar100

laptop: 16 cells x 3 seeds x 6 minutes: about 5 hours. All cells compile one program. The paper has
CIFAR-100, three seeds.
"""

from ml_collections import ConfigDict

from configs.studies import scales

GRID = {
  'smoke': ((0.0, 0.95), (0.0, 0.5)),
  'digits': ((0.0, 0.5, 0.95, 1.0), (0.0, 0.5, 0.75, 0.95)),
  'laptop': ((0.0, 0.5, 0.95, 1.0), (0.0, 0.5, 0.75, 0.95)),
  'paper': ((0.0, 0.25, 0.5, 0.75, 0.95, 1.0), (0.0, 0.25, 0.5, 0.75, 0.95)),
}


def get_config(variant: str = 'laptop') -> ConfigDict:
  """The config of a scale; see above."""
  b = scales.base('figure5', variant)
  c = b.config
  alphas, betas = GRID[b.scale]
  c.study.arms = tuple(
    (f'alpha {alpha}', f'environment.alpha={alpha} environment.beta={beta}', beta)
    for alpha in alphas
    for beta in betas
  )
  c.study.references = ()
  c.study.reference = 'alpha 0.95 @ 0.5'
  c.study.orderings = ('alpha 0.95 @ 0.5 > alpha 0.95 @ 0', 'alpha 0.95 > alpha 0.0')
  if b.scale != 'smoke':
    c.study.orderings += (
      'alpha 0.95 > alpha 1.0',
      'alpha 0.95 > alpha 0.5',
      'alpha 0.95 @ 0.5 > alpha 0.95 @ 0.95',
      'alpha 0.95 @ 0.75 > alpha 0.95 @ 0.95',
    )
  c.study.axis = 'beta'
  c.study.grid = True
  return c
