"""SimSiam (Chen and He, arXiv 2011.10566) and other objectives on its networks: the loss, and the
monitors that see a collapse."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from palm_jax import objectives
from palm_jax.base import checks, devices
from palm_jax.base.errors import UserError
from palm_jax.contrastive import normalize, supcon
from palm_jax.heads import Predictor, Projector
from palm_jax.layers.normalization import MOMENTUM

OBJECTIVES = 'simsiam', 'simclr', 'supcon', 'byol', 'vicreg', 'barlow'
PREDICTING = 'simsiam', 'byol'  # the others leave the predictor out
# BYOL 3.3 and VICReg 4.2: "not batch normalized"; else VICReg's variance could not shrink.
WITHOUT_OUTPUT_NORM = 'byol', 'vicreg'


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
      # or 'byol', 'vicreg', 'barlow' (objectives.py), 'simclr', 'supcon' (contrastive.py); all but
      # 'byol' on the projections and without the predictor. Of 'supcon' positives are all frames of
      # an episode where someone plays, of a label elsewhere
      objective='simsiam',
      # of the contrastive objectives: SimCLR appendix B.9 on CIFAR; SupCon has 0.1
      temperature=0.5,
      tau=0.996,  # byol: what the target keeps in the first update; a cosine brings it to 1
      vicreg_weights=objectives.VICREG_WEIGHTS,  # of invariance, variance, covariance
      barlow_lambda=objectives.BARLOW_LAMBDA,
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
RANGES |= dict(warmup_updates=checks.COUNT_OR_0, tau=checks.SHARE, barlow_lambda=checks.AMOUNT)
RANGES |= dict(vicreg_weights=checks.AMOUNT._replace(many=True))


def check(c: ConfigDict) -> None:
  """Raises UserError on invalid settings of the config's section `simsiam`."""
  checks.choice('simsiam.objective', c.objective, OBJECTIVES)
  checks.ranges('simsiam', c, RANGES)
  if len(c.vicreg_weights) != 3:
    raise UserError(
      f'simsiam.vicreg_weights={tuple(c.vicreg_weights)}: expected three, of invariance, variance '
      'and covariance'
    )


def options(c: ConfigDict) -> dict[str, Any]:
  """What `forward` takes of the config's section `simsiam`."""
  names = 'symmetric', 'objective', 'temperature', 'vicreg_weights', 'barlow_lambda'
  return {name: c[name] for name in names}


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
      output_norm=config.objective not in WITHOUT_OUTPUT_NORM,
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


def first_target(params: dict[str, Any], config: ConfigDict) -> dict[str, Any]:
  """{'target': BYOL's target network at the start}, or {} of another objective.

  These are the parameters of encoder and projector as they are. There are no running statistics:
  the target sees every batch with the batch's own.
  """
  if config.objective != 'byol':
    return {}
  return {'target': {name: params[name] for name in ('encoder', 'projector')}}


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
  forward_loss = -objectives.cosine(p1, jax.lax.stop_gradient(z2))
  if not symmetric or p2 is None:
    return forward_loss
  return (forward_loss - objectives.cosine(p2, jax.lax.stop_gradient(z1))) / 2


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
  target: dict[str, Any] | None = None,
  vicreg_weights: tuple[float, float, float] = objectives.VICREG_WEIGHTS,
  barlow_lambda: float = objectives.BARLOW_LAMBDA,
) -> tuple[jax.Array, Aux]:
  """SimSiam, or another objective on the same networks, over a batch of pairs.

  The views go through each network in turn, each with the statistics of its own batch;
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
    objective: one of OBJECTIVES.
    temperature: of 'simclr' and 'supcon'.
    labels: (B,) integers, for 'supcon'.
    related: (B,) integers; samples that share one are no negatives in 'simclr' and 'supcon'.
    target: parameters of the target network, for 'byol'; see `first_target`.
    vicreg_weights, barlow_lambda: see objectives.py.
  Returns:
    (loss, Aux). Metrics: `loss`; `z_std` and `z_std_ratio`, see `spread`; `h_cosine`, mean cosine
    between the representations of a pair.
  """
  stats = dict(batch_stats)

  def apply(name, views, params=params):
    """The module's results of the views."""
    module = getattr(modules, name)
    run = lambda stats, x: module.apply(
      {'params': params[name], 'batch_stats': stats}, x, train=train, mutable=['batch_stats']
    )
    results, after = in_turn(run, stats[name], views, train)
    if train and params is not target:
      stats[name] = after
    return results

  views = s, s_next
  h, h_next = apply('encoder', views)  # (B, F) each
  z, z_next = apply('projector', (h, h_next))  # (B, D) each
  p: Any = None
  p_next: Any = None
  if objective in PREDICTING and symmetric:
    p, p_next = apply('predictor', (z, z_next))  # (B, D) each
  elif objective in PREDICTING:
    (p,) = apply('predictor', (z,))
  if objective == 'simsiam':
    value = devices.mean(loss(p, z, p_next, z_next, symmetric), axis_name)
  elif objective == 'byol':
    t, t_next = apply('projector', apply('encoder', views, target), target)
    value = objectives.byol(p, t, p_next, t_next, axis_name)
  elif objective == 'vicreg':
    value = objectives.vicreg(z, z_next, vicreg_weights, axis_name)
  elif objective == 'barlow':
    value = objectives.barlow(z, z_next, barlow_lambda, axis_name)
  elif objective in ('simclr', 'supcon'):
    kinds = labels if objective == 'supcon' else None
    value = devices.mean(supcon(z, z_next, kinds, temperature, axis_name, related), axis_name)
  else:
    raise ValueError(f'{objective!r} is not one of {OBJECTIVES} or has no loss here')

  return value, _aux(h, h_next, z, z_next, stats, value, objective, axis_name)


