import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from scipy.signal import correlate
from scipy.special import erf, softmax

from palm_jax import encoder, resnet, vit
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
  module = resnet.ResNet(width=3)
  images = np.random.default_rng(0).integers(0, 256, (8, 10, 10, 3), np.uint8)
  return module, random_variables(module, images.shape), images


def numpy_resnet(variables, images, train):
  """(h, running statistics after it) by explicit padding and scipy's correlation, in float64; the
  kind of block, their number and the stem are read off the variables."""
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
  stem = params['stem_conv']['kernel']
  x = np.maximum(norm(conv(x, stem, 1 if len(stem) == 3 else 2), scope, 'stem_norm'), 0)
  if len(stem) == 7:
    x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    x = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))[:, ::2, ::2].max((-2, -1))
  for name in sorted(name for name in params if name.startswith('stage')):
    p, scope = params[name], (params[name], stats[name])
    stride = 2 if name[5] > '1' and name.endswith('_block1') else 1
    y, count = x, 3 if 'conv3' in p else 2
    for i in range(1, count + 1):
      step = stride if i == count - 1 else 1  # at the 3x3 of a bottleneck, at the first of two
      y = norm(conv(y, p[f'conv{i}']['kernel'], step), scope, f'norm{i}')
      y = np.maximum(y, 0) if i < count else y
    if 'shortcut_conv' in p:
      x = norm(conv(x, p['shortcut_conv']['kernel'], stride), scope, 'shortcut_norm')
    x = np.maximum(x + y, 0)
  return x.mean(axis=(1, 2)), stats


