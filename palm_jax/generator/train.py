"""Training of StyleGAN2 (arXiv 1912.04958, 2006.06676): the loop of stylegan2-ada-pytorch, compiled.

An iteration is Gmain, [path lengths every 4], Dmain, [R1 every 16], the moving average of G. Many iterations run in one
donated call over all devices; Python sees scalars. What a run computes does not depend on the number of devices.
"""
import contextlib
import dataclasses
import math
import pathlib
import time

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from palm_jax import devices, environment, pictures
from palm_jax.checkpoint import Checkpoints, Preemption, any_process, write_json_atomic
from palm_jax.errors import NonFiniteError, UserError
from palm_jax.generator import losses
from palm_jax.generator.stylegan2 import Discriminator, Generator, channels_for
from palm_jax.metrics import MetricWriter, Progress

LOSSES = 'loss_g', 'loss_d', 'r1', 'pl'


def default_config():
  """StyleGAN2-ADA's --cfg=cifar without its augmentation; values of stylegan2-ada-pytorch, train.py, unless named."""
  return ConfigDict(dict(
      path='',  # workdir of another run whose generator to play in; empty: train one here
      z_dim=512,
      w_dim=512,
      mapping_layers=2,
      channel_base=32768,  # width at resolution r: min(channel_base // r, channel_max)
      channel_max=512,
      conv_clamp=256.,  # 0: off
      architecture='orig',
      d_mapping_layers=8,  # training/networks.py; models converted from TensorFlow have 0
      d_channel_base=0,  # 0: as G
      d_channel_max=0,  # 0: as G
      mbstd_group=32,  # fewer where a device has fewer images, as there
      batch_size=64,  # over all devices
      kimg=100_000.,  # thousands of real images seen
      lr=0.0025,
      r1_gamma=0.01,
      r1_interval=16,  # training/training_loop.py
      pl_weight=0.,
      pl_interval=4,  # training/training_loop.py
      style_mixing=0.,  # probability
      ema_kimg=500.,  # half-life of G_ema
      ema_rampup=0.05,  # the half-life is at most this share of the images seen
      iterations_per_call=64,  # ours
      snapshot_kimg=200.,  # 50 ticks of 4 kimg
      checkpoint_minutes=10.,  # ours
  ))


@flax.struct.dataclass
class State:
  """Everything that a run is; a checkpoint holds all of it.

  Attributes:
    step: () int32 iterations done.
    G: {'params', 'buffers'} of the generator.
    G_ema: the same, params averaged over the run: the network to use.
    D: params of the discriminator.
    opt_g, opt_d: Adam's states, each shared by a network's main and regularisation steps.
    pl_mean: () running mean of the path lengths.
    key: typed key; every draw is a function of (key, step, phase, global sample id).
  """
  step: jax.Array
  G: dict
  G_ema: dict
  D: dict
  opt_g: optax.OptState
  opt_d: optax.OptState
  pl_mean: jax.Array
  key: jax.Array


def make_networks(config, image_shape, num_classes):
  """The two networks of a config.

  Args:
    config: the generator's section, see `default_config`.
    image_shape: (H, W, C).
    num_classes: 0 is unconditional.

  Returns:
    (Generator, Discriminator).

  Raises:
    UserError: images that are not square or whose side is not a power of two of at least 8; unknown architecture.
  """
  height, width, image_channels = image_shape
  if height != width or height < 8 or height & (height - 1):
    raise UserError(f'images of {height}x{width}: StyleGAN2 needs squares with a power of two, 8 or more, as side; '
                    'resize them')
  if config.architecture not in ('orig', 'resnet'):
    raise UserError(f"generator.architecture={config.architecture!r} is unknown: choose 'orig' or 'resnet'")
  shared = dict(num_classes=num_classes, image_channels=image_channels, conv_clamp=config.conv_clamp or None)
  G = Generator(z_dim=config.z_dim, w_dim=config.w_dim, mapping_layers=config.mapping_layers,
                channels=channels_for(height, config.channel_base, config.channel_max), **shared)
  D = Discriminator(architecture=config.architecture, mapping_layers=config.d_mapping_layers,
                    mbstd_group=config.mbstd_group,
                    channels=channels_for(height, config.d_channel_base or config.channel_base,
                                          config.d_channel_max or config.channel_max), **shared)
  return G, D


