"""Sizes to measure speed with; they are the same for every machine and implementation.

  python -m palm_jax.main --config=configs/benchmark.py:small --job=benchmark

The variants:

  tiny    16x16, 32 channels
  small   32x32, 64 channels: two CPU cores
  cifar   32x32, 512 channels, ResNet-18: accelerators

Each env step has one SimSiam pair, as in the paper. An iteration is 4 steps of 16, 32 or 64
environments and one update.
"""

from ml_collections import ConfigDict

from configs import cifar
from palm_jax.base.errors import UserError

SIZES = {
  'tiny': dict(image_size=16, channels=32, z=32, width=16, proj=256, hidden=256, num_envs=16),
  'small': dict(image_size=32, channels=64, z=64, width=32, proj=512, hidden=512, num_envs=32),
  'cifar': dict(image_size=32, channels=512, z=512, width=64, proj=2048, hidden=1024, num_envs=64),
}


def get_config(size: str = 'small') -> ConfigDict:
  """The config of a size. UserError where it is unknown."""
  if size not in SIZES:
    raise UserError(f'configs/benchmark.py:{size} is unknown: sizes are {", ".join(SIZES)}')
  s = SIZES[size]
  c = cifar.get_config()
  c.name = f'benchmark_{size}'
  c.jobs = ('pretrain',)
  c.plan.image_size = s['image_size']
  c.generator.update(
    dict(
      z_dim=s['z'],
      w_dim=s['z'],
      channel_base=s['channels'] * s['image_size'],
      channel_max=s['channels'],
      conv_clamp=0.0,
    )
  )
  c.encoder.width = s['width']
  c.simsiam.update(
    dict(proj_layers=3, proj_hidden=s['proj'], proj_dim=s['proj'], pred_hidden=s['proj'] // 4)
  )
  c.sac.hidden = (s['hidden'], s['hidden'])
  c.replay.capacity = 1024 * s['num_envs']
  c.pretrain.update(
    dict(
      num_envs=s['num_envs'],
      rollout_length=4,
      batch_size=4 * s['num_envs'],
      warmup_steps=4096,
      iterations_per_call=4,
    )
  )
  return c
