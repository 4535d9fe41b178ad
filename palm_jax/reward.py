"""Exploration reward: k-nearest-neighbour entropy of the representation (APT, Liu and Abbeel, arXiv
2103.04551)."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from palm_jax.base import checks
from palm_jax.base.errors import UserError
from palm_jax.contrastive import normalize

FEWEST_CHOSEN = 6  # candidates whose distance is computed exactly, where k is 1 or 2
LOG_FLOOR = 1e-6  # log d has no bound on identical frames
ON = 'next', 'current'  # of the two frames
LEARNED = 'rnd', 'icm', 'disagreement'  # in curiosity.py
SPACES = 'h', 'unit', 'projection'
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
      # PALM 4.2: 'apt'; those in LEARNED learn what is new: URLB's knowledge-based three
      kind='apt',
      # of apt: 'h' as PALM 4.2; 'unit': (h - running mean) / norm, which no contrast enlarges;
      # 'projection': SimSiam's z
      space='h',
      # of apt: past features, beside the batch, among which neighbours are sought; ProtoRL: 2048
      memory=0,
      skill=1.0,  # weight of the skill's reward, with sac.skill_dim; URLB aps.py adds both
      hidden=1024,  # of what is learned: URLB hidden_dim
      lr=1e-4,  # URLB lr
      rep_dim=512,  # of rnd: URLB rnd.yaml rnd_rep_dim
      models=5,  # of disagreement: URLB disagreement.py n_models
    )
  )


RANGES = dict(
  k=checks.SIZE,
  clip=checks.AMOUNT,
  memory=checks.COUNT_OR_0,
  skill=checks.AMOUNT,
  hidden=checks.SIZE,
  lr=checks.RATE,
  rep_dim=checks.SIZE,
  models=checks.Range(2, 1000),
)


def check(c: ConfigDict, batch_size: int | None) -> None:
  """Raises UserError on invalid settings of the config's section `reward`.

  batch_size is pretrain's, None where no agent is rewarded.
  """
  if batch_size:
    larger = f'or a larger batch than pretrain.batch_size={batch_size}'
    checks.between('reward.k', c.k, 1, batch_size - 1, hint=larger)
  checks.choice('reward.on', c.on, ON)
  checks.choice('reward.transform', c.transform, TRANSFORMS)
  checks.choice('reward.kind', c.kind, (*OF_FEATURES, *LEARNED))
  checks.choice('reward.space', c.space, SPACES)
  checks.ranges('reward', c, RANGES)
  for name in ('space', 'memory'):
    if c.kind in LEARNED and c[name] != default_config()[name]:
      raise UserError(f"reward.{name}={c[name]!r} with reward.kind={c.kind!r}: it is of 'apt'")
  if c.kind in ('icm', 'disagreement') and c.on != default_config().on:
    raise UserError(
      f'reward.on={c.on!r} with reward.kind={c.kind!r}, which is of both frames: leave it out'
    )
  if batch_size and c.memory:
    checks.divisible('reward.memory', c.memory, batch_size, 'pretrain.batch_size')


def unit(x: jax.Array, mean: jax.Array) -> jax.Array:
  """Rows of (B, F) features less their mean (F,), at unit length: direction without contrast."""
  return normalize(x - mean)


class Memory(flax.struct.PyTreeNode):
  """The last features of all devices: (M, F), and () int32 how many were put there.

  A number of 2 M or more is told as one below, of the same place: it never overflows.
  """

  features: jax.Array
  total: jax.Array


def empty_memory(size: int, dim: int) -> Memory:
  """Of `size` features of `dim`."""
  return Memory(jnp.zeros((size, dim)), jnp.zeros((), jnp.int32))


def remember(memory: Memory, x: jax.Array, axis_name: str | None = None) -> Memory:
  """The memory with the batch (B, F) of each device in the place of its oldest."""
  batch = _gathered(x, axis_name).astype(memory.features.dtype)
  place = memory.total % len(memory.features)
  features = jax.lax.dynamic_update_slice_in_dim(memory.features, batch, place, axis=0)
  total, size = memory.total + len(batch), len(memory.features)
  return Memory(features, jnp.where(total >= 2 * size, total - size, total))


def _gathered(x, axis_name):
  """(B, F) of every device, as one array that is the same on each."""
  if axis_name is None:
    return x
  # A sum, not a gather: what every device has alike may stay on all of them.
  count, place = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
  whole = jnp.zeros((count, *x.shape), x.dtype).at[place].set(x)
  return jax.lax.psum(whole, axis_name).reshape(-1, *x.shape[1:])


def entropy_reward(
  h: jax.Array,
  candidates: jax.Array | None = None,
  k: int = 12,
  average: bool = True,
  transform: str = 'log1p',
  include_self: bool = False,
  clip: float = 0.0,
  self_index: jax.Array | None = None,
  valid: jax.Array | None = None,
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
    valid: (M,) bool, which candidates there are; at least k + 1 of them. None: all.

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
  if valid is not None:
    rough = jnp.where(valid, rough, jnp.inf)
  count = min(max(2 * k, FEWEST_CHOSEN), available)
  _, chosen = jax.lax.top_k(-rough, count)  # (B, count)
  difference = h[:, None] - candidates[chosen]  # (B, count, F)
  exact = jnp.sqrt(jnp.sum(difference * difference, axis=-1))
  if not include_self:  # where few candidates are valid, it was chosen among those that are not
    exact = jnp.where(chosen == self_index[:, None], jnp.inf, exact)
  if valid is not None:
    exact = jnp.where(valid[chosen], exact, jnp.inf)
  distances = jnp.maximum(-jax.lax.top_k(-exact, k)[0] - clip, 0)  # (B, k), nearest first
  return TRANSFORMS[transform](jnp.mean(distances, axis=1) if average else distances[:, -1])


def options(config: ConfigDict) -> dict[str, Any]:
  """What of the section `reward` goes to the function of its kind.

  To someone's own go all settings but `memory`, whose features it gets.
  """
  names = 'k', 'average', 'transform', 'include_self', 'clip'
  if config.kind != 'apt':
    names = tuple(name for name in config if name != 'memory')
  return {name: config[name] for name in names}


def global_entropy_reward(
  h: jax.Array, axis_name: str | None = None, memory: Memory | tuple = (), **options: Any
) -> jax.Array:
  """`entropy_reward` with neighbours from all devices' batches, so the number of devices does not
  change it.

  Args:
    h: (B, F) features of this device.
    axis_name: mesh axis over which the batch is sharded; None is one device.
    memory: earlier features, among which neighbours are sought, too.
    **options: k, average, transform, include_self, clip of `entropy_reward`.

  Returns:
    (B,) rewards of this device's samples, float32 or wider.

  Raises:
    UserError: as `entropy_reward`, where k is judged against the batch over all devices.
  """
  candidates, self_index, valid = h, jnp.arange(len(h)), None
  if axis_name is not None:
    candidates = jax.lax.all_gather(h, axis_name, tiled=True)
    self_index += jax.lax.axis_index(axis_name) * len(h)
  if isinstance(memory, Memory):
    valid = jnp.arange(len(memory.features)) < memory.total
    valid = jnp.concatenate([jnp.ones(len(candidates), bool), valid])
    candidates = jnp.concatenate([candidates, memory.features.astype(h.dtype)])
  return entropy_reward(h, candidates, self_index=self_index, valid=valid, **options)


# By reward.kind: (x (B, F), axis_name, memory, **options) -> (B,), of features and nothing that is
# learned; x, memory and options as of `global_entropy_reward`.
OF_FEATURES: dict[str, Callable[..., jax.Array]] = {'apt': global_entropy_reward}
