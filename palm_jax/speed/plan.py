"""The job that counts what a pretraining would take: memory, arithmetic, time.

Nothing of the pretraining is compiled for it.
"""

import json
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import AbstractMesh, AxisType
from ml_collections import ConfigDict

from palm_jax import pairs, pretrain, rollout, worlds
from palm_jax.base import checks, devices
from palm_jax.base.errors import UserError, one_line
from palm_jax.base.processes import from_first, is_first
from palm_jax.base.results import read_result
from palm_jax.encoder import cheaper_eyes
from palm_jax.generator import LoadedGenerator, PictureGenerator, load_generator
from palm_jax.generator.networks import make_networks
from palm_jax.generator.views import with_dtype
from palm_jax.job import Job, Run, never
from palm_jax.speed import cost, timing, workload

USUAL_SHARE = 0.4  # of a large matrix product's speed: what wide convolutional networks reach


def default_config() -> ConfigDict:
  """What to plan for. Zeros stand for this machine."""
  return ConfigDict(
    dict(
      devices=0,  # their number
      # of each, 10^9 bytes: what the run may have. JAX takes three quarters of a GPU's unless
      # XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise, so 18 of 24
      memory_gb=0.0,
      # that each sustains; 0: as --job=benchmark found in this workdir, else USUAL_SHARE of what a
      # matrix product reaches here
      tflops=0.0,
      image_size=32,  # of the pictures, where there is no generator yet to ask
      image_channels=3,
      num_classes=10,  # 0: unconditional
    )
  )


RANGES = dict(
  devices=checks.Range(0, 10**6),
  memory_gb=checks.Range(0, 10**6),
  tflops=checks.Range(0, 10**9),
  image_size=checks.Range(1, 4096),
  image_channels=checks.Range(1, 64),
  num_classes=checks.SIZE_OR_0,
)


def run(this: Run) -> dict:
  """The job: prints the plan and returns it; nothing is written.

  Of the workdir its generator and its benchmark are read, if there.

  Raises:
    UserError: settings that cannot work, or, after the plan is printed, a pretraining that does not
      fit the memory.
  """
  config, workdir, mesh = this.config, this.workdir, this.mesh
  c = config.plan
  checks.ranges('plan', c, RANGES)
  num_devices = c.devices or mesh.size
  memory = c.memory_gb * 1e9 or devices.memory_bytes(mesh)
  generator = worlds.as_world(config, make_generator(config, workdir))
  result = estimate(config, generator, num_devices)
  rate, source = sustained_rate(config, workdir)
  seconds = result['flops_per_iteration'] / rate
  result |= dict(
    memory=memory,
    flops_per_second=rate,
    rate_source=source,
    hours=result['iterations'] * seconds / 3600,
  )
  if is_first():
    print(table(result), flush=True)
  check_memory(config, result)
  return result


def make_generator(config: ConfigDict, workdir: pathlib.Path) -> LoadedGenerator:
  """The generator of the config or of this workdir; `untrained_generator` where there is none."""
  own = from_first((workdir / 'generator' / 'network.json').exists())
  if config.generator.path or own:
    generator = load_generator(config.generator.path or workdir)
    return with_dtype(generator, rollout.DTYPES[config.pretrain.dtype])
  return untrained_generator(config)


def untrained_generator(config: ConfigDict) -> LoadedGenerator:
  """A generator of the config's sizes whose arrays take no memory."""
  c = config.plan
  image_shape = c.image_size, c.image_size, c.image_channels
  network, _ = make_networks(config.generator, image_shape, c.num_classes)
  z, label = jnp.zeros((1, network.z_dim)), jnp.zeros(1, jnp.int32)
  variables = jax.eval_shape(network.init, jax.random.key(0), z, label)
  variables = jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), variables)
  return LoadedGenerator(network, variables).with_dtype(rollout.DTYPES[config.pretrain.dtype])


def estimate(config: ConfigDict, generator: PictureGenerator, num_devices: int) -> dict[str, Any]:
  """The plan's numbers that do not depend on the machine.

  Args:
    config: the whole config.
    generator: as for pretrain.make_program; only shapes are read.
    num_devices: of the plan.

  Returns:
    parameters {part: count}; bytes {part: on each device}; checkpoint, its bytes; flops {part: an
    iteration, on each device} and their sum flops_per_iteration, in matrix products and
    convolutions; num_devices, env_steps, iterations, env_steps_per_iteration, ring_frames,
    picture (H, W, C) and settings.

  Raises:
    UserError: settings that cannot work.
  """
  mesh = abstract_mesh(num_devices)
  program = pretrain.make_program(config, generator, mesh)

  def inputs(key):
    world = worlds.host_world(config, generator)
    return world, pretrain.init(program.setup, key, world), workload.make_sample(program.setup, key)

  world, state, sample = jax.eval_shape(inputs, jax.random.key(0))
  parts = workload.make_parts(program.setup, mesh)
  flops = {
    name: cost.flops(part.call.trace(*part.arguments(state, world, sample)))
    for name, part in parts.items()
  }
  count = lambda tree: sum(math.prod(x.shape) for x in jax.tree.leaves(tree))
  agent = {name: count(getattr(state.agent, name)) for name in ('actor', 'critic')}
  sharded = dict(
    frames=state.ring.frames, actions=state.ring.actions, environments=(state.env, state.frames)
  )
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
      {name: cost.nbytes(tree) / num_devices for name, tree in sharded.items()},
      networks=cost.nbytes((world, state.ssl, state.agent)),
      **cost.working_bytes(config, generator, state.ssl, num_devices),
    ),
    checkpoint=cost.nbytes(state),
    flops=flops,
    flops_per_iteration=sum(flops.values()),
    settings=workload.settings(config),
  )


