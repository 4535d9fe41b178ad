"""Compiles pretraining for a TPU slice that is not there, and prints what it would take on each chip.

  python -m launch.compile_for --topology=v5e:16x16 --config=configs/cifar.py --config.pretrain.dtype=bfloat16 --scale_from=8

It is the program that palm_jax.main would run there: the donated scan over whole iterations, compiled by libtpu from shapes
alone; no array is made, no generator is read, and no TPU is needed, only `pip install 'palm_jax[tpu]'`. The compiler takes
minutes. Topologies are named as Google Cloud does: v5e:2x4, v5e:16x16, v6e:16x16, v5p:4x4x4.

--scale_from=8 takes the sizes of the config as those of 8 chips and multiplies num_envs, batch_size, warmup_steps, num_shards
and capacity, so that every chip keeps its share whatever the slice; what to give palm_jax.main for that is printed. Without
it the sizes stay, and the chips must divide them. Only the reward grows with the slice: each sample seeks its neighbours in
the whole batch.
"""
import importlib.metadata
import importlib.util
import math
import os
import pathlib
import re
import time
from collections import Counter
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from palm_jax import main as palm_main
from palm_jax import pretrain
from palm_jax.checkpoint import write_json_atomic
from palm_jax.errors import UserError
from palm_jax.generator import LoadedGenerator
from palm_jax.generator.train import make_networks

HOP_SECONDS = 1e-6  # jax-ml.github.io/scaling-book, chapter 3: about a microsecond a hop
SCALED = ('pretrain.num_envs', 'pretrain.batch_size', 'pretrain.warmup_steps', 'replay.num_shards', 'replay.capacity')


REMEDY = 'lower replay.capacity, pretrain.num_envs or pretrain.batch_size, set pretrain.dtype=bfloat16, or take more chips'
ENVIRONMENT = dict(TPU_SKIP_MDS_QUERY='1', TPU_ACCELERATOR_TYPE='v5litepod-8', TPU_WORKER_HOSTNAMES='localhost',
                   TPU_WORKER_ID='0', ALLOW_MULTIPLE_LIBTPU_LOAD='1', TF_CPP_MIN_LOG_LEVEL='2')
# Else libtpu asks the machine for the TPUs that it has not, and lets only one process in.


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


# What a compiled program does, read off its text.

class Instruction(NamedTuple):
  shape: str
  opcode: str
  operands: tuple[str, ...]  # names; what stands in the brackets of a parameter or constant
  attributes: str


class Array(NamedTuple):
  dims: tuple[int, ...]
  bytes: float
  hbm: float  # bytes, padding included; 0 for what the compiler keeps on the chip


class Module(NamedTuple):
  """A compiled program taken apart; a computation's last instruction is its result."""
  computations: dict[str, dict[str, Instruction]]
  entry: str
  callers: dict[str, tuple[str, Instruction]]  # computation -> where it is called


COLLECTIVE = re.compile(r'(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?$')
FREE = {'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'after-all', 'partition-id', 'replica-id', 'copy-done',
        'slice-done', 'async-update', 'async-done', 'opt-barrier', 'while', 'conditional', 'call', 'all-reduce-done',
        'all-gather-done', 'collective-permute-done'}  # no traffic of their own
PASSES = {'highest': 6, 'high': 3}  # bf16 products that make one of float32: jax.lax.Precision


def parse(text):
  """Text of a compiled program -> Module."""
  computations, callers, entry = {}, {}, None
  for line in text.splitlines():
    head = re.match(r'(ENTRY )?%?([\w.-]+) \(.*\{$', line)
    if head:
      name, current = head[2], {}
      computations[name] = current
      entry = name if head[1] else entry
    match = re.match(r'\s+(?:ROOT )?%?([\w.-]+) = (.*)', line)
    if match:
      shape, rest = _brackets(match[2]) if match[2][0] == '(' else match[2].split(' ', 1)
      opcode, rest = re.match(r'\s*([\w-]+)(.*)', rest).groups()
      operands, attributes = _brackets(rest)
      operands = tuple(re.findall(r'%([\w.-]+)', operands) or filter(None, [operands[1:-1]]))
      current[match[1]] = Instruction(shape, opcode, operands, attributes)
      callers |= dict.fromkeys(called(current[match[1]]), (name, current[match[1]]))
  return Module(computations, entry, callers)


