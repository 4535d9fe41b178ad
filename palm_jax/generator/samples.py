"""Pictures to look at while a generator trains, and the order in which it sees its training set."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from palm_jax.generator.sines import TrainedNetwork
from palm_jax.layers.pixels import to_uint8

ROWS = 10  # of a grid of pictures, at most


def batch_indices(seed: int, start: int, count: int, size: int) -> np.ndarray:
  """Positions start ... start + count of an endless shuffled walk over `size` images.

  Each epoch is a permutation that depends on (seed, epoch) only, so a resumed run continues exactly
  where it stopped.

  Returns:
    (count,) int32.
  """
  out = []
  for epoch in range(start // size, (start + count - 1) // size + 1):
    first = epoch * size
    order = np.random.default_rng([seed, epoch]).permutation(size)
    out.append(order[max(start - first, 0) : start + count - first])
  return np.concatenate(out).astype(np.int32)


def grid_shape(G: TrainedNetwork) -> tuple[int, int]:
  """(rows, columns) of a grid to look at, a class a row.

  Stacks of frames are fewer, as their frames are shown side by side.
  """
  rows = min(ROWS, G.num_classes) if G.num_classes else ROWS
  columns = 10 if G.image_shape[-1] in (1, 3) else 2
  return rows, columns


def sample_images(
  G: TrainedNetwork,
  variables: Any,
  key: jax.Array,
  truncation_psi: float = 1.0,
  at_once: int | None = None,
) -> jax.Array:
  """Generated pictures to look at, a class a row and a latent a column, or all different.

  At most `at_once` of them are drawn together; None: all.

  Returns:
    (rows, columns, H, W, C) uint8; see `grid_shape`.
  """
  rows, columns = grid_shape(G)
  if G.num_classes:
    z = jax.random.normal(key, (columns, G.z_dim))
    labels = jnp.repeat(jnp.arange(rows), columns)
  else:
    z = jax.random.normal(key, (rows * columns, G.z_dim))
    labels = jnp.zeros(rows * columns, jnp.int32)
  latents = jnp.tile(z, (len(labels) // len(z), 1))
  # A few at a time: all at once would take more memory than training does.
  count = len(labels)
  chunk = max(n for n in range(1, count + 1) if count % n == 0 and n <= (at_once or count))

  def draw(some):
    images: Any = G.apply(variables, *some, truncation_psi)
    return to_uint8(images)

  chunks = jax.tree.map(lambda x: x.reshape(-1, chunk, *x.shape[1:]), (latents, labels))
  images = jax.lax.map(draw, chunks)
  return images.reshape(rows, columns, *G.image_shape)


def real_images(images: np.ndarray, labels: np.ndarray, G: TrainedNetwork) -> np.ndarray:
  """Training pictures (N, H, W, C) in such a grid, spread evenly over the set.

  Places are black where a class has too few.
  """
  rows, columns = grid_shape(G)
  found = np.zeros((rows, columns, *images.shape[1:]), np.uint8)
  for row in range(rows):
    of_row = np.flatnonzero(labels == row) if G.num_classes else np.arange(row, len(images), rows)
    chosen = of_row[:: max(1, len(of_row) // columns)][:columns]
    found[row, : len(chosen)] = images[chosen]
  return found


def padded(images: np.ndarray, pad: int) -> np.ndarray:
  """Pictures (N, H, W, C) with `pad` pixels more on each side, which repeat those at the edge.

  They are what a generator with generator.pad learns.
  """
  if not pad:
    return images
  return np.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)), 'edge')
