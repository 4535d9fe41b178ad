"""The job of learning from records: who makes them, what is learned from each, and how it plays."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from palm_jax import environment, sac
from palm_jax.base import checks, devices
from palm_jax.base.digests import digest
from palm_jax.base.errors import NonFiniteError, UserError
from palm_jax.base.tables import aligned, protocol_line
from palm_jax.base.training import Training
from palm_jax.job import Job, Run, never
from palm_jax.offline import bear, behaviours, datasets, figure, records
from palm_jax.offline.methods import METHODS
from palm_jax.world import config as worlds
from palm_jax.world import goal_latent, origins
from palm_jax.world.dataset import identity
from palm_jax.world.tasks import oracle_action

# Of the section sac: what only a pretraining has.
ELSEWHERE = 'standardise features updates_per_batch skill_dim policies policy_every'.split()
JUDGE_SEED = 1 << 22  # of the environments in which what was learned is judged
LEAST_STD = 1e-3


def default_config() -> ConfigDict:
  return ConfigDict(
    dict(
      environment=records.WORLD,  # that of the config, or the id of a Gymnasium environment
      datasets=(),  # names of Minari data sets to learn from; else behaviours make the records
      behaviours=behaviours.BEHAVIOURS,  # as in the paper
      methods=('bc', 'sac', 'bear'),
      seeds=3,  # of learning, at once; the record is the same
      num_envs=8,
      behaviour_steps=20_000,  # in which SAC learns by playing
      rollout_length=200,  # steps an environment makes before all begin anew
      block_length=8,  # of them, between which SAC learns as often as it has played
      record_steps=20_000,
      updates=20_000,
      batch_size=100,  # BEAR algos.py
      updates_per_call=500,
      judge_every=2000,  # updates
      episodes=10,  # a seed
      bear=bear.default_config(),
      checkpoint_minutes=5.0,
    )
  )


RANGES = dict(
  seeds=checks.Range(1, 1000),
  num_envs=checks.Range(1, 10_000),
  behaviour_steps=checks.COUNT,
  rollout_length=checks.COUNT,
  block_length=checks.COUNT,
  record_steps=checks.COUNT,
  updates=checks.COUNT,
  batch_size=checks.SIZE,
  updates_per_call=checks.COUNT,
  judge_every=checks.COUNT,
  episodes=checks.Range(1, 10_000),
  bear=bear.RANGES,
  checkpoint_minutes=checks.MINUTES,
)


def check(config: ConfigDict, num_devices: int) -> None:
  """Raises UserError on settings that the job would refuse."""
  del num_devices  # it computes on the first
  if jax.process_count() > 1:
    raise UserError('--job=offline runs in one process: start it without several')
  if 'offline' not in config or 'world' not in config:
    raise UserError('this config has no section offline: take --config=configs/offline.py')
  c = config.offline
  checks.ranges('offline', c, RANGES)
  if 'bear' in c.methods and c.bear.warmup_updates >= c.updates:
    raise UserError(
      f'offline.bear.warmup_updates={c.bear.warmup_updates} of offline.updates={c.updates}: the '
      'actor would never learn by Q; lower the first, or raise the second'
    )
  if not c.datasets:
    checks.choices('offline.behaviours', c.behaviours, behaviours.BEHAVIOURS)
  checks.choices('offline.methods', c.methods, METHODS)
  checks.divisible('offline.rollout_length', c.rollout_length, c.block_length, 'block_length')
  checks.divisible('offline.judge_every', c.judge_every, c.updates_per_call, 'updates_per_call')
  checks.divisible('offline.updates', c.updates, c.judge_every, 'judge_every')
  bear.check(c.bear)
  sac.check(config.sac)
  plain = sac.default_config()
  for name in ELSEWHERE:
    if config.sac[name] != plain[name]:
      logging.warning(
        'sac.%s=%r changes nothing: --job=offline learns without', name, config.sac[name]
      )
  worlds.check(config.world)
  environment.check(config.environment)
  widths = {'sac.hidden': config.sac.hidden}
  for name in ('hidden_actor', 'hidden_critic', 'hidden_behaviour'):
    widths[f'offline.bear.{name}'] = c.bear[name]
  devices.check_layers(widths, c.seeds, devices.make_mesh(1))
  if c.environment == records.WORLD and config.world.observations != 'features':
    raise UserError(
      f'world.observations={config.world.observations!r} with --job=offline: it learns from '
      "vectors; set 'features'"
    )


def run(this: Run) -> dict[str, Any]:
  """The job: makes the records, or reads them, and learns from each by each method.

  Returns:
    What stands in results/offline.json.

  Raises:
    UserError: an environment or record that is missing, damaged or refused, or a workdir of another
      world.
    NonFiniteError: something learned is NaN or infinite.
    Stopped: by a signal; everything is saved.
  """
  c, folder = this.config.offline, this.workdir / 'offline'
  for name in c.datasets:
    datasets.check_there(name)
  world = records.make_world(this.config, this.workdir)
  judge = records.Player(records.make_envs(this.config, world, c.seeds * c.episodes))
  origin = origins.of_world(world[0] if world else None)
  sources, about = _records(this, folder, world, judge.envs, origin)
  rows, rest = [], dict[str, Any](about)
  for name, record in sources.items():
    own = records.mean_return(record)
    of_record = origin | {'record': digest(record._asdict(), {})}
    for method in c.methods:
      place = folder / f'{name.replace("/", "_")}_{method}'
      curve = _learn(this, place, record, method, judge, of_record)
      last = curve[-1]
      rows.append(
        dict(
          record=name,
          record_return=own,
          record_steps=len(record.rewards),
          method=method,
          returns=last['returns'],
          mean=float(np.mean(last['returns'])),
          stderr=_stderr(last['returns']),
          q=last['q'],
          discounted=last['discounted'],
          curve=curve,
        )
      )
  figure.draw(rows, folder / 'values.png')
  if world and this.config.world.task == 'goal':
    rest['oracle'] = _oracle(judge, this.config)
  about = devices.describe(this.mesh)
  return dict(rows=rows, **rest, protocol=_protocol(this.config), **about)


def _records(this, folder, world, envs, origin):
  """{name: Record}, and what else is known of who made them."""
  c = this.config.offline
  if c.datasets:
    expected = identity(world[0]) if world else None
    given: Any = (expected, this.config) if world else (None, None, c.environment)
    return {name: datasets.load(name, envs, *given) for name in c.datasets}, {}
  made = {name: folder / 'records' / f'{name}.npz' for name in c.behaviours}
  # Before anything is trained, so that those of another world are refused at once.
  found = {name: records.load(path, origin) for name, path in made.items() if path.exists()}
  player = records.Player(records.make_envs(this.config, world, c.num_envs))
  judge = records.Player(records.make_envs(this.config, world, c.episodes))
  players = behaviours.train(this.config, folder / 'behaviours', player, judge, origin)
  for name, path in made.items():
    if name not in found:
      path.parent.mkdir(exist_ok=True)
      found[name] = behaviours.record(this.config, player, players, name)
      records.save(path, found[name], origin)
      logging.info('offline: recorded %s', path)
  about = dict(behaviours=players.returns, behaviour_curve=players.curve)
  return {name: found[name] for name in made}, about


def _oracle(judge, config):
  """Mean return of who knows the goal's latent."""
  z, _ = goal_latent(judge.envs.world, config.world.goal)
  best = np.asarray(oracle_action(z))
  act = lambda seen, t: np.broadcast_to(best, (len(seen), len(best)))
  return float(judge.episode(act, JUDGE_SEED, config.sac.gamma).returns.mean())


