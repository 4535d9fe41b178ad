"""Figure 6: accuracy against the number of samples, for PALM and five ways to do without its
curriculum.

  python -m palm_jax.main --config=configs/studies/figure6.py:smoke
  python -m palm_jax.main --config=configs/studies/figure6.py:laptop --config.data.name=train.npz,test.npz
  python -m palm_jax.main --config=configs/studies/figure6.py:paper

laptop: 6 arms x 3 sizes x 3 seeds x 10 minutes of one core: 9 core-hours. The number of updates is
that of the base run at every size: with fewer samples each is seen more often (the paper does not
say what it held). x is env steps, drawn pairs (Jahanian), or real images, of which there are no
more than the data have. Gaussian neighbours have the truncation of their source, 0.9. The passive
arms take what PALM lived through with weights and batches of their own; the same ones would be PALM
again, bit for bit. At paper scale PALM's records take 2 kB a sample, in the host's memory of a
passive run twice. The effective rank stands beside the accuracy, because SimSiam collapses in part
on large sets unless they come in order (arXiv 2209.15007).
"""

from configs.studies import scales

TIMES = {'smoke': (4, 2, 1), 'laptop': (11, 3, 1), 'paper': (84, 7, 1)}


def get_config(variant='laptop'):
  b = scales.base('figure6', variant)
  c = b.config
  seen = set()
  for times in TIMES[b.scale]:
    samples, settings = scales.with_samples(c, times)
    real = min(samples, b.train_images)
    c.study.arms += (
      ('PALM', f'{settings} pretrain.record=True', samples),
      ('random passive', f'{settings} pairs.source=passive_random pairs.record={{PALM}}', samples),
      (
        'ordered passive',
        f'{settings} pairs.source=passive_ordered pairs.record={{PALM}}',
        samples,
      ),
      *(
        [('static', f'{settings} pairs.source=static pairs.samples={real}', real)]
        if real not in seen
        else []
      ),
      (
        'random Jahanian',
        f'{settings} pairs.source=jahanian_random pairs.samples={samples}',
        samples,
      ),
      (
        'Gaussian Jahanian',
        f'{settings} pairs.source=jahanian_gaussian pairs.samples={samples}',
        samples,
      ),
    )
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
