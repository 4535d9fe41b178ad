r"""Compiles pretraining for a TPU slice without having one, and prints what a chip would do.

  python -m launch.compile_for --topology=v5e:16x16 --config=configs/cifar.py \
    --config.pretrain.dtype=bfloat16 --scale_from=8

It is the program that palm_jax.main would run there: the donated scan over whole iterations,
compiled by libtpu from shapes alone. No array is made and no generator is read: its pictures are
those of config.plan. No TPU is needed, only `pip install 'palm_jax[tpu]'`. The compiler takes
minutes, and for large slices more stack than usual: `ulimit -s unlimited` (with 8 MB it ended in a
segmentation fault on v6e:16x16). Topologies are named as Google Cloud names them: v5e:2x4,
v5e:16x16, v6e:16x16, v5p:4x4x4.

--scale_from=8 takes the sizes of the config as those of 8 chips. It multiplies num_envs,
batch_size, warmup_steps, num_shards and capacity, so that every chip keeps its share whatever the
slice, and prints the flags of palm_jax.main for that. Without it the sizes stay, and must be
divisible by the number of chips. Only the reward grows with the slice: each sample has its
neighbours in the whole batch.
"""

import importlib.metadata
import importlib.util
import math
import os
import pathlib
import re
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from absl import flags
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from launch.compiled_counts import analyse
from launch.compiled_text import parse
from palm_jax import pretrain, worlds
from palm_jax.base import command
from palm_jax.base.errors import UserError
from palm_jax.base.files import write_json
from palm_jax.generator.protocol import PictureGenerator
from palm_jax.speed import plan

HOP_SECONDS = 1e-6  # jax-ml.github.io/scaling-book, chapter 3: about a microsecond a hop
SCALED = (
  'pretrain.num_envs',
  'pretrain.batch_size',
  'pretrain.warmup_steps',
  'replay.num_shards',
  'replay.capacity',
)
REMEDY = (
  'lower replay.capacity, pretrain.num_envs or pretrain.batch_size, set '
  'pretrain.dtype=bfloat16, or take more chips'
)
# Without these libtpu looks for the machine's own TPUs, and lets only one process in.
ENVIRONMENT = dict(
  TPU_SKIP_MDS_QUERY='1',
  TPU_ACCELERATOR_TYPE='v5litepod-8',
  TPU_WORKER_HOSTNAMES='localhost',
  TPU_WORKER_ID='0',
  ALLOW_MULTIPLE_LIBTPU_LOAD='1',
  TF_CPP_MIN_LOG_LEVEL='2',
)


class Chip(NamedTuple):
  """Peaks of one chip."""

  flops: float  # bf16 FLOP/s
  hbm: float  # bytes/s
  ici: float  # bytes/s sent over all links; half of what is documented as bidirectional
  memory: float  # bytes


CHIPS = {  # docs.cloud.google.com/tpu/docs/v5e, v5p, v6e
  'v5e': Chip(197e12, 819e9, 200e9, 16 * 2**30),
  'v5p': Chip(459e12, 2765e9, 600e9, 95 * 2**30),
  'v6e': Chip(918e12, 1600e9, 400e9, 32 * 2**30),
}


def parse_topology(topology: str) -> tuple[str, tuple[int, ...]]:
  """'v5e:16x16' -> ('v5e', (16, 16)). UserError for a generation that is not in CHIPS."""
  generation, _, layout = topology.partition(':')
  if generation not in CHIPS or not re.fullmatch(r'\d+(x\d+)+', layout):
    raise UserError(
      f'--topology={topology} is unknown: expected a generation ({", ".join(CHIPS)}) and a '
      'layout, such as v5e:2x4'
    )
  return generation, tuple(map(int, layout.split('x')))


def make_mesh(topology: str) -> Mesh:
  """The mesh of a TPU slice that need not exist.

  Raises:
    UserError: an unknown generation, no libtpu, or a layout that libtpu refuses.
  """
  parse_topology(topology)
  if importlib.util.find_spec('libtpu') is None:
    raise UserError(
      "libtpu is not installed, and it is the compiler for TPUs: pip install 'palm_jax[tpu]'"
    )
  for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)
  try:
    devices = topologies.get_topology_desc(platform='tpu', topology_name=topology).devices
  except jax.errors.JaxRuntimeError as e:
    raise UserError(
      f'--topology={topology} is refused by libtpu ({str(e).splitlines()[0]}): if it is the '
      'layout, choose one that Google Cloud offers, such as v5e:2x4, v5e:16x16, v6e:16x16, '
      'v5p:4x4x4'
    ) from e
  return Mesh(devices, ('data',), axis_types=(AxisType.Auto,))


def scale(config: ConfigDict, chips: int, scale_from: int) -> None:
  """Changes the config's sizes, which belong to `scale_from` chips, to those of `chips`.

  Raises:
    UserError: a size would not be a whole number.
  """
  sizes = {}
  for name in SCALED:
    section, key = name.split('.')
    scaled = config[section][key] * chips
    if scaled % scale_from:
      raise UserError(
        f'--scale_from={scale_from} leaves {name}={config[section][key]} no whole number for '
        f'{chips} chips: set it to a multiple of {scale_from}'
      )
    sizes[name] = scaled // scale_from
  config.update_from_flattened_dict(sizes)


