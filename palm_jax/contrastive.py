"""Contrastive losses over the global batch: NT-Xent of SimCLR, and SupCon, whose positives are all
samples of a label."""

import jax
import jax.numpy as jnp


def supcon(
  z1: jax.Array,
  z2: jax.Array,
  labels: jax.Array | None,
  temperature: float = 0.1,
  axis_name: str | None = None,
  related: jax.Array | None = None,
) -> jax.Array:
  """Positives are all other views of the same label: mean over them outside the logarithm (arXiv
  2004.11362, equation 2).

  Not scaled by temperature / base temperature, as HobbitLong/SupContrast does: with its defaults
  both are equal.

  Args:
    z1, z2: (B, D) projections of the two views, of this device.
    labels: (B,) integers; None makes each pair a label of its own, which is SimCLR's NT-Xent (arXiv
      2002.05709, equation 1).
    temperature: SupContrast has 0.1 for CIFAR, SimCLR 0.5 (appendix B.9).
    axis_name: mesh axis over which the batch is split; None where it is whole.
    related: (B,) integers; samples that share one are no negatives of each other. None: all are.
  Returns:
    a scalar, the mean over these 2 B rows, in at least float32.
  """
  gather = lambda x: jax.lax.all_gather(x, axis_name, tiled=True) if axis_name else x
  batch, device = len(z1), jax.lax.axis_index(axis_name) if axis_name else 0
  own = device * batch + jnp.arange(batch)  # of a pair, in the global batch
  views = [normalize(z) for z in (z1, z2)]
  everything = jnp.concatenate([gather(view) for view in views])  # (2 G, D)
  pairs, count = gather(own), len(everything) // 2
  kinds = pairs if labels is None else gather(labels)
  logits = jnp.concatenate(views) @ everything.T / temperature  # (2 B, 2 G)
  here = jnp.concatenate([own, own + count])
  themselves = here[:, None] == jnp.arange(2 * count)
  alike = lambda mine, all: jnp.tile(mine, 2)[:, None] == jnp.tile(all, 2)
  positive = alike(own if labels is None else labels, kinds) & ~themselves
  left_out = themselves
  if related is not None:
    left_out |= alike(related, gather(related)) & ~positive
  log_shares = jax.nn.log_softmax(jnp.where(left_out, -jnp.inf, logits), axis=-1)
  return -jnp.mean(
    jnp.sum(jnp.where(positive, log_shares, 0), axis=-1) / jnp.sum(positive, axis=-1)
  )


def normalize(x: jax.Array) -> jax.Array:
  """Rows of unit length, in at least float32; a row of zeros stays zero and has a finite
  gradient."""
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  return x * jax.lax.rsqrt(
    jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-16)
  )  # eps 1e-8 as in torch
