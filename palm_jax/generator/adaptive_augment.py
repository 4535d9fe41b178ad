"""Adaptive discriminator augmentation (StyleGAN2-ADA, arXiv 2006.06676; stylegan2-ada-pytorch,
training/augment.py).

Draws and their execution are apart: `draw` turns keys into the parameters of every operation, zero
being the identity; `geometry` and `colour` turn those into matrices; `apply_geometry` and
`apply_colour` resample and recolour by a matrix.
"""

import difflib
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from palm_jax.base.errors import UserError
from palm_jax.generator.ops import at_least_float32

BLIT = 'xflip', 'rotate90', 'xint'
GEOMETRY = 'scale', 'rotate', 'aniso', 'xfrac'
COLOUR = 'brightness', 'contrast', 'lumaflip', 'hue', 'saturation'
OPS = BLIT + GEOMETRY + COLOUR
PIPES = dict(
  none=(), blit=BLIT, geom=GEOMETRY, color=COLOUR, bg=BLIT + GEOMETRY, bgc=OPS
)  # augpipe_specs of train.py

# Low-pass of sym6, Daubechies' least asymmetric wavelet with six vanishing moments (PyWavelets'
# sym6.dec_lo).
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
MARGIN = len(SYM6) // 4  # pixels around the output, for the filter of the way down


def pipe(name):
  """The operations that the name of a pipe stands for, a key of `PIPES`: tuple of names.

  Raises:
    UserError: for another name.
  """
  _check('augmentation pipe', name, PIPES)
  return PIPES[name]


def augment(images, keys, p, ops):
  """Augments every image for itself; what happens to one depends on its key and p only, not on its
  batch.

  With p == 0 the images come back as they are. It may be differentiated any number of times with
  respect to images. Without three channels (grey, or a stack of grey frames) colour operations act
  on all channels alike, as the original does on one; hue and saturation then have no effect.

  Args:
    images: (N, H, W, C) float, of zero-centred range, best [-1, 1]. Inside shard_map, as varying as
      the keys.
    keys: (N,) typed keys, one a sample.
    p: () probability of every operation, at least 0; above 1 is as 1. May be traced.
    ops: names out of `OPS`; their order has no effect.

  Returns:
    (N, H, W, C) of the images' type; computed in at least float32.

  Raises:
    UserError: unknown operation; images that are not floating point.
  """
  for op in ops:
    _check('augmentation', op, OPS)
  if not jnp.issubdtype(images.dtype, jnp.floating):
    raise UserError(
      f'images to augment of type {images.dtype}: expected floats in [-1, 1]; scale them before'
    )
  if not ops:
    return images
  draws = draw(keys, p, ops, images.shape[1:3])
  G_inv, C = geometry(draws), colour(draws)

  # Rematerialised, or the gradient would store an index and weights for every sample of the doubled
  # images.
  @jax.checkpoint
  def changed(images):
    x = images.astype(at_least_float32(images))
    if set(ops) & {*BLIT, *GEOMETRY}:
      x = apply_geometry(x, G_inv)
    if set(ops) & {*COLOUR}:
      x = apply_colour(x, C)
    return x.astype(images.dtype)

  return jax.lax.cond(p > 0, changed, lambda images: images, images)


