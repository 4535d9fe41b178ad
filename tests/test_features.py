import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from palm_jax.base.errors import UserError
from palm_jax.evaluate import features

IMAGES = np.random.default_rng(0).integers(0, 256, (37, 4, 4, 3), dtype=np.uint8)
WEIGHT = np.random.default_rng(1).normal(size=(48, 5)).astype(np.float32)


def linear(weight, images):
  return (images.reshape(len(images), -1).astype(weight.dtype) / 127.5 - 1) @ weight


def truth(images=IMAGES, weight=WEIGHT):
  return (images.reshape(len(images), -1).astype(np.float64) / 127.5 - 1) @ weight.astype(
    np.float64
  )


def mesh_of(count):
  return Mesh(np.array(jax.devices()[:count]), ('data',))


@pytest.mark.parametrize('batch_size', [1, 8, 37, 512])
def test_order_is_kept_and_the_padding_is_cut(batch_size):
  got = features.extract(jax.tree_util.Partial(linear, WEIGHT), IMAGES, batch_size)
  assert got.dtype == np.float32
  assert got.shape == (37, 5)
  np.testing.assert_allclose(got, truth(), atol=1e-4)


def test_one_compilation_for_all_batches_and_for_new_variables():
  traced = []

  def counted(weight, images):
    traced.append(images.shape)
    return linear(weight, images)

  features.extract(jax.tree_util.Partial(counted, WEIGHT), IMAGES, batch_size=8)
  second = features.extract(jax.tree_util.Partial(counted, 2 * WEIGHT), IMAGES, batch_size=8)
  assert traced == [(8, 4, 4, 3)]
  np.testing.assert_allclose(second, truth(weight=2 * WEIGHT), atol=1e-4)


@pytest.mark.parametrize('batch_size', [16, 13, 3])
def test_eight_devices_equal_one(batch_size):
  apply_fn = jax.tree_util.Partial(linear, WEIGHT)
  one = features.extract(apply_fn, IMAGES, batch_size, mesh_of(1))
  eight = features.extract(apply_fn, IMAGES, batch_size, mesh_of(8))
  np.testing.assert_allclose(eight, one, atol=1e-5)
  np.testing.assert_allclose(eight, truth(), atol=1e-4)


def test_batches_are_split_over_the_mesh():
  shards = []

  def seen(images):
    jax.debug.inspect_array_sharding(
      images, callback=lambda s: shards.append(s.shard_shape((16, 4, 4, 3)))
    )
    return images.reshape(len(images), -1).astype(jnp.float32)

  features.extract(seen, IMAGES, batch_size=16, mesh=mesh_of(8))
  assert shards == [(2, 4, 4, 3)]


def test_a_closure_over_arrays_works_with_and_without_a_mesh():
  weight = jnp.asarray(WEIGHT)
  apply_fn = lambda images: linear(weight, images)
  for mesh in (None, mesh_of(8)):
    np.testing.assert_allclose(features.extract(apply_fn, IMAGES, 8, mesh), truth(), atol=1e-4)


def test_bfloat16_features_come_back_as_float32():
  got = features.extract(
    jax.tree_util.Partial(linear, jnp.asarray(WEIGHT, jnp.bfloat16)), IMAGES, 16
  )
  assert got.dtype == np.float32
  assert np.abs(got - truth()).max() < 0.05 * np.abs(truth()).max()


def test_pixels_are_the_flattened_images_from_minus_one_to_one():
  images = np.array([0, 255, 51, 204], np.uint8).reshape(2, 1, 2, 1)
  got = features.pixels(images)
  assert got.dtype == np.float32
  np.testing.assert_allclose(got, [[-1, 1], [-0.6, 0.6]], atol=1e-6)


@pytest.mark.parametrize(
  'images, batch_size, message',
  [
    (IMAGES.astype(np.float32), 8, 'float32'),
    (IMAGES[0], 8, r'\(4, 4, 3\)'),
    (IMAGES[:0], 8, 'non-empty'),
    (IMAGES, 0, 'batch_size is 0'),
  ],
)
def test_bad_input_is_named(images, batch_size, message):
  with pytest.raises(UserError, match=message):
    features.extract(jax.tree_util.Partial(linear, WEIGHT), images, batch_size)


def test_feature_maps_are_refused():
  with pytest.raises(UserError, match=r'\(8, 4, 4, 3\)'):
    features.extract(lambda images: images.astype(jnp.float32), IMAGES, 8)


@pytest.fixture
def variables():
  return {
    'params': {'conv': {'kernel': jnp.ones((2, 3))}},
    'batch_stats': {'bn': {'mean': jnp.array([0.0, jnp.nan])}},
  }


def test_frozen_variables_pass(variables):
  features.assert_frozen(jax.device_get(variables), jax.tree.map(lambda x: x + 0, variables))


@pytest.mark.parametrize(
  'change',
  [lambda x: np.nextafter(x, np.float32(9)), lambda x: x.astype(np.float16), lambda x: x[:1]],
)
def test_a_changed_batch_statistic_is_caught(variables, change):
  after = jax.device_get(variables)
  after['batch_stats']['bn']['mean'] = change(after['batch_stats']['bn']['mean'])
  with pytest.raises(AssertionError, match=r"\['batch_stats'\]\['bn'\]\['mean'\]"):
    features.assert_frozen(variables, after)


def test_a_missing_leaf_is_caught(variables):
  with pytest.raises(AssertionError, match='batch_stats'):
    features.assert_frozen(variables, {'params': variables['params']})
