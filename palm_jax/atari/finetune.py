"""The job of fine-tuning: Atari-100k with DrQ, from a pretrained trunk or from scratch.

Its result is the score of what was learned.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from palm_jax.atari import dqn, drq
from palm_jax.atari.environment import FRAMES_A_STEP, SETTINGS, Environment, require_game
from palm_jax.atari.play import check_play, draw_seed, play
from palm_jax.base import checks, devices
from palm_jax.base.digests import digest
from palm_jax.base.errors import UserError
from palm_jax.base.files import user_path
from palm_jax.base.metrics import Progress
from palm_jax.base.training import Preemption
from palm_jax.job import Job, Run, never


def default_config() -> ConfigDict:
  """Settings of the job."""
  return ConfigDict(
    dict(
      # convolutions to begin with: 'own', of this workdir's pretraining; 'scratch', fresh; or those
      # of another workdir
      trunk='own',
      agent_steps=100_000,  # Atari-100k (SimPLe): 400,000 frames
      num_envs=1,  # the same: one game at a time
      # dopamine labs/atari_100k: at the end only, all side by side, one game each
      eval_episodes=100,
      log_steps=1000,  # agent steps a point of the curve
      checkpoint_minutes=5.0,
      # Updated by drq.EPSILON it is DrQ(eps), by drq.SGI it has SGI's learning rates. From scratch
      # the scales are 1.
      agent=drq.default_config(),
    )
  )


RANGES = dict(
  agent_steps=checks.COUNT,
  num_envs=checks.Range(1, 10_000),
  eval_episodes=checks.Range(1, 10_000),
  log_steps=checks.COUNT,
  checkpoint_minutes=checks.Range(0, 10**6, above=True),
  agent=dict(dqn.RANGES, eval_epsilon=checks.SHARE),
)


def check(config: ConfigDict, num_devices: int) -> None:
  """Raises UserError on settings of the whole config's section `finetune` that cannot work."""
  del num_devices  # networks so small are trained on one
  require_game(config, 'finetune')
  c = config.finetune
  check_play(config, 'finetune', c.agent_steps)
  checks.ranges('finetune', c, RANGES)
  if c.trunk == 'own' and config.encoder.name != 'nature':
    raise UserError(
      f"finetune.trunk='own' with encoder.name={config.encoder.name!r}: only convolutions of "
      "'nature' fit; pretrain that, or set finetune.trunk='scratch'"
    )
  if c.trunk not in ('own', 'scratch'):
    if not (user_path(c.trunk) / 'config.json').is_file():
      raise UserError(
        f"finetune.trunk={c.trunk!r} has no config.json: expected 'own', 'scratch' or the workdir "
        'of a pretraining'
      )
    drq.load_trunk(user_path(c.trunk))


def run(this: Run, make_environment: Callable[..., Environment] = Environment) -> dict:
  """The job: DrQ on config.atari.game, then the mean raw score of finetune.eval_episodes games.

  Writes checkpoints and metrics under <workdir>/finetune. The emulator cannot be saved: after a
  stop agent, replay and counters continue from the checkpoint, and a new game is begun; `resumes`
  in the result counts that.

  Args:
    this: what the job works on.
    make_environment: (game, num_envs, seed) -> environment.

  Returns:
    What stands in results/finetune.json.

  Raises:
    UserError: no trunk, or an agent that began with another; see also `play`, as for
      NonFiniteError and Stopped.
  """
  config, workdir, mesh = this.config, this.workdir, this.mesh
  c, game = settle(config.finetune), config.atari.game
  make_environment = functools.partial(make_environment, game)
  trunk = about = None
  if c.trunk != 'scratch':
    path = workdir if c.trunk == 'own' else user_path(c.trunk)
    trunk, step = drq.load_trunk(path)
    about = dict(workdir=str(path), checkpoint_step=step, sha256=digest(trunk, {}))
    logging.info('finetune: trunk of %s, step %d', path, step)
  played = play(
    'finetune',
    c,
    c.agent_steps,
    make_environment,
    config.seed,
    workdir / 'finetune',
    mesh,
    trunk,
    drq.augment if c.agent.augment else None,
    origin=about,
  )
  began = time.monotonic()
  with Preemption() as preemption:
    scores = evaluate(played.agent.params, c, make_environment, config.seed, preemption)
    if scores is None:
      preemption.stop()
  return dict(
    job='finetune',
    game=game,
    seed=config.seed,
    variant='pretrained' if trunk else 'scratch',
    score=float(np.mean(scores)),
    episodes=len(scores),
    scores=scores,
    agent_steps=played.agent_steps,
    frames=played.agent_steps * FRAMES_A_STEP,
    updates=played.updates,
    training_games=played.games,
    resumes=played.resumes,
    seconds=played.seconds + time.monotonic() - began,
    protocol=protocol_of(c, played.origin),
    **devices.describe(mesh),
  )


