"""What a program that XLA compiled for a GPU launches: each kernel's arithmetic and traffic.

XLA:GPU hands convolutions and large products to cuDNN and cuBLAS as custom calls, of which its own
counts know nothing.
"""

import math
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from launch.chips import Chip
from launch.compiled_counts import COLLECTIVE, FREE, convolution_flops, product_flops, traffic
from launch.compiled_text import Computation, Instruction, Module, arrays, called, group, trip_count
from palm_jax.base.tables import aligned

# Scopes in the program's text -> parts of an iteration; the first that is found.
PARTS = (
  (r'synthesis_network/(b\d+)/(\w+)', r'generator \1 \2'),
  (r'Generator', 'generator, the rest'),
  (r'transpose\(jvp\((?:vmap\()?(?:ResNet|ViT|Nature)', 'encoder, backward'),
  (r'jvp\((?:vmap\()?(?:ResNet|ViT|Nature)', 'encoder, forward'),
  (r'(?:ResNet|ViT|Nature)', 'encoder, acting'),
  (r'transpose\(jvp\((?:vmap\()?(?:Projector|Predictor)', 'heads, backward'),
  (r'(?:Projector|Predictor)', 'heads, forward'),
  (r'Actor|Critic', 'agent'),
  (r'threefry|random', 'random numbers'),
)
REST = 'optimiser, replay, losses'


class Kernel(NamedTuple):
  """Something that is launched.

  Attributes:
    count: launches in a run of the program.
    kind: a custom call's target, a fusion's kind, or an opcode.
    scope: JAX's name of the operation.
    shape: of the result.
    flops: in products and convolutions, of one launch.
    wide: whether they are of float32.
    bytes: to and from memory, of one launch.
  """

  count: float
  kind: str
  scope: str
  shape: str
  flops: int
  wide: bool
  bytes: float

  def seconds(self, chip: Chip) -> float:
    """Of all launches: arithmetic or traffic, whatever takes longer, or the launch itself.

    Products of float32 run as TF32, with half the speed of bf16.
    """
    compute = self.flops / chip.flops * (2 if self.wide else 1)
    return self.count * max(compute, self.bytes / chip.hbm, chip.launch)

  @property
  def part(self) -> str:
    """The part of an iteration that it belongs to."""
    for pattern, name in PARTS:
      match = re.search(pattern, self.scope)
      if match:
        return match.expand(name)
    return REST


def kernels(module: Module) -> list[Kernel]:
  """All kernels of a program; loops as often as they run, of a conditional the larger branch.

  Collectives are left out: `compiled_counts.analyse` counts them.
  """
  found: dict[str, list[Kernel]] = {}

  def of(name):
    if name not in found:
      found[name] = list(_of_computation(module, name, of))
    return found[name]

  return of(module.entry)


def _of_computation(module, name, of) -> Iterable[Kernel]:
  computation = module.computations[name]
  for instruction in computation.values():
    if instruction.opcode == 'while':
      trips = trip_count(module, name, instruction) or 1
      for part in called(instruction):
        yield from (k._replace(count=k.count * trips) for k in of(part))
    elif instruction.opcode == 'conditional':
      branches = [of(part) for part in called(instruction)]
      yield from max(branches, key=lambda branch: sum(k.count * k.flops for k in branch))
    elif instruction.opcode in ('call', 'async-start'):
      yield from of(called(instruction)[0])
    elif instruction.opcode not in FREE and not COLLECTIVE.match(instruction.opcode):
      yield _kernel(module, computation, instruction)


def _kernel(module, computation, instruction):
  kind = instruction.opcode
  if kind == 'custom-call':
    kind = _target(instruction)
  elif kind == 'fusion':
    kind = group(r'"kind":"([^"]+)"', instruction.attributes) or group(
      r'kind=(k\w+)', instruction.attributes
    )
  operands = [computation[name].shape for name in instruction.operands if name in computation]
  return Kernel(
    count=1,
    kind=kind,
    scope=group(r'op_name="([^"]*)"', instruction.attributes),
    shape=instruction.shape,
    flops=_flops(module, computation, instruction),
    wide=any(shape.startswith('f32') for shape in operands[:2]),
    bytes=traffic(module, computation, instruction),
  )


def _flops(module, computation, instruction):
  """Of an instruction, in products and convolutions."""
  if instruction.opcode in ('dot', 'convolution'):
    return product_flops(computation, instruction)
  if instruction.opcode == 'fusion':
    body = module.computations[called(instruction)[0]]
    return sum(_flops(module, body, inner) for inner in body.values())
  if instruction.opcode == 'custom-call':
    return _library_flops(computation, instruction)
  return 0


def _library_flops(computation: Computation, instruction: Instruction) -> int:
  """Of a call of cuDNN or cuBLAS; 0 of other custom calls."""
  target = _target(instruction)
  if 'conv' in target.lower():
    # The labels are those of the forward convolution of x and w to y, whichever is asked for.
    out = arrays(instruction.shape)[0].dims
    first, second = (arrays(computation[name].shape)[0].dims for name in instruction.operands[:2])
    x, w, y = first, second, out
    if 'BackwardInput' in target:
      x, w, y = out, second, first
    elif 'BackwardFilter' in target:
      x, w, y = first, out, second
    return convolution_flops(x, w, y, instruction.attributes)
  if 'cublas' in target or 'gemm' in target:
    left = arrays(computation[instruction.operands[0]].shape)[0].dims
    contracted = group(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.attributes)
    inner = [left[int(i)] for i in re.findall(r'\d+', contracted)]
    return 2 * math.prod(arrays(instruction.shape)[0].dims) * math.prod(inner)
  return 0


def _target(instruction):
  return group(r'custom_call_target="([^"]+)"', instruction.attributes)


def table_of_parts(launched: Sequence[Kernel], chip: Chip) -> str:
  """An iteration's kernels by part, the longest first."""
  parts: dict[str, list[Kernel]] = {}
  for kernel in launched:
    parts.setdefault(kernel.part, []).append(kernel)
  seconds = lambda of: sum(k.seconds(chip) for k in of)
  rows = [
    (
      name,
      f'{sum(k.count for k in of):.0f}',
      f'{sum(k.count * k.flops for k in of) / 1e9:.1f}',
      f'{sum(k.count * k.bytes for k in of) / 1e9:.3f}',
      f'{1e3 * seconds(of):.3f}',
    )
    for name, of in sorted(parts.items(), key=lambda item: -seconds(item[1]))
  ]
  return '\n'.join(aligned([('part', 'launches', 'GFLOP', 'GB', 'ms'), *rows]))


def table_of_kernels(launched: Sequence[Kernel], chip: Chip, count: int = 10) -> str:
  """The kernels that move most, then those that compute most."""
  row = lambda k: (
    k.scope[-60:],
    k.kind,
    k.shape[:40],
    f'{k.count * k.bytes / 1e6:.1f}',
    f'{k.count * k.flops / 1e9:.1f}',
    f'{1e3 * k.seconds(chip):.3f}',
  )
  most = lambda key: sorted(launched, key=key)[:count]
  rows = [*most(lambda k: -k.count * k.bytes), *most(lambda k: -k.count * k.flops)]
  head = 'of', 'kernel', 'result', 'MB', 'GFLOP', 'ms'
  return '\n'.join(aligned([head, *map(row, rows)], left=3))
