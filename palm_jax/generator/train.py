"""Training of StyleGAN2 (arXiv 1912.04958, 2006.06676): its settings, their checks, and the loop
that Python sees.

Many iterations (step.py) run in one compiled, donated call over all devices; Python sees scalars.
What a run computes does not depend on the number of devices.
"""

import contextlib
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from palm_jax import environment
from palm_jax.base import devices, pictures
from palm_jax.base.checkpoints import Checkpoints
from palm_jax.base.errors import NonFiniteError, UserError
from palm_jax.base.files import write_json
from palm_jax.base.metrics import MetricWriter, Progress
from palm_jax.base.processes import any_process
from palm_jax.base.training import Preemption
from palm_jax.generator import network_fields
from palm_jax.generator.adaptive_augment import PIPES
from palm_jax.generator.phases import round_sizes
from palm_jax.generator.step import init_state, make_train_call
from palm_jax.generator.stylegan2 import Discriminator, Generator, channels_for
from palm_jax.generator.warm_start import load_networks
from palm_jax.job import Job, Run

LOSSES = 'loss_g', 'loss_d', 'r1', 'pl'
ROWS = 10  # of a grid of pictures, at most
DTYPES = dict(float32=None, bfloat16=jnp.bfloat16)  # None: that of the parameters


def default_config():
  """StyleGAN2-ADA's --cfg=cifar; values of stylegan2-ada-pytorch, train.py, unless named."""
  return ConfigDict(
    dict(
      path='',  # workdir of another run whose generator to play in; empty: train one here
      # workdir or .pkl whose networks training starts from; then ada_kimg=100 is the original's
      init_from='',
      z_dim=512,
      w_dim=512,
      mapping_layers=2,
      base_size=4,  # side of the constant input; images are this doubled once or more
      channel_base=32768,  # width at resolution r: min(channel_base // r, channel_max)
      channel_max=512,
      conv_clamp=256.0,  # 0: off
      dtype='float32',  # of convolutions; bfloat16 on accelerators, where the original has float16
      architecture='orig',
      d_mapping_layers=8,  # training/networks.py; models converted from TensorFlow have 0
      d_channel_base=0,  # 0: as G
      d_channel_max=0,  # 0: as G
      mbstd_group=32,  # fewer where a round has fewer images, as there
      batch_size=64,  # over all devices
      # rounds a batch is gone through in: less memory; 2 devices, or 2 rounds, are the original's
      # 32 images
      accumulate=1,
      kimg=100_000.0,  # thousands of real images seen
      lr=0.0025,
      r1_gamma=0.01,
      r1_interval=16,  # training/training_loop.py
      pl_weight=0.0,
      pl_interval=4,  # training/training_loop.py
      style_mixing=0.0,  # probability
      # pixels added on each side of the images, edges repeated, to reach a size that base_size
      # doubles to
      pad=0,
      mirror=False,  # doubles the training set by flipped copies
      augment='bgc',  # adaptive discriminator augmentation; none: off
      ada_target=0.6,  # of sign(D(real)): above it, augmentation grows
      # training/training_loop.py: thousands of images in which p can go from 0 to 1
      ada_kimg=500.0,
      ada_interval=4,  # training/training_loop.py
      ema_kimg=500.0,  # half-life of G_ema
      ema_rampup=0.05,  # the half-life is at most this share of the images seen; 0: no limit
      truncation_psi=1.0,  # of the pictures to look at
      iterations_per_call=64,  # ours
      snapshot_kimg=200.0,  # 50 ticks of 4 kimg
      checkpoint_minutes=10.0,  # ours
    )
  )