def check_config(config, num_devices):
  """Raises UserError on settings that cannot work, before anything is compiled."""
  for name in ('z_dim', 'w_dim', 'mapping_layers', 'channel_base', 'channel_max', 'r1_interval', 'pl_interval', 'kimg',
               'lr', 'ema_kimg', 'ema_rampup', 'iterations_per_call', 'snapshot_kimg', 'checkpoint_minutes'):
    if not config[name] > 0:
      raise UserError(f'generator.{name}={config[name]} is not positive: set it above 0')
  for name in ('conv_clamp', 'd_mapping_layers', 'd_channel_base', 'd_channel_max', 'r1_gamma', 'pl_weight'):
    if not config[name] >= 0:
      raise UserError(f'generator.{name}={config[name]} is negative: set it to 0 or more')
  if not 0 <= config.style_mixing <= 1:
    raise UserError(f'generator.style_mixing={config.style_mixing} is not in [0, 1]: it is a probability')
  devices.check_divisible('generator.batch_size', config.batch_size, num_devices, 'devices')
  local = config.batch_size // num_devices
  group = min(config.mbstd_group, local)
  if group < 1 or local % group:
    raise UserError(f'generator.mbstd_group={config.mbstd_group} does not divide the {local} images of a device '
                    f'(batch_size {config.batch_size} on {num_devices}): set it to {math.gcd(local, max(group, 1))}, for example')
  if config.pl_weight and local % 2:
    raise UserError(f'generator.batch_size={config.batch_size} gives a device {local} images, of which path lengths '
                    'take half: make it even or set generator.pl_weight=0')
  for name in [n for n, weight in (('r1_interval', config.r1_gamma), ('pl_interval', config.pl_weight)) if weight]:
    if config.iterations_per_call < config[name]:
      raise UserError(f'generator.iterations_per_call={config.iterations_per_call} is below generator.{name}='
                      f'{config[name]}: some calls would have nothing to report of it; set the first to the second')


def make_optimizers(config):
  """Adam of G and of D, corrected for lazy regularisation (arXiv 1912.04958, appendix B).

  G's correction holds although path lengths may be off, as in the original; eps is not corrected.
  """
  def adam(interval):
    share = interval / (interval + 1)
    return optax.adam(config.lr * share, b1=0., b2=0.99 ** share, eps=1e-8)  # stylegan2-ada-pytorch, train.py
  return adam(config.pl_interval), adam(config.r1_interval)


def init_state(config, G, D, key):
  """The first state, as a pure function: jit it with the shardings it should have."""
  key, key_g, key_d = jax.random.split(key, 3)
  labels = jnp.zeros((config.mbstd_group,), jnp.int32)
  generator = G.init(key_g, jnp.zeros((1, config.z_dim)), labels[:1])
  discriminator = D.init(key_d, jnp.zeros((config.mbstd_group, *G.image_shape)), labels)['params']
  opt_g, opt_d = make_optimizers(config)
  return State(step=jnp.zeros((), jnp.int32), G=generator, G_ema=jax.tree.map(jnp.copy, generator), D=discriminator,
               opt_g=opt_g.init(generator['params']), opt_d=opt_d.init(discriminator), pl_mean=jnp.zeros(()), key=key)


