"""The four kinds of optimiser steps in StyleGAN2's training, on one device.

After stylegan2-ada-pytorch: training/loss.py and training/training_loop.py.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from palm_jax.generator import adaptive_augment, losses
from palm_jax.generator.discriminator import Discriminator
from palm_jax.generator.sines import TrainedNetwork


@dataclasses.dataclass(frozen=True)
class Setup:
  """What the phases of a run share; none of it changes while it trains.

  Attributes:
    config: the generator's section.
    G, D: the networks.
    num_devices: size of the mesh axis 'data'.
    round_size, group: of `round_sizes`.
    opt_g, opt_d: of `make_optimizers`.
    augmentations: the operations of config.augment.
  """

  config: ConfigDict
  G: TrainedNetwork
  D: Discriminator
  num_devices: int
  round_size: int
  group: int
  opt_g: optax.GradientTransformation
  opt_d: optax.GradientTransformation
  augmentations: tuple[str, ...]


# Of an optimiser step: scalars over the global batch.
Metrics = dict[str, jax.Array]


class Updated(NamedTuple):
  """What an optimiser step gives; loss and metrics are means over rounds and devices."""

  params: Any
  opt_state: optax.OptState
  carry: Any
  loss: jax.Array
  metrics: Any
  grad_norm: jax.Array


def make_phases(
  config: ConfigDict, G: TrainedNetwork, D: Discriminator, num_devices: int
) -> dict[str, tuple[int, Callable]]:
  """The optimiser steps of an iteration on one device of the mesh axis 'data', in order.

  A batch is split into config.accumulate rounds, whose gradients are averaged. A round is a range
  of global sample ids, of which every device has its share.

  Returns:
    {name: (interval, f)}. A phase is due at iterations that are multiples of its interval. It is
    absent if its weight is 0: a step with zero gradients would still move Adam's state.
    f(state, images, labels, indices) -> (state, metrics): images (N, H, W, C) uint8 and labels (N,)
    int32 are the whole training set, indices (B,) int32 the batch's places in it, those beyond N
    meaning flipped images (config.mirror). Metrics are scalars over the global batch.
  """
  round_size, group = round_sizes(config, num_devices)
  opt_g, opt_d = make_optimizers(config)
  augmentations = adaptive_augment.PIPES[config.augment]
  setup = Setup(config, G, D, num_devices, round_size, group, opt_g, opt_d, augmentations)
  phases = {'g_main': (1, g_main)}
  if config.pl_weight:
    phases['path_lengths'] = config.pl_interval, path_lengths
  phases['d_main'] = 1, d_main
  if config.r1_gamma:
    phases['r1'] = config.r1_interval, d_r1
  return {
    name: (interval, functools.partial(phase, setup)) for name, (interval, phase) in phases.items()
  }


def make_optimizers(
  config: ConfigDict,
) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
  """Adam of G and of D, corrected for lazy regularisation (arXiv 1912.04958, appendix B).

  G's correction holds although path lengths may be off, as in the original; eps is not corrected.
  """

  def adam(interval):
    share = interval / (interval + 1)
    # stylegan2-ada-pytorch, train.py
    return optax.adam(config.lr * share, b1=0.0, b2=0.99**share, eps=1e-8)

  return adam(config.pl_interval), adam(config.r1_interval)


def round_sizes(config: ConfigDict, num_devices: int) -> tuple[int, int]:
  """A device's images in a round, and how many of them D's minibatch statistic compares."""
  images = config.batch_size // (num_devices * config.accumulate)
  return images, min(config.mbstd_group, images)


# ---- the four steps


def g_main(
  setup: Setup, state: Any, images: jax.Array, labels: jax.Array, indices: jax.Array
) -> tuple[Any, Metrics]:
  """G towards pictures that D takes for real."""
  keys = iteration_keys(state)

  def loss_fn(params, buffers, round_index):
    ids = grouped_ids(setup, round_index)
    fakes, fake_labels, buffers = make_fakes(setup, params, buffers, keys['g'], ids, labels)
    logits = discriminate(
      setup, state.D, fakes, fake_labels, state.augment_p, keys['augment_g'], ids
    )
    return losses.generator_loss(logits), (buffers, {})

  new = update(setup, setup.opt_g, loss_fn, state.G['params'], state.opt_g, state.G['buffers'])
  state = state.replace(G=dict(params=new.params, buffers=new.carry), opt_g=new.opt_state)
  return state, dict(loss_g=new.loss, grad_norm_g=new.grad_norm)


def path_lengths(
  setup: Setup, state: Any, images: jax.Array, labels: jax.Array, indices: jax.Array
) -> tuple[Any, Metrics]:
  """G towards steps in W that change pictures by the same amount everywhere."""
  config = setup.config
  key_fakes, key_directions = jax.random.split(iteration_keys(state)['path_lengths'])

  def loss_fn(params, carry, round_index):
    buffers, pl_mean = carry
    # Half a batch: stylegan2-ada-pytorch, pl_batch_shrink.
    ids = sample_ids(setup, round_index, setup.round_size // 2)
    ws, _, noise_keys, buffers = map_fakes(setup, params, buffers, key_fakes, ids, labels)
    draw = jax.vmap(lambda key: jax.random.normal(key, setup.G.image_shape))
    directions = draw(fold_in(key_directions, ids))
    lengths = losses.path_lengths(
      lambda w: synthesize(setup, params, buffers, w, noise_keys), ws, directions
    )
    penalty, pl_mean = losses.path_length_penalty(lengths, pl_mean, axis_name='data')
    penalty = penalty.mean()
    return penalty * config.pl_weight * config.pl_interval, ((buffers, pl_mean), penalty)

  carry = state.G['buffers'], state.pl_mean
  new = update(setup, setup.opt_g, loss_fn, state.G['params'], state.opt_g, carry)
  buffers, pl_mean = new.carry
  G = dict(params=new.params, buffers=buffers)
  state = state.replace(G=G, opt_g=new.opt_state, pl_mean=pl_mean)
  return state, dict(pl=new.metrics, grad_norm_pl=new.grad_norm)


def d_main(
  setup: Setup, state: Any, images: jax.Array, labels: jax.Array, indices: jax.Array
) -> tuple[Any, Metrics]:
  """D towards telling real from generated pictures."""
  keys = iteration_keys(state)
  key_real, key_fake = jax.random.split(keys['augment_d'])

  def loss_fn(params, buffers, round_index):
    ids = grouped_ids(setup, round_index)
    fakes, fake_labels, buffers = make_fakes(
      setup, state.G['params'], buffers, keys['d'], ids, labels
    )
    reals, real_labels = take_reals(setup, ids, images, labels, indices)
    real_logits = discriminate(setup, params, reals, real_labels, state.augment_p, key_real, ids)
    fake_logits = discriminate(setup, params, fakes, fake_labels, state.augment_p, key_fake, ids)
    metrics = dict(
      logits_real=real_logits.mean(),
      logits_fake=fake_logits.mean(),
      # r_t of arXiv 2006.06676: near 1 when D overfits.
      sign_real=jnp.sign(real_logits).mean(),
    )
    return losses.discriminator_loss(real_logits, fake_logits), (buffers, metrics)

  new = update(setup, setup.opt_d, loss_fn, state.D, state.opt_d, state.G['buffers'])
  state = state.replace(D=new.params, opt_d=new.opt_state, G=dict(state.G, buffers=new.carry))
  state = count_signs(setup, state, new.metrics['sign_real'])
  return state, dict(new.metrics, loss_d=new.loss, grad_norm_d=new.grad_norm)


def d_r1(
  setup: Setup, state: Any, images: jax.Array, labels: jax.Array, indices: jax.Array
) -> tuple[Any, Metrics]:
  """D towards a small gradient at real pictures."""
  config = setup.config
  key = iteration_keys(state)['augment_r1']

  def loss_fn(params, carry, round_index):
    ids = grouped_ids(setup, round_index)
    reals, real_labels = take_reals(setup, ids, images, labels, indices)
    penalties, logits = losses.r1_penalty(
      lambda x: discriminate(setup, params, x, real_labels, state.augment_p, key, ids), reals
    )
    penalty = penalties.mean()
    metrics = penalty, jnp.sign(logits).mean()
    return penalty * (config.r1_gamma / 2 * config.r1_interval), (carry, metrics)

  new = update(setup, setup.opt_d, loss_fn, state.D, state.opt_d, ())
  penalty, sign_real = new.metrics
  state = count_signs(setup, state.replace(D=new.params, opt_d=new.opt_state), sign_real)
  return state, dict(r1=penalty, grad_norm_r1=new.grad_norm)


# ---- what they share


def update(
  setup: Setup,
  optimizer: optax.GradientTransformation,
  loss_fn: Callable,
  params: Any,
  opt_state: optax.OptState,
  carry: Any,
) -> Updated:
  """An optimiser step on the mean of the local losses over rounds and devices.

  Args:
    setup: of the phases.
    optimizer: of the network.
    loss_fn: (params, carry, round's index) -> loss, (carry, metrics).
    params: of the network.
    opt_state: of the optimizer.
    carry: what each round hands to the next.
  """
  accumulate = setup.config.accumulate
  # Each device differentiates its own copy, so there is one all-reduce a parameter, after the
  # last round.
  local, sum_over_devices = jax.vjp(lambda tree: jax.lax.pcast(tree, 'data', to='varying'), params)
  differentiate = jax.value_and_grad(loss_fn, has_aux=True)

  def one_round(carried, round_index):
    sums, carry = carried
    (loss, (carry, metrics)), grads = differentiate(local, carry, round_index)
    return (jax.tree.map(jnp.add, sums, grads), carry), (loss, metrics)

  zeros = jax.lax.pcast(jax.tree.map(jnp.zeros_like, params), 'data', to='varying')
  # A single round unrolled: no loop, no second copy of the gradients.
  (grads, carry), means = jax.lax.scan(
    one_round, (zeros, carry), jnp.arange(accumulate), unroll=accumulate == 1
  )
  loss, metrics = jax.lax.pmean(jax.tree.map(jnp.mean, means), 'data')
  (grads,) = sum_over_devices(jax.tree.map(lambda g: g / (accumulate * setup.num_devices), grads))
  grads = jax.tree.map(lambda g: jnp.nan_to_num(g, nan=0.0, posinf=1e5, neginf=-1e5), grads)
  updates, opt_state = optimizer.update(grads, opt_state, params)
  params = optax.apply_updates(params, updates)
  return Updated(params, opt_state, carry, loss, metrics, optax.tree.norm(grads))


def iteration_keys(state: Any) -> dict[str, jax.Array]:
  """Keys of this iteration, a phase each; the last three are those of augmentation."""
  names = 'g', 'path_lengths', 'd', 'augment_g', 'augment_d', 'augment_r1'
  keys = jax.random.split(jax.random.fold_in(state.key, state.step), len(names))
  return dict(zip(names, keys, strict=True))


def fold_in(key: jax.Array, ids: jax.Array) -> jax.Array:
  """A key for each of the ids (n,)."""
  return jax.vmap(lambda i: jax.random.fold_in(key, i))(ids)


def sample_ids(setup: Setup, round_index: jax.Array, count: int) -> jax.Array:
  """Global ids of the `count` samples that this device has in a round: (count,)."""
  shard = round_index * setup.num_devices + jax.lax.axis_index('data')
  return shard * count + jnp.arange(count)


def grouped_ids(setup: Setup, round_index: jax.Array) -> jax.Array:
  """`sample_ids` in an order in which D's minibatch statistic compares consecutive ids.

  The statistic groups samples that lie round_size / group apart. So ordered, a group is the same
  samples whatever the number of devices and rounds.
  """
  ids = sample_ids(setup, round_index, setup.round_size)
  return ids.reshape(setup.round_size // setup.group, setup.group).T.reshape(-1)


def map_fakes(
  setup: Setup, params: Any, buffers: Any, key: jax.Array, ids: jax.Array, all_labels: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, Any]:
  """Fresh latents through the mapping, with the labels of random training images.

  Returns:
    ws (n, num_ws, w_dim), labels (n,), noise keys (n,), buffers with w_avg moved.
  """
  config, G = setup.config, setup.G
  key_mixing, key = jax.random.split(key)
  keys = jax.vmap(lambda k: jax.random.split(k, 4))(fold_in(key, ids))  # (n, 4)
  latents = jax.vmap(lambda k: jax.random.normal(k, (config.z_dim,)))
  chosen = jax.vmap(lambda k: jax.random.randint(k, (), 0, len(all_labels)))(keys[:, 0])
  labels = all_labels[chosen]
  variables = dict(params=params, buffers=buffers)
  ws, updated = G.apply(
    variables,
    latents(keys[:, 1]),
    labels,
    update_w_avg=True,
    axis_name='data',
    method='mapping',
    mutable=['buffers'],
  )
  if config.style_mixing:
    key_whether, key_where = jax.random.split(key_mixing)
    cutoff = jnp.where(
      jax.random.bernoulli(key_whether, config.style_mixing),
      jax.random.randint(key_where, (), 1, G.num_ws),
      G.num_ws,
    )
    other: Any = G.apply(variables, latents(keys[:, 2]), labels, method='mapping')
    ws = jnp.where(jnp.arange(G.num_ws)[:, None] < cutoff, ws, other)
  return ws, labels, keys[:, 3], updated['buffers']


def synthesize(
  setup: Setup, params: Any, buffers: Any, ws: jax.Array, noise_keys: jax.Array
) -> jax.Array:
  """Pictures of ws, with random noise: (n, H, W, C)."""
  variables = dict(params=params, buffers=buffers)
  images: Any = setup.G.apply(variables, ws, 'random', noise_keys, method='synthesis')
  return images


def make_fakes(
  setup: Setup, params: Any, buffers: Any, key: jax.Array, ids: jax.Array, all_labels: jax.Array
) -> tuple[jax.Array, jax.Array, Any]:
  """Generated pictures (n, H, W, C), their labels (n,), and buffers with w_avg moved."""
  ws, labels, noise_keys, buffers = map_fakes(setup, params, buffers, key, ids, all_labels)
  return synthesize(setup, params, buffers, ws, noise_keys), labels, buffers


def take_reals(
  setup: Setup, ids: jax.Array, images: jax.Array, labels: jax.Array, indices: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Training pictures of the batch's samples `ids`: (n, H, W, C) in [-1, 1], and labels (n,)."""
  places = indices[ids]
  if setup.config.data_on == 'host':  # only the batch's are there, and flipped already
    return images[ids] / 127.5 - 1, labels[places % len(labels)]
  if not setup.config.mirror:
    return images[places] / 127.5 - 1, labels[places]
  flipped = places >= len(images)
  places = places % len(images)
  reals = images[places]
  reals = jnp.where(flipped[:, None, None, None], reals[:, :, ::-1], reals)
  return reals / 127.5 - 1, labels[places]


def discriminate(
  setup: Setup,
  params: Any,
  images: jax.Array,
  labels: jax.Array,
  p: jax.Array,
  key: jax.Array,
  ids: jax.Array,
) -> jax.Array:
  """D's logits (n,) of pictures, each augmented by its own key with probability p."""
  if setup.augmentations:
    images = adaptive_augment.augment(images, fold_in(key, ids), p, setup.augmentations)
  logits: Any = setup.D.apply({'params': params}, images, labels)
  return logits


def count_signs(setup: Setup, state: Any, mean_sign: jax.Array) -> Any:
  """Notes the mean sign(D(real)) of a batch, by which the strength of augmentation moves."""
  if not setup.augmentations:
    return state
  return state.replace(sign_sum=state.sign_sum + mean_sign, sign_count=state.sign_count + 1)
