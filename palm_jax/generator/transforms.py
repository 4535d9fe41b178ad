"""Pictures resampled and recoloured, each by a matrix of its own.

After stylegan2-ada-pytorch, training/augment.py. Both can be differentiated any number of times.
"""

import jax
import jax.numpy as jnp
import numpy as np

from palm_jax.base.errors import UserError

# Low-pass of sym6, Daubechies' least asymmetric wavelet with six vanishing moments: PyWavelets'
# sym6.dec_lo.
SYM6 = (
  0.015404109327027373,
  0.0034907120842174702,
  -0.11799011114819057,
  -0.048311742585633,
  0.4910559419267466,
  0.787641141030194,
  0.3379294217276218,
  -0.07263752278646252,
  -0.021060292512300564,
  0.04472490177066578,
  0.0017677118642428036,
  -0.007800708325034148,
)


LARGE = 128  # pixels a side, from which on matrices cost more than filters


def apply_geometry(images: jax.Array, G_inv: jax.Array) -> jax.Array:
  """Resamples images by affine transforms.

  They are doubled in size by a wavelet filter, sampled bilinearly, and halved. Outside, an image is
  continued by reflection for its size - 1 pixels and then by zeros. The original's margin follows
  the largest transform of a batch; here it always has its upper limit, so that shapes are fixed and
  samples independent.

  Args:
    images: (N, H, W, C) float32 or float64.
    G_inv: (N, 3, 3) inverse transforms, from output to input, on (x, y, 1) in pixels from the
      image's centre.

  Returns:
    (N, H, W, C).

  Raises:
    UserError: so many or so large images that their doubled pixels cannot be numbered in 32 bits.
  """
  count, height, width, channels = images.shape
  if 36 * count * height * width >= 2**31:
    raise UserError(
      f'{count} images of {height}x{width} to augment at once: expected at most '
      f'{(2**31 - 1) // (36 * height * width)} a device; lower the batch size or take more devices'
    )
  doubled = _double(_double(images, 1), 2)
  rows, columns = doubled.shape[1:3]

  G = G_inv.astype(images.dtype)[..., None, None]  # (N, 3, 3, 1, 1)
  x = _positions(width).astype(images.dtype)
  y = _positions(height).astype(images.dtype)[:, None]
  row, below = _neighbours(G[:, 1, 0] * x + G[:, 1, 1] * y + G[:, 1, 2], height)
  column, right = _neighbours(G[:, 0, 0] * x + G[:, 0, 1] * y + G[:, 0, 2], width)
  # One index into all images: as a batch of gathers the gradient is twice as slow on CPU.
  index = (jnp.arange(count)[:, None, None] * rows + row) * columns + column
  pixels = doubled.reshape(-1, channels)

  def at(down, across):
    return pixels.at[index + (down * columns + across)].get(mode='promise_in_bounds')

  below, right = below[..., None], right[..., None]
  upper = (1 - right) * at(0, 0) + right * at(0, 1)
  lower = (1 - right) * at(1, 0) + right * at(1, 1)
  sampled = (1 - below) * upper + below * lower
  return _halve(_halve(sampled, 1), 2)


def _positions(size):
  """Where the doubled output is sampled, in pixels of the output from its centre.

  Every second one is the centre of a pixel.
  """
  return (np.arange(2 * size + len(SYM6) - 2) - (size + len(SYM6) // 2 - 2)) / 2


def _neighbours(position, size):
  """Row of `_upsampling` at or before a position, and the share of the next row.

  Positions are in pixels from the centre.
  """
  position = 2 * position + (3 * size - 1)
  before = jnp.floor(position)
  return jnp.clip(before, 0, 6 * size - 2).astype(jnp.int32), position - before


def _double(x, axis):
  """`_upsampling` along an axis, 1 or 2, of (N, H, W, C)."""
  size = x.shape[axis]
  if size < LARGE:
    return _by_matrix(_upsampling(size), x, axis)
  around = lambda margin: [(margin, margin) if i == axis else (0, 0) for i in range(4)]
  reflected = jnp.pad(x, around(size - 1), mode='reflect')
  return jnp.pad(_filter(reflected, 2 * _taps()[::-1], axis, spread=2, margin=6), around(2))


def _halve(x, axis):
  """`_downsampling` along an axis, 1 or 2, of (N, H, W, C)."""
  size = (x.shape[axis] - 10) // 2
  if size < LARGE:
    return _by_matrix(_downsampling(size), x, axis)
  return _filter(x, _taps(), axis, stride=2)


def _by_matrix(matrix, x, axis):
  formula = 'yi,nijc->nyjc' if axis == 1 else 'xj,nijc->nixc'
  return jnp.einsum(formula, matrix.astype(x.dtype), x, precision='highest')


def _filter(x, taps, axis, spread=1, stride=1, margin=0):
  """Correlation along an axis of each channel, with zeros between (`spread`) and around."""
  along = lambda value, other: [value if i == axis else other for i in (1, 2)]
  channels = x.shape[-1]
  kernel = jnp.tile(taps.reshape(*along(-1, 1), 1, 1).astype(x.dtype), (1, 1, 1, channels))
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    along(stride, 1),
    along((margin, margin), (0, 0)),
    lhs_dilation=along(spread, 1),
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    feature_group_count=channels,
    precision='highest',
  )


def _upsampling(size):
  """Doubles a line of pixels: (6 size, size).

  Reflection by size - 1 on both sides, zeros in between, the filter, two rows of zeros on both
  sides.
  """
  padded = np.pad(np.eye(size), ((size - 1, size - 1), (0, 0)), mode='reflect')
  spread = np.stack([padded, np.zeros_like(padded)], 1).reshape(-1, size)
  # The original's upfirdn2d.upsample2d.
  filtered = np.stack([np.convolve(column, 2 * _taps())[5:-6] for column in spread.T], 1)
  return np.pad(filtered, ((2, 2), (0, 0)))


def _downsampling(size):
  """The filter, as a correlation, at every second place: (size, 2 size + 10)."""
  return np.stack([np.pad(_taps(), (2 * k, 2 * (size - 1 - k))) for k in range(size)])


def _taps():
  return np.array(SYM6) / sum(SYM6)


def apply_colour(images: jax.Array, C: jax.Array) -> jax.Array:
  """Maps every pixel by its image's matrix.

  Where there are not three channels, each of them is mapped by the mean of the matrix's three rows.

  Args:
    images: (N, H, W, C) float.
    C: (N, 4, 4) transforms on (red, green, blue, 1).

  Returns:
    (N, H, W, C).
  """
  C = C.astype(images.dtype)[:, None, None]  # (N, 1, 1, 4, 4)
  if images.shape[-1] == 3:
    return (C[..., :3, :3] * images[..., None, :]).sum(-1) + C[..., :3, 3]
  grey = C[..., :3, :].mean(-2)
  return images * grey[..., :3].sum(-1, keepdims=True) + grey[..., 3:]