def draw(keys, p, ops, size):
  """Parameters of the operations, per sample: all are zero where the operation does not happen.

  An operation's draws do not depend on which others are in use.

  Args:
    keys: (N,) typed keys.
    p: () probability.
    ops: names out of `OPS`.
    size: (H, W) of the images.

  Returns:
    Dictionary from each of `ops` to (N, k) parameters, by name:
      xflip, lumaflip: whether, 0 or 1. rotate90: quarter turns. xint, xfrac: shift (x, y) in
        pixels.
      scale, aniso, contrast, saturation: log2 of the factor. rotate: radians before and after the
        anisotropic scaling.
      brightness: offset. hue: radians.
  """
  # One flat call for everything: XLA on CPU takes about a second to compile each call for random
  # numbers.
  dtype = jnp.result_type(float)
  above = np.nextafter(np.array(-1, dtype), np.array(0, dtype))
  numbers = jax.vmap(lambda key: jax.random.uniform(key, (4 * len(OPS),), dtype, above, 1))(
    keys
  )  # in (-1, 1)
  value, gate = jnp.moveaxis(numbers.reshape(len(keys), len(OPS), 2, 2), 2, 0)  # (N, ops, 2)
  uniform = {op: value[:, k] for k, op in enumerate(OPS)}
  normal = {op: math.sqrt(2) * jax.lax.erf_inv(u) for op, u in uniform.items()}
  extent = np.array(size[::-1])
  parameters = dict(
    xflip=uniform['xflip'][:, :1] > 0,
    rotate90=jnp.floor(2 * uniform['rotate90'][:, :1] + 2),
    xint=jnp.round(uniform['xint'] * (0.125 * extent)),
    scale=0.2 * normal['scale'][:, :1],
    rotate=math.pi * uniform['rotate'],
    aniso=0.2 * normal['aniso'][:, :1],
    xfrac=normal['xfrac'] * (0.125 * extent),
    brightness=0.2 * normal['brightness'][:, :1],
    contrast=0.5 * normal['contrast'][:, :1],
    lumaflip=uniform['lumaflip'][:, :1] > 0,
    hue=math.pi * uniform['hue'][:, :1],
    saturation=normal['saturation'][:, :1],
  )

  def gated(op):
    if (
      op == 'rotate'
    ):  # two rotations, each for itself, of which at least one happens with probability p
      probability, happened = 1 - jnp.sqrt(1 - jnp.clip(p, 0, 1)), gate[:, OPS.index(op)]
    else:
      probability, happened = p, gate[:, OPS.index(op), :1]
    return jnp.where(happened < 2 * probability - 1, parameters[op], 0).astype(dtype)

  return {op: gated(op) for op in ops}


def geometry(draws):
  """Inverse transforms, from output to input, on (x, y, 1) in pixels from the image's centre.

  Args:
    draws: of `draw`, with any operations.

  Returns:
    (N, 3, 3).
  """
  return jax.vmap(_geometry_one)(draws)


def _geometry_one(draws):
  value = _or_identity(draws)
  factor, aspect = jnp.exp2(-value('scale')[0]), jnp.exp2(-value('aniso')[0])
  before, after = value('rotate')
  return functools.reduce(
    _product,
    (
      _scaling(1 - 2 * value('xflip')[0], 1.0),
      _rotation(value('rotate90')[0] * (math.pi / 2)),
      _shift(-value('xint')),
      _scaling(factor, factor),
      _rotation(before),
      _scaling(aspect, 1 / aspect),
      _rotation(after),
      _shift(-value('xfrac')),
    ),
  )


def colour(draws):
  """Colour transforms on (red, green, blue, 1).

  Args:
    draws: of `draw`, with any operations.

  Returns:
    (N, 4, 4).
  """
  return jax.vmap(_colour_one)(draws)


def _colour_one(draws):
  value = _or_identity(draws)
  grey = np.full((3, 3), 1 / 3)  # projection on the grey axis (1, 1, 1)
  turn = np.cross(np.eye(3), np.full(3, 3**-0.5))  # its quarter turn, seen along that axis
  rest = np.eye(3) - grey
  factor, angle = jnp.exp2(value('saturation')[0]), value('hue')[0]
  return functools.reduce(
    lambda C, step: _product(step, C),
    (
      _shift(jnp.repeat(value('brightness')[:1], 3)),
      _linear(np.eye(3) * jnp.exp2(value('contrast')[0])),
      _linear(np.eye(3) - 2 * grey * value('lumaflip')[0]),
      _linear(grey + rest * jnp.cos(angle) + turn * jnp.sin(angle)),
      _linear(grey + rest * factor),
    ),
  )


def _or_identity(draws):
  none = jnp.zeros(2, next(iter(draws.values())).dtype)
  return lambda op: draws.get(op, none)


def _linear(matrix):
  return jnp.eye(len(matrix) + 1, dtype=matrix.dtype).at[:-1, :-1].set(matrix)


def _scaling(x, y):
  return _linear(jnp.diag(jnp.stack([x, y])))


def _rotation(angle):
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  return _linear(jnp.stack([cos, -sin, sin, cos]).reshape(2, 2))


def _shift(offset):
  return jnp.eye(len(offset) + 1, dtype=offset.dtype).at[:-1, -1].set(offset)


def _product(a, b):
  # Written out: a matrix product would round angles to 8 bits or so on accelerators, and be slower
  # this small.
  return (a[:, :, None] * b).sum(1)


