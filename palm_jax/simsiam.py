"""SimSiam (Chen and He, arXiv 2011.10566): heads, loss, optimiser, and the monitors that see a
collapse."""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from palm_jax.base import checks
from palm_jax.base.errors import UserError
from palm_jax.contrastive import normalize, supcon

OBJECTIVES = 'simsiam', 'simclr', 'supcon'
# torch's nn.Linear: uniform within 1 / sqrt(fan_in).
LINEAR = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')


def default_config() -> ConfigDict:
  return ConfigDict(
    dict(
      # SimSiam appendix D on CIFAR; PatrickHua/SimSiam and lightly; solo-learn has 3
      proj_layers=2,
      proj_hidden=2048,  # PatrickHua/SimSiam
      proj_dim=2048,  # SimSiam 4
      pred_hidden=512,  # SimSiam 4
      output_bn_affine=False,  # facebookresearch/simsiam simsiam/builder.py
      symmetric=True,  # SimSiam equation 2; PALM 4.2 writes one direction only
      # or 'simclr', 'supcon' (contrastive.py), on the projections and without the predictor. Of
      # 'supcon' positives are all frames of an episode where someone plays, of a label elsewhere
      objective='simsiam',
      # of the contrastive objectives: SimCLR appendix B.9 on CIFAR; SupCon has 0.1
      temperature=0.5,
      mask_episode=False,  # simclr: other frames of a frame's episode are no negatives of it
      augment='none',  # PALM 4.2: consecutive frames are the views; 'simsiam' for "PALM + data aug"
      lr=0.03,  # for 256 samples, scaled with the batch; PatrickHua/SimSiam
      momentum=0.9,  # SimSiam appendix D
      weight_decay=5e-4,  # SimSiam appendix D, on every parameter
      warmup_updates=0,  # SimSiam 4
      fix_predictor_lr=True,  # facebookresearch/simsiam README --fix-pred-lr
    )
  )


RANGES = dict(proj_layers=checks.Range(1, 64), proj_hidden=checks.SIZE, proj_dim=checks.SIZE)
RANGES |= dict(pred_hidden=checks.SIZE, temperature=checks.Range(0, 1000, above=True))
RANGES |= dict(lr=checks.RATE, momentum=checks.SHARE, weight_decay=checks.SHARE)
RANGES |= dict(warmup_updates=checks.COUNT_OR_0)


def check(c: ConfigDict) -> None:
  """Raises UserError on invalid settings of the config's section `simsiam`."""
  checks.choice('simsiam.objective', c.objective, OBJECTIVES)
  checks.ranges('simsiam', c, RANGES)


class Projector(nn.Module):
  """(Linear, BatchNorm, ReLU) `layers - 1` times, then Linear, BatchNorm; no biases.

  Attributes:
    output_affine: learn scale and offset in the last BatchNorm.
    axis_name: mesh axis over which batch statistics are averaged in training; None keeps them
      local.
    dtype: compute type; None follows parameters and input. Batch statistics are at least float32.
  """

  layers: int = 2
  hidden: int = 2048
  dim: int = 2048
  output_affine: bool = False
  axis_name: str | None = None
  dtype: Any = None

  @nn.compact
  def __call__(self, h, train: bool):
    """h (B, F) -> z (B, dim)."""
    x = h
    for layer in range(1, self.layers + 1):
      last = layer == self.layers
      x = nn.Dense(
        self.dim if last else self.hidden,
        use_bias=False,
        kernel_init=LINEAR,
        dtype=self.dtype,
        name=f'linear{layer}',
      )(x)
      affine = self.output_affine or not last
      x = nn.BatchNorm(
        not train,
        momentum=0.9,
        epsilon=1e-5,
        axis_name=self.axis_name,
        dtype=self.dtype,
        use_scale=affine,
        use_bias=affine,
        name=f'norm{layer}',
      )(x)
      if not last:
        x = nn.relu(x)
    return x


