"""Loops that are stopped and resumed."""

import signal
import threading

from palm_jax.base.processes import any_process


class Preemption:
  """Within it SIGTERM only sets a flag: the loop asks `requested` once an iteration, saves, and
  leaves with code 0."""

  def __enter__(self):
    self._flag = False
    # Python allows handlers in the main thread only; elsewhere the signal keeps its meaning.
    self._main = threading.current_thread() is threading.main_thread()
    self._before = signal.signal(signal.SIGTERM, self._set) if self._main else None
    return self

  def __exit__(self, *_):
    if self._main:
      signal.signal(signal.SIGTERM, self._before)

  def _set(self, *_):
    self._flag = True

  @property
  def requested(self):
    """Whether any process was told to stop; all processes must ask together, and get one answer."""
    return any_process(self._flag)
