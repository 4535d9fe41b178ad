"""The networks of a generator's training, and what its settings can be."""

import math
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from palm_jax.base import checks
from palm_jax.base.errors import UserError
from palm_jax.generator.adaptive_augment import PIPES
from palm_jax.generator.discriminator import Discriminator
from palm_jax.generator.feed import PLACES
from palm_jax.generator.phases import round_sizes
from palm_jax.generator.saved import MAX_POINTS
from palm_jax.generator.sines import SirenGenerator, TrainedNetwork
from palm_jax.generator.stylegan2 import Generator, channels_for

NETWORKS = 'stylegan2', 'siren'
ARCHITECTURES = 'orig', 'resnet'
DTYPES = dict(float32=None, bfloat16=jnp.bfloat16)  # None: that of the parameters
RANGES = dict(
  z_dim=checks.SIZE,
  w_dim=checks.SIZE,
  mapping_layers=checks.Range(1, 64),
  base_size=checks.Range(1, 1024),
  sine_layers=checks.Range(1, 64),
  sine_width=checks.Range(1, 4096),
  sine_samples=checks.Range(1, 16),
  channel_base=checks.Range(1, 2**26),
  channel_max=checks.SIZE,
  conv_clamp=checks.AMOUNT,
  d_mapping_layers=checks.Range(0, 64),
  d_channel_base=checks.Range(0, 2**26),
  d_channel_max=checks.SIZE_OR_0,
  mbstd_group=checks.SIZE,
  batch_size=checks.Range(1, 10**6),
  accumulate=checks.Range(1, 10**6),
  kimg=checks.Range(0, 10**7, above=True),
  d_alone_kimg=checks.AMOUNT,
  lr=checks.Range(0, 1000, above=True),
  r1_gamma=checks.AMOUNT,
  r1_interval=checks.Range(1, 10**6),
  pl_weight=checks.AMOUNT,
  pl_interval=checks.Range(1, 10**6),
  style_mixing=checks.SHARE,
  pad=checks.Range(0, 1024),
  ada_target=checks.SHARE,
  ada_kimg=checks.Range(0, 10**7, above=True),
  ada_interval=checks.Range(1, 10**6),
  ema_kimg=checks.Range(0, 10**7, above=True),
  ema_rampup=checks.AMOUNT,
  truncation_psi=checks.SHARE,
  iterations_per_call=checks.Range(1, 10**6),
  snapshot_kimg=checks.Range(0, 10**7, above=True),
  checkpoint_minutes=checks.Range(0, 10**6, above=True),
)


def make_networks(
  config: ConfigDict, image_shape: tuple[int, int, int], num_classes: int
) -> tuple[TrainedNetwork, Discriminator]:
  """The two networks of a config.

  Args:
    config: the generator's section, see `default_config`.
    image_shape: (H, W, C).
    num_classes: 0 is unconditional.

  Returns:
    (generator, Discriminator).

  Raises:
    UserError: images that are not square or whose side is not base_size doubled; unknown
      architecture or dtype.
  """
  height, width, image_channels = image_shape
  doublings = (height // config.base_size).bit_length() - 1
  if height != width or doublings < 1 or height != config.base_size << doublings:
    sizes = ', '.join(str(config.base_size << i) for i in range(1, 6))
    padded = f' (generator.pad={config.pad} is in it)' if config.get('pad') else ''
    raise UserError(
      f'images of {height}x{width}{padded}: with generator.base_size={config.base_size} StyleGAN2 '
      f'needs squares of {sizes}, ... pixels a side; resize them or change base_size'
    )
  check_choices(config)
  for name in ('channel_base', 'd_channel_base'):
    if 0 < config[name] < height:
      raise UserError(
        f'generator.{name}={config[name]} leaves no channel at {height} pixels a side: set it to '
        f'{height} or more'
      )
  shared: dict[str, Any] = dict(
    num_classes=num_classes,
    image_channels=image_channels,
    conv_clamp=config.conv_clamp or None,
    base_size=config.base_size,
    dtype=DTYPES[config.dtype],
  )
  widths = lambda base, largest: channels_for(height, base, largest, config.base_size)
  latents = dict(z_dim=config.z_dim, w_dim=config.w_dim, mapping_layers=config.mapping_layers)
  if config.network == 'siren':
    if height * config.sine_samples > MAX_POINTS:
      raise UserError(
        f'generator.sine_samples={config.sine_samples} at {height} pixels a side: expected a '
        f'product of at most {MAX_POINTS}; lower it'
      )
    G = SirenGenerator(
      num_classes=num_classes,
      resolution=height,
      width=config.sine_width,
      layers=config.sine_layers,
      samples=config.sine_samples,
      image_channels=image_channels,
      dtype=DTYPES[config.dtype],
      **latents,
    )
  else:
    G = Generator(channels=widths(config.channel_base, config.channel_max), **latents, **shared)
  D = Discriminator(
    architecture=config.architecture,
    mapping_layers=config.d_mapping_layers,
    mbstd_group=config.mbstd_group,
    channels=widths(
      config.d_channel_base or config.channel_base, config.d_channel_max or config.channel_max
    ),
    **shared,
  )
  return G, D


def check_choices(config: ConfigDict) -> None:
  """Raises UserError on unknown names in the config's section `generator`."""
  checks.choice('generator.network', config.network, NETWORKS)
  checks.choice('generator.architecture', config.architecture, ARCHITECTURES)
  checks.choice('generator.dtype', config.dtype, DTYPES)
  checks.choice('generator.augment', config.augment, PIPES)
  checks.choice('generator.data_on', config.data_on, PLACES)


def check_config(config: ConfigDict, num_devices: int) -> None:
  """Raises UserError on settings of the config's section `generator` that cannot work."""
  check_choices(config)
  checks.ranges('generator', config, RANGES)
  if config.mbstd_group > config.batch_size:
    raise UserError(
      f'generator.mbstd_group={config.mbstd_group} is more than generator.batch_size='
      f'{config.batch_size}: set it to that or less'
    )
  if config.d_alone_kimg >= config.kimg:
    raise UserError(
      f'generator.d_alone_kimg={config.d_alone_kimg} of generator.kimg={config.kimg}: G would not '
      'learn; make it shorter'
    )
  checks.divisible('generator.batch_size', config.batch_size, num_devices, 'devices')
  local = config.batch_size // num_devices
  if local % config.accumulate:
    raise UserError(
      f'generator.accumulate={config.accumulate} does not divide the {local} images of a device '
      f'(batch_size {config.batch_size} on {num_devices}): set it to '
      f'{math.gcd(local, config.accumulate)}, for example'
    )
  images, group = round_sizes(config, num_devices)
  part = (
    f'the {images} images that a device has in a round (batch_size {config.batch_size}, devices '
    f'{num_devices}, accumulate {config.accumulate})'
  )
  if images % group:
    raise UserError(
      f'generator.mbstd_group={config.mbstd_group} does not divide {part}: '
      f'set it to {math.gcd(images, group)}, for example'
    )
  if config.pl_weight and images % 2:
    raise UserError(
      f'generator.pl_weight={config.pl_weight}: path lengths take half of {part}: '
      'make that even, or set generator.pl_weight=0'
    )
  for name, weight in (('r1_interval', config.r1_gamma), ('pl_interval', config.pl_weight)):
    if weight and config.iterations_per_call < config[name]:
      raise UserError(
        f'generator.iterations_per_call={config.iterations_per_call} is below generator.{name}='
        f'{config[name]}: some calls would have nothing to report of it; set the first to the '
        'second'
      )
