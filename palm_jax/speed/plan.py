"""What a pretraining would take, counted before anything of it is compiled: memory, arithmetic,
time."""

import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType
from ml_collections import ConfigDict

from palm_jax import pairs, pretrain, rollout, simsiam, worlds
from palm_jax.base import devices
from palm_jax.base.errors import UserError
from palm_jax.encoder import make_encoder
from palm_jax.generator import LoadedGenerator, load_generator
from palm_jax.generator.train import make_networks
from palm_jax.job import Job, Run, never
from palm_jax.speed import cost, timing, workload

USUAL_SHARE = 0.4  # of a large matrix product's speed that well-filled convolutional networks reach


def default_config():
  """What to plan for. Zeros stand for this machine."""
  return ConfigDict(
    dict(
      devices=0,  # their number
      memory_gb=0.0,  # of each, 10^9 bytes
      # that each sustains; 0: as --job=benchmark found in this workdir, else USUAL_SHARE of a
      # measured product
      tflops=0.0,
      image_size=32,  # of the pictures, where no generator is there yet to tell
      image_channels=3,
      num_classes=10,  # 0: unconditional
    )
  )


def run(this: Run) -> dict:
  """The job: prints the plan and returns it; nothing is written.

  Args:
    config: the whole config.
    workdir: pathlib.Path; read are its generator and its benchmark, if there.
    mesh: of the devices that are here.

  Raises:
    UserError: settings that cannot work, or a pretraining that does not fit the memory, after it is
      printed.
  """
  config, workdir, mesh = this.config, this.workdir, this.mesh
  c = config.plan
  for name, value in c.items():
    if value < 0:
      raise UserError(f'plan.{name}={value} is negative: set it to 0 or more')
  num_devices = c.devices or mesh.size
  memory = c.memory_gb * 1e9 or devices.memory_bytes(mesh)
  result = estimate(config, worlds.as_world(config, make_generator(config, workdir)), num_devices)
  rate, source = sustained_rate(config, workdir)
  seconds = result['flops_per_iteration'] / rate
  result |= dict(
    memory=memory,
    flops_per_second=rate,
    rate_source=source,
    hours=result['iterations'] * seconds / 3600,
  )
  if jax.process_index() == 0:
    print(table(result), flush=True)
  check_memory(config, result)
  return result


def make_generator(config, workdir):
  """The generator of the config or of this workdir, as it was trained; where none is there yet,
  `untrained_generator`."""
  if config.generator.path or (pathlib.Path(workdir) / 'generator' / 'network.json').exists():
    return load_generator(config.generator.path or workdir).with_dtype(
      rollout.DTYPES[config.pretrain.dtype]
    )
  return untrained_generator(config)


def untrained_generator(config):
  """A generator of the config's sizes whose arrays take no memory."""
  c = config.plan
  network, _ = make_networks(
    config.generator, (c.image_size, c.image_size, c.image_channels), c.num_classes
  )
  variables = jax.eval_shape(
    network.init, jax.random.key(0), jnp.zeros((1, network.z_dim)), jnp.zeros(1, jnp.int32)
  )
  variables = jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), variables)
  return LoadedGenerator(network, variables).with_dtype(rollout.DTYPES[config.pretrain.dtype])


def estimate(config, generator, num_devices):
  """The plan's numbers that do not depend on the machine.

  Args:
    config: the whole config.
    generator: as for pretrain.make_program; only shapes are read.
    num_devices: int.

  Returns:
    parameters {part: count}; bytes {part: on each device}; flops {part: an iteration, on each
    device} and their sum flops_per_iteration, in matrix products and convolutions; num_devices,
    env_steps, iterations, env_steps_per_iteration, ring_frames, picture (H, W, C) and settings.

  Raises:
    UserError: settings that cannot work.
  """
  mesh = AbstractMesh((num_devices,), ('data',), axis_types=(AxisType.Auto,))
  program = pretrain.make_program(config, generator, mesh)
  world, state, sample = jax.eval_shape(
    lambda key: (
      world := worlds.host_world(config, generator),
      program.init(key, world),
      workload.make_sample(program.setup, key),
    ),
    jax.random.key(0),
  )
  parts = workload.make_parts(program.setup, mesh)
  flops = {
    name: cost.flops(part.call.trace(*part.arguments(state, world, sample)))
    for name, part in parts.items()
  }
  count = lambda tree: sum(math.prod(x.shape) for x in jax.tree.leaves(tree))
  agent = {name: count(getattr(state.agent, name)) for name in ('actor', 'critic')}
  sharded = {
    name: cost.nbytes(tree) / num_devices
    for name, tree in dict(
      frames=state.ring.frames, actions=state.ring.actions, environments=(state.env, state.frames)
    ).items()
  }
  iterations = program.setup.num_calls * config.pretrain.iterations_per_call
  return dict(
    num_devices=num_devices,
    env_steps=iterations * program.env_steps_per_iteration,
    iterations=iterations,
    env_steps_per_iteration=program.env_steps_per_iteration,
    ring_frames=config.replay.capacity,
    picture=worlds.seen_shape(config, generator),
    parameters=dict(
      generator=count(world.variables),
      **{name: count(x) for name, x in state.ssl['params'].items()},
      **agent,
    ),
    bytes=dict(
      sharded,
      networks=cost.nbytes((world, state.ssl, state.agent)),
      activations=activation_bytes(config, generator, state.ssl, num_devices),
    ),
    flops=flops,
    flops_per_iteration=sum(flops.values()),
    settings=workload.settings(config),
  )


