"""A job is a value: one new file and one line in runner.JOBS make an evaluation."""

import errno
import json
import os
import sys
import types

import numpy as np
import pytest

from palm_jax import runner
from palm_jax.base import checks
from palm_jax.base.errors import UserError
from palm_jax.base.training import Stopped
from palm_jax.data.arrays import Data, Split
from palm_jax.job import Job, Run, never
from tests.worlds import tiny_config


@pytest.fixture
def toy(monkeypatch):
  """An evaluation that is not of this package; its JOB, and the Runs that it was given."""
  seen = []

  def check(config, num_devices):
    checks.share('toy.threshold', config.toy.threshold)

  def check_data(run):
    if len(run.data.class_names) != 10:
      raise UserError('toy: expected ten classes')

  def run(this: Run) -> dict:
    seen.append(this)
    if this.config.toy.stop:
      raise Stopped
    bright = this.data.test.images.mean(axis=(1, 2, 3)) > 255 * this.config.toy.threshold
    return dict(job='toy', share=float(np.mean(bright)), protocol=dict(data=this.data.source))

  def table(results):
    return f'toy: {results["share"]:.1%} are bright'

  module = types.ModuleType('toy_evaluation')
  module.JOB = Job('toy', run, check, check_data=check_data, table=table, judges=True)
  monkeypatch.setitem(sys.modules, 'toy_evaluation', module)
  monkeypatch.setitem(runner.JOBS, 'toy', 'toy_evaluation')  # the one line
  return module.JOB, seen


def config_of(**settings):
  c = tiny_config()
  c.name, c.data.name, c.jobs = 'toys', 'digits', ('toy', 'report')
  with c.unlocked():
    c.toy = dict(threshold=0.3, stop=False) | settings
  return c


def test_a_new_evaluation_is_run_skipped_and_reported(toy, tmp_path, capsys, caplog):
  _, seen = toy
  workdir = tmp_path / 'run'
  runner.run(config_of(), 'toy', workdir)
  result = json.loads((workdir / 'results' / 'toy.json').read_text())
  assert 0 < result['share'] < 1
  assert f'toy: {result["share"]:.1%} are bright' in capsys.readouterr().out
  assert len(seen) == 1 and seen[0].workdir == workdir and seen[0].data is not None

  runner.run(config_of(), 'toy', workdir)  # complete, skipped
  assert len(seen) == 1
  with pytest.raises(UserError, match='another config .toy.threshold: 0.3 there, 0.4 now.*delete'):
    runner.run(config_of(threshold=0.4), 'toy', workdir)
  (workdir / 'results' / 'toy.json').unlink()
  runner.run(config_of(threshold=0.4), 'toy', workdir)  # a judgement's section is free until then
  assert len(seen) == 2

  c = config_of(threshold=0.4)
  c.data.name = ''  # no map
  runner.run(c, 'report', workdir)
  page = (workdir / 'report.html').read_text()
  share = json.loads((workdir / 'results' / 'toy.json').read_text())['share']
  assert '<h2' in page and 'toy' in page and f'{share:.4g}' in page


