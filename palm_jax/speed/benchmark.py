"""How fast the work of a config goes on these devices, how near to what cannot be avoided, and
where the time is spent."""

import dataclasses
import math
import statistics

import jax
import jax.numpy as jnp
from absl import logging
from ml_collections import ConfigDict

from palm_jax import pairs, pretrain, rollout, worlds
from palm_jax.base import devices
from palm_jax.base.errors import UserError
from palm_jax.job import Job, Run
from palm_jax.speed import cost, generator_training, plan, timing, workload

ROWS = dict(
  generator='generator',
  acting='acting encoder',
  simsiam='SimSiam, both passes',
  reward='reward',
  sac='SAC',
  replay='replay',
)


def run(this: Run) -> dict:
  """The job: measures what the config trains and writes <workdir>/results/benchmark.json, whose
  content it returns.

  Args:
    config: the whole config; of its jobs, 'generator' (where it trains one) and 'pretrain' are
      measured.
    workdir: pathlib.Path.
    data: data.Data, or None where no generator is trained.
    mesh: one-dimensional, axis 'data'.

  Raises:
    UserError: settings that cannot work, or jobs without either.
  """
  config, workdir, data, mesh = this.config, this.workdir, this.data, this.mesh
  result = dict(job='benchmark', seed=config.seed, **devices.describe(mesh))
  if trains_generator(config):
    result['generator'] = generator_training.measure(config, data, mesh)
  if 'pretrain' in config.jobs:
    generator = worlds.as_world(config, draw_weights(plan.make_generator(config, workdir)))
    result['pretrain'] = pretraining(config, generator, mesh)
  if not result.keys() & {'generator', 'pretrain'}:
    raise UserError(
      f'config.jobs={tuple(config.jobs)} has nothing to measure: put generator or pretrain into it'
    )
  return result


def trains_generator(config):
  return 'generator' in config.jobs and not config.generator.path


def draw_weights(generator):
  """The same generator with random weights; speed does not ask for trained ones."""
  network = generator.network
  init = jax.jit(network.init)(
    jax.random.key(0), jnp.zeros((1, network.z_dim)), jnp.zeros(1, jnp.int32)
  )
  return dataclasses.replace(generator, variables=jax.device_get(init))


def pretraining(config, generator, mesh):
  """Speed of pretraining against the work that no arrangement avoids (`workload.UNAVOIDABLE`), each
  compiled alone.

  The whole call, as pretraining makes it, with a full ring and learning in every iteration, and the
  parts take turns, so that other load on the machine hits all alike. Each figure is the median of
  timing.REPEATS, after a turn that is not counted.

  Args:
    config: the whole config.
    generator: as for pretrain.make_program.
    mesh: one-dimensional, axis 'data'.

  Returns:
    seconds_per_iteration, env_steps_per_second, updates_per_second; efficiency, the unavoidable
    parts' seconds divided by the iteration's; part_seconds; flops an iteration and device, whole
    and by part; matmul_flops_per_second, measured, and the share of it; bytes of the compiled call
    on a device; compile_seconds; settings.

  Raises:
    UserError: settings that cannot work.
  """
  p = config.pretrain
  program = pretrain.make_program(config, generator, mesh)
  world, key = worlds.make_world(config, generator, mesh), jax.random.key(config.seed)
  state = fill(program, program.init(key, world))
  make_sample = lambda key: workload.make_sample(program.setup, key)
  sample = jax.jit(
    make_sample, out_shardings=workload.sample_shardings(mesh, jax.eval_shape(make_sample, key))
  )(key)
  parts = workload.make_parts(program.setup, mesh)

  traced = program.call.trace(state, world)
  flops = dict(whole=cost.flops(traced) / p.iterations_per_call)
  compile_seconds, compiled = timing.seconds(lambda: traced.lower().compile())
  calls = {}
  for name, part in parts.items():
    traced = part.call.trace(*part.arguments(state, world, sample))
    flops[name], calls[name] = cost.flops(traced), traced.lower().compile()

  times = {name: [] for name in ('whole', *parts)}
  for turn in range(timing.REPEATS + 1):
    took, (state, _) = timing.seconds(lambda state=state: compiled(state, world))
    times['whole'].append(took / p.iterations_per_call)
    for name, part in parts.items():
      arguments = part.arguments(state, world, sample)
      took, result = timing.seconds(lambda call=calls[name], arguments=arguments: call(*arguments))
      times[name].append(took)
      if part.carries:
        state = state.replace(**{part.carries: result[0]})
    logging.info(
      'benchmark: turn %d of %d, %.3g s an iteration', turn, timing.REPEATS, times['whole'][-1]
    )
  found = {name: statistics.median(values[1:]) for name, values in times.items()}
  whole, unavoidable = found.pop('whole'), sum(found[name] for name in workload.UNAVOIDABLE)
  peak, memory = timing.matmul_flops(rollout.DTYPES[p.dtype]), compiled.memory_analysis()
  result = dict(
    seconds_per_iteration=whole,
    env_steps_per_second=program.env_steps_per_iteration / whole,
    updates_per_second=p.updates_per_iteration / whole,
    efficiency=unavoidable / whole,
    part_seconds=found,
    flops=flops,
    matmul_flops_per_second=peak,
    share_of_matmul=flops['whole'] / whole / peak,
    bytes=dict(
      arguments=memory.argument_size_in_bytes,
      temporaries=memory.temp_size_in_bytes,
      results_beside_them=memory.output_size_in_bytes - memory.alias_size_in_bytes,
    ),
    hours=math.ceil(p.env_steps / program.env_steps_per_iteration) * whole / 3600,
    compile_seconds=compile_seconds,
    repeats=timing.REPEATS,
    settings=workload.settings(config),
  )
  logging.info('%s', table(result, devices.describe(mesh)))
  return result


