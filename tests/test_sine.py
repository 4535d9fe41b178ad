"""Sine against numpy's in float64, and its derivatives."""

import jax
import numpy as np
import pytest

from palm_jax.layers.sine import sin


@pytest.mark.parametrize('scale', [1e-3, 1, 100, 3000])
def test_sine_and_its_derivatives(scale):
  x = np.random.default_rng(0).uniform(-scale, scale, 5000).astype(np.float32)
  exact = x.astype(np.float64)
  once = jax.grad(lambda x: sin(x))
  found = jax.jit(lambda x: (sin(x), jax.vmap(once)(x), jax.vmap(jax.grad(once))(x)))(x)
  for values, expected in zip(found, (np.sin(exact), np.cos(exact), -np.sin(exact)), strict=True):
    assert values.dtype == np.float32
    np.testing.assert_allclose(values, expected, rtol=0, atol=2.5e-7)


def test_special_numbers():
  values = np.asarray(sin(np.array([0, -0.0, np.inf, -np.inf, np.nan], np.float32)))
  assert values[0] == values[1] == 0 and np.isnan(values[2:]).all()
