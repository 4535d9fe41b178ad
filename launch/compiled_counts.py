"""What a compiled program does, counted in its text: arithmetic, traffic to memory, bytes sent.

XLA's own counts take a loop's body once, whatever its length. These take it as often as it runs.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from launch.compiled_text import Computation, Instruction, Module, arrays, called, group, trip_count

COLLECTIVE = re.compile(
  r'(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?$'
)
# Without traffic of their own.
FREE = frozenset(
  'parameter constant tuple get-tuple-element bitcast after-all partition-id replica-id copy-done '
  'slice-done async-update async-done opt-barrier while conditional call all-reduce-done '
  'all-gather-done collective-permute-done'.split()
)
WORKSPACE = re.compile(r', [us]8\[\d+\]\{0\}\)$')  # of XLA:GPU's calls of cuDNN and cuBLAS
PASSES = {'highest': 6, 'high': 3}  # bf16 products that make one of float32: jax.lax.Precision
SLICES = ('dynamic-slice', 'slice', 'gather', 'slice-start')


def product_flops(computation: Computation, instruction: Instruction) -> int:
  """FLOPs of a convolution or matrix product, without those on padding, as XLA counts them."""
  left, right = (arrays(computation[name].shape)[0].dims for name in instruction.operands[:2])
  out = arrays(instruction.shape)[0].dims
  if instruction.opcode == 'dot':
    contracted = group(r'lhs_contracting_dims=\{([\d,]*)\}', instruction.attributes)
    return 2 * math.prod(out) * math.prod(left[int(i)] for i in contracted.split(',') if i)
  return convolution_flops(left, right, out, instruction.attributes)


def convolution_flops(
  left: Sequence[int], right: Sequence[int], out: Sequence[int], attributes: str
) -> int:
  """FLOPs of a convolution of arrays with these sizes; their axes are named in the attributes."""
  left_names, right_names, out_names = re.findall(r'dim_labels=(\w+)_(\w+)->(\w+)', attributes)[0]
  window = dict(item.split('=') for item in group(r'window=\{([^}]*)\}', attributes).split())
  spatial = lambda key, default: window.get(key, 'x'.join([default] * (len(out) - 2))).split('x')
  batch = left[left_names.index('b')]
  total = 2 * batch * right[right_names.index('i')] * right[right_names.index('o')]
  total //= int(group(r'batch_group_count=(\d+)', attributes, '1'))
  for i in range(len(out) - 2):
    size = int(spatial('size', '1')[i])
    stride = int(spatial('stride', '1')[i])
    hole = int(spatial('lhs_dilate', '1')[i])
    spread = int(spatial('rhs_dilate', '1')[i])
    pad = int(spatial('pad', '0_0')[i].split('_')[0])
    # (outputs, taps): where each tap of the kernel meets the dilated input.
    steps = np.arange(out[out_names.index(str(i))])[:, None] * stride
    place = steps + np.arange(size) * spread - pad
    last = (left[left_names.index(str(i))] - 1) * hole
    total *= int(np.sum((place >= 0) & (place <= last) & (place % hole == 0)))
  return total


def traffic(module: Module, computation: Computation, instruction: Instruction) -> float:
  """Bytes that an instruction outside of fusions reads from and writes to HBM.

  A slice, or an update in place, counts with what it touches.
  """
  if instruction.opcode in FREE:
    return 0
  results = arrays(instruction.shape)
  if instruction.opcode.endswith('-start') or WORKSPACE.search(instruction.shape):
    results = results[:1]  # the operand and a handle follow, or what a library writes notes on
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
    body = computation
    roots = [instruction]
    alone = {'': instruction}
    sizes = zip(instruction.operands, outer, strict=True)
    reads = [_read(alone, name, size) for name, size in sizes]
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
    # A fusion within one changes no more than the layout.
    if user.opcode in ('bitcast', 'copy', 'fusion') and other:
      amount += _read(body, other, size)
    elif user.operands[0] == name and user.opcode in SLICES:
      amount += arrays(user.shape)[0].bytes
    elif user.operands[0] != name or user.opcode not in ('dynamic-update-slice', 'scatter'):
      return size
  return min(size, amount)


def _written(body, instruction):
  """Bytes that an update in place writes; infinite for all else."""
  while instruction.opcode in ('bitcast', 'copy') and instruction.operands[0] in body:
    instruction = body[instruction.operands[0]]
  if instruction.opcode == 'dynamic-update-slice':
    return arrays(body[instruction.operands[1]].shape)[0].bytes
  return math.inf


def sent_bytes(
  computation: Computation, instruction: Instruction, kind: str, num_devices: int
) -> float:
  """What a device sends in a collective, as rings do it."""
  groups = re.search(r'replica_groups=(?:\{\{([\d,]*)\}|\[\d+,(\d+)\])', instruction.attributes)
  members = num_devices
  if groups:
    members = len(groups[1].split(',')) if groups[1] else int(groups[2])
  size = sum(
    array.bytes for name in instruction.operands for array in arrays(computation[name].shape)
  )
  share = {
    'all-reduce': 2 * (members - 1) / members,
    'all-gather': members - 1,
    'collective-permute': 1,
  }
  return size * share.get(kind, (members - 1) / members)


def analyse(module: Module, num_devices: int, once: bool = False) -> tuple[Counter, list[str]]:
  """What one device does in a run of the program.

  Each loop's body counts as often as it runs, and of a conditional the branch with more FLOPs. A
  collective that the compiler spread over several fusions is one chain, and counts once.

  Args:
    module: of `parse`.
    num_devices: that the program runs on.
    once: count a loop's body once, whatever its length, as XLA's cost_analysis does.

  Returns:
    (Counter of 'flops' in products and convolutions, 'passes' (FLOPs of bf16 that they take),
    'bytes' to and from HBM, 'cycles' (XLA:TPU's own guess, without collectives), and for each kind
    of collective (kind, 'count') and (kind, 'sent') bytes; names of the loops of unknown length,
    counted once).
  """
  analysis = _Analysis(module, num_devices, once)
  return analysis.run(module.entry), analysis.unknown


class _Analysis:
  """The counts of a module's computations; see `analyse`.

  Attributes:
    unknown: names of the loops of unknown length.
  """

  def __init__(self, module, num_devices, once):
    self.module = module
    self.num_devices = num_devices
    self.once = once
    self.unknown = []
    self.counted = {}  # computation -> Counter

  def run(self, name):
    """The Counter of a computation and all that it calls."""
    if name in self.counted:
      return self.counted[name]
    total = self.counted[name] = Counter()
    computation = self.module.computations[name]
    self.count_products(name, total, set())
    for label, instruction in computation.items():
      cycles = int(group(r'estimated_cycles":"(\d+)', instruction.attributes, '0'))
      _add(total, dict(bytes=traffic(self.module, computation, instruction), cycles=cycles))
      if instruction.opcode == 'while':
        trips = 1 if self.once else trip_count(self.module, name, instruction)
        if trips is None:
          self.unknown.append(label)
        for part in called(instruction):
          _add(total, self.run(part), trips or 1)
      elif instruction.opcode == 'conditional':
        branches = [self.run(part) for part in called(instruction)]
        _add(total, max(branches, key=lambda branch: branch['flops']))
      elif instruction.opcode in ('call', 'async-start'):
        _add(total, self.run(called(instruction)[0]))
    return total

  def count_products(self, name, total, chains):
    """Adds the products and collectives of a computation and of the fusions in it.

    Args:
      name: of the computation.
      total: Counter to add to.
      chains: ids of the chains that are counted.
    """
    computation = self.module.computations[name]
    for instruction in computation.values():
      collective = COLLECTIVE.match(instruction.opcode)
      if instruction.opcode in ('convolution', 'dot'):
        flops = product_flops(computation, instruction)
        precision = group(r'operand_precision=\{(\w+)', instruction.attributes)
        _add(total, dict(flops=flops, passes=flops * PASSES.get(precision, 1)))
      elif collective:
        chain = group(r'chain_id="?(\d+)', instruction.attributes)
        if not chain or chain not in chains:
          kind = collective[1]
          sent = sent_bytes(computation, instruction, kind, self.num_devices)
          _add(total, {(kind, 'count'): 1, (kind, 'sent'): sent})
        chains.add(chain)
      elif instruction.opcode == 'fusion':
        self.count_products(called(instruction)[0], total, chains)


def _add(total: Counter, other: Mapping[Any, Any], times: int = 1):
  for key, value in other.items():
    total[key] += value * times
