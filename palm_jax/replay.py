"""A ring of uint8 frames on the device, each of what was seen once; the successor of row t is row t
+ 1.

One ring a device: environments are sharded, rows are added and sampled locally, and images never
cross devices. Episodes have one fixed length, so a frame's step in its episode is arithmetic on its
row number and is not stored. A frame is one flat row: TPUs lay out the last two dimensions in
tiles, and (W, C) of a picture fills a quarter of them.
"""

import functools
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from palm_jax.base import checks
from palm_jax.base.errors import UserError

ACTION_DTYPES = {
  'float32': None,
  'bfloat16': jnp.bfloat16,
  'int8': jnp.int8,
}  # None: that of the computation


def default_config() -> ConfigDict:
  return ConfigDict(
    dict(
      # frames over all devices, 3.2 GB of CIFAR and 2.1 GB of its actions; URLB keeps 1M
      capacity=1_048_576,
      # of their storage; int8: a quarter of it, and the actions taken are rounded so too
      actions='float32',
      # sampling groups: any number of devices that divides it draws the same batches
      num_shards=8,
    )
  )


RANGES = dict(capacity=checks.Range(1, 10**10), num_shards=checks.SIZE)


def check(
  c: ConfigDict, num_devices: int, num_envs: int, rollout_length: int, batch_size: int
) -> None:
  """Raises UserError on invalid settings of the config's section `replay`, and sizes unlike it."""
  checks.ranges('replay', c, RANGES)
  if c.num_shards % num_devices:
    fewer = [n for n in range(1, num_devices) if c.num_shards % n == 0]
    raise UserError(
      f'replay.num_shards={c.num_shards} cannot be shared by {num_devices} devices: take '
      f'{", ".join(map(str, fewer))} of them (CUDA_VISIBLE_DEVICES=0,1,... names those), or set it '
      f'to {num_devices}; a run that has begun keeps it'
    )
  checks.divisible('pretrain.num_envs', num_envs, c.num_shards, 'replay.num_shards')
  checks.divisible('pretrain.batch_size', batch_size, c.num_shards, 'replay.num_shards')
  block = num_envs * rollout_length
  checks.divisible('replay.capacity', c.capacity, block, 'num_envs * rollout_length')
  checks.choice('replay.actions', c.actions, ACTION_DTYPES)
  if c.capacity < 3 * num_envs:
    raise UserError(
      f'replay.capacity={c.capacity} is too small for consecutive frames of pretrain.num_envs='
      f'{num_envs} environments: set it to {3 * num_envs} or more'
    )
  if batch_size > c.capacity:
    raise UserError(
      f'pretrain.batch_size={batch_size} is larger than the replay (replay.capacity={c.capacity}): '
      'lower the first or raise the second'
    )


class Replay(flax.struct.PyTreeNode):
  """Attributes:
  frames: (T, E, H * W * C) uint8, sharded over E.
  actions: (T, E, z_dim), the action taken on seeing the frame of the same row, as `pack` makes it.
  total: () int32, rows ever added; row n lies at n % T.
  """

  frames: jax.Array
  actions: jax.Array
  total: jax.Array


def create(
  rows: int,
  num_envs: int,
  image_shape: tuple[int, ...],
  action_dim: int,
  dtype: Any = jnp.float32,
) -> Replay:
  """An empty ring of `rows` rows for `num_envs` environments; dtype is that of the packed
  actions."""
  return Replay(
    frames=jnp.zeros((rows, num_envs, math.prod(image_shape)), jnp.uint8),
    actions=jnp.zeros((rows, num_envs, action_dim), dtype),
    total=jnp.zeros((), jnp.int32),
  )


def pack(actions: jax.Array, dtype: Any) -> jax.Array:
  """Actions in [-1, 1] as they are stored: in a floating-point type, or as 1/127 in int8."""
  return jnp.round(actions * 127).astype(dtype) if dtype == jnp.int8 else actions.astype(dtype)


def unpack(packed: jax.Array, dtype: Any) -> jax.Array:
  """The actions that `pack` stored, as `dtype`."""
  return packed.astype(dtype) / 127 if packed.dtype == jnp.int8 else packed.astype(dtype)


def add(replay: Replay, frames: jax.Array, actions: jax.Array) -> Replay:
  """Adds R rows in place (when donated). T must be a multiple of R, so that a block never wraps.

  Args:
    replay: Replay.
    frames: (R, E, H, W, C) uint8.
    actions: (R, E, z_dim), packed.

  Returns:
    Replay.
  """
  row = replay.total % replay.frames.shape[0]
  update = lambda ring, block: jax.lax.dynamic_update_slice_in_dim(ring, block, row, axis=0)
  return Replay(
    frames=update(replay.frames, frames.reshape(*frames.shape[:2], -1)),
    actions=update(replay.actions, actions),
    total=replay.total + frames.shape[0],
  )


