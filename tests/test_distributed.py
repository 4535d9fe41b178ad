"""Several processes are one run: the same numbers, checkpoints of all for any number of processes,
one end for all."""

import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from palm_jax import pretrain, worlds
from palm_jax.base import devices, processes
from palm_jax.base.errors import UserError
from palm_jax.base.metrics import read_jsonl
from palm_jax.base.steps import list_steps
from palm_jax.base.training import Stopped, Training
from tests import compiler
from tests.worlds import LargeGenerator, nature_config

ROOT = pathlib.Path(__file__).parents[1]


def worker(folder, stop_at):
  """What each process of the quick tests runs: palm_jax's own loop without its monitors, saved at
  every call; a signal to one stops all."""
  whole = devices.machine_memory()
  processes.initialize_distributed()
  assert devices.machine_memory() == whole // jax.process_count()  # all are on this machine
  config, mesh, generator = nature_config(), devices.make_mesh(), LargeGenerator()
  config.replay.capacity = 8 * 8  # wraps within the run
  config.pretrain.update(
    dict(
      dtype='float64',
      env_steps=4 * 3 * 16,
      num_envs=8,
      rollout_length=2,
      batch_size=16,
      updates_per_iteration=1,
      warmup_steps=48,
      iterations_per_call=3,
    )
  )
  program, world = (
    pretrain.make_program(config, generator, mesh),
    worlds.make_world(config, generator, mesh),
  )
  key = jax.random.key(3)
  template = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    jax.eval_shape(program.init, key, world),
    program.state_shardings,
  )
  training = Training('calls', folder, program.setup.num_calls, checkpoint_minutes=0.0, keep=9)
  try:
    with training as run:
      restored = run.resume({'state': template})
      state = restored.items['state'] if restored else program.init(key, world)
      while not run.over:
        state, output = jax.block_until_ready(program.call(state, world))
        run.advance()
        if run.step == stop_at and jax.process_index() == jax.process_count() - 1:
          os.kill(os.getpid(), signal.SIGTERM)  # to one process only
        run.write({name: x.mean() for name, x in jax.device_get(output.metrics).items()})
        if run.should_save:
          run.save({'state': state})
        write_arrays(folder / f'{run.step}.npz', state)
  except Stopped:
    assert training.step == stop_at
  processes.wait_for_all()


def write_arrays(path, state):
  """Writes the whole of a sharded state: {path of a leaf: array}."""
  state = multihost_utils.process_allgather(
    state.replace(key=jax.random.key_data(state.key)), tiled=True
  )
  if jax.process_index() == 0:
    np.savez(
      path,
      **{jax.tree_util.keystr(name): x for name, x in jax.tree_util.tree_leaves_with_path(state)},
    )


def environment(num_devices, **more):
  env = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith(('XLA_', 'SLURM_', 'JAX_'))
  }
  return dict(
    env,
    JAX_PLATFORMS='cpu',
    JAX_ENABLE_X64='1',
    JAX_NUM_CPU_DEVICES=str(num_devices),
    NPROC='16',
    XLA_FLAGS=compiler.FLAGS,
    PYTHONPATH=str(ROOT),
    **more,
  )


def free_port():
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    return free.getsockname()[1]


def run_workers(folder, processes, num_devices, stop_at=0):
  """Runs `worker` in so many processes to the end; all must leave with code 0."""
  folder.parent.mkdir(exist_ok=True)
  address = f'127.0.0.1:{free_port()}'
  children, logs = [], []
  try:
    for i in range(processes):
      logs.append(folder.with_suffix(f'.{i}.log'))
      joined = dict(
        JAX_COORDINATOR_ADDRESS=address,
        JAX_NUM_PROCESSES=str(processes),
        JAX_PROCESS_ID=str(i),
        JAX_COMPILATION_CACHE_DIR=str(folder.parent / 'cache'),
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS='0',
      )
      with logs[-1].open('w') as log:
        children.append(
          subprocess.Popen(
            [sys.executable, __file__, str(folder), str(stop_at)],
            stdout=log,
            stderr=log,
            env=environment(num_devices, **joined),
          )
        )
    codes = [child.wait(600) for child in children]
  finally:
    for child in children:
      child.kill()
  assert codes == [0] * processes, [log.read_text() for log in logs]


