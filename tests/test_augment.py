import colorsys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance

from palm_jax import augment
from palm_jax.base.errors import UserError

N = 20_000


@pytest.fixture(scope='module')
def image():
  """A smooth colourful (32, 32, 3) uint8 image with grey, black and white pixels in a corner."""
  y, x = np.mgrid[:32, :32] / 31
  image = np.stack([x, 0.5 + 0.5 * np.sin(5 * y), 1 - x * y], -1)
  image[:2, :2] = [[[0] * 3, [1] * 3], [[0.5] * 3, [0.2] * 3]]
  return np.round(255 * image).astype(np.uint8)


@pytest.fixture(scope='module')
def crops():
  keys = jax.random.split(jax.random.key(0), N)
  return {
    low: np.array(
      jax.jit(jax.vmap(lambda k, low=low: augment.sample_crop(k, 256, 256, (low, 1.0))))(keys)
    )
    for low in (0.08, 0.2)
  }


def torch_crops(rng, count, size, low):
  """torchvision's get_params, written out as its loop."""
  areas, aspects = [], []
  for _ in range(count):
    for _ in range(10):
      area = size * size * rng.uniform(low, 1)
      aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
      width, height = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
      if 0 < width <= size and 0 < height <= size:
        break
    else:
      width = height = size
    areas.append(width * height / size**2)
    aspects.append(width / height)
  return np.array(areas), np.array(aspects)


def on_planes(operation, image, *args):
  """A colour operation of an image (H, W, C)."""
  return np.moveaxis(operation(jnp.moveaxis(jnp.asarray(image, jnp.float32), -1, 0), *args), 0, -1)


def distance(a, b):
  """Kolmogorov-Smirnov distance of two samples; 1.36 sqrt(2 / n) = 0.0136 is its 95th percentile at
  n = 20000."""
  grid = np.sort(np.concatenate([a, b]))
  return np.abs(
    np.searchsorted(np.sort(a), grid, 'right') / len(a)
    - np.searchsorted(np.sort(b), grid, 'right') / len(b)
  ).max()


@pytest.mark.parametrize('low', [0.08, 0.2])
def test_crop_law(crops, low):
  top, left, height, width = crops[low]
  assert min(top.min(), left.min()) >= 0 and max((top + height).max(), (left + width).max()) <= 256
  areas, aspects = torch_crops(np.random.default_rng(0), N, 256, low)
  assert distance(height * width / 256**2, areas) < 0.02
  assert distance(width / height, aspects) < 0.02
  # Below 3/4 of the image every window fits at every aspect: there the area is uniform and log
  # aspect too.
  area = height * width / 256**2
  inside = area < 0.75
  assert distance(area[inside], np.linspace(low, 0.75, N)) < 0.02
  assert (
    distance(np.log(width / height)[inside], np.linspace(np.log(3 / 4), np.log(4 / 3), N)) < 0.02
  )
  # Position is uniform over what is left.
  room = 256 - height + 1
  assert distance(((top + 0.5) / room)[room > 20], np.linspace(0, 1, N)) < 0.02
  assert abs(np.corrcoef(top / room, left / (256 - width + 1))[0, 1]) < 0.03


def test_crop_falls_back_to_the_centre():
  # No window of twice the area fits, so all ten tries fail.
  def fallback(h, w):
    return [int(v) for v in augment.sample_crop(jax.random.key(0), h, w, (2.0, 2.1))]

  assert fallback(32, 32) == [0, 0, 32, 32]
  assert fallback(32, 64) == [0, 10, 32, 43]  # 32 * 4/3 = 42.7
  assert fallback(64, 32) == [10, 0, 43, 32]  # 32 / (3/4)


@pytest.mark.parametrize('window', [(0, 0, 32, 32), (3, 5, 17, 9), (20, 0, 12, 31), (31, 31, 1, 1)])
def test_resized_crop_agrees_with_pillow(image, window):
  top, left, height, width = window
  result = jax.jit(augment.resized_crop)(jnp.asarray(image, jnp.float32), *window)
  for channel in range(3):
    cut = Image.fromarray(
      image[top : top + height, left : left + width, channel].astype(np.float32)
    )
    np.testing.assert_allclose(
      result[..., channel], cut.resize((32, 32), Image.Resampling.BILINEAR), atol=1e-3
    )


@pytest.mark.parametrize('factor', [0.6, 1.0, 1.4])
@pytest.mark.parametrize(
  'name, enhance',
  [
    ('brightness', ImageEnhance.Brightness),
    ('contrast', ImageEnhance.Contrast),
    ('saturation', ImageEnhance.Color),
  ],
)
def test_factors_agree_with_pillow(image, name, enhance, factor):
  result = on_planes(getattr(augment, f'adjust_{name}'), image / 255, factor)
  expected = np.asarray(enhance(Image.fromarray(image)).enhance(factor), np.float32)
  assert np.abs(result * 255 - expected).max() < 2


@pytest.mark.parametrize('turn', [-0.1, 0.0, 0.07, 0.5])
def test_hue_agrees_with_colorsys(image, turn):
  result = on_planes(augment.adjust_hue, image / 255, turn)
  expected = []
  for pixel in image.reshape(-1, 3) / 255:
    hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
    expected.append(colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value))
  np.testing.assert_allclose(result, np.reshape(expected, image.shape), atol=1e-5)


def test_gray_agrees_with_pillow(image):
  gray = np.asarray(Image.fromarray(image).convert('L'), np.float32)
  assert np.abs(on_planes(augment.to_gray, image) - gray[..., None]).max() < 1


