"""Corrupted test images, to see how far a probe that learned on clean ones holds.

arXiv 2105.05837, section 5.
"""

import numpy as np
from PIL import Image

from palm_jax.base.errors import UserError


def check(name: str, size: int | None = None) -> tuple[str, float]:
  """(kind, strength) of 'salt_pepper:SHARE' or 'downsample:PIXELS'.

  Raises:
    UserError: another kind, a share outside (0, 1], or fewer pixels than 1 or, where size is given,
      more than that.
  """
  kind, _, value = str(name).partition(':')
  try:
    strength = {'salt_pepper': float, 'downsample': int}[kind](value)
  except (KeyError, ValueError):
    raise UserError(
      f"corruption {name!r} is unknown: expected 'salt_pepper:SHARE' or 'downsample:PIXELS'"
    ) from None
  most = 1 if kind == 'salt_pepper' else size
  if not strength > 0 or (most and strength > most):
    raise UserError(
      f'corruption {name!r}: expected a share in (0, 1], or 1 to '
      f'{size or "the side of the images"} pixels'
    )
  return kind, strength


def corrupt(name: str, images: np.ndarray, seed: int) -> np.ndarray:
  """Corrupted copies of images (N, H, W, C) uint8.

  'salt_pepper:p' makes each pixel black or white, all channels together, with probability p in all;
  'downsample:s' resizes to s x s and back, both by Pillow's bilinear filter, which antialiases.
  Raises UserError as `check`.
  """
  kind, strength = check(name, min(images.shape[1:3]))
  out = np.empty_like(images)
  rng = np.random.default_rng(seed)
  for i, image in enumerate(images):
    if kind == 'salt_pepper':
      drawn = rng.random(image.shape[:2])[..., None]
      out[i] = np.where(drawn < strength / 2, 0, np.where(drawn < strength, 255, image))
      continue
    side = int(strength)
    small = Image.fromarray(image.squeeze()).resize((side, side), Image.Resampling.BILINEAR)
    large = small.resize(image.shape[1::-1], Image.Resampling.BILINEAR)
    out[i] = np.asarray(large).reshape(image.shape)
  return out
