"""Against XLA's own convolutions and their gradients, in float64."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from palm_jax import encoder
from palm_jax.layers import convolution
from palm_jax.speed import cost


def xla(x, kernel, stride, padding):
  return lax.conv_general_dilated(
    x, kernel, (stride, stride), padding, dimension_numbers=('NHWC', 'HWIO', 'NHWC')
  )


CASES = {
  'same 3x3': (lambda x, k: convolution.conv(x, k), (3, 3), 1, ((1, 1), (1, 1)), (5, 6)),
  'valid 2x1': (lambda x, k: convolution.conv(x, k, 'VALID'), (2, 1), 1, ((0, 0), (0, 0)), (5, 6)),
  'uneven padding': (
    lambda x, k: convolution.conv(x, k, ((0, 2), (1, 0))),
    (3, 2),
    1,
    ((0, 2), (1, 0)),
    (5, 6),
  ),
  '1x1': (lambda x, k: convolution.conv(x, k), (1, 1), 1, ((0, 0), (0, 0)), (5, 6)),
  'pictures below the kernel': (
    lambda x, k: convolution.conv(x, k),
    (3, 3),
    1,
    ((1, 1), (1, 1)),
    (2, 2),
  ),
  'one pixel, uneven': (
    lambda x, k: convolution.conv(x, k, ((3, 1), (0, 2))),
    (3, 2),
    1,
    ((3, 1), (0, 2)),
    (1, 2),
  ),
  'a gradient below the kernel': (
    lambda x, k: convolution.conv(x, k, 'VALID'),
    (3, 3),
    1,
    ((0, 0), (0, 0)),
    (4, 4),
  ),
  **{
    name: (
      functools.partial(convolution.strided_conv, stride=stride, padding=padding),
      size,
      stride,
      ((0, 0), (0, 0)) if padding == 'VALID' else padding,
      shape,
    )
    for name, size, stride, padding, shape in (
      ('stride 2, even', (3, 3), 2, ((1, 1), (1, 1)), (6, 8)),
      ('stride 2, odd', (3, 3), 2, ((1, 1), (1, 1)), (5, 7)),
      ('stride 2, 1x1', (1, 1), 2, 'VALID', (5, 6)),
      ('stride 2, 4x4', (4, 4), 2, 'VALID', (11, 10)),
      ('stride 4, 8x8', (8, 8), 4, 'VALID', (21, 22)),
      ('stride 3, 2x5', (2, 5), 3, ((0, 2), (1, 0)), (8, 9)),
    )
  },
}


CHUNKED = ('same 3x3', 32), ('uneven padding', 24), ('stride 2, odd', 32), ('stride 4, 8x8', 48)


@pytest.mark.parametrize(('name', 'batch'), [*((name, 3) for name in CASES), *CHUNKED])
def test_values_first_and_second_gradients_are_xlas(name, batch):
  ours, size, stride, padding, shape = CASES[name]
  with jax.enable_x64(True):
    x, kernel, w = (
      jnp.asarray(np.random.default_rng(i).normal(size=s))
      for i, s in enumerate([(batch, *shape, 4), (*size, 4, 5), (*size, 4, 5)])
    )
    if jax.default_backend() == 'cpu':
      in_chunks = 'scan' in str(jax.make_jaxpr(jax.grad(lambda k: ours(x, k).sum()))(kernel))
      assert in_chunks == ((name, batch) in CHUNKED)
    results = []
    for f in (ours, functools.partial(xla, stride=stride, padding=padding)):
      loss = lambda x, k, f=f: jnp.sum(jnp.tanh(f(x, k)) ** 2)
      penalty = lambda x, k, loss=loss: (
        jnp.sum(jax.grad(loss)(x, k) ** 2) + jnp.sum(w * jax.grad(loss, 1)(x, k))
      )
      evaluate = jax.jit(
        lambda x, k, *_, f=f, a=loss, b=penalty: (
          f(x, k),
          jax.grad(a, (0, 1))(x, k),
          jax.grad(b, (0, 1))(x, k),
        )
      )
      results.append(evaluate(x, kernel))
    for a, b in zip(jax.tree.leaves(results[0]), jax.tree.leaves(results[1]), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
  'conv',
  [
    convolution.conv,
    functools.partial(convolution.strided_conv, stride=2, padding=((1, 1), (1, 1))),
  ],
)
def test_gradient_of_a_replicated_kernel_is_summed_over_devices(conv):
  mesh = jax.sharding.Mesh(jax.devices()[:2], ('data',), axis_types=(AxisType.Auto,))
  x, kernel = (
    jax.random.normal(jax.random.key(0), (64, 5, 5, 2)),
    jax.random.normal(jax.random.key(1), (3, 3, 2, 3)),
  )
  loss = lambda k, x: jnp.mean(jnp.tanh(conv(x, k)) ** 2)
  sharded = jax.shard_map(
    jax.grad(lambda k, x: lax.pmean(loss(k, x), 'data')),
    mesh=mesh,
    in_specs=(P(), P('data')),
    out_specs=P(),
  )
  np.testing.assert_allclose(sharded(kernel, x), jax.grad(loss)(kernel, x), rtol=1e-5, atol=1e-7)


def test_bfloat16_kernel_gradient_is_summed_in_float32():
  x, kernel = (
    jax.random.normal(jax.random.key(0), (512, 6, 6, 2)),
    jax.random.normal(jax.random.key(1), (3, 3, 2, 3)),
  )
  gradient = lambda dtype: jax.grad(
    lambda k: convolution.conv(x.astype(dtype), k).astype(jnp.float32).sum()
  )(kernel.astype(dtype))
  exact, found = np.float64(gradient(jnp.float32)), np.float64(gradient(jnp.bfloat16))
  assert np.abs(found - exact).max() < 0.02 * np.abs(exact).max()


def test_gradients_of_a_stride_cost_what_runs():
  x, kernel = jnp.ones((4, 8, 8, 2)), jnp.ones((3, 3, 2, 5))
  strided = functools.partial(convolution.strided_conv, stride=2, padding=((1, 1), (1, 1)))
  count = lambda f, *a: cost.flops(jax.jit(f).trace(*a))
  forward = count(strided, x, kernel)
  both = count(lambda x, k: jax.vjp(strided, x, k)[1](jnp.ones((4, 4, 4, 5))), x, kernel)
  if jax.default_backend() == 'cpu':  # a kernel of two blocks by two blocks of 2x2 pixels
    assert both == forward + 2 * (2 * 4 * 4 * 4 * 16 * 2 * 5)


@pytest.mark.skipif(jax.default_backend() != 'cpu', reason='a layout of XLA:CPU')
def test_gradients_inside_a_loop_have_the_fast_layout():
  """Each convolution of the compiled loop is batch-first with an HWIO kernel; XLA's own gradients
  there are not."""

  def in_loop(f):
    def train(kernel, x):
      return lax.scan(
        lambda k, _: (k - jax.grad(lambda k: jnp.sum(f(f(x, k), k) ** 2))(k), None),
        kernel,
        length=2,
      )[0]

    text = (
      jax.jit(train).lower(jnp.ones((3, 3, 8, 8)), jnp.ones((4, 16, 16, 8))).compile().as_text()
    )
    return [line for line in text.splitlines() if ' convolution(' in line]

  fast = lambda lines: all('dim_labels=b01f_01io->b01f' in line for line in lines)
  assert fast(in_loop(convolution.conv)) and len(in_loop(convolution.conv)) >= 4
  assert not fast(in_loop(lambda x, k: xla(x, k, 1, 'SAME'))), (
    'XLA now does this itself: the module may go'
  )


@pytest.mark.parametrize(
  'options',
  [
    dict(kernel_dilation=2),
    dict(strides=(2, 1)),
    dict(feature_group_count=4),
    dict(padding='SAME', strides=(2, 2)),
    dict(padding='SAME', kernel_size=(4, 4)),
    dict(padding='VALID', kernel_size=(2, 2)),
    dict(padding='VALID', strides=(2, 2)),
    dict(padding='VALID', kernel_size=(1, 1), strides=(2, 2)),
    dict(padding=1, strides=(2, 2)),
  ],
)
def test_layers_of_other_forms_are_flaxs(options):
  x = jax.random.normal(jax.random.key(0), (2, 9, 8, 4))
  options = dict(dict(features=8, kernel_size=(3, 3), padding='VALID'), **options)
  plain = nn.Conv(**options)
  variables = plain.init(jax.random.key(1), x)
  ours = nn.Conv(**options, conv_general_dilated=convolution.flax_conv)
  np.testing.assert_allclose(ours.apply(variables, x), plain.apply(variables, x), atol=1e-5)


def test_layers_of_the_encoders_keep_the_fast_gradients(monkeypatch):
  """Shortcuts of ResNets, patches of transformers, the Nature CNN's."""
  taken = []
  strided = convolution.strided_conv
  monkeypatch.setattr(convolution, 'strided_conv', lambda *x: taken.append(x[2]) or strided(*x))
  for name, side in (('resnet18', 8), ('vit_tiny', 8), ('nature', 36)):
    c = encoder.default_config()
    c.update(dict(name=name, width=4, features=8))
    network, pictures = encoder.make_encoder(c), np.zeros((1, side, side, 1), np.uint8)
    jax.eval_shape(lambda net=network, x=pictures: net.init(jax.random.key(0), x, train=False))
  assert sorted(taken) == [2, 2, 2, 2, 2, 2, 2, 4, 4]  # six of ResNet-18; 4, 2; the patch