def assert_same_state(got, want):
  """Of two files of `write_arrays`: pictures and counters equal, parameters as near as between
  device counts."""
  got, want = np.load(got), np.load(want)
  assert sorted(got) == sorted(want) and sum(x.dtype == np.float64 for x in want.values()) > 20
  largest = 0.0
  for name, x in want.items():
    assert got[name].dtype == x.dtype, name
    if np.issubdtype(x.dtype, np.floating):
      np.testing.assert_allclose(got[name], x, rtol=1e-9, atol=1e-9, err_msg=name)
      largest = max(largest, float(np.abs(got[name] - x).max(initial=0)))
    else:
      np.testing.assert_array_equal(got[name], x, err_msg=name)
  print(f'largest difference {largest:.1e}')  # seen with -s


def saved(folder):
  return list_steps(folder / 'checkpoints')


def assert_same_metrics(got, want, calls):
  """One file, in which only the first process has written: a line a call."""
  assert [path.parent for path in got.rglob('metrics.jsonl')] == [got]
  assert (got / 'metrics.jsonl').read_bytes().count(b'\n') == calls
  got, want = (read_jsonl(folder / 'metrics.jsonl') for folder in (got, want))
  assert [row['step'] for row in got] == [*range(1, calls + 1)]
  for a, b in zip(got, want[:calls], strict=True):
    assert a.keys() == b.keys() and len(a) > 5
    np.testing.assert_allclose([*a.values()], [*b.values()], rtol=1e-9, atol=1e-9)


@pytest.fixture(scope='module')
def one(tmp_path_factory):
  """The run of one process with eight devices, four calls, each saved."""
  folder = tmp_path_factory.mktemp('distributed') / 'one'
  run_workers(folder, 1, 8)
  return folder


@pytest.fixture(scope='module')
def two(one):
  """The same run in two processes of four devices, one of which was told to stop after the second
  call."""
  folder = one.with_name('two')
  run_workers(folder, 2, 4, stop_at=2)
  return folder


def test_two_processes_are_one_run_and_stop_together(one, two):
  assert saved(one) == [1, 2, 3, 4] and saved(two) == [1, 2]
  before, after = np.load(one / '1.npz'), np.load(one / '2.npz')
  assert all(
    (before[name] != after[name]).any() for name in after if 'kernel' in name and 'params' in name
  )
  assert_same_state(two / '2.npz', one / '2.npz')
  assert_same_metrics(two, one, 2)


@pytest.mark.slow
@pytest.mark.parametrize(('processes', 'num_devices'), [(1, 8), (4, 2)])
def test_other_numbers_of_processes_go_on(one, two, processes, num_devices):
  folder = shutil.copytree(two, two.with_name(f'on{processes}'))
  run_workers(folder, processes, num_devices)
  assert saved(folder) == [1, 2, 3, 4]
  assert_same_state(folder / '4.npz', one / '4.npz')
  assert_same_metrics(folder, one, 4)


def test_nothing_happens_on_one_machine(monkeypatch):
  for name in os.environ:
    if name.startswith(('SLURM_', 'JAX_COORD', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')):
      monkeypatch.delenv(name)
  processes.initialize_distributed()
  processes.initialize_distributed('127.0.0.1:1', 1, 0)
  monkeypatch.setenv('SLURM_PROCID', '0')
  monkeypatch.setenv('SLURM_STEP_NODELIST', 'localhost')
  monkeypatch.setenv('SLURM_NTASKS', '1')
  processes.initialize_distributed()
  monkeypatch.setenv('SLURM_NTASKS', '8')  # a shell inside an allocation for eight
  monkeypatch.setenv('SLURM_STEP_NUM_TASKS', '1')
  processes.initialize_distributed()
  assert not jax.distributed.is_initialized()


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    (
      ('10.0.0.1:8476', None, None),
      '--coordinator_address=10.0.0.1:8476 without --num_processes and --process_id',
    ),
    ((None, 2, 0), '--num_processes=2 --process_id=0 without --coordinator_address'),
    (('10.0.0.1', 2, 0), '--coordinator_address=10.0.0.1 is not HOST:PORT'),
    (('10.0.0.1:http', 2, 0), '--coordinator_address=10.0.0.1:http is not HOST:PORT'),
    (('10.0.0.1:8476', 2, 2), '--process_id=2 is not below --num_processes=2'),
    (('10.0.0.1:8476', 0, 0), '--process_id=0 is not below --num_processes=0'),
    (('10.0.0.1:8476', 2, -1), '--process_id=-1 is not a number of at least 0'),
  ],
)
def test_settings_that_cannot_be(settings, message):
  with pytest.raises(UserError, match=f'^{re.escape(message)}') as error:
    processes.initialize_distributed(*settings)
  assert '\n' not in str(error.value)


