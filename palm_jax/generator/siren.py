"""A picture as a function of its coordinates: a network of sines (SIREN, arXiv 2006.09661).

  python -m palm_jax.generator.siren picture.png out.png --of=gradients --scale=4
  python -m palm_jax.generator.siren a.png out.png --with=b.png

The first fits a network to a picture, or to its gradients or its Laplacian alone, and draws it at
any size. The second merges two pictures: it fits the mean of their gradients.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import scipy.fft
from absl import flags, logging
from PIL import Image, ImageOps

from palm_jax.base import checks, command
from palm_jax.base.errors import NonFiniteError, UserError
from palm_jax.base.metrics import Progress
from palm_jax.base.pictures import save_png
from palm_jax.generator.sines import W0, Siren, coordinates
from palm_jax.layers.sine import sin

TARGETS = 'values', 'gradients', 'laplacian'
CHUNK = 1 << 16  # coordinates that are drawn at once
STEPS_PER_CALL = 50
MAX_SIDE = 4096  # pixels of a picture to fit
MAX_DRAWN = 1 << 26  # pixels


def gradients(f: Callable, x: jax.Array) -> jax.Array:
  """Derivatives of f: (N, 2) -> (N, C), each row by its own coordinates: (N, C, 2)."""
  return jnp.stack([_along(f, axis)(x) for axis in (0, 1)], -1)


def laplacian(f: Callable, x: jax.Array) -> jax.Array:
  """The sum of the second derivatives along both coordinates: (N, C)."""
  by_y, by_x = (_along(_along(f, axis), axis)(x) for axis in (0, 1))
  return by_y + by_x


def _along(f, axis):
  """The derivative along a coordinate, as a function; forward mode, as rows are independent."""
  return lambda x: jax.jvp(f, (x,), (jnp.zeros_like(x).at[:, axis].set(1),))[1]


@dataclasses.dataclass(frozen=True)
class Fitted:
  """A picture as a function.

  Attributes:
    network: Siren.
    params: its parameters.
    shape: (H, W, C) of what was fitted.
  """

  network: Siren
  params: Any
  shape: tuple[int, int, int]

  def __call__(self, x: jax.Array) -> jax.Array:
    """Coordinates (N, 2) (y, x) in [-1, 1] -> values (N, C), nominally in [-1, 1]."""
    values: Any = self.network.apply({'params': self.params}, x)
    return values

  def draw(self, height: int | None = None, width: int | None = None) -> np.ndarray:
    """The picture at any size: (height, width, C) float32, nominally in [-1, 1].

    Raises:
      UserError: a size that is not positive, or too large to hold.
    """
    height, width = height or self.shape[0], width or self.shape[1]
    if not (height > 0 < width and height * width <= MAX_DRAWN):
      raise UserError(f'{height} x {width} pixels: expected 1 to {MAX_DRAWN} of them')
    x = coordinates(height, width)
    rows = [_evaluate(self.network, self.params, x[i : i + CHUNK]) for i in range(0, len(x), CHUNK)]
    return np.concatenate(rows).reshape(height, width, -1)


@functools.partial(jax.jit, static_argnums=0)
def _evaluate(network, params, x):
  return network.apply({'params': params}, x)


def fit(
  image: np.ndarray,
  of: str = 'values',
  steps: int = 1000,
  width: int = 256,
  layers: int = 3,
  lr: float = 2e-3,
  batch: int = 4096,
  w0: float | None = None,
  seed: int = 0,
) -> Fitted:
  """Fits a Siren to a picture.

  Args:
    image: (H, W, C), uint8, or floats in [-1, 1].
    of: what of it is given: 'values'; 'gradients' of the cosines through its pixels, at places and
      as their integrals along lines from place to place, which leave a constant for each channel
      free (it is set to the picture's mean); or 'laplacian', which leaves any harmonic function
      free (the mean is set).
    steps: of Muon (optax.contrib), whose rate falls to 0 along a cosine. The original has Adam.
    width, layers: of the `Siren`.
    lr: the rate at first.
    batch: places of a step, drawn at random. The original has all pixels in each.
    w0: speed of the first layer; None is the original's 30, and less in proportion for pictures of
      fewer than 256 pixels a side, between whose pixels it would otherwise do as it likes.
    seed: of the initialisation and the places.

  Raises:
    UserError: an invalid picture or setting.
    NonFiniteError: the loss is not finite.
  """
  image = as_floats(image)
  checks.choice('of', of, TARGETS)
  speed = W0 * min(1, max(image.shape[:2]) / 256) if w0 is None else w0
  network = Siren(image.shape[-1], width, layers, speed)
  return _fit(network, image, of, steps, lr, batch, seed)


def merge(image_a: np.ndarray, image_b: np.ndarray, share: float = 0.5, **settings: Any) -> Fitted:
  """One picture with the gradients of two: share * those of a + (1 - share) * those of b.

  Args:
    image_a, image_b: (H, W, C) each, as for `fit`, of one shape.
    share: of a, 0 to 1.
    **settings: of `fit`.

  Raises:
    UserError: pictures of different shapes, or what `fit` refuses.
    NonFiniteError: the loss is not finite.
  """
  a, b = as_floats(image_a), as_floats(image_b)
  if a.shape != b.shape:
    raise UserError(f'pictures of {a.shape} and {b.shape}: resize one, they must be of one shape')
  if not 0 <= share <= 1:
    raise UserError(f'share={share}: expected 0 to 1')
  return fit(share * a + (1 - share) * b, of='gradients', **settings)


def as_floats(image: np.ndarray) -> np.ndarray:
  """A picture (H, W) or (H, W, C), uint8 or floats in [-1, 1], as (H, W, C) float32.

  Raises:
    UserError: another shape or type, numbers beyond that range, or sides that are too long.
  """
  image = np.asarray(image)
  image = image[..., None] if image.ndim == 2 else image
  sides_fit = image.ndim == 3 and all(3 <= n <= MAX_SIDE for n in image.shape[:2])
  if not sides_fit or not 1 <= image.shape[-1] <= 4:
    raise UserError(
      f'a picture of shape {image.shape}: expected (H, W, C) with sides of 3 to {MAX_SIDE} pixels '
      'and 1 to 4 channels'
    )
  if image.dtype == np.uint8:
    return image.astype(np.float32) / 127.5 - 1
  if image.dtype.kind != 'f' or not np.abs(image).max() <= 1 + 1e-3:
    raise UserError(f'a picture of {image.dtype}: expected uint8, or floats within -1 and 1')
  return image.astype(np.float32)


def waves_of(image: np.ndarray) -> np.ndarray:
  """(H, W, C) coefficients of the cosines that have the picture's values at its pixels."""
  waves = scipy.fft.dctn(image.astype(np.float64), axes=(0, 1)) / (image.shape[0] * image.shape[1])
  waves[0] /= 2
  waves[:, 0] /= 2
  return waves.astype(np.float32)


def along_waves(waves: jax.Array, x: jax.Array, orders: tuple[int, int]) -> jax.Array:
  """A derivative of the sum of cosines that `waves_of` gives.

  Args:
    waves: (H, W, C).
    x: (N, 2) (y, x) in [-1, 1], which need not be pixels.
    orders: of the derivative along y and x, 0 to 2.

  Returns:
    (N, C).
  """
  along_y, along_x = (_cosines(x[:, axis], waves.shape[axis], orders[axis]) for axis in (0, 1))
  return jnp.einsum('nh,hwc,nw->nc', along_y, waves, along_x)


def _cosines(x, count, order):
  """(N, count): cosines of the series at N places, or their derivatives."""
  speed = np.float32(np.pi / 2) * jnp.arange(count, dtype=jnp.float32)
  angle = speed * (x[:, None] + 1)
  cosine = lambda: sin(angle + np.float32(np.pi / 2))
  return (cosine, lambda: -speed * sin(angle), lambda: -(speed**2) * cosine())[order]()


def _draw(of, image, key, count):
  """Places (count, 2), and what is to be found there, (count, C, ...).

  Slopes are drawn anywhere in the picture: a network that is held at the pixels alone has others in
  between, which add up to another picture.
  """
  if of == 'values':
    height, width, _ = image.shape
    place = jax.random.randint(key, (count,), 0, height * width)
    return jnp.asarray(coordinates(height, width))[place], image.reshape(height * width, -1)[place]
  x = jax.random.uniform(key, (count, 2), minval=-1, maxval=1)
  if of == 'gradients':
    return x, jnp.stack([along_waves(image, x, orders) for orders in ((1, 0), (0, 1))], -1)
  return x, along_waves(image, x, (2, 0)) + along_waves(image, x, (0, 2))


def _fit(network, image, of, steps, lr, batch, seed):
  for name, value, most in (
    ('steps', steps, 10**7),
    ('width', network.width, 4096),
    ('layers', network.layers, 64),
    ('batch', batch, 1 << 22),
  ):
    if not 1 <= value <= most:
      raise UserError(f'{name}={value}: expected 1 to {most}')
  for name, value, most in (('lr', lr, 1), ('w0', network.w0, 1e4)):
    if not 0 < value < most:
      raise UserError(f'{name}={value}: expected a number between 0 and {most}')
  known = jax.device_put(image if of == 'values' else waves_of(image))
  draw = functools.partial(_draw, of, known)
  # One scale of the targets, so that losses and rates mean the same for each kind.
  scale = float(jnp.sqrt(jnp.square(draw(jax.random.key(seed), 4096)[1]).mean())) or 1.0
  optimizer = optax.contrib.muon(optax.cosine_decay_schedule(lr, steps))
  find = dict(values=lambda f, x: f(x), gradients=gradients, laplacian=laplacian)[of]

  def loss_fn(params, x, target):
    f: Any = lambda x: network.apply({'params': params}, x)
    loss = jnp.square((find(f, x) - target) / scale).mean()
    if of == 'gradients':
      # The coarsest waves have the least slopes, which alone are fitted last. An integral of slopes
      # along a line is the difference between its ends: here from each place to the next.
      along_line = lambda values: values - jnp.roll(values, 1, 0)
      error = along_line(f(x)) - along_line(along_waves(known, x, (0, 0)))
      loss += jnp.square(error).mean()
    return loss

  def step(state, number):
    params, opt_state = state
    places = draw(jax.random.fold_in(jax.random.key(seed), number), batch)
    loss, grads = jax.value_and_grad(loss_fn)(params, *places)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), loss

  call = jax.jit(functools.partial(jax.lax.scan, step), donate_argnums=0)
  params = network.init(jax.random.key(seed), np.zeros((1, 2), np.float32))['params']
  state = params, optimizer.init(params)
  progress = Progress('siren', steps, 'steps')
  for first in range(0, steps, STEPS_PER_CALL):
    numbers = jnp.arange(first, min(first + STEPS_PER_CALL, steps))
    state, losses = call(state, numbers)
    loss, done = float(losses.mean()), int(numbers[-1]) + 1
    if not np.isfinite(loss):
      raise NonFiniteError(f'the loss is {loss} at step {done}: lower lr={lr}')
    progress.update(done, {'loss': loss})  # in mean squares of the targets
  fitted = Fitted(network, jax.device_get(state[0]), image.shape)
  if of == 'values':
    return fitted
  free = image.mean((0, 1)) - fitted.draw().mean((0, 1))
  out = {**fitted.params['out'], 'bias': fitted.params['out']['bias'] + free}
  return dataclasses.replace(fitted, params={**fitted.params, 'out': out})


