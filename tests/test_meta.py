"""PEARL's parts: beliefs, who learns from what, the two replays, and who is never learned from."""

import functools
import json
import os
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from palm_jax import sac
from palm_jax.base import devices
from palm_jax.meta import loop, pearl, play, replays, train
from palm_jax.meta.pearl import Batch, Context
from palm_jax.meta.replays import Record
from tests.robots import PointRobot, half_circle

ROOT = pathlib.Path(__file__).parents[1]
M, B, C, F, A, Z = 3, 5, 4, 2, 2, 3
ROBOT = PointRobot(steps=3)
TASKS = half_circle(4, 2)


def tiny(**changes):
  c = train.default_config()
  c.update(
    dict(
      seeds=2,
      train_goals=4,
      test_goals=2,
      iterations=6,
      tasks_per_iteration=2,
      episodes=2,
      replay_episodes=5,
      updates=2,
      meta_batch=M,
      batch_size=B,
      context_size=C,
      latent_dim=Z,
      hidden=(8,),
      encoder_hidden=(8,),
      test_episodes=3,
      test_every=4,
    )
  )
  c.update(changes)
  return c


def normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def drawn():
  """Batch, Context, descriptors."""
  batch = Batch(
    normal(0, M, B, F), np.tanh(normal(1, M, B, A)), normal(2, M, B), normal(3, M, B, F)
  )
  context = Context(normal(4, M, C, F), np.tanh(normal(5, M, C, A)), normal(6, M, C))
  return jax.tree.map(jnp.asarray, (batch, context, normal(7, M, 2)))


# ---- beliefs


