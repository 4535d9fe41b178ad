"""PALM's pretraining: play in the latent world, learn to see from what was seen (paper section 4).

One iteration is a rollout of T steps in E environments, one block added to the replay ring, and U
updates of SimSiam and SAC. Many iterations run in one compiled, donated call over all devices;
Python sees scalars.
"""

import functools
import math
import pathlib
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from palm_jax import augment, environment, pairs, replay, reward, sac, simsiam
from palm_jax.base import devices
from palm_jax.base.errors import UserError
from palm_jax.encoder import make_encoder
from palm_jax.experience import Experience
from palm_jax.generator import load_generator
from palm_jax.generator.views import cropped, w_latents

DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16, 'float64': jnp.float64}


def default_config():
  """Sizes of the loop. Other parts bring their own: environment, replay, reward, simsiam, sac,
  encoder."""
  return ConfigDict(
    dict(
      env_steps=50_000_000,  # paper section 5.1
      num_envs=64,  # over all devices
      rollout_length=8,
      # SimSiam on CIFAR (arXiv 2011.10566, appendix D); one batch feeds SimSiam, the reward and SAC
      batch_size=512,
      # env steps of an iteration = batch_size * updates: each pair is seen once on average
      updates_per_iteration=1,
      # env steps with uniformly random actions before the first update (jaxrl: 1000; URLB: 4000)
      warmup_steps=4096,
      iterations_per_call=50,
      # compute dtype of the networks; statistics, rewards and losses are at least float32
      dtype='float32',
      checkpoint_minutes=10.0,
      # keeps latents, labels and steps in <workdir>/pretrain/experience: 2 kB a frame with 512
      # dimensions
      record=False,
      monitor_fraction=0.05,  # monitors and pictures every such share of the run
    )
  )


@flax.struct.dataclass
class State:
  """Everything that a run is; a checkpoint holds all of it. E environments over all devices.

  Attributes:
    iteration: () int32.
    key: typed key; every draw is a function of (key, iteration, step, global id).
    env: environment.EnvState.
    frames: (E, H, W, C) uint8, what the agent sees now.
    ring: replay.Replay.
    ssl: {'params', 'batch_stats', 'opt_state'} of encoder, projector and predictor.
    agent: sac.SAC.

  What the source of the pairs (pairs.py) does without is (): env and frames where nobody plays,
  ring where it draws pairs by itself, agent where no policy plays.
  """

  iteration: jax.Array
  key: jax.Array
  env: environment.EnvState
  frames: jax.Array
  ring: replay.Replay
  ssl: dict[str, Any]
  agent: sac.SAC

  @staticmethod
  def specs(ring=True):
    """Where each part lies: environments are sharded over 'data', the rest is on every device."""
    ring = (
      replay.Replay(frames=P(None, 'data'), actions=P(None, 'data'), total=P()) if ring else P()
    )
    return State(
      iteration=P(), key=P(), env=P('data'), frames=P('data'), ring=ring, ssl=P(), agent=P()
    )


class World(NamedTuple):
  """What does not change in a run but is traced: the generator's variables, the dynamics, what
  pairs.load gives."""

  variables: Any
  dynamics: environment.Dynamics
  material: Any = ()


class Output(NamedTuple):
  """What a call hands out beside the state; I iterations of T steps in E environments."""

  metrics: dict[str, jax.Array]  # (I,) each
  experience: Any  # with pretrain.record an Experience of (I * T, E, ...) arrays, else ()


class Program(NamedTuple):
  """The compiled pieces of a run and the sizes that they share."""

  init: Any  # (key, world) -> State
  state_shardings: State
  call: Any  # (State, World) -> (State, Output); donates the state
  modules: simsiam.Modules
  num_calls: int
  warmup_iterations: int  # with random actions and no update
  env_steps_per_iteration: int
  action: Any  # (State.ssl, State.agent, frames, keys) -> actions
  look: Any  # (World, EnvState, frames before or None) -> frames


def load_world_generator(config, workdir):
  """The generator that is played in: that of config.generator.path or the workdir's own, as
  config.environment wants it.

  Raises:
    UserError: none there, a damaged one, or one whose pictures the crop leaves nothing of.
  """
  generator, path = (
    load_generator(config.generator.path or workdir),
    pathlib.Path(config.generator.path or workdir),
  )
  if (
    (path / 'config.json').exists()
    and (path / 'generator').exists()
    and not (path / 'results' / 'generator.json').exists()
  ):
    logging.warning(
      'the generator of %s is not complete: if it trains on, this run goes on in another world',
      path,
    )
  return as_world(config, generator.with_dtype(DTYPES[config.pretrain.dtype]))