def batch_indices(seed, start, count, size):
  """Positions start ... start + count of the endless shuffled walk over a data set of `size` images: (count,) int32.

  Each epoch is a permutation that depends on (seed, epoch) only, so a resumed run goes on exactly where it stopped.
  """
  out = []
  for epoch in range(start // size, (start + count - 1) // size + 1):
    first = epoch * size
    order = np.random.default_rng([seed, epoch]).permutation(size)
    out.append(order[max(start - first, 0):start + count - first])
  return np.concatenate(out).astype(np.int32)


def ema_decay(config, step):
  """Decay of G_ema after iteration `step`: () float. Zero at step 0, so the first average is a copy."""
  images = step * float(config.batch_size)
  half_life = jnp.minimum(config.ema_kimg * 1000., images * config.ema_rampup)
  return 0.5 ** (config.batch_size / jnp.maximum(half_life, 1e-8))


def make_iteration(config, G, D, num_devices):
  """One iteration on one device of the mesh axis 'data'.

  Returns:
    f(state, images, labels, indices) -> (state, metrics): images (N, H, W, C) uint8 and labels (N,) int32 are the whole
    training set, indices (B / devices,) int32 this device's share of the batch; metrics are scalars over the global
    batch, r1 and pl zero where their phase did not run.
  """
  local = config.batch_size // num_devices
  opt_g, opt_d = make_optimizers(config)

  def by_groups(x):
    # D's minibatch statistic groups samples that lie local / group apart. Laid out so, those are samples with
    # consecutive global ids, whatever the number of devices.
    group = min(config.mbstd_group, local)
    return x.reshape(local // group, group).T.reshape(-1)

  def sample_ids(count):
    return jax.lax.axis_index('data') * count + jnp.arange(count)

  def map_fakes(params, buffers, key, ids, all_labels):
    """Fresh latents through the mapping -> ws, labels (those of random training images), noise keys, buffers."""
    key_mixing, key = jax.random.split(key)
    keys = jax.vmap(lambda i: jax.random.split(jax.random.fold_in(key, i), 4))(ids)  # (n, 4)
    latents = jax.vmap(lambda k: jax.random.normal(k, (config.z_dim,)))
    labels = all_labels[jax.vmap(lambda k: jax.random.randint(k, (), 0, len(all_labels)))(keys[:, 0])]
    variables = dict(params=params, buffers=buffers)
    ws, updated = G.apply(variables, latents(keys[:, 1]), labels, update_w_avg=True, axis_name='data',
                          method='mapping', mutable=['buffers'])
    if config.style_mixing:
      key_whether, key_where = jax.random.split(key_mixing)
      cutoff = jnp.where(jax.random.bernoulli(key_whether, config.style_mixing),
                         jax.random.randint(key_where, (), 1, G.num_ws), G.num_ws)
      other = G.apply(variables, latents(keys[:, 2]), labels, method='mapping')
      ws = jnp.where(jnp.arange(G.num_ws)[:, None] < cutoff, ws, other)
    return ws, labels, keys[:, 3], updated['buffers']

  def synthesize(params, buffers, ws, noise_keys):
    return G.apply(dict(params=params, buffers=buffers), ws, 'random', noise_keys, method='synthesis')

  def make_fakes(params, buffers, key, all_labels):
    ws, labels, noise_keys, buffers = map_fakes(params, buffers, key, by_groups(sample_ids(local)), all_labels)
    return synthesize(params, buffers, ws, noise_keys), labels, buffers

  def discriminate(params, images, labels):
    return D.apply({'params': params}, images, labels)

  def update(optimizer, loss_fn, params, opt_state):
    """An optimiser step on the global mean of the local loss -> params, opt_state, loss, gradient norm, aux."""
    def mean_loss(params):
      # Marked as differing between devices at once: one all-reduce a parameter, and not one for each of its uses.
      loss, aux = loss_fn(jax.lax.pcast(params, 'data', to='varying'))
      return jax.lax.pmean(loss, 'data'), aux
    (loss, aux), grads = jax.value_and_grad(mean_loss, has_aux=True)(params)
    grads = jax.tree.map(lambda g: jnp.nan_to_num(g, nan=0., posinf=1e5, neginf=-1e5), grads)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss, optax.tree.norm(grads), aux

  def g_main(state, key, all_labels):
    def loss_fn(params):
      fakes, labels, buffers = make_fakes(params, state.G['buffers'], key, all_labels)
      return losses.generator_loss(discriminate(state.D, fakes, labels)), buffers
    params, opt_state, loss, norm, buffers = update(opt_g, loss_fn, state.G['params'], state.opt_g)
    return state.replace(G=dict(params=params, buffers=buffers), opt_g=opt_state), dict(loss_g=loss, grad_norm_g=norm)

  def g_path_lengths(state, key, all_labels):
    def loss_fn(params):
      ids = sample_ids(local // 2)  # half a batch: stylegan2-ada-pytorch, pl_batch_shrink
      key_fakes, key_directions = jax.random.split(key)
      ws, _, noise_keys, buffers = map_fakes(params, state.G['buffers'], key_fakes, ids, all_labels)
      directions = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key_directions, i), G.image_shape))(ids)
      lengths = losses.path_lengths(lambda w: synthesize(params, buffers, w, noise_keys), ws, directions)
      penalty, pl_mean = losses.path_length_penalty(lengths, state.pl_mean, axis_name='data')
      penalty = penalty.mean()
      return penalty * config.pl_weight * config.pl_interval, (buffers, pl_mean, jax.lax.pmean(penalty, 'data'))
    params, opt_state, _, norm, (buffers, pl_mean, penalty) = update(opt_g, loss_fn, state.G['params'], state.opt_g)
    return (state.replace(G=dict(params=params, buffers=buffers), opt_g=opt_state, pl_mean=pl_mean),
            dict(pl=penalty, grad_norm_pl=norm))

  def d_main(state, key, all_labels, reals, real_labels):
    fakes, labels, buffers = make_fakes(state.G['params'], state.G['buffers'], key, all_labels)

    def loss_fn(params):
      real_logits, fake_logits = discriminate(params, reals, real_labels), discriminate(params, fakes, labels)
      metrics = dict(logits_real=real_logits.mean(), logits_fake=fake_logits.mean(),
                     sign_real=jnp.sign(real_logits).mean())  # r_t of arXiv 2006.06676: near 1 when D overfits
      return losses.discriminator_loss(real_logits, fake_logits), jax.lax.pmean(metrics, 'data')
    params, opt_state, loss, norm, metrics = update(opt_d, loss_fn, state.D, state.opt_d)
    return (state.replace(D=params, opt_d=opt_state, G=dict(state.G, buffers=buffers)),
            dict(metrics, loss_d=loss, grad_norm_d=norm))

  def d_r1(state, reals, real_labels):
    def loss_fn(params):
      penalty = losses.r1_penalty(lambda x: discriminate(params, x, real_labels), reals).mean()
      return penalty * (config.r1_gamma / 2 * config.r1_interval), jax.lax.pmean(penalty, 'data')
    params, opt_state, _, norm, penalty = update(opt_d, loss_fn, state.D, state.opt_d)
    return state.replace(D=params, opt_d=opt_state), dict(r1=penalty, grad_norm_r1=norm)

  def every(interval, phase, state):
    zeros = jax.tree.map(lambda m: jnp.zeros(m.shape, m.dtype), jax.eval_shape(phase, state)[1])
    return jax.lax.cond(state.step % interval == 0, phase, lambda s: (s, zeros), state)

  def iteration(state, images, labels, indices):
    key_g, key_pl, key_d = jax.random.split(jax.random.fold_in(state.key, state.step), 3)
    indices = by_groups(indices)
    reals, real_labels = images[indices] / 127.5 - 1, labels[indices]
    # A phase whose weight is 0 makes no optimiser step: one with zero gradients would still move Adam's state.
    state, metrics = g_main(state, key_g, labels)
    if config.pl_weight:
      state, more = every(config.pl_interval, lambda s: g_path_lengths(s, key_pl, labels), state)
      metrics |= more
    state, more = d_main(state, key_d, labels, reals, real_labels)
    metrics |= more
    if config.r1_gamma:
      state, more = every(config.r1_interval, lambda s: d_r1(s, reals, real_labels), state)
      metrics |= more
    decay = ema_decay(config, state.step)
    average = lambda now, before: now + decay.astype(now.dtype) * (before - now)
    G_ema = dict(params=jax.tree.map(average, state.G['params'], state.G_ema['params']), buffers=state.G['buffers'])
    return state.replace(step=state.step + 1, G_ema=G_ema), metrics

  return iteration