def _brackets(text):
  """'(a (b) c) rest' -> '(a (b) c)', ' rest'."""
  depth = 0
  for i, c in enumerate(text):
    depth += (c == '(') - (c == ')')
    if not depth:
      return text[:i + 1], text[i + 1:]
  raise ValueError(text)


def called(instruction):
  """Names of the computations that an instruction runs, but for the operators of reductions."""
  names = re.findall(r'\b(?:body|condition|calls|true_computation|false_computation)=%?([\w.-]+)', instruction.attributes)
  for found in re.findall(r'\bbranch_computations=\{([^}]*)\}', instruction.attributes):
    names += re.findall(r'[\w.-]+', found)
  if instruction.opcode == 'call':
    names += re.findall(r'\bto_apply=%?([\w.-]+)', instruction.attributes)
  return names


def arrays(shape):
  """The arrays of a shape's text, such as '(f32[8,100]{1,0:T(8,128)S(1)}, u32[])'.

  {1,0: minor dimension first; T(8,128): padded to tiles of that; S(1): a memory that is not HBM.
  """
  found = []
  for kind, dims, layout in re.findall(r'\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?', shape):
    dims = tuple(map(int, filter(None, dims.split(','))))
    itemsize = 1 if kind == 'pred' else int((re.match(r'[a-z]+(\d+)', kind) or [0, 0])[1]) / 8
    order = [int(i) for i in re.findall(r'\d+', layout.partition(':')[0])]
    tile = [int(i) for i in re.findall(r'\d+', (re.search(r':T\(([\d,]*)\)', layout) or ['', ''])[1])][::-1]
    padded = [-(-dims[i] // t) * t for i, t in zip(order, tile, strict=False)] if dims else []
    rest = [dims[i] for i in order[len(padded):]] if order else dims
    hbm = 0 if re.search(r'S\([1-9]', layout) else math.prod(padded) * math.prod(rest) * itemsize
    found.append(Array(dims, math.prod(dims) * itemsize, hbm))
  return found


def constant(module, computation, name):
  """The integer that a name stands for, sought through copies, tuples and the computations around it; None if none."""
  instruction = module.computations[computation][name]
  operand = instruction.operands[0]
  source = module.computations[computation].get(operand)
  if instruction.opcode == 'constant':
    return int(operand) if re.fullmatch(r'-?\d+', operand) else None
  if instruction.opcode in ('copy', 'bitcast', 'convert', 'copy-start', 'copy-done'):
    return constant(module, computation, operand)
  if instruction.opcode != 'get-tuple-element':
    return None
  if source.opcode == 'parameter' and computation in module.callers:  # of a loop, or of a conditional's branch
    outer, caller = module.callers[computation]
    position = called(caller).index(computation) + 1 if caller.opcode == 'conditional' else 0
    computation, source = outer, module.computations[outer][caller.operands[position]]
  if source.opcode == 'tuple':
    return constant(module, computation, source.operands[_index(instruction)])
  return None


def _index(instruction):
  return int(re.search(r'index=(\d+)', instruction.attributes)[1])


def _alone(module, instruction):
  """The one instruction of a fusion that has no other."""
  body = module.computations[called(instruction)[0]] if instruction.opcode == 'fusion' else {}
  alone = len(body) == len(instruction.operands) + 1
  return list(body.values())[-1]._replace(operands=instruction.operands) if alone else instruction


def trip_count(module, computation, loop):
  """How often a while loop of this computation runs, or None: from XLA's note, or from i < limit, i = start, i += step."""
  known = re.search(r'known_trip_count\W+n\W+(\d+)', loop.attributes)
  if known:
    return int(known[1])
  names = {role: re.search(rf'{role}=%?([\w.-]+)', loop.attributes)[1] for role in ('condition', 'body')}
  condition, body = (module.computations[names[role]] for role in ('condition', 'body'))
  test, result = _alone(module, list(condition.values())[-1]), list(body.values())[-1]
  init = module.computations[computation][loop.operands[0]]
  if test.opcode != 'compare' or 'direction=LT' not in test.attributes or (init.opcode, result.opcode) != ('tuple', 'tuple'):
    return None
  counter = condition[test.operands[0]]
  if counter.opcode != 'get-tuple-element':
    return None
  index = _index(counter)
  step = _alone(module, body[result.operands[index]])
  added = [name for name in step.operands if body[name].opcode != 'get-tuple-element' or _index(body[name]) != index]
  if step.opcode != 'add' or len(added) != 1:
    return None
  start = constant(module, computation, init.operands[index])
  limit, step = constant(module, names['condition'], test.operands[1]), constant(module, names['body'], added[0])
  return None if None in (start, limit, step) else -(-(limit - start) // step)


def product_flops(computation, instruction):
  """FLOPs of a convolution or matrix product, without those on padding, as XLA counts them."""
  left, right = (arrays(computation[name].shape)[0].dims for name in instruction.operands[:2])
  out, attributes = arrays(instruction.shape)[0].dims, instruction.attributes
  if instruction.opcode == 'dot':
    contracted = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', attributes)[1]
    return 2 * math.prod(out) * math.prod(left[int(i)] for i in contracted.split(',') if i)
  left_names, right_names, out_names = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', attributes).groups()
  window = dict(item.split('=') for item in (re.search(r'window=\{([^}]*)\}', attributes) or ['', ''])[1].split())
  spatial = lambda key, default: window.get(key, 'x'.join([default] * (len(out) - 2))).split('x')
  total = 2 * left[left_names.index('b')] * right[right_names.index('i')] * right[right_names.index('o')]
  total //= int((re.search(r'batch_group_count=(\d+)', attributes) or ['', 1])[1])
  for i in range(len(out) - 2):
    size, stride, hole, spread = (int(spatial(key, '1')[i]) for key in ('size', 'stride', 'lhs_dilate', 'rhs_dilate'))
    place = (np.arange(out[out_names.index(str(i))])[:, None] * stride + np.arange(size) * spread
             - int(spatial('pad', '0_0')[i].split('_')[0]))
    total *= int(np.sum((place >= 0) & (place <= (left[left_names.index(str(i))] - 1) * hole) & (place % hole == 0)))
  return total


def traffic(module, computation, instruction):
  """Bytes that an instruction outside fusions reads from and writes to HBM; a slice or update in place what it touches."""
  if instruction.opcode in FREE:
    return 0
  results = arrays(instruction.shape)[:1 if instruction.opcode.endswith('-start') else None]  # then: operand, handle
  outer = [sum(array.hbm for array in arrays(computation[name].shape)) if name in computation else 0
           for name in instruction.operands]
  if instruction.opcode == 'fusion':
    body = module.computations[called(instruction)[0]]
    inner = {int(i.operands[0]): name for name, i in body.items() if i.opcode == 'parameter'}
    root = list(body.values())[-1]
    roots = [body[name] for name in root.operands] if root.opcode == 'tuple' else [root]
    reads = [_read(body, inner[i], size) for i, size in enumerate(outer)]
  else:
    body, roots = computation, [instruction]
    reads = [_read({'': instruction}, name, size) for name, size in zip(instruction.operands, outer, strict=True)]
  writes = [min(array.hbm, _written(body, root)) for array, root in zip(results, roots, strict=False)]
  return sum(reads) + sum(writes)


def _read(body, name, size):
  """Of the `size` bytes called `name`, those that the instructions of a body read."""
  amount = 0
  for other, user in body.items():
    if name not in user.operands or not size:
      continue
    if user.opcode in ('bitcast', 'copy', 'fusion') and other:  # a fusion within one changes no more than the layout
      amount += _read(body, other, size)
    elif user.operands[0] == name and user.opcode in ('dynamic-slice', 'slice', 'gather', 'slice-start'):
      amount += arrays(user.shape)[0].bytes
    elif user.operands[0] != name or user.opcode not in ('dynamic-update-slice', 'scatter'):
      return size
  return min(size, amount)


def _written(body, instruction):
  while instruction.opcode in ('bitcast', 'copy') and instruction.operands[0] in body:
    instruction = body[instruction.operands[0]]
  if instruction.opcode == 'dynamic-update-slice':
    return arrays(body[instruction.operands[1]].shape)[0].bytes
  return math.inf


def sent_bytes(computation, instruction, kind, num_devices):
  """What a device sends in a collective, as rings do it."""
  group = re.search(r'replica_groups=(?:\{\{([\d,]*)\}|\[\d+,(\d+)\])', instruction.attributes)
  group = (len(group[1].split(',')) if group[1] else int(group[2])) if group else num_devices
  size = sum(array.bytes for name in instruction.operands for array in arrays(computation[name].shape))
  share = {'all-reduce': 2 * (group - 1) / group, 'all-gather': group - 1, 'collective-permute': 1}
  return size * share.get(kind, (group - 1) / group)


def analyse(module, num_devices, once=False):
  """What one device does in a run of the program, each loop's body counted as often as it runs.

  XLA's cost_analysis counts a loop's body once, whatever its length; `once` does as it does. Of a conditional the branch
  with more FLOPs counts. A collective that the compiler spread over several fusions is one chain, and counts once.

  Returns:
    (Counter of 'flops' in products and convolutions, 'passes' (FLOPs of bf16 that they take), 'bytes' to and from HBM, 'cycles'
    (XLA:TPU's own guess, without collectives),
    and for each kind of collective (kind, 'count') and (kind, 'sent') bytes; names of the loops of unknown length, counted once).
  """
  memo, unknown = {}, []

  def add(counter, other, times=1):
    for key, value in other.items():
      counter[key] += value * times

  def inside(name, total, chains):
    """Products and collectives of a computation and the fusions in it."""
    computation = module.computations[name]
    for instruction in computation.values():
      collective = COLLECTIVE.match(instruction.opcode)
      if instruction.opcode in ('convolution', 'dot'):
        flops = product_flops(computation, instruction)
        precision = re.search(r'operand_precision=\{(\w+)', instruction.attributes)
        add(total, {'flops': flops, 'passes': flops * PASSES.get(precision and precision[1], 1)})
      elif collective:
        chain = (re.search(r'chain_id="?(\d+)', instruction.attributes) or [None, None])[1]
        if chain is None or chain not in chains:
          kind = collective[1]
          add(total, {(kind, 'count'): 1, (kind, 'sent'): sent_bytes(computation, instruction, kind, num_devices)})
        chains.add(chain)
      elif instruction.opcode == 'fusion':
        inside(called(instruction)[0], total, chains)

  def run(name):
    if name in memo:
      return memo[name]
    total = memo[name] = Counter()
    inside(name, total, set())
    for label, instruction in module.computations[name].items():
      total['bytes'] += traffic(module, module.computations[name], instruction)
      total['cycles'] += int((re.search(r'estimated_cycles":"(\d+)', instruction.attributes) or ['', 0])[1])
      if instruction.opcode == 'while':
        trips = 1 if once else trip_count(module, name, instruction)
        if trips is None:
          unknown.append(label)
        for part in called(instruction):
          add(total, run(part), trips or 1)
      elif instruction.opcode == 'conditional':
        add(total, max(map(run, called(instruction)), key=lambda branch: branch['flops']))
      elif instruction.opcode in ('call', 'async-start'):
        add(total, run(called(instruction)[0]))
    return total

  return run(module.entry), unknown


# The program, and what it takes.

def parse_topology(topology):
  """'v5e:16x16' -> ('v5e', (16, 16)); UserError for a generation that is not in CHIPS."""
  generation, _, layout = topology.partition(':')
  if generation not in CHIPS or not re.fullmatch(r'\d+(x\d+)+', layout):
    raise UserError(f'--topology={topology} is unknown: expected a generation ({", ".join(CHIPS)}) and a layout, such as v5e:2x4')
  return generation, tuple(map(int, layout.split('x')))


def make_mesh(topology):
  """The mesh of a TPU slice that need not exist.

  Raises:
    UserError: an unknown generation, no libtpu, or a layout that libtpu refuses.
  """
  parse_topology(topology)
  if importlib.util.find_spec('libtpu') is None:
    raise UserError("libtpu is not installed, and it is the compiler for TPUs: pip install 'palm_jax[tpu]'")
  for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)
  try:
    devices = topologies.get_topology_desc(platform='tpu', topology_name=topology).devices
  except jax.errors.JaxRuntimeError as e:
    raise UserError(f'--topology={topology} is refused by libtpu ({str(e).splitlines()[0]}): if it is the layout, choose '
                    'one that Google Cloud offers, such as v5e:2x4, v5e:16x16, v6e:16x16, v5p:4x4x4') from e
  return Mesh(devices, ('data',), axis_types=(AxisType.Auto,))


def scale(config, chips, scale_from):
  """Multiplies in place the sizes that belong to `scale_from` chips; UserError where one is no whole number for `chips`."""
  sizes = {}
  for name in SCALED:
    section, key = name.split('.')
    scaled = config[section][key] * chips
    if scaled % scale_from:
      raise UserError(f'--scale_from={scale_from} leaves {name}={config[section][key]} no whole number for {chips} chips: '
                      f'set it to a multiple of {scale_from}')
    sizes[name] = scaled // scale_from
  config.update_from_flattened_dict(sizes)


def make_generator(config, image_size, image_channels, num_classes):
  """A generator of the config's sizes; its variables have shapes and no memory."""
  network, _ = make_networks(config.generator, (image_size, image_size, image_channels), num_classes)
  variables = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, network.z_dim)), jnp.zeros(1, jnp.int32))
  variables = jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), variables)
  return LoadedGenerator(network, variables).with_dtype(pretrain.DTYPES[config.pretrain.dtype])


