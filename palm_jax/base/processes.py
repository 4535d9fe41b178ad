"""The processes of a run: how they find each other, decide together, and end together."""

import contextlib
import functools
import importlib.util
import json
import os
import socket
import sys
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec as P

from palm_jax.base.devices import make_mesh, share_machine
from palm_jax.base.errors import UserError
from palm_jax.base.files import locked

# A process that is silent for so long is taken for dead, and all others end. JAX's 100 s would
# spend more of a pod's time.
HEARTBEAT_SECONDS = 30
# How long an ending process waits for the others: the end of a job is at most a few pictures apart.
SHUTDOWN_SECONDS = 60
FAIL_SECONDS = 10  # the same after an error, which is that of all at once, or of this one alone


def any_process(flag: Any) -> bool:
  """Whether `flag` is true in any process.

  It is for decisions by a signal, a clock or an error, which all processes must take alike.
  """
  return bool(largest(bool(flag)))


def largest(number: int) -> int:
  """The largest that any process has; all must ask together."""
  if jax.process_count() == 1:
    return int(number)
  return int(multihost_utils.process_allgather(np.asarray(int(number))).max())


def is_first() -> bool:
  """Whether this process is the one that prints and writes what all have computed."""
  return jax.process_index() == 0


def barrier(name: str) -> None:
  """Waits for all processes to come here."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def from_first(value: Any) -> Any:
  """What the first process has, in all; JSON. All must ask together.

  It is for what is looked up in files: file servers show a new one at other times to each machine.
  """
  if jax.process_count() == 1:
    return value
  text = np.frombuffer(json.dumps(value if is_first() else None).encode(), np.uint8)
  padded = np.full(largest(len(text)), ord(' '), np.uint8)
  padded[: len(text)] = text
  return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes())


def together(error: UserError | None, what: str) -> None:
  """Raises UserError, in all processes, where any has one; all must ask together.

  Args:
    error: of this process.
    what: cannot be done, in the words of a process that could have.
  """
  if any_process(error):
    raise error or UserError(f'{what}: another process says why')


@contextlib.contextmanager
def locked_by_first(path: str | os.PathLike, patience: float) -> Iterator[bool]:
  """`files.locked` for all processes, which the first one holds: yields the same in all."""
  with locked(path, patience) if is_first() else contextlib.nullcontext(True) as mine:
    yield not any_process(not mine)


def first_then_all(prepare: Callable[[], None], what: str) -> None:
  """Has the first process prepare something in the files that all may share, then the others.

  Args:
    prepare: does nothing where it is done already; raises UserError.
    what: as for `together`.
  """
  error = None
  if is_first():
    try:
      prepare()
    except UserError as e:
      error = e
  together(error, what)
  if not is_first():
    prepare()


def agree(
  settings: Mapping[str, Any], remedy: str = 'start all with the same --job, --workdir and --config'
) -> None:
  """Raises UserError, in all processes, where one has other settings than the first.

  Each would wait for the others in another place, or compute something else.

  Args:
    settings: {name: value}, all of it JSON.
    remedy: what to do, for the message.
  """
  if jax.process_count() == 1:
    return
  text = np.frombuffer(json.dumps(settings).encode(), np.uint8)
  padded = np.full(largest(len(text)), ord(' '), np.uint8)
  padded[: len(text)] = text
  first, *others = (json.loads(row.tobytes()) for row in multihost_utils.process_allgather(padded))
  for number, other in enumerate(others, 1):
    # As text: one NaN is another's equal here.
    differ = [name for name in {**first, **other} if repr(first.get(name)) != repr(other.get(name))]
    if differ:
      name = differ[0]
      raise UserError(
        f'process {number} has {name}={other.get(name)!r}, process 0 {first.get(name)!r}: {remedy}'
      )


def leave(code: int) -> NoReturn:
  """Ends this process after an error, and with it the run.

  Python's own way out would wait for the others, who may wait for this one's devices.
  """
  if jax.distributed.is_initialized():
    together = threading.Thread(target=jax.distributed.shutdown, daemon=True)
    together.start()
    together.join(FAIL_SECONDS)
    if together.is_alive():
      sys.stdout.flush()
      sys.stderr.flush()
      os._exit(code)
  sys.exit(code)


def wait_for_all() -> None:
  """Returns when every device of the run has done all its work.

  All processes call it before they end. What multihost_utils gathers is complete when the first
  device has it; a process that ended then would leave the others' devices waiting for its own.
  """
  if jax.process_count() > 1:
    total = jax.shard_map(
      lambda: jax.lax.psum(1, 'data'), mesh=make_mesh(), in_specs=(), out_specs=P()
    )
    jax.block_until_ready(jax.jit(total)())


def initialize_distributed(
  coordinator_address: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  wait_seconds: int = 300,
) -> None:
  """Joins the processes of a run; call after `configure` and before anything touches a device.

  On TPU pods and in SLURM steps of several tasks JAX finds the others by itself. Elsewhere the
  three arguments say it, or the variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
  JAX_PROCESS_ID. On one machine without any of them, and with one process, nothing happens.
  Processes other than the first log only warnings from then on.

  Args:
    coordinator_address: 'host:port', where process 0 listens and all others reach it.
    num_processes: of the run.
    process_id: of this one, 0 to num_processes - 1.
    wait_seconds: how long the processes wait for each other.

  Raises:
    UserError: some of the three and not all, invalid values, or processes that did not come in
      time.
  """
  settings: dict[str, Any] = _explicit(coordinator_address, num_processes, process_id)
  step = os.environ.get('SLURM_STEP_NODELIST')
  tasks = os.environ.get('SLURM_STEP_NUM_TASKS') or os.environ.get('SLURM_NTASKS')
  platforms = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]: made at run time
  if settings:
    where = settings['coordinator_address']
    # Else JAX would take what is not given, the share of a machine's GPUs, from a SLURM step.
    settings['cluster_detection_method'] = 'deactivate'
    settings['coordinator_bind_address'] = where  # JAX's default is every interface
    _gather_at(where.rpartition(':')[0].strip('[]'))
  elif step and int(tasks or 1) > 1:
    where = f'the first node of {step}'
    settings = dict(cluster_detection_method='slurm')
  elif importlib.util.find_spec('libtpu') and 'tpu' in (platforms or 'tpu'):
    where = 'the first worker of the TPU pod'
  else:
    return
  if settings.get('num_processes') == 1:
    return
  if not _connect(where, settings, wait_seconds):
    return
  sys.excepthook = _end_at_once
  # Devices meet here, where no process is far ahead: on CPU a first meeting waits 30 s, and
  # compilations take longer.
  machine = np.uint32(zlib.crc32(socket.gethostname().encode()))
  machines = multihost_utils.process_allgather(machine)
  share_machine(int((machines == machine).sum()))
  wait_for_all()
  if jax.process_index():
    logging.set_verbosity(logging.WARNING)


def _end_at_once(*error):
  """For an error of this process alone.

  Python's own way out waits for the others, who wait for this one's devices.
  """
  sys.__excepthook__(*error)
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(1)


def _explicit(coordinator_address, num_processes, process_id):
  """The three settings by name, from the arguments or the environment; {} where there are none."""
  named = dict(
    coordinator_address=coordinator_address, num_processes=num_processes, process_id=process_id
  )
  for name, value in named.items():
    named[name] = os.environ.get(f'JAX_{name.upper()}') if value is None else value
  missing = [f'--{name}' for name, value in named.items() if value in (None, '')]
  if len(missing) == 3:
    return {}
  given = ' '.join(
    f'--{name}={value}' for name, value in named.items() if f'--{name}' not in missing
  )
  if missing:
    raise UserError(
      f'{given} without {" and ".join(missing)}: give all three (or JAX_COORDINATOR_ADDRESS, '
      'JAX_NUM_PROCESSES, JAX_PROCESS_ID), or none on one machine'
    )
  host, _, port = named['coordinator_address'].rpartition(':')
  if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
    raise UserError(
      f'--coordinator_address={named["coordinator_address"]} is not HOST:PORT: '
      'name the machine of process 0 and a port that is free on it, such as 10.0.0.1:8476'
    )
  for name in ('num_processes', 'process_id'):
    if not str(named[name]).isdecimal():
      raise UserError(
        f'--{name}={named[name]} is not a number of at least 0: count the processes from 0'
      )
    named[name] = int(named[name])
  if not named['process_id'] < named['num_processes']:
    raise UserError(
      f'--process_id={named["process_id"]} is not below --num_processes={named["num_processes"]}: '
      'count the processes from 0'
    )
  if named['process_id'] == 0 and named['num_processes'] > 1:
    _check_free(host.strip('[]'), int(port))
  return named


def _gather_at(host):
  """Has CPU devices meet at the coordinator's host where that is this machine alone.

  Gloo listens at the address of the machine's name, and JAX has no setting for it.
  """
  if host not in ('localhost', '127.0.0.1', '::1'):
    return
  try:
    from jax._src.lib import _jax  # pyright: ignore[reportPrivateImportUsage]

    at_host = functools.partial(_jax.make_gloo_tcp_collectives, hostname=host)
    _jax.make_gloo_tcp_collectives = at_host  # pyright: ignore[reportAttributeAccessIssue]
  except (ImportError, AttributeError):
    logging.warning('CPU devices may listen at the address of this machine, not only at %s', host)


def _check_free(host, port):
  """Raises UserError where this machine cannot listen: jaxlib ends the process without a word."""
  try:
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family) as probe:
      # A run that has just ended is no other program.
      probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
      probe.bind(address)
  except OSError as e:
    raise UserError(
      f'{host}:{port} of --coordinator_address cannot be listened on ({e.strerror}): name an '
      'address of the machine of process 0, by which the others reach it, and a free port'
    ) from e


def _connect(where, settings, wait_seconds):
  """jax.distributed.initialize, which ends in a UserError where it takes too long.

  Returns:
    Whether there are processes to join.
  """
  # SIGTERM is base.training.Preemption's. JAX's handler would swallow it where that is not active.
  jax.config.update('jax_enable_preemption_service', False)
  failure = []

  def initialize():
    try:
      # Longer than our own wait, because jaxlib aborts the whole process when its time is over.
      jax.distributed.initialize(
        **settings,
        initialization_timeout=wait_seconds + 60,
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        shutdown_timeout_seconds=SHUTDOWN_SECONDS,
      )
    except Exception as e:
      failure.append(e)

  thread = threading.Thread(target=initialize, daemon=True)
  thread.start()
  thread.join(wait_seconds)
  if thread.is_alive():
    raise UserError(
      f'the processes of the run did not find each other at {where} within {wait_seconds} s: see '
      'that all were started, with the same address, and that it can be reached from every machine'
    )
  if failure and not settings and isinstance(failure[0], ValueError):
    return False  # libtpu is installed, but this is no TPU machine
  if failure:
    reason = ' '.join(str(failure[0]).split())
    raise UserError(
      f'the processes of the run could not be joined at {where}: {reason}'
    ) from failure[0]
  return True
