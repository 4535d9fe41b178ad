import jax
import jax.numpy as jnp
import numpy as np
import pytest

from palm_jax.atari import dqn
from palm_jax.atari.replay import Batch
from palm_jax.base.errors import UserError

SHAPE, ACTIONS, B = (36, 36, 4), 3, 6


def tiny_config(**changes):
  config = dqn.default_config()
  config.update(dict(features=16, lr=1e-3, target_period=8) | changes)
  return config


def batches(count, seed=0):
  generator = np.random.default_rng(seed)
  stacks = lambda: generator.integers(0, 256, (count, B, *SHAPE)).astype(np.uint8)
  return Batch(
    stacks(),
    generator.integers(0, ACTIONS, (count, B)).astype(np.int32),
    generator.normal(size=(count, B)).astype(np.float32),
    generator.choice([0.0, 0.9], (count, B)).astype(np.float32),
    stacks(),
  )


def new_agent(config, trunk=None):
  return jax.jit(lambda: dqn.init(jax.random.key(0), SHAPE, ACTIONS, config, trunk))()


def q_values(params, stacks, config):
  return jax.jit(lambda params, stacks: dqn.q_values(params, stacks, config))(params, stacks)


@pytest.fixture(scope='module')
def start():
  """(config, agent after no update, jitted update that keeps its argument)."""
  config = tiny_config()
  agent = new_agent(config)
  return (
    config,
    agent,
    jax.jit(lambda agent, batches: dqn.update(agent, batches, jax.random.key(1), config)),
  )


def as_numpy(tree):
  return jax.tree.map(np.asarray, tree)


def assert_equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_targets_by_hand():
  online = jnp.array([[1.0, 2.0, 0.0], [5.0, 4.0, 3.0], [0.0, 0.0, 1.0]])
  target = jnp.array([[10.0, 20.0, 30.0], [7.0, 8.0, 9.0], [1.0, 2.0, 3.0]])
  # The online network chooses actions 1, 0, 2; a lost life leaves the return alone.
  got = dqn.targets(online, target, jnp.array([1.0, 2.0, 3.0]), jnp.array([0.5, 0.9, 0.0]))
  np.testing.assert_allclose(got, [1 + 0.5 * 20, 2 + 0.9 * 7, 3])


def test_an_update_is_adams_on_the_gradient_of_hubers_loss(start):
  config, agent, update = start
  one = batches(1)
  s, a, r, discount, next_s = (x[0] for x in one)
  other = jax.jit(lambda: dqn.init(jax.random.key(9), SHAPE, ACTIONS, config))().params
  agent = agent.replace(target=other)
  chosen = np.asarray(q_values(agent.params, next_s, config)).argmax(1)
  valued = np.asarray(q_values(other, next_s, config), np.float64)
  assert (valued.argmax(1) != chosen).any()
  target_q = r + discount * valued[np.arange(B), chosen]

  def loss_fn(params):  # optax's Huber written out
    error = jnp.abs(dqn.q_values(params, s, config)[jnp.arange(B), a] - target_q)
    return jnp.where(error < 1, error**2 / 2, error - 0.5).mean()

  loss, grads = jax.jit(jax.value_and_grad(loss_fn))(agent.params)
  new, metrics = update(agent, one)
  assert metrics['loss'] == pytest.approx(float(loss), rel=1e-5)
  assert metrics['target_q'] == pytest.approx(target_q.mean(), rel=1e-5)
  # Adam's first step: moments are corrected to g and g^2.
  steps = jax.tree.map(lambda g: -1e-3 * g / (jnp.abs(g) + config.adam_eps), grads)
  jax.tree.map(
    lambda new, old, step: np.testing.assert_allclose(new - old, step, atol=2e-6),
    new.params,
    agent.params,
    steps,
  )
  assert new.updates == 1


def test_several_updates_in_one_call_are_one_after_the_other(start):
  _, agent, update = start
  four = batches(4)
  together, metrics = update(agent, four)
  single, losses = agent, []
  for u in range(4):
    single, each = update(single, jax.tree.map(lambda x, u=u: x[u : u + 1], four))
    losses.append(each['loss'])
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), together, single
  )
  assert metrics['loss'] == pytest.approx(float(np.mean(losses)), rel=1e-4)


