"""Learning from records without playing: BEAR beside cloning and SAC.

  python -m palm_jax.main --config=configs/offline.py:smoke
  python -m palm_jax.main --config=configs/offline.py:laptop
  python -m palm_jax.main --config=configs/offline.py:pendulum

SAC learns by playing in the environment and leaves three records: of random actions, of the first
policy half way up, and of its best. Each method learns from each record alone. `laptop` plays for a
goal in the bundled generator's world, `pendulum` in Gymnasium's Pendulum-v1; `smoke` shows in
seconds that it works. Results: palm_jax/offline/README.md. They need Gymnasium:
pip install -e '.[gym]'.
"""

from ml_collections import ConfigDict

from configs import cifar
from palm_jax.base.errors import UserError
from palm_jax.offline import train
from palm_jax.world import config as world


def get_config(variant: str = 'laptop') -> ConfigDict:
  """The config of a variant; see above."""
  if variant not in ('smoke', 'laptop', 'pendulum'):
    raise UserError(
      f'configs/offline.py:{variant} is unknown: variants are smoke, laptop, pendulum'
    )
  c = cifar.get_config('small,paper_fig5')
  c.name = f'offline_{variant}'
  c.jobs = ('offline',)
  c.world = world.default_config()
  c.offline = train.default_config()
  c.environment.start = 'stationary'
  c.sac.update(
    dict(hidden=(256, 256), trunk=0, lr_actor=1e-3, lr_critic=1e-3, lr_alpha=1e-3, tau=0.005)
  )
  # Narrower than the original's (400, 300) and (750, 750), with which two cores make five updates a
  # second of three seeds.
  c.offline.bear.update(
    dict(
      hidden_actor=(256, 256),
      hidden_critic=(256, 256),
      hidden_behaviour=(256, 256),
      warmup_updates=2000,
    )
  )
  if variant == 'pendulum':
    c.offline.environment = 'Pendulum-v1'
    c.offline.update(dict(updates=10_000, judge_every=1000))
    c.offline.bear.threshold = 0.02  # imitation alone leaves 0.04: the weight grows to its limit
    return c
  c.environment.episode_length = 64
  c.world.label = 1  # one class: the oracle knows a latent, and whose it is
  c.sac.gamma = 0.9  # the latent forgets within some eight steps
  c.sac.init_alpha = 0.2 / c.generator.z_dim
  c.offline.update(dict(rollout_length=64, updates=6000, judge_every=1000))
  # The original's kernel is for some seven actions. Of 64 any two policies are far apart in it:
  # imitation alone leaves a discrepancy of 0.22, with this one 0.01 to 0.06 (one run a record).
  c.offline.bear.update(dict(sigma=10.0 * c.generator.z_dim, threshold=0.06, warmup_updates=4000))
  if variant == 'smoke':
    c.environment.episode_length = 8
    c.offline.update(
      dict(
        seeds=2,
        num_envs=2,
        behaviour_steps=64,
        rollout_length=16,
        record_steps=64,
        updates=40,
        batch_size=16,
        updates_per_call=10,
        judge_every=20,
        episodes=2,
      )
    )
    c.sac.hidden = (16, 16)
    c.offline.bear.update(
      dict(
        hidden_actor=(16, 16),
        hidden_critic=(16, 16),
        hidden_behaviour=(16, 16),
        samples=4,
        warmup_updates=10,
      )
    )
  return c
