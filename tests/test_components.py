"""Principal components against scikit-learn's."""

import numpy as np
from sklearn.decomposition import PCA

from palm_jax.base import devices
from palm_jax.evaluate.components import pixels_fit, principal_components


def test_they_are_those_of_scikit_learn():
  x = np.random.default_rng(0).normal(size=(5000, 12)) @ np.diag(np.arange(1, 13)) + 3
  x = x.astype(np.float32)
  got, pca = principal_components(x, 5)(x), PCA(5, svd_solver='full').fit(x)
  want = pca.transform(x)
  signs = np.sign(np.sum(got * want, axis=0))
  np.testing.assert_allclose(got, want * signs, atol=1e-3)
  assert got.dtype == np.float32


def test_pixels_of_large_pictures_or_sets_are_no_features(monkeypatch, caplog):
  assert pixels_fit(np.zeros((2, 64, 64, 3), np.uint8)) and not caplog.records
  assert not pixels_fit(np.zeros((2, 96, 96, 3), np.uint8))
  assert 'pictures of 27648 numbers (at most 12288)' in caplog.text
  monkeypatch.setattr(devices, 'machine_memory', lambda: 10**6)
  assert not pixels_fit(np.zeros((100, 32, 32, 3), np.uint8))
