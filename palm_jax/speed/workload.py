"""The parts of an iteration of pretraining, each compiled on its own at the sizes of a config, to
be measured or counted.

Three of them are work that no arrangement avoids: drawing the rollout's frames, looking at them to
act, and SimSiam's forward and backward pass over the batches. They call the bare networks, not
pretrain's own functions.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from palm_jax import environment, replay, reward, sac, simsiam
from palm_jax.base import devices
from palm_jax.pretrain import DTYPES, State, seen_shape

UNAVOIDABLE = 'generator', 'acting', 'simsiam'


class Part(NamedTuple):
  """One part of an iteration.

  Attributes:
    call: jitted; with `carries`, its first argument is that field of State, which is donated and
      comes back first.
    arguments: (State, World, sample of `make_sample`) -> all arguments of `call`.
    carries: the field's name, or None.
  """

  call: Any
  arguments: Any
  carries: str | None = None


def settings(config):
  """The sections of a config that an iteration's cost depends on, as dicts."""
  return {
    name: config[name].to_dict()
    for name in ('pretrain', 'replay', 'encoder', 'simsiam', 'sac', 'reward')
  }


def make_sample(config, generator, program, key):
  """Inputs of the parts, drawn at random: {name: (steps or updates, environments or transitions,
  ...) array}.

  Args:
    config: the whole config.
    generator: as for pretrain.make_program.
    program: pretrain.Program.
    key: typed key.
  """
  p, keys = config.pretrain, iter(jax.random.split(key, 16))
  real = jnp.promote_types(DTYPES[p.dtype], jnp.float32)
  rollout, batch = (p.rollout_length, p.num_envs), (p.updates_per_iteration, p.batch_size)
  shape = seen_shape(config, generator)
  pictures = lambda lead: jax.random.bits(next(keys), (*lead, *shape), jnp.uint8)
  normal = lambda *shape: jax.random.normal(next(keys), shape, real)
  look = lambda key: program.modules.encoder.init_with_output(
    key, jnp.zeros((2, *shape), jnp.uint8), train=False
  )
  features = jax.eval_shape(look, key)[0].shape[-1]
  return dict(
    z=normal(*rollout, generator.z_dim),
    label=jax.random.randint(next(keys), rollout, 0, max(generator.num_classes, 1)),
    seen=pictures(rollout),
    done=jnp.tanh(normal(*rollout, generator.z_dim)),
    s=pictures(batch),
    s_next=pictures(batch),
    h=normal(*batch, features),
    h_next=normal(*batch, features),
    action=jnp.tanh(normal(*batch, generator.z_dim)),
    reward=normal(*batch),
    noise=normal(*batch, 2, generator.z_dim),
  )


def sample_shardings(mesh, sample):
  """Where a sample lies: the second axis over 'data'."""
  return devices.shardings(mesh, jax.tree.map(lambda _: P(None, 'data'), sample))


def make_parts(config, generator, program, mesh):
  """{name: Part}: generator, acting, simsiam, reward, sac, replay; each does what one iteration
  does of it.

  Args:
    config: the whole config.
    generator: as for pretrain.make_program.
    program: pretrain.Program of the two and the mesh.
    mesh: one-dimensional mesh, axis 'data'.
  """
  p, modules, length = config.pretrain, program.modules, config.environment.episode_length
  shards = config.replay.num_shards // mesh.size
  rows = P(None, 'data')

  def part(f, in_specs, out_specs, arguments, carries=None):
    sharded = jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs)
    return Part(jax.jit(sharded, donate_argnums=() if carries is None else 0), arguments, carries)

  def over(f, *arrays):
    """f on each step or update, one after the other."""
    return jax.lax.scan(lambda _, x: (None, f(*x)), None, arrays)[1]

  def draw(variables, z, labels):
    images = lambda z, labels: generator.apply(
      variables, z, labels, truncation_psi=config.environment.truncation_psi
    )
    return over(lambda *x: environment.to_uint8(images(*x)), z, labels)

  def look(params, batch_stats, frames):
    return over(
      lambda x: modules.encoder.apply(
        {'params': params, 'batch_stats': batch_stats}, x, train=False
      ),
      frames,
    )

  def learn(ssl, s, s_next):
    def gradient_norm(*views):
      def loss(params):
        params = jax.lax.pcast(params, 'data', to='varying')
        return simsiam.forward(
          modules,
          params,
          ssl['batch_stats'],
          *views,
          symmetric=config.simsiam.symmetric,
          axis_name='data',
          objective=config.simsiam.objective,
          temperature=config.simsiam.temperature,
        )

      return optax.tree.norm(jax.grad(loss, has_aux=True)(ssl['params'])[0])

    return over(gradient_norm, s, s_next)

  def reward_of(h):
    return over(
      lambda h: reward.global_entropy_reward(h, 'data', **reward.options(config.reward)), h
    )

  def act_and_criticise(agent, h, action, r, h_next, noise):
    def update(agent, x):
      *transitions, noise = x
      batch = sac.Batch(*transitions, discount=jnp.full_like(r[0], config.sac.gamma))
      return sac.update(agent, batch, noise.swapaxes(0, 1), config.sac, axis_name='data')

    return jax.lax.scan(update, agent, (h, action, r, h_next, noise))

  def remember(ring, frames, actions):
    ring = replay.add(ring, frames, replay.pack(actions, ring.actions.dtype))
    first = jnp.zeros(frames.shape[1], jnp.int32)
    drawn = lambda key: replay.sample(
      ring,
      jax.random.split(key, shards),
      p.batch_size // config.replay.num_shards,
      first,
      length,
      seen_shape(config, generator),
    )
    return ring, over(
      drawn,
      jax.random.split(jax.random.fold_in(jax.random.key(0), ring.total), p.updates_per_iteration),
    )

  specs = State.specs()
  return dict(
    generator=part(
      draw, (P(), rows, rows), rows, lambda state, world, x: (world.variables, x['z'], x['label'])
    ),
    acting=part(
      look,
      (P(), P(), rows),
      rows,
      lambda state, world, x: (
        state.ssl['params']['encoder'],
        state.ssl['batch_stats']['encoder'],
        x['seen'],
      ),
    ),
    simsiam=part(
      learn,
      (P(), rows, rows),
      P(),
      lambda state, world, x: (
        {name: state.ssl[name] for name in ('params', 'batch_stats')},
        x['s'],
        x['s_next'],
      ),
    ),
    reward=part(reward_of, rows, rows, lambda state, world, x: (x['h'],)),
    sac=part(
      act_and_criticise,
      (P(), *[rows] * 5),
      P(),
      lambda state, world, x: (
        state.agent,
        *(x[name] for name in ('h', 'action', 'reward', 'h_next', 'noise')),
      ),
      'agent',
    ),
    replay=part(
      remember,
      (specs.ring, rows, rows),
      (specs.ring, rows),
      lambda state, world, x: (state.ring, x['seen'], x['done']),
      'ring',
    ),
  )