def lower(config, generator, mesh):
  """The call of pretrain.make_program, lowered for the mesh from shapes alone -> (Program, Lowered)."""
  program = pretrain.make_program(config, generator, mesh)
  place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
  world = jax.tree.map(lambda x: place(x, NamedSharding(mesh, P())),
                       jax.eval_shape(lambda: pretrain.make_world(config, generator, mesh)))
  state = jax.tree.map(place, jax.eval_shape(program.init, jax.random.key(0), world), program.state_shardings)
  return program, program.call.lower(state, world)


def compile_program(lowered, topology, chip):
  """Compiled; UserError when it does not fit the chip's memory, as the compiler says."""
  try:
    return lowered.compile()
  except jax.errors.JaxRuntimeError as e:
    if 'RESOURCE_EXHAUSTED' not in str(e):
      raise
    used = re.search(r'[Uu]sed [\d.]+\w+ of [\d.]+\w+ hbm', str(e))
    raise UserError(f'the program does not fit a chip of {topology} with its {gigabytes(chip.memory)} '
                    f'({used[0] if used else str(e).splitlines()[0]}): {REMEDY}') from e


def roofline(chip, layout, total, iterations):
  """Seconds an iteration at a chip's peaks: {'compute', 'memory', 'network', 'iteration'}.

  Args:
    chip: Chip.
    layout: chips along each side of the slice.
    total: Counter of `analyse`.
    iterations: that the program runs.

  Arithmetic and HBM traffic overlap fully, the network with neither: every collective sends over all links at once, and takes
  half the way around the torus on top.
  """
  count, sent = (sum(n for key, n in total.items() if key[1:] == (what,)) for what in ('count', 'sent'))
  seconds = dict(compute=total['passes'] / chip.flops, memory=total['bytes'] / chip.hbm,
                 network=sent / chip.ici + count * HOP_SECONDS * sum(layout) / 2)
  seconds['iteration'] = max(seconds['compute'], seconds['memory']) + seconds['network']
  return {name: s / iterations for name, s in seconds.items()}


