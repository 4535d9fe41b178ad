"""A job that is killed, stopped or finds damage, started again by the same command, ends as if
nothing had happened."""

import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from orbax.checkpoint import v1 as ocp

from palm_jax.base.checkpoints import Checkpoints
from palm_jax.base.files import write_json
from palm_jax.base.metrics import read_jsonl
from palm_jax.base.steps import list_steps
from palm_jax.generator import train
from tests import chaos, compiler
from tests.jobs import saved_result

pytestmark = pytest.mark.filterwarnings('ignore:Sharding info not provided')

GENERATOR = dict(
  z_dim=4,
  w_dim=4,
  mapping_layers=1,
  channel_base=32,
  channel_max=4,
  conv_clamp=0.0,
  d_mapping_layers=0,
  mbstd_group=2,
  batch_size=4,
  r1_gamma=0.1,
  r1_interval=4,
  kimg=0.224,
  ema_kimg=0.1,
  iterations_per_call=4,
  snapshot_kimg=0.1,
  checkpoint_minutes=0.001,
)

# Fourteen calls; each is saved, or each few where calls are faster than 60 ms. The monitors look
# after seven and at the end, so a run stopped between them must take their numbers along.
CONFIG = """
from tests.worlds import tiny_config


def get_config():
  c = tiny_config()
  c.data.name = {data!r}
  c.generator.update({generator!r})
  c.simsiam.update(dict(proj_hidden=8, proj_dim=8, pred_hidden=4))
  c.pretrain.update(dict(env_steps=14 * 2 * 16, num_envs=8, rollout_length=2, batch_size=16,
                         updates_per_iteration=1, warmup_steps=48, iterations_per_call=2,
                         checkpoint_minutes=0.001, monitor_fraction=0.5))
  return c
"""


class Job:
  """A job and its workdir, run by the command that people type."""

  def __init__(self, name, base, workdir):
    self.name, self.base, self.workdir = name, base, base / workdir
    self.folder, self.checkpoints = self.workdir / name, self.workdir / name / 'checkpoints'
    self.log = base / f'{workdir}.log'

  def start(self):
    environment = dict(
      os.environ,
      JAX_PLATFORMS='cpu',
      XLA_FLAGS=compiler.FLAGS,
      JAX_COMPILATION_CACHE_DIR=str(self.base / 'cache'),
      JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS='0',
    )
    command = [
      sys.executable,
      '-m',
      'palm_jax.main',
      f'--config={self.base / "config.py"}',
      f'--job={self.name}',
      f'--workdir={self.workdir}',
    ]
    with self.log.open('w') as log:
      return subprocess.Popen(
        command, cwd=pathlib.Path(__file__).parents[1], env=environment, stdout=log, stderr=log
      )

  def finish(self, process=None):
    """Runs to the end, or waits for the process that does, and returns the log."""
    process = process or self.start()
    try:
      code = process.wait(300)
    finally:
      process.kill()
    log = self.log.read_text()
    assert code == 0 and 'Traceback' not in log, log
    return log

  def interrupt(self, number, moment):
    """Starts, sends a signal at the first moment at which `moment()` holds, and returns the exit
    code."""
    process = self.start()
    try:
      assert chaos.halt(process, moment), self.log.read_text()
      process.send_signal(number)
      process.send_signal(signal.SIGCONT)
      return process.wait(60)
    finally:
      process.kill()
      process.wait()

  def copy(self, workdir):
    shutil.copytree(self.workdir, self.base / workdir)
    return Job(self.name, self.base, workdir)

  def num_lines(self):
    path = self.folder / 'metrics.jsonl'
    return path.read_bytes().count(b'\n') if path.exists() else 0

  def saving(self):
    return any(self.checkpoints.glob('*.orbax-checkpoint-tmp*'))


def without_clocks(row):
  return {
    name: value for name, value in row.items() if name not in ('seconds', 'images_per_second')
  }


def assert_same_outcome(job, reference):
  """Every array of the last checkpoint bit for bit, each line of metrics once, the result, the
  pictures."""
  assert list_steps(job.checkpoints)[-1] == list_steps(reference.checkpoints)[-1]
  got, want = (
    ocp.load_checkpointables(j.checkpoints / str(list_steps(j.checkpoints)[-1]))
    for j in (job, reference)
  )
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for (path, a), b in zip(
    jax.tree_util.tree_flatten_with_path(got)[0], jax.tree.leaves(want), strict=True
  ):
    if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
      a, b = jax.random.key_data(a), jax.random.key_data(b)
    assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes(), (
      jax.tree_util.keystr(path)
    )

  got, want = (
    [without_clocks(row) for row in read_jsonl(j.folder / 'metrics.jsonl')]
    for j in (job, reference)
  )
  assert [row['step'] for row in got] == [row['step'] for row in want]
  assert got == want
  got, want = (saved_result(j.workdir / 'results' / f'{j.name}.json') for j in (job, reference))
  assert without_clocks(dict(got, metrics=without_clocks(got['metrics']))) == without_clocks(
    dict(want, metrics=without_clocks(want['metrics']))
  )
  got, want = (
    {path.name: path.read_bytes() for path in j.folder.rglob('*.png')} for j in (job, reference)
  )
  assert got == want and want


