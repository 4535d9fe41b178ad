"""The job of collecting: double DQN plays a game from nothing, and a uniform sample of what it sees
is kept for a generator.

Here, too, is the loop of playing and learning, which fine-tuning shares.
"""

import collections
import functools
import itertools
import math
import shutil
import time
import zipfile
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from jax.sharding import SingleDeviceSharding
from ml_collections import ConfigDict

from palm_jax.atari import dqn
from palm_jax.atari.environment import FRAMES_A_STEP, SETTINGS, Environment, require_game
from palm_jax.atari.replay import Batch, Replay, rows_of
from palm_jax.base import devices
from palm_jax.base.checkpoints import Checkpoints
from palm_jax.base.errors import NonFiniteError, UserError
from palm_jax.base.files import replacing
from palm_jax.base.metrics import MetricWriter, Progress
from palm_jax.base.training import Preemption
from palm_jax.job import Job, Run, never

STACKS_IN_SHARD = 1024
RECENT_GAMES = 100  # that the score of a learner is the mean of
PURPOSES = {
  'games': 0,
  'batches': 1,
  'stacks': 2,
  'evaluation': 3,
}  # streams of random numbers from one seed


def default_config():
  return ConfigDict(
    dict(
      # of the emulator: PALM section 5.3; it may mean agent steps, which are four frames each
      frames=50_000_000,
      num_envs=8,  # games side by side; ours
      # of the kept stacks when unpacked, as a generator's training holds four fifths of them:
      # 283,000
      max_bytes=8_000_000_000,
      log_steps=20_000,  # agent steps a point of the curve
      checkpoint_minutes=10.0,
      agent=dqn.default_config(),  # dqn.dqn_zoo_config(): with RMSProp
    )
  )


def check(config, num_devices):
  """Raises UserError on settings of the whole config's section `collect` that cannot work."""
  del num_devices  # networks so small are trained on one
  check_play(config, 'collect', ('frames', 'max_bytes'), config.collect.frames / FRAMES_A_STEP)


def check_play(config, section, positive, agent_steps):
  """Raises UserError on settings of `play` in a section of the whole config that cannot work.

  Args:
    positive: names of further settings of that section that must be above 0.
    agent_steps: of the whole run.
  """
  c = config[section]
  require_game(config, section)
  if jax.process_count() > 1:
    raise UserError(
      f'{section}: {jax.process_count()} processes, expected 1: an emulator feeds one device; '
      'start it alone'
    )
  for name in ('num_envs', 'log_steps', 'checkpoint_minutes', *positive):
    if not c[name] > 0:
      raise UserError(f'{section}.{name}={c[name]} is not positive: set it above 0')
  if config.seed < 0:
    raise UserError(f'seed={config.seed} is negative: set it to 0 or more')
  dqn.check_config(f'{section}.agent', c.agent)
  rows_of(c.agent.capacity, c.num_envs, c.agent.n_step)
  period, num_envs = c.agent.learn_period, c.num_envs
  if num_envs % period and period % num_envs:
    raise UserError(
      f'{section}.num_envs={num_envs} and {section}.agent.learn_period={period}: expected that '
      'one divides the '
      f'other; set num_envs to {max(1, round(num_envs / period)) * period}, for example'
    )
  if c.agent.min_history < (c.agent.n_step + 1) * num_envs:
    raise UserError(
      f'{section}.agent.min_history={c.agent.min_history} holds no window of '
      f'n_step={c.agent.n_step} in each of '
      f'{num_envs} environments: set it to {(c.agent.n_step + 1) * num_envs} or more'
    )
  if c.agent.min_history >= agent_steps:
    raise UserError(
      f'{section}.agent.min_history={c.agent.min_history}, but the run ends after '
      f'{agent_steps:,.0f} agent steps, so '
      'nothing would be learned: lower it, or play for longer'
    )


class Played(NamedTuple):
  """What `play` reached."""

  agent: Any
  agent_steps: int
  updates: int
  games: int  # that ended
  recent: list  # raw scores of the last of them
  resumes: int  # times it was stopped
  seconds: float
  origin: Any  # as it was given when the agent was new