def lower(
  config: ConfigDict, generator: PictureGenerator, mesh: Mesh
) -> tuple[pretrain.Program, jax.stages.Lowered]:
  """The call of pretrain.make_program, lowered for the mesh from shapes alone."""
  program = pretrain.make_program(config, generator, mesh)
  place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
  world = jax.tree.map(
    lambda x: place(x, NamedSharding(mesh, P())),
    jax.eval_shape(lambda: worlds.host_world(config, generator)),
  )
  state = jax.tree.map(
    place, jax.eval_shape(program.init, jax.random.key(0), world), program.state_shardings
  )
  return program, program.call.lower(state, world)


def compile_program(lowered: jax.stages.Lowered, topology: str, chip: Chip) -> jax.stages.Compiled:
  """The compiled program. UserError where it does not fit the chip's memory."""
  try:
    return lowered.compile()
  except jax.errors.JaxRuntimeError as e:
    if 'RESOURCE_EXHAUSTED' not in str(e):
      raise
    used = re.search(r'[Uu]sed [\d.]+\w+ of [\d.]+\w+ hbm', str(e))
    raise UserError(
      f'the program does not fit a chip of {topology} with its {gigabytes(chip.memory)} '
      f'({used[0] if used else str(e).splitlines()[0]}): {REMEDY}'
    ) from e


def roofline(
  chip: Chip, layout: Sequence[int], total: Counter, iterations: int
) -> dict[str, float]:
  """Seconds of an iteration at a chip's peaks.

  Arithmetic and HBM traffic overlap fully, the network with neither. Every collective sends over
  all links at once, and takes half the way around the torus on top.

  Args:
    chip: its peaks.
    layout: chips along each side of the slice.
    total: of `analyse`.
    iterations: that the program runs.

  Returns:
    {'compute', 'memory', 'network', 'iteration': seconds}.
  """
  count = sum(n for key, n in total.items() if key[1:] == ('count',))
  sent = sum(n for key, n in total.items() if key[1:] == ('sent',))
  seconds = dict(
    compute=total['passes'] / chip.flops,
    memory=total['bytes'] / chip.hbm,
    network=sent / chip.ici + count * HOP_SECONDS * sum(layout) / 2,
  )
  seconds['iteration'] = max(seconds['compute'], seconds['memory']) + seconds['network']
  return {name: s / iterations for name, s in seconds.items()}


def study(config: ConfigDict, topology: str, generator: PictureGenerator) -> dict[str, Any]:
  """Compiles pretraining for a slice -> what `describe` prints, as plain numbers.

  Raises:
    UserError: invalid sizes or topology, no libtpu, or a program that does not fit the chip.
  """
  mesh = make_mesh(topology)
  generation, layout = parse_topology(topology)
  chip = CHIPS[generation]
  started = time.monotonic()
  program, lowered = lower(config, generator, mesh)
  lowered_at = time.monotonic()
  # Any: XLA for TPUs gives the text and all analyses, which JAX's types leave open.
  compiled: Any = compile_program(lowered, topology, chip)
  compiled_at = time.monotonic()
  module = parse(compiled.as_text())
  total, unknown = analyse(module, mesh.size)
  once, _ = analyse(module, mesh.size, once=True)
  cost = compiled.cost_analysis()
  memory = compiled.memory_analysis()
  iterations = config.pretrain.iterations_per_call
  parts = dict(
    arguments=memory.argument_size_in_bytes,
    results_beside_them=memory.output_size_in_bytes - memory.alias_size_in_bytes,
    temporaries=memory.temp_size_in_bytes,
    code=memory.generated_code_size_in_bytes,
  )
  seconds = roofline(chip, layout, total, iterations)
  num_iterations = math.ceil(config.pretrain.env_steps / program.env_steps_per_iteration)
  kinds = sorted({key[0] for key in total if isinstance(key, tuple)})
  return dict(
    topology=topology,
    chips=mesh.size,
    device_kind=mesh.devices.flat[0].device_kind,
    config=config.name,
    dtype=config.pretrain.dtype,
    sizes={name: config[name.split('.')[0]][name.split('.')[1]] for name in SCALED},
    env_steps=config.pretrain.env_steps,
    env_steps_per_iteration=program.env_steps_per_iteration,
    iterations_per_call=iterations,
    lower_seconds=lowered_at - started,
    compile_seconds=compiled_at - lowered_at,
    memory=dict(parts, total=sum(parts.values()), chip=chip.memory),
    flops=total['flops'] / iterations,
    hbm_bytes=total['bytes'] / iterations,
    cycles=total['cycles'] / iterations,
    loops_of_unknown_length=unknown,
    collectives={
      kind: {what: total[kind, what] / iterations for what in ('count', 'sent')} for kind in kinds
    },
    counted_once=dict(
      flops=once['flops'], xla_flops=cost['flops'], xla_bytes=cost['bytes accessed']
    ),
    seconds=seconds,
    hours=num_iterations * seconds['iteration'] / 3600,
    versions={name: importlib.metadata.version(name) for name in ('jax', 'libtpu')},
  )


