"""Numbers go where they should, once each, and a resumed run leaves no line from a future that did
not happen."""

import json
import logging as python_logging
import math
import pathlib
import sys
import types

import numpy as np
import pytest
from absl import logging

from palm_jax.base import metrics
from palm_jax.base.errors import UserError
from palm_jax.base.metrics import MetricWriter, Progress


def steps_in(folder):
  return [row['step'] for row in metrics.read_jsonl(folder / 'metrics.jsonl')]


@pytest.fixture
def lines():
  """What absl logs."""

  class Handler(python_logging.Handler):
    def emit(self, record):
      seen.append(record.getMessage())

  seen, handler, logger = [], Handler(), logging.get_absl_logger()
  level = logger.level
  logger.addHandler(handler)
  logger.setLevel(python_logging.INFO)
  yield seen
  logger.removeHandler(handler)
  logger.setLevel(level)


def test_a_line_is_readable_at_once_and_valid_json(tmp_path):
  with MetricWriter(tmp_path / 'new' / 'folder', tensorboard=False) as writer:
    writer.write(np.int32(3), {'loss': np.float32(0.5), 'bad': math.nan, 'worse': -math.inf})
    text = (tmp_path / 'new' / 'folder' / 'metrics.jsonl').read_text()

  def refuse(name):
    raise AssertionError(f'{name} is not JSON')

  row = json.loads(text, parse_constant=refuse)
  assert len(row.pop('check')) == 8
  assert row == {
    'step': 3,
    'loss': 0.5,
    'bad': None,
    'worse': None,
  }


def test_resume_drops_later_lines_and_appends(tmp_path):
  with MetricWriter(tmp_path, tensorboard=False) as writer:
    for step in (10, 20, 30, 40):
      writer.write(step, {'loss': step})
  with (tmp_path / 'metrics.jsonl').open('a') as f:
    f.write('{"step": 50, "lo')  # killed in the middle of a line
  with MetricWriter(tmp_path, step=20, tensorboard=False) as writer:
    assert steps_in(tmp_path) == [10, 20]
    writer.write(25, {'loss': 0.0})
  assert steps_in(tmp_path) == [10, 20, 25]
  assert [p.name for p in tmp_path.iterdir()] == ['metrics.jsonl']  # nothing half-written stays
  MetricWriter(tmp_path, tensorboard=False).close()  # a fresh start in an old folder
  assert steps_in(tmp_path) == []


def test_every_changed_bit_and_every_lost_line_is_seen(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  with MetricWriter(tmp_path, tensorboard=False) as writer:
    for step in range(1, 6):
      writer.write(step, {'loss': step / 7, 'other': -step})
  whole = path.read_bytes()
  rows = metrics.read_jsonl(path)
  rng = np.random.default_rng(0)
  for place in rng.choice(len(whole) - 1, 200, replace=False):
    damaged = bytearray(whole)
    damaged[place] ^= 1 << rng.integers(8)
    path.write_bytes(damaged)
    left, numbers = metrics.check_jsonl(path)
    numbers_of = lambda row: [row.get(name) for name in ('step', 'loss', 'other')]
    assert numbers and len(left) >= 3, damaged
    assert all(numbers_of(row) in map(numbers_of, rows) for row in left), damaged
  lines = whole.splitlines(keepends=True)
  path.write_bytes(b''.join(lines[:2] + lines[3:]))
  assert metrics.check_jsonl(path)[1] == [3]
  path.write_bytes(b''.join(lines[:-1]))
  assert metrics.check_jsonl(path)[1] == [] and metrics.missing(rows[:-2], 5) == (3, 5)
  assert metrics.missing(rows, 5) is None


def test_lines_without_checks_are_read_and_continued(tmp_path):
  """As older versions wrote them."""
  path = tmp_path / 'metrics.jsonl'
  path.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 0.5}\n')
  assert [row['loss'] for row in metrics.read_jsonl(path)] == [1.0, 0.5]
  with MetricWriter(tmp_path, step=2, tensorboard=False) as writer:
    writer.write(3, {'loss': 0.25})
  assert metrics.check_jsonl(path)[1] == [] and steps_in(tmp_path) == [1, 2, 3]


def test_a_folder_removed_meanwhile_is_said(tmp_path):
  with MetricWriter(tmp_path / 'run', tensorboard=False) as writer:
    writer.write(1, {'loss': 1.0})
    (tmp_path / 'run' / 'metrics.jsonl').unlink()
    with pytest.raises(UserError, match='was removed while the job ran'):
      writer.write(2, {'loss': 1.0})


def test_tensorboard_has_the_scalars(tmp_path):
  with MetricWriter(tmp_path) as writer:
    writer.write(7, {'loss': 0.25})
  [events] = tmp_path.glob('events.out.tfevents.*')
  data = events.read_bytes()
  assert b'loss' in data and np.float32(0.25).tobytes() in data


