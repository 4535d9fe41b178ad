"""Says in the log what is being compiled, when that takes long: XLA itself says nothing."""

import sys
import threading
import time
from typing import NamedTuple

import jax
from absl import logging

FIRST = 15.0  # seconds until the first line; each waits twice as long as the one before
POLL = 1.0  # seconds between looks
EVENT = '/jax/core/compile/backend_compile_duration'  # of jax.monitoring, at its begin and its end


class Compilation(NamedTuple):
  """A program and the time at which XLA was given it."""

  name: str
  since: float


_running: dict[int, Compilation] = {}  # of each thread


def announce() -> None:
  """Starts a thread that says what takes long.

  JAX says by itself when it begins and ends. To look from there at the frames of the thread that
  compiles would not be safe: taking them can stop the process for ever (python/cpython#106883).
  """
  jax.monitoring.register_scalar_listener(_begin)
  jax.monitoring.register_event_duration_secs_listener(_end)
  threading.Thread(target=_watch, daemon=True).start()


def _begin(event, value, **about):
  del value
  if event == EVENT:
    name = about.get('fun_name', 'a program')
    _running[threading.get_ident()] = Compilation(f'{name}{_caller()}', time.monotonic())


def _end(event, duration_secs, **about):
  del duration_secs, about
  if event == EVENT:
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
  due = {}  # seconds after which the next line about a compilation is said
  while True:
    time.sleep(POLL)
    running = list(_running.values())
    due = {compilation: due.get(compilation, FIRST) for compilation in running}
    for compilation in running:
      elapsed = time.monotonic() - compilation.since
      if elapsed >= due[compilation]:
        logging.info('still compiling %s, for %.0f s now', compilation.name, elapsed)
        due[compilation] *= 2
