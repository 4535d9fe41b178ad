r"""What teaches fastest on played frames: losses, positives, negatives, augmentation, updates.

  python -m palm_jax.main --config=configs/studies/objectives.py:smoke
  python -m palm_jax.main --config=configs/studies/objectives.py:laptop \
    --config.data.name=train.npz

A search: it reads the validation split only, never test pictures. All arms see as many env steps.
laptop: 5 to 12 minutes a run. Change one thing at a time against `simclr`.
"""

from ml_collections import ConfigDict

from configs.studies import scales

CLR = 'simsiam.objective=simclr'
GROUPS = 'simsiam.objective=supcon pairs.group=4'


def get_config(variant: str = 'laptop') -> ConfigDict:
  """The config of a scale; see above."""
  b = scales.base('objectives', variant)
  c = b.config
  c.probe.split = 'validation'
  updates = c.pretrain.updates_per_iteration
  c.study.seeds = (0, 1)
  c.study.arms = (
    ('simclr', CLR),
    ('simsiam', ''),
    ('temperature 0.2', f'{CLR} simsiam.temperature=0.2'),
    ('temperature 0.1', f'{CLR} simsiam.temperature=0.1'),
    ('masked episode', f'{CLR} simsiam.mask_episode=True'),
    ('style mixing', f'{CLR} {b.style_mixing}'),
    ('episode groups', GROUPS),
    ('windows of 8', f'{GROUPS} pairs.window=8'),
    ('augmented', f'{CLR} simsiam.augment=simsiam'),
    (
      'twice the updates',
      f'{CLR} pretrain.updates_per_iteration={2 * updates} '
      f'pretrain.iterations_per_call={c.pretrain.iterations_per_call // 2}',
    ),
    ('beta 0.5', f'{CLR} environment.beta=0.5'),
    ('half the learning rate', f'{CLR} simsiam.lr={c.simsiam.lr / 2}'),
    ('twice the batch', f'{CLR} pretrain.batch_size={2 * c.pretrain.batch_size}'),
  )
  c.study.references = ()
  return c