def test_the_product_of_gaussians_is_the_closed_form():
  """Against two at a time in float64: N(a, s) N(b, t) has mean (a t + b s) / (s + t), variance
  s t / (s + t). Evidence of several parts adds up."""
  means, variances = normal(0, M, C, Z), np.exp(normal(1, M, C, Z))
  variances[0, 0] = 1e-12  # as 1e-7
  mean, variance = means[:, 0].astype(np.float64), variances[:, 0].clip(1e-7).astype(np.float64)
  for i in range(1, C):
    other, spread = means[:, i].astype(np.float64), variances[:, i].astype(np.float64)
    mean = (mean * spread + other * variance) / (variance + spread)
    variance = variance * spread / (variance + spread)
  whole = pearl.evidence_of(means, variances)
  for evidence in (
    whole,
    pearl.Evidence(
      *jax.tree.map(
        jnp.add,
        pearl.evidence_of(means[:, :1], variances[:, :1]),
        pearl.evidence_of(means[:, 1:], variances[:, 1:]),
      )
    ),
  ):
    found = pearl.posterior(evidence)
    np.testing.assert_allclose(found[0], mean, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(found[1], variance, rtol=2e-5)


def test_nothing_seen_is_the_prior():
  mean, variance = pearl.posterior(pearl.nothing(M, Z))
  assert (mean == 0).all() and (variance == 1).all()
  z = pearl.latent('pearl', pearl.nothing(M, Z), jnp.zeros((M, 2)), jnp.asarray(normal(0, M, Z)))
  np.testing.assert_array_equal(z, normal(0, M, Z))


def test_kl_is_the_closed_form():
  mean, variance = normal(0, M, Z), np.exp(normal(1, M, Z))
  m, v = mean.astype(np.float64), variance.astype(np.float64)
  expected = np.sum(np.log(1 / np.sqrt(v)) + (v + m**2) / 2 - 0.5)
  assert float(pearl.kl_to_prior(mean, variance)) == pytest.approx(expected, rel=1e-5)
  assert float(pearl.kl_to_prior(np.zeros((M, Z)), np.ones((M, Z)))) == 0


# ---- who learns from what


@functools.cache
def agent_of(kind):
  init = jax.jit(lambda key: pearl.init(key, kind, (F, A, 2), tiny()))
  # At first the target is a copy, which would show nothing.
  return init(jax.random.key(0)).replace(target_critic=init(jax.random.key(1)).target_critic)


NOISE = normal(8, M, Z), normal(9, M, B, A)


@jax.jit
def critic_gradient(agent, kl_lambda):
  """Of the encoder; all in one program."""
  c = types.SimpleNamespace(**{**tiny(gamma=0.9), 'kl_lambda': kl_lambda})
  batch, context, descriptors = drawn()
  grads, _ = jax.grad(pearl.critic_loss, has_aux=True)(
    (agent.critic, agent.encoder), agent, 'pearl', batch, context, descriptors, NOISE, c
  )
  return grads[1]


def z_of(encoder):
  _, context, descriptors = drawn()
  evidence = pearl.evidence_of(*pearl.encode('pearl', encoder, context, tiny()))
  return pearl.latent('pearl', evidence, descriptors, NOISE[0])


def size(tree):
  return max(float(jnp.abs(x).max()) for x in jax.tree.leaves(tree))


def test_the_encoder_learns_from_bellman_error_and_kl_only():
  agent = agent_of('pearl')
  blind = agent.replace(critic=jax.tree.map(jnp.zeros_like, agent.critic))
  assert size(critic_gradient(agent, 0.0)) > 0  # of the Bellman error
  assert size(critic_gradient(blind, 0.0)) == 0
  assert size(critic_gradient(blind, 0.1)) > 0  # of the KL

  @jax.jit
  def of_both(actor, encoder):
    loss = lambda actor, encoder: pearl.actor_loss(
      actor, agent, drawn()[0], z_of(encoder), NOISE[1], tiny()
    )
    return jax.grad(loss, (0, 1), has_aux=True)(actor, encoder)[0]

  of_actor, of_encoder = of_both(agent.actor, agent.encoder)
  assert size(of_actor) > 0 and size(of_encoder) == 0


def test_targets_are_constants():
  """The encoder's gradient is that of targets which are numbers, though they were made of z too."""
  agent, c, (batch, _, _) = agent_of('pearl'), tiny(), drawn()

  @jax.jit
  def targets():
    h = pearl.beside(batch.next_observation, z_of(agent.encoder)[:, None])
    mean, log_std = pearl._actor(c, A).apply(agent.actor, h)
    action, log_prob = sac.sample(mean, log_std, NOISE[1])
    value = pearl._critic(c).apply(agent.target_critic, h, action).min(0) - 0.1 * log_prob
    return 5.0 * batch.reward + 0.9 * value

  numbers = np.asarray(targets())

  @jax.jit
  def by_hand(encoder):
    h = pearl.beside(batch.observation, z_of(encoder)[:, None])
    q = pearl._critic(c).apply(agent.critic, h, batch.action)
    return jnp.mean((q[0] - numbers) ** 2) + jnp.mean((q[1] - numbers) ** 2)

  expected = jax.jit(jax.grad(by_hand))(agent.encoder)
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
  jax.tree.map(close, critic_gradient(agent, 0.0), expected)


@pytest.mark.parametrize('scale, rises', [(-10.0, True), (10.0, False)])
def test_target_and_temperature_follow(scale, rises):
  agent, c = agent_of('blind'), tiny(target_entropy_scale=scale, tau=0.1)
  batch, context, descriptors = drawn()
  key = jax.random.key(1)
  after, _ = jax.jit(lambda a: pearl.update(a, 'blind', batch, context, descriptors, key, c))(agent)
  for new, old, now in zip(
    *map(jax.tree.leaves, (after.target_critic, agent.target_critic, after.critic)), strict=True
  ):
    np.testing.assert_allclose(new, 0.9 * old + 0.1 * now, rtol=1e-4, atol=1e-6)
  assert (after.log_alpha > agent.log_alpha) == rises and after.log_alpha != agent.log_alpha


def test_what_each_agent_is_given():
  for kind, more in dict(pearl=Z, blind=0, told=2).items():
    init = functools.partial(pearl.init, kind=kind, sizes=(F, A, 2), c=tiny())
    agent = jax.eval_shape(init, jax.random.key(0))
    assert agent.actor['params']['MLP_0']['Dense_0']['kernel'].shape[0] == F + more
    assert (agent.encoder == ()) == (kind != 'pearl')


@pytest.mark.parametrize('kind', ['blind', 'told'])
def test_only_who_is_told_knows_the_task(kind):
  batch, context, descriptors = drawn()
  agent, key = agent_of(kind), jax.random.key(1)
  step = jax.jit(lambda d: pearl.update(agent, kind, batch, context, d, key, tiny()))
  (after, metrics), (other, _) = step(descriptors), step(-descriptors)
  assert all(np.isfinite(x) for x in metrics.values())
  differs = size(jax.tree.map(lambda x, y: x - y, after.critic, other.critic)) > 0
  assert differs == (kind == 'told')


# ---- replays


def record_of(value, tasks=2, episodes=2, steps=3):
  full = lambda *shape: np.full((tasks, episodes, *shape), value, np.float32)
  observation = full(steps + 1, F) + np.float32(0.1) * np.arange(steps + 1)[:, None]
  return Record(observation, full(steps, A), full(steps), full(steps))


def test_a_context_holds_the_newest_play_only():
  contexts = replays.empty_context(3, 6, F, A)
  refill = jax.jit(replays.refill)
  contexts = refill(contexts, jnp.array([0, 2]), record_of(1))
  contexts = refill(contexts, jnp.array([2, 1]), record_of(2))
  np.testing.assert_array_equal(contexts.hint.mean(1), [1, 2, 2])
  np.testing.assert_array_equal(contexts.hint.std(1), [0, 0, 0])
  draw = jax.jit(lambda key: replays.sample_context(contexts, jnp.array([2, 0]), 50, key))
  seen = draw(jax.random.key(0))
  np.testing.assert_array_equal(seen.hint, np.repeat([[2.0], [1.0]], 50, axis=1))
  assert seen.observation.max() < 2.25  # never an episode's last state


def test_a_replay_holds_older_play_too_and_no_step_crosses_an_episode():
  replay = replays.empty_replay(3, 4, 3, F, A)
  for value in (1, 2, 3):
    replay = jax.jit(replays.add)(replay, jnp.array([0, 2]), record_of(value))
  replay = jax.jit(replays.add)(replay, jnp.array([1]), record_of(9, tasks=1))
  assert replay.count.tolist() == [6, 2, 6]
  draw = jax.jit(lambda key: replays.sample(replay, jnp.array([2, 1]), 200, key))
  batch = draw(jax.random.key(0))
  assert set(np.unique(batch.reward[0])) == {2, 3}  # of four episodes the oldest two are gone
  assert set(np.unique(batch.reward[1])) == {9}  # and what was never filled is not drawn
  np.testing.assert_allclose(batch.next_observation - batch.observation, 0.1, atol=1e-5)


# ---- the loop


@pytest.fixture(scope='module')
def program():
  return loop.make_program(ROBOT, 'pearl', tiny())


def after(program, count):
  """State and metrics after so many iterations, on a mesh as in the job."""
  mesh = devices.make_mesh(1)
  state, tasks = devices.replicate(mesh, (program.init(jax.random.key(0)), TASKS))
  metrics = {}
  for _ in range(count):
    state, metrics = program.call(state, tasks.variables, tasks.training)
  return state, metrics


def test_play_comes_first_then_learning(program):
  begun, _ = after(program, 0)
  begun = jax.device_get(begun.players.agent)  # before it is donated
  state, metrics = after(program, 2)
  jax.tree.map(np.testing.assert_array_equal, state.players.agent, begun)
  assert state.players.replay.count.tolist() == [[4] * 4] * 2  # each task once
  assert (metrics['critic_loss'] == 0).all()
  state, metrics = after(program, 3)
  assert state.iteration == 3 and (metrics['critic_loss'] > 0).all()
  assert sorted(state.players.replay.count[0].tolist()) == [4, 4, 8, 8]
  one, two = (jax.tree.map(lambda x, s=s: x[s], state.players.agent.actor) for s in (0, 1))
  assert size(jax.tree.map(jnp.subtract, one, two)) > 0  # seeds differ


def test_the_encoders_replay_is_recent_and_of_the_prior_alone(program):
  """It equals the newest prior episodes that the learner's replay got, of each task."""
  state, _ = after(program, 5)
  replay, context = state.players.replay, state.players.context
  for seed in range(2):
    for task, count in enumerate(replay.count[seed].tolist()):
      # Each play adds two episodes of the prior, then two of the belief.
      slots = [(count - 4) % 5, (count - 3) % 5]
      np.testing.assert_array_equal(
        context.observation[seed, task].reshape(2, 3, F),
        replay.observation[seed, task][np.array(slots), :-1],
      )


def test_adaptation_uses_the_prior_first_then_what_it_has_played(program):
  """Written out with the same keys: episode by episode."""
  c = tiny(test_prior_episodes=2, test_episodes=4)
  setup = play.Setup(ROBOT, 'pearl', c)
  agent = agent_of('pearl')
  key, tasks = jax.random.key(5), TASKS.held_out
  found = jax.jit(lambda agent: play.test(setup, agent, (), tasks, key))(agent)
  assert found.shape == (4, 2)
  act = jax.jit(lambda place, z: pearl.act(agent.actor, place, z, jnp.zeros((2, A)), c))
  encode = jax.jit(lambda context: pearl.encode('pearl', agent.encoder, context, c))
  seen = []
  for episode in range(4):
    keys = [jax.random.fold_in(jax.random.fold_in(key, episode), i) for i in range(2)]
    noise = jnp.stack([jax.random.normal(k, (Z,)) for k in keys])
    mean, std = 0.0, 1.0
    if episode >= 2:
      context = Context(*(jnp.concatenate(x, 1) for x in zip(*seen, strict=True)))
      mean, variance = encode(context)
      precision = 1 / np.asarray(variance, np.float64)
      std = np.sqrt(1 / precision.sum(1))
      mean = (precision * mean).sum(1) / precision.sum(1)
    z = jnp.asarray(mean + std * noise, jnp.float32)
    place, places, actions, rewards = jnp.zeros((2, 2)), [], [], []
    for _ in range(3):
      action = act(place, z)
      places.append(place)
      actions.append(action)
      place = place + 0.1 * action
      rewards.append(-jnp.linalg.norm(place - tasks['goal'], axis=-1))
    seen.append([jnp.stack(x, 1) for x in (places, actions, rewards)])
    np.testing.assert_allclose(found[episode], sum(rewards), rtol=1e-4)


def test_references_are_of_random_actions_and_the_oracle():
  low, high = jax.jit(lambda key: play.references(ROBOT, (), TASKS.held_out, key))(
    jax.random.key(0)
  )
  goals = np.asarray(TASKS.held_out['goal'], np.float64)
  place, best = np.zeros((2, 2)), 0.0
  for _ in range(3):
    place = place + np.clip(goals - place, -0.1, 0.1)
    best = best - np.linalg.norm(place - goals, axis=-1)
  np.testing.assert_allclose(high, best, rtol=1e-5)
  assert (low < high).all()


# ---- the point robot


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['pearl', 'blind'])
def test_the_point_robot_finds_goals_it_was_never_trained_on(kind):
  """Three seeds, about eight minutes of one core each. A context holds the dense reward."""
  command = [sys.executable, '-m', 'tests.robots', kind]
  # The tests' own flags are for programs that are compiled to be run once.
  flags = {name: x for name, x in os.environ.items() if name != 'XLA_FLAGS'}
  done = subprocess.run(command, cwd=ROOT, env=flags, capture_output=True, text=True)
  assert not done.returncode, done.stderr[-3000:]
  found = json.loads(done.stdout.splitlines()[-1])
  scores = np.array(found['scores'])
  print(kind, scores.round(3).tolist())
  if kind == 'blind':
    assert scores.max() < 0.6
    return
  before, after = scores[:, :2].mean(1), scores[:, 2:].mean(1)
  away = found['range'] * (1 - after) / found['steps']  # from where the best would be, a step
  assert (away < 0.2).all() and (after > before + 0.3).all() and scores[:, 2:].min() > 0.6
