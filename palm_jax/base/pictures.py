"""Grids, strips of episodes and films as files, by NumPy and Pillow."""

import os
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from palm_jax.base.errors import UserError
from palm_jax.base.files import replacing

CELL = 64  # pixels that a small image is enlarged to, at least
WIDTH = 1600  # pixels that enlarging keeps a grid within
MOST_WEBP = 16_383  # pixels of a side


def grid(
  images: np.ndarray, scale: int | None = None, labels: Sequence[object] | None = None
) -> np.ndarray:
  """Images in rows and columns, small ones enlarged by whole pixels.

  Args:
    images: (R, C, H, W, channels) uint8. Other channels than 1 or 3 are shown as so many grey
      frames side by side.
    scale: whole number of pixels for one; None enlarges to cells of at least 64 pixels, within 1600
      pixels of width.
    labels: R names, written at the left of the rows.

  Returns:
    (R*H*scale, C*W*scale, 1 or 3) uint8; labels add a column at the left.

  Raises:
    UserError: another shape or dtype.
  """
  images = np.asarray(images)
  if images.ndim != 5 or images.dtype != np.uint8 or 0 in images.shape:
    raise UserError(
      f'a grid of {images.dtype}{images.shape} cannot be drawn: '
      'expected uint8 (rows, columns, height, width, channels)'
    )
  if images.shape[-1] not in (1, 3):
    images = images.swapaxes(-1, -2).reshape(*images.shape[:3], -1, 1)
  rows, columns, height, width, channels = images.shape
  if scale is None:
    scale = max(1, min(-(-CELL // max(height, width)), WIDTH // (columns * width)))
  picture = images.swapaxes(1, 2).reshape(rows * height, columns * width, channels)
  picture = picture.repeat(scale, 0).repeat(scale, 1)
  if labels is None:
    return picture
  if len(labels) != rows:
    raise UserError(f'{len(labels)} labels for a grid of {rows} rows: give one for each row')
  return np.concatenate(
    [_label_column([str(label) for label in labels], height * scale, channels), picture], axis=1
  )


def save_png(path: str | os.PathLike, image: np.ndarray) -> None:
  """Writes an image (H, W, 1 or 3) uint8 as PNG. Raises OSError where it cannot be written."""
  _save(path, [_to_pillow(image)], format='PNG')


def check_film(path: str | os.PathLike, height: int, width: int) -> None:
  """Raises UserError where frames have more pixels a side than a WebP."""
  if max(height, width) > MOST_WEBP:
    raise UserError(
      f'{path}: frames of {height}x{width}: WebP has at most {MOST_WEBP} a side; show fewer '
      'pictures side by side'
    )


def save_webp(path: str | os.PathLike, frames: Sequence[np.ndarray], fps: float = 8) -> None:
  """Writes (H, W, 1 or 3) uint8 frames of one size as an endless animated WebP, without loss.

  Equal neighbours are stored as one frame that stays for as long.

  Raises:
    UserError: no frames, or of more pixels a side than the format has. OSError: the file cannot be
      written.
  """
  if len(frames) == 0:
    raise UserError(f'{path}: a film needs at least one frame')
  check_film(path, *frames[0].shape[:2])
  _save(
    path,
    [_to_pillow(frame).convert('RGB') for frame in frames],
    format='WEBP',
    save_all=True,
    duration=round(1000 / fps),
    loop=0,
    lossless=True,
    method=0,
  )


def _to_pillow(image):
  image = np.asarray(image)
  return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def _save(path, images, **options):
  first, *rest = images
  if rest:
    options['append_images'] = rest
  with replacing(path) as f:
    first.save(f, **options)


def _label_column(names, row_height, channels):
  """Black letters on white, (rows * row_height, as wide as the longest name, channels)."""
  font = ImageFont.load_default(size=min(14, max(8, row_height - 2)))
  width = round(max(font.getlength(name) for name in names)) + 8
  column = Image.new('L', (width, len(names) * row_height), 255)
  draw = ImageDraw.Draw(column)
  for row, name in enumerate(names):
    draw.text((4, (row + 0.5) * row_height), name, fill=0, font=font, anchor='lm')
  return np.asarray(column)[..., None].repeat(channels, -1)
