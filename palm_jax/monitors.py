"""What people look at while an encoder trains: collapse monitors and films of the agent at play."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from palm_jax import environment, rollout
from palm_jax.rollout import World
from palm_jax.setup import Setup

BATCH = 128  # pictures of up to 64x64 that the rank's encoder sees at once; fewer of larger ones
LEAST_SPREAD = 0.1  # of z_std_ratio, 1 when healthy
LEAST_RANK = 3.0  # of h: so few directions tell no ten classes apart
WIDEST_CONE = 0.5  # length of the mean unit latent, 0 when latents go everywhere


class Monitors(NamedTuple):
  """Two compiled functions of a run's state.

  Attributes:
    ranks: (State.ssl, World, key) -> effective rank and share of the first direction, of h and z.
    film: (State.ssl, State.agent, World, key) -> (rows, steps, H, W, C) uint8, (rows,) int32
      labels.
  """

  ranks: Callable[[Any, World, jax.Array], dict[str, float]]
  film: Callable[[Any, Any, World, jax.Array], tuple[jax.Array, jax.Array]]


def make_monitors(
  setup: Setup, num_images: int = 1024, num_rows: int = 10, num_steps: int = 64
) -> Monitors:
  """Monitors on pictures that the learner has not stored; with one key always the same ones.

  Args:
    setup: of the run.
    num_images: independent latents for the effective rank (a rank is at most this).
    num_rows: episodes of a film, one class a row.
    num_steps: frames of an episode of a film.
  """
  rows = min(num_rows, setup.generator.num_classes) or 4
  see = jax.jit(functools.partial(representations, setup, num_images))
  film = jax.jit(functools.partial(play_episodes, setup, rows, num_steps))
  return Monitors(ranks=functools.partial(ranks, see), film=film)


def troubles(scalars: dict[str, float]) -> dict[str, str]:
  """{what is wrong with a run: one line about it} by its metrics so far."""
  found = {}
  spread, rank = scalars.get('z_std_ratio', 1.0), scalars.get('h_effective_rank', LEAST_RANK)
  if spread < LEAST_SPREAD or rank < LEAST_RANK:
    found['collapse'] = (
      f'the representation has collapsed: z_std_ratio {spread:.3f} (healthy 1), h_effective_rank '
      f'{rank:.1f}; lower simsiam.lr, or choose another simsiam.objective or simsiam.augment'
    )
  cone = scalars.get('cone', 0.0)
  if cone > WIDEST_CONE:
    found['cone'] = (
      f'the policy is a cone: the mean of its unit latents has length {cone:.2f} (random actions: '
      '0), so it shows little of the world; try sac.neutral_start, sac.skill_dim, '
      "reward.space='unit', or a larger sac.init_alpha"
    )
  return found


def ranks(see: Callable, ssl: Any, world: World, key: jax.Array) -> dict[str, float]:
  """{'h_effective_rank', 'h_top_variance', and the same of z} of what `see` gives."""
  out = {}
  for name, x in zip('hz', jax.device_get(see(ssl, world, key)), strict=True):
    out[f'{name}_effective_rank'], out[f'{name}_top_variance'] = effective_rank(x)
  return out


def representations(
  setup: Setup, num_images: int, ssl: Any, world: World, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """h and z of independent latents of the world: (num_images, F), (num_images, D)."""
  env, ids = begin(setup, world, key, num_images)
  variables = {
    name: {'params': ssl['params'][name], 'batch_stats': ssl['batch_stats'][name]}
    for name in ssl['params']
  }

  def encode(part):
    frames = fill_stack(setup, world, key, *part)
    h = setup.modules.encoder.apply(variables['encoder'], frames, train=False)
    return h, setup.modules.projector.apply(variables['projector'], h, train=False)

  at_once = math.gcd(num_images, _at_once(setup.image_shape))
  in_batches = lambda x: x.reshape(-1, at_once, *x.shape[1:])
  found = jax.lax.map(encode, jax.tree.map(in_batches, (ids, env)))
  return jax.tree.map(lambda x: x.reshape(num_images, -1), found)


def _at_once(image_shape):
  """A power of 2, of pictures that take no more memory than BATCH of 64x64."""
  pixels = max(64 * 64, image_shape[0] * image_shape[1])
  return max(1, 2 ** int(math.log2(BATCH * 64 * 64 / pixels)))


def fill_stack(
  setup: Setup, world: World, key: jax.Array, ids: jax.Array, env: environment.EnvState
) -> jax.Array:
  """What is seen in E environments after as many random actions as fill a stack: (E, H, W, C)."""
  generator, stack = setup.generator, setup.config.environment.stack
  frames = rollout.look(setup, world, env)
  for t in range(1, stack):  # a stack that is full, as nearly all are
    key_action, key_env = jax.random.split(jax.random.fold_in(key, t))
    keys = environment.env_keys(key_action, ids)
    actions = environment.random_actions(keys, generator.z_dim, env.z.dtype)
    env = environment.step(env, actions, key_env, ids, world.dynamics, stack, generator.num_classes)
    frames = rollout.look(setup, world, env, frames)
  return frames


def play_episodes(
  setup: Setup, rows: int, steps: int, ssl: Any, agent: Any, world: World, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """An episode a row, classes in turn -> (rows, steps, H, W, C) uint8 frames, (rows,) labels."""
  num_classes = setup.generator.num_classes
  env, ids = begin(setup, world, key, rows)
  env = env.replace(label=ids % max(num_classes, 1))

  def one_step(carry, t):
    env, frames = carry
    key_policy, key_env = jax.random.split(jax.random.fold_in(key, t + 1))
    keys = environment.env_keys(key_policy, ids)
    actions = rollout.act(setup, ssl, agent, frames, keys, ids)
    # An episode of a film is never cut: one more step than it has.
    env = environment.step(env, actions, key_env, ids, world.dynamics, steps + 1, num_classes)
    return (env, rollout.look(setup, world, env, frames)), frames

  carry = env, rollout.look(setup, world, env)
  (env, _), frames = jax.lax.scan(one_step, carry, jnp.arange(steps))
  return frames.swapaxes(0, 1), env.label


def begin(
  setup: Setup, world: World, key: jax.Array, count: int
) -> tuple[environment.EnvState, jax.Array]:
  """New episodes in `count` environments, and their ids."""
  ids, generator = jnp.arange(count), setup.generator
  z_dim, num_classes = generator.z_dim, generator.num_classes
  env = environment.reset(key, ids, jnp.zeros_like(ids), z_dim, num_classes, world.dynamics)
  return env, ids


def effective_rank(x: np.ndarray) -> tuple[float, float]:
  """How many directions features spread over; sees the dimensional collapse that `z_std` is blind
  to.

  exp(entropy of the singular values divided by their sum) of the l2-normalised, centred rows (Roy
  and Vetterli 2007; used for SimSiam by Li, Efros and Pathak, arXiv 2209.15007). On the host and in
  float64: singular values are roots of the covariance's eigenvalues, and float32 noise under the
  root would count as hundreds of directions.

  Args:
    x: (N, D) features; N must well exceed the rank to be seen, 4096 is usual. Seconds at D = 2048.
  Returns:
    (effective rank in [1, min(N - 1, D)], share of the variance on the first direction); (1., 1.)
    for equal rows.
  """
  x = np.asarray(x, np.float64)
  x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-8)
  x = x - x.mean(axis=0)
  gram = x.T @ x if x.shape[0] >= x.shape[1] else x @ x.T
  eigenvalues = np.maximum(np.linalg.eigvalsh(gram), 0)
  # Rows of unit length have eigenvalues that sum to N before centring: below this is float32
  # rounding of the features.
  eigenvalues[eigenvalues < 1e-13 * len(x)] = 0
  if not eigenvalues.any():
    return 1.0, 1.0
  share = np.sqrt(eigenvalues)
  share = share[share > 0] / share.sum()
  return float(np.exp(-(share * np.log(share)).sum())), float(eigenvalues.max() / eigenvalues.sum())