def _learn(this, folder, record, method, judge, origin):
  """Learns from a record -> [dict] of what each judging found."""
  config, c = this.config, this.config.offline
  m = METHODS[method]
  observations, actions = record.observations.shape[1], record.actions.shape[1]
  moments = record.observations.mean(0), np.maximum(record.observations.std(0), LEAST_STD)
  standard = lambda x: (x - moments[0]) / moments[1]
  learned = record._replace(
    observations=standard(record.observations), next_observations=standard(record.next_observations)
  )
  on_device = jax.device_put(behaviours.batch_of(learned, config.sac.gamma))
  keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(config.seed), i))(jnp.arange(c.seeds))
  init = jax.jit(jax.vmap(lambda key: m.init(key, observations, actions, config)))
  call = jax.jit(functools.partial(_call, m=m, config=config), donate_argnums=0)
  act = jax.jit(jax.vmap(lambda s, o, key: m.act(s, o, key, actions, config)))
  value = _vmapped_value(m, config)
  apart = lambda x: x.reshape(c.seeds, c.episodes, -1)
  state, curve = init(keys), []
  with Training(
    f'offline {folder.name}',
    folder,
    c.updates,
    unit='updates',
    checkpoint_minutes=c.checkpoint_minutes,
    keep=1,
  ) as training:
    restored = training.resume({'state': state})
    if restored:
      origins.check(folder, restored.metadata.get('origin'), origin)
      state, curve = restored.items['state'], list(restored.metadata['curve'])
    while not training.over:
      state, metrics = call(state, on_device, keys, training.step)
      metrics = _finite(metrics, folder)
      training.advance(c.updates_per_call)
      if training.step % c.judge_every == 0:
        key = jax.random.fold_in(jax.random.key(config.seed), training.step)
        judged = judge.episode(
          lambda o, t, s=state, k=key: act(
            s, apart(standard(o)), jax.random.split(jax.random.fold_in(k, t), c.seeds)
          ).reshape(len(o), -1),
          JUDGE_SEED,
          config.sac.gamma,
        )
        curve.append(_judged(training.step, judged, value, state, standard, apart))
        metrics |= {'return': float(np.mean(curve[-1]['returns']))}
      training.write(metrics)
      training.show(metrics)
      if training.should_save:
        training.save({'state': state}, curve=curve, origin=origin)
  return curve


