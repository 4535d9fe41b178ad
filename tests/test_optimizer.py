"""The optimiser of SimSiam, against torch's SGD written out."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from palm_jax import simsiam
from palm_jax.base.errors import UserError
from palm_jax.optimizer import learning_rate, make_optimizer


@pytest.fixture(scope='module')
def tree():
  rng = np.random.default_rng(0)
  shapes = {
    'encoder': {'kernel': (3, 2), 'bias': (2,)},
    'projector': {'kernel': (2, 2)},
    'predictor': {'bias': (4,)},
  }

  def draw():
    return jax.tree.map(
      lambda s: rng.normal(size=s).astype(np.float32),
      shapes,
      is_leaf=lambda s: isinstance(s, tuple),
    )

  return draw(), [draw() for _ in range(3)]


def test_optimizer_is_torch_sgd(tree):
  params, gradients = tree
  optimizer = make_optimizer(simsiam.default_config(), total_updates=4, batch_size=512)
  update = jax.jit(optimizer.update)
  found, state = params, optimizer.init(params)
  expected = jax.tree.map(lambda x: x.astype(np.float64), params)
  momentum = jax.tree.map(np.zeros_like, expected)
  for t, gradient in enumerate(gradients):
    updates, state = update(gradient, state, found)
    found = optax.apply_updates(found, updates)
    momentum = jax.tree.map(lambda m, g, p: 0.9 * m + g + 5e-4 * p, momentum, gradient, expected)
    cosine_lr = 0.06 * 0.5 * (1 + np.cos(np.pi * t / 4))
    expected = {
      name: jax.tree.map(
        lambda p, m, lr=0.06 if name == 'predictor' else cosine_lr: p - lr * m,
        expected[name],
        momentum[name],
      )
      for name in expected
    }
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected
    )


def test_schedule_ends_at_zero_and_predictor_does_not(tree):
  params, (gradient, *_) = tree
  config = simsiam.default_config()
  config.warmup_updates = 3
  schedule = learning_rate(config, 13, 128)
  np.testing.assert_allclose(
    [schedule(t) for t in (0, 1, 3, 8, 13)], [0, 0.005, 0.015, 0.0075, 0], atol=1e-7
  )
  for fixed in (True, False):
    config.fix_predictor_lr = fixed
    optimizer = make_optimizer(config, 13, 128)
    state = optax.tree.set(optimizer.init(params), count=jnp.asarray(13))
    updates, _ = optimizer.update(gradient, state, params)
    assert not np.any(np.abs(updates['encoder']['kernel']) > 1e-8)
    expected = (
      -0.015 * (gradient['predictor']['bias'] + 5e-4 * params['predictor']['bias'])
      if fixed
      else np.zeros(4)
    )
    np.testing.assert_allclose(updates['predictor']['bias'], expected, rtol=1e-5, atol=1e-8)
  for warmup in (-1, 13):
    config.warmup_updates = warmup
    with pytest.raises(UserError, match=f'warmup_updates={warmup}'):
      make_optimizer(config, 13, 128)


def test_optimizer_state_survives_a_checkpoint(tree, tmp_path):
  params, (gradient, *_) = tree
  optimizer = make_optimizer(simsiam.default_config(), 4, 512)
  _, state = optimizer.update(gradient, optimizer.init(params), params)
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / 'state', state)
    checkpointer.wait_until_finished()
    restored = checkpointer.restore(tmp_path / 'state', jax.eval_shape(lambda: state))
  assert jax.tree.structure(restored) == jax.tree.structure(state)
  jax.tree.map(np.testing.assert_array_equal, restored, state)
  assert {x.dtype for x in jax.tree.leaves(state)} == {jnp.dtype('float32'), jnp.dtype('int32')}
