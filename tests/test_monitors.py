"""Monitors see a collapse."""

import numpy as np
import pytest

from palm_jax import monitors


def test_effective_rank_sees_what_std_does_not():
  rng = np.random.default_rng(0)
  noise, directions = rng.normal(size=(600, 64)), rng.normal(size=(64, 100))

  def z_std_ratio(x):
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    return unit.std(0).mean() * 10

  for dtype in (np.float64, np.float32):
    rank_one = (noise[:, :1] * directions[:1]).astype(dtype)
    erank, top = monitors.effective_rank(rank_one)
    assert erank == pytest.approx(1, abs=1e-6) and top == pytest.approx(1, abs=1e-6)
  assert 0.7 < z_std_ratio(rank_one) < 0.9  # nearly healthy, though one number describes a sample

  # Orthonormal directions with equal weights: as many as there are; by numpy's SVD for anything
  # else.
  erank, top = monitors.effective_rank(np.eye(8)[rng.permutation(np.repeat(np.arange(8), 50))])
  assert erank == pytest.approx(7, rel=1e-6) and top == pytest.approx(
    1 / 7, rel=1e-6
  )  # centring takes one away
  for x in (noise @ directions, noise[:40] @ directions):
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    singular = np.linalg.svd(unit - unit.mean(0), compute_uv=False)
    share = singular[singular > 1e-6] / singular.sum()
    erank, top = monitors.effective_rank(x)
    assert erank == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-6)
    assert top == pytest.approx(singular[0] ** 2 / (singular**2).sum(), rel=1e-6)
  assert monitors.effective_rank(np.ones((10, 4), np.float32)) == (1, 1)


def test_troubles_are_told():
  healthy = dict(z_std_ratio=0.9, h_effective_rank=40.0, cone=0.2)
  assert not monitors.troubles(healthy) and not monitors.troubles({})
  for changes, words in (
    (dict(z_std_ratio=0.01), ('z_std_ratio 0.010', 'simsiam.lr')),
    (dict(h_effective_rank=1.2), ('h_effective_rank 1.2', 'simsiam.lr')),
    (dict(cone=0.9), ('length 0.90', 'sac.skill_dim')),
  ):
    (line,) = monitors.troubles(healthy | changes).values()
    assert all(word in line for word in words) and '\n' not in line
