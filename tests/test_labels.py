"""Which rows a classifier learns from, and which are held out."""

import numpy as np
from ml_collections import ConfigDict

from palm_jax.evaluate.labels import make_tasks, nested_rows, stratified_split


def test_nested_rows():
  labels = np.random.default_rng(0).integers(0, 5, 1000)
  small, large = nested_rows(labels, 0.05, (3, 0)), nested_rows(labels, 0.5, (3, 0))
  assert set(small) < set(large)
  for label in range(5):
    assert np.sum(labels[small] == label) == round(0.05 * np.sum(labels == label))
  assert set(small) != set(nested_rows(labels, 0.05, (4, 0)))
  assert (
    len(nested_rows(labels, 1e-6, (3, 0))) == 10
  )  # two a class are the least a held-out part can be taken of


def test_seeds_share_no_draw():
  labels = np.repeat([0, 1, 2], 100)
  c = ConfigDict(dict(label_fractions=(0.1, 1.0), label_draws=3))
  draws = [
    tuple(task.rows)
    for seed in (0, 1, 2)
    for task in make_tasks(c, 'fine', labels, labels, 3, seed)
    if task.fraction < 1
  ]
  assert len(draws) == len(set(draws)) == 9


def test_stratified_split():
  labels = np.repeat([0, 1, 2, 7], [2, 30, 100, 5])
  np.random.default_rng(0).shuffle(labels)
  rest, held_out = stratified_split(labels, 0.1, seed=5)
  assert sorted([*rest, *held_out]) == list(range(len(labels)))
  assert {c: int(np.sum(labels[held_out] == c)) for c in (0, 1, 2, 7)} == {0: 1, 1: 3, 2: 10, 7: 1}
  assert set(labels[rest]) == {0, 1, 2, 7}
  again = stratified_split(labels, 0.1, seed=5)
  np.testing.assert_array_equal(again[1], held_out)
  other = stratified_split(labels, 0.1, seed=6)
  assert set(other[1]) != set(held_out)