def as_world(config, generator):
  """The generator with the latents and the margin that config.environment wants; UserError where
  the crop leaves nothing."""
  if config.environment.latent_space == 'w':
    generator = w_latents(generator)
  return cropped(generator, config.environment.crop) if config.environment.crop else generator


def seen_shape(config, generator):
  """(H, W, C) of what agent and encoder see: the generator's picture, or several as channels."""
  height, width, channels = generator.image_shape
  return height, width, channels * config.environment.stack


def make_world(config, generator, mesh, data=None):
  """World on the mesh; `data`, palm_jax.data.load.Data, is for pairs of real images."""
  return devices.replicate(mesh, host_world(config, generator))._replace(
    material=pairs.load(config, generator, mesh, data)
  )


def host_world(config, generator):
  """World in the host's memory."""
  dynamics = environment.Dynamics(
    alpha=np.float32(config.environment.alpha),
    beta=np.float32(config.environment.beta),
    kind=config.environment.dynamics,
  )
  return World(variables=generator.variables, dynamics=dynamics)


def check_config(config, num_devices):
  """Raises UserError on settings that cannot work, before anything is compiled."""
  p, r = config.pretrain, config.replay
  for name in ('env_steps', 'updates_per_iteration', 'iterations_per_call', 'rollout_length'):
    if p[name] < 1:
      raise UserError(f'pretrain.{name}={p[name]} is not positive: set it to 1 or more')
  for name in ('alpha', 'beta'):
    if not 0 <= config.environment[name] <= 1:
      raise UserError(
        f'environment.{name}={config.environment[name]} is not in [0, 1]: it is a share; set it '
        'there'
      )
  for name, known in (('dynamics', environment.DYNAMICS), ('latent_space', ('z', 'w'))):
    if config.environment[name] not in known:
      raise UserError(
        f'environment.{name}={config.environment[name]!r} is unknown: choose one of '
        f'{", ".join(known)}'
      )
  if config.sac.init_alpha <= 0:
    raise UserError(
      f'sac.init_alpha={config.sac.init_alpha} has no logarithm: set it above 0; a small one is '
      'next to no entropy bonus'
    )
  if config.environment.stack < 1:
    raise UserError(
      f'environment.stack={config.environment.stack} pictures show nothing: set it to 1 or more'
    )
  devices.check_divisible('replay.num_shards', r.num_shards, num_devices, 'devices')
  devices.check_divisible('pretrain.num_envs', p.num_envs, r.num_shards, 'replay.num_shards')
  devices.check_divisible('pretrain.batch_size', p.batch_size, r.num_shards, 'replay.num_shards')
  devices.check_divisible(
    'replay.capacity', r.capacity, p.num_envs * p.rollout_length, 'num_envs * rollout_length'
  )
  if r.actions not in replay.ACTION_DTYPES:
    raise UserError(
      f'replay.actions={r.actions!r} is unknown: choose one of {", ".join(replay.ACTION_DTYPES)}'
    )
  if p.dtype not in DTYPES:
    raise UserError(f'pretrain.dtype={p.dtype!r} is unknown: choose one of {", ".join(DTYPES)}')
  if config.environment.episode_length < 2:
    raise UserError(
      f'environment.episode_length={config.environment.episode_length} has no consecutive frames: '
      'set it to 2 or more'
    )
  if r.capacity < 3 * p.num_envs:
    raise UserError(
      f'replay.capacity={r.capacity} is too small for consecutive frames of pretrain.num_envs='
      f'{p.num_envs} environments: set it to {3 * p.num_envs} or more'
    )
  if p.batch_size > r.capacity:
    raise UserError(
      f'pretrain.batch_size={p.batch_size} is larger than the replay '
      f'(replay.capacity={r.capacity}): '
      'lower the first or raise the second'
    )
  if p.warmup_steps < max(p.batch_size, 3 * p.num_envs):
    raise UserError(
      f'pretrain.warmup_steps={p.warmup_steps} gives the first update too few frames: '
      f'set it to {max(p.batch_size, 3 * p.num_envs)} or more'
    )
  if p.warmup_steps >= p.env_steps:
    raise UserError(
      f'pretrain.warmup_steps={p.warmup_steps} is not below pretrain.env_steps={p.env_steps}: '
      'nothing would be learned; lower the first or raise the second'
    )
  if not 1 <= config.reward.k < p.batch_size:
    raise UserError(
      f'reward.k={config.reward.k} is impossible with pretrain.batch_size={p.batch_size}: '
      f'choose 1 to {p.batch_size - 1}, or a larger batch'
    )
  for name, known in (('on', ('next', 'current')), ('transform', reward.TRANSFORMS)):
    if config.reward[name] not in known:
      raise UserError(
        f'reward.{name}={config.reward[name]!r} is unknown: choose one of {", ".join(known)}'
      )
  pairs.check_config(config)
  if config.simsiam.objective not in simsiam.OBJECTIVES:
    raise UserError(
      f'simsiam.objective={config.simsiam.objective!r} is unknown: choose one of '
      f'{", ".join(simsiam.OBJECTIVES)}'
    )
  if not config.simsiam.temperature > 0:
    raise UserError(
      f'simsiam.temperature={config.simsiam.temperature} is not positive: set it above 0'
    )
  augment.make_augment(config.simsiam.augment)
  simsiam.make_modules(make_encoder(config.encoder), config.simsiam)


