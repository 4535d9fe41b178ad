import numpy as np
import pytest
from PIL import Image

from palm_jax.base.errors import UserError
from palm_jax.evaluate.corruptions import check, corrupt

IMAGES = np.random.default_rng(0).integers(1, 255, (50, 16, 16, 3), dtype=np.uint8)


def test_salt_and_pepper_come_in_equal_shares_and_leave_the_rest():
  out = corrupt('salt_pepper:0.2', IMAGES, seed=1)
  black, white = (out == 0).all(-1), (out == 255).all(-1)
  n = black.size
  for share in (black.mean(), white.mean()):
    assert abs(share - 0.1) < 4 * np.sqrt(0.09 / n)
  np.testing.assert_array_equal(out[~(black | white)], IMAGES[~(black | white)])
  np.testing.assert_array_equal(out, corrupt('salt_pepper:0.2', IMAGES, seed=1))
  assert (corrupt('salt_pepper:0.2', IMAGES, seed=2) != out).any()


def test_salt_and_pepper_are_drawn_as_for_all_pictures_at_once():
  drawn = np.random.default_rng(3).random(IMAGES.shape[:3])[..., None]
  expected = np.where(drawn < 0.1, 0, np.where(drawn < 0.2, 255, IMAGES))
  np.testing.assert_array_equal(corrupt('salt_pepper:0.2', IMAGES, seed=3), expected)


def test_downsampling_loses_what_is_finer_and_keeps_the_mean():
  checkerboard = (255 * ((np.arange(16)[:, None] + np.arange(16)) % 2)).astype(np.uint8)
  out = corrupt('downsample:4', checkerboard[None, :, :, None], 0)
  assert out.shape == (1, 16, 16, 1) and np.abs(out.astype(float) - 127.5).max() < 16  # antialiased
  np.testing.assert_array_equal(corrupt('downsample:16', IMAGES, 0), IMAGES)
  smooth = np.asarray(
    Image.fromarray(IMAGES[0]).resize((8, 8), Image.BILINEAR).resize((16, 16), Image.BILINEAR)
  )
  np.testing.assert_array_equal(corrupt('downsample:8', IMAGES, 0)[0], smooth)


@pytest.mark.parametrize(
  'name',
  [
    'fog:1',
    'salt_pepper',
    'salt_pepper:0',
    'salt_pepper:2',
    'downsample:0',
    'downsample:1.5',
    'downsample:17',
  ],
)
def test_others_are_refused(name):
  with pytest.raises(UserError, match=f"corruption '{name}'"):
    check(name, 16)
