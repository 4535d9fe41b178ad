"""Against flax's BatchNorm, in float64."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from palm_jax.layers.normalization import BatchNorm, channel_sums
from palm_jax.speed import cost


def variables_of(channels, dtype):
  draw = np.random.default_rng(0)
  pick = lambda: jnp.asarray(draw.uniform(0.5, 2, channels), dtype)
  return dict(params=dict(scale=pick(), bias=pick()), batch_stats=dict(mean=pick(), var=pick()))


def both(train, **settings):
  return BatchNorm(not train, **settings), nn.BatchNorm(
    not train, momentum=0.9, epsilon=1e-5, **settings
  )


def outcomes(module, variables, x, w, train):
  """(y, statistics after it, gradients, gradients of the gradients' sum of squares)."""

  def loss(params, x):
    y, changed = module.apply({**variables, 'params': params}, x, mutable=['batch_stats'])
    return jnp.sum(w * jnp.tanh(y)), (y, changed)

  first = jax.grad(loss, (0, 1), has_aux=True)
  second = jax.grad(lambda *a: sum(jnp.sum(g**2) for g in jax.tree.leaves(first(*a)[0])), (0, 1))
  return jax.jit(lambda params, x: (first(params, x), second(params, x)))(variables['params'], x)


@pytest.mark.parametrize('train', [False, True])
@pytest.mark.parametrize('shape', [(6, 4, 5, 3), (16, 4, 5, 3), (8, 3)])
def test_values_statistics_first_and_second_gradients_are_flaxes(train, shape):
  with jax.enable_x64(True):
    x, w = (jnp.asarray(np.random.default_rng(i).normal(1, 2, shape)) for i in range(2))
    found, expected = (
      outcomes(m, variables_of(shape[-1], jnp.float64), x, w, train) for m in both(train)
    )
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9), found, expected
    )


def test_a_new_one_has_flaxes_variables():
  for x64 in (False, True):
    with jax.enable_x64(x64):
      ours, flaxes = (
        m.init(jax.random.key(0), jnp.ones((4, 2, 2, 3))) for m in both(True, axis_name='data')
      )
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), ours, flaxes)
  zero = BatchNorm(False, scale_init=nn.initializers.zeros).init(
    jax.random.key(0), jnp.ones((4, 3))
  )
  assert not zero['params']['scale'].any()


@pytest.mark.parametrize('train', [False, True])
def test_bfloat16_input_has_float32_statistics(train):
  x = jnp.asarray(np.random.default_rng(0).normal(3, 1, (64, 8, 8, 4)), jnp.bfloat16)
  (y, changed), (expected, expected_changed) = (
    m.apply(variables_of(4, jnp.float32), x, mutable=['batch_stats'])
    for m in both(train, dtype=jnp.bfloat16)
  )
  assert y.dtype == expected.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.float32(y), np.float32(expected), atol=0.02)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), changed, expected_changed)
  gradient = jax.grad(
    lambda x: (
      BatchNorm(not train, dtype=jnp.bfloat16)
      .apply(variables_of(4, jnp.float32), x, mutable=['batch_stats'])[0]
      .astype(jnp.float32)
      .var()
    )
  )(x)
  assert gradient.dtype == jnp.bfloat16


def test_bfloat16_variables_have_bfloat16_gradients():
  variables = variables_of(4, jnp.bfloat16)
  gradients = jax.grad(
    lambda v: BatchNorm(True).apply(v, jnp.ones((16, 4), jnp.bfloat16)).astype(jnp.float32).var()
  )(variables)
  assert {g.dtype for g in jax.tree.leaves(gradients)} == {jnp.dtype(jnp.bfloat16)}


def test_devices_share_statistics_and_gradients():
  mesh = jax.sharding.Mesh(jax.devices()[:4], ('data',), axis_types=(AxisType.Auto,))
  with jax.enable_x64(True):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 3, 3, 2)))  # 16 a device: they loop
    variables = variables_of(2, jnp.float64)

    def loss(module, params, x):
      y, changed = module.apply({**variables, 'params': params}, x, mutable=['batch_stats'])
      return jnp.mean(jnp.tanh(y) ** 2), changed

    def on_devices(params, x):
      mean = lambda params, x: lax.pmean(
        loss(BatchNorm(False, axis_name='data'), params, x)[0], 'data'
      )
      return jax.grad(mean, (0, 1))(params, x)

    params, to_x = jax.jit(
      jax.shard_map(on_devices, mesh=mesh, in_specs=(P(), P('data')), out_specs=(P(), P('data')))
    )(variables['params'], x)
    expected = jax.grad(
      functools.partial(loss, nn.BatchNorm(False, momentum=0.9)), (0, 1), has_aux=True
    )(variables['params'], x)[0]
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), (params, to_x), expected
    )


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_backward_keeps_no_more_than_flaxes(dtype):
  x, variables = jnp.ones((8, 16, 16, 32), dtype), variables_of(32, jnp.float32)

  def kept(module):
    f = lambda params, x: module.apply({**variables, 'params': params}, x, mutable=['batch_stats'])[
      0
    ]
    return cost.residual_bytes(f, variables['params'], x)

  ours, flaxes = map(kept, both(True, dtype=dtype))
  assert 0 < ours <= flaxes + 12 * 32 * 4
  if jax.default_backend() == 'cpu':
    assert ours <= x.nbytes + 12 * 32 * 4  # x once, and a few vectors


@pytest.mark.parametrize(
  'shape, loops',
  [
    ((64, 16, 16, 8), True),
    ((24, 64, 64, 8), True),
    ((16, 256, 256, 8), True),
    ((16, 8), True),
    ((8, 4, 4, 8), False),
    ((7, 3, 3, 8), False),
    ((0, 3, 3, 8), False),
  ],
)
def test_channel_sums_are_accurate(shape, loops):
  x, y = np.random.default_rng(0).normal(100, 1, (2, *shape)).astype(np.float32)
  sums = lambda x, y: channel_sums(lambda x, y: (x, x * y), x, y)
  wide = np.stack([x.astype(np.float64), x.astype(np.float64) * y])
  np.testing.assert_allclose(
    jax.jit(sums)(x, y), wide.sum(tuple(range(1, wide.ndim - 1))), rtol=1e-6
  )
  assert ('scan' in str(jax.make_jaxpr(sums)(x, y))) == (loops and jax.default_backend() == 'cpu')


def test_channel_sums_of_bfloat16_are_float32():
  ones = jnp.ones((4096, 16, 16, 2), jnp.bfloat16)
  np.testing.assert_array_equal(
    channel_sums(lambda x: (x,), ones), np.full((1, 2), 4096 * 16 * 16, np.float32)
  )
