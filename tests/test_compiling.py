"""Looking at what another thread does must not stop it."""

import subprocess
import sys

SCRIPT = """
import _thread, gc, os, sys, threading, time
from palm_jax.base.compiling import frame_of

sys.setswitchinterval(1e-6)
gc.callbacks.append(lambda *_: [i for i in range(300)])  # Python code, as JAX has there
gc.set_threshold(1)
thread, end = threading.get_ident(), time.monotonic() + 3


def look():
  while time.monotonic() < end:
    assert frame_of(thread)


def deep(n):
  return [deep(n - 1)] if n else []


threading.Thread(target=look, daemon=True).start()
while time.monotonic() < end:
  deep(6)
  _thread.start_new_thread(deep, (2,))  # threads that end
print('done', gc.isenabled(), flush=True)
os._exit(0)
"""


def test_threads_can_end_while_frames_are_looked_at():
  """With collections of garbage in between this stands still within a second."""
  done = subprocess.run([sys.executable, '-c', SCRIPT], capture_output=True, text=True, timeout=60)
  assert done.stdout == 'done True\n', done.stderr
