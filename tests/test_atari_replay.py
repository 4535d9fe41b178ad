import os

import numpy as np
import pytest
import scipy.stats

from palm_jax.atari.play import remember
from palm_jax.atari.replay import Replay, rows_of
from palm_jax.base.errors import UserError
from tests.catch import Catch

SIZE, ENVS = 12, 3


class Truth:
  """Plays Catch with random actions, fills a replay, and keeps what happened as plain lists."""

  def __init__(self, path, capacity=3000):
    # Environment 0 is always cut off, the others come to their ends.
    self.environment = Catch(
      '', ENVS, 0, size=SIZE, balls=2, max_steps=np.array([17, 50, 50]), prize=5
    )
    self.replay = Replay(path, capacity, ENVS, (SIZE, SIZE))
    self.replay.begin()
    self.generator = np.random.default_rng(0)
    self.games = [
      [] for _ in range(ENVS)
    ]  # of each environment: lists of (row, frame, stack, action, reward, alive)
    self.begin()

  def begin(self):
    self.stacks, self.starts = self.environment.reset(), np.ones(ENVS, bool)

  def play(self, rows):
    for _ in range(rows):
      actions = self.generator.integers(0, 3, ENVS)
      step = self.environment.step(actions)
      row = self.replay.total
      stamped = self.stacks.copy()
      stamped[:, -1, -1, -1], stamped[:, -2, -1, -1] = (
        1 + row % 250,
        np.arange(ENVS),
      )  # no two are alike
      frames = stamped[..., -1]
      remember(self.replay, stamped, actions, self.starts, step)
      for e, game in enumerate(self.games):
        if self.starts[e]:
          game.append([])
          self.seen = {**getattr(self, 'seen', {}), e: []}
        self.seen[e].append(self.stacks[e, ..., -1])
        np.testing.assert_array_equal(
          self.stacks[e], self.stack(self.seen[e])
        )  # as an environment has to stack
        stack = self.stack([*(row[1] for row in game[-1]), frames[e]])
        clipped = np.sign(step.reward[e])  # of -5, 0, 5
        game[-1].append((row, frames[e], stack, actions[e], clipped, not step.life_lost[e]))
      self.stacks, self.starts = step.stacks, step.first

  def stack(self, frames):
    return np.stack(([np.zeros((SIZE, SIZE), np.uint8)] * 3 + frames)[-4:], -1)

  def transitions(self, n, gamma):
    """{(row, environment): (stack, action, return, discount, next stack)} by walking along each
    game."""
    found = {}
    for e, games in enumerate(self.games):
      for rows in games:
        for i in range(len(rows) - 1):  # the last row of a game is no transition
          total, discount, j = 0.0, 1.0, i
          while j < min(i + n, len(rows) - 1) and discount:
            total, discount = total + discount * rows[j][4], discount * gamma * rows[j][5]
            j += 1
          found[rows[i][0], e] = (rows[i][2], rows[i][3], total, discount, rows[j][2])
    return found


def drawn(replay, truth, n, gamma, size):
  """The (row, environment) of each of `size` samples; all that is sampled must be a true
  transition."""
  places = {transition[0].tobytes(): place for place, transition in truth.items()}
  assert len(places) == len(truth)
  batch = replay.sample(np.random.default_rng(1), size, n, gamma)
  found = [places[stack.tobytes()] for stack in batch.stacks]
  for got, want in zip(batch, zip(*(truth[place] for place in found), strict=True), strict=True):
    np.testing.assert_allclose(got, np.stack(want), rtol=1e-6)
  return found


@pytest.mark.parametrize('n, gamma', [(1, 0.99), (3, 0.9), (10, 0.99)])
def test_samples_are_the_transitions_of_plain_lists(tmp_path, n, gamma):
  truth = Truth(tmp_path / 'replay.dat')
  truth.play(240)
  lengths = [{len(game) for game in games[:-1]} for games in truth.games]
  assert lengths == [{18}, {21}, {21}]  # the last picture, too
  transitions = truth.transitions(n, gamma)
  expected = {place for place in transitions if place[0] < 240 - n}
  places = drawn(truth.replay, transitions, n, gamma, 6000)
  assert set(places) == expected
  counts = np.unique(places, axis=0, return_counts=True)[1]
  assert scipy.stats.chisquare(counts).pvalue > 1e-3  # uniform


