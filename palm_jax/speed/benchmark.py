"""The job that measures how fast a config trains on these devices, and where the time is spent."""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
from absl import logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from palm_jax import pairs, pretrain, rollout, worlds
from palm_jax.base import checks, devices
from palm_jax.base.errors import UserError
from palm_jax.base.files import write_json
from palm_jax.base.processes import any_process, is_first
from palm_jax.generator import PictureGenerator
from palm_jax.job import Job, Run
from palm_jax.speed import (
  card,
  cost,
  doors,
  drawing,
  generator_training,
  growth,
  plan,
  timing,
  workload,
)

ROWS = dict(  # of the table: a part's name in words
  generator='generator',
  acting='acting encoder',
  simsiam='SimSiam, both passes',
  reward='reward',
  sac='SAC',
  replay='replay',
)


PARTS_FILE = 'benchmark/parts.json'  # in the workdir: what is known so far


def default_config() -> ConfigDict:
  return ConfigDict(
    dict(
      minutes=0.0,  # parts that would begin later are left out, and named; 0: none is
      # Keys of the config, such as pretrain.num_envs: an iteration with each of them at `times` its
      # value, beside the iteration as it is. Nothing else is measured then.
      grow=(),
      times=(2,),
    )
  )


RANGES = dict(minutes=checks.MINUTES, times=checks.Range(1, 1024, many=True))


def run(this: Run) -> dict:
  """The job: measures the training of a generator and the pretraining, where config.jobs has them.

  Every part that is known stands in PARTS_FILE at once, the most telling come first.

  Returns:
    What stands in results/benchmark.json.

  Raises:
    UserError: settings that cannot work, or jobs with neither.
  """
  config, mesh = this.config, this.mesh
  result: dict[str, Any] = dict(job='benchmark', seed=config.seed, **devices.describe(mesh))
  limit = 60 * config.get('benchmark', default_config()).minutes or math.inf
  began = time.monotonic()
  path = this.workdir / PARTS_FILE
  path.parent.mkdir(exist_ok=True)

  def note(name, measure):
    if any_process(time.monotonic() - began > limit):  # all of them or none go on
      result.setdefault('left_out', []).append(name)
      logging.warning('benchmark: no time is left for %s (benchmark.minutes)', name)
      return
    result[name] = measure()
    if is_first():
      write_json(path, result)

  if to_grow(config):
    note('growth', lambda: growth.measure(config, this.workdir, mesh))
    return result
  if not trains_generator(config) and 'pretrain' not in config.jobs:
    raise UserError(
      f'config.jobs={tuple(config.jobs)} has nothing to measure: put generator or pretrain into it'
    )
  if 'pretrain' in config.jobs:
    generator = workload.draw_weights(plan.make_generator(config, this.workdir))
    world_generator = worlds.as_world(config, generator)
    if mesh.devices.flat[0].platform == 'gpu':
      note('peaks', lambda: card.peaks(rollout.DTYPES[config.pretrain.dtype]))
    note('pretrain', lambda: pretraining(config, world_generator, mesh))
    if mesh.devices.flat[0].platform == 'gpu':
      note('profile', lambda: profile(config, world_generator, mesh))
      for name, graphs in card.GRAPHS.items():
        note(name, lambda graphs=graphs: with_graphs(config, world_generator, mesh, graphs))
    note('drawing', lambda: drawing.measure(generator, config.pretrain.num_envs))
    note('doors', lambda: doors.measure(world_generator, config.pretrain.num_envs))
  if trains_generator(config):
    assert this.data is not None  # needs_data is trains_generator
    data = this.data
    note('generator', lambda: generator_training.measure(config, data, mesh))
  return result


def trains_generator(config: ConfigDict) -> bool:
  """Whether the training of a generator is measured, for which data are needed."""
  return 'generator' in config.jobs and not (config.generator.path or to_grow(config))


def to_grow(config: ConfigDict) -> tuple[str, ...]:
  """Keys of the config that a larger iteration is wanted of."""
  return tuple(config.get('benchmark', default_config()).grow)


