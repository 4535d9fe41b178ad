"""Adaptive augmentation against arrays of the official implementation, the laws of its draws, and
its promises.

The reference arrays (shared/fixtures/stylegan2) hold the official pipe with every draw at a fixed
percentile.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.spatial
import scipy.special
import scipy.stats
from jax.sharding import PartitionSpec as P

from palm_jax.base.errors import UserError
from palm_jax.generator import adaptive_augment as ada
from palm_jax.generator import transforms

GEOMETRIC = ada.PIPES['bg']
BGC = ada.PIPES['bgc']


def percentile_draws(q, ops, count, size):
  """What the official pipe draws at percentile q (its normal draws lack the square root of 2), zero
  for other ops."""
  normal, uniform = scipy.special.erfinv(2 * q - 1), 2 * q - 1
  height, width = size
  values = dict(
    xflip=[np.floor(2 * q)],
    rotate90=[np.floor(4 * q)],
    xint=[np.round(uniform / 8 * width), np.round(uniform / 8 * height)],
    scale=[0.2 * normal],
    rotate=[uniform * np.pi, 0],
    aniso=[0.2 * normal],
    xfrac=[normal * width / 8, normal * height / 8],
    brightness=[0.2 * normal],
    contrast=[0.5 * normal],
    lumaflip=[np.floor(2 * q)],
    hue=[uniform * np.pi],
    saturation=[normal],
  )
  return {op: np.tile(np.float32(values[op]) * (op in ops), (count, 1)) for op in BGC}


@jax.jit
def execute(images, draws):
  return transforms.apply_colour(
    transforms.apply_geometry(images, ada.geometry(draws)), ada.colour(draws)
  )


@functools.partial(jax.jit, static_argnames='ops')
def augment(images, seeds, p, ops=BGC):
  return ada.augment(images, jax.vmap(jax.random.key)(seeds), p, ops)


@pytest.fixture(scope='module')
def official(shared):
  with np.load(shared / 'fixtures' / 'stylegan2' / 'e_ada_percentile.npz') as file:
    return {name: np.moveaxis(x, 1, -1) if x.ndim == 4 else x for name, x in file.items()}


@pytest.fixture(scope='module')
def pictures():
  return np.random.default_rng(0).uniform(-1, 1, (8, 8, 8, 3))


def one_draw(op, *values):
  return {op: np.array([values], np.float32)}


# ---- the official pipe


@pytest.mark.parametrize('name', (*BGC, 'bg', 'color', 'bgc'))
def test_official_pipe(official, name):
  ops = ada.PIPES.get(name, (name,))
  cases = [('images', f'{name}/{q}', q) for q in (0.1, 0.3, 0.6, 0.9)] + [
    ('images_gray', f'{name}/gray/0.6', 0.6)
  ]
  for images, case, q in cases:
    actual = execute(official[images], percentile_draws(q, ops, 4, (32, 32)))
    # Coordinates near 100 are good to 1e-5 in single precision; the colours of bgc/0.9 then stretch
    # the range.
    np.testing.assert_allclose(actual, official[case], rtol=0, atol=2e-5, err_msg=case)


def test_official_image_gradient(official):
  draws = percentile_draws(0.6, BGC, 4, (32, 32))
  gradient = jax.jit(jax.grad(lambda x: (execute(x, draws) * official['grad_R']).sum()))(
    official['images']
  )
  expected = official['bgc_grad/0.6']
  np.testing.assert_allclose(gradient, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_filter(official):
  taps, k = np.array(transforms.SYM6), np.arange(12)
  np.testing.assert_allclose(taps / taps.sum(), official['Hz_geom'], rtol=1e-6)
  assert np.isclose(taps.sum(), 2**0.5, rtol=1e-12)
  for shift in range(6):  # orthonormal to its own even shifts
    assert np.isclose(taps[2 * shift :] @ taps[: 12 - 2 * shift], shift == 0, atol=1e-11)
  moments = [
    (-1.0) ** k * taps @ k**power for power in range(7)
  ]  # of the high-pass that goes with it
  assert np.abs(moments[:6]).max() < 1e-8 and abs(moments[6]) > 1


# ---- geometry and colour against numpy


def test_moves_are_those_of_numpy(pictures):
  wide = np.float32(np.random.default_rng(1).uniform(-1, 1, (1, 16, 24, 2)))
  warp = jax.jit(lambda images, draws: transforms.apply_geometry(images, ada.geometry(draws)))
  reflected = np.pad(wide, ((0, 0), (15, 15), (23, 23), (0, 0)), mode='reflect')
  for right, down in (
    (2, 0),
    (0, 3),
    (-14, 6),
  ):  # the filter reaches 6 further; beyond 23 and 15 there are zeros
    expected = reflected[:, 15 - down : 31 - down, 23 - right : 47 - right]
    np.testing.assert_allclose(warp(wide, one_draw('xint', right, down)), expected, atol=1e-5)
  assert not np.any(warp(wide, one_draw('xint', 80, 0)))
  # Mirrored and turned, the two filters no longer undo each other, as sym6 is not quite symmetric:
  # smooth pictures only.
  y, x = np.mgrid[:16, :16] * (np.pi / 15)
  smooth = np.float32(np.cos(x) + np.cos(2 * y) / 2 + np.cos(x) * np.cos(y))[None, :, :, None]
  np.testing.assert_allclose(warp(smooth, one_draw('xflip', 1)), smooth[:, :, ::-1], atol=0.05)
  np.testing.assert_allclose(
    warp(smooth, one_draw('rotate90', 1)), np.rot90(smooth, 1, (1, 2)), atol=0.05
  )


def test_transforms_are_those_of_the_paper():
  """arXiv 2006.06676, appendix B: the inverse of geometry, from output to input, and colours."""
  count, size = 12, (32, 16)
  keys = jax.vmap(jax.random.key)(np.arange(count))
  draws = jax.device_get(ada.draw(keys, 1.0, BGC, size))
  geometry, colour = ada.geometry(draws), ada.colour(draws)
  axis = np.ones(3) / np.sqrt(3)
  for i in range(count):
    value = {op: np.asarray(draws[op][i], np.float64) for op in BGC}
    turn = lambda angle: scipy.linalg.block_diag(
      [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]], 1
    )
    scale = lambda x, y: np.diag([x, y, 1])
    move = lambda xy: np.array([[1, 0, xy[0]], [0, 1, xy[1]], [0, 0, 1]])
    whole, wide = 2 ** value['scale'][0], 2 ** value['aniso'][0]
    steps = [  # what is done to a picture, in order; its rows grow downwards
      scale(1 - 2 * value['xflip'][0], 1),
      turn(-np.pi / 2 * value['rotate90'][0]),
      move(value['xint']),
      scale(whole, whole),
      turn(-value['rotate'][0]),
      scale(wide, 1 / wide),
      turn(-value['rotate'][1]),
      move(value['xfrac']),
    ]
    forward = functools.reduce(lambda done, step: step @ done, steps)
    np.testing.assert_allclose(geometry[i], np.linalg.inv(forward), rtol=1e-3, atol=1e-4)
    along = np.outer(axis, axis)
    hue = scipy.spatial.transform.Rotation.from_rotvec(value['hue'][0] * axis).as_matrix()
    linear = (
      (along + (np.eye(3) - along) * 2 ** value['saturation'][0])
      @ hue
      @ (np.eye(3) - 2 * along * value['lumaflip'][0])
      * 2 ** value['contrast'][0]
    )
    np.testing.assert_allclose(colour[i][:3, :3], linear, rtol=1e-3, atol=1e-4)
    offset = linear @ np.full(3, value['brightness'][0])
    np.testing.assert_allclose(colour[i][:3, 3], offset, rtol=1e-3, atol=1e-4)
  assert all(np.abs(draws[op]).max() > 0 for op in BGC)


def test_colours_of_other_channel_counts_are_those_of_grey():
  images = np.float32(np.random.default_rng(1).uniform(-1, 1, (3, 4, 4, 4)))
  draws = percentile_draws(0.6, ada.PIPES['color'], 3, (4, 4))
  matrices = jax.jit(ada.colour)(draws)
  stacked = transforms.apply_colour(images, matrices)
  for channel in range(4):
    np.testing.assert_array_equal(
      transforms.apply_colour(images[..., channel : channel + 1], matrices)[..., 0],
      stacked[..., channel],
    )
  value = {op: draws[op][0, 0] for op in draws}
  expected = -(images + value['brightness']) * 2 ** value['contrast']  # .6 flips luma
  np.testing.assert_allclose(stacked, expected, rtol=1e-5, atol=1e-6)


# ---- draws


@pytest.fixture(scope='module')
def half():
  """Draws of 20000 samples with p = 1/2 for images of 16 x 32, as float64."""
  draws = jax.jit(lambda keys, p: ada.draw(keys, p, BGC, (16, 32)))
  keys = jax.random.split(jax.random.key(0), 20_000)
  return {
    p: {op: np.asarray(x, float) for op, x in draws(keys, p).items()} for p in (0.5, 1.0, 1.7)
  }


def assert_share(happened, expected):
  """Within five standard deviations of a share of independent samples."""
  assert abs(np.mean(happened) - expected) < 5 * np.sqrt(expected * (1 - expected) / len(happened))


def assert_law(values, expected):
  assert scipy.stats.kstest(values, expected.cdf).pvalue > 1e-4


def test_discrete_draws(half):
  draws = half[0.5]
  for op in ('xflip', 'lumaflip'):
    assert set(np.unique(draws[op])) == {0, 1}
    assert_share(draws[op][:, 0] == 1, 1 / 4)
  for turns, share in enumerate((1 / 2 + 1 / 8, 1 / 8, 1 / 8, 1 / 8)):
    assert_share(draws['rotate90'][:, 0] == turns, share)
  right, down = draws['xint'].T
  for values, largest in ((right, 4), (down, 2)):
    for shift in range(
      -largest, largest + 1
    ):  # the outermost are rounded from half as long an interval
      share = 1 / (2 * largest) / (2 if abs(shift) == largest else 1)
      assert_share(values == shift, share / 2 + (shift == 0) / 2)
    assert np.abs(values).max() == largest and np.all(values % 1 == 0)
  assert_share((right == 0) & (down == 0), 1 / 2 + 1 / 2 / 8 / 4)  # both axes move or neither


def test_continuous_draws(half):
  draws, angle = half[0.5], scipy.stats.uniform(-np.pi, 2 * np.pi)
  laws = dict(
    scale=scipy.stats.norm(0, 0.2),
    aniso=scipy.stats.norm(0, 0.2),
    brightness=scipy.stats.norm(0, 0.2),
    contrast=scipy.stats.norm(0, 0.5),
    hue=angle,
    saturation=scipy.stats.norm(0, 1),
  )
  for op, law in laws.items():
    happened = draws[op][:, 0] != 0
    assert_share(happened, 1 / 2)
    assert_law(draws[op][happened, 0], law)
  happened = draws['xfrac'][:, 0] != 0
  assert_share(happened, 1 / 2)
  np.testing.assert_array_equal(happened, draws['xfrac'][:, 1] != 0)
  for axis, size in enumerate((32, 16)):
    assert_law(draws['xfrac'][happened, axis], scipy.stats.norm(0, size / 8))

  before, after = draws['rotate'].T
  for values in (before, after):
    assert_share(values != 0, 1 - np.sqrt(1 / 2))
    assert_law(values[values != 0], angle)
  assert_share((before != 0) | (after != 0), 1 / 2)


def test_draws_are_independent(half):
  values = np.concatenate([half[0.5][op] for op in BGC], 1)
  for table in (values, np.abs(values)):  # the second sees whether operations happen together
    correlations = np.corrcoef(table.T) - np.eye(table.shape[1])
    columns = [op for op in BGC for _ in range(half[0.5][op].shape[1])]
    for (i, a), (j, b) in itertools.combinations(enumerate(columns), 2):
      if a != b or a == 'rotate':
        assert abs(correlations[i, j]) < 5 / np.sqrt(len(values)), (a, b)


def test_probability_above_one_is_one(half):
  for op in BGC:
    np.testing.assert_array_equal(half[1.7][op], half[1.0][op])
  assert np.all(half[1.0]['scale'] != 0) and np.all(half[1.0]['rotate'] != 0)


def test_draws_do_not_depend_on_the_other_operations():
  keys = jax.random.split(jax.random.key(1), 5)
  draw = jax.jit(ada.draw, static_argnums=(2, 3))
  some, every = draw(keys, 0.7, ('hue', 'xflip'), (8, 8)), draw(keys, 0.7, BGC, (8, 8))
  assert set(some) == {'hue', 'xflip'}
  for op in some:
    np.testing.assert_array_equal(some[op], every[op])


# ---- augment


def test_probability_zero_changes_nothing(pictures):
  images, seeds = np.float32(pictures), np.arange(8)
  np.testing.assert_array_equal(augment(images, seeds, 0.0), images)
  assert np.abs(augment(images, seeds, 1.0) - images).max() > 0.5
  # Resampling without a transform, as the original does then, is the identity too.
  identity = percentile_draws(0.5, (), 8, (8, 8))
  np.testing.assert_allclose(execute(images, identity), images, rtol=0, atol=2e-6)


def test_samples_do_not_see_each_other(pictures):
  with jax.enable_x64(True):
    whole = augment(pictures, np.arange(8), 0.8)
    for split in (slice(0, 4), slice(4, 8)):
      np.testing.assert_allclose(
        augment(pictures[split], np.arange(8)[split], 0.8), whole[split], atol=1e-12
      )
    order = np.array([3, 1, 0, 2, 7, 6, 4, 5])
    np.testing.assert_allclose(augment(pictures[order], order, 0.8), whole[order], atol=1e-12)


def test_devices_compute_the_same(pictures):
  """Images, and the gradient of an R1 penalty through them, in a scan inside shard_map; without and
  with transforms."""

  def run(p, weight, images, seeds):
    def step(total, i):
      keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(i), seed))(seeds)

      def loss(weight):
        logits = lambda x: jnp.tanh(weight * ada.augment(x, keys, p, BGC)).sum()
        penalty = jnp.square(jax.grad(logits)(images)).sum((1, 2, 3)).mean()
        return jax.lax.pmean(penalty, 'data')

      return total + jax.grad(loss)(weight), ada.augment(images, keys, p, BGC)

    return jax.lax.scan(step, jnp.zeros(()), jnp.arange(2))

  with jax.enable_x64(True):
    runs = []
    for count in (1, 8):
      mesh = jax.make_mesh(
        (count,), ('data',), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:count]
      )
      runs.append(
        jax.jit(
          jax.shard_map(
            run,
            mesh=mesh,
            in_specs=(P(), P(), P('data'), P('data')),
            out_specs=(P(), P(None, 'data')),
          )
        )
      )
    for p in (0.0, 0.8):
      results = [f(p, 1.3, pictures, np.arange(8)) for f in runs]
      jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12), *results)
      assert results[0][0] != 0 and (p == 0) == np.allclose(results[0][1][0], results[0][1][1])


def test_second_derivative(pictures):
  """Of an R1 penalty with respect to a parameter behind the augmentation, and to the images, by
  differences."""
  images, seeds = pictures[:2], np.arange(2)
  weights = np.random.default_rng(2).normal(size=images.shape)

  def penalty(scale, images):
    logits = lambda x: (jnp.tanh(scale * augment(x, seeds, 0.9)) * weights).sum()
    return jnp.square(jax.grad(logits)(images)).sum()

  with jax.enable_x64(True):
    value, slopes = jax.jit(penalty), jax.jit(jax.grad(penalty, (0, 1)))(1.3, images)
    h, direction = 1e-5, np.random.default_rng(3).normal(size=images.shape)
    by_scale = (value(1.3 + h, images) - value(1.3 - h, images)) / (2 * h)
    by_images = (value(1.3, images + h * direction) - value(1.3, images - h * direction)) / (2 * h)
    np.testing.assert_allclose(slopes[0], by_scale, rtol=1e-7)
    np.testing.assert_allclose((slopes[1] * direction).sum(), by_images, rtol=1e-7)


def test_types(pictures):
  seeds = np.arange(8)
  single = augment(np.float32(pictures), seeds, 0.8)
  half = augment(jnp.asarray(pictures, jnp.bfloat16), seeds, 0.8)
  assert single.dtype == jnp.float32 and half.dtype == jnp.bfloat16
  # Only the input and the result are rounded to 8 bits.
  rounded = augment(np.asarray(jnp.asarray(pictures, jnp.bfloat16), np.float32), seeds, 0.8)
  np.testing.assert_array_equal(half, rounded.astype(jnp.bfloat16))
  with jax.enable_x64(True):
    draws = percentile_draws(0.6, BGC, 8, (8, 8))
    double = execute(pictures, draws)
  assert double.dtype == np.float64
  np.testing.assert_allclose(double, execute(np.float32(pictures), draws), atol=2e-5)


def test_frame_stacks_and_parts_of_a_pipe():
  frames = np.float32(np.random.default_rng(4).uniform(-1, 1, (4, 8, 8, 4)))
  seeds = np.arange(4)
  # Geometry first, then colours, each with the draws it has in the whole pipe.
  moved = augment(frames, seeds, 0.9, GEOMETRIC)
  np.testing.assert_allclose(
    augment(moved, seeds, 0.9, ada.PIPES['color']), augment(frames, seeds, 0.9), atol=2e-5
  )
  keys = jax.random.split(jax.random.key(0), 4)
  assert ada.augment(frames, keys, 1.0, ada.PIPES['none']) is frames


def test_wrong_names_and_images():
  keys, images = jax.random.split(jax.random.key(0), 2), np.zeros((2, 8, 8, 3), np.float32)
  assert ada.PIPES['bgc'] == ada.PIPES['bg'] + ada.PIPES['color']
  with pytest.raises(UserError, match=r"'rotate9' \(did you mean rotate90\?\): expected"):
    ada.augment(images, keys, 1.0, ('hue', 'rotate9'))
  with pytest.raises(UserError, match='uint8.*scale'):
    ada.augment(images.astype(np.uint8), keys, 1.0, BGC)
  with pytest.raises(UserError, match='60000 images of 32x32.*at most 58254'):
    jax.eval_shape(
      transforms.apply_geometry, jnp.empty((60_000, 32, 32, 1)), jnp.empty((60_000, 3, 3))
    )


# ---- control


def test_update_p():
  update = jax.jit(ada.update_p)
  np.testing.assert_allclose(update(0.2, 0.9, 64, 4), 0.2 + 256 / 500_000, rtol=1e-6)
  np.testing.assert_allclose(update(0.2, 0.3, 64, 4), 0.2 - 256 / 500_000, rtol=1e-6)
  np.testing.assert_allclose(
    update(0.2, 0.5, 16, 2, target=0.4, kimg=1.0), 0.2 + 32 / 1000, rtol=1e-6
  )
  assert update(0.2, 0.6, 64, 4, target=0.6) == np.float32(0.2)
  assert update(0.0001, -1.0, 64, 4) == 0
  assert update(1.5, 1.0, 64, 4) > 1.5


def test_large_pictures_are_filtered_as_small_ones_are(monkeypatch):
  """By filters instead of matrices: pictures, gradients, and gradients of these."""
  rng = np.random.default_rng(0)
  images = jnp.asarray(rng.normal(size=(2, 6, 8, 3)), jnp.float32)
  moved = rng.normal(size=(2, 3, 3)) * [[0.2, 0.2, 3], [0.2, 0.2, 3], [0, 0, 0]]
  transform = jnp.asarray(np.eye(3) + moved, jnp.float32)

  def computed():
    image = lambda x, G: transforms.apply_geometry(x, G)
    first = jax.grad(lambda x, G: (image(x, G) ** 2).sum(), (0, 1))
    second = jax.grad(lambda x: (first(x, transform)[0] ** 2).sum())
    both = jax.jit(lambda x, G: (image(x, G), first(x, G), second(x)))
    return jax.tree.leaves(both(images, transform))

  small = computed()
  monkeypatch.setattr(transforms, 'LARGE', 2)
  for a, b in zip(small, computed(), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.abs(a).max()))
