"""Counts of traced programs against hand counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from palm_jax.base import devices
from palm_jax.layers.convolution import conv
from palm_jax.speed import cost

zeros = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)


def count(f, *arguments):
  return cost.flops(jax.jit(f).trace(*arguments))


def test_products():
  assert count(jnp.matmul, zeros(3, 5), zeros(5, 7)) == 2 * 3 * 5 * 7
  assert (
    count(lambda a, b: jnp.einsum('bij,bjk->bik', a, b), zeros(4, 3, 5), zeros(4, 5, 7))
    == 4 * 2 * 3 * 5 * 7
  )
  assert count(lambda a: a * 2 + jnp.sin(a), zeros(100)) == 0


@pytest.mark.parametrize(
  'settings',
  [
    dict(padding='SAME'),
    dict(padding='VALID'),
    dict(padding='SAME', window_strides=(2, 2)),
    dict(padding=((2, 1), (0, 3)), rhs_dilation=(2, 1)),
    dict(padding=((1, 1), (1, 1)), lhs_dilation=(2, 2)),
    dict(padding='SAME', feature_group_count=2),
  ],
)
def test_convolutions(settings):
  """As many multiplications as ones in the sum: each output counts the pixels that it sees."""
  groups = settings.get('feature_group_count', 1)
  call = lambda x, kernel: jax.lax.conv_general_dilated(
    x,
    kernel,
    **dict(dict(window_strides=(1, 1), dimension_numbers=('NHWC', 'HWIO', 'NHWC')), **settings),
  )
  x, kernel = np.ones((2, 9, 7, 4), np.float32), np.ones((3, 5, 4 // groups, 6), np.float32)
  assert count(call, x, kernel) == 2 * int(np.asarray(call(x, kernel), np.float64).sum())


def test_gradients_cost_twice_as_much():
  x, kernel = zeros(2, 8, 8, 4), zeros(3, 3, 4, 6)
  square = lambda x, kernel: (conv(x, kernel) ** 2).sum()
  assert count(jax.grad(square, (0, 1)), x, kernel) == 3 * count(square, x, kernel) > 0


def test_gradients_of_grouped_convolutions():
  call = lambda x, k: (
    jax.lax.conv_general_dilated(
      x, k, (1, 1), 'VALID', dimension_numbers=('NHWC', 'HWIO', 'NHWC'), feature_group_count=2
    )
    ** 2
  ).sum()
  x, kernel = zeros(2, 8, 8, 4), zeros(3, 3, 2, 6)
  assert count(jax.grad(call, (0, 1)), x, kernel) == 3 * count(call, x, kernel) > 0


def test_loops_branches_and_devices():
  step = lambda x, w: (x @ w, None)
  loop = lambda x, w: jax.lax.scan(lambda x, _: step(x, w), x, length=11)[0]
  once = 2 * 8 * 4 * 4
  assert count(loop, zeros(8, 4), zeros(4, 4)) == 11 * once
  branch = lambda x, w: jax.lax.cond(x.sum() > 0, lambda: loop(x, w), lambda: x @ w)
  assert count(branch, zeros(8, 4), zeros(4, 4)) == 11 * once
  sharded = jax.shard_map(
    jax.checkpoint(loop), mesh=devices.make_mesh(4), in_specs=(P('data'), P()), out_specs=P('data')
  )
  assert count(sharded, zeros(8, 4), zeros(4, 4)) == 11 * once // 4


def test_bytes():
  tree = dict(a=zeros(3, 5), b=jax.eval_shape(lambda: jax.random.key(0)), c=np.zeros(7, np.uint8))
  assert cost.nbytes(tree) == 60 + 8 + 7
  # A product keeps both factors.
  assert cost.residual_bytes(lambda x: jnp.tanh(x) * x, zeros(100)) >= 2 * 400
  assert cost.residual_bytes(lambda x: 2 * x, zeros(100)) <= 16
