"""The job of meta-learning: PEARL and its baselines on goals of the latent world, all seeds."""

import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from palm_jax import environment
from palm_jax.base import checks, devices
from palm_jax.base.digests import digest
from palm_jax.base.errors import NonFiniteError, UserError
from palm_jax.base.training import Training
from palm_jax.job import Job, Run, never
from palm_jax.meta import loop, pearl, play
from palm_jax.meta.results import protocol_of, row_of, table
from palm_jax.meta.tasks import Family, LatentGoals, Tasks, latent_goals
from palm_jax.world import config as worlds
from palm_jax.world import origins

SHOWN = 'posterior_return', 'critic_loss', 'kl', 'alpha', 'held_out_last'


def default_config() -> ConfigDict:
  """Sizes of the authors' half-cheetah runs (oyster configs/default.py) where they are theirs."""
  return ConfigDict(
    dict(
      agents=pearl.AGENTS,  # one after the other
      seeds=3,  # of each agent, side by side in one program
      # goals, of the seeds from world.goal on: first those to train on, then those held out
      train_goals=80,  # oyster: 80 of the point robot's
      test_goals=20,  # oyster
      goal_dims=0,  # coordinates of the latent in which goals differ; 0: all
      iterations=500,  # oyster
      tasks_per_iteration=5,  # oyster
      # of each task that is played, all at once, with z from the prior, and then as many with z
      # from the belief; oyster: 2 of 200 steps, then 3
      episodes=2,
      replay_episodes=200,  # newest of each task, to learn from
      updates=2000,  # an iteration; oyster
      meta_batch=16,  # tasks of an update; oyster
      batch_size=256,  # transitions of each; oyster
      context_size=64,  # transitions of each, for the encoder; oyster
      latent_dim=5,  # oyster
      hidden=(300, 300, 300),  # of actor and critics; oyster
      encoder_hidden=(200, 200, 200),  # oyster
      lr=3e-4,  # of everything; oyster
      gamma=0.99,  # oyster
      tau=0.005,  # oyster
      reward_scale=5.0,  # oyster: the Bellman error is weighed against the KL by it
      kl_lambda=0.1,  # oyster
      policy_reg=1e-3,  # oyster, of mean and standard deviation before tanh
      log_std_min=-5.0,  # as in sac.py
      log_std_max=2.0,
      init_alpha=0.1,  # as in sac.py, which says why
      target_entropy_scale=1.0,
      test_prior_episodes=1,  # oyster; 5 with the sparse point robot
      test_episodes=4,  # in a row in each held-out task
      test_every=25,  # iterations between two tests on the way; the last is always tested
      checkpoint_minutes=10.0,
    )
  )


RANGES = dict(
  seeds=checks.Range(1, 1000),
  train_goals=checks.Range(1, 10**5),
  test_goals=checks.Range(1, 10**5),
  goal_dims=checks.SIZE_OR_0,
  iterations=checks.COUNT,
  tasks_per_iteration=checks.Range(1, 10**5),
  episodes=checks.Range(1, 10**4),
  replay_episodes=checks.Range(1, 10**6),
  updates=checks.Range(1, 10**6),
  meta_batch=checks.Range(1, 10**5),
  batch_size=checks.Range(1, 10**6),
  context_size=checks.Range(1, 10**6),
  latent_dim=checks.SIZE,
  hidden=checks.SIZES,
  encoder_hidden=checks.SIZES,
  lr=checks.RATE,
  gamma=checks.SHARE,
  tau=checks.SHARE,
  reward_scale=checks.ABOVE_0,
  kl_lambda=checks.AMOUNT,
  policy_reg=checks.AMOUNT,
  log_std_min=checks.Range(-100, 100),
  log_std_max=checks.Range(-100, 100),
  init_alpha=checks.ABOVE_0,
  target_entropy_scale=checks.Range(-100, 100),
  test_prior_episodes=checks.Range(1, 10**4),
  test_episodes=checks.Range(1, 10**4),
  test_every=checks.COUNT,
  checkpoint_minutes=checks.MINUTES,
)


