"""The Atari games on the real emulator: lives, game over, the cut-off, the first row of a game,
scores, seeds."""

import sys

import numpy as np
import pytest

from palm_jax.atari import environment
from palm_jax.atari.environment import GAMES, Environment, rom_id
from palm_jax.base.errors import UserError


def play(game, steps, num_envs=2, seed=0, actions=None, until=None, **settings):
  """Stacks of the reset and all steps, as arrays with time first; random actions where none are
  given."""
  pytest.importorskip('ale_py')
  with Environment(game, num_envs, seed, **settings) as env:
    stacks, rows = [env.reset()], []
    draw = np.random.default_rng(1)
    for t in range(steps):
      played = draw.integers(0, env.num_actions, num_envs) if actions is None else actions[t]
      rows.append(env.step(played))
      stacks.append(rows[-1].stacks)
      if until and until(rows[-1]):
        break
  return np.stack(stacks), environment.Step(*(np.stack(parts) for parts in zip(*rows, strict=True)))


@pytest.fixture(scope='module')
def breakout():
  return play('Breakout', 500)


def test_types_and_shapes(breakout):
  stacks, steps = breakout
  assert stacks.shape == (501, 2, 84, 84, 4) and stacks.dtype == np.uint8 and stacks.max() > 100
  assert {name: part.dtype.name for name, part in steps._asdict().items()} == dict(
    stacks='uint8',
    reward='float32',
    life_lost='bool',
    game_over='bool',
    truncated='bool',
    first='bool',
    score='float64',
  )
  # Oldest frame first: a step moves them by one, until a new game.
  goes_on = ~steps.first
  np.testing.assert_array_equal(stacks[1:][goes_on][..., :3], stacks[:-1][goes_on][..., 1:])
  assert (stacks[1:][..., 3] != stacks[:-1][..., 3]).any((2, 3)).mean() > 0.9


def test_a_lost_life_continues_the_game(breakout):
  _, steps = breakout
  for n in range(2):
    ends = np.flatnonzero(steps.game_over[:, n])
    assert len(ends) > 1
    for start, end in zip([0, *ends[:-1] + 1], ends, strict=False):
      lost = start + np.flatnonzero(steps.life_lost[start : end + 1, n])
      assert len(lost) == 5  # all of Breakout's, the last with the game
      assert lost[-1] == end
      assert not steps.first[start + 1 : end + 1, n].any()


def test_nobody_presses_fire_but_the_player():
  _, steps = play('Breakout', 100, actions=np.zeros((100, 2), int))
  assert not steps.life_lost.any()  # no ball is in play
  _, steps = play('Breakout', 100, actions=np.ones((100, 2), int))
  assert steps.life_lost.any()


def test_the_row_after_a_game_is_first_and_nothing_else(breakout):
  stacks, steps = breakout
  assert not steps.truncated.any()
  np.testing.assert_array_equal(steps.first[1:], steps.game_over[:-1])
  assert not steps.first[0].any()
  first = steps.first
  assert first.sum() > 3
  for nothing in (steps.reward, steps.score, steps.life_lost, steps.game_over):
    assert not nothing[first].any()
  # No frame of the game before: the stack's older three are empty.
  for beginning in (stacks[0], stacks[1:][first]):
    assert not beginning[..., :3].any() and beginning[..., 3].any((1, 2)).all()
  second = stacks[2:][first[:-1]]
  assert not second[..., :2].any() and second[..., 2:].any((1, 2)).all()


def test_a_first_row_ignores_its_action():
  actions = np.random.default_rng(0).integers(0, 4, (300, 1))
  stacks, steps = play('Breakout', 300, 1, actions=actions)
  first = np.flatnonzero(steps.first[:, 0])
  assert len(first)
  actions[first] = (actions[first] + 1) % 4
  others, _ = play('Breakout', 300, 1, actions=actions)
  np.testing.assert_array_equal(stacks, others)
  actions[first[0] + 1 :] = (actions[first[0] + 1 :] + 1) % 4
  others, _ = play('Breakout', 300, 1, actions=actions)
  assert (stacks != others).any()


