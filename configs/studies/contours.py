r"""When does it work? Data size, share of labels, granularity, corruption (arXiv 2105.05837).

  python -m palm_jax.main --config=configs/studies/contours.py:smoke
  python -m palm_jax.main --config=configs/studies/contours.py:laptop \
    --config.data.name=train.npz,test.npz
  python -m palm_jax.main --config=configs/studies/contours.py:paper,cifar100

laptop: 5 arms x 3 seeds x 8 minutes, and 12 supervised trainings a seed, on shares of labels with
as many updates as on all: about 6 hours. PALM with a part of the samples has as many updates as
with all. The test images are corrupted; probes learn on clean ones. With cifar100 there are 20
superclasses beside the 100 classes.
"""

from ml_collections import ConfigDict

from configs.studies import scales

TIMES = {'smoke': (2,), 'digits': (3, 8), 'laptop': (3, 11), 'paper': (7, 84)}
SHARES = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0)
SALT_AND_PEPPER = (0.01, 0.05, 0.2)


def get_config(variant: str = 'laptop') -> ConfigDict:
  """The config of a scale; see above."""
  b = scales.base('contours', variant)
  c = b.config
  sides = (4, 6) if b.scale in scales.WITHOUT_WORDS else (8, 16, 24)  # pictures of 8x8, or 32x32
  c.probe.update(
    dict(
      methods=(b.method,),
      label_fractions=SHARES,
      coarse='cifar100' in c.data.name,
      corruptions=(
        *(f'salt_pepper:{share}' for share in SALT_AND_PEPPER),
        *(f'downsample:{size}' for size in sides),
      ),
    )
  )
  c.study.arms = (
    ('PALM', f'probe.methods={(b.method, "supervised")}'),
    *(
      (f'PALM, {samples:,} samples', settings)
      for samples, settings in (scales.with_samples(c, times) for times in TIMES[b.scale])
    ),
    ('PALM + data aug', 'simsiam.augment=simsiam'),
    ('SimSiam', 'pairs.source=two_views simsiam.augment=simsiam'),
  )

  def measures(**chosen):
    """(name, path, x) of everything for one kind of features."""
    row = lambda share, labels: b.row(**chosen, rest=f', fraction={share}, labels={labels}')
    corrupted = lambda kind, strength: row(1, 'fine').replace('/clean', f'/{kind}:{strength}')
    found = [('accuracy by share of labels', row(share, 'fine'), share) for share in SHARES]
    found += [
      ('accuracy by salt and pepper', corrupted('salt_pepper', share), share)
      for share in SALT_AND_PEPPER
    ]
    found += [('accuracy by pixels left', corrupted('downsample', size), size) for size in sides]
    if c.probe.coarse:
      found += [
        ('accuracy by classes', row(1, labels), classes)
        for labels, classes in (('fine', 100), ('coarse', 20))
      ]
    return found

  c.study.measures = tuple(measures())
  c.study.references = tuple(
    (name, 'PALM', measure, path, x)
    for name, chosen in (
      ('supervised', dict(method='supervised')),
      ('untrained', dict(features='untrained encoder')),
    )
    for measure, path, x in measures(**chosen)
  )
  c.study.orderings = ('PALM > untrained', 'supervised > PALM', 'PALM > SimSiam')
  return c
