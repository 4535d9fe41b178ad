"""Pictures hold the pixels that were given, where they belong."""

import numpy as np
import pytest
from PIL import Image

from palm_jax.base import pictures
from palm_jax.base.errors import UserError


@pytest.fixture(scope='module')
def images():
  return np.random.default_rng(0).integers(0, 256, (3, 5, 4, 6, 3), dtype=np.uint8)


@pytest.mark.parametrize('scale', [1, 3])
def test_grid_puts_every_pixel_in_its_place(images, scale):
  picture = pictures.grid(images, scale)
  assert picture.shape == (3 * 4 * scale, 5 * 6 * scale, 3) and picture.dtype == np.uint8
  y, x = np.mgrid[: picture.shape[0], : picture.shape[1]] // scale
  np.testing.assert_array_equal(picture, images[y // 4, x // 6, y % 4, x % 6])


@pytest.mark.parametrize(
  'size, columns, expected',
  [(8, 4, 8), (32, 10, 2), (20, 4, 4), (32, 40, 1), (256, 20, 1), (8, 100, 2)],
)
def test_small_images_are_enlarged_to_be_visible_and_wide_grids_are_not(size, columns, expected):
  picture = pictures.grid(np.zeros((1, columns, size, size, 1), np.uint8))
  assert picture.shape == (size * expected, columns * size * expected, 1)


def test_labels_stand_at_the_left_of_their_rows(images):
  plain, labelled = pictures.grid(images, 5), pictures.grid(images, 5, labels=['cat', '', 7])
  margin = labelled.shape[1] - plain.shape[1]
  np.testing.assert_array_equal(labelled[:, margin:], plain)
  dark = (labelled[:, :margin] < 128).any(axis=(1, 2)).reshape(3, 20)
  assert dark[0].any() and not dark[1].any() and dark[2].any()
  assert not dark[:, [0, -1]].any()  # no label runs into the next row


def test_stacks_of_frames_are_shown_side_by_side():
  images = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 6, 4), np.uint8)
  shown = pictures.grid(images, 1)
  assert shown.shape == (2 * 4, 3 * 4 * 6, 1)
  for frame in range(4):
    np.testing.assert_array_equal(
      shown[4:, 48 + 6 * frame : 54 + 6 * frame, 0], images[1, 2, ..., frame]
    )


@pytest.mark.parametrize('channels', [1, 3])
def test_png_holds_the_image(tmp_path, images, channels):
  picture = pictures.grid(images[..., :channels])
  pictures.save_png(tmp_path / 'new' / 'a.png', picture)
  with Image.open(tmp_path / 'new' / 'a.png') as image:
    np.testing.assert_array_equal(np.asarray(image).reshape(picture.shape), picture)
  assert [p.name for p in (tmp_path / 'new').iterdir()] == ['a.png']


@pytest.mark.parametrize('channels', [1, 3])
def test_webp_holds_every_frame_at_its_pace(tmp_path, images, channels):
  frames = images.reshape(15, 4, 6, 3)[..., :channels]
  pictures.save_webp(tmp_path / 'a.webp', frames, fps=10)
  with Image.open(tmp_path / 'a.webp') as film:
    assert film.n_frames == 15 and film.info['loop'] == 0
    for i, frame in enumerate(frames):
      film.seek(i)
      film.load()
      np.testing.assert_array_equal(
        np.asarray(film.convert('RGB')), np.broadcast_to(frame, (4, 6, 3))
      )
      assert film.info['duration'] == 100


def test_a_failed_write_leaves_the_file_that_was_there(tmp_path, images):
  pictures.save_png(tmp_path / 'a.png', images[0, 0])
  before = (tmp_path / 'a.png').read_bytes()
  with pytest.raises((TypeError, ValueError)):
    pictures.save_png(tmp_path / 'a.png', np.zeros((4, 4, 7), np.uint8))
  with pytest.raises(RuntimeError):
    pictures.save_webp(
      tmp_path / 'a.png', [np.zeros((4, 4, 3), np.uint8), np.zeros((5, 4, 3), np.uint8)]
    )
  assert (tmp_path / 'a.png').read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
  'bad',
  [
    np.zeros((2, 2, 4, 4), np.uint8),
    np.zeros((2, 2, 4, 4, 3)),
    np.zeros((2, 0, 4, 4, 3), np.uint8),
  ],
)
def test_bad_grids_are_refused(bad):
  with pytest.raises(UserError, match='grid of'):
    pictures.grid(bad)


def test_wrong_number_of_labels_and_empty_films_are_refused(tmp_path, images):
  with pytest.raises(UserError, match='2 labels for a grid of 3 rows'):
    pictures.grid(images, labels=['a', 'b'])
  with pytest.raises(UserError, match='at least one frame'):
    pictures.save_webp(tmp_path / 'a.webp', [])
  with pytest.raises(UserError, match='frames of 2x16384: WebP has at most 16383'):
    pictures.save_webp(tmp_path / 'a.webp', [np.zeros((2, 1 << 14, 1), np.uint8)])
