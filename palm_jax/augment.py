"""Image augmentations on the device, with torchvision's laws and one random draw a sample."""

import difflib
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from palm_jax.base.errors import UserError

ASPECT = (3 / 4, 4 / 3)  # torchvision RandomResizedCrop
LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, PIL's convert('L')


def sample_crop(
  key: jax.Array,
  height: int,
  width: int,
  scale: tuple[float, float],
  ratio: tuple[float, float] = ASPECT,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Window of torchvision's RandomResizedCrop.get_params: ten tries, then the largest central
  window of legal aspect.

  Args:
    key: one typed key.
    height, width: of the image, Python integers.
    scale: (low, high) share of the image's area, uniform.
    ratio: (low, high) width / height, log-uniform.
  Returns:
    (top, left, crop_height, crop_width), int32 scalars.
  """
  area_key, aspect_key, top_key, left_key = jax.random.split(key, 4)
  area = height * width * jax.random.uniform(area_key, (10,), minval=scale[0], maxval=scale[1])
  log_aspect = jax.random.uniform(
    aspect_key, (10,), minval=math.log(ratio[0]), maxval=math.log(ratio[1])
  )
  aspect = jnp.exp(log_aspect)
  widths = jnp.round(jnp.sqrt(area * aspect)).astype(jnp.int32)
  heights = jnp.round(jnp.sqrt(area / aspect)).astype(jnp.int32)
  fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)

  fallback_width = min(width, round(height * ratio[1]))
  fallback_height = min(height, round(width / ratio[0]))
  first, found = jnp.argmax(fits), jnp.any(fits)
  crop_width = jnp.where(found, widths[first], fallback_width)
  crop_height = jnp.where(found, heights[first], fallback_height)
  top = jnp.where(
    found, jax.random.randint(top_key, (), 0, height - crop_height + 1), (height - crop_height) // 2
  )
  left = jnp.where(
    found, jax.random.randint(left_key, (), 0, width - crop_width + 1), (width - crop_width) // 2
  )
  return top, left, crop_height, crop_width


def resized_crop(
  image: jax.Array, top: jax.Array, left: jax.Array, height: jax.Array, width: jax.Array
) -> jax.Array:
  """The window, resized bilinearly to the image's own size. image (H, W, C) float; the window may
  be traced.

  The window never exceeds the image, so it is only ever enlarged and antialiasing has nothing to
  do. Pixels outside the window have no share, as when torchvision cuts before it resizes.
  """

  def weights(size, start, length):  # (size out, size in)
    centre = (jnp.arange(size, dtype=image.dtype) + 0.5) * (length / size) - 0.5
    position = start + jnp.clip(centre, 0, length - 1)
    return jnp.maximum(0, 1 - jnp.abs(position[:, None] - jnp.arange(size))).astype(image.dtype)

  rows, columns = weights(image.shape[0], top, height), weights(image.shape[1], left, width)
  # Full precision: an accelerator's default would round pixels to 8 bits or so.
  return jnp.einsum('yi,xj,ijc->yxc', rows, columns, image, precision='highest')


def random_resized_crop(
  key: jax.Array,
  image: jax.Array,
  scale: tuple[float, float] = (0.2, 1.0),
  ratio: tuple[float, float] = ASPECT,
) -> jax.Array:
  """torchvision's RandomResizedCrop to the image's own size. image (H, W, C) float -> the same."""
  height, width = image.shape[:2]
  return resized_crop(image, *sample_crop(key, height, width, scale, ratio))


def hflip(key: jax.Array, image: jax.Array, probability: float = 0.5) -> jax.Array:
  """Mirrors left and right with a probability. image (H, W, C)."""
  return jnp.where(jax.random.bernoulli(key, probability), image[:, ::-1], image)


# Colour operations, on planes (C, H, W) with values in [0, 1]: there a CPU takes many pixels at
# once. torchvision/transforms/functional.py.


def to_gray(planes: jax.Array) -> jax.Array:
  """Luma in every channel; (3, H, W) -> the same."""
  luma = jnp.asarray(LUMA, planes.dtype)[:, None, None]
  return jnp.broadcast_to((planes * luma).sum(axis=0), planes.shape)


def adjust_brightness(planes: jax.Array, factor: jax.Array) -> jax.Array:
  return jnp.clip(planes * factor, 0, 1)


def adjust_contrast(planes: jax.Array, factor: jax.Array) -> jax.Array:
  """Blends with the image's mean grey level; where there are not three channels, with the mean of
  all values."""
  mean = jnp.mean(to_gray(planes) if len(planes) == 3 else planes)
  return jnp.clip(factor * planes + (1 - factor) * mean, 0, 1)


def adjust_saturation(planes: jax.Array, factor: jax.Array) -> jax.Array:
  return jnp.clip(factor * planes + (1 - factor) * to_gray(planes), 0, 1)


def adjust_hue(planes: jax.Array, turn: jax.Array) -> jax.Array:
  """Turns HSV's hue by `turn` of a full circle; saturation and value stay."""
  red, green, blue = planes
  value, chroma = planes.max(axis=0), planes.max(axis=0) - planes.min(axis=0)
  safe = jnp.where(chroma > 0, chroma, 1)
  hue = jnp.where(
    value == red,
    (green - blue) / safe,
    jnp.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
  )  # sixths of a circle

  def channel(offset):
    k = offset + hue + 6 * turn
    k -= 6 * jnp.floor(k / 6)  # the remainder, which XLA takes one pixel at a time on CPU
    return value - chroma * jnp.clip(jnp.minimum(k, 4 - k), 0, 1)

  return jnp.stack([channel(5), channel(3), channel(1)])


def color_jitter(
  key: jax.Array,
  planes: jax.Array,
  brightness: float = 0.4,
  contrast: float = 0.4,
  saturation: float = 0.4,
  hue: float = 0.1,
) -> jax.Array:
  """torchvision's ColorJitter: the four adjustments in random order, factors U(1 - x, 1 + x), hue
  U(-hue, hue) turns.

  Images without three channels have no colour: only brightness and contrast change. planes
  (C, H, W) -> the same.
  """
  order_key, *keys = jax.random.split(key, 5)
  strengths = ((adjust_brightness, 1, brightness), (adjust_contrast, 1, contrast))
  if len(planes) == 3:
    strengths += ((adjust_saturation, 1, saturation), (adjust_hue, 0, hue))

  def operation(adjust, centre, strength, key):
    factor = jax.random.uniform(key, (), planes.dtype, centre - strength, centre + strength)
    return lambda planes: adjust(planes, factor)

  operations = [operation(*strength, key) for strength, key in zip(strengths, keys, strict=False)]
  order = jax.random.permutation(order_key, len(operations))
  return jax.lax.scan(
    lambda planes, index: (jax.lax.switch(index, operations, planes), None), planes, order
  )[0]


def _simsiam_one(key, image):
  crop_key, flip_key, jitter_key, apply_key, gray_key = jax.random.split(key, 5)
  planes = jnp.moveaxis(hflip(flip_key, random_resized_crop(crop_key, image, (0.2, 1.0))), -1, 0)
  planes = jnp.where(jax.random.bernoulli(apply_key, 0.8), color_jitter(jitter_key, planes), planes)
  if len(planes) == 3:
    planes = jnp.where(jax.random.bernoulli(gray_key, 0.2), to_gray(planes), planes)
  return jnp.moveaxis(planes, 0, -1)


def _crop_flip_one(key, image):
  crop_key, flip_key = jax.random.split(key)
  return hflip(flip_key, random_resized_crop(crop_key, image, (0.08, 1.0)))


def _shift_flip_one(key, image):
  key, key_shift = jax.random.split(key)
  reach = image.shape[0] // 8
  corner = jax.random.randint(key_shift, (2,), 0, 2 * reach + 1)
  padded = jnp.pad(image, ((reach, reach), (reach, reach), (0, 0)))
  return hflip(key, jax.lax.dynamic_slice(padded, (*corner, 0), image.shape))


def _augment(one, keys, images):
  if images.dtype != jnp.uint8:
    raise UserError(
      f'images to augment of type {images.dtype}: expected uint8 in 0..255; augment before scaling'
    )
  return 2 * jax.vmap(one)(keys, images.astype(jnp.float32) / 255) - 1


def simsiam_augment(keys: jax.Array, images: jax.Array) -> jax.Array:
  """SimSiam's CIFAR augmentations: crop (area 0.2 to 1), flip, colour jitter, grey; no blur at 32
  pixels.

  Source: SimSiam appendix D, PatrickHua/SimSiam augmentations/simsiam_aug.py. Two views are two
  calls with two keys.

  Args:
    keys: (N,) typed keys, one a sample.
    images: (N, H, W, C) uint8. Without three channels the colour operations are left out.
  Returns:
    (N, H, W, C) float32 in [-1, 1].
  Raises:
    UserError: for images that are not uint8.
  """
  return _augment(_simsiam_one, keys, images)


def crop_flip(keys: jax.Array, images: jax.Array) -> jax.Array:
  """Crop (area 0.08 to 1) and flip, for linear probes (PatrickHua/SimSiam
  augmentations/eval_aug.py).

  Shapes and errors as in `simsiam_augment`.
  """
  return _augment(_crop_flip_one, keys, images)


def shift_flip(keys: jax.Array, images: jax.Array) -> jax.Array:
  """Shift by up to an eighth of the side, black around, and flip: supervised training's
  (kuangliu/pytorch-cifar main.py).

  Shapes and errors as in `simsiam_augment`.
  """
  return _augment(_shift_flip_one, keys, images)


def make_augment(name: str) -> Callable[[jax.Array, jax.Array], jax.Array]:
  """The function (keys (N,), images (N, H, W, C) uint8) -> images of a name: 'none', 'simsiam',
  'crop_flip', 'shift_flip'.

  'none' hands the uint8 images on as they are; encoders scale them.

  Raises:
    UserError: for another name.
  """
  augmentations = {
    'none': lambda keys, images: images,
    'simsiam': simsiam_augment,
    'crop_flip': crop_flip,
    'shift_flip': shift_flip,
  }
  if name not in augmentations:
    nearest = difflib.get_close_matches(str(name), augmentations, n=1, cutoff=0)[0]
    raise UserError(
      f'augment {name!r}: expected one of {", ".join(augmentations)}; did you mean {nearest!r}?'
    )
  return augmentations[name]