def fill(program, state):
  """The state with a full ring of noise, past its warm-up."""

  def filled(state):
    ring = state.ring
    frames = jax.random.bits(jax.random.key(1), ring.frames.shape, jnp.uint8)
    return state.replace(
      iteration=state.iteration + program.setup.warmup_iterations,
      ring=ring.replace(frames=frames, total=ring.total + ring.frames.shape[0]),
    )

  return jax.jit(filled, out_shardings=program.state_shardings, donate_argnums=0)(state)


def table(result, about):
  """The measures in lines of text."""
  p, whole, parts = (
    result['settings']['pretrain'],
    result['seconds_per_iteration'],
    result['part_seconds'],
  )
  memory = ', '.join(
    f'{name.replace("_", " ")} {n / 2**20:,.1f} MiB' for name, n in result['bytes'].items()
  )
  lines = [
    f'pretraining on {about["devices"]}, jax {about["versions"]["jax"]}, {p["dtype"]}:',
    f'  {result["env_steps_per_second"]:,.1f} env steps/s, {result["updates_per_second"]:,.2f} '
    f'updates/s, {whole:.4g} s an '
    f'iteration, {p["env_steps"]:,} env steps in {result["hours"]:.3g} h',
    f'  {"alone":22}{"ms/iteration":>14}{"of the whole":>14}{"GFLOP":>10}',
  ]
  lines += [
    '  '
    f'{ROWS[name]:22}{1000 * parts[name]:14,.2f}{parts[name] / whole:14.1%}{result["flops"][name] / 1e9:10,.2f}'
    for name in ROWS
  ]
  lines += [
    f'  efficiency {result["efficiency"]:.3f} = (generator + acting + SimSiam) / whole',
    f'  {result["flops"]["whole"] / 1e9:,.2f} GFLOP an iteration and device: '
    f'{result["share_of_matmul"]:.1%} of '
    f'{result["matmul_flops_per_second"] / 1e12:.3g} TFLOP/s, measured in a {p["dtype"]} matrix '
    'product',
    f'  memory of a device: {memory}',
    f'  median of {result["repeats"]} turns, the first left out; compiled in '
    f'{result["compile_seconds"]:.0f} s',
  ]
  return '\n'.join(lines)


def check(config: ConfigDict, num_devices: int) -> None:
  """Raises UserError where the pretraining to be measured trains no policy."""
  del num_devices
  if 'pretrain' in config.jobs:
    pairs.require_policy(config, 'benchmark')


JOB = Job('benchmark', run, check, trains_generator)
