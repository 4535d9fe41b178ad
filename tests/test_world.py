"""The latent world's doors: one world behind all of them, episodes, tasks, seeds, mistakes."""

import dataclasses
import importlib.util
import warnings

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from jax.sharding import PartitionSpec as P

from palm_jax import environment, pretrain, rollout, worlds
from palm_jax.base import devices
from palm_jax.base.errors import UserError
from palm_jax.world import Features, config, dataset, goal_latent, make, spaces
from palm_jax.world.gym import LatentManifoldEnv, LatentManifoldVectorEnv
from palm_jax.world.tasks import Classify, Entropy, Goal, make_task, oracle_action
from tests.worlds import LargeGenerator, LinearGenerator, nature_config, tiny_config

ENVS, LENGTH = 5, 4
GENERATOR = LinearGenerator()
PIXELS = Features(
  lambda variables, seen: seen.reshape(len(seen), -1)[:, ::7].astype(jnp.float32) / 255, (), 10
)
PIXELS30 = dataclasses.replace(PIXELS, size=28)  # of a stack of three
GOING_ON = np.zeros(ENVS, bool)  # of environments in the middle of their episodes


@dataclasses.dataclass(frozen=True)
class Away:
  """How far the picture is from the first one of its episode."""

  name: str = 'away'
  optimum: float | None = None
  sees: bool = True

  def init(self, features):
    return features

  def reward(self, told, memory, features, began):
    del told
    memory = jnp.where(began[:, None], features, memory)
    return memory, jnp.linalg.norm(features - memory, axis=-1)


def small(**settings):
  return make(GENERATOR, **dict(dict(episode_length=LENGTH), **settings))


def actions_of(count, seed=0):
  return np.random.default_rng(seed).uniform(-1, 1, (count, ENVS, 6)).astype(np.float32)


# ---- one world


def test_every_door_opens_on_the_world_of_pretraining():
  """Frames of `rollout.collect`, from its state, actions and keys, bit for bit."""
  config, generator = nature_config(), LargeGenerator()
  mesh = devices.make_mesh(1)
  program = pretrain.make_program(config, generator, mesh)
  world_of = worlds.make_world(config, generator, mesh)
  state = program.init(jax.random.key(0), world_of)
  key, steps, specs = jax.random.key(3), config.pretrain.rollout_length, pretrain.State.specs()
  collect = jax.shard_map(
    lambda s, w, k: rollout.collect(program.setup, s, w, k, jnp.bool_(True))[0],
    mesh=mesh,
    in_specs=(specs, P(), P()),
    out_specs=specs,
  )
  ended = jax.jit(collect)(state, world_of, key)
  world, params = make(
    generator,
    alpha=config.environment.alpha,
    beta=config.environment.beta,
    episode_length=config.environment.episode_length,
  )
  ids = jnp.arange(config.pretrain.num_envs)
  begun = world.reset_all(environment.env_keys(key, ids), params)[1]
  many = begun.replace(env=state.env, seen=state.frames)
  one = jax.tree.map(lambda x: x[2:3], many)
  for t in range(steps):
    _, key_env = jax.random.split(jax.random.fold_in(key, t))
    keys = environment.env_keys(key_env, ids)
    np.testing.assert_array_equal(many.seen.reshape(len(ids), -1), ended.ring.frames[t])
    done = jnp.asarray(ended.ring.actions[t], jnp.float32)
    _, many, _, truncated = jax.jit(world.step_all)(keys, many, done, params)
    observation, one, _, _, info = jax.jit(world.step_env)(keys[2], one, done[2], params)
    np.testing.assert_array_equal(observation, many.seen[2])
    assert info['truncated'] == truncated[2]
  np.testing.assert_array_equal(many.seen, ended.frames)
  jax.tree.map(np.testing.assert_array_equal, many.env, ended.env)


