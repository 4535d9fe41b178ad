"""Says in the log what is being compiled, when nothing else is said for long: XLA is silent."""

import functools
import logging as python_logging
import sys
import threading
import time
import warnings
from typing import NamedTuple

import jax
from absl import logging

from palm_jax.base.errors import one_line

QUIET = 8.0  # seconds without any line until one is said
LEAST = 1.0  # seconds that what is named has taken
POLL = 1.0  # seconds between looks
# Of jax.monitoring, at its begin and its end, and what is done between.
STAGES = {
  '/jax/core/compile/jaxpr_trace_duration': 'tracing',
  '/jax/core/compile/jaxpr_to_mlir_module_duration': 'lowering',
  '/jax/core/compile/backend_compile_duration': 'compiling',
}


class Compilation(NamedTuple):
  """A program, what is being done with it, and the time at which that began."""

  name: str
  stage: str
  since: float


_running: dict[int, Compilation] = {}  # of each thread
_spoken = 0.0  # when the last line was said
_cache_said = False


def announce() -> None:
  """Starts a thread that says what takes long.

  JAX says by itself when it begins and ends. To look from there at the frames of the thread that
  compiles would not be safe: taking them can stop the process for ever (python/cpython#106883).
  """
  jax.monitoring.register_scalar_listener(_begin)
  jax.monitoring.register_event_duration_secs_listener(_end)
  logging.get_absl_logger().addFilter(_heard)
  _heard()
  warnings.showwarning = functools.partial(_of_cache, warnings.showwarning)
  threading.Thread(target=_watch, daemon=True).start()


def _of_cache(others, message, *about, **more):
  """Says once, in one line, that compiled programs cannot be read or kept; shows other warnings."""
  global _cache_said
  if 'persistent compilation cache' not in str(message):
    others(message, *about, **more)
  elif not _cache_said:
    _cache_said = True
    logging.warning(
      'compiled programs are not all kept or read, which only costs time (%s): see that '
      'JAX_COMPILATION_CACHE_DIR is a folder with space, and empty it',
      one_line(message),
    )


def _heard(record: python_logging.LogRecord | None = None) -> bool:
  del record
  global _spoken
  _spoken = time.monotonic()
  return True


def _begin(event, value, **about):
  del value
  if event in STAGES:
    name = f'{about.get("fun_name", "a program")}{_caller()}'
    _running[threading.get_ident()] = Compilation(name, STAGES[event], time.monotonic())


def _end(event, duration_secs, **about):
  del duration_secs, about
  if event in STAGES:
    _running.pop(threading.get_ident(), None)


def _caller():
  """' of ' the innermost of our functions that led here, or ''."""
  frame = sys._getframe()
  while frame := frame.f_back:
    module = frame.f_globals.get('__name__', '')
    if module.startswith('palm_jax.') and module != __name__:
      return f' of {module.removeprefix("palm_jax.")}.{frame.f_code.co_name}'
  return ''


def _watch():
  while True:
    time.sleep(POLL)
    running = sorted(_running.values(), key=lambda compilation: compilation.since)
    now = time.monotonic()
    if now - _spoken < QUIET or not running:
      continue
    name, stage, since = running[0]
    if now - since >= LEAST:
      logging.info('still %s %s, for %.0f s now', stage, name, now - since)
