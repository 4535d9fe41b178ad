"""The job of collecting: double DQN plays a game, and stacks that it sees are kept.

The agent begins untrained. The stacks of frames are an even sample of all that it sees, from which
a generator learns.
"""

import functools
import math
import shutil
from collections.abc import Callable

import numpy as np
from ml_collections import ConfigDict

from palm_jax.atari import dqn
from palm_jax.atari.environment import FRAMES_A_STEP, SETTINGS, Environment, require_game
from palm_jax.atari.play import RECENT_GAMES, check_play, play
from palm_jax.atari.stacks import StackSample
from palm_jax.base import checks, devices
from palm_jax.base.digests import file_digest
from palm_jax.base.errors import UserError
from palm_jax.base.steps import list_steps
from palm_jax.data.collected import collected_stacks
from palm_jax.job import Job, Run, never


def default_config() -> ConfigDict:
  """Settings of the job."""
  return ConfigDict(
    dict(
      # of the emulator: PALM section 5.3; it may mean agent steps, which are four frames each
      frames=50_000_000,
      num_envs=8,  # games side by side; ours
      # of the kept stacks when unpacked: 283,000; a generator's training holds four fifths of them
      max_bytes=8_000_000_000,
      log_steps=20_000,  # agent steps a point of the curve
      checkpoint_minutes=10.0,
      agent=dqn.default_config(),  # dqn.dqn_zoo_config(): with RMSProp
    )
  )


RANGES = dict(
  frames=checks.Range(1, 10**10),
  num_envs=checks.Range(1, 10_000),
  max_bytes=checks.Range(1, 10**13),
  log_steps=checks.COUNT,
  checkpoint_minutes=checks.Range(0, 10**6, above=True),
  agent=dqn.RANGES,
)


def check(config: ConfigDict, num_devices: int) -> None:
  """Raises UserError on settings of the whole config's section `collect` that cannot work."""
  del num_devices  # networks so small are trained on one
  require_game(config, 'collect')
  checks.ranges('collect', config.collect, RANGES)
  check_play(config, 'collect', config.collect.frames / FRAMES_A_STEP)


def run(this: Run, make_environment: Callable[..., Environment] = Environment) -> dict:
  """The job: plays config.atari.game with double DQN and keeps an even sample of the stacks seen.

  Writes checkpoints, metrics (the learning curve: score, frames, agent steps) and stacks.npz under
  <workdir>/collect.

  Args:
    this: what the job works on.
    make_environment: (game, num_envs, seed) -> environment.

  Returns:
    What stands in results/collect.json.

  Raises:
    UserError, NonFiniteError, Stopped: see `play`.
  """
  config, workdir, mesh = this.config, this.workdir, this.mesh
  c, game = config.collect, config.atari.game
  folder = workdir / 'collect'
  agent_steps = math.ceil(c.frames / FRAMES_A_STEP / c.num_envs) * c.num_envs
  with make_environment(game, 1, 0) as environment:
    shape = environment.reset().shape[1:]
  count = min(agent_steps, c.max_bytes // math.prod(shape))
  if not count:
    raise UserError(
      f'collect.max_bytes={c.max_bytes} holds no stack of {math.prod(shape)} bytes: raise it'
    )
  stacks = collected_stacks(workdir)
  if not list_steps(folder / 'checkpoints'):
    stacks.unlink(missing_ok=True)  # of a run that was removed
  sample = StackSample(folder / 'shards', agent_steps, count, c.num_envs, config.seed)
  make_games = functools.partial(make_environment, game)
  played = play('collect', c, agent_steps, make_games, config.seed, folder, mesh, sample=sample)
  sample.finish(stacks)
  return dict(
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
      path=str(stacks),
      images=[count, *shape],
      bytes=stacks.stat().st_size,
      sha256=file_digest(stacks),
    ),
    seed=config.seed,
    protocol=protocol_of(c),
    **devices.describe(mesh),
  )


def protocol_of(c: ConfigDict) -> dict:
  """Every setting that made the score and the stacks; c is the config's section."""
  return dict(
    score=f'mean raw score of the last {RECENT_GAMES} games, or of all, while learning',
    emulator=SETTINGS,
    stacks='one drawn uniformly in each of equal parts of the run; frames oldest first, zeros '
    "before a game's first",
    rewards='clipped to [-1, 1] for learning',
    life='a lost life ends the return, the game goes on',
    num_envs=c.num_envs,
    agent=c.agent.to_dict(),
  )


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