def study(config, topology, generator):
  """Compiles pretraining for a slice and returns what `describe` prints, as a dict of plain numbers.

  Raises:
    UserError: sizes or a topology that cannot be, no libtpu, or a program that the compiler cannot fit into the chip.
  """
  mesh = make_mesh(topology)
  generation, layout = parse_topology(topology)
  chip = CHIPS[generation]
  started = time.monotonic()
  program, lowered = lower(config, generator, mesh)
  lowered_at = time.monotonic()
  compiled = compile_program(lowered, topology, chip)
  compiled_at = time.monotonic()
  module = parse(compiled.as_text())
  total, unknown = analyse(module, mesh.size)
  once, _ = analyse(module, mesh.size, once=True)
  cost, memory, iterations = compiled.cost_analysis(), compiled.memory_analysis(), config.pretrain.iterations_per_call
  parts = dict(arguments=memory.argument_size_in_bytes,
               results_beside_them=memory.output_size_in_bytes - memory.alias_size_in_bytes,
               temporaries=memory.temp_size_in_bytes, code=memory.generated_code_size_in_bytes)
  seconds = roofline(chip, layout, total, iterations)
  num_iterations = math.ceil(config.pretrain.env_steps / program.env_steps_per_iteration)
  kinds = sorted({key[0] for key in total if isinstance(key, tuple)})
  return dict(
      topology=topology, chips=mesh.size, device_kind=mesh.devices.flat[0].device_kind, config=config.name,
      dtype=config.pretrain.dtype, sizes={name: config[name.split('.')[0]][name.split('.')[1]] for name in SCALED},
      env_steps=config.pretrain.env_steps, env_steps_per_iteration=program.env_steps_per_iteration,
      iterations_per_call=iterations,
      lower_seconds=lowered_at - started, compile_seconds=compiled_at - lowered_at,
      memory=dict(parts, total=sum(parts.values()), chip=chip.memory),
      flops=total['flops'] / iterations, hbm_bytes=total['bytes'] / iterations,
      cycles=total['cycles'] / iterations, loops_of_unknown_length=unknown,
      collectives={kind: {what: total[kind, what] / iterations for what in ('count', 'sent')} for kind in kinds},
      counted_once=dict(flops=once['flops'], xla_flops=cost['flops'], xla_bytes=cost['bytes accessed']),
      seconds=seconds, hours=num_iterations * seconds['iteration'] / 3600,
      versions={name: importlib.metadata.version(name) for name in ('jax', 'libtpu')})


