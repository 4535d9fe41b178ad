"""The job that trains a StyleGAN2 (arXiv 1912.04958, 2006.06676): its settings, and the loop.

Many iterations (step.py) run in one compiled, donated call over all devices; Python sees scalars.
What a run computes does not depend on their number, where each has `mbstd_group` pictures or more.
"""

import math
import pathlib
import time
from collections.abc import Sequence

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from palm_jax.base import devices, pictures
from palm_jax.base.errors import NonFiniteError, UserError
from palm_jax.base.files import write_json
from palm_jax.base.processes import is_first
from palm_jax.base.training import Training
from palm_jax.generator import network_fields
from palm_jax.generator.discriminator import Discriminator
from palm_jax.generator.feed import Walk, feed, place
from palm_jax.generator.networks import check_config, make_networks
from palm_jax.generator.phases import round_sizes
from palm_jax.generator.samples import ROWS, padded, real_images, sample_images
from palm_jax.generator.sines import TrainedNetwork
from palm_jax.generator.step import init_state, make_train_call
from palm_jax.generator.warm_start import load_networks
from palm_jax.job import Job, Run

LOSSES = 'loss_g', 'loss_d', 'r1', 'pl'
SHOWN = *LOSSES, 'sign_real', 'augment_p'  # in progress lines