def make_train_call(config, G, D, mesh):
  """Many iterations in one compiled, donated call.

  Args:
    config: the generator's section.
    G, D: of `make_networks`.
    mesh: one-dimensional, axis 'data'.

  Returns:
    f(state, images, labels, indices) -> (state, metrics). The state (donated) and the training set, images
    (N, H, W, C) uint8 and labels (N,) int32, are replicated; indices (iterations, B) int32 are sharded over B. Metrics
    are scalars, means over the iterations of the call in which their phase ran. Any D that divides B / mbstd_group
    devices compute the same up to rounding.

  Raises:
    UserError: settings that cannot work.
  """
  check_config(config, mesh.size)
  iteration = make_iteration(config, G, D, mesh.size)
  intervals = dict(r1=config.r1_interval, grad_norm_r1=config.r1_interval,
                   pl=config.pl_interval, grad_norm_pl=config.pl_interval)

  def call(state, images, labels, indices):
    steps = state.step + jnp.arange(len(indices))
    state, metrics = jax.lax.scan(lambda s, i: iteration(s, images, labels, i), state, indices)
    runs = {name: jnp.maximum((steps % intervals.get(name, 1) == 0).sum(), 1) for name in metrics}
    return state, {name: values.sum() / runs[name] for name, values in metrics.items()}

  sharded = jax.shard_map(call, mesh=mesh, in_specs=(P(), P(), P(), P(None, 'data')), out_specs=P())
  return jax.jit(sharded, donate_argnums=0)


