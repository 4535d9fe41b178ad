"""What stands around SAC: standardised features, skills, past policies, memory, and the cone."""

import functools
import itertools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from configs import cifar
from palm_jax import agent, curiosity, environment, pretrain, reward, sac
from palm_jax.base import devices
from palm_jax.base.errors import UserError
from tests.test_curiosity import mlp
from tests.worlds import tiny_config

B, F, D, A = 16, 5, 4, 3
RNG = np.random.default_rng(0)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def jitted(key, feature_dim, projection_dim, action_dim, config):
  return agent.init(key, feature_dim, projection_dim, action_dim, config)


def init(key, feature_dim, projection_dim, action_dim, config):
  """Compiled: call by call it takes seconds."""
  frozen = ml_collections.FrozenConfigDict(config)
  return jitted(key, feature_dim, projection_dim, action_dim, frozen)


def config_of(reward=(), **changes):
  c = tiny_config()
  c.sac.update(dict(dict(hidden=(8,), trunk=0), **changes))
  c.reward.update(dict(dict(hidden=8, rep_dim=4), **dict(reward)))
  return c


def transitions(seed, dtype=np.float32):
  rng = np.random.default_rng(seed)
  normal = lambda *shape: rng.normal(2, 3, shape).astype(dtype)
  return agent.Transitions(
    h=normal(B, F),
    next_h=normal(B, F),
    z=normal(B, D),
    next_z=normal(B, D),
    action=np.tanh(normal(B, A)),
    episodes=rng.integers(0, 99, B).astype(np.int32),
  )


def noise(seed, count=1, dtype=np.float32):
  return np.random.default_rng(seed).normal(size=(count, 2, B, A)).astype(dtype)


def test_without_anything_it_is_sac():
  c, t = config_of(), transitions(0)
  state = init(jax.random.key(0), F, D, A, c)
  got, metrics = jax.jit(lambda s: agent.update(s, t, noise(1), c))(state)
  r = reward.entropy_reward(t.next_h, **reward.options(c.reward))
  batch = sac.Batch(t.h, t.action, r, t.next_h, jnp.full(B, c.sac.gamma))
  plain = sac.init(jax.random.key(0), F, A, c.sac)
  want, wanted = jax.jit(lambda s: sac.update(s, batch, noise(1)[0], c.sac))(plain)
  for name in sac.SAC.__dataclass_fields__:
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
      getattr(got, name),
      getattr(want, name),
    )
  assert wanted.keys() < metrics.keys()


def test_features_are_standardised_by_all_that_was_seen():
  c = config_of(standardise=True)
  state, seen = init(jax.random.key(0), F, D, A, c), []
  update = jax.jit(lambda s, t: agent.update(s, t, noise(1), c)[0])
  for i in range(5):
    state = update(state, transitions(i))
    seen.append(transitions(i).h)
  # The first 100 batches have equal weights.
  np.testing.assert_allclose(state.moments.mean, np.mean(seen, (0, 1)), rtol=1e-4)
  within = np.mean([h.var(0) for h in seen], 0)
  np.testing.assert_allclose(state.moments.var, within, rtol=1e-4)
  h = transitions(9).h
  want = (h - np.mean(seen, (0, 1))) / np.sqrt(within)
  got = agent.observe(state, h, np.zeros(B, np.int32), c.sac)
  np.testing.assert_allclose(got, np.clip(want, -5, 5), rtol=1e-3, atol=1e-4)
  far = np.mean(seen, (0, 1)) + 50 * np.sqrt(within) * [[1], [-1]]
  got = agent.observe(state, far.astype(np.float32), np.zeros(2, np.int32), c.sac)
  np.testing.assert_array_equal(got, [[5] * F, [-5] * F])
  # However many came before, a batch moves them by a hundredth of the way.
  old = state.replace(moments=state.moments.replace(count=state.moments.count * 0 + 10_000))
  new = update(old, transitions(7).replace(h=transitions(7).h + 100))
  gap = transitions(7).h.mean(0) + 100 - old.moments.mean
  np.testing.assert_allclose(new.moments.mean - old.moments.mean, 0.01 * gap, rtol=1e-3)


