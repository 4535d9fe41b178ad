r"""Compiles pretraining for accelerators that are not here, and prints what a chip would do.

  python -m launch.compile_for --topology=v5e:16x16 --config=configs/cifar.py \
    --config.pretrain.dtype=bfloat16 --scale_from=8
  python -m launch.compile_for --topology=h200:1 --config=configs/cifar.py \
    --config.pretrain.dtype=bfloat16 --parts

It is the program that palm_jax.main would run there: the donated scan over whole iterations,
compiled from shapes alone. No array is made and no generator is read: its pictures are those of
config.plan. No chip is needed, only the compiler: `pip install 'palm_jax[tpu]'` or
'palm_jax[cuda12]'. It takes minutes, and for large slices of TPUs more stack than usual: `ulimit -s
unlimited` (with 8 MB it ended in a segmentation fault on v6e:16x16). TPU slices are named as Google
Cloud names them: v5e:2x4, v5e:16x16, v6e:16x16, v5p:4x4x4. GPUs have their number in one machine:
h200:1, h100:8.

--scale_from=8 takes the sizes of the config as those of 8 chips. It multiplies num_envs,
batch_size, warmup_steps, num_shards and capacity, so that every chip keeps its share whatever the
slice, and prints the flags of palm_jax.main for that. Without it the sizes stay, and must be
divisible by the number of chips. Only the reward grows with the slice: each sample has its
neighbours in the whole batch.

--parts, of a GPU, also prints the time by part, and the kernels that move and compute most.
"""

import importlib.metadata
import math
import pathlib
import re
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from launch.chips import CHIPS, Chip, is_gpu, make_mesh, parse_topology
from launch.compiled_counts import analyse
from launch.compiled_text import parse
from launch.described import describe, gigabytes
from launch.kernels import Kernel, kernels, table_of_kernels, table_of_parts
from palm_jax import pretrain, rollout, settings, worlds
from palm_jax.base import checks, command
from palm_jax.base.errors import UserError
from palm_jax.base.files import write_json
from palm_jax.generator.protocol import PictureGenerator
from palm_jax.speed import cost, plan

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
  chip: Chip,
  layout: Sequence[int],
  total: Counter,
  iterations: int,
  launched: Sequence[Kernel] = (),
) -> dict[str, float]:
  """Seconds of an iteration at a chip's peaks.

  Arithmetic and memory traffic overlap fully, the network with neither. Every collective sends over
  all links at once, and takes half the way around the torus on top. GPUs take one kernel after the
  other, so that only within each the two overlap.

  Args:
    chip: its peaks.
    layout: chips along each side of the slice.
    total: of `analyse`.
    iterations: that the program runs.
    launched: of `kernels`, where the chip is a GPU.

  Returns:
    {'compute', 'memory', 'network', 'iteration', of GPUs 'kernels': seconds}.
  """
  count = sum(n for key, n in total.items() if key[1:] == ('count',))
  sent = sum(n for key, n in total.items() if key[1:] == ('sent',))
  seconds = dict(
    compute=total['passes'] / chip.flops,
    memory=total['bytes'] / chip.hbm,
    network=sent / chip.ici + count * chip.hop * sum(layout) / 2,
  )
  if launched:
    seconds['compute'] = sum(k.count * k.flops for k in launched) / chip.flops
    seconds['memory'] = sum(k.count * k.bytes for k in launched) / chip.hbm
    seconds['kernels'] = sum(k.seconds(chip) for k in launched)
  busy = seconds.get('kernels', max(seconds['compute'], seconds['memory']))
  seconds['iteration'] = busy + seconds['network']
  return {name: s / iterations for name, s in seconds.items()}


def study(config: ConfigDict, topology: str, generator: PictureGenerator) -> dict[str, Any]:
  """Compiles pretraining for a slice -> what `describe` prints, as plain numbers.

  Raises:
    UserError: invalid sizes or topology, no libtpu, or a program that does not fit the chip.
  """
  mesh = make_mesh(topology)
  kind, layout = parse_topology(topology)
  chip = CHIPS[kind]
  started = time.monotonic()
  program, lowered = lower(config, generator, mesh)
  lowered_at = time.monotonic()
  # Any: XLA for TPUs gives the text and all analyses, which JAX's types leave open.
  compiled: Any = compile_program(lowered, topology, chip)
  compiled_at = time.monotonic()
  module = parse(compiled.as_text())
  total, unknown = analyse(module, mesh.size)
  launched = kernels(module) if is_gpu(kind) else ()
  memory = compiled.memory_analysis()
  iterations = config.pretrain.iterations_per_call
  parts = cost.compiled_bytes(compiled) | dict(code=memory.generated_code_size_in_bytes)
  seconds = roofline(chip, layout, total, iterations, launched)
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
    **(_of_gpu(launched, iterations) if launched else _of_tpu(compiled, module, total, iterations)),
    loops_of_unknown_length=unknown,
    collectives={
      kind: {what: total[kind, what] / iterations for what in ('count', 'sent')} for kind in kinds
    },
    seconds=seconds,
    hours=num_iterations * seconds['iteration'] / 3600,
    versions={
      name: importlib.metadata.version(name)
      for name in ('jax', 'jax-cuda12-plugin' if launched else 'libtpu')
    },
  )


def _of_gpu(launched, iterations):
  """What an iteration does, from its kernels."""
  each = [k._replace(count=k.count / iterations) for k in launched]
  return dict(
    flops=sum(k.count * k.flops for k in each),
    hbm_bytes=sum(k.count * k.bytes for k in each),
    launches=sum(k.count for k in each),
    fused_convolutions=sum(k.count for k in each if 'convBiasActivation' in k.kind),
    kernels=each,
  )


def _of_tpu(compiled, module, total, iterations):
  """The same from the counts of the whole program, beside XLA's own."""
  once, _ = analyse(module, 1, once=True)
  cost = compiled.cost_analysis()
  return dict(
    flops=total['flops'] / iterations,
    hbm_bytes=total['bytes'] / iterations,
    cycles=total['cycles'] / iterations,
    counted_once=dict(
      flops=once['flops'], xla_flops=cost['flops'], xla_bytes=cost['bytes accessed']
    ),
  )


def parse_flags(argv: list[str]) -> list[str]:
  """Reads the command line; returns what absl leaves of it."""
  flags.DEFINE_string('topology', None, 'Chips, such as v5e:16x16 or h200:1.')
  flags.DEFINE_bool('parts', False, 'Of a GPU: also the time by part, and the dearest kernels.')
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
    raise UserError('--topology is missing: give a TPU slice or GPUs, such as v5e:2x4 or h200:1')
  jax.config.update('jax_platforms', 'cpu')
  if f.scale_from:
    scale(f.config, math.prod(parse_topology(f.topology)[1]), f.scale_from)
  settings.check(f.config)
  checks.choice('pretrain.dtype', f.config.pretrain.dtype, rollout.DTYPES)
  result = study(
    f.config, f.topology, worlds.as_world(f.config, plan.untrained_generator(f.config))
  )
  launched = result.pop('kernels', [])
  if f.json:
    write_json(pathlib.Path(f.json), result)
  print(describe(result))
  if f.parts and launched:
    chip = CHIPS[parse_topology(f.topology)[0]]
    print(f'\n{table_of_parts(launched, chip)}\n\n{table_of_kernels(launched, chip)}')
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
