import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from scipy.signal import correlate

from palm_jax import encoder
from palm_jax.base.errors import UserError

P = jax.sharding.PartitionSpec


def count(module, shape):
  variables = jax.eval_shape(
    lambda: module.init(jax.random.key(0), jnp.zeros(shape, jnp.uint8), train=False)
  )
  return sum(x.size for x in jax.tree.leaves(variables['params']))


def random_variables(module, shape):
  """No leaf at its initial 0 or 1, so that a forgotten scale, offset or running mean shows."""
  rng = np.random.default_rng(1)

  def draw(leaf):
    if len(leaf.shape) == 1:
      return rng.uniform(0.3, 1.2, leaf.shape).astype(np.float32)
    return (rng.normal(size=leaf.shape) * np.sqrt(2 / np.prod(leaf.shape[:-1]))).astype(np.float32)

  return jax.tree.map(
    draw, jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros(shape), train=False))
  )


@pytest.fixture(scope='module')
def small():
  """A ResNet-18 of width 3 with random batch statistics, and images (8, 10, 10, 3) uint8; 10 and 5
  are odd to halve."""
  module = encoder.ResNet18(width=3)
  images = np.random.default_rng(0).integers(0, 256, (8, 10, 10, 3), np.uint8)
  return module, random_variables(module, images.shape), images


def numpy_resnet(variables, images, train):
  """(h, running statistics after it) by explicit padding and scipy's correlation, in float64."""
  params, stats = jax.tree.map(
    lambda x: np.asarray(x, np.float64), (variables['params'], variables['batch_stats'])
  )

  def conv(x, kernel, stride):
    pad = kernel.shape[0] // 2
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    full = [
      [correlate(image, kernel[..., o], 'valid')[..., 0] for o in range(kernel.shape[-1])]
      for image in x
    ]
    return np.moveaxis(np.array(full), 1, -1)[:, ::stride, ::stride]

  def norm(x, scope, name):
    p, s = scope[0][name], scope[1][name]
    if train:
      batch = {'mean': x.mean((0, 1, 2)), 'var': x.var((0, 1, 2))}
      scope[1][name] = {k: 0.9 * s[k] + 0.1 * batch[k] for k in batch}
      s = batch
    return (x - s['mean']) / np.sqrt(s['var'] + 1e-5) * p['scale'] + p['bias']

  scope = (params, stats)
  x = np.asarray(images, np.float64) / 127.5 - 1
  x = np.maximum(norm(conv(x, params['stem_conv']['kernel'], 1), scope, 'stem_norm'), 0)
  for stage in range(1, 5):
    for block in range(1, 3):
      name = f'stage{stage}_block{block}'
      p, scope = params[name], (params[name], stats[name])
      stride = 2 if stage > 1 and block == 1 else 1
      y = np.maximum(norm(conv(x, p['conv1']['kernel'], stride), scope, 'norm1'), 0)
      y = norm(conv(y, p['conv2']['kernel'], 1), scope, 'norm2')
      if stride == 2:
        x = norm(conv(x, p['shortcut_conv']['kernel'], 2), scope, 'shortcut_norm')
      x = np.maximum(x + y, 0)
  return x.mean(axis=(1, 2)), stats


def test_parameter_counts():
  assert count(encoder.ResNet18(), (1, 32, 32, 3)) == 11_168_832
  # 8x8x4x32, 4x4x32x64, 3x3x64x64 with biases, and 7x7x64 -> 512.
  assert count(encoder.NatureCNN(), (1, 84, 84, 4)) == 8224 + 32832 + 36928 + 3136 * 512 + 512


def test_resnet_agrees_with_numpy(small):
  module, variables, images = small
  expected, _ = numpy_resnet(variables, images[:2], train=False)
  h = module.apply(variables, images[:2], train=False)
  assert h.shape == (2, 24) and h.dtype == jnp.float32
  np.testing.assert_allclose(h, expected, rtol=2e-4)
  floats = module.apply(variables, jnp.asarray(images[:2] / 127.5 - 1, jnp.float32), train=False)
  np.testing.assert_allclose(floats, h, rtol=1e-4)


