"""First weights of the agent's networks."""

import jax
import jax.numpy as jnp
import numpy as np

from palm_jax.actor_critic import MLP, orthogonal


def test_many_agents_at_once_are_drawn_one_after_the_other():
  """The same as each alone; and no QR of a batch, in which jaxlib can hang on the CPU."""
  network, x = MLP((8,), 3), jnp.zeros((1, 5))
  keys = jax.random.split(jax.random.key(0), 4)
  many = jax.vmap(lambda key: network.init(key, x))
  for i, key in enumerate(keys):
    jax.tree.map(
      lambda a, b, i=i: np.testing.assert_allclose(a[i], b, atol=1e-6),
      many(keys),
      network.init(key, x),
    )
  lines = str(jax.make_jaxpr(many)(keys)).splitlines()
  factored = [line for line in lines if 'geqrf' in line or ' qr[' in line or 'householder' in line]
  assert factored and not any('[4,' in line for line in factored)


def test_rows_or_columns_are_orthonormal():
  for shape in ((6, 4), (4, 6)):
    w = np.asarray(orthogonal(2.0)(jax.random.key(0), shape), np.float64)
    product = w.T @ w if shape[0] > shape[1] else w @ w.T
    np.testing.assert_allclose(product, 4 * np.eye(4), atol=1e-5)
