"""StyleGAN2 against arrays of the official implementation and scipy in float64; its promises on
types and devices.

The reference arrays (shared/fixtures/stylegan2) come from random weights in which every parameter
matters.
"""

import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal
from jax.sharding import PartitionSpec as P

from palm_jax.base.errors import UserError
from palm_jax.generator import ops
from palm_jax.generator.discriminator import Discriminator, minibatch_std
from palm_jax.generator.official import discriminator_from_official, generator_from_official
from palm_jax.generator.stylegan2 import Generator, channels_for

TINY_G = Generator(
  z_dim=8, w_dim=8, num_classes=3, channels=(8, 6), image_channels=1, mapping_layers=2
)
TINY_D = Discriminator(
  num_classes=3, channels=(8, 6), image_channels=1, mapping_layers=2, mbstd_group=2
)


@pytest.fixture(autouse=True)
def highest_precision():
  with jax.default_matmul_precision('highest'):
    yield


@pytest.fixture(scope='module')
def official(shared):
  """Official networks and arrays, images as NHWC."""
  folder = shared / 'fixtures' / 'stylegan2'
  with np.load(folder / 'a_tiny_cond32.params.npz') as file:
    states = {
      network: {
        name.split('/', 1)[1]: x for name, x in file.items() if name.startswith(network + '/')
      }
      for network in ('G_ema', 'D')
    }
  with np.load(folder / 'a_tiny_cond32.npz') as file:
    arrays = {name: np.moveaxis(x, 1, -1) if x.ndim == 4 else x for name, x in file.items()}
  G, g_variables = generator_from_official(states['G_ema'])
  D, d_variables = discriminator_from_official(states['D'], mbstd_group=4)
  mapping = jax.jit(
    functools.partial(G.apply, method='mapping'), static_argnames=('update_w_avg', 'mutable')
  )
  synthesis = jax.jit(functools.partial(G.apply, method='synthesis'), static_argnums=2)
  return types.SimpleNamespace(
    states=states,
    arrays=arrays,
    G=G,
    g_variables=g_variables,
    D=D,
    d_variables=d_variables,
    mapping=functools.partial(mapping, g_variables, arrays['z']),
    synthesis=functools.partial(synthesis, g_variables),
  )


@pytest.fixture(scope='module')
def tiny():
  """Tiny networks whose every parameter is drawn, so that each matters (and no initialisation is
  compiled)."""
  rng = np.random.default_rng(0)
  z, labels = rng.normal(size=(8, 8)).astype(np.float32), np.arange(8) % 3

  def draw(module, *inputs):
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), shapes)

  g_variables = draw(TINY_G, z, labels)
  layers = g_variables['params']['mapping_network']
  g_variables['params']['mapping_network'] = jax.tree.map(
    lambda x: 100 * x, layers
  )  # stored 1 / lr_mult larger
  d_variables = draw(TINY_D, jnp.zeros((8, *TINY_G.image_shape)), labels)
  return types.SimpleNamespace(
    z=z,
    labels=labels,
    g_variables=g_variables,
    d_variables=d_variables,
    images=jax.jit(TINY_G.apply)(g_variables, z, labels),
  )


def assert_close(actual, expected, tolerance, what='', scale=None):
  """Largest error below tolerance times the largest value (or scale)."""
  expected = np.asarray(expected)
  scale = np.abs(expected).max() if scale is None else scale
  error = np.abs(np.asarray(actual) - expected).max() / scale
  assert error < tolerance, f'{what}: relative error {error:.2e}'


def assert_images_close(actual, expected):
  assert_close(actual, expected, 1e-5, scale=np.ptp(expected))


def official_leaves(tree, names):
  """The leaves of our gradient tree under the official names."""

  def leaf(name):
    node = tree
    for key in name.split('.'):
      key = {'weight': 'kernel'}.get(key, key)
      node = node[key] if key in node else node[f'{key}_network']
    return np.asarray(node)

  return [leaf(name) for name in names]


def assert_norms_close(tree, names, norms):
  actual = np.array([np.linalg.norm(x) for x in official_leaves(tree, names)])
  assert len(jax.tree.leaves(tree)) == len(names)
  assert_close(actual, norms, 1e-5)
  # Each on its own too, down to what sums that cancel (a noise strength, R1 on the last bias) lose
  # to rounding.
  np.testing.assert_allclose(actual, norms, rtol=1e-4, atol=1e-6 * norms.max())


