"""Principal components against scikit-learn's."""

import numpy as np
from sklearn.decomposition import PCA

from palm_jax.evaluate.components import principal_components


def test_they_are_those_of_scikit_learn():
  x = np.random.default_rng(0).normal(size=(5000, 12)) @ np.diag(np.arange(1, 13)) + 3
  x = x.astype(np.float32)
  got, pca = principal_components(x, 5)(x), PCA(5, svd_solver='full').fit(x)
  want = pca.transform(x)
  signs = np.sign(np.sum(got * want, axis=0))
  np.testing.assert_allclose(got, want * signs, atol=1e-3)
  assert got.dtype == np.float32
