import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from palm_jax import environment as env_lib
from palm_jax.layers.pixels import to_uint8

LENGTH, ENVS, DIM, CLASSES = 5, 4096, 8, 3
PAPER = env_lib.Dynamics(np.float32(0.5), np.float32(0.95))


def make_step(alpha, beta):
  dynamics = env_lib.Dynamics(jnp.float32(alpha), jnp.float32(beta))
  ids = jnp.arange(ENVS)

  def run(state, action, key):
    return step(state, action, key, ids, dynamics)

  return run


@jax.jit
def step(state, action, key, ids, dynamics):
  return env_lib.step(state, action, key, ids, dynamics, LENGTH, CLASSES)


@pytest.fixture(scope='module')
def start():
  ids = jnp.arange(ENVS)
  return env_lib.reset(jax.random.key(0), ids, jnp.zeros(ENVS, jnp.int32), DIM, CLASSES, PAPER)


def test_first_latent_is_standard_normal_and_labels_uniform(start):
  assert stats.kstest(np.asarray(start.z).ravel(), 'norm').pvalue > 1e-3
  counts = np.bincount(np.asarray(start.label), minlength=CLASSES)
  assert counts.size == CLASSES and stats.chisquare(counts).pvalue > 1e-3


def test_pictures_of_an_episode_are_seen_one_after_another():
  seen = jnp.zeros((2, 1, 1, 3), jnp.uint8)
  for number, step in zip(range(1, 6), [(0, 2), (1, 3), (2, 0), (3, 1), (0, 2)], strict=True):
    seen = env_lib.see(seen, jnp.full((2, 1, 1, 1), number, jnp.uint8), jnp.array(step))
    expected = {
      3: [[1, 2, 3], [0, 0, 3]],
      4: [[2, 3, 4], [0, 3, 4]],
      5: [[0, 0, 5], [3, 4, 5]],
    }.get(number)
    if expected:
      np.testing.assert_array_equal(seen[:, 0, 0], expected)


def test_dynamics_follow_the_two_equations(start):
  """alpha = 1 takes the noise out: z <- beta z + (1 - beta) a exactly; alpha = 0 takes the action
  out."""
  action = jnp.full((ENVS, DIM), 0.3)
  nxt = make_step(1.0, 0.75)(start, action, jax.random.key(1))
  np.testing.assert_allclose(nxt.z, 0.75 * start.z + 0.25 * 0.3, rtol=1e-6, atol=1e-6)
  other = make_step(0.0, 0.75)(start, -action, jax.random.key(1))
  same = make_step(0.0, 0.75)(start, action, jax.random.key(1))
  np.testing.assert_array_equal(other.z, same.z)
  eps = (np.asarray(same.z) - 0.75 * np.asarray(start.z)) / 0.25
  assert stats.kstest(eps.ravel(), 'norm').pvalue > 1e-3


def test_episode_is_cut_and_label_changes_only_there(start):
  run, state, labels, steps, zs = make_step(0.5, 0.95), start, [], [], []
  for t in range(2 * LENGTH + 1):
    (
      labels.append(np.asarray(state.label)),
      steps.append(np.asarray(state.step)),
      zs.append(np.asarray(state.z)),
    )
    state = run(state, jnp.zeros((ENVS, DIM)), jax.random.key(10 + t))
  np.testing.assert_array_equal(np.stack(steps)[:, 0], np.arange(2 * LENGTH + 1) % LENGTH)
  for t in range(1, 2 * LENGTH + 1):
    if t % LENGTH:
      np.testing.assert_array_equal(labels[t], labels[t - 1])
      assert np.corrcoef(zs[t].ravel(), zs[t - 1].ravel())[0, 1] > 0.9
    else:
      assert 0.55 < np.mean(labels[t] != labels[t - 1]) < 0.78  # 2/3 of fresh labels differ
      assert abs(np.corrcoef(zs[t].ravel(), zs[t - 1].ravel())[0, 1]) < 0.05


def test_an_environment_does_not_depend_on_its_neighbours(start):
  ids = jnp.array([5, 77])
  part = env_lib.reset(jax.random.key(0), ids, jnp.zeros(2, jnp.int32), DIM, CLASSES, PAPER)
  np.testing.assert_array_equal(part.z, start.z[ids])
  dynamics = env_lib.Dynamics(jnp.float32(0.5), jnp.float32(0.95))
  a = step(part, jnp.zeros((2, DIM)), jax.random.key(2), ids, dynamics)
  b = make_step(0.5, 0.95)(start, jnp.zeros((ENVS, DIM)), jax.random.key(2))
  np.testing.assert_allclose(
    a.z, b.z[ids], rtol=1e-6
  )  # vector and scalar code may fuse differently


def test_alpha_and_beta_do_not_recompile(start):
  size = step._cache_size()
  for alpha, beta in ((0.1, 0.2), (0.9, 0.3)):
    make_step(alpha, beta)(start, jnp.zeros((ENVS, DIM)), jax.random.key(0))
  assert step._cache_size() == max(size, 1)


def test_unconditional_generator_has_one_label():
  state = env_lib.reset(jax.random.key(0), jnp.arange(16), jnp.zeros(16, jnp.int32), DIM, 0, PAPER)
  assert not np.any(state.label)


