"""The latent manifold as a world: T_com, T_ema, episodes, rendering (PALM section 4.1).

Everything is pure and batched over E environments. All randomness is a function of (key,
environment id), so the trajectory of an environment does not depend on how environments are spread
over devices.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from palm_jax.base import checks
from palm_jax.base.errors import UserError

DYNAMICS = 'ema', 'momentum', 'ou'
STARTS = 'latent', 'stationary'
ACTION_VARIANCE = 1 / 3  # of uniformly random actions
LATENT_SPACES = 'z', 'w'


def default_config() -> ConfigDict:
  """The world of the paper's text; configs/cifar.py has the other reading."""
  return ConfigDict(
    dict(
      alpha=0.5,  # paper section 6 ("default"); Figure 5 finds 0.95 best
      # paper section 4.1 ("in most of our experiments"); Figure 5 finds 0.5 to 0.75 best
      beta=0.95,
      # ours: the paper does not say; at beta 0.95 the latent forgets half of itself in 14 steps
      episode_length=64,
      truncation_psi=1.0,  # the untruncated generator
      crop=0,  # pixels taken from each side of the generator's images: generator.pad
      stack=1,  # pictures that the agent sees at once, as channels: 4 for Atari's frames one by one
      dynamics='ema',  # the paper's T_ema; others in DYNAMICS are ours
      # the paper's; 'w': whitened coordinates of StyleGAN2's W (generator/views.py)
      latent_space='z',
      # first layer of StyleGAN2 that takes the style of a new latent in each frame
      # (generator/views.py StyleMixed), so that consecutive frames differ in colour; 0: none
      style_mixing=0,
      # of an episode: 'latent', z_0 = eps, which at beta 0.95 outlives 47 of 64 frames;
      # 'stationary': as far from 0 as random actions keep it, so that the policy can change it
      start='latent',
    )
  )


RANGES = dict(
  alpha=checks.SHARE,
  beta=checks.SHARE,
  crop=checks.Range(0, 4096),
  episode_length=checks.Range(2, 10**6),
  stack=checks.Range(1, 64),
  style_mixing=checks.Range(0, 64),
  truncation_psi=checks.Range(0, 2),
)


def check(c: ConfigDict) -> None:
  """Raises UserError on invalid settings of the config's section `environment`."""
  checks.ranges('environment', c, RANGES)
  checks.choice('environment.dynamics', c.dynamics, DYNAMICS)
  checks.choice('environment.latent_space', c.latent_space, LATENT_SPACES)
  checks.choice('environment.start', c.start, STARTS)
  if c.start == 'stationary' and c.dynamics not in ('ema', 'ou'):
    raise UserError(
      f"environment.start='stationary' with environment.dynamics={c.dynamics!r}: it is known for "
      "'ema' and 'ou'; choose one of them, or start='latent'"
    )
  if c.start == 'stationary' and c.beta == 1:
    raise UserError(
      "environment.start='stationary' with environment.beta=1: the latent would stay at 0; choose "
      "a smaller beta, or start='latent'"
    )
  if c.style_mixing and c.latent_space != 'z':
    raise UserError(
      f'environment.style_mixing={c.style_mixing} with environment.latent_space='
      f"{c.latent_space!r}: styles are mixed of latents in 'z'; leave one of the two"
    )


class Dynamics(flax.struct.PyTreeNode):
  """The two numbers of the world, traced so that a sweep over them does not recompile.

  Attributes:
    alpha: () share of the action in the composed latent, in [0, 1] (T_com).
    beta: () persistence of the latent, in [0, 1] (T_ema).
    kind: one of DYNAMICS, not traced.
    start: one of STARTS, not traced.
  """

  alpha: Any
  beta: Any
  kind: str = flax.struct.field(pytree_node=False, default='ema')
  start: str = flax.struct.field(pytree_node=False, default='latent')


class EnvState(flax.struct.PyTreeNode):
  """State of E environments.

  Attributes:
    z: (E, z_dim) latent.
    label: (E,) int32 class of the episode; 0 for an unconditional generator. Never shown to agent
      or encoder.
    step: (E,) int32 steps since the episode began.
    velocity: (E, z_dim) with the dynamics 'momentum', else ().
  """

  z: jax.Array
  label: jax.Array
  step: jax.Array
  velocity: Any = ()


