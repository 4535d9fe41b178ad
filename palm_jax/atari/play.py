"""Playing a game and learning from it, row by row; collecting and fine-tuning share it."""

import collections
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding
from ml_collections import ConfigDict

from palm_jax.atari import dqn
from palm_jax.atari.environment import FRAMES_A_STEP, Environment, Step, require_game
from palm_jax.atari.replay import Batch, Replay, rows_of
from palm_jax.base import devices
from palm_jax.base.errors import NonFiniteError, UserError
from palm_jax.base.steps import Restored
from palm_jax.base.training import Training

RECENT_GAMES = 100  # that the score of a learner is the mean of
SHOWN = 'games', 'score', 'loss', 'q'  # in progress lines
SHOW_ROWS = 32  # between two looks at the clock
# Streams of random numbers from one seed.
PURPOSES = {'games': 0, 'batches': 1, 'stacks': 2, 'evaluation': 3}


def check_play(config: ConfigDict, section: str, agent_steps: float) -> None:
  """Raises UserError on settings of `play` in a section of the whole config that cannot work.

  Args:
    config: the whole config.
    section: 'collect' or 'finetune'.
    agent_steps: of the whole run.
  """
  c = config[section]
  require_game(config, section)
  if jax.process_count() > 1:
    raise UserError(
      f'{section}: {jax.process_count()} processes, expected 1: an emulator feeds one device; '
      'start it alone'
    )
  dqn.check_config(f'{section}.agent', c.agent)
  rows_of(c.agent.capacity, c.num_envs, c.agent.n_step)
  period, num_envs = c.agent.learn_period, c.num_envs
  history = c.agent.min_history
  if num_envs % period and period % num_envs:
    raise UserError(
      f'{section}.num_envs={num_envs} and {section}.agent.learn_period={period}: expected that '
      f'one divides the other; set num_envs to {max(1, round(num_envs / period)) * period}, for '
      'example'
    )
  window = c.agent.n_step + 1
  if history < window * num_envs:
    raise UserError(
      f'{section}.agent.min_history={history} holds no window of n_step={c.agent.n_step} in each '
      f'of {num_envs} environments: set it to {window * num_envs} or more'
    )
  if history >= agent_steps:
    raise UserError(
      f'{section}.agent.min_history={history}, but the run ends after {agent_steps:,.0f} agent '
      'steps, so nothing would be learned: lower it, or play for longer'
    )


class Played(NamedTuple):
  """What `play` reached."""

  agent: dqn.Agent
  agent_steps: int
  updates: int
  games: int  # that ended
  recent: list[float]  # raw scores of the last of them
  resumes: int  # times it was stopped
  seconds: float
  origin: Any  # as it was given when the agent was new


def play(
  job: str,
  c: ConfigDict,
  agent_steps: int,
  make_environment: Callable[[int, int], Environment],
  seed: int,
  folder: pathlib.Path,
  mesh: Mesh,
  trunk: Any = None,
  augment: Callable | None = None,
  sample: Any = None,
  origin: Any = None,
) -> Played:
  """Plays and learns until `agent_steps` are done, and resumes what was saved.

  A step whose action the emulator ignores, one after each game's end, is counted as well. The
  emulator itself cannot be saved: after a stop, agent, replay and counters continue from the
  checkpoint and new games are begun.

  Args:
    job: name for messages.
    c: section with num_envs, log_steps, checkpoint_minutes and agent (dqn.default_config).
    agent_steps: over all environments; rounded up to whole rows.
    make_environment: (num_envs, seed) -> environment.
    seed: of everything drawn.
    folder: for checkpoints/, replay.dat, metrics.
    mesh: its first device is used.
    trunk: convolutions to begin with, see dqn.init.
    augment: see dqn.update.
    sample: stacks.StackSample that is shown every row.
    origin: what the trunk is, as `check_origin` wants it; kept with the agent.

  Raises:
    UserError: see Replay, Checkpoints and `check_origin`.
    NonFiniteError: a loss became NaN or infinite; the last good checkpoint stays.
    Stopped: by a signal; everything is saved.
  """
  rows = math.ceil(agent_steps / c.num_envs)
  log_rows = math.ceil(c.log_steps / c.num_envs)
  with Training(
    job,
    folder,
    rows,
    unit='agent steps',
    per_step=c.num_envs,
    metrics_per_step=c.num_envs,
    checkpoint_minutes=c.checkpoint_minutes,
  ) as training:
    # Other noops than those of the games that were cut off.
    games_seed = draw_seed(seed, 'games', training.checkpoints.latest_step() or 0)
    with make_environment(c.num_envs, games_seed) as environment:
      player = Player(c, environment, seed, folder, mesh, trunk, augment, sample, origin)
      player.restore(training.resume({'agent': player.template}), rows)
      while not training.over:
        player.play_row(training.step)
        training.advance()
        save = training.should_save or player.replay.must_commit
        steps = training.step * c.num_envs
        if save or training.step % log_rows == 0:
          training.write(player.point(job, steps))
        if training.complete or training.step % SHOW_ROWS == 0:
          epsilon, scalars = player.epsilon, player.scalars
          shown = {name: scalars[name] for name in SHOWN if name in scalars}
          training.show(dict(frames=steps * FRAMES_A_STEP, epsilon=epsilon, **shown))
        if save:
          player.replay.commit()
          training.save({'agent': player.agent}, **player.saved())
  return Played(
    player.agent,
    rows * c.num_envs,
    player.updates,
    player.games,
    [*player.recent],
    player.resumes,
    training.seconds,
    player.origin,
  )