def test_gymnasium_is_the_same_world():
  vector = LatentManifoldVectorEnv(ENVS, world=small())
  world, params = vector.world, vector.params
  first, _ = vector.reset(seed=7)
  seed = int(np.random.SeedSequence(7).generate_state(1)[0])
  _, key, key_reset = jax.random.split(jax.random.key(seed), 3)
  ids = jnp.arange(ENVS)
  observations, state = world.reset_all(environment.env_keys(key_reset, ids), params)
  np.testing.assert_array_equal(first, observations)
  for t, actions in enumerate(actions_of(9)):
    keys = environment.env_keys(jax.random.fold_in(key, t), ids)
    observations, state, rewards, truncated = jax.jit(world.step_all)(keys, state, actions, params)
    seen, reward, terminated, cut, _ = vector.step(actions)
    np.testing.assert_array_equal(seen, observations)
    np.testing.assert_array_equal(cut, truncated)
    assert not terminated.any() and (reward == rewards).all()
    assert all(x.flags.writeable for x in (seen, reward, terminated, cut))


def test_an_episode_does_not_begin_with_noise_of_the_one_before():
  envs = LatentManifoldVectorEnv(ENVS, world=small(alpha=0.0, beta=0.0, label=0))
  seen = [envs.reset(seed=0)[0]]
  for _ in range(2):
    seen += [envs.step(actions)[0] for actions in actions_of(LENGTH - 1)]
    seen.append(envs.reset()[0])
  flat = np.concatenate(seen).reshape(-1, 64)
  assert len(np.unique(flat, axis=0)) == len(flat)


def test_an_episode_has_its_frames_and_no_step_crosses_its_end():
  """Gymnasium's NEXT_STEP: the action after the last frame is not done, and not rewarded."""
  kwargs = dict(world=small(task='goal', encoder=PIXELS, beta=0.0, alpha=1.0))
  a, b = (LatentManifoldVectorEnv(ENVS, **kwargs) for _ in range(2))
  np.testing.assert_array_equal(a.reset(seed=1)[0], b.reset(seed=1)[0])
  for t, actions in enumerate(actions_of(3 * LENGTH), 1):
    begins = t % LENGTH == 0
    other = -actions if begins else actions  # what is done there does not matter
    (seen, reward, _, cut, _), (again, *_) = a.step(actions), b.step(other)
    assert cut.all() == cut.any() == (t % LENGTH == LENGTH - 1)
    np.testing.assert_array_equal(seen, again)
    assert (reward == 0).all() == begins


# ---- gymnax's protocol


def test_gymnax_begins_the_next_episode_at_once():
  """Against a loop written out: the last picture is in info, the first of the next is observed."""
  world, params = small(task='goal', encoder=PIXELS)
  observation, state = world.reset(jax.random.key(0), params)
  assert observation.shape == (8, 8, 1) and state.time.tolist() == [0]
  expected = state
  for t, action in enumerate(actions_of(2 * LENGTH)[:, 0], 1):
    key = jax.random.fold_in(jax.random.key(9), t)
    observation, state, reward, terminated, truncated, info = world.step(key, state, action, params)
    key_step, key_reset = jax.random.split(key)
    last, expected, r, _, _ = world.step_env(key_step, expected, action, params)
    np.testing.assert_array_equal(info['final_observation'], last)
    assert truncated == (t % (LENGTH - 1) == 0) and not terminated and np.isclose(reward, r)
    if truncated:
      last, begun = world.reset_env(key_reset, params)
      expected = begun.replace(memory=expected.memory)
    np.testing.assert_array_equal(observation, last)
    assert state.time == expected.time


def test_it_is_usable_under_jit_vmap_and_scan():
  world, params = small()
  keys = jax.random.split(jax.random.key(0), ENVS)

  @jax.jit
  def play(keys, params):
    observations, states = jax.vmap(world.reset, (0, None))(keys, params)

    def step(states, actions):
      observations, states, *_ = jax.vmap(world.step, (0, 0, 0, None))(
        keys, states, actions, params
      )
      return states, observations

    return observations, jax.lax.scan(step, states, actions_of(3))[1]

  before = play._cache_size()
  first, pictures = play(keys, params)
  assert first.shape == (ENVS, 8, 8, 1) and pictures.shape == (3, ENVS, 8, 8, 1)
  other = play(keys, params.replace(alpha=jnp.float32(0.1), truncation_psi=jnp.float32(0.5)))
  assert play._cache_size() == before + 1  # numbers are traced
  assert (np.asarray(other[0]) != np.asarray(first)).any()


