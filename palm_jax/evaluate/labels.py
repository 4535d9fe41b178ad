"""Which labels a classifier may learn from, and which are held out."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from palm_jax.base.errors import UserError

FEW = 0.1  # up to this share of labels several draws are made


class Task(NamedTuple):
  """What is to be learned, from which images."""

  labels: str  # 'fine' or 'coarse'
  fraction: float  # of the training labels
  draw: int
  rows: np.ndarray | slice  # of the training images
  train_y: np.ndarray  # labels of those rows
  test_y: np.ndarray
  num_classes: int


def make_tasks(
  c: ConfigDict,
  name: str,
  train_y: np.ndarray,
  test_y: np.ndarray,
  num_classes: int,
  seed: int,
) -> list[Task]:
  """The tasks of one set of labels: every fraction, and several draws of the small ones.

  Args:
    c: `label_fractions` in (0, 1], and `label_draws` for those up to FEW.
    name: of the set, 'fine' or 'coarse'.
    train_y: (N,) labels.
    test_y: (M,) labels.
    seed: of the draws; those of another seed are others.
  """
  tasks = []
  for fraction in c.label_fractions:
    for draw in range(c.label_draws if fraction <= FEW else 1):
      everything = fraction == 1
      rows = slice(None) if everything else nested_rows(train_y, fraction, (seed, draw))
      tasks.append(Task(name, float(fraction), draw, rows, train_y[rows], test_y, num_classes))
  return tasks


def nested_rows(labels: np.ndarray, fraction: float, seed: Sequence[int]) -> np.ndarray:
  """Sorted row numbers of a stratified share of labels (N,).

  Of each class `fraction` is taken, rounded, two at least. The rows of a smaller fraction with the
  same seed are among them.
  """
  chosen = []
  for label in np.unique(labels):
    rows = np.random.default_rng([*seed, label]).permutation(np.flatnonzero(labels == label))
    chosen.append(rows[: max(2, round(fraction * len(rows)))])
  return np.sort(np.concatenate(chosen))


def stratified_split(
  labels: np.ndarray, fraction: float, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
  """Splits row numbers so that each class gives `fraction` of its rows to the second part.

  The share is rounded, and leaves each part one row at least.

  Args:
    labels: (N,) integers.
    fraction: in (0, 1).
    seed: the split is a function of the labels, the fraction and this number.

  Returns:
    (rest, held_out): sorted int arrays, disjoint, together 0..N-1, each with every class.

  Raises:
    UserError: a class with one example.
  """
  labels = np.asarray(labels)
  generator = np.random.default_rng(seed)
  held_out = np.zeros(len(labels), bool)
  for label in np.unique(labels):
    rows = generator.permutation(np.flatnonzero(labels == label))
    if len(rows) < 2:
      raise UserError(
        f'class {label} has one training example, expected at least two so that one can be held '
        'out: give more labels'
      )
    held_out[rows[: np.clip(round(fraction * len(rows)), 1, len(rows) - 1)]] = True
  return np.flatnonzero(~held_out), np.flatnonzero(held_out)
