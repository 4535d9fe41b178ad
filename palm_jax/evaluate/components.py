"""Principal components: pixels in as many numbers as an encoder has features."""

import math
from typing import NamedTuple

import numpy as np
from absl import logging

from palm_jax.base import devices

ROWS = 4096  # images at a time
MOST_PIXELS = 64 * 64 * 3  # numbers a picture: components of more take minutes and many GB
BYTES_A_PIXEL = 16  # float32 twice, and once float64


class Components(NamedTuple):
  """Mean (D,) of the data and their first principal axes (D, F)."""

  mean: np.ndarray
  axes: np.ndarray

  def __call__(self, x: np.ndarray) -> np.ndarray:
    """(N, D) -> (N, F) float32."""
    return np.concatenate(
      [(x[i : i + ROWS] - self.mean) @ self.axes for i in range(0, len(x), ROWS)]
    ).astype(np.float32)


def pixels_fit(images: np.ndarray) -> bool:
  """Whether pixels (N, H, W, C) can be features; a warning says why they cannot."""
  width, need = math.prod(images.shape[1:]), BYTES_A_PIXEL * images.size
  if width <= MOST_PIXELS and need <= devices.machine_memory():
    return True
  logging.warning(
    'probe: no rows of raw pixels, as pictures of %d numbers (at most %d) would take %.0f GiB: '
    '--config.probe.pixels=False leaves them out without a word',
    width,
    MOST_PIXELS,
    need / 2**30,
  )
  return False


def principal_components(x: np.ndarray, count: int) -> Components:
  """The first `count` principal components of (N, D) data, of D or fewer."""
  parts = [np.asarray(x[i : i + ROWS], np.float64) for i in range(0, len(x), ROWS)]
  mean = np.sum([part.sum(0) for part in parts], axis=0) / len(x)
  covariance = np.zeros((x.shape[1], x.shape[1]))
  for part in parts:
    covariance += (part - mean).T @ (part - mean)
  axes = np.linalg.eigh(covariance)[1][:, ::-1][:, :count]
  return Components(mean.astype(np.float32), np.ascontiguousarray(axes, np.float32))
