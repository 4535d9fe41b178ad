r"""Table 3: coverage of the training images by exploration, random actions, independent latents.

  python -m palm_jax.main --config=configs/studies/table3.py:smoke
  python -m palm_jax.main --config=configs/studies/table3.py:laptop \
    --config.data.name=train.npz,test.npz
  python -m palm_jax.main --config=configs/studies/table3.py:paper \
    --config.quality.inception_path=FILE

Coverage is the share of training images that are the nearest of something explored. laptop: 4 arms
x 3 seeds x 8 minutes: 1.6 hours; --config.diversity.num_images=8000, as many as there are test
pictures, adds 40 minutes of a core a run. It measures with features that are the same for all arms,
of a classifier trained on the data, and reports pixels and each run's own beside. paper: Inception
features, of a weight file that you give. `able` and `skills` are those of orderings.py, whose runs
this study can share (--config.study.runs).
"""

from ml_collections import ConfigDict

from configs import cifar
from configs.studies import orderings, scales
from palm_jax.evaluate import diversity

SETS = ('whole record', 'random actions', 'independent', 'other training images', 'test images')


def get_config(variant: str = 'laptop') -> ConfigDict:
  """The config of a scale; see above."""
  b = scales.base('table3', variant)
  c = b.config
  if b.scale == 'paper':
    c.diversity.features = ('inception',)
  else:
    c.diversity.features = ('proxy', 'pixels', 'encoder')
  c.pretrain.record = True
  features = c.diversity.features[0]
  prefix = diversity.PREFIX[features]
  path = lambda name, metric: f'diversity/rows[set={name}, features={features}]/{prefix}{metric}'
  alpha, beta = cifar.PRESETS['paper_text']
  c.study.jobs = ('pretrain', 'diversity')
  c.study.arms = (
    ('PALM', ''),
    ('paper_text', f'environment.alpha={alpha} environment.beta={beta}'),
    ('able', orderings.ABLE),
    ('skills', orderings.SKILLS),
  )
  c.study.measures = (
    ('coverage', path('explored', 'unique_nn')),
    ('precision', path('explored', 'precision')),
    ('FID', path('explored', 'FID')),
  )
  sets = [(name, 'PALM', name) for name in SETS]
  sets += [(f'{arm}, whole record', arm, 'whole record') for arm in ('able', 'skills')]
  c.study.references = tuple(
    (name, arm, measure, path(of, metric))
    for name, arm, of in sets
    for measure, metric in (('coverage', 'unique_nn'), ('precision', 'precision'), ('FID', 'FID'))
  )
  c.study.orderings = (
    'PALM > independent',
    'whole record > independent',
    'skills, whole record > independent',
    'PALM > random actions',
    'test images > PALM',
  )
  return c
