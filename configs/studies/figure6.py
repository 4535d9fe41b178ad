r"""Figure 6: accuracy against the number of samples, for PALM and five ways without curriculum.

  python -m palm_jax.main --config=configs/studies/figure6.py:smoke
  python -m palm_jax.main --config=configs/studies/figure6.py:laptop \
    --config.data.name=train.npz,test.npz
  python -m palm_jax.main --config=configs/studies/figure6.py:paper

laptop: 6 arms x 3 sizes x 3 seeds x 10 minutes of one core: 9 core-hours. The number of updates is
that of the base run at every size: with fewer samples each is seen more often (the paper does not
say what it kept equal). x is env steps, drawn pairs (Jahanian), or real images, of which there are
no more than the data have. Gaussian neighbours have the truncation of their source, 0.9. The
passive arms replay PALM's record with weights and batches of their own; with the same ones they
would be PALM again, bit for bit. At paper scale PALM's records take 4 kB a sample; without actions,
which they do not read, 2 kB, and each process of a passive run takes twice that of its host's
memory. The effective rank stands beside the accuracy, because
SimSiam collapses in part on large sets unless they come in order (arXiv 2209.15007).
"""

from ml_collections import ConfigDict

from configs.studies import scales

TIMES = {'smoke': (4, 2, 1), 'digits': (8, 3, 1), 'laptop': (11, 3, 1), 'paper': (84, 7, 1)}


def get_config(variant: str = 'laptop') -> ConfigDict:
  """The config of a scale; see above."""
  b = scales.base('figure6', variant)
  c = b.config
  seen = set()
  for times in TIMES[b.scale]:
    samples, settings = scales.with_samples(c, times)
    real = min(samples, b.train_images)
    arms = [
      ('PALM', 'pretrain.record=True', samples),
      ('random passive', 'pairs.source=passive_random pairs.record={PALM}', samples),
      ('ordered passive', 'pairs.source=passive_ordered pairs.record={PALM}', samples),
      ('static', f'pairs.source=static pairs.samples={real}', real),
      ('random Jahanian', f'pairs.source=jahanian_random pairs.samples={samples}', samples),
      ('Gaussian Jahanian', f'pairs.source=jahanian_gaussian pairs.samples={samples}', samples),
    ]
    if real in seen:
      arms = [arm for arm in arms if arm[0] != 'static']
    c.study.arms += tuple((name, f'{settings} {own}', x) for name, own, x in arms)
    seen.add(real)
  c.study.axis = 'samples'
  c.study.orderings = (
    'PALM > random passive',
    'PALM > static',
    'PALM > random Jahanian',
    'PALM > Gaussian Jahanian',
    'ordered passive > random passive',
  )
  return c
