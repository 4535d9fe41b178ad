import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from palm_jax import simsiam
from palm_jax.base.errors import UserError

P = jax.sharding.PartitionSpec


class TinyEncoder(nn.Module):
  """One convolution with batch statistics: enough to tell one view's statistics from another's."""

  axis_name: str | None = None

  @nn.compact
  def __call__(self, images, train):
    x = nn.Conv(6, (3, 3), use_bias=False, name='conv')(images)
    x = nn.BatchNorm(not train, momentum=0.9, epsilon=1e-5, axis_name=self.axis_name, name='norm')(
      x
    )
    return nn.relu(x).mean(axis=(1, 2))


def small_config(**changes):
  config = simsiam.default_config()
  config.update(proj_hidden=12, proj_dim=10, pred_hidden=7, **changes)
  return config


def small_modules(axis_name=None):
  return simsiam.make_modules(TinyEncoder(axis_name), small_config(), axis_name)


def count(module, features):
  variables = jax.eval_shape(
    lambda: module.init(jax.random.key(0), jnp.zeros((2, features)), train=False)
  )
  return sum(x.size for x in jax.tree.leaves(variables.get('params')))


def cosine(a, b):
  return np.sum(a * b, -1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


@pytest.fixture(scope='module')
def setup():
  """(modules, params, batch_stats, s, s_next) with pairs that differ."""
  rng = np.random.default_rng(0)
  s, s_next = (rng.uniform(-1, 1, (16, 4, 4, 3)).astype(np.float32) for _ in range(2))
  modules = small_modules()
  return modules, *simsiam.init(modules, jax.random.key(0), s), s, 0.5 * s + 0.5 * s_next


@pytest.fixture(scope='module')
def vectors():
  return [np.random.default_rng(i).normal(size=(8, 5)).astype(np.float32) for i in range(4)]


def test_parameter_counts():
  # Linear 512-2048-2048 without bias, scale and offset of the hidden normalisation alone.
  assert count(simsiam.Projector(), 512) == 512 * 2048 + 2 * 2048 + 2048 * 2048
  assert count(simsiam.Projector(layers=3), 512) == 512 * 2048 + 2 * (2048 * 2048 + 2 * 2048)
  assert count(simsiam.Projector(output_affine=True), 512) == 512 * 2048 + 2048 * 2048 + 4 * 2048
  assert count(simsiam.Projector(output_norm=False), 512) == count(simsiam.Projector(), 512)
  assert count(simsiam.Predictor(), 2048) == 2048 * 512 + 2 * 512 + 512 * 2048 + 2048
  with pytest.raises(UserError, match='proj_layers=4'):
    simsiam.make_modules(TinyEncoder(), small_config(proj_layers=4))


def test_loss_is_negative_cosine(vectors):
  p1, z1, p2, z2 = vectors
  expected = -(cosine(p1, z2).mean() + cosine(p2, z1).mean()) / 2
  np.testing.assert_allclose(simsiam.loss(p1, z1, p2, z2), expected, atol=1e-6)
  np.testing.assert_allclose(simsiam.loss(p2, z2, p1, z1), expected, atol=1e-6)
  np.testing.assert_allclose(
    simsiam.loss(p1, z1, p2, z2, symmetric=False), -cosine(p1, z2).mean(), atol=1e-6
  )
  # The ends of its range, at any length of the vectors.
  np.testing.assert_allclose(simsiam.loss(p1, p2, 3 * p2, 1e-3 * p1), -1, atol=1e-6)
  np.testing.assert_allclose(simsiam.loss(p1, -p2, p2, -p1), 1, atol=1e-6)
  assert simsiam.loss(*(jnp.asarray(v, jnp.bfloat16) for v in vectors)).dtype == jnp.float32


def test_targets_get_no_gradient(vectors):
  for symmetric in (True, False):
    gradient = jax.grad(
      lambda *v, symmetric=symmetric: simsiam.loss(*v, symmetric=symmetric), (0, 1, 2, 3)
    )(*vectors)
    largest = [float(jnp.abs(g).max()) for g in gradient]
    assert largest[1] == largest[3] == 0 and largest[0] > 0
    assert (largest[2] > 0) == symmetric
  # One direction in closed form: d(-cos)/dp = -(z/|z| - cos p/|p|) / |p|.
  p, _, _, z = vectors
  gradient = jax.grad(lambda p: simsiam.loss(p, None, None, z, symmetric=False))(jnp.asarray(p))
  length = np.linalg.norm(p, axis=1, keepdims=True)
  expected = (
    -(z / np.linalg.norm(z, axis=1, keepdims=True) - cosine(p, z)[:, None] * p / length)
    / length
    / len(p)
  )
  np.testing.assert_allclose(gradient, expected, atol=1e-6)


def numpy_forward(params, batch_stats, views):
  """Train-mode forward of the views one after the other, float64 numpy after the encoder's
  convolution."""
  params, stats = jax.tree.map(lambda x: np.asarray(x, np.float64), (params, batch_stats))
  out = []

  def norm(x, name, layer, axes=(0,)):
    mean, var = x.mean(axes), x.var(axes)
    old = stats[name][layer]
    stats[name][layer] = {
      'mean': 0.9 * old['mean'] + 0.1 * mean,
      'var': 0.9 * old['var'] + 0.1 * var,
    }
    affine = params[name].get(layer, {'scale': 1, 'bias': 0})
    return (x - mean) / np.sqrt(var + 1e-5) * affine['scale'] + affine['bias']

  for view in views:
    x = np.pad(np.asarray(view, np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))  # (B, 4, 4, C, 3, 3)
    x = np.einsum('byxcij,ijco->byxo', windows, params['encoder']['conv']['kernel'])
    h = np.maximum(norm(x, 'encoder', 'norm', (0, 1, 2)), 0).mean((1, 2))
    x = np.maximum(norm(h @ params['projector']['linear1']['kernel'], 'projector', 'norm1'), 0)
    z = x @ params['projector']['linear2']['kernel']
    if 'norm2' in stats['projector']:
      z = norm(z, 'projector', 'norm2')
    x = np.maximum(norm(z @ params['predictor']['linear1']['kernel'], 'predictor', 'norm1'), 0)
    out.append(
      (h, z, x @ params['predictor']['linear2']['kernel'] + params['predictor']['linear2']['bias'])
    )
  return out, stats


def test_forward_agrees_with_numpy(setup):
  """Separate statistics for each view, running statistics one view after the other, loss and every
  metric."""
  modules, params, batch_stats, s, s_next = setup
  ((h, z, p), (h_next, z_next, p_next)), stats = numpy_forward(params, batch_stats, (s, s_next))
  value, aux = jax.jit(lambda p, b: simsiam.forward(modules, p, b, s, s_next))(params, batch_stats)
  np.testing.assert_allclose(
    value, -(cosine(p, z_next).mean() + cosine(p_next, z).mean()) / 2, atol=1e-5
  )
  np.testing.assert_allclose(aux.h, h, atol=1e-5)
  np.testing.assert_allclose(aux.h_next, h_next, atol=1e-5)
  np.testing.assert_allclose(aux.z, z, atol=1e-3)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), aux.batch_stats, stats)
  unit = z / np.linalg.norm(z, axis=1, keepdims=True)
  expected = {
    'loss': float(value),
    'z_std': unit.std(0).mean(),
    'z_std_ratio': unit.std(0).mean() * np.sqrt(10),
    'h_cosine': cosine(h, h_next).mean(),
  }
  assert set(aux.metrics) == set(expected)
  for name, number in expected.items():
    np.testing.assert_allclose(aux.metrics[name], number, atol=1e-4, err_msg=name)