def test_the_target_is_copied_every_period(start):
  config, agent, update = start
  assert config.target_period // config.learn_period == 2
  targets = [agent.target]
  for _ in range(2):
    agent, _ = update(agent, batches(1))
    targets.append(agent.target)
  assert_equal(targets[0], targets[1])
  assert_equal(targets[2], agent.params)
  assert np.any(targets[2]['advantage']['kernel'] != targets[1]['advantage']['kernel'])


def test_actions_are_greedy_or_random_by_environment(start):
  config, agent, _ = start
  stacks = np.random.default_rng(0).integers(0, 256, (2, *SHAPE)).astype(np.uint8)
  act = jax.jit(lambda epsilon, key: dqn.act(agent.params, stacks, epsilon, key, config))
  best = np.argmax(q_values(agent.params, stacks, config), 1)
  np.testing.assert_array_equal(act(0.0, jax.random.key(0)), best)
  drawn = np.stack([act(0.6, jax.random.fold_in(jax.random.key(0), i)) for i in range(600)])
  for e in range(2):
    share = np.bincount(drawn[:, e], minlength=ACTIONS) / 600
    expected = np.full(ACTIONS, 0.2) + 0.4 * (np.arange(ACTIONS) == best[e])
    assert np.abs(share - expected).max() < 0.08  # four standard deviations
  assert np.mean(drawn[:, 0] == drawn[:, 1]) < 0.8
  first = jax.jit(lambda key: dqn.act(agent.params, stacks[:1], 0.6, key, config))
  assert all(first(jax.random.fold_in(jax.random.key(0), i))[0] == drawn[i, 0] for i in range(20))


def test_epsilon_schedule():
  config = dqn.default_config()
  steps = [0, 20_000, 145_000, 270_000, 10**7]
  np.testing.assert_allclose(
    [dqn.epsilon_at(step, config) for step in steps], [1, 1, 0.505, 0.01, 0.01]
  )


def test_dueling_is_the_value_and_centred_advantages():
  config = tiny_config(dueling=True)
  agent = new_agent(config)
  stacks = batches(1).stacks[0]
  params = as_numpy(agent.params)
  zeroed = dict(params, advantage=jax.tree.map(np.zeros_like, params['advantage']))
  value = np.asarray(q_values(zeroed, stacks, config))
  assert (value == value[:, :1]).all() and np.ptp(value) > 0
  np.testing.assert_allclose(q_values(params, stacks, config).mean(1), value[:, 0], atol=1e-5)


def test_rmsprop_is_centred():
  config = tiny_config(optimizer='rmsprop', trunk_scale=0.0, hidden_scale=0.5, lr=2e-3)
  optimizer = dqn._optimizer(config)
  tree = lambda *v: {
    'encoder': {'conv1': jnp.array(v[0]), 'dense': jnp.array(v[1])},
    'advantage': jnp.array(v[2]),
  }
  state = optimizer.init(tree(0.0, 0.0, 0.0))
  mean = square = np.zeros(3)
  for g in ([1.0, 2.0, 3.0], [2.0, -1.0, 3.0], [0.5, 4.0, 1.0]):
    steps, state = optimizer.update(tree(*g), state)
    mean, square = 0.95 * mean + 0.05 * np.array(g), 0.95 * square + 0.05 * np.array(g) ** 2
    want = -np.array([0.0, 1e-3, 2e-3]) * g / np.sqrt(square - mean**2 + config.rmsprop_eps)
    np.testing.assert_allclose(
      [steps['encoder']['conv1'], steps['encoder']['dense'], steps['advantage']], want, rtol=1e-4
    )


@pytest.mark.parametrize(
  'changes, message',
  [
    (
      dict(optimizer='sgd'),
      "collect.agent.optimizer='sgd' is unknown: choose one of adam, rmsprop",
    ),
    (dict(n_step=0), 'collect.agent.n_step=0 is not positive'),
    (dict(epsilon=1.5), 'collect.agent.epsilon=1.5'),
    (
      dict(target_period=6),
      'collect.agent.target_period=6 is not a positive multiple of learn_period=4: set .* to 8',
    ),
    (dict(trunk_scale=-1.0), 'trunk_scale=-1.0 is negative'),
  ],
)
def test_settings_that_cannot_work_are_named(changes, message):
  config = dqn.default_config()
  config.update(changes)
  with pytest.raises(UserError, match=message):
    dqn.check_config('collect.agent', config)
  dqn.check_config('collect.agent', dqn.default_config())
  dqn.check_config('collect.agent', dqn.dqn_zoo_config())