def gigabytes(n):
  return f'{n / 2**30:.2f} GiB'


def describe(s):
  """The dict of `study` in words."""
  memory, seconds, chip = s['memory'], s['seconds'], CHIPS[parse_topology(s['topology'])[0]]
  percent = lambda part: f'{100 * part / memory["total"]:.0f}%'
  lines = [
      f'{s["topology"]}: {s["chips"]} chips ({s["device_kind"]}), config {s["config"]}, {s["dtype"]}; '
      f'lowered in {s["lower_seconds"]:.0f} s, compiled in {s["compile_seconds"]:.0f} s',
      'sizes           ' + ' '.join(f'--config.{name}={value}' for name, value in s['sizes'].items()),
      '', 'On each chip:',
      f'memory          {gigabytes(memory["total"])} of {gigabytes(memory["chip"])}: '
      + ', '.join(f'{name.replace("_", " ")} {gigabytes(n)} ({percent(n)})' for name, n in memory.items()
                  if name not in ('total', 'chip')),
      f'arithmetic      {s["flops"] / 1e9:.1f} GFLOP an iteration, in products and convolutions',
      f'                (each loop\'s body counted once: {s["counted_once"]["flops"] / 1e9:.1f}, and '
      f'{s["counted_once"]["xla_flops"] / 1e9:.1f} by XLA, which counts so and adds what is elementwise)',
      f'HBM traffic     {s["hbm_bytes"] / 1e9:.2f} GB an iteration',
  ]
  for kind, c in s['collectives'].items():
    lines.append(f'{kind:15s} {c["sent"] / 1e6:.2f} MB sent an iteration, in {c["count"]:.4g}')
  if s['loops_of_unknown_length']:
    lines.append(f'counted once, because their length is unknown: {", ".join(s["loops_of_unknown_length"])}')
  lines += [
      '', f'An iteration of {s["env_steps_per_iteration"]} env steps, at the peaks of the chip:',
      f'time            {1e3 * seconds["iteration"]:.2f} ms = max(compute {1e3 * seconds["compute"]:.2f}, '
      f'HBM {1e3 * seconds["memory"]:.2f}) + network {1e3 * seconds["network"]:.2f}',
      f'{s["env_steps"] / 1e6:.4g}M steps  {s["hours"]:.3g} hours: a floor, not a forecast; the compiler itself reckons with '
      f'{s["cycles"] / 1e6:.1f}M cycles an iteration without the network',
      f'assumed         {chip.flops / 1e12:.0f} TFLOP/s bf16, HBM {chip.hbm / 1e9:.0f} GB/s, {chip.ici / 1e9:.0f} GB/s sent over '
      'all links (docs.cloud.google.com/tpu/docs),',
      f'                {1e6 * HOP_SECONDS:.0f} us a hop; every chip one mesh position, no host in between',
  ]
  return '\n'.join(lines)


