"""Principal components: pixels in as many numbers as an encoder has features."""

from typing import NamedTuple

import numpy as np

ROWS = 4096  # images at a time


class Components(NamedTuple):
  """Mean (D,) of the data and their first principal axes (D, F)."""

  mean: np.ndarray
  axes: np.ndarray

  def __call__(self, x: np.ndarray) -> np.ndarray:
    """(N, D) -> (N, F) float32."""
    return np.concatenate(
      [(x[i : i + ROWS] - self.mean) @ self.axes for i in range(0, len(x), ROWS)]
    ).astype(np.float32)


def principal_components(x: np.ndarray, count: int) -> Components:
  """The first `count` principal components of (N, D) data, of D or fewer."""
  parts = [np.asarray(x[i : i + ROWS], np.float64) for i in range(0, len(x), ROWS)]
  mean = np.sum([part.sum(0) for part in parts], axis=0) / len(x)
  covariance = np.zeros((x.shape[1], x.shape[1]))
  for part in parts:
    covariance += (part - mean).T @ (part - mean)
  axes = np.linalg.eigh(covariance)[1][:, ::-1][:, :count]
  return Components(mean.astype(np.float32), np.ascontiguousarray(axes, np.float32))
