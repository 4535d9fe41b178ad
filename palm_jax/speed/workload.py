"""The parts of an iteration of pretraining, each compiled alone at a config's sizes.

They are measured or counted. Three of them are work that no arrangement avoids: drawing the
rollout's frames, looking at them to act, and SimSiam's forward and backward pass over the batches.
They call the bare networks, not pretrain's own functions.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from palm_jax import agent as agents
from palm_jax import replay, reward, rollout, sac, simsiam, worlds
from palm_jax.base import devices
from palm_jax.generator import LoadedGenerator, PictureGenerator
from palm_jax.layers.pixels import to_uint8
from palm_jax.pretrain import Program, State, make_program
from palm_jax.setup import Setup

UNAVOIDABLE = 'generator', 'acting', 'simsiam'
ROWS = P(None, 'data')
ENCODER = 'params', 'batch_stats'  # in State.ssl


class Part(NamedTuple):
  """One part of an iteration.

  Attributes:
    call: jitted; with `carries`, its first argument is that field of State, which is donated and
      comes back first.
    arguments: (State, World, sample of `make_sample`) -> all arguments of `call`.
    carries: the field's name, or None.
  """

  call: Any
  arguments: Callable[[State, Any, dict[str, jax.Array]], tuple]
  carries: str | None = None


def settings(config: ConfigDict) -> dict[str, dict]:
  """The sections of a config that an iteration's cost depends on."""
  names = 'pretrain', 'replay', 'encoder', 'simsiam', 'sac', 'reward'
  return {name: config[name].to_dict() for name in names}


def make_sample(setup: Setup, key: jax.Array) -> dict[str, jax.Array]:
  """Inputs of the parts, drawn at random: (steps or updates, environments or transitions, ...)."""
  p, generator, keys = setup.config.pretrain, setup.generator, iter(jax.random.split(key, 16))
  rollout, batch = (p.rollout_length, p.num_envs), (p.updates_per_iteration, p.batch_size)
  z_dim, shape = generator.z_dim, setup.image_shape
  pictures = lambda lead: jax.random.bits(next(keys), (*lead, *shape), jnp.uint8)
  normal = lambda *shape: jax.random.normal(next(keys), shape, setup.real)
  look = lambda key: setup.encoder.init_with_output(
    key, jnp.zeros((2, *shape), jnp.uint8), train=False
  )
  features = jax.eval_shape(look, key)[0].shape[-1]
  return dict(
    z=normal(*rollout, z_dim),
    label=jax.random.randint(next(keys), rollout, 0, max(generator.num_classes, 1)),
    seen=pictures(rollout),
    done=jnp.tanh(normal(*rollout, z_dim)),
    s=pictures(batch),
    s_next=pictures(batch),
    h=normal(*batch, features),
    h_next=normal(*batch, features),
    action=jnp.tanh(normal(*batch, z_dim)),
    reward=normal(*batch),
    noise=normal(*batch, 2, z_dim),
  )


def sample_shardings(mesh: Mesh, sample: Any) -> Any:
  """Where a sample lies: the second axis over 'data'."""
  return devices.shardings(mesh, jax.tree.map(lambda _: ROWS, sample))


def make_parts(setup: Setup, mesh: Mesh) -> dict[str, Part]:
  """The parts by name; each does what one iteration does of it."""

  def part(f, in_specs, out_specs, arguments, carries=None):
    f = functools.partial(f, setup)
    sharded = jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs)
    return Part(jax.jit(sharded, donate_argnums=() if carries is None else 0), arguments, carries)

  ring = State.specs().ring
  without_optimizer = lambda ssl: {name: ssl[name] for name in ssl if name != 'opt_state'}
  encoder = lambda ssl: {name: {'encoder': ssl[name]['encoder']} for name in ENCODER}
  transitions = 's', 's_next', 'h', 'action', 'reward', 'h_next', 'noise'
  return dict(
    generator=part(
      draw,
      (P(), ROWS, ROWS),
      ROWS,
      lambda state, world, x: (world.variables, x['z'], x['label']),
    ),
    acting=part(
      look,
      (P(), ROWS),
      ROWS,
      lambda state, world, x: (encoder(state.ssl), x['seen']),
    ),
    simsiam=part(
      learn,
      (P(), ROWS, ROWS),
      P(),
      lambda state, world, x: (without_optimizer(state.ssl), x['s'], x['s_next']),
    ),
    reward=part(reward_of, ROWS, ROWS, lambda state, world, x: (x['h'],)),
    sac=part(
      learn_policy,
      (P(), P(), *[ROWS] * 7),
      P(),
      lambda state, world, x: (state.agent, encoder(state.ssl), *(x[k] for k in transitions)),
      carries='agent',
    ),
    replay=part(
      remember,
      (ring, ROWS, ROWS),
      (ring, ROWS),
      lambda state, world, x: (state.ring, x['seen'], x['done']),
      carries='ring',
    ),
  )


def one_by_one(f: Callable, *arrays: Any) -> Any:
  """f on each step or update, one after the other."""
  return jax.lax.scan(lambda _, x: (None, f(*x)), None, arrays)[1]