def play(
  job,
  c,
  agent_steps,
  make_environment,
  seed,
  folder,
  mesh,
  preemption,
  trunk=None,
  augment=None,
  sample=None,
  origin=None,
):
  """Plays and learns until `agent_steps` are done, going on from the newest checkpoint in `folder`.

  A step whose action the emulator ignores, one after each game's end, is counted as well. The
  emulator itself cannot be saved: after a stop, agent, replay and counters go on from the
  checkpoint and new games are begun.

  Args:
    job: name for messages.
    c: section with num_envs, log_steps, checkpoint_minutes and agent (see
      palm_jax.atari.dqn.default_config).
    agent_steps: over all environments; rounded up to whole rows.
    make_environment: (num_envs, seed) -> an environment as palm_jax.atari.environment.Environment.
    seed: of everything drawn.
    folder: for checkpoints/, replay.dat, metrics.
    mesh: its first device is used.
    preemption: Preemption; when it asks, all is saved.
    trunk: convolutions to begin with, see `dqn.init`.
    augment: see `dqn.update`.
    sample: StackSample that is shown every row.
    origin: what the trunk is, kept with the agent.

  Returns:
    Played, or None if stopped.

  Raises:
    UserError: see Replay and Checkpoints.
    NonFiniteError: a loss became NaN or infinite; the last good checkpoint stays.
  """
  a, num_envs, rows = c.agent, c.num_envs, math.ceil(agent_steps / c.num_envs)
  key, here = jax.random.key(seed), SingleDeviceSharding(mesh.devices.flat[0])
  with Checkpoints(folder / 'checkpoints') as checkpoints:
    # Other noops than those of the games that were cut off.
    with make_environment(
      num_envs, draw_seed(seed, 'games', checkpoints.latest_step() or 0)
    ) as environment:
      stacks, starts = environment.reset(), np.ones(num_envs, bool)  # (E, H, W, 4)
      init = jax.jit(
        lambda: dqn.init(
          jax.random.fold_in(key, 0), stacks.shape[1:], environment.num_actions, a, trunk
        ),
        out_shardings=here,
      )
      act = jax.jit(
        lambda params, stacks, epsilon, row: dqn.act(
          params, stacks, epsilon, jax.random.fold_in(jax.random.fold_in(key, 1), row), a
        )
      )
      update = jax.jit(
        lambda agent, batches: dqn.update(agent, batches, jax.random.fold_in(key, 2), a, augment),
        donate_argnums=0,
      )
      replay = Replay(folder / 'replay.dat', a.capacity, num_envs, stacks.shape[1:3])

      template = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), jax.eval_shape(init)
      )
      restored = checkpoints.restore({'agent': template})
      if restored:
        agent, saved, row = restored.items['agent'], restored.metadata, restored.step
        if row < rows:  # else nobody asks for the replay any more, and it may be gone
          saved['resumes'] += 1
          replay.restore(row)
          replay.cut()
        logging.info('%s: going on from agent step %d', job, row * num_envs)
      else:
        agent, row = init(), 0
        saved = dict(
          updates=0,
          games=0,
          recent=[],
          resumes=0,
          seconds=0.0,
          scalars={},
          sampled=0,
          origin=origin,
        )
      updates, games, scalars = saved['updates'], saved['games'], saved['scalars']
      recent = collections.deque(saved['recent'], RECENT_GAMES)
      if sample:
        sample.restore(saved['sampled'])

      per_row, every = max(1, num_envs // a.learn_period), max(1, a.learn_period // num_envs)
      log_rows, scores, pending = math.ceil(c.log_steps / num_envs), [], []
      progress = Progress(job, rows * num_envs, 'agent steps')
      started, saved_at = time.monotonic() - saved['seconds'], time.monotonic()
      with MetricWriter(folder, row * num_envs) as writer:
        while row < rows:
          epsilon = dqn.epsilon_at(row * num_envs, a)
          actions = act(agent.params, stacks, epsilon, np.int32(row))
          learn = row * num_envs >= a.min_history and row % every == 0
          if learn:  # drawn while the device chooses the actions
            generators = [
              np.random.default_rng([seed, PURPOSES['batches'], updates + u])
              for u in range(per_row)
            ]
            draws = [
              replay.sample(generator, a.batch_size, a.n_step, a.gamma) for generator in generators
            ]
          actions = np.asarray(actions)
          step = environment.step(actions)
          remember(replay, stacks, actions, starts, step)
          if sample:
            sample.take(row, stacks)
          if learn:
            agent, metrics = update(agent, Batch(*map(np.stack, zip(*draws, strict=True))))
            updates += per_row
            pending.append(metrics)
          scores += step.score[step.game_over | step.truncated].tolist()
          stacks, starts, row = step.stacks, step.first, row + 1

          done, stop, steps_done = row == rows, preemption.requested, row * num_envs
          save = (
            done
            or stop
            or replay.must_commit
            or time.monotonic() - saved_at > 60 * c.checkpoint_minutes
          )
          if save or row % log_rows == 0:
            games += len(scores)
            recent += scores
            point = average(pending, job, steps_done) | dict(
              frames=steps_done * FRAMES_A_STEP, games=games, epsilon=epsilon, updates=updates
            )
            if scores:
              point['score'] = float(np.mean(scores))
            writer.write(steps_done, point)
            scalars |= point
            scores, pending = [], []
          if done or row % 32 == 0:
            progress.update(
              steps_done,
              dict(
                frames=steps_done * FRAMES_A_STEP,
                epsilon=epsilon,
                **{
                  name: scalars[name] for name in ('games', 'score', 'loss', 'q') if name in scalars
                },
              ),
            )
          if save:
            replay.commit()
            checkpoints.save(
              row,
              {'agent': agent},
              dict(
                updates=updates,
                games=games,
                recent=[*recent],
                resumes=saved['resumes'],
                seconds=time.monotonic() - started,
                scalars=scalars,
                sampled=sample.commit() if sample else 0,
                origin=saved['origin'],
              ),
            )
            saved_at = time.monotonic()
          if stop and not done:
            return None
  return Played(
    agent,
    row * num_envs,
    updates,
    games,
    [*recent],
    saved['resumes'],
    time.monotonic() - started,
    saved['origin'],
  )


def remember(replay, stacks, actions, starts, step):
  """Adds to a Replay what was seen (E, H, W, 4), done (E,), whether it began a game (E,), and the
  Step that came of it."""
  replay.add(
    stacks[..., -1], actions, np.clip(step.reward, -1, 1), ~step.life_lost, starts, ~step.first
  )


def draw_seed(seed, purpose, *numbers):
  """A seed for an environment, one for each of PURPOSES and numbers."""
  return int(np.random.SeedSequence([seed, PURPOSES[purpose], *numbers]).generate_state(1)[0])


def average(pending, job, agent_steps):
  """Means {name: float} of a list of metrics. Raises NonFiniteError for one that is NaN or
  infinite."""
  if not pending:
    return {}
  means = jax.tree.map(lambda *values: float(np.mean(values)), *jax.device_get(pending))
  for name, value in means.items():
    if not math.isfinite(value):
      raise NonFiniteError(
        f'{job}: {name} is {value} before agent step {agent_steps}: lower {job}.agent.lr; the last '
        'good checkpoint stays'
      )
  return means


class StackSample:
  """Stacks drawn uniformly from a run of known length: one in each of `count` equal parts of it.

  Every step of the run is equally likely, the sample spreads over the whole run, and it only ever
  grows: there is nothing to replace, as there would be in a reservoir, so what is on the disk stays
  right whenever the run is killed.

  Args:
    folder: for the shards.
    agent_steps: of the run, over all environments; step s is environment s % E of row s // E.
    count: stacks, at most agent_steps.
    num_envs: E.
    seed: of the draws.
  """

  def __init__(self, folder, agent_steps, count, num_envs, seed):
    self._folder, self._steps, self._size, self._num_envs, self._seed = (
      folder,
      agent_steps,
      count,
      num_envs,
      seed,
    )
    self.restore(0)

  def restore(self, count):
    """Goes back to the first `count` stacks, the number at a commit."""
    self.count, self._open = count, []
    if count % STACKS_IN_SHARD and count < self._size:
      with np.load(self._path(count // STACKS_IN_SHARD)) as shard:
        self._open = list(shard['images'][: count % STACKS_IN_SHARD])
    self._next = self._draw()

  def take(self, row, stacks):
    """Keeps those of stacks (E, H, W, 4) that were drawn. Rows come in order."""
    while self._next < (row + 1) * self._num_envs:
      self._open.append(stacks[self._next - row * self._num_envs].copy())
      self.count += 1
      self._next = self._draw()
      if self.count % STACKS_IN_SHARD == 0:
        self._write()
        self._open = []

  def commit(self):
    """Brings all stacks to the disk; returns their number."""
    if self._open:
      self._write()
    return self.count

  def finish(self, path):
    """Writes all stacks to one .npz: images (N, H, W, 4) uint8, oldest frame first, and labels
    (N,), all 0."""
    if path.exists():  # it is whole, and its shards may be gone
      return
    paths = [self._path(i) for i in range(-(-self.count // STACKS_IN_SHARD))]
    write_stacks(path, self.count, (np.load(path)['images'] for path in paths))

  def _path(self, shard):
    return self._folder / f'{shard:06d}.npz'

  def _write(self):
    write_stacks(
      self._path((self.count - 1) // STACKS_IN_SHARD), len(self._open), [np.stack(self._open)]
    )

  def _draw(self):
    if self.count == self._size:
      return math.inf
    start, stop = (i * self._steps // self._size for i in (self.count, self.count + 1))
    return int(
      np.random.default_rng([self._seed, PURPOSES['stacks'], self.count]).integers(start, stop)
    )


def write_stacks(path, count, blocks):
  """Writes an .npz of `count` images, which come in blocks (n, H, W, 4) and need not fit into
  memory together, and labels 0."""

  def header(file, shape, dtype):
    np.lib.format.write_array_header_1_0(
      file, dict(descr=np.lib.format.dtype_to_descr(dtype), fortran_order=False, shape=shape)
    )

  blocks = iter(blocks)
  first = next(blocks)
  with (
    replacing(path) as file,
    zipfile.ZipFile(file, 'w', zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
  ):
    with archive.open('images.npy', 'w', force_zip64=True) as images:
      header(images, (count, *first.shape[1:]), np.dtype(np.uint8))
      for block in itertools.chain([first], blocks):
        images.write(np.ascontiguousarray(block).data)
    with archive.open('labels.npy', 'w') as labels:
      np.lib.format.write_array(labels, np.zeros(count, np.int64))


def run(this: Run, make_environment=Environment) -> dict | None:
  """The job: plays config.atari.game with double DQN and keeps a uniform sample of the stacks of
  frames seen.

  Writes checkpoints, metrics (the learning curve: score, frames, agent steps) and stacks.npz under
  <workdir>/collect and, when complete, <workdir>/results/collect.json; then the replay is removed.

  Args:
    config: the whole config; read are seed, atari.game and collect.
    workdir: pathlib.Path.
    mesh: its first device is used.
    make_environment: (game, num_envs, seed) -> an environment as
      palm_jax.atari.environment.Environment.

  Returns:
    True when complete, False when stopped by SIGTERM; then everything is saved, and new games are
    begun by the next run.

  Raises:
    UserError: settings that cannot work; see also `play`.
    NonFiniteError: see `play`.
  """
  config, workdir, mesh = this.config, this.workdir, this.mesh
  c, folder, game = config.collect, workdir / 'collect', config.atari.game
  agent_steps = math.ceil(c.frames / FRAMES_A_STEP / c.num_envs) * c.num_envs
  with make_environment(game, 1, 0) as environment:
    shape = environment.reset().shape[1:]
  count = min(agent_steps, c.max_bytes // math.prod(shape))
  if not count:
    raise UserError(
      f'collect.max_bytes={c.max_bytes} holds no stack of {math.prod(shape)} bytes: raise it'
    )
  sample = StackSample(folder / 'shards', agent_steps, count, c.num_envs, config.seed)
  with Preemption() as preemption:
    played = play(
      'collect',
      c,
      agent_steps,
      functools.partial(make_environment, game),
      config.seed,
      folder,
      mesh,
      preemption,
      sample=sample,
    )
  if played is None:
    return None
  sample.finish(folder / 'stacks.npz')
  results = dict(
    job='collect',
    game=game,
    score=float(np.mean(played.recent)) if played.recent else None,
    frames=played.agent_steps * FRAMES_A_STEP,
    agent_steps=played.agent_steps,
    updates=played.updates,
    games=played.games,
    resumes=played.resumes,
    seconds=played.seconds,
    stacks=dict(
      path=str(folder / 'stacks.npz'),
      images=[count, *shape],
      bytes=(folder / 'stacks.npz').stat().st_size,
    ),
    seed=config.seed,
    protocol=dict(
      score=f'mean raw score of the last {RECENT_GAMES} games, or of all, while learning',
      emulator=SETTINGS,
      stacks='one drawn uniformly in each of equal parts of the run; frames oldest first, zeros '
      "before a game's first",
      rewards='clipped to [-1, 1] for learning',
      life='a lost life ends the return, the game goes on',
      num_envs=c.num_envs,
      agent=c.agent.to_dict(),
    ),
    **devices.describe(mesh),
  )
  return results


def clean(this: Run) -> None:
  """Removes the replay and the shards of the stacks, which only an incomplete job needs."""
  folder = this.workdir / 'collect'
  (folder / 'replay.dat').unlink(missing_ok=True)
  shutil.rmtree(folder / 'shards', ignore_errors=True)


def table(results: dict) -> str:
  """The result in a line."""
  stacks = results['stacks']
  return (
    f'collect: {results["game"]}, {results["frames"]:,} frames ({results["agent_steps"]:,} agent '
    f'steps), {results["games"]} games, mean score of the last {results["score"]}; '
    f'{stacks["images"][0]:,} stacks in {stacks["path"]}'
  )


JOB = Job('collect', run, check, needs_data=never, clean=clean, table=table)