def train(config, workdir, data, mesh):
  """Trains a generator until config.generator.kimg images were seen, or goes on where a stopped run was.

  Writes <workdir>/generator/: network.json (what `load_generator` builds the network from), checkpoints/ with the items
  'state' and 'generator' (variables of G_ema), samples/<kimg>.png, metrics; and, when complete, results/generator.json.

  Args:
    config: the whole config; read are seed and generator. kimg is rounded up to whole calls.
    workdir: path.
    data: data.Data, of which the training images and labels are used; with one class the generator is unconditional.
    mesh: one-dimensional, axis 'data'.

  Returns:
    What stands in results/generator.json; None if SIGTERM came first (everything is saved).

  Raises:
    UserError: settings that cannot work, or a workdir of another config.
    NonFiniteError: a loss is not finite; nothing is saved, the last checkpoint is from before.
  """
  c, workdir = config.generator, pathlib.Path(workdir)
  folder, batch = workdir / 'generator', c.batch_size
  images, labels = data.train.images, data.train.labels.astype(np.int32)
  G, D = make_networks(c, images.shape[1:], len(data.class_names) if len(data.class_names) > 1 else 0)
  train_call = make_train_call(c, G, D, mesh)
  num_iterations = math.ceil(c.kimg * 1000 / (batch * c.iterations_per_call)) * c.iterations_per_call
  everywhere, over_batch = NamedSharding(mesh, P()), NamedSharding(mesh, P(None, 'data'))
  init = jax.jit(lambda key: init_state(c, G, D, key), out_shardings=everywhere)
  draw_samples = jax.jit(lambda variables: sample_images(G, variables, jax.random.key(config.seed)))

  with contextlib.ExitStack() as stack:
    checkpoints = stack.enter_context(Checkpoints(folder / 'checkpoints'))
    preemption = stack.enter_context(Preemption())
    template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere),
                            jax.eval_shape(init, jax.random.key(config.seed)))
    restored = checkpoints.restore({'state': template})
    state = restored.items['state'] if restored else init(jax.random.key(config.seed))
    step = saved_step = restored.step if restored else 0
    if restored:
      logging.info('generator: going on from iteration %d', step)
    metrics, seconds = (restored.metadata['metrics'], restored.metadata['seconds']) if restored else ({}, 0.)
    first_process = jax.process_index() == 0
    if first_process:
      write_json_atomic(folder / 'network.json', network_fields(G))
      writer = stack.enter_context(MetricWriter(folder, step))
    progress = Progress('generator', num_iterations * batch, 'images')
    images_seen = devices.replicate(mesh, images), devices.replicate(mesh, labels)
    began = saved_at = time.monotonic()

    def save():
      checkpoints.save(step, {'state': state, 'generator': state.G_ema},
                       dict(images=step * batch, seconds=seconds + time.monotonic() - began, metrics=metrics))

    while step < num_iterations:
      if preemption.requested:
        if step > saved_step:
          save()
        logging.info('generator: stopped at %d of %d images', step * batch, num_iterations * batch)
        return None
      indices = batch_indices(config.seed, step * batch, c.iterations_per_call * batch, len(images)).reshape(-1, batch)
      indices = jax.make_array_from_callback(indices.shape, over_batch, lambda where, indices=indices: indices[where])
      call_began = time.monotonic()
      state, metrics = train_call(state, *images_seen, indices)
      metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
      before, step = step, step + c.iterations_per_call
      check_finite(metrics, before, step)
      metrics['images_per_second'] = c.iterations_per_call * batch / (time.monotonic() - call_began)
      if first_process:
        writer.write(step, dict(metrics, images=step * batch))
      progress.update(step * batch, {name: metrics[name] for name in (*LOSSES, 'sign_real') if name in metrics})
      done, every = step == num_iterations, c.snapshot_kimg * 1000
      if done or step * batch // every > before * batch // every:
        samples = jax.device_get(draw_samples(state.G_ema))
        if first_process:
          pictures.save_png(folder / 'samples' / f'{step * batch // 1000:06d}.png',
                            pictures.grid(samples, labels=data.class_names[:len(samples)]))
      if any_process(done or time.monotonic() - saved_at > c.checkpoint_minutes * 60):
        save()
        saved_step, saved_at = step, time.monotonic()

    checkpoints.wait()
    result = dict(job='generator', images=step * batch, iterations=step, seconds=seconds + time.monotonic() - began,
                  metrics=metrics, settings=c.to_dict(), seed=config.seed, data=data.source,
                  **devices.describe(mesh))
    if first_process:
      write_json_atomic(workdir / 'results' / 'generator.json', result)
    return result


def network_fields(G):
  """The fields of a Generator that its variables belong to, as JSON holds them."""
  return {f.name: getattr(G, f.name) for f in dataclasses.fields(G) if f.name not in ('dtype', 'parent', 'name')}


def sample_images(G, variables, key, rows=10, columns=10):
  """Pictures to look at: (R, columns, H, W, C) uint8, a class a row (one row if unconditional), a latent a column."""
  rows = min(rows, G.num_classes) or 1
  z = jnp.tile(jax.random.normal(key, (columns, G.z_dim)), (rows, 1))
  images = G.apply(variables, z, jnp.repeat(jnp.arange(rows), columns))
  return environment.to_uint8(images).reshape(rows, columns, *G.image_shape)


def check_finite(metrics, before, step):
  """Raises NonFiniteError if a loss of the iterations `before` ... `step` is NaN or infinite."""
  for name in LOSSES:
    if not math.isfinite(metrics.get(name, 0.)):
      raise NonFiniteError(f'generator: {name} became {metrics[name]} between iterations {before} and {step}: '
                           'lower generator.lr or raise generator.r1_gamma, and go on from the last checkpoint')
