"""Agents in the latent world, other people's and ours. Each test needs its library and skips
without it.

python -m pip install stable-baselines3 -e '.[gym,test]'
python -m pytest -m slow tests/test_clients.py
"""

import json

import jax
import numpy as np
import pytest

from configs.offline import get_config as offline_config
from palm_jax.offline import behaviours, records
from palm_jax.offline.methods import act_sac
from palm_jax.world import goal_latent, make
from palm_jax.world.gym import LatentManifoldVectorEnv
from palm_jax.world.sb3 import make_vec_env
from palm_jax.world.tasks import oracle_action

pytestmark = pytest.mark.slow
STEPS = 30_000
GOAL = dict(
  generator='cifar10-small',
  task='goal',
  goal=0,
  label=1,  # else the oracle's latent is drawn in other classes, too
  observations='features',
  alpha=0.95,
  beta=0.75,
  start='stationary',
  episode_length=64,
)


def mean_return(policy, episodes=32, seed=1 << 22):
  """Of one episode in each of so many environments; policy: observations (E, F) -> (E, A)."""
  envs = LatentManifoldVectorEnv(episodes, world=make(**GOAL))
  seen, _ = envs.reset(seed=seed)
  total = np.zeros(episodes)
  for _ in range(GOAL['episode_length'] - 1):
    seen, rewards, *_ = envs.step(policy(seen))
    total += rewards
  return float(total.mean())


def measures():
  """Returns of random actions and of the oracle that knows the goal's latent."""
  env, _ = make(**GOAL)
  z, _ = goal_latent(env, GOAL['goal'])
  best = np.asarray(oracle_action(z))
  generator = np.random.default_rng(0)
  at_random = mean_return(lambda seen: generator.uniform(-1, 1, (len(seen), env.num_actions)))
  return at_random, mean_return(lambda seen: np.broadcast_to(best, (len(seen), len(best))))


def score(capsys, name, act):
  """Mean return of act: (E, F) -> (E, A), 0 that of random actions and 1 that of the oracle."""
  at_random, oracle = measures()
  learned = mean_return(act)
  found = (learned - at_random) / (oracle - at_random)
  with capsys.disabled():
    print(
      json.dumps(dict(agent=name, random=at_random, oracle=oracle, learned=learned, score=found))
    )
  return found


@pytest.mark.parametrize('name', ['SAC', 'PPO'])
def test_stable_baselines_learns_to_reach_a_goal(name, capsys):
  """SAC has at least half of the oracle's return, counted from that of random actions."""
  agents = pytest.importorskip('stable_baselines3')
  # Torch's threads and XLA's on the same cores wait for each other.
  pytest.importorskip('torch').set_num_threads(1)
  count = 8 if name == 'SAC' else 16
  settings = dict(
    SAC=dict(gamma=0.9, learning_rate=1e-3, gradient_steps=8, ent_coef='auto_0.01'),
    PPO=dict(gamma=0.9, n_steps=63, batch_size=252),
  )[name]
  envs = make_vec_env(count, world=make(**GOAL))
  model = getattr(agents, name)('MlpPolicy', envs, seed=0, device='cpu', **settings)
  model.learn(STEPS if name == 'SAC' else 2 * STEPS)
  found = score(capsys, name, lambda seen: model.predict(seen, deterministic=True)[0])
  assert found > (0.5 if name == 'SAC' else 0.0)


def test_stable_baselines_has_an_episodes_last_picture_and_return():
  checks = pytest.importorskip('stable_baselines3.common.vec_env')
  envs = checks.VecMonitor(make_vec_env(3, world=make(**GOAL | dict(episode_length=5))))
  plain = LatentManifoldVectorEnv(3, world=make(**GOAL | dict(episode_length=5)))
  for _ in range(2):  # a seed is for one reset
    envs.seed(7)
    seen, (other, _) = envs.reset(), plain.reset(seed=7)
    np.testing.assert_array_equal(seen, other)
    actions = np.random.default_rng(0).uniform(-1, 1, (12, 3, *envs.action_space.shape))
    total = 0
    for t in range(4):
      seen, rewards, done, infos = envs.step(actions[t])
      other, expected, *_ = plain.step(actions[t])
      np.testing.assert_array_equal(rewards, expected)
      total += expected
      assert done.all() == (t == 3)
    for info, last, sums in zip(infos, other, total, strict=True):
      np.testing.assert_array_equal(info['terminal_observation'], last)
      assert info['TimeLimit.truncated'] and info['episode']['l'] == 4
      assert info['episode']['r'] == pytest.approx(float(sums), abs=1e-5)
    other, *_ = plain.step(actions[3])
    np.testing.assert_array_equal(seen, other)


def test_our_sac_learns_to_reach_it(tmp_path, capsys):
  """The best policy of as many steps, chosen by episodes that do not score it."""
  config = offline_config('laptop')
  config.offline.behaviour_steps = STEPS
  envs = lambda count: LatentManifoldVectorEnv(count, world=make(**GOAL))
  player, judge = records.Player(envs(8)), records.Player(envs(10))
  trained = behaviours.train(config, tmp_path, player, judge).states['trained']
  _, actions = behaviours.sizes(player.envs)
  act = jax.jit(lambda seen: act_sac(trained, seen, None, actions, config))
  assert score(capsys, 'palm_jax SAC', act) > 0.5
