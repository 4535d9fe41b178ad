"""Playing in the latent world: what is seen, what is done, and T steps of it (PALM section 4.1)."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from palm_jax import agent as agents
from palm_jax import environment, replay
from palm_jax.base import devices
from palm_jax.experience import Experience
from palm_jax.layers.pixels import to_uint8

DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16, 'float64': jnp.float64}


class World(NamedTuple):
  """What does not change in a run but is traced.

  Attributes:
    variables: of the generator.
    dynamics: environment.Dynamics.
    material: what the source of the pairs needs besides, see material.load; else ().
  """

  variables: Any
  dynamics: environment.Dynamics
  material: Any = ()


@dataclasses.dataclass(frozen=True)
class Play:
  """What playing needs, fixed before anything is traced.

  Attributes:
    config: the whole config.
    generator: any generator (palm_jax/README.md says what that is).
    encoder: flax module; images -> (B, F).
    image_shape: (H, W, C) that agent and encoder see.
    real: dtype of parameters, latents and actions, at least float32.
    action_dtype: of the actions in the replay.
    num_devices: of the mesh.
  """

  config: ConfigDict
  generator: Any
  encoder: Any
  image_shape: tuple[int, int, int]
  real: Any
  action_dtype: Any
  num_devices: int

  def local_env_ids(self) -> jax.Array:
    """(E,) int32 global ids of this device's environments."""
    count = self.config.pretrain.num_envs // self.num_devices
    return jax.lax.axis_index('data') * count + jnp.arange(count)

  def first_steps(self, env_ids: jax.Array) -> jax.Array:
    """(E,) int32 step of the episode at which each environment begins the run."""
    length = self.config.environment.episode_length
    return environment.staggered_steps(env_ids, self.config.pretrain.num_envs, length)


def render(
  play: Play, world: World, z: jax.Array, label: jax.Array, truncation_psi: float | None = None
) -> jax.Array:
  """G(z, c): latents (E, z_dim), labels (E,) int32 -> (E, H, W, C) uint8; None: the world's psi."""
  psi = play.config.environment.truncation_psi if truncation_psi is None else truncation_psi
  images = play.generator.apply(world.variables, z, label, truncation_psi=psi)
  return to_uint8(images)


def look(
  play: Play, world: World, env: environment.EnvState, seen: jax.Array | None = None
) -> jax.Array:
  """What E environments show after `seen` (E, H, W, C) uint8; None where nothing was seen yet."""
  if seen is None:
    seen = jnp.zeros((len(env.step), *play.image_shape), jnp.uint8)
  return environment.see(seen, render(play, world, env.z, env.label), env.step)


def encode(play: Play, params: Any, batch_stats: Any, frames: jax.Array) -> jax.Array:
  """h (E, F) of frames (E, H, W, C) uint8, batch statistics fixed."""
  variables = {'params': params['encoder'], 'batch_stats': batch_stats['encoder']}
  return play.encoder.apply(variables, frames, train=False)


def prepared(play: Play, variables: Any) -> Any:
  """World.variables for many draws: on accelerators, what is made of kernels alone is made here."""
  if devices.platform() == 'cpu' or not hasattr(play.generator, 'prepared'):
    return variables
  # Held here: XLA would move it to where it is used, into the loops.
  return jax.lax.optimization_barrier(play.generator.prepared(variables))


def folded(play: Play, ssl: dict[str, Any]) -> tuple[Play, dict[str, Any]]:
  """The same eyes for many looks, on accelerators with the batch statistics folded in."""
  if devices.platform() == 'cpu' or not hasattr(play.encoder, 'fold'):
    return play, ssl
  variables = {'params': ssl['params']['encoder'], 'batch_stats': ssl['batch_stats']['encoder']}
  encoder, variables = play.encoder.fold(variables)
  # Held here: XLA would move it to where it is used, into the loop over steps.
  params = jax.lax.optimization_barrier(variables['params'])
  seeing = dict(params={'encoder': params}, batch_stats={'encoder': {}})
  return dataclasses.replace(play, encoder=encoder), seeing


def act(
  play: Play,
  ssl: dict[str, Any],
  agent: agents.Agent | tuple,
  frames: jax.Array,
  keys: jax.Array,
  episodes: jax.Array,
) -> jax.Array:
  """What the agent does on seeing frames (E, H, W, C) uint8 -> (E, z_dim) in [-1, 1].

  Args:
    ssl: pretraining's State.ssl, by whose encoder the policy sees.
    agent: State.agent; without one, (), actions are random.
    keys: (E,), one an environment.
    episodes: (E,) int32 numbers of the episodes, see `episode_numbers`.
  """
  z_dim = play.generator.z_dim
  if not isinstance(agent, agents.Agent):
    return environment.random_actions(keys, z_dim, play.real)
  h = encode(play, ssl['params'], ssl['batch_stats'], frames)
  noise = jax.vmap(lambda key: jax.random.normal(key, (z_dim,), play.real))(keys)
  return agents.act(agent, h.astype(play.real), noise, episodes, play.config.sac)


def episode_numbers(play: Play, env_ids: jax.Array, row: jax.Array) -> jax.Array:
  """A number for each episode of a run: (N,) int32 of environments, by global id, at rows ever
  added to the ring; the same for all frames of one."""
  length = play.config.environment.episode_length
  number = (row + play.first_steps(env_ids)) // length
  return number * play.config.pretrain.num_envs + env_ids


def collect(
  play: Play, state: Any, world: World, key: jax.Array, warm: jax.Array
) -> tuple[Any, Experience | tuple]:
  """T steps in this device's environments, added to the ring.

  Args:
    state: pretraining's State.
    key: of these steps.
    warm: () bool: actions are still uniformly random.

  Returns:
    State, and with pretrain.record the Experience (T, E, ...), else ().
  """
  ids, p, first = play.local_env_ids(), play.config.pretrain, state.ring.total
  actor, seeing = play, {}
  if isinstance(state.agent, agents.Agent):
    actor, seeing = folded(play, state.ssl)
  at_random = lambda keys: environment.random_actions(keys, play.generator.z_dim, play.real)

  def step(carry, t):
    env, frames = carry
    key_policy, key_env = jax.random.split(jax.random.fold_in(key, t))
    keys, episodes = environment.env_keys(key_policy, ids), episode_numbers(play, ids, first + t)
    by_policy = lambda: act(actor, seeing, state.agent, frames, keys, episodes)
    if devices.platform() == 'cpu':
      actions = jax.lax.cond(warm, lambda: at_random(keys), by_policy)
    else:  # a branch is chosen on the host, which waits for it
      actions = jnp.where(warm, at_random(keys), by_policy())
    packed = replay.pack(actions, play.action_dtype)
    taken = replay.unpack(packed, play.real)  # what is done is what the replay will hold
    record = ()
    if p.record:
      exact = packed if packed.dtype == jnp.int8 else taken
      record = Experience(z=env.z, label=env.label, step=env.step, action=exact)
    env = environment.step(
      env,
      taken,
      key_env,
      ids,
      world.dynamics,
      play.config.environment.episode_length,
      play.generator.num_classes,
    )
    return (env, look(play, world, env, frames)), ((frames, packed), record)

  carry = state.env, state.frames
  (env, frames), (block, record) = jax.lax.scan(step, carry, jnp.arange(p.rollout_length))
  return state.replace(env=env, frames=frames, ring=replay.add(state.ring, *block)), record
