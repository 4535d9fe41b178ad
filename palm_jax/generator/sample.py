"""Pictures of a generator, to look at.

  python -m palm_jax.generator.sample --network=network.pkl --classes=0,1,2 --truncation=0.7 out.png

They are a grid (.png), or films of the latent world under random actions (.webp).
"""

import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from palm_jax import environment
from palm_jax.base import command, files, pictures
from palm_jax.base.errors import NonFiniteError, UserError
from palm_jax.generator import load_generator
from palm_jax.layers.pixels import to_uint8

TRUNCATIONS = -10, 10  # beyond, pictures are only dearer to compute and empty


def sample(
  network: str | os.PathLike,
  out: str | os.PathLike,
  classes: list[int] | None = None,
  truncation: float = 1.0,
  seed: int = 0,
  columns: int = 10,
  steps: int = 64,
  alpha: float = 0.5,
  beta: float = 0.95,
) -> None:
  """Draws a grid or a film into a file.

  Args:
    network: path or name for `load_generator`.
    out: *.png, a class a row and a latent a column; or *.webp, one film a class side by side.
    classes: their numbers; None is all (at most 10). An unconditional generator has none.
    truncation: psi.
    seed: of the latents, and of the actions of a film.
    columns: of the grid.
    steps: frames of the film.
    alpha, beta: of the film's `environment.Dynamics`.

  Raises:
    UserError: invalid values, before anything is compiled; or what `load_generator` refuses.
    NonFiniteError: pictures of NaN or infinity.
  """
  out = pathlib.Path(out)
  if out.suffix not in ('.png', '.webp'):
    raise UserError(f'{out}: expected a name that ends in .png (a grid) or .webp (a film)')
  files.check_writable(out)
  _check_range('truncation', truncation, *TRUNCATIONS)
  _check_range('seed', seed, 0, 2**32 - 1)
  _check_range('columns', columns, 1, 100)
  _check_range('steps', steps, 1, 10_000)
  _check_range('alpha', alpha, 0, 1)
  _check_range('beta', beta, 0, 1)
  generator = load_generator(network)
  if classes is None:
    classes = list(range(min(generator.num_classes, 10)))
  _check_classes(classes, generator.num_classes)
  if out.suffix == '.webp':
    height, width = generator.image_shape[:2]
    pictures.check_film(out, height, width * max(1, len(classes)))

  @jax.jit
  def draw_checked(variables, z, labels):
    images = generator.apply(variables, z, labels, truncation)
    return to_uint8(images), jnp.isfinite(images).all()

  def draw(variables, z, labels):
    images, finite = draw_checked(variables, z, labels)
    if not finite:
      raise NonFiniteError(
        f'{network} draws NaN or infinity at truncation={truncation}: give another network, or a '
        'truncation nearer to 1'
      )
    return images

  variables = jax.device_put(generator.variables)
  rows = np.asarray(classes or [0], np.int32)  # unconditional: one row, whose label is not read
  with jax.default_matmul_precision('highest'):
    if out.suffix == '.png':
      z = jax.random.normal(jax.random.key(seed), (columns, generator.z_dim))
      # (R, columns, H, W, C)
      images = np.stack([draw(variables, z, np.full(columns, label)) for label in rows])
      pictures.save_png(out, pictures.grid(images, labels=classes or None))
    else:
      walk = jax.jit(latent_walk, static_argnums=(1, 2))(
        jax.random.key(seed), steps, generator.z_dim, alpha, beta
      )
      films = [draw(variables, jnp.tile(z, (len(rows), 1)), rows) for z in walk]
      pictures.save_webp(out, [pictures.grid(np.asarray(frames)[None]) for frames in films])


def _check_range(name, value, least, most):
  if not least <= value <= most:
    raise UserError(f'{name}={value}: expected {least} to {most}')


def _check_classes(classes, count):
  wrong = [number for number in classes if not 0 <= number < count]
  if not wrong:
    return
  if not count:
    raise UserError(f'class {wrong[0]}: the generator has no classes; leave --classes away')
  raise UserError(f'class {wrong[0]}: expected 0 to {count - 1}')


def latent_walk(key: jax.Array, steps: int, z_dim: int, alpha: float, beta: float) -> jax.Array:
  """The latents of one environment under random actions, uniform in [-1, 1]: (steps, z_dim)."""
  dynamics = environment.Dynamics(jnp.float32(alpha), jnp.float32(beta))
  ids = jnp.zeros(1, jnp.int32)

  def step(state, key):
    key_action, key_step = jax.random.split(key)
    action = jax.random.uniform(key_action, (1, z_dim), minval=-1, maxval=1)
    return environment.step(state, action, key_step, ids, dynamics, steps + 1, 0), state.z[0]

  key, key_first = jax.random.split(key)
  first = environment.reset(key_first, ids, ids, z_dim, 0, dynamics)
  return jax.lax.scan(step, first, jax.random.split(key, steps))[1]


def parse_flags(argv: list[str]) -> list[str]:
  """Defines the flags and reads them; returns what absl leaves of argv. Raises UserError."""
  world = environment.default_config()
  flags.DEFINE_string('network', None, 'File, folder or name of the generator.', required=True)
  flags.DEFINE_list('classes', None, 'Class numbers, such as 0,1,2; default all (at most 10).')
  flags.DEFINE_float('truncation', 1.0, 'Truncation psi.')
  flags.DEFINE_integer('seed', 0, 'Of the latents and actions.')
  flags.DEFINE_integer('columns', 10, 'Of the grid.')
  flags.DEFINE_integer('steps', world.episode_length, 'Frames of the film.')
  flags.DEFINE_float('alpha', world.alpha, 'Share of the action in the composed latent.')
  flags.DEFINE_float('beta', world.beta, 'Persistence of the latent.')
  return command.parse_flags(argv)


def main(argv: list[str]) -> None:
  """The command, after `parse_flags`. Raises UserError."""
  if len(argv) != 2:
    raise UserError(
      f'{len(argv) - 1} arguments besides the flags: expected one, the .png or .webp to write'
    )
  f = flags.FLAGS
  classes = _class_numbers(f.classes)
  command.start()
  sample(f.network, argv[1], classes, f.truncation, f.seed, f.columns, f.steps, f.alpha, f.beta)


def _class_numbers(words: list[str] | None) -> list[int] | None:
  if words is None:
    return None
  try:
    return [int(word) for word in words]
  except ValueError as e:
    raise UserError(f'--classes={",".join(words)}: expected class numbers, such as 0,1,2') from e


if __name__ == '__main__':
  command.run(main, parse_flags)