@pytest.mark.skipif(importlib.util.find_spec('gymnax') is None, reason='gymnax is not installed')
def test_gymnax_wrappers():
  from gymnax.environments.spaces import Box
  from gymnax.wrappers.purerl import FlattenObservationWrapper, LogWrapper

  world, params = small(task='goal', encoder=PIXELS)
  assert isinstance(world.observation_space(params), Box)
  wrapped = LogWrapper(FlattenObservationWrapper(world))
  observation, state = wrapped.reset(jax.random.key(0), params)
  total = 0.0
  for action in actions_of(LENGTH - 1)[:, 0]:
    observation, state, reward, _, _, info = wrapped.step(jax.random.key(1), state, action, params)
    total += reward
  assert observation.shape == (64,) and info['returned_episode']
  assert state.returned_episode_lengths == LENGTH - 1
  assert np.isclose(state.returned_episode_returns, total)


# ---- Gymnasium


def test_check_env_has_nothing_to_say():
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    made = gymnasium.make('palm_jax/LatentManifold-v0', render_mode='rgb_array', world=small())
    check_env(made.unwrapped)
  made = gymnasium.make(
    'palm_jax/LatentManifold-v0', world=small(observations='features', encoder=PIXELS)
  )
  assert made.observation_space == gymnasium.spaces.Box(-np.inf, np.inf, (10,), np.float32)
  assert made.reset(seed=0)[0].dtype == np.float32


def test_many_at_once_and_seeds():
  vector = gymnasium.make_vec(
    'palm_jax/LatentManifold-v0', num_envs=ENVS, vectorization_mode='vector_entry_point',
    render_mode='rgb_array', world=small(),
  )  # fmt: skip
  runs = []
  for seed in (3, 3, 4):
    seen = [vector.reset(seed=seed)[0], *(vector.step(a)[0] for a in actions_of(5))]
    again = vector.reset()[0]  # without a seed: another episode
    assert (again != seen[0]).any()
    runs.append(np.stack([*seen, again]))
  np.testing.assert_array_equal(runs[0], runs[1])
  assert (runs[0][0] != runs[2][0]).any()
  assert vector.metadata['autoreset_mode'] == gymnasium.vector.AutoresetMode.NEXT_STEP
  assert [p.shape for p in vector.render()] == [(8, 8, 3)] * ENVS


def test_one_class_and_stacks():
  world, params = small(label=2, stack=3)
  state = world.reset_all(jax.random.split(jax.random.key(0), ENVS), params)[1]
  assert (state.env.label == 2).all() and state.seen.shape == (ENVS, 8, 8, 3)
  assert (state.seen[..., :2] == 0).all()
  for t in range(6):
    keys = jax.random.split(jax.random.key(t), ENVS)
    state = world.step_all(keys, state, actions_of(1)[0], params)[1]
    assert (state.env.label == 2).all()


# ---- tasks


def features(seed, count=ENVS, size=4):
  return np.random.default_rng(seed).normal(size=(count, size)).astype(np.float32)


@pytest.mark.parametrize('threshold', [None, 0.3])
def test_goal_is_a_cosine(threshold):
  told = dict(features=features(1)[0], center=features(2)[0])
  h = features(3).astype(np.float64)
  a, b = h - told['center'], told['features'] - told['center'].astype(np.float64)
  expected = a @ b / np.linalg.norm(a, axis=1) / np.linalg.norm(b)
  _, rewards = Goal(threshold).reward(told, (), jnp.asarray(h, jnp.float32), GOING_ON)
  expected = expected if threshold is None else expected > threshold
  np.testing.assert_allclose(rewards, expected, atol=1e-6)
  at_goal = Goal().reward(told, (), jnp.asarray(told['features'][None]), GOING_ON[:1])[1]
  np.testing.assert_allclose(at_goal, Goal().optimum, atol=1e-6)


def test_class_is_a_probability():
  told = dict(kernel=features(1, 4, 3), bias=features(2, 1, 3)[0], target=np.int32(1))
  h = features(3).astype(np.float64)
  logits = h @ told['kernel'] + told['bias']
  expected = np.exp(logits[:, 1]) / np.exp(logits).sum(1)
  _, rewards = Classify().reward(told, (), jnp.asarray(h, jnp.float32), GOING_ON)
  np.testing.assert_allclose(rewards, expected, atol=1e-6)