def draw(setup: Setup, variables: Any, z: jax.Array, labels: jax.Array) -> jax.Array:
  """The rollout's frames."""
  psi = setup.config.environment.truncation_psi
  variables = rollout.prepared(setup, variables)

  def pictures(z, labels):
    return to_uint8(setup.generator.apply(variables, z, labels, truncation_psi=psi))

  return one_by_one(pictures, z, labels)


def look(setup: Setup, encoder: dict[str, Any], frames: jax.Array) -> jax.Array:
  """The encoder's features of the rollout's frames, as the policy sees them."""
  play, encoder = rollout.folded(setup, encoder)
  see = functools.partial(rollout.encode, play, *(encoder[name] for name in ENCODER))
  return one_by_one(see, frames)


def learn(setup: Setup, ssl: dict[str, Any], s: jax.Array, s_next: jax.Array) -> jax.Array:
  """SimSiam's forward and backward pass over each batch -> norms of the gradients."""
  c = setup.config.simsiam

  def gradient_norm(*views):
    def loss(params):
      return simsiam.forward(
        setup.modules,
        jax.lax.pcast(params, 'data', to='varying'),
        ssl['batch_stats'],
        *views,
        axis_name='data',
        target=ssl.get('target'),
        **simsiam.options(c),
      )

    return optax.tree.norm(jax.grad(loss, has_aux=True)(ssl['params'])[0])

  return one_by_one(gradient_norm, s, s_next)


def reward_of(setup: Setup, h: jax.Array) -> jax.Array:
  """The reward of each batch; where it is learned, apt's."""
  c = setup.config.reward
  of = reward.OF_FEATURES.get(c.kind, reward.global_entropy_reward)
  return one_by_one(lambda h: of(h, 'data', **reward.options(c)), h)


def learn_policy(
  setup: Setup,
  agent: agents.Agent,
  encoder: dict[str, Any],
  s: jax.Array,
  s_next: jax.Array,
  h: jax.Array,
  action: jax.Array,
  r: jax.Array,
  h_next: jax.Array,
  noise: jax.Array,
) -> tuple[agents.Agent, dict]:
  """SAC's updates, on features of its own where sac.features is 'eval'."""
  c = setup.config.sac
  encode = functools.partial(rollout.encode, setup, *(encoder[name] for name in ENCODER))
  see = lambda h: agents.observe(agent, h, jnp.zeros(len(h), jnp.int32), c)

  def update(agent, x):
    s, s_next, h, action, r, h_next, noise = x
    if c.features == 'eval':
      h, h_next = (encode(x).astype(setup.real) for x in (s, s_next))
    batch = sac.Batch(see(h), action, r, see(h_next), jnp.full_like(r, c.gamma))
    again = lambda agent, _: sac.update(agent, batch, noise.swapaxes(0, 1), c, axis_name='data')
    after: Any = jax.lax.scan(again, agent, length=c.updates_per_batch)
    agent, metrics = after
    return agent, jax.tree.map(lambda x: x[-1], metrics)

  return jax.lax.scan(update, agent, (s, s_next, h, action, r, h_next, noise))


def remember(
  setup: Setup, ring: replay.Replay, frames: jax.Array, actions: jax.Array
) -> tuple[replay.Replay, Any]:
  """A block added to the ring, and batches drawn from it."""
  config = setup.config
  shards = config.replay.num_shards // setup.num_devices
  per_shard = config.pretrain.batch_size // config.replay.num_shards
  first, length = jnp.zeros(frames.shape[1], jnp.int32), config.environment.episode_length
  ring = replay.add(ring, frames, replay.pack(actions, ring.actions.dtype))

  def drawn(key):
    keys = jax.random.split(key, shards)
    return replay.sample(ring, keys, per_shard, first, length, setup.image_shape)

  key = jax.random.fold_in(jax.random.key(0), ring.total)
  return ring, one_by_one(drawn, jax.random.split(key, config.pretrain.updates_per_iteration))


def draw_weights(generator: LoadedGenerator) -> LoadedGenerator:
  """The same generator with random weights, as the speed does not depend on them."""
  network = generator.network
  z, label = jnp.zeros((1, network.z_dim)), jnp.zeros(1, jnp.int32)
  variables = jax.jit(network.init)(jax.random.key(0), z, label)
  return dataclasses.replace(generator, variables=jax.device_get(variables))


def ready(
  config: ConfigDict, generator: PictureGenerator, mesh: Mesh
) -> tuple[Program, State, Any]:
  """(program, state past its warm-up with a full ring, world)."""
  program = make_program(config, generator, mesh)
  world = worlds.make_world(config, generator, mesh)
  return program, fill(program, program.init(jax.random.key(config.seed), world)), world


def fill(program: Program, state: State) -> State:
  """The state with a full ring of noise, past its warm-up."""

  def filled(state):
    ring = state.ring
    frames = jax.random.bits(jax.random.key(1), ring.frames.shape, jnp.uint8)
    return state.replace(
      iteration=state.iteration + program.setup.warmup_iterations,
      ring=ring.replace(frames=frames, total=ring.total + ring.frames.shape[0]),
    )

  return jax.jit(filled, out_shardings=program.state_shardings, donate_argnums=0)(state)
