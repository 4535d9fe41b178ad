"""A ring of uint8 frames on the device, each frame once; the successor of row t is row t + 1.

One ring a device: environments are sharded, rows are added and sampled locally, and images never cross devices.
Episodes have one fixed length, so a frame's step in its episode is arithmetic on its row number and is not stored.
"""
import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Replay:
  """Attributes:
    frames: (T, E, H, W, C) uint8, sharded over E.
    actions: (T, E, z_dim), the action taken on seeing the frame of the same row.
    total: () int32, rows ever added; row n lies at n % T.
  """
  frames: jax.Array
  actions: jax.Array
  total: jax.Array


def create(rows, num_envs, image_shape, action_dim, dtype=jnp.float32):
  """An empty ring of `rows` rows for `num_envs` environments."""
  return Replay(frames=jnp.zeros((rows, num_envs, *image_shape), jnp.uint8),
                actions=jnp.zeros((rows, num_envs, action_dim), dtype),
                total=jnp.zeros((), jnp.int32))


def add(replay, frames, actions):
  """Adds R rows in place (when donated). T must be a multiple of R, so that a block never wraps.

  Args:
    replay: Replay.
    frames: (R, E, H, W, C) uint8.
    actions: (R, E, z_dim).

  Returns:
    Replay.
  """
  row = replay.total % replay.frames.shape[0]
  update = lambda ring, block: jax.lax.dynamic_update_slice_in_dim(ring, block.astype(ring.dtype), row, axis=0)
  return Replay(frames=update(replay.frames, frames), actions=update(replay.actions, actions),
                total=replay.total + frames.shape[0])


def sample(replay, keys, batch_size, first_step, episode_length):
  """Draws transitions (s, a, s') uniformly; none crosses the end of an episode.

  The environments held here are cut into V equal groups, each sampled with its own key: with V fixed by the config
  and keys made from global group ids, the batch does not depend on the number of devices.

  Args:
    replay: Replay; at least one valid pair must be present for each environment (total >= 3 is enough).
    keys: (V,) keys, one a group.
    batch_size: transitions to draw from each group.
    first_step: (E,) int32 step in the episode of each environment's row 0.
    episode_length: frames an episode, >= 2.

  Returns:
    frames (V * batch_size, H, W, C) uint8, actions (V * batch_size, z_dim), next_frames as frames.
  """
  num_rows, num_envs = replay.frames.shape[:2]
  group = num_envs // keys.shape[0]

  def draw(key):
    key_env, key_row = jax.random.split(key)
    env = jax.random.randint(key_env, (batch_size,), 0, group)
    return env, jax.random.split(key_row, batch_size)
  env, row_keys = jax.vmap(draw)(keys)  # (V, B)
  env = (env + group * jnp.arange(keys.shape[0])[:, None]).reshape(-1)

  oldest = jnp.maximum(replay.total - num_rows, 0)
  span = replay.total - 1 - oldest  # rows that have a successor
  phase = (oldest + first_step[env]) % episode_length  # step in the episode of the oldest row
  valid = span - (phase + span) // episode_length  # rows of the span that are not the last of their episode
  nth = jax.vmap(lambda k, n: jax.random.randint(k, (), 0, n))(row_keys.reshape(-1), valid)
  # Counting from the start of the oldest row's episode, `phase` valid rows lie before it.
  episodes, inside = jnp.divmod(nth + phase, episode_length - 1)
  row = oldest + episodes * episode_length + inside - phase
  here, there = row % num_rows, (row + 1) % num_rows
  return replay.frames[here, env], replay.actions[here, env], replay.frames[there, env]
