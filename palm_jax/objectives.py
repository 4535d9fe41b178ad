"""Losses beside SimSiam's that have no negatives: BYOL, VICReg, Barlow Twins.

Each takes this device's share of the batch and returns the loss of the GLOBAL batch, which is the
same for any number of devices. Differentiate it as it is. The contrastive ones are in
contrastive.py.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from palm_jax.base.devices import mean
from palm_jax.contrastive import normalize

VICREG_WEIGHTS = 25.0, 25.0, 1.0  # arXiv 2105.04906, 4.2: invariance, variance, covariance
GAMMA = 1.0  # VICReg 4.1: the standard deviation that each dimension shall have
VICREG_EPSILON = 1e-4  # VICReg 4.2
BARLOW_LAMBDA = 0.0051  # arXiv 2103.03230, 2.2; facebookresearch/barlowtwins
BARLOW_EPSILON = 1e-5  # of the batch norm in facebookresearch/barlowtwins main.py


def cosine(a: jax.Array, b: jax.Array) -> jax.Array:
  """Mean cosine between the rows of a and b (B, D), in at least float32."""
  return jnp.mean(jnp.sum(normalize(a) * normalize(b), axis=-1))


def byol(
  p1: jax.Array,
  t1: jax.Array,
  p2: jax.Array | None,
  t2: jax.Array,
  axis_name: str | None = None,
) -> jax.Array:
  """Squared distance between unit vectors, 2 - 2 cos, of each prediction to the other view's target
  (arXiv 2006.07733, equation 2), summed over both directions as there: in [0, 8].

  Args:
    p1, t1, p2, t2: (B, D) predictions of the online network and projections of the target network
      for the two views; p2 None: one direction alone, p1 to t2.
    axis_name: mesh axis over which the batch is split; None where it is whole.
  """
  distance = lambda p, t: 2 - 2 * cosine(p, jax.lax.stop_gradient(t))
  value = distance(p1, t2)
  if p2 is not None:
    value += distance(p2, t1)
  return mean(value, axis_name)


def target_rate(tau: float, total_updates: int) -> optax.Schedule:
  """1 - tau_k of BYOL's target: tau rises from `tau` to 1 by a cosine over the run (3.2).

  1 - tau_k = (1 - tau) (cos(pi k / K) + 1) / 2.
  """
  return optax.cosine_decay_schedule(1 - tau, total_updates)


def follow(target: Any, params: Any, rate: jax.typing.ArrayLike) -> Any:
  """The target's parameters after a step: tau target + (1 - tau) params, rate = 1 - tau.

  Networks of `params` that the target has not, such as the predictor, are left out.
  """
  step = lambda t, p: t + jnp.asarray(rate, t.dtype) * (p - t)
  return jax.tree.map(step, target, {name: params[name] for name in target})


def vicreg(
  z1: jax.Array,
  z2: jax.Array,
  weights: tuple[float, float, float] = VICREG_WEIGHTS,
  axis_name: str | None = None,
) -> jax.Array:
  """Invariance, variance and covariance of two views' projections (arXiv 2105.04906, equation 6).

  The invariance is the mean over samples and dimensions, as in algorithm 1 and in
  facebookresearch/vicreg, for which the weights are; equation 5 sums over dimensions. Variance and
  covariance are sums over the two views, as in equation 6; that repository halves the variance.

  Args:
    z1, z2: (B, D) projections of this device, without batch norm at their end.
    weights: lambda, mu and nu of the paper.
    axis_name: mesh axis over which the batch is split; None where it is whole.
  """
  z1, z2 = _wide(z1), _wide(z2)
  invariance = mean((z1 - z2) ** 2, axis_name)
  parts = [_variance_and_covariance(z, axis_name) for z in (z1, z2)]
  variance, covariance = (sum(part) for part in zip(*parts, strict=True))
  return weights[0] * invariance + weights[1] * variance + weights[2] * covariance


def _variance_and_covariance(z, axis_name):
  """v(Z) and c(Z), equations 1 to 4, over the global batch."""
  count = len(z) * (jax.lax.axis_size(axis_name) if axis_name else 1)
  z = z - mean(z, axis_name, axis=0)
  matrix = _products(z, z, axis_name) * (count / (count - 1))  # (D, D)
  variances = jnp.diagonal(matrix)
  hinge = jax.nn.relu(GAMMA - jnp.sqrt(variances + VICREG_EPSILON))
  return jnp.mean(hinge), _off_diagonal(matrix) / len(variances)


def barlow(
  z1: jax.Array, z2: jax.Array, lambda_: float = BARLOW_LAMBDA, axis_name: str | None = None
) -> jax.Array:
  """Barlow Twins: the cross-correlation of the views' dimensions shall be the identity
  (arXiv 2103.03230, equations 1 and 2). A sum over D dimensions, so as large as D at the start.

  Args:
    z1, z2: (B, D) projections of this device; they are normalised here, over the global batch.
    lambda_: weight of what is not on the diagonal.
    axis_name: mesh axis over which the batch is split; None where it is whole.
  """
  z1, z2 = (_standardise(_wide(z), axis_name) for z in (z1, z2))
  matrix = _products(z1, z2, axis_name)
  return jnp.sum((1 - jnp.diagonal(matrix)) ** 2) + lambda_ * _off_diagonal(matrix)


def _standardise(z, axis_name):
  z = z - mean(z, axis_name, axis=0)
  return z * jax.lax.rsqrt(mean(z**2, axis_name, axis=0) + BARLOW_EPSILON)


def _products(a, b, axis_name):
  """(D, D) means over the global batch of the products of dimensions of a and b (B, D)."""
  # At full precision: they are compared with 0 and 1.
  matrix = jnp.matmul(a.T, b, precision=jax.lax.Precision.HIGHEST) / len(a)
  return jax.lax.pmean(matrix, axis_name) if axis_name else matrix


def _off_diagonal(matrix):
  """Sum of the squares of what is not on the diagonal."""
  return jnp.sum(jnp.where(jnp.eye(len(matrix), dtype=bool), 0, matrix) ** 2)


def _wide(x):
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))