def test_sac_learns_from_standardised_features_with_each_noise():
  c, t = config_of(standardise=True, updates_per_batch=2, gamma=0.9), transitions(0)
  state, draws = init(jax.random.key(0), F, D, A, c), noise(1, 2)
  got, _ = jax.jit(lambda s: agent.update(s, t, draws, c))(state)
  mean, var = t.h.mean(0), t.h.var(0)  # of the first batch alone
  seen = lambda h: np.clip((h - mean) / np.sqrt(var), -5, 5).astype(np.float32)
  r = reward.entropy_reward(t.next_h, **reward.options(c.reward))
  discount = np.full(B, 0.9, np.float32)
  batch = sac.Batch(seen(t.h), t.action, r, seen(t.next_h), discount)
  update = jax.jit(lambda s, z: sac.update(s, batch, z, c.sac)[0])
  wanted = sac.init(jax.random.key(0), F, A, c.sac)
  for each in draws:
    wanted = update(wanted, each)
  for name in ('actor', 'critic'):
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
      getattr(got, name),
      getattr(wanted, name),
    )


def test_rnd_sees_standardised_features():
  c, t = config_of(reward=dict(kind='rnd')), transitions(0)
  state = init(jax.random.key(0), F, D, A, c)
  mean, var = np.full(F, 2, np.float32), np.full(F, 9, np.float32)
  state = state.replace(moments=state.moments.replace(mean=mean, var=var))
  got = jax.jit(lambda s: agent.intrinsic_reward(s, t, c)[1])(state)
  seen = np.clip((t.next_h - mean) / np.sqrt(var), -5, 5).astype(np.float32)
  given = seen, t.action, t.next_h
  wanted = jax.jit(lambda x: curiosity.update(x, 'rnd', given, c.reward)[1])(state.curiosity)
  np.testing.assert_allclose(got, wanted, rtol=1e-4)


def test_a_skill_is_a_direction_of_its_episode():
  episodes = np.arange(4000, dtype=np.int32)
  found = np.asarray(agent.skills(episodes, 3))
  np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)
  assert np.abs(found.mean(0)).max() < 5 / np.sqrt(3 * 4000)
  np.testing.assert_allclose(np.cov(found.T), np.eye(3) / 3, atol=0.03)
  np.testing.assert_allclose(agent.skills(episodes[7:9], 3), found[7:9], rtol=1e-6)
  c = config_of(skill_dim=3)
  state = init(jax.random.key(0), F, D, A, c)
  h = transitions(0).h
  seen = agent.observe(state, h, episodes[:B], c.sac)
  np.testing.assert_allclose(seen, np.append(h, found[:B], 1), rtol=1e-6)


