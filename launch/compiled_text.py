"""What a compiled program does, read off its text: its arithmetic, its traffic to memory, and what
it sends.

XLA's own counts take a loop's body once, whatever its length; these take it as often as it runs.
"""

import math
import re
from collections import Counter
from typing import NamedTuple

import numpy as np


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


COLLECTIVE = re.compile(
  r'(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?$'
)
FREE = {
  'parameter',
  'constant',
  'tuple',
  'get-tuple-element',
  'bitcast',
  'after-all',
  'partition-id',
  'replica-id',
  'copy-done',
  'slice-done',
  'async-update',
  'async-done',
  'opt-barrier',
  'while',
  'conditional',
  'call',
  'all-reduce-done',
  'all-gather-done',
  'collective-permute-done',
}  # no traffic of their own
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
      return text[: i + 1], text[i + 1 :]
  raise ValueError(text)


def called(instruction):
  """Names of the computations that an instruction runs, but for the operators of reductions."""
  names = re.findall(
    r'\b(?:body|condition|calls|true_computation|false_computation)=%?([\w.-]+)',
    instruction.attributes,
  )
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
    tile = [
      int(i) for i in re.findall(r'\d+', (re.search(r':T\(([\d,]*)\)', layout) or ['', ''])[1])
    ][::-1]
    padded = [-(-dims[i] // t) * t for i, t in zip(order, tile, strict=False)] if dims else []
    rest = [dims[i] for i in order[len(padded) :]] if order else dims
    hbm = 0 if re.search(r'S\([1-9]', layout) else math.prod(padded) * math.prod(rest) * itemsize
    found.append(Array(dims, math.prod(dims) * itemsize, hbm))
  return found


def constant(module, computation, name):
  """The integer that a name stands for, sought through copies, tuples and the computations around
  it; None if none."""
  instruction = module.computations[computation][name]
  operand = instruction.operands[0]
  source = module.computations[computation].get(operand)
  if instruction.opcode == 'constant':
    return int(operand) if re.fullmatch(r'-?\d+', operand) else None
  if instruction.opcode in ('copy', 'bitcast', 'convert', 'copy-start', 'copy-done'):
    return constant(module, computation, operand)
  if instruction.opcode != 'get-tuple-element':
    return None
  if (
    source.opcode == 'parameter' and computation in module.callers
  ):  # of a loop, or of a conditional's branch
    outer, caller = module.callers[computation]
    position = called(caller).index(computation) + 1 if caller.opcode == 'conditional' else 0
    computation, source = outer, module.computations[outer][caller.operands[position]]
  if source.opcode == 'tuple':
    return constant(module, computation, source.operands[_index(instruction)])
  return None


def _index(instruction):
  return int(re.search(r'index=(\d+)', instruction.attributes)[1])


def _uncopied(computation, name):
  """The instruction whose value the one of this name copies, or itself."""
  while computation[name].opcode == 'copy':
    name = computation[name].operands[0]
  return computation[name]


def _alone(module, instruction):
  """The one instruction of a fusion that has no other."""
  body = module.computations[called(instruction)[0]] if instruction.opcode == 'fusion' else {}
  alone = len(body) == len(instruction.operands) + 1
  return list(body.values())[-1]._replace(operands=instruction.operands) if alone else instruction


def trip_count(module, computation, loop):
  """How often a while loop of this computation runs, or None: from XLA's note, or from i < limit, i
  = start, i += step."""
  known = re.search(r'known_trip_count\W+n\W+(\d+)', loop.attributes)
  if known:
    return int(known[1])
  names = {
    role: re.search(rf'{role}=%?([\w.-]+)', loop.attributes)[1] for role in ('condition', 'body')
  }
  condition, body = (module.computations[names[role]] for role in ('condition', 'body'))
  test, result = _alone(module, list(condition.values())[-1]), list(body.values())[-1]
  init = module.computations[computation][loop.operands[0]]
  if (
    test.opcode != 'compare'
    or 'direction=LT' not in test.attributes
    or (init.opcode, result.opcode) != ('tuple', 'tuple')
  ):
    return None
  counter = _uncopied(condition, test.operands[0])
  if counter.opcode != 'get-tuple-element':
    return None
  index = _index(counter)
  step = _alone(module, _uncopied(body, result.operands[index]))
  sources = {name: _uncopied(body, name) for name in step.operands}
  added = [
    name
    for name, source in sources.items()
    if source.opcode != 'get-tuple-element' or _index(source) != index
  ]
  if step.opcode != 'add' or len(added) != 1:
    return None
  start = constant(module, computation, init.operands[index])
  limit, step = (
    constant(module, names['condition'], test.operands[1]),
    constant(module, names['body'], added[0]),
  )
  return None if None in (start, limit, step) else -(-(limit - start) // step)


def product_flops(computation, instruction):
  """FLOPs of a convolution or matrix product, without those on padding, as XLA counts them."""
  left, right = (arrays(computation[name].shape)[0].dims for name in instruction.operands[:2])
  out, attributes = arrays(instruction.shape)[0].dims, instruction.attributes
  if instruction.opcode == 'dot':
    contracted = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', attributes)[1]
    return 2 * math.prod(out) * math.prod(left[int(i)] for i in contracted.split(',') if i)
  left_names, right_names, out_names = re.search(
    r'dim_labels=(\w+)_(\w+)->(\w+)', attributes
  ).groups()
  window = dict(
    item.split('=')
    for item in (re.search(r'window=\{([^}]*)\}', attributes) or ['', ''])[1].split()
  )
  spatial = lambda key, default: window.get(key, 'x'.join([default] * (len(out) - 2))).split('x')
  total = (
    2 * left[left_names.index('b')] * right[right_names.index('i')] * right[right_names.index('o')]
  )
  total //= int((re.search(r'batch_group_count=(\d+)', attributes) or ['', 1])[1])
  for i in range(len(out) - 2):
    size, stride, hole, spread = (
      int(spatial(key, '1')[i]) for key in ('size', 'stride', 'lhs_dilate', 'rhs_dilate')
    )
    place = (
      np.arange(out[out_names.index(str(i))])[:, None] * stride
      + np.arange(size) * spread
      - int(spatial('pad', '0_0')[i].split('_')[0])
    )
    total *= int(
      np.sum(
        (place >= 0) & (place <= (left[left_names.index(str(i))] - 1) * hole) & (place % hole == 0)
      )
    )
  return total


def traffic(module, computation, instruction):
  """Bytes that an instruction outside fusions reads from and writes to HBM; a slice or update in
  place what it touches."""
  if instruction.opcode in FREE:
    return 0
  results = arrays(instruction.shape)[
    : 1 if instruction.opcode.endswith('-start') else None
  ]  # then: operand, handle
  outer = [
    sum(array.hbm for array in arrays(computation[name].shape)) if name in computation else 0
    for name in instruction.operands
  ]
  if instruction.opcode == 'fusion':
    body = module.computations[called(instruction)[0]]
    inner = {int(i.operands[0]): name for name, i in body.items() if i.opcode == 'parameter'}
    root = list(body.values())[-1]
    roots = [body[name] for name in root.operands] if root.opcode == 'tuple' else [root]
    reads = [_read(body, inner[i], size) for i, size in enumerate(outer)]
  else:
    body, roots = computation, [instruction]
    reads = [
      _read({'': instruction}, name, size)
      for name, size in zip(instruction.operands, outer, strict=True)
    ]
  writes = [
    min(array.hbm, _written(body, root)) for array, root in zip(results, roots, strict=False)
  ]
  return sum(reads) + sum(writes)


def _read(body, name, size):
  """Of the `size` bytes called `name`, those that the instructions of a body read."""
  amount = 0
  for other, user in body.items():
    if name not in user.operands or not size:
      continue
    if (
      user.opcode in ('bitcast', 'copy', 'fusion') and other
    ):  # a fusion within one changes no more than the layout
      amount += _read(body, other, size)
    elif user.operands[0] == name and user.opcode in (
      'dynamic-slice',
      'slice',
      'gather',
      'slice-start',
    ):
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
  size = sum(
    array.bytes for name in instruction.operands for array in arrays(computation[name].shape)
  )
  share = {'all-reduce': 2 * (group - 1) / group, 'all-gather': group - 1, 'collective-permute': 1}
  return size * share.get(kind, (group - 1) / group)


def analyse(module, num_devices, once=False):
  """What one device does in a run of the program, each loop's body counted as often as it runs.

  XLA's cost_analysis counts a loop's body once, whatever its length; `once` does as it does. Of a
  conditional the branch with more FLOPs counts. A collective that the compiler spread over several
  fusions is one chain, and counts once.

  Returns:
    (Counter of 'flops' in products and convolutions, 'passes' (FLOPs of bf16 that they take),
    'bytes' to and from HBM, 'cycles' (XLA:TPU's own guess, without collectives), and for each kind
    of collective (kind, 'count') and (kind, 'sent') bytes; names of the loops of unknown length,
    counted once).
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
          add(
            total,
            {
              (kind, 'count'): 1,
              (kind, 'sent'): sent_bytes(computation, instruction, kind, num_devices),
            },
          )
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
      total['cycles'] += int(
        (re.search(r'estimated_cycles":"(\d+)', instruction.attributes) or ['', 0])[1]
      )
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