@pytest.mark.parametrize('game, multiple', [('CrazyClimber', 100), ('MsPacman', 10)])
def test_rewards_are_raw_and_add_up(game, multiple):
  _, steps = play(game, 300)
  assert steps.reward.max() >= multiple
  assert not (steps.reward % multiple).any()
  total = np.zeros(2)
  for reward, first, score in zip(steps.reward, steps.first, steps.score, strict=True):
    total = np.where(first, 0, total + reward)
    np.testing.assert_array_equal(score, total)
  assert total.all()


def test_the_cut_off_is_no_game_over():
  _, steps = play('Breakout', 40, max_steps=9)
  times = np.arange(40)
  # Nine steps and a first row, again and again: too short to lose five lives.
  np.testing.assert_array_equal(steps.truncated, np.stack([times % 10 == 8] * 2, 1))
  np.testing.assert_array_equal(steps.first, np.stack([(times % 10 == 9)] * 2, 1))
  assert not steps.game_over.any()


def test_half_an_hour_and_the_noops_by_default(monkeypatch):
  vector_env = pytest.importorskip('ale_py.vector_env')
  given = {}

  class Watched(vector_env.AtariVectorEnv):
    def __init__(self, *args, **settings):
      given.update(settings)
      super().__init__(*args, **settings)

  monkeypatch.setattr(vector_env, 'AtariVectorEnv', Watched)
  with Environment('Pong', 24, 0) as env:
    env.reset()
    noops = env._emulator.step(np.zeros(24, int))[-1]['episode_frame_number']
    assert env._max_steps == 27_000 and given['max_num_frames_per_episode'] == 108_000
  found = set(np.unique(noops) - noops.min())  # of 0 to 29, each equally likely
  assert found <= set(range(30)) and len(found) > 10 and max(found) > 20


def test_a_life_or_the_game_lost_in_the_last_step():
  actions = np.random.default_rng(0).integers(0, 4, (400, 1))
  _, steps = play('Breakout', 400, 1, actions=actions)
  lost = np.flatnonzero(steps.life_lost[:, 0])
  life, game = int(lost[0]), int(np.flatnonzero(steps.game_over[:, 0])[0])
  for end, over in ((life, False), (game, True)):
    _, cut = play('Breakout', end + 2, 1, actions=actions, max_steps=end + 1)
    np.testing.assert_array_equal(cut.life_lost[end], [True])
    np.testing.assert_array_equal(cut.game_over[end], [over])
    np.testing.assert_array_equal(cut.truncated[end], [not over])
    np.testing.assert_array_equal(np.flatnonzero(cut.first[:, 0]), [end + 1])


def test_a_game_without_lives():
  _, steps = play('Pong', 2000, 1, until=lambda step: step.first.any())
  end = len(steps.first) - 2
  np.testing.assert_array_equal(np.flatnonzero(steps.game_over), [end])
  np.testing.assert_array_equal(np.flatnonzero(steps.life_lost), [end])
  assert -21 <= steps.score[end, 0] < -10
  assert (steps.reward == -1).sum() == 21


def test_lives_that_fall_to_zero_while_the_game_goes_on():
  _, steps = play('BankHeist', 1500, 1, until=lambda step: step.game_over.any())
  assert steps.game_over[-1] and steps.life_lost.sum() == 5  # 4 lives shown, and a car when none is


def test_same_seed_same_games_and_other_seeds_others():
  actions = np.random.default_rng(0).integers(0, 18, (60, 4))
  stacks, steps = play('Seaquest', 60, 4, seed=3, actions=actions)
  again, steps_again = play('Seaquest', 60, 4, seed=3, actions=actions)
  np.testing.assert_array_equal(stacks, again)
  for one, other in zip(steps, steps_again, strict=True):
    np.testing.assert_array_equal(one, other)
  few, _ = play('Seaquest', 60, 2, seed=3, actions=actions[:, :2])
  np.testing.assert_array_equal(few, stacks[:, :2])