def test_views_do_not_share_statistics(setup):
  modules, params, batch_stats, s, s_next = setup
  forward = jax.jit(lambda s, s_next: simsiam.forward(modules, params, batch_stats, s, s_next)[1])
  first, second = forward(s, s_next), forward(s, 3 * s_next - 1)
  np.testing.assert_array_equal(first.h, second.h)
  np.testing.assert_array_equal(first.z, second.z)


def test_forward_modes(setup):
  modules, params, batch_stats, s, s_next = setup
  forward = jax.jit(
    lambda p, **modes: simsiam.forward(modules, p, batch_stats, s, s_next, **modes),
    static_argnames=('train', 'symmetric'),
  )
  _, aux = forward(params, train=False)
  jax.tree.map(np.testing.assert_array_equal, aux.batch_stats, batch_stats)
  h = modules.encoder.apply(
    {'params': params['encoder'], 'batch_stats': batch_stats['encoder']}, s, train=False
  )
  np.testing.assert_allclose(aux.h, h, atol=1e-6)

  ((_, _, p), (_, z_next, _)), _ = numpy_forward(params, batch_stats, (s, s_next))
  value, aux = forward(params, symmetric=False)
  np.testing.assert_allclose(value, -cosine(p, z_next).mean(), atol=1e-5)
  _, stats = numpy_forward(params, batch_stats, (s,))
  np.testing.assert_allclose(
    aux.batch_stats['predictor']['norm1']['mean'], stats['predictor']['norm1']['mean'], atol=1e-5
  )  # the predictor has seen s alone


