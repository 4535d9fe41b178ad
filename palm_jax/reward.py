"""Exploration reward: k-nearest-neighbour entropy of the representation (APT, Liu and Abbeel, arXiv
2103.04551)."""

from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from palm_jax.base import checks
from palm_jax.base.errors import UserError

FEWEST_CHOSEN = 6  # candidates whose distance is computed exactly, where k is 1 or 2
LOG_FLOOR = 1e-6  # log d has no bound on identical frames
ON = 'next', 'current'  # of the two frames
TRANSFORMS = {
  'log1p': jnp.log1p,  # URLB utils.PBE
  'log': lambda d: jnp.log(jnp.maximum(d, LOG_FLOOR)),  # PALM 4.2
}


def default_config() -> ConfigDict:
  return ConfigDict(
    dict(
      k=12,  # URLB icm_apt.yaml; PALM does not say
      # URLB icm_apt.yaml: mean over the k distances; False: the k-th alone, as PALM 4.2 writes it
      average=True,
      transform='log1p',  # URLB utils.PBE; 'log' in PALM 4.2
      include_self=False,  # URLB counts the sample itself as the first of its k neighbours
      clip=0.0,  # URLB icm_apt.yaml; 1e-4 in its aps.yaml
      # PALM 4.2: r(s, a, s'), and s' is what the action changed; 'current': URLB icm_apt.py
      on='next',
    )
  )


RANGES = dict(k=checks.SIZE, clip=checks.AMOUNT)


def check(c: ConfigDict, batch_size: int) -> None:
  """Raises UserError on invalid settings of the config's section `reward`."""
  larger = f'or a larger batch than pretrain.batch_size={batch_size}'
  checks.between('reward.k', c.k, 1, batch_size - 1, hint=larger)
  checks.choice('reward.on', c.on, ON)
  checks.choice('reward.transform', c.transform, TRANSFORMS)
  checks.ranges('reward', c, RANGES)


def entropy_reward(
  h: jax.Array,
  candidates: jax.Array | None = None,
  k: int = 12,
  average: bool = True,
  transform: str = 'log1p',
  include_self: bool = False,
  clip: float = 0.0,
  self_index: jax.Array | None = None,
) -> jax.Array:
  """Distance to the nearest neighbours: a particle estimate of what a sample adds to the entropy.

  Equal to URLB utils.PBE without its running mean when `include_self`; to PALM 4.2 with
  `average=False, transform='log'`.

  Args:
    h: (B, F) features; no gradient passes.
    candidates: (M, F) among which neighbours are sought, with `self_index`; None is h itself.
    k: number of neighbours.
    average: mean over the k distances; False is the k-th alone.
    transform: 'log1p' or 'log' of that distance; 'log' has a floor at d = 1e-6.
    include_self: count the sample itself, at distance 0, as the first of the k.
    clip: subtracted from each distance, not below 0.
    self_index: (B,) int, the row of each sample among the candidates.

  Returns:
    (B,) rewards, float32 or wider.

  Raises:
    UserError: k that the candidates cannot give, an unknown transform, or only one of candidates
      and self_index.
  """
  if candidates is None or self_index is None:
    if candidates is not None or self_index is not None:
      raise UserError(
        'entropy_reward got only one of candidates and self_index: give both, or neither for h '
        'itself'
      )
    candidates, self_index = h, jnp.arange(len(h))
  available = len(candidates) - (not include_self)
  if not 1 <= k <= available:
    raise UserError(
      f'reward.k={k} is impossible among {len(candidates)} samples: choose 1 to {available}, '
      'or a larger batch'
    )
  if transform not in TRANSFORMS:
    raise UserError(
      f'reward.transform={transform!r} is unknown: choose one of {", ".join(TRANSFORMS)}'
    )

  dtype = jnp.promote_types(h.dtype, jnp.float32)
  h, candidates = jax.lax.stop_gradient((h.astype(dtype), candidates.astype(dtype)))
  # ||a||^2 + ||b||^2 - 2 ab cancels: features far from the origin lose near-duplicates unless
  # centred, and even then the result is only good for choosing. Twice as many are chosen and the
  # nearest of those kept: in groups of frames closer than that error (24 of them within 0.02 of
  # each other) choosing k at once is wrong by up to 0.7%; so is 2 for k=1 on some processors.
  center = jnp.mean(candidates, axis=0)
  a, b = h - center, candidates - center
  gram = jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST)
  rough = jnp.sum(a * a, axis=1)[:, None] + jnp.sum(b * b, axis=1) - 2 * gram  # (B, M), squared
  itself = self_index[:, None] == jnp.arange(len(candidates))
  rough = jnp.where(itself, -jnp.inf if include_self else jnp.inf, rough)
  count = min(max(2 * k, FEWEST_CHOSEN), available)
  _, chosen = jax.lax.top_k(-rough, count)  # (B, count)
  difference = h[:, None] - candidates[chosen]  # (B, count, F)
  exact = jnp.sqrt(jnp.sum(difference * difference, axis=-1))
  distances = jnp.maximum(-jax.lax.top_k(-exact, k)[0] - clip, 0)  # (B, k), nearest first
  return TRANSFORMS[transform](jnp.mean(distances, axis=1) if average else distances[:, -1])


def options(config: ConfigDict) -> dict[str, Any]:
  """What of `default_config` goes to `global_entropy_reward`."""
  return {name: config[name] for name in ('k', 'average', 'transform', 'include_self', 'clip')}


def global_entropy_reward(h: jax.Array, axis_name: str | None = None, **options: Any) -> jax.Array:
  """`entropy_reward` with neighbours from all devices' batches, so the number of devices does not
  change it.

  Args:
    h: (B, F) features of this device.
    axis_name: mesh axis over which the batch is sharded; None is one device.
    **options: k, average, transform, include_self, clip of `entropy_reward`.

  Returns:
    (B,) rewards of this device's samples, float32 or wider.

  Raises:
    UserError: as `entropy_reward`, where k is judged against the batch over all devices.
  """
  if axis_name is None:
    return entropy_reward(h, **options)
  candidates = jax.lax.all_gather(h, axis_name, tiled=True)
  self_index = jax.lax.axis_index(axis_name) * len(h) + jnp.arange(len(h))
  return entropy_reward(h, candidates, self_index=self_index, **options)