def activation_bytes(config, generator, ssl, num_devices):
  """What SimSiam's backward pass, the largest of all, needs kept by the forward pass over one
  device's batch."""
  dtype = rollout.DTYPES[config.pretrain.dtype]
  modules = simsiam.make_modules(
    make_encoder(config.encoder, None, dtype), config.simsiam, None, dtype
  )
  frames = jax.ShapeDtypeStruct(
    (config.pretrain.batch_size // num_devices, *worlds.seen_shape(config, generator)), jnp.uint8
  )
  loss = lambda params, *views: simsiam.forward(
    modules, params, batch_stats, *views, symmetric=config.simsiam.symmetric
  )[0]
  batch_stats = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), ssl['batch_stats'])
  return cost.residual_bytes(loss, ssl['params'], frames, frames)


def sustained_rate(config, workdir):
  """FLOP/s of a device in the loop, and where the number is from."""
  if config.plan.tflops:
    return config.plan.tflops * 1e12, 'plan.tflops'
  measured = pathlib.Path(workdir) / 'results' / 'benchmark.json'
  if measured.exists() and 'pretrain' in (found := json.loads(measured.read_text())):
    found = found['pretrain']
    return found['flops']['whole'] / found['seconds_per_iteration'], str(measured)
  rate = timing.matmul_flops(rollout.DTYPES[config.pretrain.dtype])
  return (
    USUAL_SHARE * rate,
    f'{USUAL_SHARE:.0%} of {rate / 1e12:.3g} TFLOP/s, measured in a product here: a guess',
  )


def check_memory(config, result):
  """Raises UserError, saying what would fit, when a device has less memory than the plan takes."""
  need, memory, ring = sum(result['bytes'].values()), result['memory'], config.replay
  if need <= memory:
    return
  stored = result['bytes']['frames'] + result['bytes']['actions']
  block = config.pretrain.num_envs * config.pretrain.rollout_length
  fits = int((memory - need + stored) / stored * ring.capacity) // block * block
  remedy = (
    f'set replay.capacity to {fits} or less'
    if fits > 3 * config.pretrain.num_envs
    else 'lower pretrain.batch_size or encoder.width'
  )
  more = ', replay.actions to int8' if ring.actions != 'int8' else ''
  raise UserError(
    f'replay.capacity={ring.capacity} with pretrain.batch_size={config.pretrain.batch_size} takes '
    'about '
    f'{need / 2**30:.1f} GiB on each of {result["num_devices"]} device(s), which have '
    f'{memory / 2**30:.1f} GiB: '
    f'{remedy}{more}, or take more devices'
  )


def table(r):
  """The plan in lines of text."""
  size = lambda n: f'{n / 2**30:.2f} GiB' if n >= 2**30 else f'{n / 2**20:.1f} MiB'
  listed = lambda numbers, form: ', '.join(f'{name} {form(n)}' for name, n in numbers.items())
  per_step = r['flops_per_iteration'] * r['num_devices'] / r['env_steps_per_iteration']
  return '\n'.join(
    [
      f'plan for {r["num_devices"]} device(s), {r["settings"]["pretrain"]["dtype"]}: '
      f'{r["env_steps"]:,} env steps in '
      f'{r["iterations"]:,} iterations, pictures of {"x".join(map(str, r["picture"]))}',
      f'  parameters        {listed(r["parameters"], "{:,}".format)}',
      f'  memory a device   {size(sum(r["bytes"].values()))} of {size(r["memory"])}: '
      f'{listed(r["bytes"], size)}',
      f'  replay            {r["ring_frames"]:,} frames, '
      f'{min(r["ring_frames"] / r["env_steps"], 1):.1%} of the run',
      f'  GFLOP an iteration and device: {listed(r["flops"], lambda n: f"{n / 1e9:,.2f}")}; '
      f'{per_step / 1e9:,.2f} an env step',
      f'  time              {r["hours"]:.3g} h at {r["flops_per_second"] / 1e12:.3g} TFLOP/s a '
      f'device ({r["rate_source"]})',
      '  activations are what reverse mode keeps before the compiler fuses or recomputes; '
      'generators render one step at a time',
    ]
  )


def check(config: ConfigDict, num_devices: int) -> None:
  """Raises UserError where the config trains no policy, whose loop is planned."""
  del num_devices
  pairs.require_policy(config, 'plan')


JOB = Job('plan', run, check, never, claims=False)