def apply_geometry(images, G_inv):
  """Resamples images by affine transforms: doubled in size by a wavelet filter, sampled bilinearly,
  and halved.

  Outside, an image goes on by reflection for its size - 1 pixels and then with zeros: the
  original's margin, which follows the largest transform of a batch, at its upper limit, so that
  shapes are fixed and samples independent.

  Args:
    images: (N, H, W, C) float32 or float64.
    G_inv: (N, 3, 3) of `geometry`.

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
  resize = functools.partial(jnp.einsum, 'yi,nijc,xj->nyxc', precision='highest')
  matrix = lambda make, size: make(size).astype(images.dtype)
  doubled = resize(matrix(_upsampling, height), images, matrix(_upsampling, width))
  rows, columns = doubled.shape[1:3]

  G = G_inv.astype(images.dtype)[..., None, None]  # (N, 3, 3, 1, 1)
  x, y = matrix(_positions, width), matrix(_positions, height)[:, None]
  row, below = _neighbours(G[:, 1, 0] * x + G[:, 1, 1] * y + G[:, 1, 2], height)
  column, right = _neighbours(G[:, 0, 0] * x + G[:, 0, 1] * y + G[:, 0, 2], width)
  # One index into all images: as a batch of gathers the gradient is twice as slow on CPU.
  index = (jnp.arange(count)[:, None, None] * rows + row) * columns + column
  pixels = doubled.reshape(-1, channels)
  at = lambda down, across: pixels.at[index + (down * columns + across)].get(
    mode='promise_in_bounds'
  )
  below, right = below[..., None], right[..., None]
  sampled = (1 - below) * ((1 - right) * at(0, 0) + right * at(0, 1)) + below * (
    (1 - right) * at(1, 0) + right * at(1, 1)
  )
  return resize(matrix(_downsampling, height), sampled, matrix(_downsampling, width))


def _positions(size):
  """Where the doubled output is sampled, in pixels of the output from its centre; even ones are
  pixel centres."""
  return (np.arange(2 * size + len(SYM6) - 2) - (size + len(SYM6) // 2 - 2)) / 2


def _neighbours(position, size):
  """Row of `_upsampling` at or before a position in pixels from the centre, and the share of the
  next one."""
  position = 2 * position + (3 * size - 1)
  before = jnp.floor(position)
  return jnp.clip(before, 0, 6 * size - 2).astype(jnp.int32), position - before


def _upsampling(size):
  """Reflection by size - 1 on both sides, zeros between, the filter, two rows of zeros on both
  sides: (6 size, size)."""
  padded = np.pad(np.eye(size), ((size - 1, size - 1), (0, 0)), mode='reflect')
  spread = np.stack([padded, np.zeros_like(padded)], 1).reshape(-1, size)
  filtered = np.stack(
    [np.convolve(column, 2 * _taps())[5:-6] for column in spread.T], 1
  )  # upfirdn2d.upsample2d
  return np.pad(filtered, ((2, 2), (0, 0)))


def _downsampling(size):
  """The filter, as a correlation, at every second place: (size, 2 size + 10)."""
  return np.stack([np.pad(_taps(), (2 * k, 2 * (size - 1 - k))) for k in range(size)])


def _taps():
  return np.array(SYM6) / sum(SYM6)


def apply_colour(images, C):
  """Maps every pixel by its image's matrix; where there are not three channels, all by the mean of
  its three rows.

  Args:
    images: (N, H, W, C) float.
    C: (N, 4, 4) of `colour`.

  Returns:
    (N, H, W, C).
  """
  C = C.astype(images.dtype)[:, None, None]  # (N, 1, 1, 4, 4)
  if images.shape[-1] == 3:
    return (C[..., :3, :3] * images[..., None, :]).sum(-1) + C[..., :3, 3]
  grey = C[..., :3, :].mean(-2)
  return images * grey[..., :3].sum(-1, keepdims=True) + grey[..., 3:]


def update_p(p, sign_mean, batch_size, interval, target=0.6, kimg=500.0):
  """Moves the probability towards where D's sign on real images has the wanted mean (arXiv
  2006.06676, section 3.2).

  Args:
    p: () probability.
    sign_mean: () mean sign of D's logits on augmented real images since the last update: r_t of the
      paper.
    batch_size: images an iteration.
    interval: iterations between updates.
    target: of sign_mean.
    kimg: thousands of images in which p moves by 1.

  Returns:
    () the new probability; at least 0, without upper limit, as in the original.
  """
  return jnp.maximum(p + jnp.sign(sign_mean - target) * (batch_size * interval / (kimg * 1000)), 0)


def _check(what, name, known):
  if name not in known:
    nearest = difflib.get_close_matches(str(name), known, n=1, cutoff=0)[0]
    raise UserError(
      f'{what} {name!r}: expected one of {", ".join(known)}; did you mean {nearest!r}?'
    )