def check(config: ConfigDict, num_devices: int) -> None:
  """Raises UserError on settings of the whole config that cannot work."""
  for section in ('meta', 'world'):
    if section not in config:
      raise UserError(f'the config has no section {section}: use configs/meta.py')
  check_section(config.meta)
  e, w = config.environment, config.world
  worlds.check(w)
  environment.check(e)
  if w.task != 'goal':
    raise UserError(f"world.task={w.task!r}: tasks of --job=meta differ in 'goal'; set it to that")
  if w.observations != 'features':
    raise UserError(f"world.observations={w.observations!r}: --job=meta sees 'features' only")
  for key, plain in dict(crop=0, style_mixing=0, latent_space='z').items():
    if e[key] != plain:
      raise UserError(f'environment.{key}={e[key]!r}: --job=meta plays without; set it to {plain}')
  widths = {f'meta.{name}': config.meta[name] for name in ('hidden', 'encoder_hidden')}
  devices.check_layers(widths, config.meta.seeds, devices.make_mesh(num_devices))
  last = w.goal + config.meta.train_goals + config.meta.test_goals
  checks.within('world.goal + meta.train_goals + meta.test_goals', last, checks.Range(0, 2**31 - 1))


def check_section(c: ConfigDict) -> None:
  """Raises UserError on invalid settings of the config's section `meta`."""
  checks.ranges('meta', c, RANGES)
  checks.choices('meta.agents', c.agents, pearl.AGENTS)
  if len(set(c.agents)) < len(c.agents):
    raise UserError(f'meta.agents={tuple(c.agents)} names one twice: name each once')
  checks.between('meta.log_std_min', c.log_std_min, -100, c.log_std_max)
  for name in ('tasks_per_iteration', 'meta_batch'):
    checks.between(f'meta.{name}', c[name], 1, c.train_goals, hint='or more meta.train_goals')
  checks.at_least(
    'meta.replay_episodes', c.replay_episodes, 2 * c.episodes, 'holds less than is played'
  )
  checks.at_least(
    'meta.test_episodes', c.test_episodes, c.test_prior_episodes + 1, 'leaves none to adapt in'
  )
  least = loop.warmup_iterations(c) + 1
  reason = 'ends before each training goal was played'
  checks.at_least('meta.iterations', c.iterations, least, reason)


def run(this: Run) -> dict:
  """The job: trains each of meta.agents with all seeds, and tests it on held-out tasks.

  Writes checkpoints and metrics under <workdir>/meta/<agent>, and resumes what is there. Every
  device computes the same.

  Returns:
    What stands in results/meta.json.

  Raises:
    UserError: no generator or encoder, too little memory, or a workdir of other tasks.
    NonFiniteError: a loss is NaN or infinite; the last good checkpoint stays.
    Stopped: by a signal; everything is saved.
  """
  config, c, mesh = this.config, this.config.meta, this.mesh
  family, tasks = latent_goals(config, this.workdir)
  tasks = devices.replicate(mesh, jax.device_get(tasks))
  key = jax.random.key(config.seed)
  trained, origin = {}, origin_of(config, family)
  for kind in c.agents:
    folder = this.workdir / 'meta' / kind
    trained[kind] = train(kind, c, family, tasks, key, folder, mesh, origin)
  bounds = jax.jit(functools.partial(play.references, family))
  known = {}
  for goals, rows in shown_tasks(tasks).items():
    known[goals] = np.asarray(bounds(tasks.variables, rows, jax.random.fold_in(key, 2)))
  return dict(
    job='meta',
    rows=[
      row_of(kind, goals, returns, known[goals])
      for kind, of in trained.items()
      for goals, returns in of['returns'].items()
    ],
    random_return={goals: float(x[0].mean()) for goals, x in known.items()},
    oracle_return={goals: float(x[1].mean()) for goals, x in known.items()},
    env_steps=env_steps(c, family) * c.iterations,
    updates=c.updates * (c.iterations - loop.warmup_iterations(c)),
    seconds=sum(of['seconds'] for of in trained.values()),
    seed=config.seed,
    protocol=protocol_of(config, family),
    **devices.describe(mesh),
  )


def env_steps(c: ConfigDict, family: Family) -> int:
  """That one seed plays in an iteration."""
  return c.tasks_per_iteration * 2 * c.episodes * family.steps


def shown_tasks(tasks: Tasks) -> dict[str, Any]:
  """Tasks to test on: those held out, and as many of those trained on, if there are so many."""
  count = len(jax.tree.leaves(tasks.held_out)[0])
  some = jax.tree.map(lambda x: x[:count], tasks.training)
  return {'held-out': tasks.held_out, 'training': some}