def make_program(config, generator, mesh):
  """Builds a run's functions; nothing is compiled yet.

  Args:
    config: the whole config.
    generator: object with apply(variables, z, labels), z_dim, num_classes, image_shape (DESIGN: any
      generator).
    mesh: one-dimensional mesh, axis 'data'.

  Returns:
    Program.

  Raises:
    UserError: on impossible sizes.
  """
  check_config(config, mesh.size)
  if config.simsiam.objective == 'supcon' and not generator.num_classes:
    raise UserError(
      "simsiam.objective='supcon' with a generator without classes makes one class of everything: "
      'choose another'
    )
  p, num_shards = config.pretrain, config.replay.num_shards
  num_envs, length = p.num_envs, config.environment.episode_length
  envs_per_device, shards_per_device = num_envs // mesh.size, num_shards // mesh.size
  steps_per_iteration = p.rollout_length * num_envs
  warmup_iterations = math.ceil(p.warmup_steps / steps_per_iteration)
  num_calls = math.ceil(p.env_steps / steps_per_iteration / p.iterations_per_call)
  num_updates = (num_calls * p.iterations_per_call - warmup_iterations) * p.updates_per_iteration
  dtype = DTYPES[p.dtype]
  real = jnp.promote_types(dtype, jnp.float32)  # parameters, latents, actions
  action_dtype = replay.ACTION_DTYPES[config.replay.actions] or real
  modules = simsiam.make_modules(
    make_encoder(config.encoder, 'data', dtype), config.simsiam, 'data', dtype
  )
  optimizer = simsiam.make_optimizer(config.simsiam, num_updates, p.batch_size)
  views, shape = augment.make_augment(config.simsiam.augment), seen_shape(config, generator)
  source = pairs.SOURCES[config.pairs.source]

  def draw_pictures(world, z, label, truncation_psi):
    return environment.to_uint8(
      generator.apply(world.variables, z, label, truncation_psi=truncation_psi)
    )

  def look(world, env, seen=None):
    """What is seen in env (E environments) after `seen`; None where nothing was yet."""
    seen = jnp.zeros((len(env.step), *shape), jnp.uint8) if seen is None else seen
    pictures = draw_pictures(world, env.z, env.label, config.environment.truncation_psi)
    return environment.see(seen, pictures, env.step)

  def encode(params, batch_stats, frames):
    variables = {'params': params['encoder'], 'batch_stats': batch_stats['encoder']}
    return modules.encoder.apply(variables, frames, train=False)  # (E, F)

  def cast(tree):
    return jax.tree.map(
      lambda x: x.astype(real) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )

  def init(key, world):
    key, key_env, key_ssl, key_agent = jax.random.split(key, 4)
    params, batch_stats = cast(simsiam.init(modules, key_ssl, jnp.zeros((2, *shape), jnp.uint8)))
    env = frames = ring = agent = ()
    if source.play in ('policy', 'random'):
      ids = jnp.arange(num_envs)
      env = environment.reset(
        key_env,
        ids,
        environment.staggered_steps(ids, num_envs, length),
        generator.z_dim,
        generator.num_classes,
        real,
        world.dynamics.kind,
      )
      frames = look(world, env)
    if source.play:
      ring = replay.create(
        config.replay.capacity // num_envs, num_envs, shape, generator.z_dim, action_dtype
      )
    if source.play == 'policy':
      h = jax.eval_shape(encode, params, batch_stats, frames[:2])
      agent = cast(sac.init(key_agent, h.shape[1], generator.z_dim, config.sac))
    return State(
      iteration=jnp.zeros((), jnp.int32),
      key=key,
      env=env,
      frames=frames,
      ring=ring,
      ssl=dict(params=params, batch_stats=batch_stats, opt_state=optimizer.init(params)),
      agent=agent,
    )

  def action(ssl, agent, frames, keys):
    """What is done on seeing frames (E, H, W, C) uint8, keys (E,) -> (E, z_dim); the policy sees by
    the encoder in eval mode."""
    if source.play != 'policy':
      return environment.random_actions(keys, generator.z_dim, real)
    h = encode(ssl['params'], ssl['batch_stats'], frames)
    noise = jax.vmap(lambda k: jax.random.normal(k, (generator.z_dim,), real))(keys)
    return sac.act(agent, h.astype(real), noise, config.sac)

  def rollout(state, world, key, warm):
    """T steps in the local environments -> env, frames, (T, E, ...) frames and actions, Experience
    or ()."""
    ids = jax.lax.axis_index('data') * envs_per_device + jnp.arange(envs_per_device)

    def one_step(carry, t):
      env, frames = carry
      lived = Experience(z=env.z, label=env.label, step=env.step) if p.record else ()
      key_policy, key_env = jax.random.split(jax.random.fold_in(key, t))
      keys = environment.env_keys(key_policy, ids)
      actions = jax.lax.cond(
        warm,
        lambda: environment.random_actions(keys, generator.z_dim, real),
        lambda: action(state.ssl, state.agent, frames, keys),
      )
      packed = replay.pack(actions, action_dtype)
      taken = replay.unpack(packed, real)  # what is done is what will be remembered
      env = environment.step(
        env, taken, key_env, ids, world.dynamics, length, generator.num_classes
      )
      return (env, look(world, env, frames)), ((frames, packed), lived)

    (env, frames), (block, lived) = jax.lax.scan(
      one_step, (state.env, state.frames), jnp.arange(p.rollout_length)
    )
    return env, frames, block, lived

  def rerun(state, world):
    """The rows that another run's rollout of this iteration had: (T, E, ...) frames, and actions
    that nobody asks for."""
    rows = jax.tree.map(
      lambda x: jax.lax.dynamic_slice_in_dim(
        x, state.iteration * p.rollout_length, p.rollout_length
      ),
      world.material,
    )
    one_row = lambda _, row: (
      None,
      draw_pictures(world, row.z.astype(real), row.label, config.environment.truncation_psi),
    )
    frames = jax.lax.scan(one_row, None, rows)[1]
    return frames, jnp.zeros((*frames.shape[:2], generator.z_dim), action_dtype)

  def update(ring, world, carry, key):
    """One batch for SimSiam, the reward and SAC; SimSiam's forward pass is the only one over the
    batch."""
    ssl, agent = carry
    key_sample, key_views, key_sac = jax.random.split(key, 3)
    shards = jax.lax.axis_index('data') * shards_per_device + jnp.arange(shards_per_device)
    fold = lambda k: jax.vmap(lambda i: jax.random.fold_in(k, i))(shards)
    first_ids = jax.lax.axis_index('data') * envs_per_device + jnp.arange(envs_per_device)
    per_shard, labels = p.batch_size // num_shards, None
    if source.draw:
      drawing = pairs.Draw(
        config,
        world.material,
        functools.partial(draw_pictures, world),
        generator.z_dim,
        generator.num_classes,
        real,
      )
      frames, next_frames, labels = source.draw(drawing, fold(key_sample), per_shard)
    else:
      frames, actions, next_frames = replay.sample(
        ring,
        fold(key_sample),
        per_shard,
        environment.staggered_steps(first_ids, num_envs, length),
        length,
        shape,
      )
    view_keys = jax.vmap(lambda k: jax.random.split(k, (per_shard, 2)))(fold(key_views)).reshape(
      -1, 2
    )

    def loss_fn(params):
      params = jax.lax.pcast(
        params, 'data', to='varying'
      )  # one all-reduce a parameter in the gradient
      return simsiam.forward(
        modules,
        params,
        ssl['batch_stats'],
        views(view_keys[:, 0], frames),
        views(view_keys[:, 1], next_frames),
        symmetric=config.simsiam.symmetric,
        axis_name='data',
        objective=config.simsiam.objective,
        temperature=config.simsiam.temperature,
        labels=labels,
      )

    (_, aux), grads = jax.value_and_grad(loss_fn, has_aux=True)(ssl['params'])
    updates, opt_state = optimizer.update(grads, ssl['opt_state'], ssl['params'])
    new_ssl = dict(
      params=optax.apply_updates(ssl['params'], updates),
      batch_stats=aux.batch_stats,
      opt_state=opt_state,
    )
    metrics = dict(aux.metrics, ssl_grad_norm=optax.tree.norm(grads))
    if source.play != 'policy':
      return (new_ssl, agent), metrics

    h, next_h = aux.h.astype(real), aux.h_next.astype(real)
    r = reward.global_entropy_reward(
      next_h if config.reward.on == 'next' else h, 'data', **reward.options(config.reward)
    )
    noise = jax.vmap(lambda k: jax.random.normal(k, (2, per_shard, generator.z_dim), real))(
      fold(key_sac)
    )
    noise = noise.swapaxes(0, 1).reshape(2, -1, generator.z_dim)
    batch = sac.Batch(
      h=h,
      action=replay.unpack(actions, real),
      reward=r,
      next_h=next_h,
      discount=jnp.full_like(r, config.sac.gamma),
    )
    agent, sac_metrics = sac.update(agent, batch, noise, config.sac, axis_name='data')
    return (new_ssl, agent), dict(metrics, **sac_metrics)

  def iteration(state, world):
    key_rollout, key_update = jax.random.split(jax.random.fold_in(state.key, state.iteration))
    warm = state.iteration < warmup_iterations
    env, frames, ring, lived = state.env, state.frames, state.ring, ()
    if source.play == 'record':
      ring = replay.add(ring, *rerun(state, world))
    elif source.play:
      env, frames, block, lived = rollout(state, world, key_rollout, warm)
      ring = replay.add(ring, *block)

    def learn():
      carry, metrics = jax.lax.scan(
        functools.partial(update, ring, world),
        (state.ssl, state.agent),
        jax.random.split(key_update, p.updates_per_iteration),
      )
      return *carry, jax.tree.map(jnp.mean, metrics)

    def wait():
      metrics = jax.eval_shape(learn)[2]
      return state.ssl, state.agent, jax.tree.map(lambda m: jnp.zeros(m.shape, m.dtype), metrics)

    ssl, agent, metrics = jax.lax.cond(warm, wait, learn)
    state = state.replace(
      iteration=state.iteration + 1, env=env, frames=frames, ring=ring, ssl=ssl, agent=agent
    )
    return state, Output(metrics, lived)

  def call(state, world):
    first = state.iteration
    state, output = jax.lax.scan(
      lambda s, _: iteration(s, world), state, length=p.iterations_per_call
    )
    updated = first + jnp.arange(p.iterations_per_call) >= warmup_iterations
    lived = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), output.experience)
    return state, Output(dict(output.metrics, updated=updated), lived)

  specs = State.specs(ring=bool(source.play))
  sharded_call = jax.shard_map(
    call,
    mesh=mesh,
    in_specs=(specs, World(P(), P(), pairs.specs(config))),
    out_specs=(specs, Output(P(), P(None, 'data'))),
  )
  state_shape = jax.eval_shape(init, jax.random.key(0), host_world(config, generator))
  full_specs = jax.tree.map(
    lambda spec, part: jax.tree.map(lambda _: spec, part),
    specs,
    state_shape,
    is_leaf=lambda x: isinstance(x, P),
  )
  state_shardings = devices.shardings(mesh, full_specs)
  return Program(
    init=jax.jit(init, out_shardings=state_shardings),
    state_shardings=state_shardings,
    call=jax.jit(sharded_call, donate_argnums=0),
    modules=modules,
    num_calls=num_calls,
    warmup_iterations=warmup_iterations,
    env_steps_per_iteration=steps_per_iteration,
    action=action,
    look=look,
  )