class TestOfficial:
  def test_ws(self, official):
    a = official.arrays
    labels = a['labels'].astype(np.int32)
    assert_close(official.mapping(labels), a['ws_psi1'], 1e-5)
    assert_close(official.mapping(labels, truncation_psi=0.7), a['ws_psi07'], 1e-5)
    assert_close(
      official.mapping(labels, truncation_psi=0.5, truncation_cutoff=4), a['ws_psi05_cutoff4'], 1e-5
    )
    assert_close(official.mapping(a['c']), a['ws_psi1'], 1e-5, 'labels as vectors')

  def test_w_avg(self, official):
    a = official.arrays
    assert_close(official.g_variables['buffers']['w_avg'], a['w_avg_before'], 1e-7)
    _, updated = official.mapping(a['c'], update_w_avg=True, mutable='buffers')
    assert_close(updated['buffers']['w_avg'], a['w_avg_after_update'], 1e-6)

  def test_images(self, official):
    a = official.arrays
    for psi in ('psi1', 'psi07'):
      for noise in ('const', 'none'):
        assert_images_close(official.synthesis(a[f'ws_{psi}'], noise), a[f'img_{psi}_{noise}'])
    assert_images_close(official.synthesis(a['ws_mixed'], 'const'), a['img_ws_mixed_const'])

  def test_gradients(self, official):
    """Of sum(images * cotangent) and, with D's own gradient as cotangent, of G's loss."""
    a = official.arrays

    @jax.jit
    def g_gradients(params, z, psi, cotangent):
      def scalar(params, z):
        images = official.G.apply({**official.g_variables, 'params': params}, z, a['c'], psi)
        return (images * cotangent).sum(), images

      return jax.grad(scalar, (0, 1), has_aux=True)(params, z)

    @jax.jit
    def d_gradient(params, images):
      def g_loss(images):
        logits = official.D.apply({'params': params}, images, a['c'])
        return jax.nn.softplus(-logits).mean(), logits

      return jax.value_and_grad(g_loss, has_aux=True)(images)

    params = official.g_variables['params']
    (of_params, of_z), images = g_gradients(params, a['z'], 1.0, a['grad_R'])
    assert_images_close(images, a['img_psi1_const'])
    assert_close(of_z, a['grad_z_const'], 1e-5)
    assert_norms_close(of_params, a['grad_param_norm_names'], a['grad_param_norms'])
    small = [name for name in a if name.startswith('gradp/')]
    assert small
    for name, ours in zip(
      small, official_leaves(of_params, [n[len('gradp/') :] for n in small]), strict=True
    ):
      # A noise strength's gradient is a sum over all pixels that nearly cancels: judged against
      # what it sums.
      scale = max(np.abs(a[name]).max(), a['grad_param_norms'].max() / 100)
      assert_close(ours, a[name], 1e-4, name, scale)

    silent = jax.tree.map(
      lambda x: jnp.zeros_like(x) if x.ndim == 0 else x, params
    )  # noise_strength 0: no noise
    (_, of_z), images = g_gradients(silent, a['z'], 0.7, a['grad_R'])
    assert_images_close(images, a['img_psi07_none'])
    assert_close(of_z, a['grad_z_none_psi07'], 1e-5)

    (loss, fake_logits), cotangent = d_gradient(official.d_variables['params'], a['img_psi1_const'])
    assert_close(fake_logits, a['d_logits_fake'][:, 0], 1e-5)
    assert_close(loss, a['loss_G'], 1e-5)
    assert_close(jax.nn.softplus(fake_logits).mean(), a['loss_D_fake'], 1e-5)
    (_, of_z), _ = g_gradients(params, a['z'], 1.0, cotangent)
    assert_close(of_z, a['grad_z_lossG'], 1e-5)

  def test_real_logits_and_r1(self, official):
    a = official.arrays

    @jax.jit
    def r1(params):
      def logit_sum(images, params):
        logits = official.D.apply({'params': params}, images, a['d_c'])
        return logits.sum(), logits

      def loss(params):
        gradient, logits = jax.grad(logit_sum, has_aux=True)(a['d_img'], params)
        penalty = jnp.square(gradient).sum((1, 2, 3))
        return penalty.mean() * 0.01 / 2, (gradient, penalty, logits)

      return jax.value_and_grad(loss, has_aux=True)(params)

    (loss, (gradient, penalty, logits)), of_params = r1(official.d_variables['params'])
    assert_close(logits, a['d_logits'][:, 0], 1e-5)
    assert_close(jax.nn.softplus(-logits).mean(), a['loss_D_real'], 1e-5)
    assert_close(gradient, a['r1_img_grad'], 1e-5)
    assert_close(penalty, a['r1_penalty'], 1e-5)
    assert_close(loss, a['r1_loss_gamma001'], 1e-5)
    assert_norms_close(of_params, a['r1_param_names'], a['r1_param_grad_norms'])

  def test_path_length(self, official):
    a = official.arrays

    @jax.jit
    def path_length(params, pl_mean):
      def loss(params):
        variables = {**official.g_variables, 'params': params}
        ws = official.G.apply(variables, a['z'], a['c'], method='mapping')
        picture = lambda ws: (
          (official.G.apply(variables, ws, method='synthesis') * a['pl_noise_unit']).sum() / 32
        )
        lengths = jnp.sqrt(jnp.square(jax.grad(picture)(ws)).sum(2).mean(1))
        new_mean = pl_mean + 0.01 * (lengths.mean() - pl_mean)
        return 2 * jnp.square(lengths - new_mean).mean(), (lengths, new_mean)

      return jax.value_and_grad(loss, has_aux=True)(params)

    for start, suffix in ((0.0, '0'), (0.5, '05')):
      (loss, (lengths, mean)), of_params = path_length(official.g_variables['params'], start)
      assert_close(lengths, a['pl_lengths'], 1e-5)
      assert_close(mean, a[f'pl_mean_after_from{suffix}'], 1e-5)
      assert_close(loss, a[f'pl_loss_from{suffix}'], 1e-5)
      if start == 0:
        assert_norms_close(of_params, a['pl_param_names'], a['pl_param_grad_norms'])

  @pytest.mark.parametrize(
    'change, message',
    [
      (
        lambda state: state.pop('synthesis.b16.conv1.bias'),
        'synthesis_network.b16.conv1.bias is missing',
      ),
      (
        lambda state: state.update({'synthesis.b8.conv0.bias': np.zeros(5)}),
        'b8.conv0.bias has shape',
      ),
      (
        lambda state: state.update({'synthesis.b8.skip.weight': np.zeros((32, 32, 1, 1))}),
        'not supported',
      ),
      (
        lambda state: state.update({'synthesis.b8.resample_filter': np.ones((4, 4)) / 16}),
        'resample_filter',
      ),
    ],
  )
  def test_unfit_weights(self, official, change, message):
    state = dict(official.states['G_ema'])
    change(state)
    with pytest.raises(UserError, match=message):
      generator_from_official(state)


