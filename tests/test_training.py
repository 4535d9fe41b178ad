"""The loop stops on a signal, saves what it reached, and is resumed as if nothing had happened."""

import os
import signal

import jax
import numpy as np
import pytest

from palm_jax.base import training
from palm_jax.base.metrics import read_jsonl
from palm_jax.base.steps import list_steps
from palm_jax.base.training import Preemption, Stopped, Training

pytestmark = pytest.mark.usefixtures('terminal')


TEMPLATE = {'state': {'x': jax.ShapeDtypeStruct((2,), np.float32)}}


def train(folder, total=6, disturb=lambda step: None, minutes=60.0, **options):
  """Adds the step's number to x in each step -> (x, seconds)."""
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  template = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), TEMPLATE
  )
  with Training('toy', folder, total, checkpoint_minutes=minutes, **options) as run:
    restored = run.resume(template)
    x = restored.items['state']['x'] if restored else np.zeros(2, np.float32)
    if restored:
      assert restored.metadata['note'] == f'step {run.step}'
    while not run.over:
      x = x + run.step
      disturb(run.step)
      run.advance()
      run.write({'sum': float(x[0])})
      run.show({'sum': float(x[0])})
      if run.should_save:
        run.save({'state': {'x': x}}, note=f'step {run.step}')
  assert run.complete
  return np.asarray(x), run.seconds


def send(number, when):
  return lambda step: os.kill(os.getpid(), number) if step == when else None


@pytest.fixture
def undisturbed(tmp_path):
  return train(tmp_path / 'undisturbed')[0]


@pytest.mark.parametrize(
  'number, error', [(signal.SIGTERM, Stopped), (signal.SIGINT, KeyboardInterrupt)]
)
def test_a_signal_saves_and_the_same_command_resumes(tmp_path, undisturbed, number, error):
  before = signal.getsignal(number)
  with pytest.raises(error):
    train(tmp_path, disturb=send(number, 2))
  assert signal.getsignal(number) == before
  assert list_steps(tmp_path / 'checkpoints') == [3]
  x, _ = train(tmp_path)
  np.testing.assert_array_equal(x, undisturbed)
  assert [row['step'] for row in read_jsonl(tmp_path / 'metrics.jsonl')] == [1, 2, 3, 4, 5, 6]


def test_seconds_are_those_of_all_starts(tmp_path, monkeypatch):
  now = [100.0]
  monkeypatch.setattr(training.time, 'monotonic', lambda: now[0])

  def tick(step):
    now[0] += 7.0
    if step == 2:
      os.kill(os.getpid(), signal.SIGTERM)

  with pytest.raises(Stopped):
    train(tmp_path, disturb=tick)
  now[0] += 1000.0  # nothing runs
  assert train(tmp_path, disturb=tick)[1] == 6 * 7.0


def test_a_save_under_way_is_waited_for_whatever_fails(tmp_path, monkeypatch):
  """As the metrics on a full disk."""

  def fail(writer):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(training.MetricWriter, 'close', fail)
  with pytest.raises(OSError):
    train(tmp_path)
  assert list_steps(tmp_path / 'checkpoints') == [6]
  assert not [*(tmp_path / 'checkpoints').glob('*.orbax-checkpoint-tmp*')]


def test_a_signal_while_the_end_is_written_stops_what_follows(tmp_path, monkeypatch):
  close = training.MetricWriter.close
  monkeypatch.setattr(
    training.MetricWriter, 'close', lambda self: (os.kill(os.getpid(), signal.SIGTERM), close(self))
  )
  with pytest.raises(Stopped):
    train(tmp_path)
  assert list_steps(tmp_path / 'checkpoints') == [6]


def test_a_signal_that_no_loop_asked_for_is_the_next_ones(monkeypatch):
  monkeypatch.setattr(training.signals, 'watching', lambda: True)  # as in a command
  with Preemption() as preemption:
    assert not preemption.requested
    os.kill(os.getpid(), signal.SIGTERM)
  with pytest.raises(Stopped), Preemption() as preemption:
    assert preemption.requested
    preemption.stop()
  with Preemption() as preemption:
    assert not preemption.requested


def test_a_second_ctrl_c_ends_at_once(tmp_path):
  def twice(step):
    if step == 2:
      os.kill(os.getpid(), signal.SIGINT)
      os.kill(os.getpid(), signal.SIGINT)

  with pytest.raises(KeyboardInterrupt):
    train(tmp_path, disturb=twice)
  assert list_steps(tmp_path / 'checkpoints') == []


def test_an_error_saves_nothing_new(tmp_path, undisturbed):
  def fail(step):
    if step == 3:
      raise ValueError('broken')

  with pytest.raises(ValueError, match='broken'):
    train(tmp_path, disturb=fail, minutes=0.0)  # saved at each step
  assert list_steps(tmp_path / 'checkpoints')[-1] == 3
  np.testing.assert_array_equal(train(tmp_path)[0], undisturbed)


def test_a_complete_training_is_only_read(tmp_path, undisturbed):
  train(tmp_path)
  touched = lambda step: pytest.fail('trained again')
  np.testing.assert_array_equal(train(tmp_path, disturb=touched)[0], undisturbed)


def test_saving_by_time_keeps_the_newest(tmp_path):
  train(tmp_path, minutes=0.0, keep=2)
  assert list_steps(tmp_path / 'checkpoints') == [5, 6]


def test_units_of_progress_and_metrics(tmp_path):
  train(tmp_path, unit='images', per_step=10, metrics_per_step=10)
  assert [row['step'] for row in read_jsonl(tmp_path / 'metrics.jsonl')] == [10, 20, 30, 40, 50, 60]
  train(tmp_path / 'silent', writes_metrics=False)
  assert not (tmp_path / 'silent' / 'metrics.jsonl').exists()


def test_only_within_the_block_are_signals_taken():
  before = signal.getsignal(signal.SIGINT)
  with Preemption() as preemption:
    assert not preemption.requested
    os.kill(os.getpid(), signal.SIGINT)
    assert preemption.requested
    with pytest.raises(KeyboardInterrupt):
      preemption.stop()
  assert signal.getsignal(signal.SIGINT) == before