def test_staggered_steps_spread_the_ends():
  steps = env_lib.staggered_steps(jnp.arange(16), 16, 64)
  np.testing.assert_array_equal(steps, np.arange(16) * 4)
  many, length = 3000, 10**6  # of which the product has more than 31 bits
  steps = env_lib.staggered_steps(jnp.arange(many - 5, many), many, length)
  np.testing.assert_array_equal(steps, np.arange(many - 5, many, dtype=np.int64) * length // many)


def test_quantisation_is_the_original_tools():
  x = np.linspace(-1.3, 1.3, 1001, dtype=np.float32)
  want = np.clip(x * np.float32(127.5) + 128, 0, 255).astype(np.uint8)
  np.testing.assert_array_equal(to_uint8(jnp.asarray(x)), want)
  assert to_uint8(jnp.array([-1.0, 0.0, 1.0])).tolist() == [0, 128, 255]


@pytest.mark.parametrize('kind', ['ema', 'ou'])
def test_a_stationary_start_is_as_wide_as_random_actions_keep_it(kind):
  """The first latents of episodes, at reset and after a cut, against those of a long walk."""
  dynamics = env_lib.Dynamics(jnp.float32(0.7), jnp.float32(0.9), kind, 'stationary')
  ids = jnp.arange(ENVS)
  state = env_lib.reset(jax.random.key(0), ids, 0 * ids, DIM, CLASSES, dynamics)
  first = float(jnp.std(state.z))

  @jax.jit
  def walk(state):
    def one(state, t):
      keys = env_lib.env_keys(jax.random.fold_in(jax.random.key(1), t), ids)
      action = env_lib.random_actions(keys, DIM, jnp.float32)
      key = jax.random.fold_in(jax.random.key(2), t)
      return env_lib.step(state, action, key, ids, dynamics, 70, CLASSES), jnp.std(state.z)

    return jax.lax.scan(one, state, jnp.arange(75))[1]

  np.testing.assert_allclose(walk(state), first, rtol=0.03)
  assert first != 1


@pytest.mark.parametrize('beta, kind', [(0.5, 'ema'), (0.9, 'ou'), (0.75, 'momentum')])
def test_the_mean_direction_of_a_constant_policy(beta, kind):
  start = 'latent' if kind == 'momentum' else 'stationary'  # forgotten after 60 steps
  dynamics = env_lib.Dynamics(jnp.float32(0.8), jnp.float32(beta), kind, start)
  ids, dim, mean, std = jnp.arange(512), 32, 0.2, 0.3
  state = env_lib.reset(jax.random.key(0), ids, 0 * ids, dim, 0, dynamics)

  @jax.jit
  def walk(state):
    def one(state, t):
      key = jax.random.fold_in(jax.random.key(2), t)
      action = mean + std * jax.random.normal(jax.random.fold_in(key, 1), state.z.shape)
      return env_lib.step(state, action, key, ids, dynamics, 1000, 0), ()

    return jax.lax.scan(one, state, jnp.arange(60))[0].z

  z = np.asarray(walk(state), np.float64)
  unit = z / np.linalg.norm(z, axis=1, keepdims=True)
  said = env_lib.mean_direction(dynamics, mean, std**2)
  np.testing.assert_allclose(said, np.linalg.norm(unit.mean(0)), atol=0.02)


@pytest.mark.parametrize('kind', env_lib.DYNAMICS)
def test_other_dynamics_are_their_filters(kind):
  """A path of several steps against the same recursion in numpy; with beta 0 all go where they are
  told."""
  beta, ids = 0.6, jnp.arange(3)
  for beta in (0.6, 0.0):
    dynamics = env_lib.Dynamics(jnp.float32(1.0), jnp.float32(beta), kind)
    state = env_lib.reset(jax.random.key(0), ids, jnp.zeros(3, jnp.int32), DIM, CLASSES, dynamics)
    z, v = np.asarray(state.z, np.float64), 0.0
    for t in range(LENGTH - 1):
      action = np.random.default_rng(t).uniform(-1, 1, (3, DIM)).astype(np.float32)
      state = step(state, jnp.asarray(action), jax.random.key(t), ids, dynamics)
      if kind == 'momentum':
        v = beta * v + (1 - beta) * (action - z)
        z = z + v
      else:
        z = beta * z + (1 - beta if kind == 'ema' else np.sqrt(1 - beta**2)) * action
      np.testing.assert_allclose(state.z, z, atol=1e-5)
      if beta == 0:
        np.testing.assert_allclose(state.z, action, atol=1e-6)
    state = step(state, jnp.asarray(action), jax.random.key(9), ids, dynamics)  # the episode ends
    assert not jax.tree.leaves(state.velocity) or not np.any(state.velocity)


def test_an_ornstein_uhlenbeck_world_keeps_normal_latents_normal(start):
  """Without actions z' is normal noise: its path stays at unit variance and forgets by beta a step;
  T_ema's shrinks."""
  spread = {}
  for kind in ('ou', 'ema'):
    state, ids = start, jnp.arange(ENVS)
    for t in range(LENGTH - 1):
      last, state = (
        state,
        step(
          state,
          jnp.zeros((ENVS, DIM)),
          jax.random.key(100 + t),
          ids,
          env_lib.Dynamics(jnp.float32(0.0), jnp.float32(0.8), kind),
        ),
      )
    spread[kind] = np.std(state.z)
    if kind == 'ou':
      np.testing.assert_allclose(np.corrcoef(state.z.ravel(), last.z.ravel())[0, 1], 0.8, atol=0.01)
  np.testing.assert_allclose(spread['ou'], 1, atol=0.01)
  rest = 0.8 ** (2 * (LENGTH - 1))
  np.testing.assert_allclose(spread['ema'], np.sqrt(rest + (1 - rest) * 0.2 / 1.8), atol=0.01)