def test_aux_carries_no_gradient(setup):
  modules, params, batch_stats, s, s_next = setup

  def leak(params):
    aux = simsiam.forward(modules, params, batch_stats, s, s_next)[1]
    return sum(jnp.sum(x**2) for x in (aux.h, aux.h_next, aux.z, *aux.metrics.values()))

  assert all(not np.any(g) for g in jax.tree.leaves(jax.jit(jax.grad(leak))(params)))


class FlatEncoder(nn.Module):
  """No batch statistics at all, like the Nature CNN."""

  @nn.compact
  def __call__(self, images, train):
    return nn.Dense(6)(images.reshape(len(images), -1))


def test_bfloat16_heads_and_encoder_without_statistics(setup):
  s, s_next = setup[3:]
  results = []
  for dtype in (None, jnp.bfloat16):
    modules = simsiam.make_modules(FlatEncoder(), small_config(), dtype=dtype)
    params, batch_stats = simsiam.init(modules, jax.random.key(0), s)
    (value, aux), gradient = jax.jit(
      jax.value_and_grad(
        lambda p, m=modules, b=batch_stats: simsiam.forward(m, p, b, s, s_next), has_aux=True
      )
    )(params)
    assert batch_stats['encoder'] == aux.batch_stats['encoder'] == {}
    assert {x.dtype for x in jax.tree.leaves((value, gradient, aux.batch_stats))} == {
      jnp.dtype('float32')
    }
    results.append(value)
  np.testing.assert_allclose(results[1], results[0], atol=0.02)


def test_equal_images_collapse_without_nan(setup):
  modules, params, batch_stats, s, _ = setup
  same = np.broadcast_to(s[:1], s.shape)
  (value, aux), gradient = jax.jit(
    jax.value_and_grad(lambda p: simsiam.forward(modules, p, batch_stats, same, same), has_aux=True)
  )(params)
  assert aux.metrics['z_std_ratio'] < 1e-3 and np.isfinite(value)
  assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(gradient))


def test_eight_devices_are_one():
  """Loss, metrics, statistics, gradients and the norm of these, in float64; a collective too many
  would inflate it."""
  with jax.enable_x64(True):
    rng = np.random.default_rng(0)
    s = rng.uniform(-1, 1, (16, 4, 4, 3))
    s_next = 0.5 * s + 0.5 * rng.uniform(-1, 1, s.shape)
    params, batch_stats = jax.tree.map(
      lambda x: jnp.asarray(x, jnp.float64), simsiam.init(small_modules(), jax.random.key(0), s)
    )

    def step(axis_name):
      modules = small_modules(axis_name)

      def step(params, batch_stats, s, s_next):
        (_, aux), gradient = jax.value_and_grad(
          lambda p: simsiam.forward(modules, p, batch_stats, s, s_next, axis_name=axis_name),
          has_aux=True,
        )(params)
        return (aux.h, aux.h_next, aux.z), (
          aux.metrics,
          aux.batch_stats,
          gradient,
          optax.tree.norm(gradient),
        )

      return step

    mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.shard_map(
      step('data'), mesh=mesh, in_specs=(P(), P(), P('data'), P('data')), out_specs=(P('data'), P())
    )
    one, eight = (
      jax.jit(step(None))(params, batch_stats, s, s_next),
      jax.jit(sharded)(params, batch_stats, s, s_next),
    )
    assert {x.dtype for x in jax.tree.leaves(eight)} == {jnp.dtype('float64')}
    assert one[1][3] > 1e-3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-10, atol=1e-12), one, eight)