def test_starts_differ_between_games_and_seeds():
  pytest.importorskip('ale_py')

  def starts(seed, **settings):
    with Environment('MsPacman', 3, seed, **settings) as env:
      first = env.reset()
      stacks = [env.step(np.zeros(3, int)).stacks for _ in range(8)][-1]
      if seed == 0:
        np.testing.assert_array_equal(env.reset(), first)
    return [stack.tobytes() for stack in stacks]

  zero, one = starts(0), starts(1)
  assert len(set(zero)) > 1 and len(set(one)) > 1
  assert zero != one and zero[1:] != one[:-1]  # nor the same games one further
  assert len(set(starts(0, noop_max=0))) == 1


def test_sticky_actions():
  actions = np.random.default_rng(0).integers(0, 4, (60, 1))
  runs = [
    play('Breakout', 60, 1, actions=actions, sticky=sticky)[0] for sticky in (0.0, 0.25, 0.25)
  ]
  assert (runs[0] != runs[1]).any()
  np.testing.assert_array_equal(runs[1], runs[2])


def test_rom_ids():
  assert len(set(GAMES)) == 26 and list(GAMES) == sorted(GAMES)
  assert [rom_id(game) for game in ('Qbert', 'MsPacman', 'KungFuMaster', 'UpNDown')] == [
    'qbert',
    'ms_pacman',
    'kung_fu_master',
    'up_n_down',
  ]
  for wrong, right in (
    ('Mspacman', 'MsPacman'),
    ('ms_pacman', 'MsPacman'),
    ('Breakuot', 'Breakout'),
  ):
    with pytest.raises(UserError, match=f'{wrong}.*did you mean {right}'):
      rom_id(wrong)
  with pytest.raises(UserError, match="'Zork': expected one of Alien"):
    rom_id('Zork')


def test_settings_and_actions_that_cannot_be():
  with pytest.raises(UserError, match='unknown Atari game'):
    Environment('Pnog', 1, 0)
  for settings in (
    dict(num_envs=0),
    dict(num_envs=1.5),
    dict(seed=-1),
    dict(max_steps=0),
    dict(noop_max=-1),
    dict(sticky=1.1),
  ):
    with pytest.raises(UserError, match=next(iter(settings))):
      Environment('Pong', **{'num_envs': 1, 'seed': 0, **settings})
  pytest.importorskip('ale_py')
  with Environment('Breakout', 2, 0) as env:
    env.reset()
    for actions, message in (
      ([0, 4], '0 to 4, expected 0 to 3'),
      ([-1, 0], '-1 to 0'),
      ([0], r'\(1,\)'),
      ([0.0, 1.0], 'float64'),
      ([[0, 1]], r'\(1, 2\)'),
      (0, r'\(\)'),
    ):
      with pytest.raises(UserError, match=message):
        env.step(actions)
    env.step([3, 0])


def test_without_the_emulator(monkeypatch):
  monkeypatch.setitem(sys.modules, 'ale_py.vector_env', None)
  with pytest.raises(UserError, match="pip install 'ale-py"):
    Environment('Pong', 1, 0)


@pytest.mark.slow
@pytest.mark.parametrize('game', GAMES)
def test_every_game(game):
  """The emulator's own count of frames starts anew in the rows called first, and in no others."""
  pytest.importorskip('ale_py')
  with Environment(game, 4, 0, max_steps=700) as env:
    env.reset()
    emulator, frames, draw = env._emulator, [], np.random.default_rng(0)
    original = emulator.step

    def watched(actions):
      result = original(actions)
      frames.append(result[-1]['episode_frame_number'].copy())
      return result

    emulator.step = watched
    steps = [env.step(draw.integers(0, env.num_actions, 4)) for _ in range(750)]
  anew = np.diff(np.stack(frames), axis=0) <= 0
  first = np.stack([step.first for step in steps])
  np.testing.assert_array_equal(first[1:], anew)
  assert first.any()
  assert 3 <= env.num_actions <= 18