def psnr(image: np.ndarray, drawn: np.ndarray) -> float:
  """Peak signal to noise ratio in dB, of pictures in [-1, 1]."""
  return float(10 * np.log10(4 / np.mean(np.square(as_floats(image) - drawn, dtype=np.float64))))


def read_picture(path: str) -> np.ndarray:
  """(H, W, 1 or 3) uint8. Raises UserError where it cannot be read."""
  try:
    with Image.open(path) as picture:
      if picture.mode.startswith(('I', 'F')):
        raise ValueError(f'its mode is {picture.mode}, of more than 8 bits')
      if picture.has_transparency_data:
        raise ValueError('it is see-through')
      picture = ImageOps.exif_transpose(picture)
      grey = picture.mode in ('1', 'L', 'LA')
      pixels = np.asarray(picture.convert('L' if grey else 'RGB'))
  except (OSError, ValueError, Image.DecompressionBombError) as e:
    raise UserError(f'{path} cannot be read as a picture ({e}): give a PNG or JPEG') from e
  return pixels[..., None] if pixels.ndim == 2 else pixels


def parse_flags(argv: list[str]) -> list[str]:
  """Defines the flags and reads them; returns what absl leaves of argv. Raises UserError."""
  flags.DEFINE_enum('of', 'values', TARGETS, 'What of the picture the network is given.')
  flags.DEFINE_string('with', None, 'Another picture of this size, to merge it with.')
  flags.DEFINE_float('share', 0.5, 'Of the first picture in a merger.')
  flags.DEFINE_float('scale', 1.0, 'Size of the drawing, in sizes of the picture.')
  flags.DEFINE_integer('steps', 1000, 'Of Muon.')
  flags.DEFINE_integer('width', 256, 'Of the layers.')
  flags.DEFINE_integer('layers', 3, 'Of sines after the first.')
  flags.DEFINE_float('lr', 2e-3, 'Rate of Muon at first.')
  flags.DEFINE_integer('seed', 0, 'Of the initialisation.')
  return command.parse_flags(argv)