def test_it_is_checked_before_anything_is_written(toy, tmp_path):
  with pytest.raises(UserError, match=r'toy.threshold=2.0 is not in \[0, 1\]'):
    runner.run(config_of(threshold=2.0), 'toy', tmp_path / 'run')
  with pytest.raises(UserError, match='toy.threshold=nan is not finite'):
    runner.run(config_of(threshold=float('nan')), 'toy', tmp_path / 'run')
  c = config_of()
  np.savez(tmp_path / 'two.npz', images=np.zeros((8, 8, 8, 1), np.uint8), labels=np.arange(8) % 2)
  c.data.name = str(tmp_path / 'two.npz')
  with pytest.raises(UserError, match='toy: expected ten classes'):
    runner.run(c, 'toy', tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def test_what_was_collected_is_judged_by_all_jobs_that_wait(toy, tmp_path, monkeypatch):
  pictures = Split(np.zeros((4, 8, 8, 1), np.uint8), np.zeros(4, np.int64))
  data = Data(pictures, pictures, ('a',), 'made up')
  monkeypatch.setattr(runner, 'load_collected', lambda workdir, newest: data)
  config, ran = config_of(), []
  config.data.name = 'collect'
  first = Job('first', lambda this: ran.append(this) or {}, lambda config, num_devices: None)
  monkeypatch.setitem(sys.modules, 'first_of_two', types.SimpleNamespace(JOB=first))
  monkeypatch.setitem(runner.JOBS, 'first', 'first_of_two')
  config.jobs = 'first', 'toy'
  with pytest.raises(UserError, match='toy: expected ten classes'):
    runner.run(config, 'all', tmp_path / 'run')
  assert not ran


def test_a_result_is_made_again_with_what_was_collected_anew(toy, tmp_path, monkeypatch):
  pictures = Split(np.zeros((4, 8, 8, 1), np.uint8), np.zeros(4, np.int64))
  data = Data(pictures, pictures, tuple('0123456789'), 'made up')
  monkeypatch.setattr(runner, 'load_collected', lambda workdir, newest: data)
  config, seen, stacks, cleaned = config_of(), toy[1], ['old'], []
  config.data.name, config.jobs = 'collect', ('collect', 'toy')
  collect = Job(
    'collect',
    lambda this: dict(job='collect', stacks=dict(sha256=stacks[-1])),
    lambda config, num_devices: None,
    needs_data=never,
    clean=cleaned.append,
  )
  monkeypatch.setitem(sys.modules, 'collects', types.SimpleNamespace(JOB=collect))
  monkeypatch.setitem(runner.JOBS, 'collect', 'collects')
  for _ in range(2):
    runner.run(config, 'all', tmp_path)
  assert len(seen) == 1 and len(cleaned) == 2  # a command may have been killed before it cleaned
  stacks.append('new')
  (tmp_path / 'results' / 'collect.json').unlink()
  runner.run(config, 'all', tmp_path)
  runner.run(config, 'all', tmp_path)
  assert len(seen) == 2


def test_a_stopped_job_has_no_result_and_ends_the_chain(toy, tmp_path):
  _, seen = toy
  runner.run(config_of(stop=True), 'all', tmp_path / 'run')
  assert len(seen) == 1
  assert not (tmp_path / 'run' / 'results').exists()
  assert not (tmp_path / 'run' / 'report.html').exists()


@pytest.mark.parametrize('number', [errno.ESTALE, errno.EXDEV, errno.EBUSY])
def test_a_result_that_cannot_be_written_is_seen_and_leaves_no_half(
  toy, tmp_path, monkeypatch, capsys, number
):
  replace = os.replace

  def replaced(source, target):
    if 'results' in str(target):
      raise OSError(number, os.strerror(number), str(source), None, str(target))
    replace(source, target)

  with monkeypatch.context() as patched:
    patched.setattr(os, 'replace', replaced)
    with pytest.raises(OSError):
      runner.run(config_of(), 'toy', tmp_path)
  assert 'are bright' in capsys.readouterr().out
  assert not any((tmp_path / 'results').iterdir())
  runner.run(config_of(), 'toy', tmp_path)
  assert (tmp_path / 'results' / 'toy.json').exists()


def test_a_result_is_written_though_nobody_reads_the_output(toy, tmp_path, monkeypatch):
  class Closed:
    def write(self, text):
      raise BrokenPipeError

  with monkeypatch.context() as patched:
    patched.setattr(sys, 'stdout', Closed())
    with pytest.raises(BrokenPipeError):
      runner.run(config_of(), 'toy', tmp_path)
  assert (tmp_path / 'results' / 'toy.json').exists()


def test_every_job_of_the_table_is_found():
  for name in runner.names():
    job = runner.find(name)
    assert job.name == name
  with pytest.raises(UserError, match=r"job 'prob' is unknown: .* \(did you mean probe\?\)"):
    runner.find('prob')
