"""A generator alone, with the settings of stylegan2-ada-pytorch (train.py, cfg_specs).

  python -m palm_jax.main --config=configs/generator.py:auto64 --config.data.name=folder

The variants, the last with settings of our own:

  cifar       CIFAR-10, conditional
  auto64      any 64x64 pictures in a folder, one device
  auto256x8   any 256x256 pictures, as the original trains on 8 devices
  paper256    256x256 pictures on 8 devices
  digits      scikit-learn's digits: two CPU cores

A sixth, atari, has the networks that configs/atari.py trains on stacks of 4 grey frames, which it
collects itself. It is not to be run alone.

Useful with each: --config.generator.dtype=bfloat16 (accelerators), --config.generator.accumulate=2
(half the memory), --config.generator.mirror (flipped copies), --config.generator.init_from=<run or
.pkl>, --job=benchmark (how fast). Other jobs run in the same workdir: --job=pretrain, --job=probe.
The full sizes were not run yet.
"""

import re
from typing import Any

from ml_collections import ConfigDict

from configs import cifar, digits
from palm_jax.base.errors import UserError

VARIANTS = 'cifar, paper256, auto<resolution>[x<devices>], atari, digits'


def get_config(variant: str = 'cifar') -> ConfigDict:
  """The config of a variant. UserError where it is unknown."""
  c = cifar.get_config()
  c.jobs = ('generator',)
  c.name = f'generator_{variant}'
  auto = re.fullmatch(r'auto(\d+)(?:x(\d+))?', variant)
  if variant == 'cifar':
    pass  # the default
  elif variant == 'paper256':
    paper256(c)
  elif variant == 'atari':
    atari(c)
  elif variant == 'digits':
    c.data.name = 'digits'
    c.plan.update(dict(image_size=8, image_channels=1))
    c.generator = digits.get_config().generator
  elif auto and 8 <= int(auto[1]) <= 2048 and int(auto[2] or 1) > 0:
    c.data.name = 'folder'
    c.generator.update(by_resolution(*map(int, auto.groups('1'))))
    c.plan.update(dict(image_size=int(auto[1]), num_classes=0))
  else:
    raise UserError(
      f'configs/generator.py:{variant} is unknown: variants are {VARIANTS}; '
      'resolutions are 8 to 2048'
    )
  return c


def by_resolution(resolution: int, num_devices: int) -> dict[str, Any]:
  """Settings of --cfg=auto; all of them from train.py."""
  # Bounded by the memory of a device.
  batch_size = max(min(num_devices * min(4096 // resolution, 32), 64), num_devices)
  return dict(
    general(),
    batch_size=batch_size,
    mbstd_group=min(batch_size // num_devices, 4),
    channel_base=32768 if resolution >= 512 else 16384,  # fmaps 1 or 0.5
    lr=0.002 if resolution >= 1024 else 0.0025,
    r1_gamma=0.0002 * resolution**2 / batch_size,  # a heuristic
    ema_kimg=batch_size * 10 / 32,
  )


def general() -> dict[str, Any]:
  """What all but --cfg=cifar have in common."""
  return dict(
    architecture='resnet',  # training/networks.py
    pl_weight=2.0,  # training/loss.py
    style_mixing=0.9,  # training/loss.py
    kimg=25_000.0,  # train.py
    iterations_per_call=16,  # ours: the least with R1 in every call
  )


def paper256(c: ConfigDict) -> None:
  """Settings of --cfg=paper256; all of them from train.py."""
  c.data.name = 'folder'
  c.plan.update(dict(image_size=256, num_classes=0))
  c.generator.update(
    dict(
      general(),
      batch_size=64,
      mbstd_group=8,
      lr=0.0025,
      r1_gamma=1.0,
      ema_kimg=20.0,
      mapping_layers=8,
      channel_base=16384,  # fmaps 0.5
      ema_rampup=0.0,  # None
    )
  )


def atari(c: ConfigDict) -> None:
  """Four grey frames of 84x84 as four channels, padded to 96x96: 3x3 and five upsamplings.

  The sizes are ours.
  """
  c.data.name = 'frames.npz'
  c.plan.update(dict(image_size=96, image_channels=4, num_classes=0))
  # 128 channels at 96, 256 at 48, then 512: as --cfg=auto has at 128 and 64.
  c.generator.update(dict(by_resolution(96, 1), base_size=3, channel_base=12288))