def env_keys(key: jax.Array, env_ids: jax.Array) -> jax.Array:
  """One key an environment: (E,) keys from a key and the (E,) global environment ids."""
  return jax.vmap(lambda i: jax.random.fold_in(key, i))(env_ids)


def random_actions(keys: jax.Array, z_dim: int, dtype: Any) -> jax.Array:
  """Uniform in [-1, 1]: (E,) keys -> (E, z_dim)."""
  return jax.vmap(lambda key: jax.random.uniform(key, (z_dim,), dtype, -1, 1))(keys)


def first_latent_and_label(
  keys: jax.Array, z_dim: int, num_classes: int, dtype: Any
) -> tuple[jax.Array, jax.Array]:
  """Draws z_0 = eps (no action has been taken yet) and the episode's label.

  Args:
    keys: (E,) keys.
    z_dim, num_classes: of the generator; num_classes 0 is unconditional.
    dtype: of z.

  Returns:
    z (E, z_dim) and label (E,) int32.
  """

  def draw(key):
    key_z, key_label = jax.random.split(key)
    return (
      jax.random.normal(key_z, (z_dim,), dtype),
      jax.random.randint(key_label, (), 0, max(num_classes, 1), jnp.int32),
    )

  return jax.vmap(draw)(keys)


def composed_variance(alpha: Any, action_var: Any = ACTION_VARIANCE) -> Any:
  """Variance of a coordinate of z', for actions of that variance and a latent of variance 1."""
  return alpha**2 * action_var + (1 - alpha) ** 2


def memory_factor(dynamics: Dynamics) -> Any:
  """kappa: what the dynamics leave of the variance of independent z' beside their mean's square.

  T_ema's (1 - beta) / (1 + beta), also of 'ou', which enlarges both alike; 'momentum' is
  z_t = 2 beta z_{t-1} - beta z_{t-2} + (1 - beta) z'.
  """
  beta = dynamics.beta
  if dynamics.kind == 'momentum':
    return (1 + beta) / (1 + 3 * beta)
  return (1 - beta) / (1 + beta)


def mean_direction(dynamics: Dynamics, action_mean: Any, action_var: Any) -> Any:
  """R in [0, 1], length of the mean unit latent of a policy whose actions have one mean.

  0: latents go anywhere; 1: all one way, a cone. With `action_mean` the root mean square over
  dimensions, R^2 = alpha^2 m^2 / (alpha^2 m^2 + kappa v), in episodes that are long against
  1 / (1 - beta).
  """
  toward = (dynamics.alpha * action_mean) ** 2
  about = memory_factor(dynamics) * composed_variance(dynamics.alpha, action_var)
  return jnp.sqrt(toward / jnp.maximum(toward + about, 1e-12))


def first_scale(dynamics: Dynamics) -> Any:
  """() standard deviation of an episode's first latent."""
  if dynamics.start == 'latent':
    return 1.0
  variance = composed_variance(dynamics.alpha)
  return jnp.sqrt(variance if dynamics.kind == 'ou' else memory_factor(dynamics) * variance)


def reset(
  key: jax.Array,
  env_ids: jax.Array,
  first_step: jax.Array,
  z_dim: int,
  num_classes: int,
  dynamics: Dynamics,
  dtype: Any = jnp.float32,
) -> EnvState:
  """Begins an episode in every environment.

  Args:
    key: a key.
    env_ids: (E,) int32 global ids.
    first_step: (E,) int32 step to begin at, in [0, episode length): different ones keep episode
      ends apart.
    z_dim, num_classes: of the generator.
    dynamics: Dynamics.
    dtype: of the latent.

  Returns:
    EnvState.
  """
  return begin(env_keys(key, env_ids), first_step, z_dim, num_classes, dynamics, dtype)


def begin(
  keys: jax.Array,
  first_step: jax.Array,
  z_dim: int,
  num_classes: int,
  dynamics: Dynamics,
  dtype: Any = jnp.float32,
) -> EnvState:
  """`reset` by (E,) keys, one an environment."""
  z, label = first_latent_and_label(keys, z_dim, num_classes, dtype)
  z = (first_scale(dynamics) * z).astype(dtype)
  velocity = jnp.zeros_like(z) if dynamics.kind == 'momentum' else ()
  return EnvState(z=z, label=label, step=first_step.astype(jnp.int32), velocity=velocity)


def compose(action: jax.Array, eps: jax.Array, alpha: Any) -> jax.Array:
  """T_com: z' = alpha a + (1 - alpha) eps; a in [-1, 1], eps a fresh latent; all (E, z_dim)."""
  return alpha * action + (1 - alpha) * eps