def test_entropy_is_of_the_last_features_of_all_environments():
  task = Entropy(k=3, memory=2 * ENVS)
  memory, kept = task.init(features(0)), np.zeros((0, 4))
  for t in range(4):
    h = features(10 + t)
    memory, rewards = task.reward((), memory, jnp.asarray(h), GOING_ON)
    kept = np.concatenate([kept, h.astype(np.float64)])[-2 * ENVS :]
    distances = np.sort(np.linalg.norm(h[:, None].astype(np.float64) - kept, axis=-1))[:, 1:4]
    np.testing.assert_allclose(rewards, np.log1p(distances.mean(1)), rtol=1e-5)


def test_a_memory_is_renewed_where_an_episode_begins_behind_every_door():
  world, params = small(task=Away(), encoder=PIXELS)
  distance = lambda seen, first: np.linalg.norm(PIXELS.apply((), seen) - first, axis=-1)
  envs, one = (
    LatentManifoldVectorEnv(ENVS, world=(world, params)),
    gymnasium.make('palm_jax/LatentManifold-v0', world=(world, params)),
  )
  seen, _ = envs.reset(seed=0)
  alone, _ = one.reset(seed=0)
  single, state = world.reset(jax.random.key(0), params)
  for t, actions in enumerate(actions_of(3 * LENGTH), 1):
    if t % LENGTH == 1:
      first = PIXELS.apply((), seen)
    if t % (LENGTH - 1) == 1:
      first_alone, first_single = (PIXELS.apply((), x[None]) for x in (alone, single))
    seen, rewards, *_ = envs.step(actions)
    if t % LENGTH:
      np.testing.assert_allclose(rewards, distance(seen, first), atol=1e-6)
    alone, reward, *_ = one.step(actions[0])
    np.testing.assert_allclose(reward, distance(alone[None], first_alone)[0], atol=1e-6)
    key = jax.random.fold_in(jax.random.key(9), t)
    single, state, reward, *_, info = world.step(key, state, actions[0], params)
    last = info['final_observation'][None]
    np.testing.assert_allclose(reward, distance(last, first_single)[0], atol=1e-6)
    if t % (LENGTH - 1) == 0:
      alone, _ = one.reset()


def test_entropy_outlives_a_reset_but_not_a_seed():
  envs = LatentManifoldVectorEnv(ENVS, world=small(task='entropy', encoder=PIXELS, k=3))
  envs.reset(seed=0)
  envs.step(actions_of(1)[0])
  assert envs._state.memory.total == ENVS
  envs.reset()
  assert envs._state.memory.total == 2 * ENVS
  envs.reset(seed=0)
  assert envs._state.memory.total == 0


def test_nothing_is_rewarded_before_there_are_neighbours():
  task = Entropy(k=3)
  memory = task.init(features(0)[:2])
  _, rewards = task.reward((), memory, jnp.asarray(features(1)[:2]), GOING_ON[:2])
  assert (rewards == 0).all()


def test_who_knows_the_goal_is_rewarded_more():
  settings = dict(task='goal', encoder=PIXELS, label=1, goal=5, alpha=0.9, beta=0.5)
  world, params = make(GENERATOR, episode_length=32, **settings)
  z, _ = goal_latent(world, 5)
  action = np.asarray(oracle_action(z))
  assert np.isclose(np.abs(action).max(), 1)

  def play(actions):
    vector = LatentManifoldVectorEnv(ENVS, world=(world, params))
    vector.reset(seed=0)
    return np.mean([vector.step(a)[1] for a in actions])

  random = play(actions_of(31))
  assert play(np.tile(action, (31, ENVS, 1))) > max(0.5, random + 0.3)
  picture = np.asarray(world.picture(params, z, jnp.int32(1)))
  by_picture = make(GENERATOR, **{**settings, 'goal': picture})[1]
  np.testing.assert_allclose(by_picture.task['features'], params.task['features'], atol=1e-6)


# ---- mistakes


