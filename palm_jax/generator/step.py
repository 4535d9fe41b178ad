"""One iteration of StyleGAN2's training, compiled.

The loop of stylegan2-ada-pytorch (training/training_loop.py): Gmain, [path lengths every 4], Dmain,
[R1 every 16], the moving average of G, [every 4 the strength of augmentation]. What it computes
does not depend on the number of devices, where each has as many pictures as D compares.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from palm_jax.generator import adaptive_augment
from palm_jax.generator.discriminator import Discriminator
from palm_jax.generator.phases import make_optimizers, make_phases
from palm_jax.generator.sines import TrainedNetwork

OF_G = 'g_main', 'path_lengths'  # phases that move G


class State(flax.struct.PyTreeNode):
  """Everything that a run is; a checkpoint holds all of it.

  Attributes:
    step: () int32 iterations done.
    G: {'params', 'buffers'} of the generator.
    G_ema: the same, params averaged over the run: the network to use.
    D: params of the discriminator.
    opt_g, opt_d: Adam's states, each shared by a network's main and regularisation steps.
    pl_mean: () running mean of the path lengths.
    augment_p: () probability of each augmentation.
    sign_sum, sign_count: () sum of mean sign(D(real)) over the batches since augment_p last moved,
      and their number.
    key: typed key; every draw is a function of (key, step, phase, global sample id).
  """

  step: jax.Array
  G: Any
  G_ema: Any
  D: Any
  opt_g: optax.OptState
  opt_d: optax.OptState
  pl_mean: jax.Array
  augment_p: jax.Array
  sign_sum: jax.Array
  sign_count: jax.Array
  key: jax.Array


def init_state(config: ConfigDict, G: TrainedNetwork, D: Discriminator, key: jax.Array) -> State:
  """The first state, as a pure function: jit it with the shardings it should have."""
  key, key_g, key_d = jax.random.split(key, 3)
  label = jnp.zeros((1,), jnp.int32)
  zero = jnp.zeros(())
  generator = G.init(key_g, jnp.zeros((1, config.z_dim)), label)
  discriminator = D.init(key_d, jnp.zeros((1, *G.image_shape)), label)['params']
  opt_g, opt_d = make_optimizers(config)
  return State(
    step=jnp.zeros((), jnp.int32),
    G=generator,
    G_ema=jax.tree.map(jnp.copy, generator),
    D=discriminator,
    opt_g=opt_g.init(generator['params']),
    opt_d=opt_d.init(discriminator),
    pl_mean=zero,
    augment_p=zero,
    sign_sum=zero,
    sign_count=zero,
    key=key,
  )


def make_train_call(
  config: ConfigDict, G: TrainedNetwork, D: Discriminator, mesh: Mesh
) -> Callable:
  """Many iterations in one compiled, donated call.

  Args:
    config: the generator's section, of which `networks.check_config` has nothing to say.
    G, D: of `networks.make_networks`.
    mesh: one-dimensional, axis 'data'.

  Returns:
    f(state, images, labels, indices) -> (state, metrics), everything replicated. The state is
    donated; images (N, H, W, C) uint8 and labels (N,) int32 are the training set, indices
    (iterations, B) int32 of `samples.batch_indices`. With data_on='host' images are only those of
    the call, (iterations, B, H, W, C), as `feed.feed` gathers them. Metrics are scalars, means over
    the iterations of the call in which their phase ran, and augment_p after the last. Any number of
    devices that divides B / (rounds * mbstd_group) computes the same up to rounding.
  """
  phases = make_phases(config, G, D, mesh.size)

  def call(state, images, labels, indices):
    steps = state.step + jnp.arange(len(indices))
    if config.data_on == 'host':
      step = lambda s, x: iteration(config, phases, s, x[1], labels, x[0])
      state, metrics = jax.lax.scan(step, state, (indices, images))
    else:
      step = lambda s, i: iteration(config, phases, s, images, labels, i)
      state, metrics = jax.lax.scan(step, state, indices)
    means = {}
    for phase, (interval, _) in phases.items():
      runs = jnp.maximum(is_due(config, phase, interval, steps).sum(), 1)
      means |= {name: values.sum() / runs for name, values in metrics[phase].items()}
    if config.augment != 'none':
      means['augment_p'] = state.augment_p
    return state, means

  sharded = jax.shard_map(call, mesh=mesh, in_specs=P(), out_specs=P())
  return jax.jit(sharded, donate_argnums=0)


def iteration(
  config: ConfigDict,
  phases: dict[str, tuple[int, Callable]],
  state: State,
  images: jax.Array,
  labels: jax.Array,
  indices: jax.Array,
) -> tuple[State, dict]:
  """One iteration on one device of the mesh axis 'data'.

  Args:
    phases: of `make_phases`, which says what the other arguments are.

  Returns:
    The new state, and {phase: its metrics}, zero where the phase did not run.
  """
  metrics = {}
  for name, (interval, phase) in phases.items():
    run = lambda s, phase=phase: phase(s, images, labels, indices)
    always = interval == 1 and not waits(config, name)
    due = is_due(config, name, interval, state.step)
    state, metrics[name] = run(state) if always else run_if_due(due, run, state)
  state = average_generator(config, state)
  if config.augment != 'none':
    state = adjust_augmentation(config, state)
  return state.replace(step=state.step + 1), metrics


def waits(config: ConfigDict, phase: str) -> bool:
  """Whether a phase begins only after D has learned alone."""
  return bool(config.d_alone_kimg) and phase in OF_G


def is_due(config: ConfigDict, phase: str, interval: int, step: jax.Array) -> jax.Array:
  """Whether a phase runs in iterations `step`: bool, of its shape."""
  due = step % interval == 0
  if waits(config, phase):
    due &= ~is_alone(config, step)
  return due


def is_alone(config: ConfigDict, step: jax.Array) -> jax.Array:
  """Whether D learns alone in iterations `step`: bool, of its shape."""
  return step * float(config.batch_size) < 1000 * config.d_alone_kimg


def run_if_due(due: jax.Array, run: Callable, state: State) -> tuple[State, dict]:
  """`run(state)` -> (state, metrics) where it is due, else state and zeros."""
  run = jax.jit(run)  # traced once, for its shapes and for the branch
  zeros = jax.tree.map(lambda m: jnp.zeros(m.shape, m.dtype), jax.eval_shape(run, state)[1])
  return jax.lax.cond(due, run, lambda s: (s, zeros), state)


def average_generator(config: ConfigDict, state: State) -> State:
  """Moves G_ema towards G; buffers are taken as they are. Nothing moves while D learns alone."""
  decay = ema_decay(config, state.step)
  mix = lambda now, before: now + jnp.asarray(decay, now.dtype) * (before - now)
  params = jax.tree.map(mix, state.G['params'], state.G_ema['params'])
  averaged = dict(params=params, buffers=state.G['buffers'])
  if config.d_alone_kimg:
    alone = is_alone(config, state.step)
    averaged = jax.tree.map(lambda new, old: jnp.where(alone, old, new), averaged, state.G_ema)
  return state.replace(G_ema=averaged)


def ema_decay(config: ConfigDict, step: jax.Array) -> jax.Array:
  """Decay of G_ema after iteration `step`: () float.

  With a ramp it is zero at step 0: the first average is a copy. A run that starts from trained
  networks has no ramp, as in the original.
  """
  half_life = config.ema_kimg * 1000.0
  if config.ema_rampup and not config.init_from:
    half_life = jnp.minimum(half_life, step * float(config.batch_size) * config.ema_rampup)
  return 0.5 ** (config.batch_size / jnp.maximum(half_life, 1e-8))


def adjust_augmentation(config: ConfigDict, state: State) -> State:
  """Every config.ada_interval iterations: moves augment_p by the signs, and counts anew."""
  p = adaptive_augment.update_p(
    state.augment_p,
    state.sign_sum / state.sign_count,
    config.batch_size,
    config.ada_interval,
    config.ada_target,
    config.ada_kimg,
  )
  due = (state.step + 1) % config.ada_interval == 0
  if_due = lambda new, old: jnp.where(due, new, old).astype(old.dtype)
  return state.replace(
    augment_p=if_due(p, state.augment_p),
    sign_sum=if_due(0, state.sign_sum),
    sign_count=if_due(0, state.sign_count),
  )
