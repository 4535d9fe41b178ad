"""How an iteration grows with one setting: time, FLOPs and memory, side by side in one run."""

import math
import pathlib
import statistics
from typing import Any, NamedTuple

from absl import logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from palm_jax import worlds
from palm_jax.base import checks
from palm_jax.base.errors import UserError
from palm_jax.speed import cost, plan, timing, workload

RATIOS = 'seconds', 'flops', 'bytes'


class Case(NamedTuple):
  """A setting at a multiple of its value, compiled."""

  key: str  # '' is the config as it is
  times: int
  call: Any
  state: Any
  world: Any
  iterations: int  # of a call
  flops: int  # an iteration and device
  bytes: int  # that a call needs on a device


def grown(config: ConfigDict, key: str, times: float) -> ConfigDict:
  """A copy of the config in which one setting has `times` its value.

  Raises:
    UserError: the setting does not exist, is no number, or cannot have that value.
  """
  c = config.copy_and_resolve_references()
  flat = checks.flatten(c.to_dict())
  if isinstance(flat.get(key), bool) or not isinstance(flat.get(key), int | float):
    raise UserError(
      f'benchmark.grow: {key!r} is no number of the config: expected a key such as '
      f'pretrain.num_envs{checks.nearest(key, flat)}'
    )
  value = times * flat[key]
  if isinstance(flat[key], int):
    if value % 1:
      raise UserError(
        f'benchmark.times: {times} times {key}={flat[key]} is no whole number: give others'
      )
    value = int(value)
  c.update_from_flattened_dict({key: value})
  return c


def measure(config: ConfigDict, workdir: pathlib.Path, mesh: Mesh) -> list[dict[str, Any]]:
  """Seconds, FLOPs and bytes of an iteration, for the config and for each of benchmark.grow.

  The cases take turns, so that other load on the machine affects all alike.

  Args:
    config: the whole config.
    workdir: of the job, where its own generator would be.
    mesh: one-dimensional, axis 'data'.

  Returns:
    a dict for each case: key, times, seconds (median), flops, bytes, and the ratios of the three
    to those of the first.

  Raises:
    UserError: settings that cannot work.
  """
  b = config.benchmark
  wanted = [('', 1), *((key, times) for key in b.grow for times in b.times)]
  configs = [grown(config, *case) if case[0] else config for case in wanted]
  cases = []
  for (key, times), c in zip(wanted, configs, strict=True):
    logging.info('growth: compiling case %d of %d', len(cases) + 1, len(wanted))
    cases.append(_compile(c, key, times, workdir, mesh))
  seconds = [[] for _ in cases]
  for turn in range(timing.REPEATS + 1):
    for i, case in enumerate(cases):
      took, (state, _) = timing.seconds(lambda case=case: case.call(case.state, case.world))
      seconds[i].append(took / case.iterations)
      cases[i] = case._replace(state=state)
    logging.info('growth: turn %d of %d', turn, timing.REPEATS)
  rows: list[dict[str, Any]] = []
  for case, found in zip(cases, seconds, strict=True):
    row = dict(key=case.key, times=case.times, seconds=statistics.median(found[1:]))
    row |= dict(flops=case.flops, bytes=case.bytes)
    rows.append(row | {f'{name}_ratio': row[name] / (rows or [row])[0][name] for name in RATIOS})
  logging.info('growth:\n%s', table(rows))
  return rows


def _compile(config, key, times, workdir, mesh):
  generator = workload.draw_weights(plan.make_generator(config, workdir))
  program, state, world = workload.ready(config, worlds.as_world(config, generator), mesh)
  traced = program.call.trace(state, world)
  iterations = config.pretrain.iterations_per_call
  compiled = traced.lower().compile()
  needed = sum(cost.compiled_bytes(compiled).values())
  flops = math.ceil(cost.flops(traced) / iterations)
  return Case(key, times, compiled, state, world, iterations, flops, needed)


def table(rows: list[dict[str, Any]]) -> str:
  """The rows of `measure` in lines of text."""
  lines = [f'{"an iteration with":32}{"ms":>10}{"x":>7}{"GFLOP":>10}{"x":>7}{"MiB":>10}{"x":>7}']
  for row in rows:
    name = f'{row["times"]} x {row["key"]}' if row['key'] else 'the config as it is'
    measures = zip(RATIOS, (1e3, 1e-9, 2**-20), strict=True)
    lines.append(
      f'{name:32}'
      + ''.join(f'{row[m] * unit:10,.1f}{row[f"{m}_ratio"]:7.2f}' for m, unit in measures)
    )
  return '\n'.join(lines)
