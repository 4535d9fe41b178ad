"""PEARL's parts: beliefs, who learns from what, the two replays, and who is never learned from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from palm_jax.meta import loop, pearl, play, replays, train
from palm_jax.meta.pearl import Batch, Context
from palm_jax.meta.replays import Record
from tests.robots import PointRobot, half_circle

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
      prior_episodes=2,
      posterior_episodes=1,
      replay_episodes=4,
      updates=2,
      meta_batch=M,
      batch_size=B,
      context_size=C,
      latent_dim=Z,
      hidden=(8, 8),
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


def critic_gradient(c, changed=lambda agent: agent):
  """Of the encoder, and the loss."""
  batch, context, descriptors = drawn()
  agent = changed(pearl.init(jax.random.key(0), 'pearl', (F, A, 2), c))
  noise = jnp.asarray(normal(8, M, Z)), jnp.asarray(normal(9, M, B, A))
  (loss, _), grads = jax.value_and_grad(pearl.critic_loss, has_aux=True)(
    (agent.critic, agent.encoder), agent, 'pearl', batch, context, descriptors, noise, c
  )
  return grads[1], loss


def size(tree):
  return max(float(jnp.abs(x).max()) for x in jax.tree.leaves(tree))


def test_the_encoder_learns_from_bellman_error_and_kl_only():
  blind_critic = lambda agent: agent.replace(critic=jax.tree.map(jnp.zeros_like, agent.critic))
  assert size(critic_gradient(tiny(kl_lambda=0.0))[0]) > 0  # of the Bellman error
  assert size(critic_gradient(tiny(kl_lambda=0.0), blind_critic)[0]) == 0
  assert size(critic_gradient(tiny(), blind_critic)[0]) > 0  # of the KL
  batch, context, descriptors = drawn()
  c = tiny()
  agent = pearl.init(jax.random.key(0), 'pearl', (F, A, 2), c)

  def loss(actor, encoder):
    evidence = pearl.evidence_of(*pearl.encode('pearl', encoder, context, c))
    z = pearl.latent('pearl', evidence, descriptors, jnp.asarray(normal(8, M, Z)))
    return pearl.actor_loss(actor, agent, batch, z, jnp.asarray(normal(9, M, B, A)), c)[0]

  of_actor, of_encoder = jax.grad(loss, (0, 1))(agent.actor, agent.encoder)
  assert size(of_actor) > 0 and size(of_encoder) == 0


def test_targets_are_constants():
  """The gradient is that of a target written in numbers: the target critic does not change it by
  more than the target's value, and z of s' has none."""
  c = tiny(kl_lambda=0.0, gamma=0.9)
  batch, context, descriptors = drawn()
  agent = pearl.init(jax.random.key(0), 'pearl', (F, A, 2), c)
  noise = jnp.asarray(normal(8, M, Z)), jnp.asarray(normal(9, M, B, A))
  grads, _ = critic_gradient(c)

  def z_of(encoder):
    evidence = pearl.evidence_of(*pearl.encode('pearl', encoder, context, c))
    return pearl.latent('pearl', evidence, descriptors, noise[0])

  z = z_of(agent.encoder)
  h = pearl.beside(batch.next_observation, z[:, None])
  mean, log_std = pearl._actor(c, A).apply(agent.actor, h)
  action, log_prob = pearl.sac.sample(mean, log_std, noise[1])
  value = pearl._critic(c).apply(agent.target_critic, h, action).min(0) - 0.1 * log_prob
  target = np.asarray(5.0 * batch.reward + 0.9 * value)

  def by_hand(encoder):
    h = pearl.beside(batch.observation, z_of(encoder)[:, None])
    q = pearl._critic(c).apply(agent.critic, h, batch.action)
    return jnp.mean((q[0] - target) ** 2) + jnp.mean((q[1] - target) ** 2)

  expected = jax.grad(by_hand)(agent.encoder)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), grads, expected)


@pytest.mark.parametrize('kind', pearl.AGENTS)
def test_what_each_agent_is_given(kind):
  c = tiny()
  agent = pearl.init(jax.random.key(0), kind, (F, A, 2), c)
  sees = agent.actor['params']['MLP_0']['Dense_0']['kernel'].shape[0]
  assert sees == F + dict(pearl=Z, blind=0, told=2)[kind]
  assert (agent.encoder == ()) == (kind != 'pearl')
  batch, context, descriptors = drawn()
  step = jax.jit(lambda d: pearl.update(agent, kind, batch, context, d, jax.random.key(1), c))
  (after, metrics), (other, _) = step(descriptors), step(-descriptors)
  assert all(np.isfinite(x) for x in metrics.values())
  differs = size(jax.tree.map(jnp.subtract, after.critic, other.critic)) > 0
  assert differs == (kind == 'told')  # nobody else knows


# ---- replays


def record_of(value, tasks=2, episodes=2, steps=3):
  full = lambda *shape: jnp.full((tasks, episodes, *shape), float(value))
  observation = full(steps + 1, F) + 0.1 * jnp.arange(steps + 1)[:, None]
  return Record(observation, full(steps, A), full(steps), full(steps))


def test_a_context_holds_the_newest_play_only():
  contexts = replays.empty_context(3, 6, F, A)
  contexts = replays.refill(contexts, jnp.array([0, 2]), record_of(1))
  contexts = replays.refill(contexts, jnp.array([2, 1]), record_of(2))
  np.testing.assert_array_equal(contexts.hint.mean(1), [1, 2, 2])
  np.testing.assert_array_equal(contexts.hint.std(1), [0, 0, 0])
  seen = replays.sample_context(contexts, jnp.array([2, 0]), 50, jax.random.key(0))
  np.testing.assert_array_equal(seen.hint, np.repeat([[2.0], [1.0]], 50, axis=1))
  assert seen.observation.max() < 2.25  # never an episode's last state


def test_a_replay_holds_older_play_too_and_no_step_crosses_an_episode():
  replay = replays.empty_replay(3, 4, 3, F, A)
  for value in (1, 2, 3):
    replay = replays.add(replay, jnp.array([0, 2]), record_of(value))
  replay = replays.add(replay, jnp.array([1]), record_of(9, tasks=1))
  assert replay.count.tolist() == [6, 2, 6]
  batch = replays.sample(replay, jnp.array([2, 1]), 200, jax.random.key(0))
  assert set(np.unique(batch.reward[0])) == {2, 3}  # of four episodes the oldest two are gone
  assert set(np.unique(batch.reward[1])) == {9}  # and what was never filled is not drawn
  np.testing.assert_allclose(batch.next_observation - batch.observation, 0.1, atol=1e-5)


# ---- the loop


@pytest.fixture(scope='module')
def program():
  return loop.make_program(ROBOT, 'pearl', tiny())


def after(program, count, tasks=TASKS):
  """State and metrics after so many iterations."""
  state, metrics = program.init(jax.random.key(0)), {}
  for _ in range(count):
    state, metrics = program.call(state, tasks.variables, tasks.training)
  return state, metrics


def test_play_comes_first_then_learning(program):
  begun, _ = after(program, 0)
  begun = jax.device_get(begun.players.agent)  # before it is donated
  state, metrics = after(program, 2)
  jax.tree.map(np.testing.assert_array_equal, state.players.agent, begun)
  assert state.players.replay.count.tolist() == [[3] * 4] * 2  # each task once
  assert (metrics['critic_loss'] == 0).all()
  state, metrics = after(program, 3)
  assert state.iteration == 3 and (metrics['critic_loss'] > 0).all()
  assert sorted(state.players.replay.count[0].tolist()) == [3, 3, 6, 6]
  one, two = (jax.tree.map(lambda x, s=s: x[s], state.players.agent.actor) for s in (0, 1))
  assert size(jax.tree.map(jnp.subtract, one, two)) > 0  # seeds differ


def test_the_encoders_replay_is_recent_and_of_the_prior_alone(program):
  """It equals the newest prior episodes that the learner's replay got, of each task."""
  state, _ = after(program, 5)
  replay, context = state.players.replay, state.players.context
  for seed in range(2):
    for task, count in enumerate(replay.count[seed].tolist()):
      # Each play adds two prior episodes, then one of the posterior.
      slots = [(count - 3) % 4, (count - 2) % 4]
      np.testing.assert_array_equal(
        context.observation[seed, task].reshape(2, 3, F),
        replay.observation[seed, task][np.array(slots), :-1],
      )


