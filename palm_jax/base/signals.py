"""Signals that end a command: Ctrl-C (SIGINT), SIGTERM, and SIGHUP of a closed terminal.

From `watch` on they raise Interrupted, so that nothing half-written stays. Where Python does not
run for long (a compilation), or the exception is lost in a callback, a thread ends the process. A
training that has something to save takes them itself: see base.training.Preemption.
"""

import atexit
import contextlib
import os
import pathlib
import select
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

HANGUP = getattr(signal, 'SIGHUP', 0)  # Windows has none
SIGNALS = tuple(filter(None, (signal.SIGINT, signal.SIGTERM, HANGUP)))
GRACE = 5.0  # seconds for the way out by an exception
MESSAGE = 'interrupted: the same command resumes what was saved'

# Files and folders that are being written, to be removed where the process ends at once.
unfinished: set[pathlib.Path] = set()
# Each says whether it saves and stops on a signal.
holders: list[Callable[[], bool]] = []
_watching = False
_importing = False
_said = False
_ending = 0  # the signal that ends this command, so that errors of what is taken apart mean nothing


class Interrupted(KeyboardInterrupt):
  """A signal ends the work.

  Attributes:
    number: of the signal.
    agreed: whether all processes of the run end by it together.
  """

  def __init__(self, number: int = signal.SIGINT, agreed: bool = False):
    super().__init__()
    self.number = number
    self.agreed = agreed


def exit_code(number: int) -> int:
  """As a shell has it: 130 after Ctrl-C."""
  return 128 + number


def taken() -> list[int]:
  """The signals that mean something here: nohup has SIGHUP ignored, and a shell's & Ctrl-C."""
  return [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]


def watch(importing: bool = False) -> None:
  """Makes the process end as said above, in one line, with exit_code. In the main thread.

  Args:
    importing: whether modules are only being imported, until `watch` is called again: an exception
      in the middle of a compiled module's start would abort the process, and nothing is written
      yet, so it ends at once.
  """
  global _watching, _importing
  _importing = importing
  if _watching:
    return
  _watching = True
  numbers = taken()
  for number in numbers:
    signal.signal(number, lambda number, frame: interrupt(number))
  reader, writer = socket.socketpair()  # Windows waits for nothing else
  writer.setblocking(False)
  signal.set_wakeup_fd(writer.detach(), warn_on_full_buffer=False)
  threading.Thread(target=_end_when_late, args=(reader, numbers), daemon=True).start()
  before, unraisable = sys.excepthook, sys.unraisablehook

  def end(kind, error, trace):
    if issubclass(kind, KeyboardInterrupt):  # while modules are imported, or at the very end
      end_at_once(getattr(error, 'number', signal.SIGINT))
    if issubclass(kind, RuntimeError) and str(error) == 'Event loop is closed':
      return  # of what orbax had still in flight when one of its writes failed, which is said
    before(kind, error, trace)

  def ignore(lost):
    # In a callback of the garbage collector, for example: the thread ends what goes on.
    if not _ending and not issubclass(lost.exc_type, KeyboardInterrupt):
      unraisable(lost)

  sys.excepthook, sys.unraisablehook = end, ignore
  atexit.register(_end_of_work, numbers)


def _end_of_work(numbers):
  """All is done and said as Python takes itself apart; a signal would only spoil the exit code."""
  for number in numbers:
    signal.signal(number, signal.SIG_IGN)


def watching() -> bool:
  """Whether this process is a command, which `watch` was called for."""
  return _watching


def interrupt(number: int, agreed: bool = False) -> NoReturn:
  """Raises Interrupted."""
  global _ending
  _ending = number if _watching else 0
  if _importing:
    end_at_once(number)
  raise Interrupted(number, agreed)


def call(main: Callable, *arguments: Any) -> Any:
  """main(*arguments); an error that an interruption became in a library is that again.

  Out of a callback of compiled code an exception may come as another kind, without a cause.
  """
  try:
    return main(*arguments)
  except Exception as e:
    raise_if_interrupted(e)
    raise


def _end_when_late(reader, numbers):
  """A thread that ends the process at a second Ctrl-C, or GRACE after a signal that none holds."""
  received = []
  deadline = None
  while True:
    left = None if deadline is None else max(0.0, deadline - time.monotonic())
    if select.select([reader], [], [], left)[0]:
      for number in reader.recv(64):
        if number in numbers:
          if number == signal.SIGINT and number in received:
            end_at_once(number)
          received.append(number)
          deadline = time.monotonic() + GRACE
    elif not any(holds() for holds in holders):
      end_at_once(received[-1])
    else:
      deadline = None


def say() -> None:
  """Prints how to resume, once."""
  global _said
  if not _said:
    _said = True
    console = sys.modules.get('palm_jax.base.console')  # this module is imported before others
    if console:
      console.rest()
    with contextlib.suppress(OSError):  # whoever read it has ended, as `tee` by the same Ctrl-C
      os.write(2, f'palm_jax: {MESSAGE}\n'.encode())


def end_at_once(number: int) -> NoReturn:
  """Ends the process from any thread, as a kill would, but for the line and half-written files."""
  say()
  if threading.current_thread() is threading.main_thread():  # else it may hold their locks
    for stream in (sys.stdout, sys.stderr):
      with contextlib.suppress(Exception):
        stream.flush()
  for path in list(unfinished):
    if path.is_dir():
      shutil.rmtree(path, ignore_errors=True)
    else:
      path.unlink(missing_ok=True)
  os._exit(exit_code(number))


def raise_if_interrupted(error: BaseException) -> None:
  """Raises the interruption that led to an error, through others or where one has come.

  For whoever takes any error of a library for a damaged file.
  """
  seen = set()
  cause: BaseException | None = error
  while cause is not None and id(cause) not in seen:
    seen.add(id(cause))
    if isinstance(cause, (KeyboardInterrupt, SystemExit, GeneratorExit)):
      raise cause
    cause = cause.__cause__ or cause.__context__
  if _ending:
    raise Interrupted(_ending) from error