def numpy_vit(variables, images, heads):
  """h of a pre-norm transformer in float64, by its equations."""
  params = jax.tree.map(lambda x: np.asarray(x, np.float64), variables['params'])

  def norm(x, p):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * p['scale'] + p['bias']

  dense = lambda x, p: x @ p['kernel'] + p['bias']
  side, size = len(params['patch']['kernel']), params['patch']['kernel'].shape[-1]
  x = np.asarray(images, np.float64) / 127.5 - 1
  batch, height, width, channels = x.shape
  starts = [(i, j) for i in range(0, height, side) for j in range(0, width, side)]
  x = np.stack([x[:, i : i + side, j : j + side].reshape(batch, -1) for i, j in starts], axis=1)
  x = x @ params['patch']['kernel'].reshape(-1, size) + params['patch']['bias']
  token = 'class_token' in params
  if token:
    x = np.concatenate([np.tile(params['class_token'], (batch, 1, 1)), x], axis=1)
  x = x + params['position']
  for i in range(12):
    p = jax.tree.map(lambda leaf, i=i: leaf[i], params['blocks'])
    q, k, v = np.split(dense(norm(x, p['norm1']), p['qkv']), 3, axis=-1)
    parts = []
    for head in range(heads):
      own = slice(head * size // heads, (head + 1) * size // heads)
      logits = q[..., own] @ k[..., own].swapaxes(1, 2) / np.sqrt(size // heads)
      parts.append(softmax(logits, axis=-1) @ v[..., own])
    x = x + dense(np.concatenate(parts, axis=-1), p['proj'])
    y = dense(norm(x, p['norm2']), p['fc1'])
    x = x + dense(y * (1 + erf(y / np.sqrt(2))) / 2, p['fc2'])
  return norm(x[:, 0] if token else x.mean(1), params['norm'])


def resnet_parameters(counts, bottleneck, stem):
  """Of a residual network for three channels: kernels without bias, scale and offset of each
  normalisation (torchvision/models/resnet.py)."""
  conv = lambda side, i, o: side * side * i * o + 2 * o
  total, channels = conv(stem, 3, 64), 64
  for stage, blocks in enumerate(counts):
    planes = 64 * 2**stage
    out = 4 * planes if bottleneck else planes
    for block in range(blocks):
      if bottleneck:
        total += conv(1, channels, planes) + conv(3, planes, planes) + conv(1, planes, out)
      else:
        total += conv(3, channels, planes) + conv(3, planes, planes)
      if channels != out:
        assert block == 0
        total += conv(1, channels, out)
      channels = out
  return total


def vit_parameters(size, patch, side, token=True):
  """Of a transformer for three channels (timm/models/vision_transformer.py): a block is 4 DD + 4 D
  of attention, 8 DD + 5 D of the perceptron and 4 D of two normalisations."""
  patches = (side // patch) ** 2
  ends = (patch * patch * 3 + 1) * size + (patches + 2 * token) * size + 2 * size
  return 12 * (12 * size**2 + 13 * size) + ends


@pytest.mark.parametrize(
  'name, expected',
  [
    ('resnet18', resnet_parameters((2, 2, 2, 2), False, 3)),
    ('resnet34', resnet_parameters((3, 4, 6, 3), False, 3)),
    ('resnet50', resnet_parameters((3, 4, 6, 3), True, 3)),
    ('vit_tiny', vit_parameters(192, 4, 32)),
    ('vit_small', vit_parameters(384, 4, 32)),
  ],
)
def test_parameter_counts_and_features_by_name(name, expected):
  """At full size, for 32x32; shapes alone."""
  settings = ConfigDict(dict(encoder.default_config(), name=name))
  module, images = encoder.make_encoder(settings), jnp.zeros((2, 32, 32, 3), jnp.uint8)
  h, variables = jax.eval_shape(
    lambda: module.init_with_output(jax.random.key(0), images, train=False)
  )
  assert sum(x.size for x in jax.tree.leaves(variables['params'])) == expected
  features = dict(resnet18=512, resnet34=512, resnet50=2048, vit_tiny=192, vit_small=384)
  assert h.shape == (2, features[name]) and h.dtype == jnp.float32
  assert ('batch_stats' in variables) == name.startswith('resnet')


def test_parameter_counts_are_the_published_ones():
  """Of torchvision's models without fc, and timm's without head, on 224x224."""
  published = dict(resnet18=11_689_512, resnet34=21_797_672, resnet50=25_557_032)  # with fc
  for name, total in published.items():
    settings = dict(encoder.default_config(), name=name, stem='imagenet')
    features = 2048 if name == 'resnet50' else 512
    module = encoder.make_encoder(ConfigDict(settings))
    assert count(module, (1, 224, 224, 3)) == total - 1000 * (features + 1)
  published = dict(vit_tiny=(192, 5_717_416), vit_small=(384, 22_050_664))  # with head
  for name, (size, total) in published.items():
    settings = ConfigDict(dict(encoder.default_config(), name=name, patch=16))
    found = count(encoder.make_encoder(settings), (1, 224, 224, 3))
    assert found == total - 1000 * (size + 1) == vit_parameters(size, 16, 224)
    settings.pool = 'mean'
    found = count(encoder.make_encoder(settings), (1, 224, 224, 3))
    assert found == vit_parameters(size, 16, 224, token=False)


def test_parameter_counts():
  assert count(resnet.ResNet(), (1, 32, 32, 3)) == 11_168_832
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


@pytest.mark.parametrize('depth, stem, side', [(50, 'cifar', 6), (34, 'imagenet', 30)])
def test_deeper_resnets_agree_with_numpy(depth, stem, side):
  """30 -> 15 -> 8 -> 4 -> 2 -> 1: odd sides to halve."""
  module = resnet.ResNet(1, depth=depth, stem=stem)
  images = np.random.default_rng(0).integers(0, 256, (2, side, side, 3), np.uint8)
  variables = random_variables(module, images.shape)
  h = jax.jit(lambda v: module.apply(v, images, train=False))(variables)
  assert h.shape == (2, 32 if depth == 50 else 8)
  np.testing.assert_allclose(h, numpy_resnet(variables, images, train=False)[0], rtol=1e-3)


@pytest.mark.parametrize('pool, shape', [('token', (3, 8, 8, 1)), ('mean', (2, 4, 6, 3))])
def test_vit_agrees_with_numpy(pool, shape):
  module = vit.ViT(3, 4, 2, pool)
  images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
  variables = random_variables(module, shape)
  assert set(variables) == {'params'} and ('class_token' in variables['params']) == (
    pool == 'token'
  )
  h = jax.jit(lambda v: module.apply(v, images, train=True))(variables)
  assert h.shape == (shape[0], 12) and h.dtype == jnp.float32
  np.testing.assert_allclose(h, numpy_vit(variables, images, 3), rtol=1e-3, atol=1e-4)
  if pool == 'mean':
    narrow = vit.ViT(3, 4, 2, pool, jnp.bfloat16)
    half = jax.jit(lambda v: narrow.apply(v, images, train=False))(variables)
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, h, rtol=0.1, atol=0.2)


def test_vit_blocks_start_apart_and_small():
  module = vit.ViT(3, 8, 4)
  params = jax.jit(lambda: module.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), train=False))()
  qkv = params['params']['blocks']['qkv']['kernel']
  assert qkv.shape == (12, 24, 72) and np.std(qkv) == pytest.approx(0.02, rel=0.05)
  assert len({float(block[0, 0]) for block in qkv}) == 12
  assert not np.any(params['params']['blocks']['qkv']['bias'])


