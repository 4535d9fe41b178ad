"""Meta-training: play some tasks, then learn from all; several seeds side by side.

An iteration is one compiled call whose state is donated. All that is drawn is a function of (key of
the seed, iteration, step, task, episode).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from palm_jax.meta import pearl, play, replays
from palm_jax.meta.play import Setup
from palm_jax.meta.tasks import Family


class Player(flax.struct.PyTreeNode):
  """One seed, or with a leading axis several.

  Attributes:
    key: typed key.
    agent: pearl.Agent.
    context: pearl.Context of all training tasks, (M, episodes * T, ...): the encoder's
      replay.
    replay: replays.Replay of all training tasks: the learner's.
  """

  key: jax.Array
  agent: pearl.Agent
  context: pearl.Context
  replay: replays.Replay


class State(flax.struct.PyTreeNode):
  """Everything that a training is; a checkpoint holds all of it.

  Attributes:
    iteration: () int32.
    players: Player, (S, ...) of all seeds.
  """

  iteration: jax.Array
  players: Player


class Program(NamedTuple):
  """The compiled functions.

  Attributes:
    init: (key) -> State.
    call: (State, variables, training tasks) -> State, {metric: (S,)}; the state is donated.
    test: (pearl.Agent of all seeds, variables, tasks, (S,) keys) -> returns
      (S, test_episodes, N).
  """

  init: Callable[[jax.Array], State]
  call: Callable[[State, Any, Any], tuple[State, dict[str, jax.Array]]]
  test: Callable[[pearl.Agent, Any, Any, jax.Array], jax.Array]


def warmup_iterations(c: ConfigDict) -> int:
  """Iterations that only play, until each training task was played."""
  return -(-c.train_goals // c.tasks_per_iteration)


def iteration_of(
  setup: Setup, number: jax.Array, player: Player, variables: Any, tasks: Any
) -> tuple[Player, dict[str, jax.Array]]:
  """Plays some training tasks, then learns from all (the paper's Algorithm 1).

  Args:
    setup: Setup.
    number: () int32 of the iteration.
    player: Player of one seed.
    variables: of the family.
    tasks: training tasks, c.train_goals rows.

  Returns:
    Player, and means over tasks or updates; 0 where there were none.
  """
  c, warm = setup.c, number < warmup_iterations(setup.c)
  keys = jax.random.split(jax.random.fold_in(player.key, number), 3)
  descriptors = setup.family.describe(tasks)
  # First each task once. The authors' code plays all of them before the first iteration.
  rows = jnp.arange(c.tasks_per_iteration)
  in_order = (number * c.tasks_per_iteration + rows) % c.train_goals
  at_random = jax.random.permutation(keys[0], c.train_goals)[rows]
  ids = jnp.where(warm, in_order, at_random)
  played = jax.tree.map(lambda x: x[ids], tasks)
  record = play.collect(setup, player.agent, variables, played, descriptors[ids], keys[1], ids)
  prior, posterior = (jax.tree.map(lambda x, i=i: x[i], record) for i in range(2))
  replay = replays.add(replays.add(player.replay, ids, prior), ids, posterior)
  context = replays.refill(player.context, ids, prior)

  def update(agent, u):
    draws = jax.random.split(jax.random.fold_in(keys[2], u), 4)
    chosen = jax.random.permutation(draws[0], c.train_goals)[: c.meta_batch]
    batch = replays.sample(replay, chosen, c.batch_size, draws[1])
    recent = replays.sample_context(context, chosen, c.context_size, draws[2])
    return pearl.update(agent, setup.kind, batch, recent, descriptors[chosen], draws[3], c)

  learn = lambda: jax.lax.scan(update, player.agent, jnp.arange(c.updates))
  nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(learn)[1])
  agent, metrics = jax.lax.cond(warm, lambda: (player.agent, nothing), learn)
  metrics = {name: x.mean() for name, x in metrics.items()}
  metrics |= dict(prior_return=_return(prior), posterior_return=_return(posterior))
  return player.replace(agent=agent, context=context, replay=replay), metrics


def _return(record):
  """() mean return of a record's episodes."""
  return record.reward.sum(-1).mean()


def make_program(family: Family, kind: str, c: ConfigDict) -> Program:
  """The program of one of pearl.AGENTS; c is the config's section `meta`."""
  setup = Setup(family, kind, c)
  observations, actions, _ = family.sizes

  def player(key):
    key, key_weights = jax.random.split(key)
    return Player(
      key=key,
      agent=pearl.init(key_weights, kind, family.sizes, c),
      context=replays.empty_context(
        c.train_goals, c.episodes * family.steps, observations, actions
      ),
      replay=replays.empty_replay(
        c.train_goals, c.replay_episodes, family.steps, observations, actions
      ),
    )

  def init(key):
    keys = jax.vmap(lambda seed: jax.random.fold_in(key, seed))(jnp.arange(c.seeds))
    return State(jnp.int32(0), jax.vmap(player)(keys))

  def call(state, variables, tasks):
    one = lambda player: iteration_of(setup, state.iteration, player, variables, tasks)
    players, metrics = jax.vmap(one)(state.players)
    return State(state.iteration + 1, players), metrics

  def test(agent, variables, tasks, keys):
    one = lambda agent, key: play.test(setup, agent, variables, tasks, key)
    return jax.vmap(one)(agent, keys)

  return Program(jax.jit(init), jax.jit(call, donate_argnums=0), jax.jit(test))