@pytest.mark.parametrize(
  'settings, words',
  [
    (dict(task='gaol'), 'gaol'),
    (dict(alpha=2.0), 'environment.alpha=2.0'),
    (dict(beta=np.nan), 'environment.beta'),
    (dict(episode_length=1), 'environment.episode_length=1'),
    (dict(observations='sounds'), 'sounds'),
    (dict(label=3), 'label=3: expected -1 or a class below 3'),
    (dict(task='class'), 'without a head'),
    (dict(task='class', encoder=PIXELS, head=(np.zeros((3, 2)), np.zeros(2))), 'expected (10, cl'),
    (
      dict(task='class', encoder=PIXELS, head=(np.zeros((10, 2)), np.zeros(2)), target=2),
      'target=2',
    ),
    (dict(task='goal', encoder=PIXELS, goal=np.zeros((3, 3, 1), np.uint8)), 'a goal of uint8'),
    (dict(task='goal', encoder=PIXELS, k=3), 'has no k'),
    (dict(encoder='/nowhere'), "encoder='/nowhere' is neither 'random' nor the workdir"),
    (dict(start='never'), 'never'),
    (dict(alpha='x'), "environment.alpha='x': expected a number"),
    (dict(episode_length=2.5), 'environment.episode_length=2.5: expected a whole number'),
    (dict(label='cat'), "label='cat': expected -1 or a class below 3"),
    (dict(label=1.5), 'label=1.5: expected -1 or a class below 3'),
    (dict(task='goal', encoder=PIXELS, goal='cat'), 'expected a picture of uint8'),
    (dict(task='goal', encoder=PIXELS, goal=-1), 'goal=-1 is negative'),
    (dict(task='entropy', encoder=PIXELS, k=0), 'k=0 is not positive'),
    (dict(task='entropy', encoder=PIXELS, k=2.5), 'k=2.5: expected a whole number'),
    (dict(task='entropy', encoder=PIXELS, memory=-1), 'memory=-1 is not positive'),
    (dict(task='goal', encoder=PIXELS, threshold='high'), "threshold='high': expected a number"),
    (dict(crop=4), 'environment.crop=4 of pictures of 8x8'),
    (dict(latent_space='q'), "environment.latent_space='q' is unknown"),
    (dict(latent_space='w'), "environment.latent_space='w' of a LinearGenerator, which has no"),
    (dict(style_mixing=4), 'environment.style_mixing=4 of a LinearGenerator, which has no network'),
    (dict(goal=3), "goal with task='none': it is for task='goal'"),
    (
      dict(task='goal', encoder=PIXELS, target=1),
      "target with task='goal': it is for task='class'",
    ),
    (dict(task='class', encoder=PIXELS, head=np.zeros((10, 2))), 'give head=(kernel, bias)'),
    (dict(encoder=dataclasses.replace(PIXELS, size=9)), 'expected (1, 9), as their size is 9'),
    (
      dict(encoder=Features(lambda v, seen: seen @ v, np.zeros((3, 2)), 2)),
      'the features do not see pictures of (8, 8, 1)',
    ),
  ],
)
def test_what_cannot_be_is_one_line(settings, words):
  with pytest.raises(UserError) as caught:
    small(**settings)
  assert words in str(caught.value) and '\n' not in str(caught.value)


def test_an_encoder_in_the_home_folder(monkeypatch, tmp_path):
  monkeypatch.setenv('HOME', str(tmp_path))
  with pytest.raises(UserError, match=f'^{tmp_path}/config.json is missing'):
    small(encoder='~')


@pytest.mark.parametrize('generator', [None, 5])
def test_no_generator_is_one_line(generator):
  with pytest.raises(UserError, match='expected a PictureGenerator, or a path or name'):
    make(generator)


def test_a_config_plays_in_the_generator_as_its_environment_sees_it(monkeypatch, tmp_path):
  monkeypatch.setattr(config, 'load_generator', lambda path: GENERATOR)
  c = tiny_config()
  with c.unlocked():
    c.world = config.default_config()
  c.world.update(dict(task='none', observations='pixels'))
  whole, params = config.from_config(c, tmp_path)
  c.environment.crop = 1
  inner, _ = config.from_config(c, tmp_path)
  assert inner.image_shape == (6, 6, whole.image_shape[2])
  z, label = goal_latent(whole, 0)
  picture = whole.picture(params, z, label)
  np.testing.assert_array_equal(inner.picture(params, z, label), picture[1:-1, 1:-1])
  assert dataset.identity(inner) != dataset.identity(whole)


