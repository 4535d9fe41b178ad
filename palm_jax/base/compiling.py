"""Says in the log what is being compiled, when that takes long: XLA itself says nothing."""

import gc
import sys
import threading
import time
import types

from absl import logging

FIRST = 15.0  # seconds until the first line; each waits twice as long as the one before
INSIDE = 'backend_compile_and_load'  # of jax/_src/compiler.py, while XLA works


def announce() -> None:
  """Starts a thread that watches what the calling thread compiles."""
  thread = threading.get_ident()
  threading.Thread(target=_watch, args=(thread,), daemon=True).start()


def _watch(thread):
  program, since, due = None, 0.0, FIRST
  while True:
    time.sleep(1)
    now = compiled_by(frame_of(thread))
    if now != program:
      program, since, due = now, time.monotonic(), FIRST
    elif program and time.monotonic() - since >= due:
      logging.info('still compiling %s, for %.0f s now', program[1], time.monotonic() - since)
      due *= 2


def frame_of(thread: int) -> types.FrameType | None:
  """The frame that a thread is in now, by its identity; None where it has ended.

  Without garbage collection: Python takes the frames under a lock that every thread needs when it
  ends. Collecting runs Python code there, which gives the interpreter away, and nobody gets on
  (python/cpython#106883; seen with tensorstore's threads while a checkpoint was written).
  """
  collecting = gc.isenabled()
  gc.disable()
  try:
    return sys._current_frames().get(thread)
  finally:
    if collecting:
      gc.enable()


def compiled_by(frame) -> tuple[int, str] | None:
  """(id, name) of the program that a frame, or one that led to it, waits for, or None.

  The name is as JAX has it, and of ours the function that called it.
  """
  while frame and frame.f_code.co_name != INSIDE:
    frame = frame.f_back
  if not frame:
    return None
  name = frame.f_locals.get('module_name', 'a program')
  caller = frame
  while caller and not caller.f_globals.get('__name__', '').startswith('palm_jax.'):
    caller = caller.f_back
  if caller:
    name += f' of {caller.f_globals["__name__"].removeprefix("palm_jax.")}.{caller.f_code.co_name}'
  return id(frame), name
