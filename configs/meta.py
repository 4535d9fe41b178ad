"""Meta-learning on goals of the latent world: PEARL, SAC without context, and SAC told the goal.

  python -m palm_jax.main --config=configs/meta.py:laptop --job=meta

The variants:

  smoke    seconds of compiled work: that everything runs
  laptop   two CPU cores

Both play in the bundled generator and see features of the random encoder, in episodes of one class
(automobiles). Goals of `laptop` differ in two coordinates of the latent, as the point robot's lie
on a circle. It took 25 minutes beside other work; its settings are not tuned. Results:
palm_jax/meta/README.md.
"""

from ml_collections import ConfigDict

from configs import cifar
from palm_jax.base.errors import UserError
from palm_jax.meta import train
from palm_jax.world import config as world

VARIANTS = 'smoke', 'laptop'


def get_config(variant: str = 'laptop') -> ConfigDict:
  """The config of a variant. UserError where it is unknown."""
  if variant not in VARIANTS:
    raise UserError(f'configs/meta.py:{variant} is unknown: variants are {", ".join(VARIANTS)}')
  c = cifar.get_config('small')
  c.name = f'meta_{variant}'
  c.jobs = ('meta',)
  c.data.name = ''
  c.world = world.default_config()
  c.meta = train.default_config()
  c.world.label = 1
  c.environment.update(dict(start='stationary', episode_length=17))
  c.meta.update(
    dict(
      train_goals=24,
      test_goals=8,
      goal_dims=2,
      iterations=60,
      tasks_per_iteration=8,
      episodes=2,
      replay_episodes=40,
      updates=50,
      meta_batch=8,
      batch_size=64,
      context_size=32,
      hidden=(128, 128),
      encoder_hidden=(128, 128),
      lr=1e-3,  # the updates are few
      tau=0.02,
      kl_lambda=0.03,  # of the same, which lets a belief be sure
      gamma=0.75,  # `able` of configs/cifar.py: twice as far as a latent is remembered
      init_alpha=0.016,  # of the same: 0.2 over 64 actions, by the scale of rewards
      test_every=10,
      checkpoint_minutes=2.0,
    )
  )
  if variant == 'smoke':
    c.environment.episode_length = 5
    c.meta.update(
      dict(
        seeds=2,
        train_goals=2,
        test_goals=2,
        iterations=3,
        tasks_per_iteration=2,
        episodes=1,
        replay_episodes=4,
        updates=2,
        meta_batch=2,
        batch_size=4,
        context_size=4,
        hidden=(16, 16),
        encoder_hidden=(16,),
        test_episodes=2,
      )
    )
  return c
