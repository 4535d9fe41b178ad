"""Adaptive discriminator augmentation of StyleGAN2-ADA (arXiv 2006.06676).

After stylegan2-ada-pytorch, training/augment.py.

`draw` turns keys into the parameters of every operation, zero being the identity; `geometry` and
`colour` turn those into matrices, by which transforms.py resamples and recolours.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from palm_jax.base import checks
from palm_jax.base.errors import UserError
from palm_jax.generator.ops import at_least_float32
from palm_jax.generator.transforms import apply_colour, apply_geometry

BLIT = 'xflip', 'rotate90', 'xint'
GEOMETRY = 'scale', 'rotate', 'aniso', 'xfrac'
COLOUR = 'brightness', 'contrast', 'lumaflip', 'hue', 'saturation'
OPS = BLIT + GEOMETRY + COLOUR
# augpipe_specs of train.py there
PIPES = dict(none=(), blit=BLIT, geom=GEOMETRY, color=COLOUR, bg=BLIT + GEOMETRY, bgc=OPS)


def augment(
  images: jax.Array, keys: jax.Array, p: float | jax.Array, ops: tuple[str, ...]
) -> jax.Array:
  """Augments each image on its own: the result depends on its key and p, not on its batch.

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
    if op not in OPS:
      raise UserError(
        f'augmentation {op!r}{checks.nearest(op, OPS)}: expected one of {", ".join(OPS)}'
      )
  if not jnp.issubdtype(images.dtype, jnp.floating):
    raise UserError(
      f'images to augment of type {images.dtype}: expected floats in [-1, 1]; scale them before'
    )
  if not ops:
    return images
  draws = draw(keys, p, ops, images.shape[1:3])
  G_inv = geometry(draws)
  C = colour(draws)

  # Rematerialised: otherwise the gradient would store an index and weights for every sample of the
  # doubled images.
  @jax.checkpoint
  def changed(images):
    x = images.astype(at_least_float32(images))
    if set(ops) & {*BLIT, *GEOMETRY}:
      x = apply_geometry(x, G_inv)
    if set(ops) & {*COLOUR}:
      x = apply_colour(x, C)
    return x.astype(images.dtype)

  return jax.lax.cond(p > 0, changed, lambda images: images, images)


def draw(
  keys: jax.Array, p: float | jax.Array, ops: tuple[str, ...], size: tuple[int, ...]
) -> dict[str, jax.Array]:
  """Parameters of the operations, per sample: all are zero where the operation does not happen.

  An operation's draws do not depend on which others are in use.

  Args:
    keys: (N,) typed keys.
    p: () probability.
    ops: names out of `OPS`.
    size: (H, W) of the images.

  Returns:
    {each of `ops`: (N, k) parameters}. By name:
      xflip, lumaflip: whether, 0 or 1.
      rotate90: quarter turns.
      xint, xfrac: shift (x, y) in pixels.
      scale, aniso, contrast, saturation: log2 of the factor.
      rotate: radians before and after the anisotropic scaling.
      brightness: offset.
      hue: radians.
  """
  # One flat call for everything: XLA on CPU takes about a second to compile each call for random
  # numbers.
  dtype = jnp.result_type(float)
  above = np.nextafter(np.array(-1, dtype), np.array(0, dtype))
  uniform = jax.vmap(lambda key: jax.random.uniform(key, (4 * len(OPS),), dtype, above, 1))
  numbers = uniform(keys).reshape(len(keys), len(OPS), 2, 2)  # in (-1, 1)
  values, gates = jnp.moveaxis(numbers, 2, 0)  # (N, ops, 2)
  parameters = _parameters({op: values[:, k] for k, op in enumerate(OPS)}, size)

  def gated(op):
    gate = gates[:, OPS.index(op)]
    if op == 'rotate':
      # Two rotations, each with its own gate, of which at least one happens with probability p.
      probability = 1 - jnp.sqrt(1 - jnp.clip(p, 0, 1))
    else:
      probability = p
      gate = gate[:, :1]
    return jnp.where(gate < 2 * probability - 1, parameters[op], 0).astype(dtype)

  return {op: gated(op) for op in ops}


def _parameters(uniform, size):
  """Parameters of all operations from {op: (N, 2) uniform in (-1, 1)}."""
  normal = {op: math.sqrt(2) * jax.lax.erf_inv(u) for op, u in uniform.items()}
  eighth = 0.125 * np.array(size[::-1])  # of width and height
  return dict(
    xflip=uniform['xflip'][:, :1] > 0,
    rotate90=jnp.floor(2 * uniform['rotate90'][:, :1] + 2),
    xint=jnp.round(uniform['xint'] * eighth),
    scale=0.2 * normal['scale'][:, :1],
    rotate=math.pi * uniform['rotate'],
    aniso=0.2 * normal['aniso'][:, :1],
    xfrac=normal['xfrac'] * eighth,
    brightness=0.2 * normal['brightness'][:, :1],
    contrast=0.5 * normal['contrast'][:, :1],
    lumaflip=uniform['lumaflip'][:, :1] > 0,
    hue=math.pi * uniform['hue'][:, :1],
    saturation=normal['saturation'][:, :1],
  )


def geometry(draws: dict[str, jax.Array]) -> jax.Array:
  """Inverse transforms, from output to input, on (x, y, 1) in pixels from the image's centre.

  Args:
    draws: of `draw`, with any operations.

  Returns:
    (N, 3, 3).
  """
  return jax.vmap(_geometry_one)(draws)


def _geometry_one(draws):
  value = _or_identity(draws)
  factor = jnp.exp2(-value('scale')[0])
  aspect = jnp.exp2(-value('aniso')[0])
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


def colour(draws: dict[str, jax.Array]) -> jax.Array:
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
  factor = jnp.exp2(value('saturation')[0])
  angle = value('hue')[0]
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
  # Written out: a matrix product would round angles to about 8 bits on accelerators, and is slower
  # at this size.
  return (a[:, :, None] * b).sum(1)


def update_p(
  p: jax.Array,
  sign_mean: jax.Array,
  batch_size: int,
  interval: int,
  target: float = 0.6,
  kimg: float = 500.0,
) -> jax.Array:
  """Moves the probability towards where D's sign on real images has the wanted mean.

  See arXiv 2006.06676, section 3.2.

  Args:
    p: () probability.
    sign_mean: () mean sign of D's logits on augmented real images since the last update, r_t of
      the paper.
    batch_size: images an iteration.
    interval: iterations between updates.
    target: of sign_mean.
    kimg: thousands of images in which p moves by 1.

  Returns:
    () the new probability; at least 0, without upper limit, as in the original.
  """
  return jnp.maximum(p + jnp.sign(sign_mean - target) * (batch_size * interval / (kimg * 1000)), 0)