def test_following_the_skill_is_rewarded():
  """cos(phi(s'), skill), by numpy."""
  rewards = []
  for weight in (0.0, 3.0):
    c = config_of(reward=dict(skill=weight, k=3), skill_dim=2, standardise=True)
    state, t = init(jax.random.key(0), F, D, A, c), transitions(0)
    mean, var = t.h.mean(0), t.h.var(0)
    state = state.replace(moments=state.moments.replace(mean=mean, var=var))
    learned, r, _ = jax.jit(lambda s, t=t, c=c: agent.intrinsic_reward(s, t, c))(state)
    rewards.append(np.asarray(r))
  arrived = np.clip((t.next_h - mean) / np.sqrt(var), -5, 5)
  phi = mlp(jax.device_get(learned.skill.params), arrived)
  phi /= np.linalg.norm(phi, axis=1, keepdims=True)
  cosine = np.sum(phi * np.asarray(agent.skills(t.episodes, 2)), 1)
  np.testing.assert_allclose(rewards[1] - rewards[0], 3 * cosine, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('on', ['next', 'current'])
@pytest.mark.parametrize('kind, space', [('apt', 'h'), ('apt', 'projection'), ('rnd', 'h')])
def test_a_reward_is_of_the_frame_that_it_should_be_of(kind, space, on):
  c = config_of(reward=dict(kind=kind, space=space, on=on, k=3), standardise=True)
  state, t = init(jax.random.key(0), F, D, A, c), transitions(0)
  state = state.replace(moments=state.moments.replace(var=np.full(F, 9, np.float32)))
  given = jax.jit(lambda s, t: agent.intrinsic_reward(s, t, c)[1])
  features = dict(h=('h', 'next_h'), projection=('z', 'next_z'))[space]
  changed = []
  for name in ('h', 'next_h', 'z', 'next_z'):
    x = getattr(t, name)
    other = t.replace(**{name: x[:, ::-1] * np.linspace(0.5, 2, x.shape[1], dtype=np.float32)})
    if not np.allclose(given(state, t), given(state, other), rtol=1e-5):
      changed.append(name)
  assert changed == [features[on == 'next']]


@pytest.mark.parametrize('kind', ['icm', 'disagreement'])
def test_what_is_predicted_is_the_next_frame_of_the_one_before(kind):
  c = config_of(reward=dict(kind=kind, models=3))
  state, t = init(jax.random.key(0), F, D, A, c), transitions(0)
  learned, r, _ = jax.jit(lambda s: agent.intrinsic_reward(s, t, c))(state)
  params = jax.device_get(learned.curiosity.params)
  before = np.append(t.h, t.action, 1).astype(np.float64)
  if kind == 'icm':
    expected = np.log1p(np.linalg.norm(t.next_h - mlp(params['forward'], before), axis=1))
  else:
    guesses = [mlp(jax.tree.map(lambda x, i=i: x[i], params), before) for i in range(3)]
    expected = np.var(guesses, 0, ddof=1).mean(-1)
  np.testing.assert_allclose(r, expected, rtol=1e-4)


def test_an_episode_is_played_by_one_of_the_past_policies():
  c = config_of(policies=3, policy_every=2, lr_actor=0.1)
  state = init(jax.random.key(0), F, D, A, c)
  update = jax.jit(lambda s, t: agent.update(s, t, noise(1), c)[0])
  actors = [state.actor]
  h, episodes, z = np.ones((60, F), np.float32), np.arange(60) // 2, np.zeros((60, A), np.float32)
  for i in range(5):
    state = update(state, transitions(i))
    actors.append(state.actor)
    if i < 2:  # none is kept yet, and then the present one
      own = sac.act(state, h, z, c.sac)
      np.testing.assert_allclose(agent.act(state, h, z, episodes, c.sac), own, atol=1e-6)
  got = np.asarray(agent.act(state, h, z, episodes, c.sac))
  # Of 5 updates those after 2 and 4 are kept, beside the present one.
  by = lambda n: np.asarray(sac.act(state.replace(actor=actors[n]), h, z, c.sac))[0]
  possible = {n: by(n) for n in (2, 4, 5)}
  which = np.array([min(possible, key=lambda n, a=a: np.abs(possible[n] - a).max()) for a in got])
  assert all(np.abs(possible[n] - a).max() < 1e-6 for n, a in zip(which, got, strict=True))
  assert set(which) == {2, 4, 5} and (which[::2] == which[1::2]).all()


def test_past_policies_are_kept_between_batches():
  c = config_of(policies=3, policy_every=2, updates_per_batch=2)
  sac.check(c.sac)
  c.sac.updates_per_batch = 4
  with pytest.raises(UserError, match='sac.policy_every=2 is less than sac.updates_per_batch=4'):
    sac.check(c.sac)


def test_neighbours_are_sought_in_the_memory_too():
  c = config_of(reward=dict(memory=2 * B, space='projection', k=3))
  state = init(jax.random.key(0), F, D, A, c)
  given = jax.jit(lambda s, t: agent.intrinsic_reward(s, t, c)[:2])
  past = []
  for i in range(4):
    t = transitions(i)
    state, r = given(state, t)
    others = np.concatenate([t.next_z, *past[-2:]]).astype(np.float64)
    distances = np.sort(np.linalg.norm(t.next_z[:, None] - others, axis=-1), 1)[:, 1:4]
    np.testing.assert_allclose(r, np.log1p(distances.mean(1)), rtol=1e-5)
    past.append(t.next_z)


def test_the_unit_reward_sees_direction_alone():
  c = config_of(reward=dict(space='unit', k=3))
  state, t = init(jax.random.key(0), F, D, A, c), transitions(0)
  moved = jax.jit(lambda s: agent.update(s, t, noise(0), c)[0])(state)
  r = agent.intrinsic_reward(moved, t, c)[1]
  x = t.next_h.astype(np.float64) - t.h.mean(0)
  x /= np.linalg.norm(x, axis=1, keepdims=True)
  distances = np.sort(np.linalg.norm(x[:, None] - x, axis=-1), 1)[:, 1:4]
  np.testing.assert_allclose(r, np.log1p(distances.mean(1)), rtol=1e-4)


def test_the_spread_of_a_policy_is_that_of_its_actions():
  c = config_of()
  state = init(jax.random.key(3), F, D, A, c)
  seen = np.random.default_rng(0).normal(size=(8, F)).astype(np.float32)
  draws = np.random.default_rng(1).normal(size=(20_000, 8, A)).astype(np.float32)
  actions = np.asarray(jax.vmap(lambda n: sac.act(state, seen, n, c.sac))(draws))
  mean = actions.mean(0)  # (states, A)
  spread = agent.spread_of_policy(state, seen, A, c.sac)
  common = np.sqrt(np.mean(mean.mean(0) ** 2))
  np.testing.assert_allclose(spread['mean_action'], np.sqrt(np.mean(mean**2)), atol=0.01)
  np.testing.assert_allclose(spread['constant_action'], common, atol=0.01)
  np.testing.assert_allclose(spread['constant_share'], common**2 / np.mean(mean**2), atol=0.02)
  np.testing.assert_allclose(spread['action_var'], np.mean(actions**2) - common**2, atol=0.01)


def cone_of_play(c, alpha, beta, steps=60, envs=512, z_dim=32):
  """Length of the mean unit latent of a new agent's play, blind but for its features of z."""
  state = init(jax.random.key(0), z_dim, D, z_dim, c)
  dynamics = environment.Dynamics(np.float32(alpha), np.float32(beta), start='stationary')
  ids = jnp.arange(envs)
  env = environment.reset(jax.random.key(1), ids, 0 * ids, z_dim, 0, dynamics)

  @jax.jit
  def play(env):
    def step(env, t):
      noise = jax.random.normal(jax.random.fold_in(jax.random.key(2), t), env.z.shape)
      action = agent.act(state, env.z, noise, ids, c.sac)
      key = jax.random.fold_in(jax.random.key(3), t)
      return environment.step(env, action, key, ids, dynamics, 10_000, 0), ()

    return jax.lax.scan(step, env, jnp.arange(steps))[0].z

  z = np.asarray(play(env), np.float64)
  unit = z / np.linalg.norm(z, axis=1, keepdims=True)
  spread = agent.spread_of_policy(state, jnp.asarray(z, jnp.float32), z_dim, c.sac)
  said = environment.mean_direction(dynamics, spread['constant_action'], spread['action_var'])
  return np.linalg.norm(unit.mean(0)), float(said)


def test_first_actions_are_neutral():
  """And the formula of the cone says what play shows."""
  sizes = dict(hidden=(16, 16), trunk=8)
  played, said = cone_of_play(config_of(neutral_start=True, **sizes), 0.95, 0.75)
  assert played < 0.1 and said < 0.1
  played, said = cone_of_play(config_of(**sizes), 0.95, 0.75)
  assert played > 0.2
  np.testing.assert_allclose(said, played, atol=0.1)


def test_neutral_deviations_are_nearly_uniform():
  c = config_of(neutral_start=True, hidden=(16, 16), trunk=8)
  state = init(jax.random.key(0), F, D, A, c)
  first, second = sac.action_moments(state, transitions(0).h, A, c.sac)
  assert np.abs(first).max() < 0.1
  np.testing.assert_allclose(second, 1 / 3, atol=0.05)  # of a uniform action


def test_it_learns_to_act_where_the_features_do_not_change():
  """The check of an able agent: on a frozen encoder, from what random actions showed, it learns to
  earn more than they do, by more than three standard errors."""
  z_dim, envs, features, steps = 8, 64, 12, 40
  c = config_of(
    reward=dict(k=3),
    neutral_start=True,
    standardise=True,
    updates_per_batch=4,
    gamma=0.75,
    init_alpha=0.003,
    lr_actor=1e-3,
    lr_critic=1e-3,
  )
  weights = jax.random.normal(jax.random.key(5), (z_dim, features))
  see = lambda z: jax.nn.relu(z @ weights + 0.5)
  dynamics = environment.Dynamics(np.float32(0.95), np.float32(0.5), start='stationary')
  ids = jnp.arange(envs)
  start = environment.reset(jax.random.key(1), ids, 0 * ids, z_dim, 0, dynamics)
  state = init(jax.random.key(0), features, D, z_dim, c)

  def play(act, key):
    """z (steps, envs, z_dim) before, actions, and z after."""

    def step(env, t):
      key_action, key_env = jax.random.split(jax.random.fold_in(key, t))
      action = act(see(env.z), key_action)
      after = environment.step(env, action, key_env, ids, dynamics, 10_000, 0)
      return after, (env.z, action, after.z)

    return jax.lax.scan(step, start, jnp.arange(steps))[1]

  uniform = lambda h, key: jax.random.uniform(key, (envs, z_dim), minval=-1, maxval=1)
  by_policy = lambda state: (
    lambda h, key: agent.act(state, h, jax.random.normal(key, (envs, z_dim)), ids, c.sac)
  )

  @jax.jit
  def learn(state, record):
    def update(state, t):
      rows, draws = jax.random.split(jax.random.fold_in(jax.random.key(2), t))
      rows = jax.random.randint(rows, (envs,), 0, steps * envs)
      z, action, after = (x.reshape(-1, z_dim)[rows] for x in record)
      h = see(z)
      t = agent.Transitions(h, see(after), h[:, :D], h[:, :D], action, ids)
      return agent.update(state, t, jax.random.normal(draws, (4, 2, envs, z_dim)), c)[0], ()

    return jax.lax.scan(update, state, jnp.arange(300))[0]

  record = jax.jit(lambda: play(uniform, jax.random.key(3)))()
  known = see(record[2][::5].reshape(-1, z_dim))

  @jax.jit
  def earned(state):
    """Mean rewards (steps,) among what is known, of the policy and of random actions."""
    of = lambda z: reward.entropy_reward(
      see(z), known, self_index=jnp.full(envs, -1), **reward.options(c.reward)
    ).mean()
    played = [play(act, jax.random.key(4)) for act in (by_policy(state), uniform)]
    return [jax.lax.map(of, z) for _, _, z in played]

  policy, random = map(np.asarray, earned(learn(state, record)))
  error = np.sqrt((policy.var(ddof=1) + random.var(ddof=1)) / (steps / 4))  # 4: memory of z
  assert policy.mean() > random.mean() + 3 * error, (policy.mean(), random.mean(), error)
  before, random = map(np.asarray, earned(state))
  assert abs(before.mean() - random.mean()) < 3 * error  # not by its first actions


EVERYTHING = dict(standardise=True, skill_dim=2, policies=3, policy_every=2, updates_per_batch=2)


@pytest.mark.slow
@pytest.mark.parametrize(
  'settings, ours',
  [
    (dict(space='unit', memory=2 * B), EVERYTHING),
    (dict(kind='rnd'), {}),
    (dict(kind='icm'), {}),
    (dict(kind='disagreement', models=2), {}),
  ],
)
def test_any_number_of_devices_computes_the_same(settings, ours):
  c = config_of(reward=settings, **ours)
  found = []
  with jax.enable_x64(True):
    cast = lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x
    first = jax.tree.map(cast, init(jax.random.key(0), F, D, A, c))
    for count in (1, 2, 8):
      update = jax.shard_map(
        lambda s, t, n: agent.update(s, t, n, c, 'data'),
        mesh=devices.make_mesh(count),
        in_specs=(P(), P('data'), P(None, None, 'data')),
        out_specs=(P(), P()),
      )
      call, state = jax.jit(update), first
      for i in range(2):
        n = noise(i, c.sac.updates_per_batch, np.float64)
        state, metrics = jax.block_until_ready(call(state, transitions(i, np.float64), n))
      found.append(jax.device_get((state, metrics)))
  for other in found[1:]:
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-9), found[0], other
    )


