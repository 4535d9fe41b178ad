"""A pod on one machine: processes of palm_jax.main, each with its own CPU devices, as one run.

  python launch/local.py --processes=2 --devices=4 -- --config=configs/digits.py --workdir=runs/pod

What stands behind `--` goes to every process. SIGTERM and SIGHUP (all save and leave) and Ctrl-C
are passed to all. When a process fails, the others are ended. The exit code is the worst of those
that ended by themselves.
"""

import argparse
import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence

GRACE_SECONDS = 10  # after one has failed, for the others to say why they fail too


def parse(argv: Sequence[str]) -> argparse.Namespace:
  """The command line."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--processes', type=_positive, default=2)
  parser.add_argument('--devices', type=_positive, default=4, help='CPU devices of each process')
  parser.add_argument(
    'arguments', nargs='*', metavar='-- --config=... [...]', help='arguments of palm_jax.main'
  )
  return parser.parse_args(argv)


def _positive(text):
  if not text.isdecimal() or not int(text):
    raise argparse.ArgumentTypeError(f'{text!r} is not a whole number of at least 1')
  return int(text)


def start(processes: int, devices: int, arguments: Sequence[str]) -> list[subprocess.Popen]:
  """Starts the processes, their output on pipes.

  Args:
    processes: how many.
    devices: CPU devices of each.
    arguments: of palm_jax.main.
  """
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{free.getsockname()[1]}'
  environment = dict(
    os.environ,
    JAX_PLATFORMS='cpu',
    JAX_NUM_CPU_DEVICES=str(devices),
    PYTHONUNBUFFERED='1',
    # XLA:CPU deadlocks when programs in flight have more devices than its pool has threads.
    NPROC=str(max(2 * devices, os.cpu_count() or 1)),
  )
  command = [
    sys.executable,
    '-m',
    'palm_jax.main',
    *arguments,
    f'--coordinator_address={address}',
    f'--num_processes={processes}',
  ]
  # A group of their own: the terminal would send Ctrl-C to them, and so would this program.
  return [
    subprocess.Popen(
      [*command, f'--process_id={i}'],
      env=environment,
      stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      start_new_session=True,
      preexec_fn=_die_with_parent,
    )
    for i in range(processes)
  ]


def _die_with_parent():
  if sys.platform == 'linux':
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def copy_output(index: int, stream: Iterable[bytes]) -> None:
  """Prints a process's lines, each with its number before it and in one piece."""
  for line in stream:  # to its end: a process whose output nobody takes would wait
    with contextlib.suppress(BrokenPipeError):  # whoever read it has ended, as `head`
      sys.stdout.write(f'[{index}] {line.decode(errors="replace").rstrip()}\n')
      sys.stdout.flush()


def wait(children: Sequence[subprocess.Popen]) -> int:
  """Waits for all, and ends them some seconds after one has failed.

  Returns:
    The worst exit code, as a shell gives it (137: killed).
  """
  deadline = None
  while True:
    codes = [child.poll() for child in children]
    ended = [code if code >= 0 else 128 - code for code in codes if code is not None]
    if len(ended) == len(children):
      return max(ended)
    if deadline is None and any(ended):
      deadline = time.monotonic() + GRACE_SECONDS
    if deadline and time.monotonic() > deadline:
      end(children)
      return max(ended)  # of those that ended by themselves
    time.sleep(0.05)


def end(children: Iterable[subprocess.Popen]) -> None:
  """Kills those that still run."""
  for child in children:
    if child.poll() is None:
      child.kill()
      child.wait()


def main(argv: Sequence[str]) -> int:
  """The command -> its exit code."""
  args = parse(argv)
  children = start(args.processes, args.devices, args.arguments)

  def pass_on(number, _):
    for child in children:
      if child.poll() is None:
        child.send_signal(number)

  try:
    for number in (signal.SIGTERM, signal.SIGINT, getattr(signal, 'SIGHUP', signal.SIGTERM)):
      if signal.getsignal(number) != signal.SIG_IGN:  # as nohup leaves SIGHUP
        signal.signal(number, pass_on)
    copiers = [
      threading.Thread(target=copy_output, args=(i, child.stdout))
      for i, child in enumerate(children)
    ]
    for copier in copiers:
      copier.start()
    code = wait(children)
    for copier in copiers:
      copier.join()
    return code
  finally:
    end(children)


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