def test_numbers_may_be_numpys():
  plain = small(task='goal', encoder=PIXELS, goal=7, label=1, alpha=0.5)
  given = dict(goal=np.int64(7), label=np.int32(1), alpha=np.float32(0.5))
  found = small(task='goal', encoder=PIXELS, **given)
  jax.tree.map(np.testing.assert_array_equal, found[1].task, plain[1].task)
  assert make_task('entropy', k=np.int64(3)).k == 3
  assert LatentManifoldVectorEnv(np.int64(2), world=plain).num_envs == 2
  with pytest.raises(UserError, match=r'num_envs=2.0: expected a whole number'):
    LatentManifoldVectorEnv(2.0, world=plain)


def test_actions_end_at_the_bounds_behind_every_door():
  world, params = small()
  keys = jax.random.split(jax.random.key(0), ENVS)
  _, state = world.reset_all(keys, params)
  step = jax.jit(world.step_all)
  far, near = (step(keys, state, scale * actions_of(1)[0], params) for scale in (9, 1e9))
  edge = step(keys, state, np.clip(9 * actions_of(1)[0], -1, 1), params)
  np.testing.assert_array_equal(far[0], edge[0])
  assert (near[1].env.z <= np.abs(edge[1].env.z).max() + 1).all()


def test_rewards_of_another_shape_are_refused():
  column = lambda self, told, memory, features, began: (memory, features[:, :1])
  task = type('Column', (Away,), dict(reward=column))()
  world, params = small(task=task, encoder=PIXELS)
  keys = jax.random.split(jax.random.key(0), ENVS)
  _, state = world.reset_all(keys, params)
  with pytest.raises(UserError, match=r"task 'away': rewards of shape \(5, 1\) for 5 environments"):
    world.step_all(keys, state, actions_of(1)[0], params)


def test_who_stands_on_the_goal_sees_it_in_all_of_a_stack():
  """Its reward is then the largest there is, as without a stack."""
  world, params = small(task='goal', encoder=PIXELS30, stack=3, goal=5, label=1, alpha=0.0)
  z, label = goal_latent(world, 5)
  picture = world.picture(params, z, jnp.int32(1))
  seen = jnp.tile(picture[None], 3)
  features = world.features.apply((), seen)
  _, rewards = world.task.reward(params.task, (), features, jnp.zeros(1, bool))
  np.testing.assert_allclose(rewards, 1, rtol=1e-5)
  plain, params_of_one = small(task='goal', encoder=PIXELS, goal=5, label=1, alpha=0.0)
  keys = jax.random.split(jax.random.key(0), 256)
  mean = plain.reset_all(keys, params_of_one)[1].features.mean(0)
  np.testing.assert_allclose(params_of_one.task['center'], mean, rtol=1e-5)


def test_misuse_of_the_environments():
  vector = LatentManifoldVectorEnv(ENVS, world=small())
  with pytest.raises(UserError, match='call reset first'):
    vector.step(actions_of(1)[0])
  vector.reset(seed=0)
  for wrong in (np.zeros((ENVS, 5)), np.zeros(6), np.full((ENVS, 6), np.nan)):
    with pytest.raises(UserError, match='expected finite ones of shape'):
      vector.step(wrong)
  with pytest.raises(UserError, match='num_envs=0'):
    LatentManifoldVectorEnv(0, world=small())
  with pytest.raises(UserError, match='task, goal beside world=, which is made already'):
    LatentManifoldVectorEnv(2, world=small(), task='goal', goal=1)
  with pytest.raises(UserError, match='world is a LatentManifold: give .world, params.'):
    LatentManifoldVectorEnv(2, world=small()[0])
  one = LatentManifoldEnv(world=small())
  one.reset(seed=0)
  for action in actions_of(LENGTH - 1):
    *_, cut, _ = one.step(action[0])
  assert cut
  with pytest.raises(UserError, match='after the last frame of an episode: call reset'):
    one.step(actions_of(1)[0, 0])
  one.reset()
  one.step(actions_of(1)[0, 0])
  with pytest.raises(UserError, match='has no threshold|no settings'):
    make_task('none', k=1)
  with pytest.raises(UserError, match="'none' has no threshold"):
    make_task('none', threshold=1.0)


def test_spaces_without_gymnax():
  space = spaces.Box(0, 255, (2, 2, 1), jnp.uint8)
  sample = space.sample(jax.random.key(0))
  assert sample.dtype == jnp.uint8 and space.contains(sample)
  assert not spaces.Box(-1.0, 1.0, (2,)).contains(jnp.full(2, 1.5))