def make_networks(config, image_shape, num_classes):
  """The two networks of a config.

  Args:
    config: the generator's section, see `default_config`.
    image_shape: (H, W, C).
    num_classes: 0 is unconditional.

  Returns:
    (Generator, Discriminator).

  Raises:
    UserError: images that are not square or whose side is not base_size doubled; unknown
      architecture or dtype.
  """
  height, width, image_channels = image_shape
  doublings = (height // config.base_size).bit_length() - 1
  if height != width or doublings < 1 or height != config.base_size << doublings:
    sizes = ', '.join(str(config.base_size << i) for i in range(1, 6))
    raise UserError(
      f'images of {height}x{width}: with generator.base_size={config.base_size} StyleGAN2 needs '
      'squares of '
      f'{sizes}, ... pixels a side; resize them or change base_size'
    )
  check_choice('architecture', config.architecture, ('orig', 'resnet'))
  check_choice('dtype', config.dtype, DTYPES)
  shared = dict(
    num_classes=num_classes,
    image_channels=image_channels,
    conv_clamp=config.conv_clamp or None,
    base_size=config.base_size,
    dtype=DTYPES[config.dtype],
  )
  widths = lambda base, largest: channels_for(height, base, largest, config.base_size)
  G = Generator(
    z_dim=config.z_dim,
    w_dim=config.w_dim,
    mapping_layers=config.mapping_layers,
    channels=widths(config.channel_base, config.channel_max),
    **shared,
  )
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


def check_choice(name, value, choices):
  if value not in choices:
    raise UserError(f'generator.{name}={value!r} is unknown: choose {", ".join(choices)}')


def check_config(config, num_devices):
  """Raises UserError on settings that cannot work, before anything is compiled."""
  check_choice('architecture', config.architecture, ('orig', 'resnet'))
  check_choice('dtype', config.dtype, DTYPES)
  check_choice('augment', config.augment, PIPES)
  for name in (
    'z_dim',
    'w_dim',
    'mapping_layers',
    'base_size',
    'channel_base',
    'channel_max',
    'mbstd_group',
    'accumulate',
    'r1_interval',
    'pl_interval',
    'ada_interval',
    'ada_kimg',
    'kimg',
    'lr',
    'ema_kimg',
    'iterations_per_call',
    'snapshot_kimg',
    'checkpoint_minutes',
  ):
    if not config[name] > 0:
      raise UserError(f'generator.{name}={config[name]} is not positive: set it above 0')
  for name in (
    'conv_clamp',
    'd_mapping_layers',
    'd_channel_base',
    'd_channel_max',
    'r1_gamma',
    'pl_weight',
    'ema_rampup',
  ):
    if not config[name] >= 0:
      raise UserError(f'generator.{name}={config[name]} is negative: set it to 0 or more')
  for name, what in (
    ('style_mixing', 'a probability'),
    ('truncation_psi', 'a share of the way from w_avg'),
    ('ada_target', 'a mean of signs'),
  ):
    if not 0 <= config[name] <= 1:
      raise UserError(f'generator.{name}={config[name]} is not in [0, 1]: it is {what}')
  devices.check_divisible('generator.batch_size', config.batch_size, num_devices, 'devices')
  local = config.batch_size // num_devices
  if local % config.accumulate:
    raise UserError(
      f'generator.accumulate={config.accumulate} does not divide the {local} images of a device '
      '(batch_size '
      f'{config.batch_size} on {num_devices}): set it to {math.gcd(local, config.accumulate)}, '
      'for example'
    )
  images, group = round_sizes(config, num_devices)
  share = (
    f'the {images} images that a device has in a round (batch_size {config.batch_size}, devices '
    f'{num_devices}, '
    f'accumulate {config.accumulate})'
  )
  if images % group:
    raise UserError(
      f'generator.mbstd_group={config.mbstd_group} does not divide {share}: '
      f'set it to {math.gcd(images, group)}, for example'
    )
  if config.pl_weight and images % 2:
    raise UserError(
      f'generator.pl_weight={config.pl_weight}: path lengths take half of {share}: '
      'make that even, or set generator.pl_weight=0'
    )
  for name in [
    n
    for n, weight in (('r1_interval', config.r1_gamma), ('pl_interval', config.pl_weight))
    if weight
  ]:
    if config.iterations_per_call < config[name]:
      raise UserError(
        f'generator.iterations_per_call={config.iterations_per_call} is below generator.{name}='
        f'{config[name]}: some calls would have nothing to report of it; set the first to the '
        'second'
      )


def batch_indices(seed, start, count, size):
  """Positions start ... start + count of the endless shuffled walk over a data set of `size`
  images: (count,) int32.

  Each epoch is a permutation that depends on (seed, epoch) only, so a resumed run goes on exactly
  where it stopped.
  """
  out = []
  for epoch in range(start // size, (start + count - 1) // size + 1):
    first = epoch * size
    order = np.random.default_rng([seed, epoch]).permutation(size)
    out.append(order[max(start - first, 0) : start + count - first])
  return np.concatenate(out).astype(np.int32)


def run(this: Run) -> dict | None:
  """Trains a generator until config.generator.kimg images were seen, or goes on where a stopped run
  was.

  Writes <workdir>/generator/: network.json (what `load_generator` builds the network from),
  checkpoints/ with the items 'state' and 'generator' (variables of G_ema), real.png,
  samples/<kimg>.png and metrics; when complete, results/generator.json.

  Args:
    config: the whole config; read are seed and generator. kimg is rounded up to whole calls.
    workdir: path.
    data: data.Data, of which the training images and labels are used; with one class the generator
      is unconditional.
    mesh: one-dimensional, axis 'data'.

  Returns:
    What stands in results/generator.json; None if SIGTERM came first (everything is saved).

  Raises:
    UserError: settings that cannot work, or a workdir of another config.
    NonFiniteError: a loss is not finite; nothing is saved, the last checkpoint is from before.
  """
  config, workdir, data, mesh = this.config, this.workdir, this.data, this.mesh
  c = config.generator
  folder, batch = workdir / 'generator', c.batch_size
  check_config(c, mesh.size)
  labels = data.train.labels.astype(np.int32)
  images = padded(data.train.images, c.pad)
  G, D = make_networks(
    c, images.shape[1:], len(data.class_names) if len(data.class_names) > 1 else 0
  )
  train_call = make_train_call(c, G, D, mesh)
  set_size = len(images) * (2 if c.mirror else 1)
  num_iterations = (
    math.ceil(c.kimg * 1000 / (batch * c.iterations_per_call)) * c.iterations_per_call
  )
  everywhere = NamedSharding(mesh, P())
  init = jax.jit(lambda key: init_state(c, G, D, key), out_shardings=everywhere)
  draw_samples = jax.jit(
    lambda variables: sample_images(G, variables, jax.random.key(config.seed), c.truncation_psi)
  )

  with contextlib.ExitStack() as stack:
    preemption = stack.enter_context(Preemption())
    checkpoints = stack.enter_context(Checkpoints(folder / 'checkpoints'))
    template = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere),
      jax.eval_shape(init, jax.random.key(config.seed)),
    )
    restored = checkpoints.restore({'state': template})
    if restored:
      state = restored.items['state']
    else:
      trained = load_networks(c.init_from, template) if c.init_from else {}
      state = init(jax.random.key(config.seed)).replace(**trained)
    step = saved_step = restored.step if restored else 0
    compared = round_sizes(c, mesh.size)[1]  # pictures, by D's minibatch statistic
    if restored:
      logging.info('generator: going on from iteration %d', step)
      if (before := restored.metadata.get('compared', compared)) != compared:
        logging.warning(
          'generator: D compared %d pictures at a time so far, on %d device(s) it compares %d; on '
          'as many devices as '
          'before it would be the same run',
          before,
          mesh.size,
          compared,
        )
    metrics, seconds = (
      (restored.metadata['metrics'], restored.metadata['seconds']) if restored else ({}, 0.0)
    )
    first_process = jax.process_index() == 0
    if first_process:
      write_json(folder / 'network.json', network_fields(G))
      names = data.class_names[:ROWS] if G.num_classes else None
      pictures.save_png(
        folder / 'real.png', pictures.grid(real_images(images, labels, G), labels=names)
      )
      writer = stack.enter_context(MetricWriter(folder, step))
    progress = Progress('generator', num_iterations * batch, 'images')
    training_set = devices.replicate(mesh, images), devices.replicate(mesh, labels)
    began = saved_at = time.monotonic()

    def save():
      checkpoints.save(
        step,
        {'state': state, 'generator': state.G_ema},
        dict(
          images=step * batch,
          seconds=seconds + time.monotonic() - began,
          metrics=metrics,
          compared=compared,
        ),
      )

    while step < num_iterations:
      if preemption.requested:
        if step > saved_step:
          save()
        logging.info('generator: stopped at %d of %d images', step * batch, num_iterations * batch)
        return None
      indices = batch_indices(
        config.seed, step * batch, c.iterations_per_call * batch, set_size
      ).reshape(-1, batch)
      indices = devices.replicate(mesh, indices)
      call_began = time.monotonic()
      state, metrics = train_call(state, *training_set, indices)
      metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
      before, step = step, step + c.iterations_per_call
      check_finite(metrics, before, step)
      metrics['images_per_second'] = c.iterations_per_call * batch / (time.monotonic() - call_began)
      if first_process:
        writer.write(step, dict(metrics, images=step * batch))
      progress.update(
        step * batch,
        {name: metrics[name] for name in (*LOSSES, 'sign_real', 'augment_p') if name in metrics},
      )
      done, every = step == num_iterations, c.snapshot_kimg * 1000
      if done or step * batch // every > before * batch // every:
        samples = jax.device_get(draw_samples(state.G_ema))
        if first_process:
          pictures.save_png(
            folder / 'samples' / f'{step * batch // 1000:06d}.png',
            pictures.grid(samples, labels=names),
          )
      if any_process(done or time.monotonic() - saved_at > c.checkpoint_minutes * 60):
        save()
        saved_step, saved_at = step, time.monotonic()

    checkpoints.wait()
    result = dict(
      job='generator',
      images=step * batch,
      iterations=step,
      seconds=seconds + time.monotonic() - began,
      metrics=metrics,
      settings=c.to_dict(),
      seed=config.seed,
      data=data.source,
      **devices.describe(mesh),
    )
    return result


