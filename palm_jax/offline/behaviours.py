"""Who makes the records: SAC that learns by playing, and what it was like on the way there."""

import functools
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from palm_jax import sac
from palm_jax.base import devices
from palm_jax.base.errors import UserError
from palm_jax.base.training import Training
from palm_jax.offline import records
from palm_jax.offline.methods import act_sac, update_sac
from palm_jax.world import origins

BEHAVIOURS = 'random', 'half', 'trained'
RECORD_SEED = 1 << 20  # of the environments that are recorded, apart from those it learned in
JUDGE_SEED = 1 << 21


class Behaviours(NamedTuple):
  """Policies from a random one to the best that SAC has found.

  Attributes:
    states: {name: sac.SAC, or None for uniformly random actions}.
    returns: {name: mean return of an episode}.
    curve: (steps, return) pairs of the training.
  """

  states: dict[str, Any]
  returns: dict[str, float]
  curve: list[tuple[int, float]]


def train(
  config: ConfigDict,
  folder: pathlib.Path,
  player: records.Player,
  judge: records.Player,
  origin: Mapping[str, str] | None = None,
) -> Behaviours:
  """Trains SAC in the environments of a player, or resumes it; another judges it.

  It begins new episodes with each round of offline.rollout_length steps, so that a checkpoint
  between two rounds holds all there is. 'trained' is the best of the policies after each round,
  'half' the first whose return has passed the middle between random and that.

  Args:
    config: the whole config.
    folder: for checkpoints and metrics.
    player, judge: see above.
    origin: of `origins.of_world`.

  Raises:
    UserError: the training in the folder is of another world.
    Stopped: by a signal; everything is saved.
  """
  c = config.offline
  observations, actions = sizes(player.envs)
  per_round = c.num_envs * c.rollout_length
  rounds = max(1, round(c.behaviour_steps / per_round))
  act = jax.jit(functools.partial(_act, config=config, action_dim=actions))
  best_act = jax.jit(functools.partial(act_sac, action_dim=actions, config=config))
  learn = jax.jit(functools.partial(_learn, config=config), donate_argnums=0)
  first = jax.jit(lambda key: sac.init(key, observations, actions, config.sac))
  at_random = judge.episode(_random(actions, config.seed), JUDGE_SEED, 1.0).returns.mean()
  state = first(jax.random.key(config.seed))
  _check_room(c, rounds, observations, actions, devices.nbytes(state.actor))
  ring = _ring(rounds * per_round, observations, actions)
  actors = jax.tree.map(lambda x: np.zeros((rounds, *x.shape), np.float32), state.actor)
  items = dict(state=state, ring=ring, actors=actors)
  with Training(
    'behaviours',
    folder,
    rounds,
    unit='env steps',
    per_step=per_round,
    checkpoint_minutes=c.checkpoint_minutes,
  ) as training:
    restored = training.resume({'all': jax.device_put(items)})
    size, curve = 0, []
    if restored:
      origins.check(folder, restored.metadata.get('origin'), origin or {})
      items = restored.items['all']
      ring, actors = jax.tree.map(np.array, (items['ring'], items['actors']))
      state, size, curve = items['state'], *restored.metadata['position']
    while not training.over:
      key = jax.random.fold_in(jax.random.key(config.seed), training.step)
      generator = np.random.default_rng([config.seed, training.step])
      player.begin(int(generator.integers(1 << 30)))
      for turn in range(c.rollout_length // c.block_length):
        keys = jax.random.split(jax.random.fold_in(key, turn))
        by_policy = lambda seen, t, k=keys[0], s=state: act(s, seen, jax.random.fold_in(k, t))
        early = training.step == 0  # the first round is random
        chosen = _random(actions, generator.integers(1 << 30)) if early else by_policy
        size = _add(ring, size, player.play(chosen, c.block_length))
        count = c.block_length * c.num_envs
        rows = generator.integers(0, size, (count, config.offline.batch_size))
        learned = records.Record(**{name: x[rows] for name, x in ring.items()})
        batches = batch_of(learned, config.sac.gamma)
        state, metrics = learn(state, batches, keys[1])
      actors = jax.tree.map(_put(training.step), actors, state.actor)
      score = judge.episode(lambda o, t, s=state: best_act(s, o, None), JUDGE_SEED, 1.0).returns
      curve.append((size, float(score.mean())))
      training.advance()
      scalars = {'return': curve[-1][1]} | {n: float(x) for n, x in metrics.items()}
      training.write(scalars)
      training.show(scalars)
      if training.should_save:
        items = dict(state=state, ring=ring, actors=actors)
        about = dict(position=(size, curve), origin=dict(origin or {}))
        training.save({'all': _copied(items)}, **about)
  return _chosen(state, actors, curve, float(at_random))


def _check_room(c, rounds, observations, actions, actor):
  """Raises UserError where the machine has no room for what is played, and copies of it.

  Args:
    c: the config's section `offline`.
    rounds: of playing, whose actors of `actor` bytes are all kept.
    observations, actions: O and A.
  """
  step = 4 * (2 * observations + actions + 3)  # bytes of a record's
  takes = dict(
    behaviour_steps=rounds * (c.num_envs * c.rollout_length * step + actor),
    record_steps=c.record_steps * step,
  )
  memory = devices.machine_memory()
  for name, one in takes.items():
    if 2 * one > memory:
      raise UserError(
        f'offline.{name}={c[name]} take {2 * one / 2**30:.1f} GiB, and this machine has '
        f'{memory / 2**30:.1f}: lower them'
      )


def _copied(items):
  """Items to be saved, which are written while the next round fills their arrays in place.

  On CPUs device_put alone takes them as they are.
  """
  return jax.device_put(jax.tree.map(np.array, items))


def _chosen(state, actors, curve, at_random):
  scores = np.array([score for _, score in curve])
  best = int(scores.argmax())
  half = int(np.argmax(scores >= (at_random + scores[best]) / 2))
  of = lambda i: state.replace(actor=jax.tree.map(lambda x: jnp.asarray(x[i]), actors))
  logging.info('behaviours: random %.4g, half %.4g, trained %.4g', at_random, *scores[[half, best]])
  return Behaviours(
    dict(random=None, half=of(half), trained=of(best)),
    dict(random=at_random, half=float(scores[half]), trained=float(scores[best])),
    curve,
  )


def record(
  config: ConfigDict, player: records.Player, behaviours: Behaviours, name: str
) -> records.Record:
  """What a behaviour does in offline.record_steps steps, by draws of its policy."""
  c = config.offline
  _, actions = sizes(player.envs)
  key = jax.random.fold_in(jax.random.key(config.seed), RECORD_SEED + BEHAVIOURS.index(name))
  state = behaviours.states[name]
  act = jax.jit(functools.partial(_act, config=config, action_dim=actions))
  by_policy = lambda seen, t: act(state, seen, jax.random.fold_in(key, t))
  player.begin(config.seed + RECORD_SEED + BEHAVIOURS.index(name))
  chosen = _random(actions, [config.seed, RECORD_SEED]) if state is None else by_policy
  blocks, played, held = [], 0, 0
  while held < c.record_steps:  # steps that begin an episode are not kept
    more = -(-(c.record_steps - held) // c.num_envs)
    blocks.append(player.play(lambda seen, t, before=played: chosen(seen, before + t), more))
    played += more
    held += len(blocks[-1].rewards)
  return records.take(records.join(blocks), c.record_steps)


def batch_of(record: records.Record, gamma: float) -> sac.Batch:
  """Steps as SAC and BEAR learn from them."""
  discount = gamma * (1 - jnp.asarray(record.terminated, jnp.float32))
  return sac.Batch(
    record.observations, record.actions, record.rewards, record.next_observations, discount
  )


def _act(state, seen, key, config, action_dim):
  noise = jax.random.normal(key, (len(seen), action_dim))
  return sac.act(state, seen, noise, config.sac)


def _learn(state, batches, key, config):
  """An update a batch (U, B, ...) -> state, scalars of the last."""

  def one(state, numbered):
    i, batch = numbered
    return update_sac(state, batch, jax.random.fold_in(key, i), config)

  state, metrics = jax.lax.scan(one, state, (jnp.arange(len(batches.reward)), batches))
  return state, jax.tree.map(lambda x: x[-1], metrics)


def _random(action_dim, seed):
  generator = np.random.default_rng(seed)
  return lambda seen, t: generator.uniform(-1, 1, (len(seen), action_dim))


def _ring(rows, observations, actions):
  """Room for a record's steps; `ended` is left out, as older checkpoints do not hold it."""
  empty = lambda *shape: np.zeros((rows, *shape), np.float32)
  return dict(
    observations=empty(observations),
    actions=empty(actions),
    rewards=empty(),
    next_observations=empty(observations),
    terminated=empty(),
    episode=empty(),
  )


def _add(ring, size, block):
  after = size + len(block.rewards)
  for name, old in ring.items():
    old[size:after] = getattr(block, name)
  return after


def _put(row):
  def put(stored, new):
    stored[row] = new
    return stored

  return put


def sizes(envs):
  """O and A of environments."""
  return envs.single_observation_space.shape[0], envs.single_action_space.shape[0]