def _aux(h, h_next, z, z_next, stats, value, objective, axis_name):
  """Aux of a forward pass whose loss is `value`."""
  h, h_next, z, z_next, detached_loss = jax.lax.stop_gradient((h, h_next, z, z_next, value))
  alike = devices.mean(objectives.cosine(h, h_next), axis_name)
  metrics = dict(loss=detached_loss, **spread(z, objective, axis_name), h_cosine=alike)
  return Aux(h, h_next, z, z_next, stats, metrics)


def in_turn(
  run: Callable[[Any, jax.Array], tuple[Any, Any]],
  stats: Any,
  views: Sequence[jax.Array],
  train: bool,
) -> tuple[list[jax.Array], Any]:
  """The views through a network one after the other, as far as its running statistics can tell.

  Accelerators take them at once, each with the statistics of its own batch: half as many kernels
  and, on several devices, half as many sums over them. On CPU that would be two copies more.

  Args:
    run: (statistics, view (B, ...)) -> (result, {'batch_stats': statistics after it}), in training
      a step of normalization.MOMENTUM from those before.
    stats: running statistics before.

  Returns:
    (results of the views, statistics after all of them).
  """
  if devices.platform() == 'cpu' or len(views) == 1:
    results = []
    for view in views:
      result, updated = run(stats, view)
      results.append(result)
      stats = updated.get('batch_stats', {})
    return results, stats
  # In training only the step reads them. From zero it is what each batch adds.
  before = jax.tree.map(jnp.zeros_like, stats) if train else stats
  results, added = jax.vmap(run, (None, 0))(before, jnp.stack(views))
  if train:
    follow = lambda old, steps: functools.reduce(lambda x, step: MOMENTUM * x + step, steps, old)
    stats = jax.tree.map(follow, stats, added.get('batch_stats', {}))
  return list(results), stats


def spread(z: jax.Array, objective: str, axis_name: str | None) -> dict[str, jax.Array]:
  """How far projections z (B, D) of the global batch are apart: what a collapse takes away.

  Returns:
    `z_std`, the standard deviation over the batch of the l2-normalised z, mean over dimensions;
    `z_std_ratio`, the same times sqrt(D), healthy 1, collapsed 0. VICReg compares lengths, not
    directions, and leaves the mean of z free: there both are of z as it is, and the ratio is to the
    deviation that its loss asks for, counted up to that in each dimension.
  """
  x = z.astype(jnp.promote_types(z.dtype, jnp.float32)) if objective == 'vicreg' else normalize(z)
  centred = x - devices.mean(x, axis_name, axis=0)
  stds = jnp.sqrt(devices.mean(centred**2, axis_name, axis=0))  # (D,)
  z_std = jnp.mean(stds)
  if objective == 'vicreg':
    return dict(z_std=z_std, z_std_ratio=jnp.mean(jnp.minimum(stds / objectives.GAMMA, 1)))
  return dict(z_std=z_std, z_std_ratio=z_std * math.sqrt(z.shape[-1]))