class Predictor(nn.Module):
  """Linear without bias, BatchNorm, ReLU, Linear with bias. Attributes as in `Projector`."""

  hidden: int = 512
  dim: int = 2048
  axis_name: str | None = None
  dtype: Any = None

  @nn.compact
  def __call__(self, z, train: bool):
    """z (B, dim) -> p (B, dim)."""
    x = nn.Dense(self.hidden, use_bias=False, kernel_init=LINEAR, dtype=self.dtype, name='linear1')(
      z
    )
    x = nn.BatchNorm(
      not train,
      momentum=0.9,
      epsilon=1e-5,
      axis_name=self.axis_name,
      dtype=self.dtype,
      name='norm1',
    )(x)
    return nn.Dense(self.dim, kernel_init=LINEAR, dtype=self.dtype, name='linear2')(nn.relu(x))


class Modules(NamedTuple):
  """The three networks; parameters and batch statistics are dictionaries with the same names."""

  encoder: nn.Module
  projector: nn.Module
  predictor: nn.Module


class Aux(NamedTuple):
  """What one forward pass leaves beside the loss; nothing in it carries a gradient."""

  h: jax.Array  # (B, F) representation of s
  h_next: jax.Array  # (B, F) representation of s_next
  z: jax.Array  # (B, proj_dim) projection of s
  z_next: jax.Array  # (B, proj_dim) projection of s_next
  batch_stats: dict
  metrics: dict  # scalars over the global batch


def make_modules(
  encoder: nn.Module, config: ConfigDict, axis_name: str | None = None, dtype: Any = None
) -> Modules:
  """Projector and predictor of `config` around an encoder, which must have been made with the same
  `axis_name`.

  Raises:
    UserError: for a number of projector layers other than 2 or 3.
  """
  if config.proj_layers not in (2, 3):
    raise UserError(
      f'proj_layers={config.proj_layers}: expected 2 (CIFAR) or 3 (ImageNet); set one of them'
    )
  return Modules(
    encoder,
    Projector(
      config.proj_layers,
      config.proj_hidden,
      config.proj_dim,
      config.output_bn_affine,
      axis_name,
      dtype,
    ),
    Predictor(config.pred_hidden, config.proj_dim, axis_name, dtype),
  )


def init(modules: Modules, key: jax.Array, images: jax.Array) -> tuple[Any, Any]:
  """(params, batch_stats) of all three networks for images (B, H, W, C); both have the names of
  `Modules`."""

  def init_all(key, x):
    params, batch_stats = {}, {}
    for name, module, k in zip(Modules._fields, modules, jax.random.split(key, 3), strict=True):
      x, variables = module.init_with_output(k, x, train=False)
      params[name], batch_stats[name] = variables['params'], variables.get('batch_stats', {})
    return params, batch_stats

  return jax.jit(init_all)(key, images)


def _cosine(a, b):
  return jnp.mean(jnp.sum(normalize(a) * normalize(b), axis=-1))


def loss(
  p1: jax.Array,
  z1: jax.Array,
  p2: jax.Array | None,
  z2: jax.Array,
  symmetric: bool = True,
) -> jax.Array:
  """Negative cosine between prediction and detached projection of the other view, in [-1, 1].

  SimSiam equation 2, 1/2 D(p1, sg z2) + 1/2 D(p2, sg z1); not symmetric: D(p1, sg z2) alone (PALM
  4.2).

  Args:
    p1, z1, p2, z2: (B, D) predictions and projections of the two views; not symmetric ignores z1
      and p2.
  Returns:
    a scalar, the mean over these B rows, in at least float32.
  """
  forward_loss = -_cosine(p1, jax.lax.stop_gradient(z2))
  if not symmetric:
    return forward_loss
  return (forward_loss - _cosine(p2, jax.lax.stop_gradient(z1))) / 2