def default_config():
  """StyleGAN2-ADA's --cfg=cifar; values of stylegan2-ada-pytorch, train.py, unless named."""
  return ConfigDict(
    dict(
      path='',  # workdir of another run whose generator to play in; empty: train one here
      # workdir or .pkl whose networks training starts from; then ada_kimg=100 is the original's.
      # Or a generator without its D, such as cifar10-small, whose new D can learn alone at first
      init_from='',
      d_alone_kimg=0.0,  # thousands of the first images in which G stays as it is
      network='stylegan2',  # or siren: pictures as functions of their coordinates
      sine_layers=4,  # of siren; pi-GAN has 8 of 256 (arXiv 2012.00926)
      sine_width=64,
      sine_samples=2,  # points a side of which a pixel is the mean
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
      # where the training set lies: 'device', 'host' (fed call by call, by grain), or 'auto', which
      # is the first where it takes a quarter of a device's memory or less
      data_on='auto',
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


def run(this: Run) -> dict:
  """The job: trains a generator until generator.kimg images were seen, and resumes what is there.

  Writes <workdir>/generator/: network.json, which `load_generator` builds the network from,
  checkpoints/ with the items 'state' and 'generator' (variables of G_ema), pictures and metrics.
  kimg is rounded up to whole calls; with one class the generator is unconditional.

  Raises:
    UserError: settings that cannot work, or a workdir of another config.
    NonFiniteError: a loss is not finite; nothing is saved, the last checkpoint is from before.
    Stopped: by a signal; everything is saved.
  """
  config, data, mesh = this.config, this.data, this.mesh
  c, folder = config.generator, this.workdir / 'generator'
  batch, per_call = c.batch_size, c.iterations_per_call
  images, labels = padded(data.train.images, c.pad), data.train.labels.astype(np.int32)
  num_classes = len(data.class_names) if len(data.class_names) > 1 else 0
  G, D = make_networks(c, images.shape[1:], num_classes)
  c = c.copy_and_resolve_references()
  c.data_on = place(c, images, mesh)
  if c.data_on == 'host':
    logging.info("generator: its pictures stay in the host's memory (generator.data_on)")
  train_call = make_train_call(c, G, D, mesh)
  everywhere, key = NamedSharding(mesh, P()), jax.random.key(config.seed)
  init = devices.jit_once(lambda key: init_state(c, G, D, key), everywhere)
  template = devices.templates(jax.eval_shape(init, key), everywhere)
  at_once, compared = round_sizes(c, mesh.size)  # of a device's pictures
  draw_samples = jax.jit(lambda v: sample_images(G, v, key, c.truncation_psi, at_once))
  class_names = data.class_names[:ROWS] if num_classes else None

  with Training(
    'generator',
    folder,
    math.ceil(c.kimg * 1000 / (batch * per_call)) * per_call,
    unit='images',
    per_step=batch,
    checkpoint_minutes=c.checkpoint_minutes,
    data_digest=this.data_digest,
  ) as training:
    restored = training.resume({'state': template})
    if restored:
      state, metrics = restored.items['state'], restored.metadata['metrics']
      warn_of_devices(restored.metadata.get('compared', compared), compared, mesh.size)
    else:
      trained = load_networks(c.init_from, template) if c.init_from else {}
      state, metrics = init(key).replace(**trained), {}
    if is_first():
      write_json(folder / 'network.json', network_fields(G))
    write_grid(folder / 'real.png', real_images(images, labels, G), class_names)
    walk = Walk(config.seed, batch, per_call, c.mirror)
    calls = feed(images, labels, walk, c.data_on, training.step // per_call, mesh)
    while not training.over:
      began = time.monotonic()
      state, metrics = train_call(state, *next(calls))
      metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
      metrics['images_per_second'] = per_call * batch / (time.monotonic() - began)
      before = training.step
      training.advance(per_call)
      check_finite(metrics, before, training.step)
      seen = training.step * batch
      training.write(dict(metrics, images=seen))
      training.show({name: metrics[name] for name in SHOWN if name in metrics})
      if training.complete or passed(c.snapshot_kimg * 1000, before * batch, seen):
        samples = jax.device_get(draw_samples(state.G_ema))
        write_grid(folder / 'samples' / f'{seen // 1000:06d}.png', samples, class_names)
      if training.should_save:
        items = {'state': state, 'generator': state.G_ema}
        about = dict(images=seen, metrics=metrics, compared=compared, fields=network_fields(G))
        training.save(items, **about)
  return dict(
    job='generator',
    images=training.step * batch,
    iterations=training.step,
    seconds=training.seconds,
    metrics=metrics,
    settings=config.generator.to_dict(),
    seed=config.seed,
    data=data.source,
    **devices.describe(mesh),
  )


def write_grid(path: pathlib.Path, images: np.ndarray, names: Sequence[str] | None) -> None:
  """Writes a grid of pictures (R, C, H, W, channels), rows named, in the first process."""
  if is_first():
    pictures.save_png(path, pictures.grid(images, labels=names))


def passed(every: float, before: int, now: int) -> bool:
  """Whether a multiple of `every` lies in (before, now]."""
  return now // every > before // every


def warn_of_devices(before: int, now: int, num_devices: int) -> None:
  """Logs where another number of devices changes how many pictures D compares at a time."""
  if before != now:
    logging.warning(
      'generator: D compared %d pictures at a time so far, on %d device(s) it compares %d; on as '
      'many devices as before it would be the same run',
      before,
      num_devices,
      now,
    )


def check_finite(metrics: dict[str, float], before: int, step: int) -> None:
  """Raises NonFiniteError where a loss of the iterations `before` to `step` is not finite."""
  for name in LOSSES:
    if not math.isfinite(metrics.get(name, 0.0)):
      raise NonFiniteError(
        f'generator: {name} became {metrics[name]} between iterations {before} and {step}: '
        'lower generator.lr or raise generator.r1_gamma, in another --workdir, which begins with '
        'what this one last saved by --config.generator.init_from=<this workdir>'
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
  """Raises UserError where the data have no size that fits, or the networks have no memory.

  So it does where a class has no picture: the world would draw it all the same.
  """
  c, data = this.config.generator, this.data
  counts = np.bincount(data.train.labels, minlength=len(data.class_names))
  empty = np.flatnonzero(counts == 0)
  if len(empty):
    raise UserError(
      f'{this.config.data.name}: no training image of class {empty[0]} ({len(empty)} of '
      f'{len(data.class_names)} classes are empty), which a world would draw all the same; number '
      'those that are there from 0: np.unique(labels, return_inverse=True)[1]'
    )
  height, width, channels = data.train.images.shape[1:]
  shape = height + 2 * c.pad, width + 2 * c.pad, channels
  G, D = make_networks(c, shape, len(counts) if len(counts) > 1 else 0)
  check_memory(c, G, D, this.mesh)


def check_memory(c: ConfigDict, G: TrainedNetwork, D: Discriminator, mesh: Mesh) -> None:
  """Raises UserError where a device cannot hold the state of a training; reads shapes only."""
  state = jax.eval_shape(lambda: init_state(c, G, D, jax.random.key(0)))
  drawing = dict(state.G['params'])
  sizes = {
    'generator.w_dim, z_dim or mapping_layers': drawing.pop('mapping_network'),
    'generator.sine_width' if c.network == 'siren' else 'generator.channel_base or channel_max': (
      drawing
    ),
    'generator.d_channel_base or d_channel_max (where they are 0: channel_base)': state.D,
  }
  largest = max(sizes, key=lambda name: devices.nbytes(sizes[name]))
  need = devices.nbytes(state)
  devices.check_fits(need, mesh, "the generator's training takes", f'lower {largest}')


JOB = Job('generator', run, check, check_data=check_data)