class TestResampling:
  """Against scipy in float64: full convolutions, zero insertion and slicing written out."""

  filter = np.outer([1, 3, 3, 1], [1, 3, 3, 1]) / 64

  def filtered(self, x, pad, stride=1):
    """Pads, convolves valid with the filter, keeps every stride-th; x is (N, H, W, C)."""
    x = np.pad(x, [(0, 0), pad, pad, (0, 0)])
    y = scipy.signal.convolve(x, self.filter[None, :, :, None], mode='valid')
    return y[:, ::stride, ::stride]

  def inserted(self, x):
    y = np.zeros((x.shape[0], 2 * x.shape[1], 2 * x.shape[2], x.shape[3]))
    y[:, ::2, ::2] = x
    return y

  @pytest.fixture
  def drawn(self):
    rng = np.random.default_rng(0)
    return rng.normal(size=(2, 6, 4, 3)), rng.normal(size=(3, 3, 3, 5))

  def test_upsample(self, drawn):
    x, _ = drawn
    assert_close(
      ops.upsample(x.astype(np.float32)), self.filtered(self.inserted(x), (2, 1)) * 4, 1e-6
    )

  def test_downsample(self, drawn):
    x, _ = drawn
    assert_close(ops.downsample(x.astype(np.float32)), self.filtered(x, (1, 1), 2), 1e-6)

  def test_up_conv(self, drawn):
    x, kernel = drawn
    # A transposed convolution of stride 2 is the full true convolution with the zero-inserted
    # image.
    inserted = self.inserted(x)[:, :-1, :-1]
    transposed = np.stack(
      [
        sum(
          np.stack(
            [scipy.signal.convolve2d(image[..., i], kernel[..., i, o]) for image in inserted]
          )
          for i in range(3)
        )
        for o in range(5)
      ],
      -1,
    )
    assert transposed.shape[1:3] == (2 * 6 + 1, 2 * 4 + 1)
    expected = self.filtered(transposed, (1, 1)) * 4
    assert_close(
      jax.jit(ops.up_conv)(x.astype(np.float32), kernel.astype(np.float32)), expected, 1e-6
    )

  def test_down_conv(self, drawn):
    x, kernel = drawn
    smooth = self.filtered(x, (2, 2))
    expected = np.stack(
      [
        sum(
          np.stack(
            [
              scipy.signal.correlate2d(image[..., i], kernel[..., i, o], 'valid')
              for image in smooth
            ]
          )
          for i in range(3)
        )
        for o in range(5)
      ],
      -1,
    )[:, ::2, ::2]
    assert_close(
      jax.jit(ops.down_conv)(x.astype(np.float32), kernel.astype(np.float32)), expected, 1e-6
    )

  def test_no_dilated_or_grouped_convolution(self, tiny):
    """Those are what makes the gradients many times slower on CPU."""

    def loss(variables):
      images = TINY_G.apply(variables, tiny.z, tiny.labels)
      return TINY_D.apply(tiny.d_variables, images, tiny.labels).sum()

    text = jax.jit(jax.grad(loss)).lower(tiny.g_variables).as_text()
    for setting in ('lhs_dilate = ', 'rhs_dilate = ', '_group_count = '):
      assert set(re.findall(setting + r'\[?([\d, ]+)', text)) <= {'1, 1', '1 '}, setting
    assert text.count('stablehlo.convolution') > 10