def test_the_able_preset_follows_the_world():
  c = cifar.get_config('able,small,paper_fig5')
  assert (c.sac.gamma, c.sac.init_alpha) == (0.875, 0.2 / 64)
  c.environment.beta = 0.5  # as by a flag
  assert c.sac.gamma == 0.75
  pretrain.check(c, 8)


@pytest.mark.parametrize('order', list(itertools.permutations(['small', 'able', 'paper_text'])))
def test_variants_have_no_order(order):
  assert (
    cifar.get_config(','.join(order)).to_dict()
    == cifar.get_config(','.join(sorted(order))).to_dict()
  )
  c = cifar.get_config(','.join(['best', *order]))
  assert (c.environment.alpha, c.environment.beta, c.sac.gamma) == (0.5, 0.95, 0.975)


@pytest.mark.parametrize('variant', ['best', 'small,paper_text,paper_fig5'])
def test_variants_that_cannot_be(variant):
  with pytest.raises(UserError, match='cannot be: best is a variant of small'):
    cifar.get_config(variant)


@pytest.mark.parametrize('variant', ['small,best', 'best,small'])
def test_the_best_preset_follows_small(variant):
  c = cifar.get_config(variant)
  assert (c.name, c.environment.beta, c.pretrain.env_steps) == ('cifar_small_best', 0.75, 345_600)
  assert (c.simsiam.objective, c.simsiam.augment) == ('simclr', 'simsiam')
  pretrain.check(c, 8)
  # One compiled call is as long as that of `small`: as many updates, and a checkpoint as soon.
  small = cifar.get_config('small').pretrain
  calls = [p.iterations_per_call * p.updates_per_iteration for p in (c.pretrain, small)]
  assert calls == [18, 20]