def grid_shape(G):
  """(rows, columns) of a grid to look at, a class a row; stacks of frames, which are shown side by
  side, are fewer."""
  return min(ROWS, G.num_classes) or ROWS, 10 if G.image_shape[-1] in (1, 3) else 2


def sample_images(G, variables, key, truncation_psi=1.0):
  """Generated pictures to look at: (R, C, H, W, channels) uint8, a class a row and a latent a
  column, or all different."""
  rows, columns = grid_shape(G)
  z = jax.random.normal(key, (columns if G.num_classes else rows * columns, G.z_dim))
  labels = (
    jnp.repeat(jnp.arange(rows), columns) if G.num_classes else jnp.zeros(rows * columns, jnp.int32)
  )
  images = G.apply(variables, jnp.tile(z, (len(labels) // len(z), 1)), labels, truncation_psi)
  return environment.to_uint8(images).reshape(rows, columns, *G.image_shape)


def real_images(images, labels, G):
  """Training pictures (N, H, W, channels) in such a grid, spread evenly over the set; black where a
  class has too few."""
  rows, columns = grid_shape(G)
  found = np.zeros((rows, columns, *images.shape[1:]), np.uint8)
  for row in range(rows):
    of_row = np.flatnonzero(labels == row) if G.num_classes else np.arange(row, len(images), rows)
    chosen = of_row[:: max(1, len(of_row) // columns)][:columns]
    found[row, : len(chosen)] = images[chosen]
  return found


def padded(images, pad):
  """(N, H, W, C) pictures with `pad` pixels more on each side, like those at the edge: what a
  generator with generator.pad learns."""
  return np.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)), 'edge') if pad else images


def check_finite(metrics, before, step):
  """Raises NonFiniteError if a loss of the iterations `before` ... `step` is NaN or infinite."""
  for name in LOSSES:
    if not math.isfinite(metrics.get(name, 0.0)):
      raise NonFiniteError(
        f'generator: {name} became {metrics[name]} between iterations {before} and {step}: '
        'lower generator.lr or raise generator.r1_gamma, in another workdir; its '
        'generator.init_from can be '
        'this one, as it last saved'
      )


def check(config: ConfigDict, num_devices: int) -> None:
  """Raises UserError on settings of the whole config that cannot work."""
  if config.generator.path:
    raise UserError(
      f'--job=generator with generator.path={config.generator.path}: what it trains would not be '
      'played in; give --config.generator.path='
    )
  check_config(config.generator, num_devices)


def check_data(this: Run) -> None:
  """Raises UserError where a class has no picture: the world would draw it all the same."""
  data = this.data
  counts = np.bincount(data.train.labels, minlength=len(data.class_names))
  empty = np.flatnonzero(counts == 0)
  if len(empty):
    raise UserError(
      f'{this.config.data.name}: no training image of class {empty[0]} ({len(empty)} of '
      f'{len(data.class_names)} classes are empty), which a world would draw all the same; number '
      'those that are there from 0: np.unique(labels, return_inverse=True)[1]'
    )


JOB = Job('generator', run, check, check_data=check_data)
