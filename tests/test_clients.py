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


class Envs:
  """The batch of environments as Stable-Baselines3's VecEnv, which begins episodes at once."""

  def __new__(cls, count):
    base = pytest.importorskip('stable_baselines3.common.vec_env').VecEnv

    class Batch(base):
      def __init__(self):
        self.envs = LatentManifoldVectorEnv(count, world=make(**GOAL))
        super().__init__(count, self.envs.single_observation_space, self.envs.single_action_space)

      def reset(self):
        return self.envs.reset(seed=self._seeds[0] or 0)[0]

      def step_async(self, actions):
        self.actions = actions

      def step_wait(self):
        seen, rewards, _, cut, _ = self.envs.step(self.actions)
        infos = [{} for _ in range(count)]
        if cut.any():  # all at once: the step that begins the next episodes
          last, (seen, *_) = seen, self.envs.step(self.actions)
          for info, observation in zip(infos, last, strict=True):
            info['terminal_observation'] = observation
            info['TimeLimit.truncated'] = True
        return seen, rewards, cut, infos

      def close(self):
        self.envs.close()

      def get_attr(self, name, indices=None):
        return [getattr(self.envs, name)] * count

      def set_attr(self, name, value, indices=None):
        setattr(self.envs, name, value)

      def env_method(self, name, *args, indices=None, **kwargs):
        return [getattr(self.envs, name)(*args, **kwargs)] * count

      def env_is_wrapped(self, wrapper_class, indices=None):
        return [False] * count

    return Batch()


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
  model = getattr(agents, name)('MlpPolicy', Envs(count), seed=0, device='cpu', **settings)
  model.learn(STEPS if name == 'SAC' else 2 * STEPS)
  found = score(capsys, name, lambda seen: model.predict(seen, deterministic=True)[0])
  assert found > (0.5 if name == 'SAC' else 0.0)


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
