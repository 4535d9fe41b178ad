"""The four kinds of optimiser steps in StyleGAN2's training (stylegan2-ada-pytorch,
training/loss.py, training_loop.py)."""

import jax
import jax.numpy as jnp
import optax

from palm_jax.generator import adaptive_augment, losses


def make_optimizers(config):
  """Adam of G and of D, corrected for lazy regularisation (arXiv 1912.04958, appendix B).

  G's correction holds although path lengths may be off, as in the original; eps is not corrected.
  """

  def adam(interval):
    share = interval / (interval + 1)
    return optax.adam(
      config.lr * share, b1=0.0, b2=0.99**share, eps=1e-8
    )  # stylegan2-ada-pytorch, train.py

  return adam(config.pl_interval), adam(config.r1_interval)


def round_sizes(config, num_devices):
  """Images that a device handles in a round, and how many of them D's minibatch statistic
  compares."""
  images = config.batch_size // (num_devices * config.accumulate)
  return images, min(config.mbstd_group, images)


def make_phases(config, G, D, num_devices):
  """The optimiser steps of an iteration on one device of the mesh axis 'data', in order.

  Each batch is gone through in config.accumulate rounds, whose gradients are averaged. A round is a
  range of global sample ids, of which every device has its share.

  Returns:
    {name: (interval, f)}; a phase is due at iterations that are multiples of its interval, and
    absent if its weight is
    0: a step with zero gradients would still move Adam's state. f(state, images, labels, indices)
    -> (state, metrics): images (N, H, W, C) uint8 and labels (N,) int32 are the whole training set,
    indices (B,) int32 the batch's places in it, those beyond N meaning flipped images
    (config.mirror); metrics are scalars over the global batch.
  """
  round_size, group = round_sizes(config, num_devices)
  opt_g, opt_d = make_optimizers(config)
  ops = adaptive_augment.PIPES[config.augment]

  def sample_ids(r, count):
    return (r * num_devices + jax.lax.axis_index('data')) * count + jnp.arange(count)

  def grouped_ids(r):
    # D's minibatch statistic groups samples that lie round_size / group apart. Laid out so, those
    # are samples with consecutive global ids, whatever the number of devices and rounds.
    return sample_ids(r, round_size).reshape(round_size // group, group).T.reshape(-1)

  def keys_of(state):
    """Keys of this iteration; the last three are those of augmentation."""
    names = 'g', 'path_lengths', 'd', 'augment_g', 'augment_d', 'augment_r1'
    return dict(
      zip(
        names, jax.random.split(jax.random.fold_in(state.key, state.step), len(names)), strict=True
      )
    )

  def fold(key, ids):
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(ids)

  def map_fakes(params, buffers, key, ids, all_labels):
    """Fresh latents through the mapping -> ws, labels (those of random training images), noise
    keys, buffers."""
    key_mixing, key = jax.random.split(key)
    keys = jax.vmap(lambda k: jax.random.split(k, 4))(fold(key, ids))  # (n, 4)
    latents = jax.vmap(lambda k: jax.random.normal(k, (config.z_dim,)))
    labels = all_labels[
      jax.vmap(lambda k: jax.random.randint(k, (), 0, len(all_labels)))(keys[:, 0])
    ]
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
      other = G.apply(variables, latents(keys[:, 2]), labels, method='mapping')
      ws = jnp.where(jnp.arange(G.num_ws)[:, None] < cutoff, ws, other)
    return ws, labels, keys[:, 3], updated['buffers']

  def synthesize(params, buffers, ws, noise_keys):
    return G.apply(
      dict(params=params, buffers=buffers), ws, 'random', noise_keys, method='synthesis'
    )

  def make_fakes(params, buffers, key, ids, all_labels):
    ws, labels, noise_keys, buffers = map_fakes(params, buffers, key, ids, all_labels)
    return synthesize(params, buffers, ws, noise_keys), labels, buffers

  def take_reals(ids, images, labels, indices):
    places = indices[ids]
    if not config.mirror:
      return images[places] / 127.5 - 1, labels[places]
    flipped, places = places >= len(images), places % len(images)
    reals = images[places]
    return jnp.where(flipped[:, None, None, None], reals[:, :, ::-1], reals) / 127.5 - 1, labels[
      places
    ]

  def discriminate(params, images, labels, p, key, ids):
    if ops:
      images = adaptive_augment.augment(images, fold(key, ids), p, ops)
    return D.apply({'params': params}, images, labels)

  def update(optimizer, loss_fn, params, opt_state, carry):
    """An optimiser step on the mean of the local losses over rounds and devices.

    Args:
      loss_fn: (params, carry, round) -> loss, (carry, metrics); carry goes from round to round.

    Returns:
      params, opt_state, carry, and the means of the loss and of the metrics, and the gradient's
      norm.
    """
    # Each device differentiates its own copy, so there is one all-reduce a parameter, after the
    # last round.
    local, sum_over_devices = jax.vjp(
      lambda tree: jax.lax.pcast(tree, 'data', to='varying'), params
    )
    differentiate = jax.value_and_grad(loss_fn, has_aux=True)

    def one_round(carried, r):
      sums, carry = carried
      (loss, (carry, metrics)), grads = differentiate(local, carry, r)
      return (jax.tree.map(jnp.add, sums, grads), carry), (loss, metrics)

    zeros = jax.lax.pcast(jax.tree.map(jnp.zeros_like, params), 'data', to='varying')
    (grads, carry), means = jax.lax.scan(
      one_round, (zeros, carry), jnp.arange(config.accumulate), unroll=config.accumulate == 1
    )  # no loop, no second copy of the gradients
    loss, metrics = jax.lax.pmean(jax.tree.map(jnp.mean, means), 'data')
    (grads,) = sum_over_devices(
      jax.tree.map(lambda g: g / (config.accumulate * num_devices), grads)
    )
    grads = jax.tree.map(lambda g: jnp.nan_to_num(g, nan=0.0, posinf=1e5, neginf=-1e5), grads)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return (
      optax.apply_updates(params, updates),
      opt_state,
      carry,
      loss,
      metrics,
      optax.tree.norm(grads),
    )

  def count_signs(state, mean_sign):
    if not ops:
      return state
    return state.replace(sign_sum=state.sign_sum + mean_sign, sign_count=state.sign_count + 1)

  def g_main(state, images, labels, indices):
    keys = keys_of(state)

    def loss_fn(params, buffers, r):
      ids = grouped_ids(r)
      fakes, fake_labels, buffers = make_fakes(params, buffers, keys['g'], ids, labels)
      logits = discriminate(state.D, fakes, fake_labels, state.augment_p, keys['augment_g'], ids)
      return losses.generator_loss(logits), (buffers, {})

    params, opt_state, buffers, loss, _, norm = update(
      opt_g, loss_fn, state.G['params'], state.opt_g, state.G['buffers']
    )
    return state.replace(G=dict(params=params, buffers=buffers), opt_g=opt_state), dict(
      loss_g=loss, grad_norm_g=norm
    )

  def path_lengths(state, images, labels, indices):
    def loss_fn(params, carry, r):
      buffers, pl_mean = carry
      ids = sample_ids(r, round_size // 2)  # half a batch: stylegan2-ada-pytorch, pl_batch_shrink
      key_fakes, key_directions = jax.random.split(keys_of(state)['path_lengths'])
      ws, _, noise_keys, buffers = map_fakes(params, buffers, key_fakes, ids, labels)
      directions = jax.vmap(lambda k: jax.random.normal(k, G.image_shape))(
        fold(key_directions, ids)
      )
      lengths = losses.path_lengths(
        lambda w: synthesize(params, buffers, w, noise_keys), ws, directions
      )
      penalty, pl_mean = losses.path_length_penalty(lengths, pl_mean, axis_name='data')
      penalty = penalty.mean()
      return penalty * config.pl_weight * config.pl_interval, ((buffers, pl_mean), penalty)

    params, opt_state, (buffers, pl_mean), _, penalty, norm = update(
      opt_g, loss_fn, state.G['params'], state.opt_g, (state.G['buffers'], state.pl_mean)
    )
    return (
      state.replace(G=dict(params=params, buffers=buffers), opt_g=opt_state, pl_mean=pl_mean),
      dict(pl=penalty, grad_norm_pl=norm),
    )

  def d_main(state, images, labels, indices):
    keys, G_params = keys_of(state), state.G['params']
    key_real, key_fake = jax.random.split(keys['augment_d'])

    def loss_fn(params, buffers, r):
      ids = grouped_ids(r)
      fakes, fake_labels, buffers = make_fakes(G_params, buffers, keys['d'], ids, labels)
      reals, real_labels = take_reals(ids, images, labels, indices)
      real_logits = discriminate(params, reals, real_labels, state.augment_p, key_real, ids)
      fake_logits = discriminate(params, fakes, fake_labels, state.augment_p, key_fake, ids)
      metrics = dict(
        logits_real=real_logits.mean(),
        logits_fake=fake_logits.mean(),
        sign_real=jnp.sign(real_logits).mean(),
      )  # r_t of arXiv 2006.06676: near 1 when D overfits
      return losses.discriminator_loss(real_logits, fake_logits), (buffers, metrics)

    params, opt_state, buffers, loss, metrics, norm = update(
      opt_d, loss_fn, state.D, state.opt_d, state.G['buffers']
    )
    state = state.replace(D=params, opt_d=opt_state, G=dict(state.G, buffers=buffers))
    return count_signs(state, metrics['sign_real']), dict(metrics, loss_d=loss, grad_norm_d=norm)

  def d_r1(state, images, labels, indices):
    key = keys_of(state)['augment_r1']

    def loss_fn(params, carry, r):
      ids = grouped_ids(r)
      reals, real_labels = take_reals(ids, images, labels, indices)
      penalties, logits = losses.r1_penalty(
        lambda x: discriminate(params, x, real_labels, state.augment_p, key, ids), reals
      )
      penalty = penalties.mean()
      return penalty * (config.r1_gamma / 2 * config.r1_interval), (
        carry,
        (penalty, jnp.sign(logits).mean()),
      )

    params, opt_state, _, _, (penalty, sign), norm = update(
      opt_d, loss_fn, state.D, state.opt_d, ()
    )
    return count_signs(state.replace(D=params, opt_d=opt_state), sign), dict(
      r1=penalty, grad_norm_r1=norm
    )

  phases = dict(
    g_main=(1, g_main),
    path_lengths=(config.pl_interval, path_lengths),
    d_main=(1, d_main),
    r1=(config.r1_interval, d_r1),
  )
  off = {'path_lengths': not config.pl_weight, 'r1': not config.r1_gamma}
  return {name: phase for name, phase in phases.items() if not off.get(name)}
