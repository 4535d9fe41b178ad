"""python -m palm_jax.generator.sample --network=network.pkl --classes=0,1,2 --truncation=0.7
--seed=0 out.png

Pictures of a generator, to look at: a grid (.png), or the latent world's films under random actions
(.webp).
"""

import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from palm_jax import environment
from palm_jax.base import command, pictures
from palm_jax.base.errors import UserError
from palm_jax.generator import load_generator
from palm_jax.layers.pixels import to_uint8


def sample(
  network, out, classes=None, truncation=1.0, seed=0, columns=10, steps=64, alpha=0.5, beta=0.95
):
  """Draws a grid or a film into a file.

  Args:
    network: path or name for `load_generator`.
    out: *.png, a class a row and a latent a column; or *.webp, one film a class side by side.
    classes: list of class numbers; None is all (at most 10). An unconditional generator has none.
    truncation: psi.
    seed: of the latents, and of the actions of a film.
    columns: of the grid.
    steps: frames of the film.
    alpha, beta: of the film's `environment.Dynamics`.

  Raises:
    UserError: values that cannot be, before anything is compiled; or what `load_generator` refuses.
  """
  out = pathlib.Path(out)
  if out.suffix not in ('.png', '.webp'):
    raise UserError(f'{out}: expected a name that ends in .png (a grid) or .webp (a film)')
  if not math.isfinite(truncation):
    raise UserError(
      f'truncation={truncation}: expected a number, from 0 (the mean picture) to 1 (no truncation)'
    )
  for name, value, least, most in (
    ('seed', seed, 0, 2**32 - 1),
    ('columns', columns, 1, 100),
    ('steps', steps, 1, 10_000),
    ('alpha', alpha, 0, 1),
    ('beta', beta, 0, 1),
  ):
    if not least <= value <= most:
      raise UserError(f'{name}={value}: expected {least} to {most}')
  generator = load_generator(network)
  count = generator.num_classes
  if classes is None:
    classes = list(range(min(count, 10)))
  wrong = [c for c in classes if not 0 <= c < count]
  if wrong:
    raise UserError(
      f'class {wrong[0]}: '
      + (
        f'expected 0 to {count - 1}'
        if count
        else 'the generator has no classes; leave --classes away'
      )
    )

  @jax.jit
  def draw(variables, z, labels):
    return to_uint8(generator.apply(variables, z, labels, truncation))

  variables = jax.device_put(generator.variables)
  rows = np.asarray(classes or [0], np.int32)  # unconditional: one row, whose label is not read
  with jax.default_matmul_precision('highest'):
    if out.suffix == '.png':
      z = jax.random.normal(jax.random.key(seed), (columns, generator.z_dim))
      images = np.stack(
        [draw(variables, z, np.full(columns, label)) for label in rows]
      )  # (R, columns, H, W, C)
      pictures.save_png(out, pictures.grid(images, labels=classes or None))
    else:
      walk = jax.jit(latent_walk, static_argnums=(1, 2))(
        jax.random.key(seed), steps, generator.z_dim, alpha, beta
      )
      films = [draw(variables, jnp.tile(z, (len(rows), 1)), rows) for z in walk]
      pictures.save_webp(out, [pictures.grid(np.asarray(frames)[None]) for frames in films])


def latent_walk(key, steps, z_dim, alpha, beta):
  """The latents of one environment under random actions, uniform in [-1, 1]: (steps, z_dim)."""
  dynamics, ids = (
    environment.Dynamics(jnp.float32(alpha), jnp.float32(beta)),
    jnp.zeros(1, jnp.int32),
  )

  def step(state, key):
    key_action, key_step = jax.random.split(key)
    action = jax.random.uniform(key_action, (1, z_dim), minval=-1, maxval=1)
    return environment.step(state, action, key_step, ids, dynamics, steps + 1, 0), state.z[0]

  key, key_first = jax.random.split(key)
  first = environment.reset(key_first, ids, ids, z_dim, 0)
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
  if len(argv) != 2:
    raise UserError(
      f'{len(argv) - 1} arguments besides the flags: expected one, the .png or .webp to write'
    )
  f = flags.FLAGS
  try:
    classes = None if f.classes is None else [int(c) for c in f.classes]
  except ValueError as e:
    raise UserError(
      f'--classes={",".join(f.classes)}: expected class numbers, such as 0,1,2'
    ) from e
  command.start()
  sample(f.network, argv[1], classes, f.truncation, f.seed, f.columns, f.steps, f.alpha, f.beta)


if __name__ == '__main__':
  command.run(main, parse_flags)