def main(argv: list[str]) -> None:
  """The command, after `parse_flags`. Raises UserError."""
  if len(argv) != 3:
    raise UserError(f'{len(argv) - 1} arguments: expected two, the picture and the .png to write')
  f = flags.FLAGS
  if not argv[2].endswith('.png'):
    raise UserError(f'{argv[2]}: expected a name that ends in .png')
  checks.within('--seed', f.seed, checks.Range(0, 2**32 - 1))
  if f['with'].value and f.of != 'values':
    raise UserError(f'--of={f.of} beside --with, which merges gradients: leave one out')
  if not 0 < f.scale <= 64:
    raise UserError(f'--scale={f.scale}: expected a number above 0, at most 64')
  folder = pathlib.Path(argv[2]).absolute().parent
  if not os.access(folder, os.W_OK):
    raise UserError(f'{folder} is no folder that can be written to: make it, or name another')
  image = read_picture(argv[1])
  size = [max(1, round(n * f.scale)) for n in image.shape[:2]]
  if size[0] * size[1] > MAX_DRAWN:
    raise UserError(
      f'--scale={f.scale}: {size[0]} x {size[1]} pixels, expected {MAX_DRAWN} at most'
    )
  settings = dict(steps=f.steps, width=f.width, layers=f.layers, lr=f.lr, seed=f.seed)
  command.start()
  other = f['with'].value
  if other:
    fitted = merge(image, read_picture(other), f.share, **settings)
  else:
    fitted = fit(image, f.of, **settings)
    logging.info(f'PSNR {psnr(image, fitted.draw()):.1f} dB')
  pixels = np.clip(fitted.draw(*size) * 127.5 + 128, 0, 255).astype(np.uint8)
  save_png(argv[2], pixels)


if __name__ == '__main__':
  command.run(main, parse_flags)