def test_life_losses_and_cuts_by_hand(tmp_path):
  replay = Replay(tmp_path / 'replay.dat', 64, 1, (1, 1))
  replay.begin()
  # frame, reward, alive, start, transition: a life is lost at 3, the game is cut off at 6, whose
  # picture is the last
  rows = [
    (1, 1, 1, 1, 1),
    (2, 2, 1, 0, 1),
    (3, 4, 0, 0, 1),
    (4, 8, 1, 0, 1),
    (5, 16, 1, 0, 1),
    (6, 99, 1, 0, 0),
    (7, 32, 1, 1, 1),
    (8, 64, 1, 0, 1),
    (9, 128, 1, 0, 1),
    (10, 256, 1, 0, 1),
  ]
  for frame, reward, alive, start, transition in rows:
    replay.add(
      np.full((1, 1, 1), frame),
      [0],
      [reward],
      np.array([alive], bool),
      np.array([start], bool),
      np.array([transition], bool),
    )
  batch = replay.sample(np.random.default_rng(0), 300, 3, 0.5)
  seen = {
    tuple(s.reshape(4)): (float(r), float(d), tuple(t.reshape(4)))
    for s, r, d, t in zip(
      batch.stacks, batch.returns, batch.discounts, batch.next_stacks, strict=True
    )
  }
  assert seen == {
    (0, 0, 0, 1): (1 + 2 / 2 + 4 / 4, 0, (1, 2, 3, 4)),
    (0, 0, 1, 2): (2 + 4 / 2, 0, (1, 2, 3, 4)),
    (0, 1, 2, 3): (4, 0, (1, 2, 3, 4)),
    (1, 2, 3, 4): (
      8 + 16 / 2,
      1 / 4,
      (3, 4, 5, 6),
    ),  # two steps to the cut, and the value of its picture
    (2, 3, 4, 5): (16, 1 / 2, (3, 4, 5, 6)),
    (0, 0, 0, 7): (32 + 64 / 2 + 128 / 4, 1 / 8, (7, 8, 9, 10)),
  }


def test_a_wrapped_ring_holds_the_newest_rows(tmp_path):
  truth = Truth(tmp_path / 'replay.dat', capacity=3 * 64)
  truth.play(200)
  places = drawn(truth.replay, newest(truth.transitions(3, 0.9), 100), 3, 0.9, 3000)
  assert {row for row, _ in places} == set(range(200 - 64 + 3, 200 - 3))


def newest(transitions, count):
  """Those of the last rows; stamps of frames repeat after 250."""
  last = max(row for row, _ in transitions)
  return {place: transition for place, transition in transitions.items() if place[0] > last - count}


@pytest.mark.parametrize('lost', [0, 1, 8])
def test_rows_after_the_checkpoint_are_harmless(tmp_path, lost):
  """Killed with rows in the file that the newest checkpoint, and the one before it, does not
  know."""
  path, committed = tmp_path / 'replay.dat', []
  truth = Truth(path, capacity=3 * 64)
  while truth.replay.total < 184:
    truth.play(1)
    if truth.replay.must_commit:
      truth.replay.commit()
      committed.append((truth.replay.total, newest(truth.transitions(3, 0.9), 100)))
  truth.play(lost)
  assert [total for total, _ in committed] == list(
    range(8, 192, 8)
  ) and truth.replay.must_commit == (lost == 8)
  for total, transitions in committed[-2:]:
    again = Replay(path, 3 * 64, ENVS, (SIZE, SIZE))
    again.restore(total)
    places = drawn(again, transitions, 3, 0.9, 3000)
    assert set(places) == {place for place in transitions if total - 64 + 3 <= place[0] < total - 3}


def test_a_stop_is_a_cut(tmp_path):
  truth = Truth(tmp_path / 'replay.dat')
  truth.play(40)
  truth.replay.commit()
  truth.play(5)
  for games in truth.games:  # what a kill loses
    games[:] = [[row for row in game if row[0] < 40] for game in games if game[0][0] < 40]
  truth.replay = Replay(tmp_path / 'replay.dat', 3000, ENVS, (SIZE, SIZE))
  truth.replay.restore(40)
  truth.replay.cut()
  truth.begin()
  truth.play(40)
  places = drawn(truth.replay, truth.transitions(10, 0.9), 10, 0.9, 4000)
  assert {38, 40} <= {row for row, _ in places} and 39 not in {row for row, _ in places}


@pytest.mark.parametrize('damage', ['lost', 'cut short'])
def test_a_checkpoint_without_its_rows_is_named(tmp_path, damage):
  path = tmp_path / 'replay.dat'
  truth = Truth(path)
  truth.play(40)
  truth.replay.commit()
  path.unlink() if damage == 'lost' else os.truncate(path, path.stat().st_size - 1)
  for _ in range(2):
    with pytest.raises(
      UserError,
      match='replay.dat is missing or cut short, but the checkpoint beside it counts on 40 rows',
    ):
      Replay(path, 3000, ENVS, (SIZE, SIZE)).restore(40)
  assert path.exists() == (damage == 'cut short')  # a new one would pass for it the next time


def test_impossible_sizes_are_named(tmp_path):
  with pytest.raises(UserError, match='capacity=100 has 12 rows for each of 8 environments'):
    Replay(tmp_path / 'replay.dat', 100, 8)
  with pytest.raises(UserError, match='has 64 rows for each of 1 environments, expected 75'):
    rows_of(64, 1, n_step=70)
  replay = Replay(tmp_path / 'replay.dat', 128, 2, (4, 4))
  replay.begin()
  with pytest.raises(ValueError, match='0 rows hold no window of 3 steps'):
    replay.sample(np.random.default_rng(0), 4, 3, 0.9)