def test_other_settings_are_refused_in_all_processes(monkeypatch):
  def told(*settings):
    texts = [json.dumps(each).encode() for each in settings]
    rows = np.array([list(text.ljust(max(map(len, texts)))) for text in texts], np.uint8)
    monkeypatch.setattr(jax, 'process_count', lambda: len(settings))
    monkeypatch.setattr(processes, 'largest', lambda number: rows.shape[1])
    monkeypatch.setattr(multihost_utils, 'process_allgather', lambda mine: rows)
    for each in settings:
      processes.agree(each)

  told({'seed': 0, 'lr': float('nan')}, {'seed': 0, 'lr': float('nan')})
  message = 'process 2 has jobs=None, process 0 .*: start all with the same'
  with pytest.raises(UserError, match=message):
    told(*[{'seed': 0, 'jobs': ['probe']}] * 2, {'seed': 0})


@pytest.mark.slow
@pytest.mark.parametrize(
  'changes', [['--config.seed=1'], ['--job=pretrain'], ['--workdir=elsewhere']]
)
def test_commands_that_differ_end_together(tmp_path, changes):
  address = f'--coordinator_address=127.0.0.1:{free_port()}'
  command = [sys.executable, '-m', 'palm_jax.main', '--config=configs/digits.py', address]
  command += ['--num_processes=2', f'--workdir={tmp_path / "run"}']
  options = dict(cwd=ROOT, env=environment(1), stderr=subprocess.PIPE, text=True)
  children = [
    subprocess.Popen([*command, f'--process_id={i}', *more], **options)
    for i, more in enumerate(([], changes))
  ]
  try:
    errors = [child.communicate(timeout=120)[1] for child in children]
  finally:
    for child in children:
      child.kill()
  assert [child.returncode for child in children] == [2, 2], errors
  for text in errors:
    assert text.splitlines()[-1].startswith('palm_jax: process 1 has '), text
  assert not (tmp_path / 'run').exists()


def test_a_port_in_use():
  with socket.socket() as other:
    other.bind(('', 0))
    other.listen()
    port = other.getsockname()[1]
    with pytest.raises(UserError, match=f'127.0.0.1:{port} .* cannot be .* and a free port'):
      processes.initialize_distributed(f'127.0.0.1:{port}', 2, 0)


@pytest.mark.parametrize('process_id', [0, 1])
def test_processes_that_do_not_come_are_waited_for_only_so_long(process_id):
  code = f"""
from absl import app
from palm_jax.base import command, devices, processes
address = '127.0.0.1:{free_port()}'
run = lambda argv: processes.initialize_distributed(address, 2, {process_id}, wait_seconds=2)
app.run(command.exit_on_user_error(run))
"""
  done = subprocess.run(
    [sys.executable, '-c', code], env=environment(1), capture_output=True, text=True, timeout=120
  )
  assert done.returncode == 2, done.stderr
  assert (
    '\npalm_jax: the processes of the run did not find each other at 127.0.0.1:'
    in f'\n{done.stderr}'
  ), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize('victim', [0, 1])
@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGSTOP])
def test_the_others_end_by_themselves(tmp_path, victim, number):
  """Without a launcher that ends them. A stopped process stands for a machine that is gone: nothing
  closes its connections."""
  code = """
import pathlib, sys, time
from palm_jax.base import devices, processes
processes.initialize_distributed()
pathlib.Path(sys.argv[1]).touch()
while True:
  processes.any_process(False)
  time.sleep(0.1)
"""
  joined = dict(JAX_COORDINATOR_ADDRESS=f'127.0.0.1:{free_port()}', JAX_NUM_PROCESSES='2')
  files = [tmp_path / f'joined.{i}' for i in range(2)]
  processes = [
    subprocess.Popen(
      [sys.executable, '-c', code, str(file)],
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      env=environment(2, JAX_PROCESS_ID=str(i), **joined),
    )
    for i, file in enumerate(files)
  ]
  try:
    while not all(file.exists() for file in files):
      assert all(process.poll() is None for process in processes)
      time.sleep(0.1)
    time.sleep(2)  # well into the loop
    processes[victim].send_signal(number)
    began = time.monotonic()
    output = processes[1 - victim].communicate(timeout=60)[0]
    print(
      f'{number.name} of process {victim}: the other ended after {time.monotonic() - began:.1f} s'
    )
    assert processes[1 - victim].returncode not in (0, None), output
  finally:
    for process in processes:
      process.kill()


