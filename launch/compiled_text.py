"""The text of a compiled program taken apart: its instructions, arrays and loops."""

import math
import re
from typing import NamedTuple


class Instruction(NamedTuple):
  """One line of a computation."""

  shape: str
  opcode: str
  operands: tuple[str, ...]  # names; what stands in the brackets of a parameter or constant
  attributes: str


Computation = dict[str, Instruction]  # by name, in order; the last instruction is the result


class Array(NamedTuple):
  """An array of a shape."""

  dims: tuple[int, ...]
  bytes: float
  hbm: float  # bytes, padding included; 0 for what the compiler keeps on the chip


class Module(NamedTuple):
  """A compiled program taken apart."""

  computations: dict[str, Computation]
  entry: str
  callers: dict[str, tuple[str, Instruction]]  # computation -> where it is called


COPIES = ('copy', 'bitcast', 'convert', 'copy-start', 'copy-done')


def parse(text: str) -> Module:
  """Takes the text of a compiled program apart."""
  computations = {}
  callers = {}
  entry = ''
  name = ''
  for line in text.splitlines():
    head = re.match(r'(ENTRY )?%?([\w.-]+) \(.*\{$', line)
    if head:
      name = head[2]
      computations[name] = {}
      if head[1]:
        entry = name
    match = re.match(r'\s+(?:ROOT )?%?([\w.-]+) = (.*)', line)
    if match:
      instruction = _instruction(match[2])
      computations[name][match[1]] = instruction
      callers |= dict.fromkeys(called(instruction), (name, instruction))
  return Module(computations, entry, callers)


def _instruction(text):
  """'f32[8]{0} add(%a, %b), metadata=...' -> Instruction."""
  shape, rest = _brackets(text) if text[0] == '(' else text.split(' ', 1)
  opcode = group(r'^\s*([\w-]+)', rest)
  inside, attributes = _brackets(rest.lstrip()[len(opcode) :])
  operands = re.findall(r'%([\w.-]+)', inside)
  if not operands and inside[1:-1]:
    operands = [inside[1:-1]]
  return Instruction(shape, opcode, tuple(operands), attributes)


def _brackets(text):
  """'(a (b) c) rest' -> '(a (b) c)', ' rest'."""
  depth = 0
  for i, c in enumerate(text):
    depth += (c == '(') - (c == ')')
    if not depth:
      return text[: i + 1], text[i + 1 :]
  raise ValueError(text)


def group(pattern: str, text: str, default: str = '') -> str:
  """What the first group of a pattern finds in a text."""
  match = re.search(pattern, text)
  return match[1] if match else default


def called(instruction: Instruction) -> list[str]:
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


def arrays(shape: str) -> list[Array]:
  """The arrays of a shape's text, such as '(f32[8,100]{1,0:T(8,128)S(1)}, u32[])'.

  {1,0: minor dimension first; T(8,128): padded to tiles of that; S(1): a memory that is not HBM.
  """
  found = []
  for kind, sizes, layout in re.findall(r'\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?', shape):
    dims = tuple(int(size) for size in sizes.split(',') if size)
    itemsize = 1 if kind == 'pred' else int(group(r'^[a-z]+(\d+)', kind, '0')) / 8
    order = [int(i) for i in re.findall(r'\d+', layout.partition(':')[0])]
    tile = [int(i) for i in re.findall(r'\d+', group(r':T\(([\d,]*)\)', layout))][::-1]
    padded = [-(-dims[i] // t) * t for i, t in zip(order, tile, strict=False)] if dims else []
    rest = [dims[i] for i in order[len(padded) :]] if order else dims
    hbm = 0 if re.search(r'S\([1-9]', layout) else math.prod(padded) * math.prod(rest) * itemsize
    found.append(Array(dims, math.prod(dims) * itemsize, hbm))
  return found


def constant(module: Module, computation: str, name: str) -> int | None:
  """The integer that a name of a computation stands for, None where it is not a constant.

  It is followed through copies, tuples, and into the computations around this one.
  """
  instruction = module.computations[computation][name]
  operand = instruction.operands[0]
  if instruction.opcode == 'constant':
    return int(operand) if re.fullmatch(r'-?\d+', operand) else None
  if instruction.opcode in COPIES:
    return constant(module, computation, operand)
  if instruction.opcode != 'get-tuple-element':
    return None
  source = module.computations[computation][operand]
  # The parameter of a loop, or of a branch of a conditional.
  if source.opcode == 'parameter' and computation in module.callers:
    outer, caller = module.callers[computation]
    position = called(caller).index(computation) + 1 if caller.opcode == 'conditional' else 0
    computation = outer
    source = module.computations[outer][caller.operands[position]]
  if source.opcode == 'tuple':
    return constant(module, computation, source.operands[_index(instruction)])
  return None


def _index(instruction):
  return int(group(r'index=(\d+)', instruction.attributes))


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


def trip_count(module: Module, computation: str, loop: Instruction) -> int | None:
  """How often a while loop of this computation runs, None where that is not known.

  It is XLA's note, or follows from `i = start; while i < limit: i += step`.
  """
  known = group(r'known_trip_count\W+n\W+(\d+)', loop.attributes)
  if known:
    return int(known)
  condition_name = group(r'condition=%?([\w.-]+)', loop.attributes)
  body_name = group(r'body=%?([\w.-]+)', loop.attributes)
  condition = module.computations[condition_name]
  body = module.computations[body_name]
  test = _alone(module, list(condition.values())[-1])
  result = list(body.values())[-1]
  init = module.computations[computation][loop.operands[0]]
  if test.opcode != 'compare' or 'direction=LT' not in test.attributes:
    return None
  if init.opcode != 'tuple' or result.opcode != 'tuple':
    return None
  counter = _uncopied(condition, test.operands[0])
  if counter.opcode != 'get-tuple-element':
    return None
  index = _index(counter)
  total = _alone(module, _uncopied(body, result.operands[index]))
  sources = {name: _uncopied(body, name) for name in total.operands}
  added = [
    name
    for name, source in sources.items()
    if source.opcode != 'get-tuple-element' or _index(source) != index
  ]
  if total.opcode != 'add' or len(added) != 1:
    return None
  start = constant(module, computation, init.operands[index])
  limit = constant(module, condition_name, test.operands[1])
  step = constant(module, body_name, added[0])
  if start is None or limit is None or step is None:
    return None
  return -(-(limit - start) // step)
