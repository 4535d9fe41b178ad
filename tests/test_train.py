"""The job of pretraining, stopped and then broken off, ends as if nothing had happened."""

import os
import signal

import numpy as np
import pytest

from palm_jax import experience, monitors, pretrain, train, worlds
from palm_jax.base import devices
from palm_jax.base.metrics import read_jsonl
from palm_jax.base.steps import list_steps
from palm_jax.base.training import Training
from tests.jobs import finish
from tests.test_resume import Job, assert_same_outcome
from tests.worlds import LargeGenerator, nature_config

pytestmark = pytest.mark.filterwarnings('ignore:Sharding info not provided')


class BrokenOff(Exception):
  """Stands for a kill: nothing is saved."""


@pytest.fixture(scope='module')
def start():
  """Starts the job in a workdir -> its result, number of calls. What is compiled serves all."""
  config, generator, mesh = nature_config(), LargeGenerator(), devices.make_mesh(2)
  config.replay.update(dict(capacity=8 * 8, num_shards=2))  # wraps within the run
  config.pretrain.update(
    dict(
      env_steps=8 * 2 * 16,
      num_envs=8,
      rollout_length=2,
      batch_size=16,
      updates_per_iteration=1,
      warmup_steps=48,
      iterations_per_call=2,
      monitor_fraction=3 / 8,  # the fourth call's line has their numbers of the third
      record=True,
    )
  )
  program = pretrain.make_program(config, generator, mesh)
  watch = monitors.make_monitors(program.setup, num_images=128, num_steps=8)
  calls = []

  def call(state, world):
    calls.append(world)
    return program.call(state, world)

  def run(workdir):
    calls.clear()
    return finish(train.JOB, config, workdir, mesh=mesh), len(calls)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(worlds, 'load_world_generator', lambda *_: generator)
    patch.setattr(pretrain, 'make_program', lambda *_: program._replace(call=call))
    patch.setattr(monitors, 'make_monitors', lambda *_: watch)
    yield run


@pytest.fixture
def at_line(monkeypatch):
  """Has something done as soon as metrics.jsonl has so many lines."""
  write = Training.write

  def after(number, act):
    def written(self, scalars):
      write(self, scalars)
      if self.step == 2 * number:
        act()

    monkeypatch.setattr(Training, 'write', written)

  # A signal that no training takes must not end the tests.
  before = signal.signal(signal.SIGTERM, lambda *_: pytest.fail('SIGTERM came when nothing ran'))
  yield after
  signal.signal(signal.SIGTERM, before)


def test_a_stop_and_a_kill_change_nothing(start, at_line, tmp_path):
  whole, job = Job('pretrain', tmp_path, 'whole'), Job('pretrain', tmp_path, 'job')
  result, calls = start(whole.workdir)
  assert result and calls == 8

  def break_off():
    raise BrokenOff

  at_line(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
  assert start(job.workdir) == (None, 3)
  assert job.num_lines() == 3 and list_steps(job.checkpoints) == [6]
  at_line(5, break_off)
  with pytest.raises(BrokenOff):
    start(job.workdir)
  assert job.num_lines() == 5 and list_steps(job.checkpoints) == [6]
  assert not (job.workdir / 'results').exists()
  at_line(0, break_off)
  result, calls = start(job.workdir)
  assert result and calls == 5  # it went on, and did not begin again

  assert_same_outcome(job, whole)
  rows = read_jsonl(job.folder / 'metrics.jsonl')
  assert rows[3]['h_effective_rank'] == rows[2]['h_effective_rank'] and rows[3]['loss']
  assert [*map(set, rows)][3:] == [set(rows[-1])] * 5
  records = [[*experience.read(j.folder / 'experience')] for j in (job, whole)]
  assert [len(part.step) for part in records[0]] == [4] * 8
  for got, want in zip(*records, strict=True):
    for a, b in zip(got, want, strict=True):
      np.testing.assert_array_equal(a, b)