def test_jitter_orders_and_factors():
  # A uniform grey image sees only brightness (contrast keeps its mean), so the factor can be read
  # off.
  keys = jax.random.split(jax.random.key(0), 2000)
  jitter = jax.jit(jax.vmap(augment.color_jitter, (0, None)))
  factors = np.asarray(jitter(keys, jnp.full((3, 2, 2), 0.5)))[:, 0, 0, 0] / 0.5
  assert distance(factors, np.linspace(0.6, 1.4, 2000)) < 0.05
  # A step from 0 to 1 in one channel has two operations. Where contrast has narrowed it, its sum is
  # min(b, 1) when brightness b came first, which clips, and b when it came last: 1 sharp tells the
  # one, above 1 the other.
  low, high = np.asarray(jitter(keys, jnp.array([0.0, 1.0]).reshape(1, 1, 2)))[:, 0, 0].T
  total = (low + high)[(low > 0.01) & (high < 0.999)]
  assert (np.abs(total - 1) < 1e-5).mean() > 0.15
  assert (total > 1.001).mean() > 0.04


def test_simsiam_shares(image):
  """Grey one time in five; every sample its own draw; and range and type as the encoder expects."""
  count = 2000
  keys = jax.random.split(jax.random.key(1), count)
  small = jnp.asarray(image[4:12, 4:12])
  out = np.asarray(
    jax.jit(augment.simsiam_augment)(keys, jnp.broadcast_to(small, (count, 8, 8, 3)))
  )
  assert out.dtype == np.float32 and out.min() >= -1 and out.max() <= 1 + 1e-6
  gray = np.ptp(out, axis=-1).max(axis=(1, 2)) < 1e-5
  assert gray.mean() == pytest.approx(0.2, abs=0.04)
  # One in five is not jittered, and few windows fit in 8x8: those may coincide.
  assert len(np.unique(out.reshape(count, -1), axis=0)) > 0.8 * count


def test_simsiam_jitters_four_of_five(image):
  # A uniform colour is blind to crop and flip: what is not grey and has changed was jittered.
  color = jnp.asarray(np.full((2000, 2, 2, 3), (200, 100, 50), np.uint8))
  out = np.asarray(
    jax.jit(augment.simsiam_augment)(jax.random.split(jax.random.key(2), 2000), color)
  )[:, 0, 0]
  unchanged = np.abs((out + 1) * 127.5 - (200, 100, 50)).max(axis=-1) < 0.01
  assert unchanged.mean() == pytest.approx(0.2 * 0.8, abs=0.03)


def test_flips_half_the_time():
  image = jnp.arange(6.0).reshape(1, 2, 3)
  flipped = jax.vmap(augment.hflip, (0, None))(jax.random.split(jax.random.key(0), 2000), image)
  is_mirror = np.all(flipped == image[:, ::-1], axis=(1, 2, 3))
  assert np.all(is_mirror | np.all(flipped == image, axis=(1, 2, 3)))
  assert is_mirror.mean() == pytest.approx(0.5, abs=0.04)


def test_same_key_same_view_whatever_the_batch(image):
  keys = jax.random.split(jax.random.key(0), 4)
  images = jnp.stack([jnp.asarray(image)] * 4)
  crop_flip = jax.jit(augment.crop_flip)
  whole, part = crop_flip(keys, images), crop_flip(keys[2:3], images[2:3])
  np.testing.assert_allclose(whole[2:3], part, atol=1e-6)
  assert np.abs(np.asarray(whole[0] - whole[1])).max() > 0.05
  # The full window, unflipped or flipped, is the image itself: scaling is the encoder's.
  full = augment.resized_crop(jnp.asarray(image, jnp.float32), 0, 0, 32, 32)
  np.testing.assert_allclose(full, image, atol=1e-4)


@pytest.mark.parametrize('channels', [1, 4])
def test_images_without_colour(channels):
  images = np.random.default_rng(0).integers(0, 256, (50, 8, 8, channels), np.uint8)
  out = jax.jit(augment.simsiam_augment)(jax.random.split(jax.random.key(0), 50), images)
  assert out.shape == images.shape and np.all(np.isfinite(out))
  if channels == 4:  # no grayscale: the frames of a stack stay apart
    assert np.ptp(np.asarray(out), axis=-1).max(axis=(1, 2)).min() > 0.05


def test_names_and_types():
  images = np.zeros((1, 8, 8, 3), np.uint8)
  assert augment.make_augment('none')(None, images) is images
  assert augment.make_augment('crop_flip') is augment.crop_flip
  with pytest.raises(UserError, match="'simsam'.*'simsiam'"):
    augment.make_augment('simsam')
  with pytest.raises(UserError, match='float32'):
    augment.simsiam_augment(jax.random.split(jax.random.key(0), 1), images.astype(np.float32))


def test_shift_and_flip():
  image = jnp.arange(256).astype(jnp.uint8).reshape(16, 16, 1)
  out = augment.shift_flip(
    jax.random.split(jax.random.key(0), 200), jnp.broadcast_to(image, (200, 16, 16, 1))
  )
  out = np.round((np.asarray(out)[..., 0] + 1) * 127.5)
  seen = set()
  padded = np.pad(np.asarray(image)[..., 0], 2)
  for x in out:
    found = [
      (i, j, flip)
      for i in range(5)
      for j in range(5)
      for flip in (False, True)
      if np.array_equal(x, padded[i : i + 16, j : j + 16][:, :: -1 if flip else 1])
    ]
    assert len(found) == 1
    seen.add(found[0])
  assert len(seen) > 40  # of 50
