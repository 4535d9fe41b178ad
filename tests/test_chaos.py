"""What tests/chaos.py tries, in a minute; and the whole of it, slow."""

import pytest

from palm_jax.base.steps import list_steps
from tests import chaos, damage


@pytest.fixture(scope='module')
def chain(tmp_path_factory):
  return chaos.Chain(tmp_path_factory.mktemp('chain'), ('generator',))


@pytest.mark.parametrize('kind', ['KILL', 'INT'])
def test_a_signal_in_a_training_loses_nothing(chain, kind):
  workdir = chain.base / f'trial_{kind}'
  folder = workdir / 'generator'

  def moment():
    """Well within the training, which has saved a step."""
    path = folder / 'metrics.jsonl'
    lines = path.read_bytes().count(b'\n') if path.exists() else 0
    return 3 <= lines < 14 and list_steps(folder / 'checkpoints')

  chain.interrupt('generator', workdir, kind, moment=moment)
  assert 'generator: resumed at step' in chain.finish('generator', workdir)
  chaos.compare(workdir, chain.base / 'after_generator')


@pytest.mark.slow  # an hour or two
def test_two_hundred_trials(tmp_path):
  chain = chaos.Chain(tmp_path)
  for number in range(200):
    chain.trial(number, seed=1)


@pytest.mark.slow  # minutes
def test_no_damage_is_silent(tmp_path):
  chain = chaos.Chain(tmp_path, ('generator', 'pretrain', 'quality'))
  assert not damage.count_silent(chain.base / 'after_quality', 400, 0)
