import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from palm_jax.atari import dqn, drq
from palm_jax.base.checkpoints import Checkpoints
from palm_jax.base.errors import UserError
from palm_jax.encoder import NatureCNN, preprocess
from tests.test_atari_dqn import SHAPE, assert_equal, batches, new_agent, q_values


@pytest.fixture(scope='module')
def augmented():
  """1,620 stacks of one random picture in which no pixel value repeats near another, and their
  augmented copies."""
  generator = np.random.default_rng(0)
  stack = generator.integers(50, 201, (12, 12, 4)).astype(np.uint8)
  keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0), i))(jnp.arange(1620))
  return stack, np.asarray(jax.jit(drq.augment)(keys, np.tile(stack, (1620, 1, 1, 1))), np.float64)


def test_each_stack_is_one_of_81_shifts_times_one_factor(augmented):
  stack, out = augmented
  padded = np.pad(stack, ((4, 4), (4, 4), (0, 0)), mode='edge').astype(np.float64)
  crops = np.stack(
    [padded[top : top + 12, left : left + 12] for top in range(9) for left in range(9)]
  ).reshape(81, -1)
  pixels = (out.reshape(len(out), -1) + 1) / 2 * 255
  factors = pixels @ crops.T / (crops**2).sum(1)  # (N, 81), least squares
  errors = (pixels**2).sum(1)[:, None] - factors**2 * (crops**2).sum(1)
  chosen = errors.argmin(1)
  factor = factors[np.arange(len(out)), chosen]
  np.testing.assert_allclose(
    pixels, factor[:, None] * crops[chosen], atol=1e-2
  )  # all four frames alike
  # Every shift is reached with the same odds; dopamine's randint(0, 8) never reaches the last.
  assert scipy.stats.chisquare(np.bincount(chosen, minlength=81)).pvalue > 1e-3
  noise = (factor - 1) / 0.05
  assert noise.min() == pytest.approx(-2, abs=1e-3) and noise.max() == pytest.approx(2, abs=1e-3)
  inside = noise[np.abs(noise) < 1.999]
  assert 1 - len(inside) / len(noise) == pytest.approx(0.0455, abs=0.02)
  assert scipy.stats.kstest(inside, scipy.stats.truncnorm(-2, 2).cdf).pvalue > 1e-3
  assert (
    abs(np.corrcoef(chosen // 9, chosen % 9)[0, 1]) < 0.1
    and abs(np.corrcoef(chosen, noise)[0, 1]) < 0.1
  )


@pytest.fixture(scope='module')
def updated():
  """(config, agent before, agent after, metrics, batches, keys of each augmentation) of one update
  at SGI's learning rates."""
  config, seen = drq.default_config(), []
  config.update(drq.SGI)
  config.update(dict(features=8, adam_eps=1e-30))
  agent = new_agent(config)

  def spy(keys, stacks):
    jax.debug.callback(lambda keys: seen.append(np.asarray(keys)), jax.random.key_data(keys))
    return preprocess(stacks)

  after, metrics = jax.jit(lambda agent, b: dqn.update(agent, b, jax.random.key(1), config, spy))(
    agent, batches(1)
  )
  jax.effects_barrier()
  return config, agent, after, metrics, batches(1), seen


def test_s_and_its_successor_are_augmented_independently(updated):
  *_, one, seen = updated
  assert len(seen) == 2 and len(np.unique(np.concatenate(seen), axis=0)) == 2 * len(one.actions[0])


def test_the_network_is_its_own_target(updated):
  config, agent, _, metrics, one, _ = updated
  assert agent.target is None
  value = q_values(agent.params, one.next_stacks[0], config).max(1)
  assert metrics['target_q'] == pytest.approx(
    float(np.mean(one.returns[0] + one.discounts[0] * value)), rel=1e-5
  )


@pytest.fixture(scope='module')
def pretrained(tmp_path_factory):
  """(workdir with a Nature CNN's checkpoint, its variables)."""
  workdir = tmp_path_factory.mktemp('pretrained')
  variables = jax.jit(
    lambda: NatureCNN(8).init(jax.random.key(5), jnp.zeros((1, *SHAPE)), train=False)
  )()
  with Checkpoints(workdir / 'pretrain' / 'checkpoints') as checkpoints:
    checkpoints.save(3, {'encoder': variables}, {})
  (workdir / 'config.json').write_text(json.dumps(dict(encoder=dict(name='nature'))))
  return workdir, variables


def test_the_trunk_is_transferred_and_all_else_is_fresh(pretrained):
  workdir, variables = pretrained
  trunk, step = drq.load_trunk(workdir)
  config = drq.default_config()
  config.features = 8  # the dense layer would fit, and is left out all the same
  scratch = new_agent(config).params
  params = new_agent(config, trunk).params
  assert step == 3 and set(trunk) == {'conv1', 'conv2', 'conv3'}
  assert_equal(
    {name: params['encoder'][name] for name in trunk},
    {name: variables['params'][name] for name in trunk},
  )
  assert_equal(
    {**params, 'encoder': params['encoder']['dense']},
    {**scratch, 'encoder': scratch['encoder']['dense']},
  )
  for name in trunk:
    assert np.any(scratch['encoder'][name]['kernel'] != params['encoder'][name]['kernel'])


def test_learning_rates_by_group(updated):
  _, agent, new, *_ = updated
  largest = lambda a, b: max(
    jax.tree.leaves(
      jax.tree.map(lambda x, y: float(np.abs(np.float64(x) - np.float64(y)).max()), a, b)
    )
  )
  encoder, before = new.params['encoder'], agent.params['encoder']
  # Adam's first step is the learning rate wherever there is a gradient.
  for name in dqn.TRUNK:
    assert largest(encoder[name], before[name]) == pytest.approx(1e-6, rel=0.05)
  assert largest(encoder['dense'], before['dense']) == pytest.approx(3e-5, rel=0.01)
  for name in ('value', 'advantage'):
    assert largest(new.params[name], agent.params[name]) == pytest.approx(1e-4, rel=0.01)


def test_presets_differ_in_what_their_names_say():
  base = drq.default_config().to_dict()
  differ = lambda preset: {k: v for k, v in preset.items() if base[k] != v}
  assert differ(drq.EPSILON) == dict(epsilon=0.01, eval_epsilon=0.001)
  assert differ(drq.SGI) == dict(trunk_scale=0.01, hidden_scale=0.3)
  assert [
    dqn.epsilon_at(step, drq.default_config()) for step in (1599, 1600, 4100, 6600)
  ] == pytest.approx([1, 1, 0.55, 0.1])


@pytest.mark.parametrize(
  'config, shape, message',
  [
    (dict(encoder=dict(name='resnet18')), SHAPE, "is 'resnet18', expected 'nature'"),
    (
      dict(encoder=dict(name='nature')),
      (36, 36, 3),
      r'takes pictures of 3 channel\(s\), expected 4',
    ),
  ],
)
def test_other_encoders_are_refused(tmp_path, config, shape, message):
  variables = jax.jit(
    lambda: NatureCNN(8).init(jax.random.key(5), jnp.zeros((1, *shape)), train=False)
  )()
  with Checkpoints(tmp_path / 'pretrain' / 'checkpoints') as checkpoints:
    checkpoints.save(3, {'encoder': variables}, {})
  (tmp_path / 'config.json').write_text(json.dumps(config))
  with pytest.raises(UserError, match=message):
    drq.load_trunk(tmp_path)