def test_slurm_is_found_without_flags(tmp_path):
  """Two tasks of a step, on the variables that srun sets."""
  code = """
import json, sys
import jax
from absl import logging
from palm_jax.base import devices, processes
logging.set_verbosity(logging.INFO)
processes.initialize_distributed()
with open(sys.argv[1], 'w') as f:
  quiet = logging.get_verbosity() == logging.WARNING
  json.dump([jax.process_index(), jax.process_count(), jax.device_count(), quiet], f)
"""
  step = dict(
    SLURM_JOB_ID='1',
    SLURM_STEP_NODELIST='localhost',
    SLURM_NTASKS='2',
    SLURM_STEP_NUM_TASKS='2',
    SLURM_STEP_NUM_NODES='1',
    JAX_COORDINATOR_PORT=str(free_port()),
  )
  files = [tmp_path / str(i) for i in range(2)]
  tasks = [
    subprocess.Popen(
      [sys.executable, '-c', code, str(file)],
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      env=environment(3, SLURM_PROCID=str(i), SLURM_LOCALID=str(i), **step),
    )
    for i, file in enumerate(files)
  ]
  try:
    output = [task.communicate(timeout=120)[0] for task in tasks]
  finally:
    for task in tasks:
      task.kill()
  assert [task.returncode for task in tasks] == [0, 0], output
  assert [json.loads(file.read_text()) for file in files] == [[0, 2, 6, False], [1, 2, 6, True]]


class Pod:
  """palm_jax.main in several processes of this machine, by the command that people type."""

  def __init__(self, base, workdir, processes, num_devices, *arguments):
    self.base, self.workdir, self.processes = base, base / workdir, processes
    self.log = base / f'{workdir}.log'
    self.command = [
      sys.executable,
      str(ROOT / 'launch' / 'local.py'),
      f'--processes={processes}',
      f'--devices={num_devices}',
      '--',
      f'--config={base / "config.py"}',
      f'--workdir={self.workdir}',
      *arguments,
    ]

  def start(self):
    with self.log.open('w') as log:
      return subprocess.Popen(
        self.command,
        cwd=ROOT,
        stdout=log,
        stderr=log,
        env=environment(
          1,
          JAX_COMPILATION_CACHE_DIR=str(self.base / 'cache'),
          JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS='0',
        ),
      )

  def finish(self):
    assert self.start().wait(3000) == 0, self.log.read_text()
    log = self.log.read_text()
    progress_of_others = re.search(r'^\[[1-9]\] I.* (main|metrics)\.py', log, re.MULTILINE)
    assert 'Traceback' not in log and not progress_of_others, log
    return self

  def interrupt(self, number, calls):
    """Sends a signal to the last process once so many calls are saved -> the launcher's code, the
    seconds it then took."""
    launcher = self.start()
    try:
      checkpoints = self.workdir / 'pretrain' / 'checkpoints'
      deadline = time.monotonic() + 3000
      while max(list_steps(checkpoints), default=0) < calls * 2:
        assert launcher.poll() is None and time.monotonic() < deadline, self.log.read_text()
        time.sleep(0.1)
      children = sorted(
        map(
          int,
          pathlib.Path(f'/proc/{launcher.pid}/task/{launcher.pid}/children').read_text().split(),
        )
      )
      assert len(children) == self.processes
      os.kill(children[-1], number)
      began = time.monotonic()
      code = launcher.wait(300)
      assert not any(pathlib.Path(f'/proc/{child}').exists() for child in children)
      return code, time.monotonic() - began
    finally:
      launcher.kill()

  def metrics(self):
    return read_jsonl(self.workdir / 'pretrain' / 'metrics.jsonl')