def test_progress_line(lines, monkeypatch):
  clock = [1000.0]
  monkeypatch.setattr(metrics.time, 'monotonic', lambda: clock[0])
  progress = Progress('pretrain', 64_000, 'env steps', every_seconds=5)
  assert progress.update(6_400, {})  # after the call that compiled: no rate yet
  clock[0] += 2
  assert not progress.update(10_000, {})
  clock[0] += 3
  assert progress.update(12_800, {'ssl': -0.9123, 'reward': 1.2345, 'rank': 12345.6})
  clock[0] += 1
  assert progress.update(64_000, {})  # complete: always a line
  assert lines[0] == 'pretrain  6,400/64,000 env steps  10.0%'
  # 6,400 steps in 5 seconds; 51,200 to go
  assert lines[1] == (
    'pretrain  12,800/64,000 env steps  20.0%  1,280/s  left 0:40  '
    'ssl -0.912 reward 1.23 rank 12,346'
  )
  assert lines[2].endswith('100.0%  9,600/s  left 0:00') and len(lines) == 3


def test_progress_rate_follows_the_recent_pace(lines, monkeypatch):
  clock = [0.0]
  monkeypatch.setattr(metrics.time, 'monotonic', lambda: clock[0])
  progress = Progress('train', 10**6 + 450, 'images', every_seconds=0)
  step = 0
  for seconds in [100.0] * 5 + [0.1] * 40:
    clock[0] += seconds
    step += 10
    progress.update(step, {})
  assert '  100/s  left 2:46:40' in lines[-1]  # 10**6 images at 100 a second


class FakeRun:
  def __init__(self, **given):
    self.given, self.lines, self.defined, self.finished = given, [], [], False

  def define_metric(self, name, step_metric):
    self.defined.append((name, step_metric))

  def log(self, line):
    self.lines.append(line)

  def finish(self):
    self.finished = True


def test_weights_and_biases_goes_on_with_the_same_run(tmp_path, monkeypatch):
  runs = []
  fake = types.SimpleNamespace(
    init=lambda **given: runs.append(FakeRun(**given)) or runs[-1],
    Settings=lambda **given: given,
  )
  monkeypatch.setitem(sys.modules, 'wandb', fake)
  monkeypatch.setattr(metrics, 'wandb_project', 'palm')
  (tmp_path / 'config.json').write_text('{"seed": 3}')
  for step in (0, 1):
    with metrics.MetricWriter(tmp_path / 'pretrain', step, tensorboard=False) as writer:
      writer.write(step + 1, dict(loss=0.5, bad=math.nan))
  first, second = runs
  assert first.given['id'] == second.given['id'] and second.given['resume'] == 'allow'
  assert first.given['project'] == 'palm' and first.given['config'] == {'seed': 3}
  assert first.given['name'] == f'{tmp_path.name}/pretrain'
  assert [run.lines for run in runs] == [
    [dict(step=1, loss=0.5, bad=None)],
    [dict(step=2, loss=0.5, bad=None)],
  ]
  assert first.finished and first.defined == [('*', 'step')]


@pytest.mark.parametrize(
  'folder, name, group',
  [
    ('runs/a/pretrain', 'a/pretrain', 'a'),
    ('runs/f4/alpha_0/seed3/pretrain', 'f4/alpha_0/seed3/pretrain', 'f4/alpha_0'),
    ('runs/f5/alpha_0/0.5/seed12/generator', 'alpha_0/0.5/seed12/generator', 'alpha_0/0.5'),
  ],
)
def test_runs_of_a_study_are_told_apart(folder, name, group):
  assert metrics.wandb_names(pathlib.Path(folder)) == dict(name=name, group=group)


def test_weights_and_biases_that_is_not_installed(monkeypatch):
  monkeypatch.setattr(metrics.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(UserError, match='--wandb needs its package'):
    metrics.log_to_wandb('palm')
  metrics.log_to_wandb('')


@pytest.mark.slow
def test_weights_and_biases_offline(tmp_path, monkeypatch):
  """Its own package, which writes to the disk alone."""
  pytest.importorskip('wandb')
  monkeypatch.setenv('WANDB_MODE', 'offline')
  monkeypatch.setattr(metrics, 'wandb_project', 'palm')
  for step in (0, 1):
    with metrics.MetricWriter(tmp_path / 'pretrain', step) as writer:
      writer.write(step + 1, dict(loss=0.5))
  files = list((tmp_path / 'pretrain' / 'wandb').glob('offline-run-*/run-*.wandb'))
  run_id = (tmp_path / 'pretrain' / metrics.WANDB_ID).read_text()
  assert len(files) == 2 and {path.stem for path in files} == {f'run-{run_id}'}
