"""PALM's pretraining: play in the latent world, learn to see from what was seen (paper section 4).

One iteration is a rollout of T steps in E environments, one block added to the replay ring, and U
updates of SimSiam and SAC. Many iterations run in one compiled, donated call over all devices;
Python sees scalars.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from palm_jax import agent as agents
from palm_jax import (
  augment,
  environment,
  material,
  pairs,
  replay,
  reward,
  rollout,
  sac,
  simsiam,
  worlds,
)
from palm_jax import encoder as encoders
from palm_jax.base import checks, devices
from palm_jax.base.errors import UserError
from palm_jax.experience import Experience
from palm_jax.optimizer import learning_rate
from palm_jax.rollout import World
from palm_jax.setup import Setup, make_setup, schedule


def default_config() -> ConfigDict:
  """Sizes of the loop. Other parts bring their own: environment, replay, reward, simsiam, sac."""
  return ConfigDict(
    dict(
      env_steps=50_000_000,  # paper section 5.1
      # over all devices. 512 x 1 are as many env steps an iteration as 64 x 8, drawn and looked at
      # at once: 15.0 instead of 16.4 ms, 840 instead of 1,670 kernels (compile_for, one H200)
      num_envs=512,
      rollout_length=1,
      # SimSiam on CIFAR (arXiv 2011.10566, appendix D); one batch feeds SimSiam, reward and SAC
      batch_size=512,
      # env steps of an iteration = batch_size * updates: each pair is seen once on average
      updates_per_iteration=1,
      # env steps with random actions before the first update (jaxrl: 1000; URLB: 4000)
      warmup_steps=4096,
      iterations_per_call=50,
      # of the networks' computation; statistics, rewards and losses are at least float32
      dtype='float32',
      checkpoint_minutes=10.0,
      # keep latents, actions, labels and steps in <workdir>/pretrain/experience: 4 kB a frame of
      # 512 dimensions, 2.6 with replay.actions='int8'
      record=False,
      monitor_fraction=0.05,  # monitors and pictures every such share of the run
    )
  )


RANGES = dict(
  env_steps=checks.Range(1, 10**10),
  num_envs=checks.Range(1, 10**6),
  rollout_length=checks.Range(1, 10**6),
  batch_size=checks.Range(1, 10**6),
  updates_per_iteration=checks.Range(1, 10**6),
  warmup_steps=checks.COUNT,
  iterations_per_call=checks.Range(1, 10**6),
  checkpoint_minutes=checks.MINUTES,
  monitor_fraction=checks.SHARE,
)


class State(flax.struct.PyTreeNode):
  """Everything that a run is; a checkpoint holds all of it. E environments over all devices.

  What the source of the pairs (pairs.py) does without is (): env and frames where nobody plays,
  ring where it draws pairs by itself, agent where no policy plays.

  Attributes:
    iteration: () int32.
    key: typed key; every draw is a function of (key, iteration, step, global id).
    env: environment.EnvState.
    frames: (E, H, W, C) uint8, what the agent sees now.
    ring: replay.Replay.
    ssl: {'params', 'batch_stats', 'opt_state'} of encoder, projector, predictor; BYOL's 'target'.
    agent: agent.Agent.
  """

  iteration: jax.Array
  key: jax.Array
  env: environment.EnvState
  frames: jax.Array
  ring: replay.Replay
  ssl: dict[str, Any]
  agent: agents.Agent

  @staticmethod
  def specs(ring: bool = True) -> 'State':
    """Where each part lies: environments are sharded over 'data', the rest is on every device."""
    everywhere, rows = P(), P(None, 'data')
    in_ring: dict[str, Any] = dict(frames=rows, actions=rows, total=everywhere)
    places: dict[str, Any] = dict(
      iteration=everywhere,
      key=everywhere,
      env=P('data'),
      frames=P('data'),
      ring=replay.Replay(**in_ring) if ring else everywhere,
      ssl=everywhere,
      agent=everywhere,
    )
    return State(**places)


class Output(NamedTuple):
  """What a call hands out beside the state; I iterations of T steps in E environments."""

  metrics: dict[str, jax.Array]  # (I,) each
  experience: Experience | tuple  # (I * T, E, ...) with pretrain.record, else ()


def iteration(setup: Setup, state: State, world: World) -> tuple[State, Output]:
  """T steps in E environments, then U updates (paper section 4)."""
  key_collect, key_learn = jax.random.split(jax.random.fold_in(state.key, state.iteration))
  warm = state.iteration < setup.warmup_iterations
  state, record = setup.source.collect(setup, state, world, key_collect, warm)
  # jax.jit: traced once, for its shapes and for the branch.
  learn_now = jax.jit(functools.partial(learn, setup, state, world, key_learn))
  ssl, agent, metrics = jax.lax.cond(warm, lambda: unchanged(state, learn_now), learn_now)
  return state.replace(iteration=state.iteration + 1, ssl=ssl, agent=agent), Output(metrics, record)


def learn(setup: Setup, state: State, world: World, key: jax.Array) -> tuple[Any, Any, dict]:
  """U updates on what the ring, or the source itself, has -> ssl, agent, mean metrics."""
  step = functools.partial(update, setup, state.ring, world)
  keys = jax.random.split(key, setup.config.pretrain.updates_per_iteration)
  (ssl, agent), metrics = jax.lax.scan(step, (state.ssl, state.agent), keys)
  return ssl, agent, jax.tree.map(jnp.mean, metrics)


def unchanged(state: State, learn_now: Callable) -> tuple[Any, Any, dict]:
  """As `learn`, while the warm-up lasts: nothing is learned, all metrics are 0."""
  metrics = jax.eval_shape(learn_now)[2]
  return state.ssl, state.agent, jax.tree.map(lambda m: jnp.zeros(m.shape, m.dtype), metrics)


def update(
  setup: Setup, ring: replay.Replay, world: World, carry: tuple[Any, Any], key: jax.Array
) -> tuple[tuple[Any, Any], dict]:
  """One batch for SimSiam, the reward and SAC.

  SimSiam's forward pass is the only one over the batch: reward and critics read its features.
  """
  ssl, agent = carry
  key_sample, key_views, key_sac = jax.random.split(key, 3)
  keys = setup.shard_keys(key_sample)
  batch = setup.source.sample(setup, ring, world, keys, setup.per_shard)
  ssl, seen, metrics = learn_representation(setup, ssl, batch, key_views)
  agent, agent_metrics = learn_policy(setup, world, ssl, agent, batch, seen, key_sac)
  return (ssl, agent), dict(metrics, **agent_metrics)


def learn_representation(
  setup: Setup, ssl: dict[str, Any], batch: pairs.Pairs, key: jax.Array
) -> tuple[dict[str, Any], simsiam.Aux, dict]:
  """A step of SimSiam, or another objective, on pairs of frames (paper section 4.2)."""
  c, count = setup.config.simsiam, setup.per_shard
  split = lambda k: jax.random.split(k, (count, 2))
  keys = jax.vmap(split)(setup.shard_keys(key)).reshape(-1, 2)  # (B, 2)

  def loss_fn(params):
    params = jax.lax.pcast(params, 'data', to='varying')  # one all-reduce a parameter
    return simsiam.forward(
      setup.modules,
      params,
      ssl['batch_stats'],
      setup.views(keys[:, 0], batch.frames),
      setup.views(keys[:, 1], batch.next_frames),
      axis_name='data',
      target=ssl.get('target'),
      **simsiam.options(c),
      labels=batch.episodes if batch.labels is None else batch.labels,
      related=batch.episodes if c.mask_episode else None,
    )

  (_, seen), grads = jax.value_and_grad(loss_fn, has_aux=True)(ssl['params'])
  updates, opt_state = setup.optimizer.update(grads, ssl['opt_state'], ssl['params'])
  params = optax.apply_updates(ssl['params'], updates)
  target = setup.next_target(ssl, params)
  ssl = dict(params=params, batch_stats=seen.batch_stats, opt_state=opt_state, **target)
  return ssl, seen, dict(seen.metrics, ssl_grad_norm=optax.tree.norm(grads))


def learn_policy(
  setup: Setup,
  world: World,
  ssl: dict[str, Any],
  agent: agents.Agent | tuple,
  batch: pairs.Pairs,
  seen: simsiam.Aux,
  key: jax.Array,
) -> tuple[Any, dict]:
  """A step of SAC for the kNN entropy of the features (paper section 4.2).

  Without a policy there is nothing to learn. An episode is only cut off, so every value is
  bootstrapped.
  """
  if not isinstance(agent, agents.Agent) or batch.actions is None or batch.episodes is None:
    return agent, {}
  c, z_dim, count = setup.config.sac, setup.generator.z_dim, setup.per_shard
  h, next_h = seen.h, seen.h_next
  if c.features == 'eval':
    h, next_h = (rollout.encode(setup, ssl['params'], ssl['batch_stats'], x) for x in batch[:2])
  real = lambda x: x.astype(setup.real)
  transitions = agents.Transitions(
    h=real(h),
    next_h=real(next_h),
    z=real(seen.z),
    next_z=real(seen.z_next),
    action=replay.unpack(batch.actions, setup.real),
    episodes=batch.episodes,
  )
  updates = c.updates_per_batch
  draw = lambda k: jax.random.normal(k, (2 * updates, count, z_dim), setup.real)
  noise = jax.vmap(draw)(setup.shard_keys(key)).swapaxes(0, 1).reshape(updates, 2, -1, z_dim)
  agent, metrics = agents.update(agent, transitions, noise, setup.config, axis_name='data')
  cone = environment.mean_direction(
    world.dynamics, metrics.pop('constant_action'), metrics.pop('action_var')
  )
  return agent, dict(metrics, cone=cone)


def iterations(setup: Setup, state: State, world: World) -> tuple[State, Output]:
  """The iterations of one compiled call. Metrics also say which of them `updated`."""
  count, first = setup.config.pretrain.iterations_per_call, state.iteration
  world = world._replace(variables=rollout.prepared(setup, world.variables))
  names = []

  def step(state, _):
    state, output = iteration(setup, state, world)
    names[:] = sorted(output.metrics)
    # As one array: a loop on an accelerator launches a kernel for each that it hands out.
    return state, (jnp.stack([output.metrics[name] for name in names]), output.experience)

  state, (scalars, experience) = jax.lax.scan(step, state, length=count)
  updated = first + jnp.arange(count) >= setup.warmup_iterations
  metrics = dict(zip(names, scalars.T, strict=True), updated=updated)  # (I,) each
  rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), experience)  # (I * T, E, ...)
  return state, Output(metrics, rows)


def init(setup: Setup, key: jax.Array, world: World) -> State:
  """The first state, as a pure function: jit it with the shardings it should have."""
  config, generator, source = setup.config, setup.generator, setup.source
  num_envs, real, shape = config.pretrain.num_envs, setup.real, setup.image_shape
  key, key_env, key_ssl, key_agent = jax.random.split(key, 4)
  cast = lambda tree: jax.tree.map(
    lambda x: x.astype(real) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
  )
  pictures = jnp.zeros((2, *shape), jnp.uint8)
  params, batch_stats = cast(simsiam.init(setup.modules, key_ssl, pictures))
  parts: dict[str, Any] = dict(env=(), frames=(), ring=(), agent=())
  if source.plays:
    ids = jnp.arange(num_envs)
    first, num_classes = setup.first_steps(ids), generator.num_classes
    env = environment.reset(key_env, ids, first, generator.z_dim, num_classes, world.dynamics, real)
    parts |= dict(env=env, frames=rollout.look(setup, world, env))
  if source.keeps:
    rows, dtype = config.replay.capacity // num_envs, setup.action_dtype
    parts['ring'] = replay.create(rows, num_envs, shape, generator.z_dim, dtype)
  if source.learns_policy:
    encode = functools.partial(rollout.encode, setup, params, batch_stats)
    h = jax.eval_shape(encode, pictures)
    projected = config.simsiam.proj_dim
    parts['agent'] = cast(agents.init(key_agent, h.shape[1], projected, generator.z_dim, config))
  opt_state, target = setup.optimizer.init(params), simsiam.first_target(params, config.simsiam)
  return State(
    iteration=jnp.zeros((), jnp.int32),
    key=key,
    ssl=dict(params=params, batch_stats=batch_stats, opt_state=opt_state, **target),
    **parts,
  )


class Program(NamedTuple):
  """The compiled pieces of a run and the sizes that they share."""

  setup: Setup
  init: Callable[[jax.Array, World], State]
  state_shardings: State
  call: Any  # jitted (State, World) -> (State, Output); donates the state
  env_steps_per_iteration: int


def make_program(config: ConfigDict, generator: Any, mesh: Mesh) -> Program:
  """Builds a run's functions; nothing is compiled yet.

  Args:
    config: the whole config.
    generator: any generator: apply(variables, z, labels), z_dim, num_classes, image_shape.
    mesh: one-dimensional mesh, axis 'data'.

  Raises:
    UserError: on impossible sizes.
  """
  check(config, mesh.size)
  setup = make_setup(config, generator, mesh.size)
  specs = State.specs(ring=setup.source.keeps)

  def call(state, world):
    return iterations(setup, state, world)

  sharded_call = jax.shard_map(
    call,
    mesh=mesh,
    in_specs=(specs, World._make((P(), P(), material.specs(setup.source.needs)))),
    out_specs=(specs, Output._make((P(), P(None, 'data')))),
  )
  first = functools.partial(init, setup)
  shapes = jax.eval_shape(first, jax.random.key(0), worlds.host_world(config, generator))
  of_leaves = lambda spec, part: jax.tree.map(lambda _: spec, part)
  shardings = devices.shardings(
    mesh, jax.tree.map(of_leaves, specs, shapes, is_leaf=lambda x: isinstance(x, P))
  )
  return Program(
    setup=setup,
    init=devices.jit_once(first, shardings),
    state_shardings=shardings,
    call=jax.jit(sharded_call, donate_argnums=0),
    env_steps_per_iteration=config.pretrain.rollout_length * config.pretrain.num_envs,
  )


def check(config: ConfigDict, num_devices: int) -> None:
  """Raises UserError on settings that cannot work, before anything is compiled."""
  p, r = config.pretrain, config.replay
  checks.ranges('pretrain', p, RANGES)
  encoders.check(config.encoder)
  checks.choice('pretrain.dtype', p.dtype, rollout.DTYPES)
  if p.dtype == 'float64' and not jax.config.jax_enable_x64:  # pyright: ignore[reportAttributeAccessIssue]
    raise UserError(
      "pretrain.dtype='float64' is float32 here: set JAX_ENABLE_X64=1, or choose float32"
    )
  environment.check(config.environment)
  pairs.check(config)
  replay.check(r, num_devices, p.num_envs, p.rollout_length, p.batch_size)
  learns_policy = pairs.SOURCES[config.pairs.source].learns_policy
  reward.check(config.reward, p.batch_size if learns_policy else None)
  sac.check(config.sac)
  simsiam.check(config.simsiam)
  augment.make_augment(config.simsiam.augment)
  simsiam.make_modules(encoders.make_encoder(config.encoder), config.simsiam)
  least = max(p.batch_size, 3 * p.num_envs)
  checks.at_least(
    'pretrain.warmup_steps', p.warmup_steps, least, 'gives the first update too few frames'
  )
  updates = schedule(p).num_updates
  if p.warmup_steps >= p.env_steps or updates < 1:
    raise UserError(
      f'pretrain.warmup_steps={p.warmup_steps} is not below pretrain.env_steps={p.env_steps} by an '
      'iteration: nothing would be learned; lower the first or raise the second'
    )
  learning_rate(config.simsiam, updates, p.batch_size)