def test_stride_two_pads_both_sides():
  block = encoder.ResidualBlock(
    1,
    2,
    jax.tree_util.Partial(encoder.nn.Conv, use_bias=False),
    jax.tree_util.Partial(encoder.BatchNorm, use_running_average=True),
    encoder.nn.initializers.ones,
  )
  ones = jnp.ones((1, 8, 8, 1))
  variables = block.init(jax.random.key(0), ones)
  variables['params'] = jax.tree.map(jnp.ones_like, variables['params'])
  _, seen = block.apply(variables, ones, capture_intermediates=True)
  first = seen['intermediates']['conv1']['__call__'][0][0, :, :, 0]
  # torch sees two ones of three in the first row and three in the last; 'SAME' would give 9 and 4.
  np.testing.assert_array_equal(first, np.outer([2, 3, 3, 3], [2, 3, 3, 3]))


def test_training_on_eight_devices_agrees_with_numpy():
  """One image a device: batch statistics over all of them, running ones with momentum 0.9; in
  float64."""
  with jax.enable_x64(True):
    module = encoder.ResNet18(2, axis_name='data')
    images = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), np.uint8)
    images = images / 127.5 - 1  # uint8 would be scaled in float32
    variables = jax.tree.map(np.float64, random_variables(module, images.shape))
    mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
    apply = jax.jit(
      jax.shard_map(
        lambda v, x: module.apply(v, x, train=True, mutable=['batch_stats']),
        mesh=mesh,
        in_specs=(P(), P('data')),
        out_specs=(P('data'), P()),
      )
    )
    h, updated = apply(variables, images)
    assert h.dtype == jnp.float64
    expected, stats = numpy_resnet(variables, (images + 1) * 127.5, train=True)
    np.testing.assert_allclose(h, expected, rtol=1e-9, atol=1e-10)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10),
      updated['batch_stats'],
      stats,
    )


def test_zero_init_residual_starts_as_identity():
  images = np.zeros((1, 8, 8, 3), np.uint8)
  for zero in (False, True):
    module = encoder.ResNet18(2, zero_init_residual=zero)
    norms = jax.jit(
      lambda m=module: m.init(jax.random.key(0), images, train=False)['params']['stage2_block2']
    )()
    assert np.all(norms['norm2']['scale'] == (0 if zero else 1)) and np.all(
      norms['norm1']['scale'] == 1
    )


def test_convolutions_start_with_kaiming_fan_out():
  kernel = encoder.KAIMING(jax.random.key(0), (3, 3, 16, 64))
  assert np.std(kernel) == pytest.approx(np.sqrt(2 / (9 * 64)), rel=0.03)
  # Normal without truncation: 0.27 percent lie beyond three deviations.
  assert np.mean(np.abs(kernel) > 3 * np.sqrt(2 / (9 * 64))) == pytest.approx(0.0027, abs=0.0015)


def test_bfloat16(small):
  module, variables, images = small
  reference = module.apply(variables, images, train=False)
  h, updated = encoder.ResNet18(width=3, dtype=jnp.bfloat16).apply(
    variables, images, train=True, mutable=['batch_stats']
  )
  assert h.dtype == jnp.float32
  assert {x.dtype for x in jax.tree.leaves(updated)} == {jnp.dtype('float32')}
  h = encoder.ResNet18(width=3, dtype=jnp.bfloat16).apply(variables, images, train=False)
  np.testing.assert_allclose(h, reference, rtol=0.05, atol=0.1)


def test_preprocess():
  x = encoder.preprocess(np.array([0, 51, 255], np.uint8))
  assert x.dtype == jnp.float32
  np.testing.assert_allclose(x, [-1, -0.6, 1], atol=1e-7)
  assert encoder.preprocess(np.zeros(2, np.uint8), jnp.bfloat16).dtype == jnp.bfloat16
  np.testing.assert_array_equal(encoder.preprocess(jnp.array([-1.0, 0.5])), [-1, 0.5])
  with pytest.raises(UserError, match='int32'):
    encoder.preprocess(np.zeros(2, np.int32))


def test_make_encoder():
  config = encoder.default_config()
  assert encoder.make_encoder(config, 'data', jnp.bfloat16) == encoder.ResNet18(
    64, 'data', jnp.bfloat16
  )
  nature = encoder.make_encoder(ConfigDict(dict(config, name='nature', features=32)))
  variables = nature.init(jax.random.key(0), np.zeros((1, 36, 36, 4), np.uint8), train=True)
  assert set(variables) == {'params'} and variables['params']['dense']['kernel'].shape == (64, 32)
  with pytest.raises(UserError, match="'resnet50'.*'resnet18'"):
    encoder.make_encoder(ConfigDict(dict(config, name='resnet50')))
  with pytest.raises(UserError, match='32x32'):
    nature.init(jax.random.key(0), np.zeros((1, 32, 32, 3), np.uint8), train=True)