def _vmapped_value(m, config):
  of_critics = m.value
  if of_critics is None:
    return None
  return jax.jit(jax.vmap(lambda s, o, a: of_critics(s, o, a, config)))


def _call(state, record, keys, step, m, config):
  """updates_per_call updates of every seed -> state, means of their scalars."""
  c = config.offline
  rows = len(record.reward)

  def one(state, i):
    def of_seed(state, key):
      key_rows, key = jax.random.split(jax.random.fold_in(key, step + i))
      chosen = jax.random.randint(key_rows, (c.batch_size,), 0, rows)
      return m.update(state, jax.tree.map(lambda x: x[chosen], record), key, config)

    return jax.vmap(of_seed)(state, keys)

  state, metrics = jax.lax.scan(one, state, jnp.arange(c.updates_per_call))
  return state, jax.tree.map(jnp.mean, metrics)


def _judged(step, episode, value, state, standard, apart):
  """A point of the curve: returns a seed, and the critics' value of its first steps beside what
  came of them."""
  point = dict(
    updates=step,
    returns=apart(episode.returns)[..., 0].mean(1).tolist(),
    discounted=apart(episode.discounted)[..., 0].mean(1).tolist(),
    q=None,
  )
  if value:
    q = value(state, apart(standard(episode.observations)), apart(episode.actions))
    point['q'] = np.asarray(q, float).mean(1).tolist()
  return point


def _finite(metrics, folder):
  values = {name: float(x) for name, x in jax.device_get(metrics).items()}
  for name, x in values.items():
    if not np.isfinite(x):
      raise NonFiniteError(
        f'offline: {name} of {folder.name} is {x}: lower the learning rates (offline.bear.lr_*, '
        'sac.lr_*), in another --workdir'
      )
  return values


def _stderr(x):
  return float(np.std(x, ddof=1) / np.sqrt(len(x))) if len(x) > 1 else None


def _protocol(config):
  c = config.offline
  return dict(
    environment=c.environment,
    **({'world': config.world.to_dict()} if c.environment == records.WORLD else {}),
    **({'datasets': tuple(c.datasets)} if c.datasets else {'record_steps': c.record_steps}),
    updates=c.updates,
    batch_size=c.batch_size,
    seeds=c.seeds,
    episodes=c.episodes,
    gamma=config.sac.gamma,
    **{f'bear.{name}': value for name, value in c.bear.items()},
  )


def table(result: dict[str, Any]) -> str:
  """Returns by record and method."""
  cells = [('record', 'its return', 'method', 'return', '+-', 'Q', 'came true')]
  number = lambda x: '-' if x is None else f'{np.mean(x):.4g}'
  for row in result['rows']:
    cells.append(
      (
        row['record'],
        number(row['record_return']),
        row['method'],
        number(row['mean']),
        number(row['stderr']),
        number(row['q']),
        number(row['discounted']),
      )
    )
  measures = dict(
    result.get('behaviours', {}), **{k: result[k] for k in ('oracle',) if k in result}
  )
  played = ', '.join(f'{name} {value:.4g}' for name, value in measures.items())
  lines = [f'who plays: {played}'] if played else []
  return '\n'.join([*aligned(cells), *lines, protocol_line(result['protocol'])])


JOB = Job(
  'offline',
  run,
  check,
  needs_data=never,
  table=table,
  reads=('generator', 'encoder'),
  reads_files=lambda this: [x for s in this.config.offline.datasets for x in datasets.files(s)],
)