def pretraining(config: ConfigDict, generator: PictureGenerator, mesh: Mesh) -> dict[str, Any]:
  """Speed of pretraining, against the work that no arrangement avoids (`workload.UNAVOIDABLE`).

  The whole call is as pretraining makes it, with a full ring and learning in every iteration; the
  parts are compiled alone.

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
  program, state, world = workload.ready(config, generator, mesh)
  key = jax.random.key(config.seed)
  make_sample = lambda key: workload.make_sample(program.setup, key)
  places = workload.sample_shardings(mesh, jax.eval_shape(make_sample, key))
  sample = jax.jit(make_sample, out_shardings=places)(key)
  parts = workload.make_parts(program.setup, mesh)

  traced = program.call.trace(state, world)
  flops = dict(whole=cost.flops(traced) / p.iterations_per_call)
  compile_seconds, compiled = timing.compile_seconds(traced.lower())
  calls = {}
  for name, part in parts.items():
    traced = part.call.trace(*part.arguments(state, world, sample))
    flops[name] = cost.flops(traced)
    calls[name] = traced.lower().compile()

  found = take_turns(compiled, p.iterations_per_call, calls, parts, state, world, sample)
  whole = found.pop('whole')
  unavoidable = sum(found[name] for name in workload.UNAVOIDABLE)
  peak = timing.matmul_flops(rollout.DTYPES[p.dtype])
  result = dict(
    seconds_per_iteration=whole,
    env_steps_per_second=program.env_steps_per_iteration / whole,
    updates_per_second=p.updates_per_iteration / whole,
    efficiency=unavoidable / whole,
    part_seconds=found,
    flops=flops,
    matmul_flops_per_second=peak,
    share_of_matmul=flops['whole'] / whole / peak,
    bytes=cost.compiled_bytes(compiled),
    hours=math.ceil(p.env_steps / program.env_steps_per_iteration) * whole / 3600,
    compile_seconds=compile_seconds,
    repeats=timing.REPEATS,
    settings=workload.settings(config),
  )
  logging.info('%s', table(result, devices.describe(mesh)))
  return result


def profile(config: ConfigDict, generator: PictureGenerator, mesh: Mesh) -> dict[str, Any]:
  """The kernels of one whole call, as card.kernels_of."""
  program, state, world = workload.ready(config, generator, mesh)
  state, _ = program.call(state, world)
  return card.profile(lambda: program.call(state, world), config.pretrain.iterations_per_call)


def with_graphs(
  config: ConfigDict, generator: PictureGenerator, mesh: Mesh, graphs: str
) -> dict[str, Any]:
  """The whole call with other operations in CUDA graphs: seconds_per_iteration, compile_seconds."""
  program, state, world = workload.ready(config, generator, mesh)
  lowered = program.call.lower(state, world)
  options = {'xla_gpu_enable_command_buffer': graphs}
  took, compiled = timing.compile_seconds(lowered, options)
  whole = timing.median_seconds(compiled, state, world) / config.pretrain.iterations_per_call
  logging.info('benchmark: %.4g s an iteration with %s in graphs', whole, graphs or 'nothing')
  return dict(seconds_per_iteration=whole, compile_seconds=took, graphs=graphs)


def take_turns(
  whole: Callable,
  iterations: int,
  calls: dict[str, Callable],
  parts: dict[str, workload.Part],
  state: pretrain.State,
  world: Any,
  sample: dict[str, jax.Array],
) -> dict[str, float]:
  """Seconds an iteration of the whole call and of each part alone.

  They take turns, so that other load on the machine affects all alike. Each figure is the median of
  timing.REPEATS, after a turn that is not counted.

  Args:
    whole: the compiled call of pretraining.
    iterations: in it.
    calls: of the parts, compiled.
    parts: by the same names.
    state: is donated.
    world: of pretraining.
    sample: of `workload.make_sample`.

  Returns:
    {'whole' and each part's name: seconds}.
  """
  times = {name: [] for name in ('whole', *parts)}
  for turn in range(timing.REPEATS + 1):
    took, (state, _) = timing.seconds(lambda state=state: whole(state, world))
    times['whole'].append(took / iterations)
    for name, part in parts.items():
      arguments = part.arguments(state, world, sample)
      took, result = timing.seconds(lambda call=calls[name], arguments=arguments: call(*arguments))
      times[name].append(took)
      if part.carries:
        state = state.replace(**{part.carries: result[0]})
    logging.info(
      'benchmark: turn %d of %d, %.3g s an iteration', turn, timing.REPEATS, times['whole'][-1]
    )
  return {name: statistics.median(values[1:]) for name, values in times.items()}


def table(result: dict[str, Any], about: dict[str, Any]) -> str:
  """The measures in lines of text.

  Args:
    result: of `pretraining`.
    about: of devices.describe.
  """
  p, flops = result['settings']['pretrain'], result['flops']
  whole, parts = result['seconds_per_iteration'], result['part_seconds']
  memory = ', '.join(
    f'{name.replace("_", " ")} {n / 2**20:,.1f} MiB' for name, n in result['bytes'].items()
  )
  lines = [
    f'pretraining on {about["devices"]}, jax {about["versions"]["jax"]}, {p["dtype"]}:',
    f'  {result["env_steps_per_second"]:,.1f} env steps/s, {result["updates_per_second"]:,.2f} '
    f'updates/s, {whole:.4g} s an iteration, {p["env_steps"]:,} env steps in '
    f'{result["hours"]:.3g} h',
    f'  {"alone":22}{"ms/iteration":>14}{"of the whole":>14}{"GFLOP":>10}',
  ]
  for name, words in ROWS.items():
    milliseconds = f'{1000 * parts[name]:14,.2f}'
    share = f'{parts[name] / whole:14.1%}'
    gflop = f'{flops[name] / 1e9:10,.2f}'
    lines.append(f'  {words:22}{milliseconds}{share}{gflop}')
  lines += [
    f'  efficiency {result["efficiency"]:.3f} = (generator + acting + SimSiam) / whole',
    f'  {flops["whole"] / 1e9:,.2f} GFLOP an iteration and device: '
    f'{result["share_of_matmul"]:.1%} of {result["matmul_flops_per_second"] / 1e12:.3g} TFLOP/s, '
    f'measured in a {p["dtype"]} matrix product',
    f'  memory of a device: {memory}',
    f'  median of {result["repeats"]} turns, the first left out; compiled in '
    f'{result["compile_seconds"]:.0f} s',
  ]
  return '\n'.join(lines)


def check(config: ConfigDict, num_devices: int) -> None:
  """Raises UserError where the pretraining trains no policy, or cannot grow as it should."""
  if 'pretrain' in config.jobs:
    pairs.require_policy(config, 'benchmark')
  for key in to_grow(config):
    for times in config.benchmark.times:
      pretrain.check(growth.grown(config, key, times), num_devices)


JOB = Job('benchmark', run, check, trains_generator)