def test_held_out_tasks_are_never_learned_from(tmp_path):
  """A training whose held-out tasks are NaN is the same, bit for bit."""
  c = tiny(iterations=3, test_every=1)
  poisoned = TASKS._replace(held_out=jax.tree.map(lambda x: x * jnp.nan, TASKS.held_out))
  ends = []
  for name, tasks in (('a', TASKS), ('b', poisoned)):
    mesh = jax.make_mesh((1,), ('data',), devices=jax.devices()[:1])
    found = train.train('pearl', c, ROBOT, tasks, jax.random.key(0), tmp_path / name, mesh)
    ends.append(found['returns'])
  assert np.isfinite(ends[0]['held-out']).all() and np.isnan(ends[1]['held-out']).all()
  np.testing.assert_array_equal(ends[0]['training'], ends[1]['training'])


def test_adaptation_uses_the_prior_first_then_what_it_has_played(program):
  """Written out with the same keys: episode by episode."""
  c = tiny(test_prior_episodes=2, test_episodes=4)
  setup = play.Setup(ROBOT, 'pearl', c)
  agent = pearl.init(jax.random.key(3), 'pearl', ROBOT.sizes, c)
  key, tasks = jax.random.key(5), TASKS.held_out
  found = jax.jit(lambda agent: play.test(setup, agent, (), tasks, key))(agent)
  assert found.shape == (4, 2)
  seen = []
  for episode in range(4):
    keys = [jax.random.fold_in(jax.random.fold_in(key, episode), i) for i in range(2)]
    noise = jnp.stack([jax.random.normal(k, (Z,)) for k in keys])
    mean, std = 0.0, 1.0
    if episode >= 2:
      context = Context(*(jnp.concatenate(x, 1) for x in zip(*seen, strict=True)))
      mean, variance = pearl.encode('pearl', agent.encoder, context, c)
      precision = 1 / np.asarray(variance, np.float64)
      std = np.sqrt(1 / precision.sum(1))
      mean = (precision * mean).sum(1) / precision.sum(1)
    z = jnp.asarray(mean + std * noise, jnp.float32)
    place, places, actions, rewards = jnp.zeros((2, 2)), [], [], []
    for _ in range(3):
      action = pearl.act(agent.actor, place, z, jnp.zeros((2, A)), c)
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
  ahead = goals / np.abs(goals).max(-1, keepdims=True)
  best = -sum(np.linalg.norm(0.1 * t * ahead - goals, axis=-1) for t in (1, 2, 3))
  np.testing.assert_allclose(high, best, rtol=1e-5)
  assert (low < high).all()