class Player:
  """An agent at its games: one row is a step in each environment, and the updates due after it.

  Arguments as of `play`.
  """

  def __init__(
    self,
    c: ConfigDict,
    environment: Environment,
    seed: int,
    folder: pathlib.Path,
    mesh: Mesh,
    trunk: Any,
    augment: Callable | None,
    sample: Any,
    origin: Any,
  ) -> None:
    self._c = c
    self._folder = folder
    self._environment = environment
    self._seed = seed
    self._sample = sample
    self._stacks = environment.reset()  # (E, H, W, 4)
    self._starts = np.ones(c.num_envs, bool)
    self._per_row = max(1, c.num_envs // c.agent.learn_period)
    self._every = max(1, c.agent.learn_period // c.num_envs)
    key, here = jax.random.key(seed), SingleDeviceSharding(mesh.devices.flat[0])
    shape, num_actions = self._stacks.shape[1:], environment.num_actions

    def init():
      return dqn.init(jax.random.fold_in(key, 0), shape, num_actions, c.agent, trunk)

    def act(params, stacks, epsilon, row):
      key_row = jax.random.fold_in(jax.random.fold_in(key, 1), row)
      return dqn.act(params, stacks, epsilon, key_row, c.agent)

    def update(agent, batches):
      return dqn.update(agent, batches, jax.random.fold_in(key, 2), c.agent, augment)

    self._init = jax.jit(init, out_shardings=here)
    self._act = jax.jit(act)
    self._update = jax.jit(update, donate_argnums=0)
    self.template = devices.templates(jax.eval_shape(self._init), here)
    self.replay = Replay(folder / 'replay.dat', c.agent.capacity, c.num_envs, shape[:2])
    self.epsilon = 1.0
    self._scores: list[float] = []  # of games that ended since the last point
    self._pending: list[Any] = []  # metrics since then
    self.updates = self.games = self.resumes = 0
    self.recent: collections.deque[float] = collections.deque([], RECENT_GAMES)
    self.scalars: dict[str, float] = {}
    self.origin = origin

  def restore(self, restored: Restored | None, rows: int) -> None:
    """Continues from a checkpoint, or begins with a new agent. Raises UserError: `check_origin`."""
    if restored is None:
      self.agent = self._init()
      self.replay.begin()
      return
    self.agent, saved = restored.items['agent'], restored.metadata
    self.resumes = saved['resumes']
    check_origin(self._folder, saved['origin'], self.origin)
    self.origin = saved['origin']
    if restored.step < rows:  # else nobody needs the replay any more, and it may be gone
      self.resumes += 1
      self.replay.restore(restored.step)
      self.replay.cut()
    self.updates = saved['updates']
    self.games = saved['games']
    self.scalars = saved['scalars']
    self.recent.extend(saved['recent'])
    if self._sample:
      self._sample.restore(saved['sampled'])

  def play_row(self, row: int) -> None:
    """A step in every environment, and the updates that are due."""
    a, steps = self._c.agent, row * self._c.num_envs
    self.epsilon = dqn.epsilon_at(steps, a)
    actions = self._act(self.agent.params, self._stacks, self.epsilon, np.int32(row))
    learn = steps >= a.min_history and row % self._every == 0
    draws = self._draw() if learn else []  # drawn while the device chooses the actions
    actions = np.asarray(actions)
    step = self._environment.step(actions)
    remember(self.replay, self._stacks, actions, self._starts, step)
    if self._sample:
      self._sample.take(row, self._stacks)
    if learn:
      batches = Batch(*map(np.stack, zip(*draws, strict=True)))
      self.agent, metrics = self._update(self.agent, batches)
      self.updates += self._per_row
      self._pending.append(metrics)
    self._scores += step.score[step.game_over | step.truncated].tolist()
    self._stacks, self._starts = step.stacks, step.first

  def _draw(self):
    """The batches of the updates that follow."""
    a, numbers = self._c.agent, range(self.updates, self.updates + self._per_row)
    generators = [np.random.default_rng([self._seed, PURPOSES['batches'], u]) for u in numbers]
    return [self.replay.sample(g, a.batch_size, a.n_step, a.gamma) for g in generators]

  def point(self, job: str, steps: int) -> dict[str, float]:
    """A point of the learning curve, of all since the one before. Raises NonFiniteError."""
    self.games += len(self._scores)
    self.recent.extend(self._scores)
    point = average(self._pending, job, steps) | dict(
      frames=steps * FRAMES_A_STEP, games=self.games, epsilon=self.epsilon, updates=self.updates
    )
    if self._scores:
      point['score'] = float(np.mean(self._scores))
    self.scalars = self.scalars | point
    self._scores, self._pending = [], []
    return point

  def saved(self) -> dict[str, Any]:
    """What a checkpoint keeps beside the agent."""
    return dict(
      updates=self.updates,
      games=self.games,
      recent=[*self.recent],
      resumes=self.resumes,
      scalars=self.scalars,
      sampled=self._sample.commit() if self._sample else 0,
      origin=self.origin,
    )


def check_origin(
  folder: pathlib.Path, before: Mapping[str, Any] | None, now: Mapping[str, Any] | None
) -> None:
  """Raises UserError where an agent began with another trunk than the one there is now.

  Args:
    folder: in which it is saved.
    before, now: {'workdir', 'checkpoint_step', 'sha256'} of the trunk; None: fresh convolutions.
      Only the digests count, since a workdir may be moved.
  """
  if (before or {}).get('sha256') != (now or {}).get('sha256'):
    raise UserError(
      f'{folder} began with {_named(before)}, and the trunk now is {_named(now)}: delete {folder} '
      'to begin again with that, or choose another --workdir'
    )


def _named(origin):
  if not origin:
    return 'fresh convolutions'
  return f'{origin["workdir"]}, step {origin["checkpoint_step"]} (digest {origin["sha256"][:12]})'


def remember(
  replay: Replay, stacks: np.ndarray, actions: np.ndarray, starts: np.ndarray, step: Step
) -> None:
  """Adds a row to a Replay.

  Args:
    replay: that it goes into.
    stacks: (E, H, W, 4) uint8 that were seen.
    actions: (E,) that were done.
    starts: (E,) bool, whether a game began with these stacks.
    step: what came of it.
  """
  rewards = np.clip(step.reward, -1, 1)
  replay.add(stacks[..., -1], actions, rewards, ~step.life_lost, starts, ~step.first)


def draw_seed(seed: int, purpose: str, *numbers: int) -> int:
  """A seed for an environment, one for each of PURPOSES and numbers."""
  return int(np.random.SeedSequence([seed, PURPOSES[purpose], *numbers]).generate_state(1)[0])


def average(pending: list[Any], job: str, agent_steps: int) -> dict[str, float]:
  """Means of a list of metrics. Raises NonFiniteError for one that is NaN or infinite."""
  if not pending:
    return {}
  means = jax.tree.map(lambda *values: float(np.mean(values)), *jax.device_get(pending))
  for name, value in means.items():
    if not math.isfinite(value):
      raise NonFiniteError(
        f'{job}: {name} is {value} before agent step {agent_steps}: lower {job}.agent.lr, in '
        'another --workdir; the last good checkpoint of this one stays'
      )
  return means
