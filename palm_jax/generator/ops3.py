"""The filtered leaky ReLU of StyleGAN3 (arXiv 2106.12423, section 3.2), on NHWC images.

The numbers agree with NVlabs/stylegan3 (torch_utils/ops/filtered_lrelu.py, upfirdn2d.py). No zeros
are inserted: a filter is a sum of shifted pictures, when up-sampling one sum for each phase of the
result. Filters are arrays, (L,) for both axes or (L, L); None stands for the single tap 1. They are
flipped, so they convolve. Sums are at least float32, what lies between them has the type of x.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from palm_jax.base.devices import platform

Padding = tuple[int, int, int, int]  # left, right, top, bottom; negative values crop


def output_size(
  size: int, up: int, down: int, padding: tuple[int, int], up_taps: int, down_taps: int
) -> int:
  """Length of an axis after `filtered_leaky_relu`; less than 1 where nothing is left.

  Args:
    size: its length before.
    up, down: factors.
    padding: before and after, in samples of the up-sampled picture.
    up_taps, down_taps: lengths of the filters; 1 for None.
  """
  return (size * up + sum(padding) - (up_taps - 1) - (down_taps - 1) + down - 1) // down


def filtered_leaky_relu(
  x: jax.Array,
  bias: jax.Array,
  up_filter: jax.Array | None,
  down_filter: jax.Array | None,
  *,
  up: int = 1,
  down: int = 1,
  padding: Padding = (0, 0, 0, 0),
  slope: float = 0.2,
  gain: float = 2**0.5,
  clamp: float | None = None,
) -> jax.Array:
  """Adds the bias, up-samples, applies a leaky ReLU times gain, clamps, and down-samples.

  Args:
    x: (N, H, W, C).
    bias: (C,).
    up_filter: (L,) or None; its gain is `up` an axis.
    down_filter: (L,), (L, L) or None.
    up, down: factors.
    padding: of the up-sampled picture, zeros or, where negative, a crop.
    slope: of the negative side.
    gain: of the leaky ReLU.
    clamp: limit of what is down-sampled; None is no limit.

  Returns:
    (N, H', W', C) of x's type, with sizes of `output_size`.
  """

  def filtered(x):
    x += bias.astype(x.dtype)
    for axis, pads in ((1, padding[2:]), (2, padding[:2])):
      x = _upsample(x, up_filter, axis, up, pads)
    x = nn.leaky_relu(x, slope) * gain
    if clamp is not None:
      x = jnp.clip(x, -clamp, clamp)
    return _downsample(x, down_filter, down)

  if platform() != 'cpu' or (up_filter is None and down_filter is None):
    return filtered(x)
  # Picture by picture all stays in the cache: 15 ms for 16 pictures of 38x38x64, up and down by 2
  # (one core). All at once take 4 times as long; banded matrices in place of the sums 2.3 times as
  # long by picture, and 8 times at once.
  return lax.map(lambda picture: filtered(picture[None])[0], x)


def _upsample(x, up_filter, axis, up, pads):
  """Zero insertion, padding and the filter along an axis, by the phases of the result."""
  taps = _flipped(up_filter) * up
  length = x.shape[axis] * up + sum(pads) - (len(taps) - 1)
  count = -(-length // up)
  # Sample r + up * q meets at tap k the padded picture's r + up * q + k, which is the input's
  # q + (r + k - pads[0]) / up, or an inserted zero where that is no integer.
  starts = [
    {k: (r + k - pads[0]) // up for k in range(len(taps)) if (r + k - pads[0]) % up == 0}
    for r in range(up)
  ]
  every = [start for phase in starts for start in phase.values()]
  before = max(0, -min(every))
  after = max(0, max(every) + count - x.shape[axis])
  x = jnp.pad(x, [(before, after) if a == axis else (0, 0) for a in range(x.ndim)])
  phases = [
    _sum_of_shifts(x, {before + i: taps[k] for k, i in phase.items()}, axis, count)
    for phase in starts
  ]
  y = jnp.stack(phases, axis + 1)
  y = y.reshape(*x.shape[:axis], up * count, *x.shape[axis + 1 :])
  return lax.slice_in_dim(y, 0, length, axis=axis).astype(x.dtype)


def _downsample(x, down_filter, down):
  taps = _flipped(down_filter)
  height, width = (-(-(n - len(taps) + 1) // down) for n in x.shape[1:3])
  if taps.ndim == 1:
    x = _sum_of_shifts(x, dict(enumerate(taps)), 1, height, down).astype(x.dtype)
    # XLA:CPU would make one loop over all pairs of taps, which takes 1.3 (64 channels) to 3 times
    # (128) as long; a pad is not drawn into it.
    x = jnp.pad(x, ((0, 0), (0, 0), (0, 1), (0, 0)))
    return _sum_of_shifts(x, dict(enumerate(taps)), 2, width, down).astype(x.dtype)
  rows = [
    _sum_of_shifts(
      lax.slice_in_dim(x, i, i + (height - 1) * down + 1, down, axis=1),
      dict(enumerate(row)),
      2,
      width,
      down,
    )
    for i, row in enumerate(taps)
  ]
  return sum(rows[1:], rows[0]).astype(x.dtype)


def _sum_of_shifts(x, taps, axis, count, stride=1):
  """Along an axis, `count` samples of x from each start on, times its tap: taps {start: tap}."""
  shape = *x.shape[:axis], count, *x.shape[axis + 1 :]
  total = jnp.zeros(shape, jnp.promote_types(x.dtype, jnp.float32))
  for start, tap in taps.items():
    total += tap * lax.slice_in_dim(x, start, start + (count - 1) * stride + 1, stride, axis)
  return total


def _flipped(taps):
  return jnp.ones(1) if taps is None else jnp.flip(taps)
