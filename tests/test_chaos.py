"""What tests/chaos.py tries, in a minute; and the whole of it, slow."""

import pytest

from palm_jax.base.steps import list_steps
from tests import chaos, damage


def test_signals_in_a_training_lose_nothing(tmp_path):
  """A kill, and Ctrl-C in what resumes it."""
  chain = chaos.Chain(tmp_path, ('generator',), warm=False)
  workdir = tmp_path / 'trial'
  folder = workdir / 'generator'

  def lines():
    path = folder / 'metrics.jsonl'
    return path.read_bytes().count(b'\n') if path.exists() else 0

  for kind in ('KILL', 'INT'):
    least = max(3, lines() + 1)
    # Well within the training, which has gone on and saved a step.
    moment = lambda least=least: least <= lines() < 14 and list_steps(folder / 'checkpoints')
    chain.interrupt('generator', workdir, kind, moment=moment)
  assert 'generator: resumed at step' in chain.finish('generator', workdir)
  chaos.compare(workdir, tmp_path / 'after_generator')


@pytest.mark.slow  # an hour or two
def test_two_hundred_trials(tmp_path):
  chain = chaos.Chain(tmp_path)
  for number in range(200):
    chain.trial(number, seed=1)


@pytest.mark.slow  # minutes
def test_no_damage_is_silent(tmp_path):
  chain = chaos.Chain(tmp_path, ('generator', 'pretrain', 'quality'))
  assert not damage.count_silent(chain.base / 'after_quality', 400, 0)