def persist(
  z: jax.Array, z_new: jax.Array, beta: Any, kind: str = 'ema', velocity: Any = ()
) -> tuple[jax.Array, Any]:
  """T_ema: z <- beta z + (1 - beta) z', or another of DYNAMICS; all (E, z_dim).

  With beta 0 each of them is z'.
  'ema': a low-pass filter of first order, the paper's; the variance of independent z' shrinks by
    (1 - beta) / (1 + beta).
  'ou': z <- beta z + sqrt(1 - beta^2) z', an Ornstein-Uhlenbeck process: unit normal z' keep z
    unit normal.
  'momentum': v <- beta v + (1 - beta) (z' - z), z <- z + v: of second order, so paths are smooth
    and overshoot.

  Returns:
    z and velocity, which is () but for 'momentum'.
  """
  if kind == 'momentum':
    velocity = beta * velocity + (1 - beta) * (z_new - z)
    return z + velocity, velocity
  if kind not in DYNAMICS:
    raise ValueError(f'dynamics {kind!r} is not one of {", ".join(DYNAMICS)}')
  share = jnp.sqrt(1 - beta**2) if kind == 'ou' else 1 - beta
  return beta * z + share * z_new, velocity


def step(
  state: EnvState,
  action: jax.Array,
  key: jax.Array,
  env_ids: jax.Array,
  dynamics: Dynamics,
  episode_length: int,
  num_classes: int,
) -> EnvState:
  """One step of every environment.

  After `episode_length` frames the episode is cut and a new one, with a new label, begins. There is
  no termination: an episode ends by truncation only, so values are always bootstrapped.

  Args:
    state: EnvState.
    action: (E, z_dim) in [-1, 1].
    key: key of this step.
    env_ids: (E,) int32 global ids.
    dynamics: Dynamics.
    episode_length: frames an episode.
    num_classes: of the generator.

  Returns:
    EnvState of the next frame.
  """
  keys = env_keys(key, env_ids)
  return advance(state, action, keys, dynamics, episode_length, num_classes)


def advance(
  state: EnvState,
  action: jax.Array,
  keys: jax.Array,
  dynamics: Dynamics,
  episode_length: Any,
  num_classes: int,
) -> EnvState:
  """`step` by (E,) keys, one an environment; episode_length may be traced."""
  dtype = state.z.dtype

  def draw(key):
    key_eps, key_new = jax.random.split(key)
    return jax.random.normal(key_eps, state.z.shape[1:], dtype), key_new

  eps, new_keys = jax.vmap(draw)(keys)
  z_new = compose(action.astype(dtype), eps, dynamics.alpha)
  z, velocity = persist(state.z, z_new, dynamics.beta, dynamics.kind, state.velocity)
  new_z, new_label = first_latent_and_label(new_keys, state.z.shape[1], num_classes, dtype)
  new_z = first_scale(dynamics) * new_z
  ended = state.step + 1 >= episode_length  # (E,)
  return EnvState(
    z=jnp.where(ended[:, None], new_z, z).astype(dtype),
    label=jnp.where(ended, new_label, state.label),
    step=jnp.where(ended, 0, state.step + 1),
    velocity=jax.tree.map(lambda v: jnp.where(ended[:, None], 0, v).astype(dtype), velocity),
  )


def see(seen: jax.Array, pictures: jax.Array, step: jax.Array) -> jax.Array:
  """What the agent sees: the last pictures of its episode as channels, oldest first, zeros before
  the episode's first.

  Args:
    seen: (E, H, W, K * C) uint8, what it saw before.
    pictures: (E, H, W, C) uint8, the next ones.
    step: (E,) int32 of these, from 0.

  Returns:
    (E, H, W, K * C) uint8.
  """
  before = jnp.where((step == 0)[:, None, None, None], 0, seen[..., pictures.shape[-1] :])
  return jnp.concatenate([before, pictures], -1)


def staggered_steps(env_ids: jax.Array, num_envs: int, episode_length: int) -> jax.Array:
  """First step of each environment, spread evenly over an episode so that ends do not coincide.
  (E,) int32."""
  # On the host: the product may have more than 31 bits.
  steps = np.arange(num_envs, dtype=np.int64) * episode_length // num_envs
  return jnp.asarray(steps, jnp.int32)[env_ids]