def forward(
  modules: Modules,
  params: dict[str, Any],
  batch_stats: dict[str, Any],
  s: jax.Array,
  s_next: jax.Array,
  train: bool = True,
  symmetric: bool = True,
  axis_name: str | None = None,
  objective: str = 'simsiam',
  temperature: float = 0.5,
  labels: jax.Array | None = None,
  related: jax.Array | None = None,
) -> tuple[jax.Array, Aux]:
  """SimSiam, or another objective on the same networks, over a batch of pairs.

  The views go through the networks one after the other, each with the statistics of its own batch;
  running statistics see s first, then s_next (facebookresearch/simsiam simsiam/builder.py). Not
  symmetric leaves the predictor out for s_next. Differentiate the returned loss as it is: it is
  already the mean over `axis_name`, and so its gradient needs no further collective under
  `check_vma=True`.

  Args:
    modules: a `Modules`.
    params, batch_stats: dictionaries with the names of `Modules`, as from `init`.
    s, s_next: (B, H, W, C) uint8, or floats in [-1, 1] after augmentation.
    train: batch statistics (True) or running statistics, which then stay as they are (False).
    axis_name: mesh axis of the batch, the one the modules were made with.
    objective: 'simsiam', 'simclr' or 'supcon'; the last two leave the predictor out.
    temperature: of the last two.
    labels: (B,) integers, for 'supcon'.
    related: (B,) integers; samples that share one are no negatives in the last two.
  Returns:
    (loss, Aux). Metrics: `loss`; `z_std`, the standard deviation of the l2-normalised z of s over
    the batch, mean over dimensions; `z_std_ratio`, the same times sqrt(proj_dim), healthy 1,
    collapsed 0; `h_cosine`, mean cosine between the representations of a pair.
  """
  stats = dict(batch_stats)

  def apply(name, x):
    module, variables = getattr(modules, name), {'params': params[name], 'batch_stats': stats[name]}
    if not train:
      return module.apply(variables, x, train=False)
    y, updated = module.apply(variables, x, train=True, mutable=['batch_stats'])
    stats[name] = updated.get('batch_stats', {})
    return y

  def mean(x):
    return jax.lax.pmean(x, axis_name) if axis_name else x

  h = apply('encoder', s)  # (B, F)
  z = apply('projector', h)  # (B, D)
  p = apply('predictor', z) if objective == 'simsiam' else None  # (B, D)
  h_next = apply('encoder', s_next)
  z_next = apply('projector', h_next)
  if p is not None:
    p_next = apply('predictor', z_next) if symmetric else None
    value = mean(loss(p, z, p_next, z_next, symmetric))
  else:
    kinds = labels if objective == 'supcon' else None
    value = mean(supcon(z, z_next, kinds, temperature, axis_name, related))

  h, h_next, z, z_next, detached_loss = jax.lax.stop_gradient((h, h_next, z, z_next, value))
  unit = normalize(z)
  variance = mean(jnp.mean((unit - mean(jnp.mean(unit, axis=0))) ** 2, axis=0))  # (D,)
  z_std = jnp.mean(jnp.sqrt(variance))
  metrics = {
    'loss': detached_loss,
    'z_std': z_std,
    'z_std_ratio': z_std * math.sqrt(z.shape[-1]),
    'h_cosine': mean(_cosine(h, h_next)),
  }
  return value, Aux(h, h_next, z, z_next, stats, metrics)


def learning_rate(config: ConfigDict, total_updates: int, batch_size: int) -> optax.Schedule:
  """Schedule of encoder and projector: linear warm-up, then cosine to 0 at `total_updates`; peak lr
  * batch / 256.

  Raises:
    UserError: where the warm-up leaves no update.
  """
  if not 0 <= config.warmup_updates < total_updates:
    raise UserError(
      f'warmup_updates={config.warmup_updates} of {total_updates} updates: expected at least 0 '
      'and fewer '
      'than there are updates; shorten the warm-up or train longer'
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