@pytest.fixture(
  scope='module',
  params=[pytest.param(name, marks=pytest.mark.slow) for name in ('pretrain', 'generator')],
)
def reference(request, tmp_path_factory):
  """A run that nothing disturbed."""
  base, rng, settings = tmp_path_factory.mktemp(request.param), np.random.default_rng(0), GENERATOR
  if request.param == 'pretrain':
    settings = dict(GENERATOR, path=str(base / 'world'))
    c = ConfigDict(dict(train.default_config(), **GENERATOR))
    G, D = train.make_networks(c, (8, 8, 1), 3)
    generator = jax.jit(lambda key: train.init_state(c, G, D, key).G_ema)(jax.random.key(0))
    with Checkpoints(base / 'world' / 'generator' / 'checkpoints') as checkpoints:
      checkpoints.save(1, {'generator': generator}, {})
    write_json(base / 'world' / 'generator' / 'network.json', train.network_fields(G))
  np.savez(
    base / 'data.npz',
    images=rng.integers(0, 256, (60, 8, 8, 1), dtype=np.uint8),
    labels=np.arange(60) % 3,
  )
  (base / 'config.py').write_text(CONFIG.format(data=str(base / 'data.npz'), generator=settings))
  job = Job(request.param, base, 'reference')
  job.finish()
  steps = [row['step'] for row in read_jsonl(job.folder / 'metrics.jsonl')]
  assert len(steps) == 14 and steps == sorted(set(steps))
  return job


def kill(job, rng):
  """Kills at a random moment one or two calls beyond what earlier starts had come to."""
  target, delay = job.num_lines() + rng.randint(1, 2), rng.uniform(0, 0.05)

  def moment():
    if job.num_lines() < target:
      return False
    time.sleep(delay)
    return True

  assert job.interrupt(signal.SIGKILL, moment) == -signal.SIGKILL, job.log.read_text()
  assert not (job.workdir / 'results').exists()


@pytest.fixture(scope='module')
def stopped(reference):
  """A run that was killed within a save, killed again, and then stopped by SIGTERM; tests take a
  copy."""
  job = Job(reference.name, reference.base, 'stopped')
  code = job.interrupt(signal.SIGKILL, lambda: list_steps(job.checkpoints) and job.saving())
  assert code == -signal.SIGKILL and job.saving()  # for ever
  kill(job, random.Random(0))
  target = max(8, job.num_lines() + 1)
  code = job.interrupt(
    signal.SIGTERM, lambda: job.num_lines() >= target and list_steps(job.checkpoints)
  )
  assert code == 0, job.log.read_text()
  return job


@pytest.fixture(scope='module')
def damaged(stopped):
  """A copy with a bit flipped in its newest checkpoint; it runs while another test has its own."""
  job = stopped.copy('damaged')
  before, newest = list_steps(job.checkpoints)
  path = max((job.checkpoints / str(newest) / 'state').rglob('d/*'), key=lambda p: p.stat().st_size)
  data = bytearray(path.read_bytes())
  # Array data come first; old nodes of the index, which nothing reads, may follow.
  data[len(data) // 20] ^= 1
  path.write_bytes(data)
  process = job.start()
  yield job, process, before, newest
  process.kill()
  process.wait()


@pytest.mark.usefixtures('damaged')
def test_kills_and_a_stop_change_nothing(reference, stopped):
  last = read_jsonl(stopped.folder / 'metrics.jsonl')[-1]['step']
  assert list_steps(stopped.checkpoints)[-1] == last < list_steps(reference.checkpoints)[-1]
  assert not stopped.saving() and not (stopped.workdir / 'results').exists()
  job = stopped.copy('continued')
  kill(job, random.Random(1))
  assert f'{job.name}: resumed at step {last} (' in job.log.read_text()
  log = job.finish()
  assert not job.saving() and not re.search(r'^[EWF]\d{4} |Warning', log, re.MULTILINE), log
  assert_same_outcome(job, reference)


def test_a_flipped_bit_costs_a_checkpoint_only(reference, damaged):
  job, process, before, newest = damaged
  log = job.finish(process)
  assert f'checkpoint step {newest} in {job.checkpoints} is damaged and passed over' in log
  assert f'{job.name}: resumed at step {before} (' in log
  assert_same_outcome(job, reference)


def test_a_complete_job_is_not_run_again(reference):
  before = reference.num_lines()
  assert (
    f'{reference.name}: complete, skipped' in reference.finish() and reference.num_lines() == before
  )