def parse_flags(argv):
  flags.DEFINE_string('topology', None, 'TPU slice, such as v5e:16x16.')
  flags.DEFINE_integer('scale_from', None, 'Chips that the sizes of the config are for; they grow with the slice.', 1)
  flags.DEFINE_integer('image_size', 32, 'Side of the images.', 8)
  flags.DEFINE_integer('image_channels', 3, 'Channels of the images.', 1)
  flags.DEFINE_integer('num_classes', 10, 'Classes of the generator; 0: unconditional.', 0)
  flags.DEFINE_string('json', None, 'File to write the numbers to.')
  return palm_main.parse_flags(argv)


def main(argv):
  if len(argv) > 1:
    raise UserError(f'unexpected argument {argv[1]!r}: flags begin with --')
  f = flags.FLAGS
  if f.topology is None:
    raise UserError('--topology is missing: give a TPU slice, such as v5e:2x4 or v5e:16x16')
  jax.config.update('jax_platforms', 'cpu')
  if f.scale_from:
    scale(f.config, math.prod(parse_topology(f.topology)[1]), f.scale_from)
  generator = make_generator(f.config, f.image_size, f.image_channels, f.num_classes)
  result = study(f.config, f.topology, generator)
  if f.json:
    write_json_atomic(pathlib.Path(f.json), result)
  print(describe(result))
  check_memory(result)


def check_memory(result):
  """Raises UserError when the program takes more than the chip has."""
  memory = result['memory']
  if memory['total'] > memory['chip']:
    raise UserError(f'the program takes {gigabytes(memory["total"])} of each chip and a chip of {result["topology"]} has '
                    f'{gigabytes(memory["chip"])}: {REMEDY}')


if __name__ == '__main__':
  app.run(palm_main.exit_on_user_error(main), flags_parser=palm_main.exit_on_user_error(parse_flags))
