"""A pod on one machine: several processes of palm_jax.main, each with its own CPU devices, joined
into one run.

  python launch/local.py --processes=2 --devices=4 -- --config=configs/digits.py --workdir=runs/pod

What stands behind `--` goes to every process. SIGTERM (all save and leave) and Ctrl-C are passed
on; when a process fails, the others are ended. The exit code is the worst of those that ended by
themselves.
"""

import argparse
import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time

GRACE_SECONDS = 10  # after one has failed, for the others to say why they fail too


def parse(argv):
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


def start(processes, devices, arguments):
  """Starts them all -> [subprocess.Popen], their output on pipes."""
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{free.getsockname()[1]}'
  environment = dict(
    os.environ,
    JAX_PLATFORMS='cpu',
    JAX_NUM_CPU_DEVICES=str(devices),
    PYTHONUNBUFFERED='1',
    JAX_COORDINATOR_BIND_ADDRESS=address,  # JAX would listen on every network
    # XLA:CPU deadlocks when programs in flight have more devices than its pool has threads.
    NPROC=str(max(2 * devices, os.cpu_count())),
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


def copy_output(index, stream):
  """Prints a process's lines, each with its number before it and in one piece."""
  for line in stream:
    sys.stdout.write(f'[{index}] {line.decode(errors="replace").rstrip()}\n')
    sys.stdout.flush()


def wait(children):
  """Waits for all and ends them when one fails -> the worst exit code, as a shell gives it (137:
  killed)."""
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


def end(children):
  for child in children:
    if child.poll() is None:
      child.kill()
      child.wait()


def main(argv):
  args = parse(argv)
  children = start(args.processes, args.devices, args.arguments)
  try:
    for number in (signal.SIGTERM, signal.SIGINT):
      signal.signal(
        number,
        lambda number, _: [child.send_signal(number) for child in children if child.poll() is None],
      )
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