def protocol_of(c: ConfigDict, origin: dict | None) -> dict:
  """Every setting that made the score; c is the config's section, origin that of the trunk."""
  return dict(
    score='mean over evaluation games of the sum of raw rewards, one game an environment, after '
    'the last update',
    trunk=origin or 'fresh',
    convolutions='VALID, Nature CNN',
    pictures='84x84 grey in [-1, 1], stacks of 4',
    shifts=f'0..{2 * drq.PAD} pixels',
    intensity=drq.INTENSITY,
    emulator=SETTINGS,
    num_envs=c.num_envs,
    rewards='clipped to [-1, 1] for learning',
    life='a lost life ends the return, the game goes on',
    agent=c.agent.to_dict(),
  )


def clean(this: Run) -> None:
  """Removes the replay, which only an incomplete job needs."""
  (this.workdir / 'finetune' / 'replay.dat').unlink(missing_ok=True)


def table(results: dict) -> str:
  """The result in a line."""
  return (
    f'finetune: {results["game"]}, seed {results["seed"]}, {results["variant"]}: score '
    f'{results["score"]:.1f} over {results["episodes"]} games after {results["agent_steps"]:,} '
    f'agent steps ({results["frames"]:,} frames); epsilon '
    f'{results["protocol"]["agent"]["eval_epsilon"]}'
  )


def from_scratch(this: Run) -> Run:
  """The control: all alike but the convolutions that it begins with, in a folder of its own."""
  workdir = this.workdir / 'scratch'
  return dataclasses.replace(this, config=scratch_config(this.config), workdir=workdir)


def scratch_config(config: ConfigDict) -> ConfigDict:
  """The config with fresh convolutions."""
  config = config.copy_and_resolve_references()
  config.finetune.trunk = 'scratch'
  return config


def check_scratch(config: ConfigDict, num_devices: int) -> None:
  """As `check`, for the job `scratch`."""
  require_game(config, 'scratch')
  if config.finetune.trunk == 'scratch' and 'finetune' in config.jobs:
    raise UserError(
      "finetune.trunk='scratch' makes the job finetune the same as the job scratch: leave one of "
      'them out of --config.jobs'
    )
  check(scratch_config(config), num_devices)


JOB = Job('finetune', run, check, needs_data=never, clean=clean, table=table, reads=('trunk',))
SCRATCH = Job(
  'scratch',
  lambda this: run(from_scratch(this)),
  check_scratch,
  needs_data=never,
  clean=lambda this: clean(from_scratch(this)),
  table=table,
  result='scratch/results/finetune.json',
)


def settle(c: ConfigDict) -> ConfigDict:
  """The section with the learning rates that count.

  From scratch all layers have the same, as no layer has learned anything yet.
  """
  c = c.copy_and_resolve_references()
  if c.trunk == 'scratch':
    c.agent.update(dict(trunk_scale=1.0, hidden_scale=1.0))
  return c


def evaluate(
  params: Any,
  c: ConfigDict,
  make_environment: Callable[[int, int], Environment],
  seed: int,
  preemption: Preemption,
) -> list[float] | None:
  """Raw scores of the first game in each of c.eval_episodes environments.

  A game counts in whole whatever its length: with fewer environments and several games each, short
  ones would come first.

  Args:
    params: of the agent.
    c: the config's section.
    make_environment: (num_envs, seed) -> environment.
    seed: of everything drawn.
    preemption: asked at each step whether to stop.

  Returns:
    c.eval_episodes scores; None if stopped before.
  """
  n, key = c.eval_episodes, jax.random.key(seed)

  @jax.jit
  def act(params, stacks, step):
    key_step = jax.random.fold_in(jax.random.fold_in(key, 3), step)
    return dqn.act(params, stacks, c.agent.eval_epsilon, key_step, c.agent)

  scores = np.zeros(n)
  ended = np.zeros(n, bool)
  count = 0
  progress = Progress('finetune: evaluation', n, 'games')
  with make_environment(n, draw_seed(seed, 'evaluation')) as environment:
    stacks = environment.reset()
    while not ended.all():
      if preemption.requested:
        return None
      step = environment.step(np.asarray(act(params, stacks, np.int32(count))))
      over = (step.game_over | step.truncated) & ~ended
      scores[over] = step.score[over]
      ended |= over
      stacks = step.stacks
      count += 1
      score = float(scores[ended].mean()) if ended.any() else 0.0
      progress.update(int(ended.sum()), dict(agent_steps=count * n, score=score))
  return scores.tolist()