class TestNetworks:
  def test_minibatch_std(self):
    x = np.random.default_rng(0).normal(size=(6, 4, 4, 3))
    for group in (3, 2, 8):
      size = min(group, 6)
      y = np.asarray(minibatch_std(jnp.asarray(x, jnp.float32), group))
      np.testing.assert_array_equal(y[..., :3], x.astype(np.float32))
      for n in range(6):
        members = x[n % (6 // size) :: 6 // size]
        assert len(members) == size
        expected = np.sqrt(members.var(0) + 1e-8).mean()
        np.testing.assert_allclose(y[n, ..., 3], expected, rtol=1e-5)
    with pytest.raises(UserError, match='batch of 6'):
      minibatch_std(jnp.asarray(x), 4)

  def test_minibatch_std_of_several_channels(self):
    x = np.random.default_rng(0).normal(size=(4, 2, 2, 6))
    y = np.asarray(minibatch_std(jnp.asarray(x, jnp.float32), 4, 3))
    for f in range(3):  # a statistic sees its own third of the channels
      expected = np.sqrt(x[..., 2 * f : 2 * f + 2].var(0) + 1e-8).mean()
      np.testing.assert_allclose(y[..., 6 + f], np.full((4, 2, 2), expected), rtol=1e-5)
    assert minibatch_std(jnp.asarray(x), 4, 0).shape == x.shape

  @pytest.mark.parametrize(
    'resolution, base_size, layers', [(8, 4, 2), (16, 4, 3), (32, 4, 4), (64, 4, 5), (96, 3, 6)]
  )
  def test_shapes_grey_unconditional(self, resolution, base_size, layers):
    channels = channels_for(resolution, 128, 8, base_size)
    assert len(channels) == layers and channels[-1] == min(128 // resolution, 8)
    G = Generator(
      z_dim=4, w_dim=5, num_classes=0, channels=channels, image_channels=1, base_size=base_size
    )
    D = Discriminator(num_classes=0, channels=channels, image_channels=1, base_size=base_size)
    assert G.resolution == D.resolution == resolution and G.image_shape == (
      resolution,
      resolution,
      1,
    )

    def run(key, z):
      variables = G.init(key, z)
      images = G.apply(variables, z)
      ws = G.apply(variables, z, method='mapping')
      return ws, images, D.init_with_output(key, images)[0]

    ws, images, logits = jax.eval_shape(run, jax.random.key(0), jnp.zeros((3, 4)))
    assert ws.shape == (3, G.num_ws, 5) and G.num_ws == 2 * layers
    assert images.shape == (3, resolution, resolution, 1) and logits.shape == (3,)

  def test_parameter_counts_of_the_cifar_config(self):
    def count(module, *inputs):
      shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
      return sum(x.size for x in jax.tree.leaves(shapes['params']))

    channels, labels = channels_for(32), jnp.zeros(1, int)
    assert channels == (512,) * 4
    G = Generator(z_dim=512, w_dim=512, num_classes=10, channels=channels, mapping_layers=2)
    assert count(G, jnp.zeros((1, 512)), labels) == 20_215_315
    images = jnp.zeros((1, 32, 32, 3))
    D = Discriminator(num_classes=10, channels=channels, architecture='orig')
    assert count(D, images, labels) == 23_089_664
    skips = 3 * 512 * 512  # one 1x1 kernel without bias a block
    assert count(D.clone(architecture='resnet'), images, labels) == 23_089_664 + skips

  def test_initial_laws(self):
    G = Generator(z_dim=64, w_dim=64, num_classes=4, channels=(64, 32), mapping_layers=2)
    variables = jax.jit(G.init)(
      jax.random.key(0, impl='rbg'), jnp.zeros((1, 64)), jnp.zeros(1, int)
    )
    params, buffers = variables['params'], variables['buffers']
    mapping, block = params['mapping_network'], params['synthesis_network']['b8']
    for kernel, std in (
      (mapping['fc0']['kernel'], 100.0),
      (mapping['embed']['kernel'], 1.0),
      (block['conv0']['kernel'], 1.0),
      (block['conv0']['affine']['kernel'], 1.0),
    ):
      np.testing.assert_allclose(kernel.std() / std, 1, atol=0.15)
    for name, layer in block.items():
      assert (layer['affine']['bias'] == 1).all() and (layer['bias'] == 0).all()
      if name != 'torgb':
        assert layer['noise_strength'] == 0
    assert (buffers['w_avg'] == 0).all()
    noise = buffers['synthesis_network']['b8']
    np.testing.assert_allclose(noise['conv0']['noise_const'].std(), 1, atol=0.3)
    assert (noise['conv0']['noise_const'] != noise['conv1']['noise_const']).any()

  def test_clamp(self, tiny):
    clamped = jax.jit(TINY_G.clone(conv_clamp=0.01).apply)(tiny.g_variables, tiny.z, tiny.labels)
    # Two pictures of at most .01; the up-sampling filter's weights are positive and sum to one.
    assert 0.01 < jnp.abs(clamped).max() <= 0.02 + 1e-6 < jnp.abs(tiny.images).max()

  def test_random_noise_belongs_to_the_sample(self, tiny):
    synthesis = jax.jit(
      functools.partial(TINY_G.apply, tiny.g_variables, tiny.z, tiny.labels, noise='random')
    )
    keys = jax.random.split(jax.random.key(3), 8)
    images = synthesis(noise_keys=keys)
    np.testing.assert_array_equal(synthesis(noise_keys=keys), images)
    others = synthesis(noise_keys=keys.at[2].set(jax.random.key(9)))
    changed = (others != images).any((1, 2, 3))
    np.testing.assert_array_equal(changed, np.arange(8) == 2)

  def test_truncation_may_be_traced(self, tiny):
    psis = jnp.array([0.0, 0.5, 1.0])
    mapping = lambda psi: TINY_G.apply(
      tiny.g_variables, tiny.z, tiny.labels, truncation_psi=psi, method='mapping'
    )
    ws = jax.jit(jax.vmap(mapping))(psis)
    w_avg = tiny.g_variables['buffers']['w_avg']
    np.testing.assert_allclose(ws[0], jnp.broadcast_to(w_avg, ws[0].shape), atol=1e-6)
    np.testing.assert_allclose(ws[1], (w_avg + ws[2]) / 2, atol=1e-6)

  def test_bfloat16_compute(self, tiny):
    G, D = TINY_G.clone(dtype=jnp.bfloat16), TINY_D.clone(dtype=jnp.bfloat16)
    images = jax.jit(G.apply)(tiny.g_variables, tiny.z, tiny.labels)
    assert images.dtype == jnp.float32
    error = jnp.abs(images - tiny.images).max() / jnp.ptp(tiny.images)
    assert 1e-5 < error < 0.03  # above the lower limit: the convolutions did run in bfloat16
    logits, expected = (
      jax.jit(d.apply)(tiny.d_variables, tiny.images, tiny.labels) for d in (D, TINY_D)
    )
    assert logits.dtype == jnp.float32
    assert 0 < jnp.abs(logits - expected).max() < 0.05 * jnp.abs(expected).max()
    r1 = lambda x: jnp.square(
      jax.grad(lambda x: D.apply(tiny.d_variables, x, tiny.labels).sum())(x)
    ).sum()
    assert jax.eval_shape(jax.grad(r1), tiny.images).dtype == jnp.float32

  @pytest.mark.slow
  def test_float64_and_devices(self, tiny):
    """In float64 eight devices and one compute the same images, w_avg and gradients of R1 through
    both networks."""
    with jax.enable_x64(True):
      to64 = lambda tree: jax.tree.map(lambda x: np.asarray(x, np.float64), tree)
      g_variables, d_variables = to64(tiny.g_variables), to64(tiny.d_variables)
      # Groups of one: with more, a device's samples form other groups than the whole batch does.
      D = TINY_D.clone(mbstd_group=1)
      keys = jax.random.split(jax.random.key(5), 8)

      def step(params, z, labels, keys, axis_name):
        mean = (lambda x: jax.lax.pmean(x.mean(), axis_name)) if axis_name else jnp.mean

        def loss(params):
          variables = {**g_variables, 'params': params['G']}
          ws, updated = TINY_G.apply(
            variables,
            z,
            labels,
            update_w_avg=True,
            axis_name=axis_name,
            method='mapping',
            mutable=['buffers'],
          )
          images = TINY_G.apply(variables, ws, 'random', keys, method='synthesis')
          logit_sum = lambda images: D.apply({'params': params['D']}, images, labels).sum()
          slope = jax.grad(logit_sum)(images)
          return mean(jnp.square(slope).sum((1, 2, 3))), (images, updated['buffers']['w_avg'])

        gradient, (images, w_avg) = jax.grad(loss, has_aux=True)(params)
        return images, (w_avg, gradient)

      params = {'G': g_variables['params'], 'D': d_variables['params']}
      inputs = np.asarray(tiny.z, np.float64), np.asarray(tiny.labels), keys
      alone = jax.jit(functools.partial(step, axis_name=None))(params, *inputs)
      mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
      spread = jax.jit(
        jax.shard_map(
          functools.partial(step, axis_name='data'),
          mesh=mesh,
          in_specs=(P(), P('data'), P('data'), P('data')),
          out_specs=(P('data'), P()),
        )
      )
      together = spread(params, *inputs)
      for one, eight in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
        assert one.dtype == np.float64
        np.testing.assert_allclose(eight, one, rtol=1e-9, atol=1e-9 * max(1, np.abs(one).max()))


class TestErrors:
  @pytest.mark.parametrize('resolution', [0, 4, 12, 28, 33])
  def test_resolution(self, resolution):
    with pytest.raises(UserError, match=f'resolution {resolution}'):
      channels_for(resolution)

  def test_resolution_of_another_base(self):
    with pytest.raises(UserError, match='resolution 64: expected one of 6, 12, 24, 48'):
      channels_for(64, base_size=3)

  def test_noise(self, tiny):
    with pytest.raises(UserError, match='noise'):
      TINY_G.apply(tiny.g_variables, tiny.z, tiny.labels, noise='some')
    with pytest.raises(UserError, match='noise_keys'):
      TINY_G.apply(tiny.g_variables, tiny.z, tiny.labels, noise='random')

  def test_labels(self, tiny):
    with pytest.raises(UserError, match='labels None'):
      TINY_G.apply(tiny.g_variables, tiny.z)
    with pytest.raises(UserError, match='labels of shape'):
      TINY_G.apply(tiny.g_variables, tiny.z, jnp.zeros((8, 4)))

  def test_discriminator(self, tiny):
    with pytest.raises(UserError, match='architecture'):
      TINY_D.clone(architecture='skip').apply(
        tiny.d_variables, jnp.zeros((8, 8, 8, 1)), tiny.labels
      )
    with pytest.raises(UserError, match='images of shape'):
      TINY_D.apply(tiny.d_variables, jnp.zeros((8, 28, 28, 1)), tiny.labels)
    with pytest.raises(UserError, match='channels'):
      TINY_D.clone(channels=(8,)).apply(tiny.d_variables, jnp.zeros((8, 4, 4, 1)), tiny.labels)