CONFIG = """
from tests.worlds import tiny_config


def get_config():
  c = tiny_config()
  c.data.name = {data!r}
  c.generator.update(dict(z_dim=4, w_dim=4, mapping_layers=1, channel_base=32, channel_max=4,
                          conv_clamp=0., d_mapping_layers=0, mbstd_group=1, batch_size=8,
                          r1_interval=2, kimg=0.032, iterations_per_call=2))
  c.simsiam.update(dict(proj_hidden=8, proj_dim=8, pred_hidden=4))
  c.pretrain.update(dict(dtype='float64', env_steps=6 * 2 * 16, num_envs=8, rollout_length=2,
                         batch_size=16, updates_per_iteration=1, warmup_steps=48,
                         iterations_per_call=2, checkpoint_minutes=0., monitor_fraction=1.))
  return c
"""


@pytest.fixture(scope='module')
def base(tmp_path_factory):
  base, rng = tmp_path_factory.mktemp('pods'), np.random.default_rng(0)
  np.savez(
    base / 'data.npz',
    images=rng.integers(0, 256, (60, 8, 8, 1), dtype=np.uint8),
    labels=np.arange(60) % 3,
  )
  (base / 'config.py').write_text(CONFIG.format(data=str(base / 'data.npz')))
  return base


@pytest.fixture(scope='module')
def pod(base):
  """All jobs in two processes."""
  return Pod(base, 'pod', 2, 4).finish()


@pytest.mark.slow
def test_only_the_first_process_writes(pod):
  assert [row['step'] for row in pod.metrics()] == [2, 4, 6, 8, 10, 12]
  assert {path.stem for path in (pod.workdir / 'results').iterdir()} >= {
    'generator',
    'pretrain',
    'probe',
  }
  for job in ('generator', 'pretrain'):
    assert len(list((pod.workdir / job).glob('events.out.tfevents.*'))) == 1
  assert list((pod.workdir / 'pretrain' / 'rollouts').glob('*.png')) and not list(
    pod.workdir.rglob('*.part')
  )


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_one_process(base, pod, number):
  """The whole command: one is stopped or killed, all end, the same command in another number of
  processes goes on."""
  arguments = ('--job=pretrain', f'--config.generator.path={pod.workdir}')
  interrupted = Pod(base, number.name, 2, 4, *arguments)
  code, seconds = interrupted.interrupt(number, calls=2)
  assert code == (0 if number == signal.SIGTERM else 128 + number), interrupted.log.read_text()
  assert seconds < 60
  print(f'{number.name}: all ended after {seconds:.1f} s')
  Pod(base, number.name, 1, 8, *arguments).finish()
  for got, want in zip(interrupted.metrics(), pod.metrics(), strict=True):
    assert got.keys() == want.keys()
    np.testing.assert_allclose(list(got.values()), list(want.values()), rtol=1e-7, atol=1e-9)


if __name__ == '__main__':
  worker(pathlib.Path(sys.argv[1]), int(sys.argv[2]))


LISTENING = """
import os, sys
from palm_jax.base import processes
processes.initialize_distributed(sys.argv[1], 2, int(sys.argv[2]))
mine = {os.readlink(f'/proc/self/fd/{fd}') for fd in os.listdir('/proc/self/fd')
        if os.path.exists(f'/proc/self/fd/{fd}') or os.path.islink(f'/proc/self/fd/{fd}')}
for name in ('tcp', 'tcp6'):
  for line in open(f'/proc/self/net/{name}').read().splitlines()[1:]:
    place, state, inode = line.split()[1], line.split()[3], line.split()[9]
    if state == '0A' and f'socket:[{inode}]' in mine:
      print('listens', place.split(':')[0], flush=True)
processes.wait_for_all()
"""


def test_where_loopback_is_named_nothing_else_listens():
  address = f'127.0.0.1:{free_port()}'
  commands = [
    subprocess.Popen(
      [sys.executable, '-c', LISTENING, address, str(i)],
      env=environment(1),
      stdout=subprocess.PIPE,
      text=True,
    )
    for i in range(2)
  ]
  texts = [process.communicate(timeout=100)[0] for process in commands]
  places = {line.split()[1] for text in texts for line in text.splitlines() if 'listens' in line}
  loopback = {'0100007F', '0000000000000000FFFF00000100007F', '00000000000000000000000001000000'}
  assert places and places <= loopback, texts
