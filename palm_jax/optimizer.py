"""The optimiser of encoder, projector and predictor: torch's SGD as SimSiam uses it."""

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from palm_jax.base.errors import UserError


def learning_rate(config: ConfigDict, total_updates: int, batch_size: int) -> optax.Schedule:
  """Schedule of encoder and projector: linear warm-up, then cosine to 0 at `total_updates`; peak lr
  * batch / 256.

  Raises:
    UserError: where the warm-up leaves no update.
  """
  if not 0 <= config.warmup_updates < total_updates:
    raise UserError(
      f'simsiam.warmup_updates={config.warmup_updates} of {total_updates} updates: expected at '
      'least 0 and fewer than there are updates; shorten the warm-up or train longer'
    )
  peak = config.lr * batch_size / 256
  if not config.warmup_updates:
    return optax.cosine_decay_schedule(peak, total_updates)
  return optax.warmup_cosine_decay_schedule(0.0, peak, config.warmup_updates, total_updates)


def make_optimizer(
  config: ConfigDict, total_updates: int, batch_size: int
) -> optax.GradientTransformation:
  """torch's SGD (weight decay into the gradient, before momentum), with the predictor's learning
  rate held constant.

  Source: facebookresearch/simsiam main_simsiam.py. The state is one momentum tree and one counter.

  Args:
    total_updates: length of the cosine schedule.
    batch_size: the global batch, over all devices, by which the learning rate scales.
  Returns:
    an optax transformation for parameters with the names of `Modules`; its update needs `params`.
  """
  schedule = learning_rate(config, total_updates, batch_size)
  peak = config.lr * batch_size / 256

  def scale_by_learning_rates(updates, state, params=None):
    del params
    decayed = schedule(state.count)
    rates = {
      name: peak if config.fix_predictor_lr and name == 'predictor' else decayed for name in updates
    }
    # One type for each leaf, or a float32 schedule under x64 would change the parameters'.
    updates = {
      name: jax.tree.map(lambda u, rate=rates[name]: -jnp.asarray(rate, u.dtype) * u, updates[name])
      for name in updates
    }
    return updates, optax.ScaleByScheduleState(optax.safe_increment(state.count))

  return optax.chain(
    optax.add_decayed_weights(config.weight_decay),
    optax.trace(config.momentum),
    optax.GradientTransformation(
      lambda params: optax.ScaleByScheduleState(jnp.zeros([], jnp.int32)), scale_by_learning_rates
    ),
  )
