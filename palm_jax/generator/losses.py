"""Losses of StyleGAN2 (arXiv 1912.04958, appendix B; stylegan2-ada-pytorch, training/loss.py).

Logits are (N,), before any sigmoid. A loss is the mean over the local batch. Callers inside
shard_map take the pmean of the loss and differentiate that, never the pmean of gradients.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def generator_loss(fake_logits: jax.Array) -> jax.Array:
  """Non-saturating loss of G, mean softplus(-D(fake)): () from (N,) logits."""
  return jax.nn.softplus(-fake_logits).mean()


def discriminator_loss(real_logits: jax.Array, fake_logits: jax.Array) -> jax.Array:
  """Logistic loss of D, mean softplus(D(fake)) + mean softplus(-D(real)): () from (N,) logits."""
  return jax.nn.softplus(fake_logits).mean() + jax.nn.softplus(-real_logits).mean()


def r1_penalty(discriminate: Callable, images: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Squared norm of the logits' gradient with respect to the images (arXiv 1801.04406, equation 9).

  Args:
    discriminate: (N, H, W, C) images -> (N,) logits.
    images: (N, H, W, C) real images; an augmentation belongs inside `discriminate`.

  Returns:
    (N,) penalties, without gamma / 2, and the (N,) logits.
  """

  def total(x):
    logits = discriminate(x)
    return logits.sum(), logits

  gradient, logits = jax.grad(total, has_aux=True)(images)
  return jnp.square(gradient).sum((1, 2, 3)), logits


def path_lengths(synthesize: Callable, ws: jax.Array, directions: jax.Array) -> jax.Array:
  """Lengths of the Jacobian's product with image noise (arXiv 1912.04958, section 3.2).

  Args:
    synthesize: (N, L, w_dim) ws -> (N, H, W, C) images.
    ws: (N, L, w_dim).
    directions: (N, H, W, C) standard normal noise.

  Returns:
    (N,) root of the mean over the L layers of the squared norm of d(sum images * directions /
    sqrt(H W)) / d ws.
  """
  scale = (directions.shape[1] * directions.shape[2]) ** -0.5
  gradient = jax.grad(lambda w: (synthesize(w) * directions).sum() * scale)(ws)
  return jnp.sqrt(jnp.square(gradient).sum(2).mean(1))


def path_length_penalty(
  lengths: jax.Array, pl_mean: jax.Array, decay: float = 0.01, axis_name: str | None = None
) -> tuple[jax.Array, jax.Array]:
  """Squared distance of the path lengths from their running mean.

  The mean moves first, and the gradient also flows through the batch's share in it, as in the
  original.

  Args:
    lengths: (N,) local path lengths.
    pl_mean: () running mean before this batch.
    decay: the batch's share in the new mean.  # stylegan2-ada-pytorch, pl_decay
    axis_name: mesh axis over which the batch is spread.

  Returns:
    (N,) penalties and the new () running mean.
  """
  mean = lengths.mean()
  if axis_name is not None:
    mean = jax.lax.pmean(mean, axis_name)
  pl_mean = pl_mean + decay * (mean - pl_mean)
  return jnp.square(lengths - pl_mean), pl_mean