def sample(
  replay: Replay,
  keys: jax.Array,
  batch_size: int,
  first_step: jax.Array,
  episode_length: int,
  image_shape: tuple[int, ...],
  group: int = 1,
  window: int = 0,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
  """Draws transitions (s, a, s') uniformly; none crosses the end of an episode.

  The environments held here are cut into V equal groups, each sampled with its own key: with V
  fixed by the config and keys made from global group ids, the batch does not depend on the number
  of devices.

  Args:
    replay: Replay; at least one valid pair must be present for each environment (total >= 3 is
      enough).
    keys: (V,) keys, one a group.
    batch_size: transitions to draw from each group.
    first_step: (E,) int32 step in the episode of each environment's row 0.
    episode_length: frames an episode, >= 2.
    image_shape: (H, W, C).
    group: so many transitions of one episode are drawn together, one after the other; divides
      batch_size.
    window: steps within which those of a group lie; 0: the whole episode.

  Returns:
    frames (V * batch_size, H, W, C) uint8, packed actions (V * batch_size, z_dim), next_frames as
    frames, environments and rows (V * batch_size,), the latter counted from the first ever added.
  """
  num_rows, num_envs = replay.frames.shape[:2]
  env, row = draw_rows(
    replay.total, num_rows, keys, batch_size // group, first_step, episode_length, num_envs
  )
  if group > 1:
    spread = functools.partial(_spread, replay.total, num_rows, episode_length, group, window)
    splits = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, 0), batch_size // group))
    row = jax.vmap(spread)(splits(keys).reshape(-1), first_step[env], row).reshape(-1)
    env = jnp.repeat(env, group)
  here, there = row % num_rows, (row + 1) % num_rows
  pictures = lambda row: replay.frames[row, env].reshape(-1, *image_shape)
  return pictures(here), replay.actions[here, env], pictures(there), env, row


def _spread(total, num_rows, episode_length, group, window, key, first_step, row):
  """(group,) rows of the episode of a row, evenly spread over a window around it.

  All differ where the episode, as far as it is held, has so many with a successor.
  """
  key_start, key_rows = jax.random.split(key)
  begin = row - (row + first_step) % episode_length
  lowest = jnp.maximum(begin, jnp.maximum(total - num_rows, 0))
  highest = jnp.minimum(begin + episode_length, total) - 2
  length = jnp.minimum(window or episode_length, highest - lowest + 1)
  start = row - jax.random.randint(key_start, (), 0, length)
  start = jnp.clip(start, lowest, highest - length + 1)
  bounds = jnp.arange(group + 1) * length // group  # of a part of the window for each
  share = jax.random.uniform(key_rows, (group,))
  offset = bounds[:-1] + (share * jnp.diff(bounds)).astype(row.dtype)
  return start + offset


def draw_rows(
  total: jax.Array,
  num_rows: int,
  keys: jax.Array,
  batch_size: int,
  first_step: jax.Array,
  episode_length: int,
  num_envs: int,
) -> tuple[jax.Array, jax.Array]:
  """Draws rows that have a successor in their episode, uniformly; arguments as in `sample`.

  Args:
    total: () int32 rows ever added, of which the last `num_rows` are held.
    num_envs: environments held here.

  Returns:
    (V * batch_size,) environments, and as many rows, counted from the first ever added.
  """
  group = num_envs // keys.shape[0]

  def draw(key):
    key_env, key_row = jax.random.split(key)
    env = jax.random.randint(key_env, (batch_size,), 0, group)
    return env, jax.random.split(key_row, batch_size)

  env, row_keys = jax.vmap(draw)(keys)  # (V, B)
  env = (env + group * jnp.arange(keys.shape[0])[:, None]).reshape(-1)

  oldest = jnp.maximum(total - num_rows, 0)
  span = total - 1 - oldest  # rows that have a successor
  phase = (oldest + first_step[env]) % episode_length  # step in the episode of the oldest row
  valid = (
    span - (phase + span) // episode_length
  )  # rows of the span that are not the last of their episode
  nth = jax.vmap(lambda k, n: jax.random.randint(k, (), 0, n))(row_keys.reshape(-1), valid)
  # Counting from the start of the oldest row's episode, `phase` valid rows lie before it.
  episodes, inside = jnp.divmod(nth + phase, episode_length - 1)
  return env, oldest + episodes * episode_length + inside - phase
