"""Pictures to look at while a generator trains, and the order in which it sees its training set."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from palm_jax.generator.stylegan2 import Generator
from palm_jax.layers.pixels import to_uint8

ROWS = 10  # of a grid of pictures, at most


def batch_indices(seed: int, start: int, count: int, size: int) -> np.ndarray:
  """Positions start ... start + count of the endless shuffled walk over a data set of `size`
  images: (count,) int32.

  Each epoch is a permutation that depends on (seed, epoch) only, so a resumed run goes on exactly
  where it stopped.
  """
  out = []
  for epoch in range(start // size, (start + count - 1) // size + 1):
    first = epoch * size
    order = np.random.default_rng([seed, epoch]).permutation(size)
    out.append(order[max(start - first, 0) : start + count - first])
  return np.concatenate(out).astype(np.int32)


def grid_shape(G: Generator) -> tuple[int, int]:
  """(rows, columns) of a grid to look at, a class a row; stacks of frames, which are shown side by
  side, are fewer."""
  return min(ROWS, G.num_classes) or ROWS, 10 if G.image_shape[-1] in (1, 3) else 2


def sample_images(
  G: Generator, variables: Any, key: jax.Array, truncation_psi: float = 1.0
) -> jax.Array:
  """Generated pictures to look at: (R, C, H, W, channels) uint8, a class a row and a latent a
  column, or all different."""
  rows, columns = grid_shape(G)
  z = jax.random.normal(key, (columns if G.num_classes else rows * columns, G.z_dim))
  labels = (
    jnp.repeat(jnp.arange(rows), columns) if G.num_classes else jnp.zeros(rows * columns, jnp.int32)
  )
  images = G.apply(variables, jnp.tile(z, (len(labels) // len(z), 1)), labels, truncation_psi)
  return to_uint8(images).reshape(rows, columns, *G.image_shape)


def real_images(images: np.ndarray, labels: np.ndarray, G: Generator) -> np.ndarray:
  """Training pictures (N, H, W, channels) in such a grid, spread evenly over the set; black where a
  class has too few."""
  rows, columns = grid_shape(G)
  found = np.zeros((rows, columns, *images.shape[1:]), np.uint8)
  for row in range(rows):
    of_row = np.flatnonzero(labels == row) if G.num_classes else np.arange(row, len(images), rows)
    chosen = of_row[:: max(1, len(of_row) // columns)][:columns]
    found[row, : len(chosen)] = images[chosen]
  return found


def padded(images: np.ndarray, pad: int) -> np.ndarray:
  """(N, H, W, C) pictures with `pad` pixels more on each side, like those at the edge: what a
  generator with generator.pad learns."""
  return np.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)), 'edge') if pad else images