def gigabytes(n: float) -> str:
  """A number of bytes as text."""
  return f'{n / 2**30:.2f} GiB'


def describe(s: dict[str, Any]) -> str:
  """The numbers of `study` in words."""
  memory = s['memory']
  seconds = s['seconds']
  chip = CHIPS[parse_topology(s['topology'])[0]]
  percent = lambda part: f'{100 * part / memory["total"]:.0f}%'
  lines = [
    f'{s["topology"]}: {s["chips"]} chips ({s["device_kind"]}), config {s["config"]}, '
    f'{s["dtype"]}; lowered in {s["lower_seconds"]:.0f} s, compiled in '
    f'{s["compile_seconds"]:.0f} s',
    'sizes           ' + ' '.join(f'--config.{name}={value}' for name, value in s['sizes'].items()),
    '',
    'On each chip:',
    f'memory          {gigabytes(memory["total"])} of {gigabytes(memory["chip"])}: '
    + ', '.join(
      f'{name.replace("_", " ")} {gigabytes(n)} ({percent(n)})'
      for name, n in memory.items()
      if name not in ('total', 'chip')
    ),
    f'arithmetic      {s["flops"] / 1e9:.1f} GFLOP an iteration, in products and convolutions',
    f"                (each loop's body counted once: {s['counted_once']['flops'] / 1e9:.1f}, and "
    f'{s["counted_once"]["xla_flops"] / 1e9:.1f} by XLA, which counts so and adds what is '
    'elementwise)',
    f'HBM traffic     {s["hbm_bytes"] / 1e9:.2f} GB an iteration',
  ]
  for kind, c in s['collectives'].items():
    lines.append(f'{kind:15s} {c["sent"] / 1e6:.2f} MB sent an iteration, in {c["count"]:.4g}')
  if s['loops_of_unknown_length']:
    lines.append(
      f'counted once, because their length is unknown: {", ".join(s["loops_of_unknown_length"])}'
    )
  lines += [
    '',
    f'An iteration of {s["env_steps_per_iteration"]} env steps, at the peaks of the chip:',
    f'time            {1e3 * seconds["iteration"]:.2f} ms = max(compute '
    f'{1e3 * seconds["compute"]:.2f}, HBM {1e3 * seconds["memory"]:.2f}) + network '
    f'{1e3 * seconds["network"]:.2f}',
    f'{s["env_steps"] / 1e6:.4g}M steps  {s["hours"]:.3g} hours: a floor, not a forecast; the '
    f'compiler itself reckons with {s["cycles"] / 1e6:.1f}M cycles an iteration without the '
    'network',
    f'assumed         {chip.flops / 1e12:.0f} TFLOP/s bf16, HBM {chip.hbm / 1e9:.0f} GB/s, '
    f'{chip.ici / 1e9:.0f} GB/s sent over all links (docs.cloud.google.com/tpu/docs),',
    f'                {1e6 * HOP_SECONDS:.0f} us a hop; every chip one mesh position, no host in '
    'between',
  ]
  return '\n'.join(lines)


def parse_flags(argv: list[str]) -> list[str]:
  """Reads the command line; returns what absl leaves of it."""
  flags.DEFINE_string('topology', None, 'TPU slice, such as v5e:16x16.')
  flags.DEFINE_integer(
    'scale_from', None, 'Chips that the sizes of the config are for; they grow with the slice.', 1
  )
  flags.DEFINE_string('json', None, 'File to write the numbers to.')
  return command.parse_config_flags(argv, 'configs/cifar.py')


def main(argv: list[str]) -> None:
  """The command."""
  command.no_arguments(argv)
  f = flags.FLAGS
  if f.topology is None:
    raise UserError('--topology is missing: give a TPU slice, such as v5e:2x4 or v5e:16x16')
  jax.config.update('jax_platforms', 'cpu')
  if f.scale_from:
    scale(f.config, math.prod(parse_topology(f.topology)[1]), f.scale_from)
  result = study(
    f.config, f.topology, worlds.as_world(f.config, plan.untrained_generator(f.config))
  )
  if f.json:
    write_json(pathlib.Path(f.json), result)
  print(describe(result))
  check_memory(result)


def check_memory(result: dict[str, Any]) -> None:
  """Raises UserError when the program takes more than the chip has."""
  memory = result['memory']
  if memory['total'] > memory['chip']:
    raise UserError(
      f'the program takes {gigabytes(memory["total"])} of each chip and a chip of '
      f'{result["topology"]} has {gigabytes(memory["chip"])}: {REMEDY}'
    )


if __name__ == '__main__':
  command.run(main, parse_flags)
