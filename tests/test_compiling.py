"""What takes XLA long is said, with its name, while it is being compiled and no longer."""

import functools
import threading
import time

import jax
import jax.numpy as jnp
import pytest
from absl import logging

from palm_jax.base import compiling, devices

EVENT = '/jax/core/compile/backend_compile_duration'


@pytest.fixture
def said(monkeypatch):
  lines = []
  monkeypatch.setattr(compiling, 'QUIET', 0.0)
  monkeypatch.setattr(compiling, 'LEAST', 0.0)
  monkeypatch.setattr(compiling, 'POLL', 0.01)
  monkeypatch.setattr(compiling.logging, 'info', lambda text, *values: lines.append(text % values))
  return lines


def test_a_compilation_is_announced_while_it_lasts(said):
  compiling.announce()

  def slow_program(x):
    for i in range(300):
      x = jnp.sin(x) @ jnp.full((2, 2), float(i))
    return x

  try:
    jax.jit(slow_program)(jnp.ones((2, 2)))
    assert said and {line.split()[1] for line in said} <= {*compiling.STAGES.values()}
    assert any('compiling jit(slow_program)' in line and line.endswith('s now') for line in said)
    count = len(said)
    time.sleep(0.2)
    assert len(said) == count and not compiling._running
  finally:
    jax.monitoring.unregister_scalar_listener(compiling._begin)
    jax.monitoring.unregister_event_duration_listener(compiling._end)
    logging.get_absl_logger().removeFilter(compiling._heard)


def test_nothing_is_said_where_other_lines_are(said, monkeypatch):
  monkeypatch.setattr(compiling, 'QUIET', 60.0)
  threading.Thread(target=compiling._watch, daemon=True).start()
  compiling._heard()
  compiling._begin(EVENT, 0.0, fun_name='jit_f')
  time.sleep(0.1)
  assert not said
  monkeypatch.setattr(compiling, 'QUIET', 0.05)
  deadline = time.monotonic() + 30
  while not said and time.monotonic() < deadline:
    time.sleep(0.02)
  compiling._end(EVENT, 0.0)
  assert said and 'jit_f' in said[0]


def test_a_cache_that_cannot_be_used_is_one_line_once(monkeypatch):
  lines, others = [], []
  monkeypatch.setattr(compiling, '_cache_said', False)
  monkeypatch.setattr(compiling.logging, 'warning', lambda text, *x: lines.append(text % x))
  show = functools.partial(compiling._of_cache, lambda *x, **more: others.append(x))
  for _ in range(2):
    show(UserWarning('Error reading persistent compilation cache entry\n"x"'), UserWarning, 'f', 1)
  show(UserWarning('of something else'), UserWarning, 'f', 1)
  assert len(lines) == len(others) == 1 and 'JAX_COMPILATION_CACHE_DIR' in lines[0]


def test_our_function_that_compiles_is_named():
  compiling._begin(EVENT, 0.0, fun_name='jit_f')
  names = [c.name for c in compiling._running.values()]
  compiling._end(EVENT, 0.0)
  assert names == ['jit_f'] and not compiling._running
  module = dict(vars(devices))
  exec('def call(f):\n  return f()', module)  # as a function of palm_jax.base.devices
  module['call'](lambda: compiling._begin(EVENT, 0.0, fun_name='jit_f'))
  names = [c.name for c in compiling._running.values()]
  compiling._end(EVENT, 0.0)
  assert names == ['jit_f of base.devices.call']
  compiling._begin('/jax/another/event', 0.0)
  assert not compiling._running