def train(
  kind: str,
  c: ConfigDict,
  family: Family,
  tasks: Tasks,
  key: jax.Array,
  folder: pathlib.Path,
  mesh: Mesh,
  origin: Mapping[str, str] | None = None,
) -> dict[str, Any]:
  """Trains an agent, or goes on with what is in the folder.

  Args:
    kind: one of pearl.AGENTS.
    c: the config's section `meta`.
    family, tasks: see tasks.py; of the held-out tasks nothing is learned.
    key: of all seeds.
    folder: for checkpoints and metrics.
    mesh: whose devices all do the same.
    origin: of `origin_of`.

  Returns:
    {'returns': {'held-out', 'training': (seeds, test_episodes, tasks) lists}, 'seconds'}.
  """
  everywhere = NamedSharding(mesh, P())
  program = loop.make_program(family, kind, c)
  template = devices.templates(jax.eval_shape(program.init, key), everywhere)
  remedy = 'lower meta.replay_episodes, meta.train_goals or meta.seeds'
  devices.check_fits(devices.nbytes(template), mesh, 'replays and networks take', remedy)
  test_keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.fold_in(key, 1), seed))(
    np.arange(c.seeds)
  )

  def tested(state):
    return {
      goals: np.asarray(program.test(state.players.agent, tasks.variables, rows, test_keys))
      for goals, rows in shown_tasks(tasks).items()
    }

  with Training(
    f'meta: {kind}',
    folder,
    c.iterations,
    unit='env steps',
    per_step=c.seeds * env_steps(c, family),
    checkpoint_minutes=c.checkpoint_minutes,
  ) as training:
    restored = training.resume({'state': template})
    if restored:
      origins.check(folder, restored.metadata.get('origin'), origin or {})
      check_tasks(folder, restored.metadata.get('tasks'), tasks)
      state, scalars = restored.items['state'], restored.metadata['metrics']
      returns = restored.metadata['returns']
    else:
      state, scalars, returns = devices.jit_once(program.init, everywhere)(key), {}, {}
    while not training.over:
      state, metrics = program.call(state, tasks.variables, tasks.training)
      learned = training.step >= loop.warmup_iterations(c)
      scalars = scalars | mean_metrics(metrics, learned, training.step, kind, folder)
      training.advance()
      if training.step % c.test_every == 0 or training.complete:
        returns = {goals: x.tolist() for goals, x in tested(state).items()}
        held_out = np.asarray(returns['held-out']).mean((0, 2))  # (test_episodes,)
        scalars |= dict(held_out_first=float(held_out[0]), held_out_last=float(held_out[-1]))
      training.write(scalars)
      training.show({name: scalars[name] for name in SHOWN if name in scalars})
      if training.should_save:
        training.save({'state': state}, metrics=scalars, returns=returns, origin=dict(origin or {}))
  return dict(returns=returns, seconds=training.seconds)


def check_tasks(folder: pathlib.Path, before: str | None, tasks: Tasks) -> None:
  """Raises UserError where a training of an older version, which knows a digest, had others."""
  if before and before != digest(jax.device_get(tasks), {}):
    raise UserError(
      f'{folder} began with other tasks than there are now (another generator or encoder): give '
      'those back, or choose another --workdir'
    )


def origin_of(config: ConfigDict, family: LatentGoals) -> dict[str, str]:
  """{name: digest} of what tasks come from, for `origins.check`.

  Not of the tasks, which are computed: their last bits depend on the device.
  """
  c, w = config.meta, config.world
  seeds = dict(first=w.goal, label=w.label, train=c.train_goals, test=c.test_goals)
  given = digest({}, seeds | dict(dims=c.goal_dims))
  return origins.of_world(family.world) | {'choice of goals': given}


def mean_metrics(
  metrics: dict[str, jax.Array], learned: bool, iteration: int, kind: str, folder: pathlib.Path
) -> dict[str, float]:
  """Means over the seeds; of what is learned only where anything was.

  Raises:
    NonFiniteError: names the first metric and seed that is NaN or infinite.
  """
  values = jax.device_get(metrics)
  for name, x in values.items():
    if not np.isfinite(x).all():
      raise NonFiniteError(
        f'meta: {name} of {kind} is not finite at iteration {iteration}, seed '
        f'{int(np.argmin(np.isfinite(x)))}: lower meta.lr or meta.reward_scale, in another '
        f'--workdir; the last good checkpoint is in {folder / "checkpoints"}'
      )
  return {name: float(x.mean()) for name, x in values.items() if learned or 'return' in name}


JOB = Job('meta', run, check, needs_data=never, table=table, reads=('generator', 'encoder'))
