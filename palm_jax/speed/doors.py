"""How fast the world is played in through each of its doors, beside the bare compiled rollout."""

import importlib.util
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from palm_jax import environment
from palm_jax.generator import PictureGenerator
from palm_jax.speed import timing
from palm_jax.world import make

STEPS = 8  # of each environment, in a turn
BARE = 'compiled rollout'


def measure(generator: PictureGenerator, count: int) -> dict[str, float]:
  """Frames a second of `count` environments under random actions, the doors taking turns.

  Args:
    generator: with any weights.
    count: environments at once.

  Returns:
    {door: frames a second}; Gymnasium's where that is installed.
  """
  world, params = make(generator)
  turns = {BARE: _rollout(world, params, count), 'gymnax, vmap': _vmapped(world, params, count)}
  if importlib.util.find_spec('gymnasium') is not None:
    turns['Gymnasium batch'] = _gymnasium(world, params, count)
  times = {name: [] for name in turns}
  for _ in range(timing.REPEATS + 1):
    for name, turn in turns.items():
      times[name].append(timing.seconds(turn)[0])
  rates = {name: count * STEPS / statistics.median(taken[1:]) for name, taken in times.items()}
  logging.info('%s', table(rates, count))
  return rates


def _rollout(world, params, count) -> Callable[[], Any]:
  """All steps in one compiled call, as pretraining plays."""
  ids = jnp.arange(count)

  def play(state, params, key):
    def step(state, t):
      keys = environment.env_keys(jax.random.fold_in(key, t), ids)
      actions = environment.random_actions(keys, world.num_actions, jnp.float32)
      seen, state, *_ = world.step_all(keys, state, actions, params)
      return state, seen

    return jax.lax.scan(step, state, jnp.arange(STEPS))

  key = jax.random.key(0)
  _, state = jax.jit(world.reset_all)(environment.env_keys(key, ids), params)
  call = jax.jit(play)
  return lambda: call(state, params, key)


def _vmapped(world, params, count):
  """gymnax's `step` under vmap, a call a step; it draws two pictures each."""
  keys = jax.random.split(jax.random.key(0), count)
  _, state = jax.jit(jax.vmap(world.reset, (0, None)))(keys, params)
  step = jax.jit(jax.vmap(world.step, (0, 0, 0, None)))
  actions = _actions(world, count)

  def turn():
    now = state
    for t in range(STEPS):
      seen, now, *_ = step(keys, now, actions[t], params)
    return seen

  return turn


def _gymnasium(world, params, count):
  """The batch of Gymnasium, whose pictures come to the host with each step."""
  from palm_jax.world.gym import LatentManifoldVectorEnv

  envs = LatentManifoldVectorEnv(count, world=(world, params))
  envs.reset(seed=0)
  actions = _actions(world, count)

  def turn():
    for t in range(STEPS):
      seen, *_ = envs.step(actions[t])
    return seen

  return turn


def _actions(world, count):
  generator = np.random.default_rng(0)
  return generator.uniform(-1, 1, (STEPS, count, world.num_actions)).astype(np.float32)


def table(rates: dict[str, float], count: int) -> str:
  """The rates in one line, each with its ratio to the bare rollout's."""
  words = ', '.join(
    f'{name} {rate:,.1f} ({rate / rates[BARE]:.2f})' for name, rate in rates.items()
  )
  return f'frames/s of {count} environments by door (ratio): {words}'