def abstract_mesh(num_devices: int) -> Any:
  """A mesh of devices that need not be here, for functions that are only traced."""
  return AbstractMesh((num_devices,), ('data',), axis_types=(AxisType.Auto,))


def sustained_rate(config: ConfigDict, workdir: pathlib.Path) -> tuple[float, str]:
  """FLOP/s of a device in the loop, and where the number is from."""
  if config.plan.tflops:
    return config.plan.tflops * 1e12, 'plan.tflops'
  path = workdir / 'results' / 'benchmark.json'
  try:
    found = read_result(path).get('pretrain')  # not in one of the generator alone, or of growth
    if found and found['settings'] == json.loads(json.dumps(workload.settings(config))):
      return found['flops']['whole'] / found['seconds_per_iteration'], str(path)
    logging.info('plan: %s is of other settings, and is not used', path)
  except FileNotFoundError:
    pass
  except (OSError, ValueError, KeyError) as e:
    logging.warning('%s cannot be read (%s)', path, one_line(e))
  rate = timing.matmul_flops(rollout.DTYPES[config.pretrain.dtype])
  source = f'{USUAL_SHARE:.0%} of {rate / 1e12:.3g} TFLOP/s, measured in a product here: a guess'
  return USUAL_SHARE * rate, source


def check_memory(config: ConfigDict, result: dict[str, Any]) -> None:
  """Raises UserError, saying what would fit, where a device has less memory than the plan takes."""
  need, memory = sum(result['bytes'].values()), result['memory']
  ring = config.replay
  if need <= memory:
    return
  stored = result['bytes']['frames'] + result['bytes']['actions']
  block = config.pretrain.num_envs * config.pretrain.rollout_length
  fits = int((memory - need + stored) / stored * ring.capacity) // block * block
  drawing = 'rendering' in result['bytes']
  if fits > 3 * config.pretrain.num_envs:
    remedy = f'set replay.capacity to {fits} or less'
  else:
    remedy = cost.LESS_DRAWING if drawing else cost.LESS_LEARNING
  more = ', replay.actions to int8' if ring.actions != 'int8' else ''
  if not drawing and (eyes := cheaper_eyes(config.encoder, result['picture'])):
    more += f', {eyes}'
  raise UserError(
    f'replay.capacity={ring.capacity} with pretrain.batch_size={config.pretrain.batch_size} and '
    f'pretrain.num_envs={config.pretrain.num_envs} takes '
    f'about {need / 2**30:.1f} GiB on each of {result["num_devices"]} device(s), which have '
    f'{memory / 2**30:.1f} GiB: {remedy}{more}, or take more devices'
  )


def table(r: dict[str, Any]) -> str:
  """The plan r in lines of text."""

  def size(n):
    return f'{n / 2**30:.2f} GiB' if n >= 2**30 else f'{n / 2**20:.1f} MiB'

  def listed(numbers, form):
    return ', '.join(f'{name} {form(n)}' for name, n in numbers.items())

  gflop = lambda n: f'{n / 1e9:,.2f}'
  per_step = r['flops_per_iteration'] * r['num_devices'] / r['env_steps_per_iteration']
  return '\n'.join(
    [
      f'plan for {r["num_devices"]} device(s), {r["settings"]["pretrain"]["dtype"]}: '
      f'{r["env_steps"]:,} env steps in {r["iterations"]:,} iterations, pictures of '
      f'{"x".join(map(str, r["picture"]))}',
      f'  parameters        {listed(r["parameters"], "{:,}".format)}',
      f'  memory a device   {size(sum(r["bytes"].values()))} of {size(r["memory"])}: '
      f'{listed(r["bytes"], size)}',
      f'  replay            {r["ring_frames"]:,} frames, '
      f'{min(r["ring_frames"] / r["env_steps"], 1):.1%} of the run',
      f'  disk              {size(r["checkpoint"])} a checkpoint, two are kept, and a third while '
      'it is written',
      f'  GFLOP an iteration and device: {listed(r["flops"], gflop)}; {gflop(per_step)} '
      'an env step',
      f'  time              {r["hours"]:.3g} h, without training a generator, at '
      f'{r["flops_per_second"] / 1e12:.3g} TFLOP/s a device ({r["rate_source"]})',
      '  activations are what reverse mode keeps before the compiler fuses or recomputes; where '
      'the pictures of one step take more (rendering), these stand there instead',
    ]
  )


def check(config: ConfigDict, num_devices: int) -> None:
  """Raises UserError where the config trains no policy, whose loop is planned."""
  del num_devices
  pairs.require_policy(config, 'plan')


JOB = Job('plan', run, check, never, claims=False)