def test_stride_two_pads_both_sides():
  block = resnet.ResidualBlock(
    1,
    2,
    jax.tree_util.Partial(resnet.nn.Conv, use_bias=False),
    jax.tree_util.Partial(resnet.BatchNorm, use_running_average=True),
    resnet.nn.initializers.ones,
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
    module = resnet.ResNet(2, axis_name='data')
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
    module = resnet.ResNet(2, zero_init_residual=zero)
    norms = jax.jit(
      lambda m=module: m.init(jax.random.key(0), images, train=False)['params']['stage2_block2']
    )()
    assert np.all(norms['norm2']['scale'] == (0 if zero else 1)) and np.all(
      norms['norm1']['scale'] == 1
    )


def test_convolutions_start_with_kaiming_fan_out():
  kernel = resnet.KAIMING(jax.random.key(0), (3, 3, 16, 64))
  assert np.std(kernel) == pytest.approx(np.sqrt(2 / (9 * 64)), rel=0.03)
  # Normal without truncation: 0.27 percent lie beyond three deviations.
  assert np.mean(np.abs(kernel) > 3 * np.sqrt(2 / (9 * 64))) == pytest.approx(0.0027, abs=0.0015)


def test_bfloat16(small):
  module, variables, images = small
  reference = module.apply(variables, images, train=False)
  h, updated = resnet.ResNet(width=3, dtype=jnp.bfloat16).apply(
    variables, images, train=True, mutable=['batch_stats']
  )
  assert h.dtype == jnp.float32
  assert {x.dtype for x in jax.tree.leaves(updated)} == {jnp.dtype('float32')}
  h = resnet.ResNet(width=3, dtype=jnp.bfloat16).apply(variables, images, train=False)
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
  assert encoder.make_encoder(config, 'data', jnp.bfloat16) == resnet.ResNet(
    64, 'data', jnp.bfloat16
  )
  nature = encoder.make_encoder(ConfigDict(dict(config, name='nature', features=32)))
  variables = nature.init(jax.random.key(0), np.zeros((1, 36, 36, 4), np.uint8), train=True)
  assert set(variables) == {'params'} and variables['params']['dense']['kernel'].shape == (64, 32)
  # The settings of older checkpoints, which have no stem.
  assert encoder.make_encoder(ConfigDict(dict(name='resnet18', width=8))) == resnet.ResNet(8)
  for changes, message in (
    (dict(name='resnet81'), "'resnet81'.*did you mean 'resnet18'"),
    (dict(name='vit_base'), "'vit_base'.*did you mean 'vit_"),
    (dict(stem='imagnet'), "encoder.stem='imagnet' is unknown .did you mean imagenet"),
    (dict(pool='tokens'), "encoder.pool='tokens' is unknown .did you mean token"),
    (dict(patch=0), 'encoder.patch=0'),
  ):
    with pytest.raises(UserError, match=message):
      encoder.check(ConfigDict(dict(config, **changes)))
  for name in ('nature', 'vit_tiny'):
    with pytest.raises(UserError, match=f'64x128: the encoder {name}'):
      encoder.check_picture(ConfigDict(dict(config, name=name)), (64, 128, 3))
  encoder.check_picture(config, (64, 128, 3))
  patches = encoder.make_encoder(ConfigDict(dict(config, name='vit_tiny', patch=5)))
  message = 'encoder.patch=5 does not divide pictures of 28x28: set it to 4'
  with pytest.raises(UserError, match=message):
    jax.eval_shape(lambda: patches.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)), train=False))
  with pytest.raises(UserError, match='32x32'):
    nature.init(jax.random.key(0), np.zeros((1, 32, 32, 3), np.uint8), train=True)
