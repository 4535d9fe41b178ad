"""What is computed in another way on accelerators gives the numbers that it gives on CPU."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from palm_jax import pretrain, resnet, simsiam, worlds
from palm_jax.base import devices
from palm_jax.generator import LoadedGenerator, ops, views
from palm_jax.generator.stylegan2 import Generator
from palm_jax.layers import convolution, normalization
from palm_jax.resnet import ResNet
from tests.test_simsiam import TinyEncoder
from tests.worlds import LinearGenerator, tiny_config


@pytest.fixture
def on(monkeypatch):
  """A function that makes the code believe in another platform."""

  def believe(name):
    for module in (devices, ops, convolution, normalization):
      monkeypatch.setattr(module, 'platform', lambda: name)

  return believe


def assert_alike(found, expected, rtol=1e-9):
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol), found, expected)


def in_float64(tree):
  return jax.tree.map(
    lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
  )


def test_a_generator_and_its_gradient(on):
  network = Generator(
    z_dim=6, w_dim=5, num_classes=3, channels=(6, 4, 4), mapping_layers=2, conv_clamp=0.3
  )
  labels, psi = jnp.arange(4) % 3, 0.7
  with jax.enable_x64(True):
    z = jnp.asarray(np.random.default_rng(0).standard_normal((4, 6)))
    variables = in_float64(jax.jit(network.init)(jax.random.key(0), z, labels))
    strength = variables['params']['synthesis_network']['b8']['conv1']
    strength['noise_strength'] += 0.5

    def outcome(prepare):
      def loss(params):
        whole = dict(variables, params=params)
        images: jax.Array = network.apply(
          network.prepared(whole) if prepare else whole, z, labels, psi
        )  # pyright: ignore[reportAssignmentType]
        return jnp.sum(images**3), images

      return jax.jit(jax.grad(loss, has_aux=True))(variables['params'])

    expected = outcome(False)
    on('gpu')
    assert_alike(outcome(False), expected)
    assert_alike(outcome(True), expected)


def test_prepared_kernels_are_of_the_convolutions_type():
  network = Generator(z_dim=4, w_dim=4, num_classes=0, channels=(4, 4), dtype=jnp.bfloat16)
  variables = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 4)))
  ready = jax.eval_shape(network.prepared, variables)['prepared']['synthesis_network']
  assert sorted(ready) == ['b4', 'b8'] and sorted(ready['b8']) == ['conv0', 'conv1']
  conv = ready['b8']['conv0']
  assert (conv['kernel'].dtype, conv['energy'].dtype) == (jnp.bfloat16, jnp.float32)
  assert conv['energy'].shape == (4, 4)


def test_views_prepare_the_generator_within():
  network = Generator(z_dim=4, w_dim=4, num_classes=2, channels=(4, 4), mapping_layers=1)
  z, labels = jnp.ones((2, 4)), jnp.arange(2)
  generator = LoadedGenerator(network, jax.jit(network.init)(jax.random.key(0), z, labels))
  inner = lambda variables: variables.get('generator', variables)
  for view in (
    views.cropped(generator, 1),
    views.style_mixed(generator, 2),
    views.w_latents(generator, samples=64),
    views.prompts(generator, np.eye(2)),
  ):
    ready = views.prepared(view, view.variables)
    assert 'prepared' in inner(ready) and 'prepared' not in inner(view.variables)
    np.testing.assert_allclose(
      jax.jit(view.apply)(ready, z, labels), jax.jit(view.apply)(view.variables, z, labels), 1e-5
    )
  assert views.prepared(LinearGenerator(), generator) is generator


@pytest.mark.parametrize('platform', ['cpu', 'gpu', 'tpu'])
@pytest.mark.parametrize('train', [True, False])
def test_a_relu_behind_batch_normalisation(on, platform, train):
  on(platform)
  with jax.enable_x64(True):
    draw = np.random.default_rng(0)
    x, w = (jnp.asarray(draw.normal(size=(16, 4, 5, 3))) for _ in range(2))
    pick = lambda: jnp.asarray(draw.normal(size=3))  # scales of both signs
    variables = dict(
      params=dict(scale=pick(), bias=pick()), batch_stats=dict(mean=pick(), var=pick() ** 2)
    )
    flaxes = nn.BatchNorm(not train, momentum=0.9, epsilon=1e-5)
    ours = normalization.BatchNorm(not train, relu=True)

    def outcome(apply):
      def loss(params, x):
        y, changed = apply(dict(variables, params=params), x)
        return jnp.sum(w * y**2), (y, changed)

      return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(variables['params'], x)

    def expected(variables, x):
      y, changed = flaxes.apply(variables, x, mutable=['batch_stats'])
      return nn.relu(y), changed

    found = outcome(functools.partial(ours.apply, mutable=['batch_stats']))
    assert_alike(found, outcome(expected))


@pytest.mark.parametrize('depth, stem', [(18, 'cifar'), (50, 'imagenet')])
def test_statistics_folded_into_convolutions(depth, stem, monkeypatch):
  monkeypatch.setitem(resnet.BLOCKS, depth, (2, 1, 1, 1))  # with a projection, and without
  network = ResNet(width=2, depth=depth, stem=stem)
  with jax.enable_x64(True):
    images = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 3)))
    variables = jax.jit(functools.partial(network.init, train=False))(jax.random.key(0), images)
    leaves, tree = jax.tree.flatten(in_float64(variables))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    leaves = [x + 0.3 * jax.random.uniform(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    variables = tree.unflatten(leaves)
    folded, theirs = network.fold(variables)
    assert 'batch_stats' not in theirs
    see = lambda network, variables: jax.jit(
      lambda variables: network.apply(variables, images, train=False)
    )(variables)
    assert_alike(see(folded, theirs), see(network, variables))


@pytest.mark.parametrize('objective', ['simsiam', 'byol'])
def test_two_views_at_once_on_two_devices(on, objective):
  """Each with the statistics of its own batch; the running ones see first the first."""
  config = simsiam.default_config()
  config.update(proj_hidden=6, proj_dim=5, pred_hidden=4, objective=objective)
  modules = simsiam.make_modules(TinyEncoder('data'), config, 'data')
  with jax.enable_x64(True):
    draw = np.random.default_rng(0)
    s, s_next = (jnp.asarray(draw.uniform(-1, 1, (16, 8, 8, 3))) for _ in range(2))
    outside = simsiam.make_modules(TinyEncoder(), config)
    params, stats = in_float64(simsiam.init(outside, jax.random.key(0), s))
    stats = jax.tree.map(lambda x: x + 0.2, stats)
    target = simsiam.first_target(params, config).get('target')

    def local(params, s, s_next):
      def loss(params):
        params = jax.lax.pcast(params, 'data', to='varying')
        return simsiam.forward(
          modules,
          params,
          stats,
          s,
          s_next,
          axis_name='data',
          target=target,
          **simsiam.options(config),
        )

      grads, aux = jax.grad(loss, has_aux=True)(params)
      return grads, aux.batch_stats, aux.metrics, (aux.h, aux.h_next, aux.z, aux.z_next)

    def outcome():
      sharded = jax.shard_map(
        local,
        mesh=devices.make_mesh(2),
        in_specs=(P(), P('data'), P('data')),
        out_specs=(P(), P(), P(), P('data')),
      )
      return jax.jit(sharded)(params, s, s_next)

    expected = outcome()
    on('gpu')
    assert_alike(outcome(), expected, rtol=1e-8)


@pytest.mark.slow
def test_the_whole_pretraining(on):
  """Eight devices, float64: warm-up, acting with folded statistics, learning."""
  config = tiny_config()
  config.pretrain.dtype = 'float64'
  with jax.enable_x64(True):
    mesh, generator = devices.make_mesh(), LinearGenerator()

    def outcome():
      program = pretrain.make_program(config, generator, mesh)
      world = worlds.make_world(config, generator, mesh)
      state = program.init(jax.random.key(0), world)
      for _ in range(2):
        state, output = program.call(state, world)
      return jax.device_get((state.ssl, state.agent, state.ring, state.frames, output.metrics))

    expected = outcome()
    on('gpu')
    assert_alike(outcome(), expected, rtol=1e-6)
