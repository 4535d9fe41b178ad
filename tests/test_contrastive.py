import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from palm_jax import contrastive
from palm_jax.base import devices

B, D = 16, 5
Z1, Z2 = np.random.default_rng(0).normal(size=(2, B, D))
LABELS = np.random.default_rng(1).integers(0, 4, B)


def in_numpy(z1, z2, labels, temperature):
  """Equation 2 of SupCon, term by term."""
  z = np.concatenate([z1, z2])
  z = z / np.linalg.norm(z, axis=1, keepdims=True)
  labels, total = np.tile(labels, 2), 0.0
  for i in range(len(z)):
    others = [a for a in range(len(z)) if a != i]
    denominator = np.log(sum(np.exp(z[i] @ z[a] / temperature) for a in others))
    positives = [a for a in others if labels[a] == labels[i]]
    total -= sum(z[i] @ z[p] / temperature - denominator for p in positives) / len(positives)
  return total / len(z)


@pytest.mark.parametrize('temperature', [0.1, 0.5])
def test_they_equal_their_equations(temperature):
  with jax.enable_x64(True):
    np.testing.assert_allclose(
      contrastive.supcon(Z1, Z2, LABELS, temperature),
      in_numpy(Z1, Z2, LABELS, temperature),
      rtol=1e-12,
    )
    # NT-Xent's only positive is the other view: every pair is a label of its own.
    own = np.arange(B)
    np.testing.assert_allclose(
      contrastive.supcon(Z1, Z2, None, temperature), in_numpy(Z1, Z2, own, temperature), rtol=1e-12
    )


def test_related_samples_are_no_negatives():
  related = LABELS
  z = np.concatenate([Z1, Z2])
  z = z / np.linalg.norm(z, axis=1, keepdims=True)
  total = 0.0
  for i in range(2 * B):
    partner = (i + B) % (2 * B)
    others = [a for a in range(2 * B) if a == partner or related[a % B] != related[i % B]]
    logits = z[others] @ z[i] / 0.5
    total -= z[i] @ z[partner] / 0.5 - np.log(np.exp(logits).sum())
  with jax.enable_x64(True):
    value = contrastive.supcon(Z1, Z2, None, 0.5, related=related)
    np.testing.assert_allclose(value, total / (2 * B), rtol=1e-12)
    # Where nobody is related it is NT-Xent.
    np.testing.assert_allclose(
      contrastive.supcon(Z1, Z2, None, 0.5, related=np.arange(B)),
      contrastive.supcon(Z1, Z2, None, 0.5),
      rtol=1e-12,
    )


@pytest.mark.parametrize('labels', [None, LABELS])
def test_value_and_gradient_do_not_depend_on_the_number_of_devices(labels):
  def of(count):
    def loss(z1, z2, y):
      kinds = {'related': y} if labels is None else {'labels': y}
      local = contrastive.supcon(z1, z2, **dict(labels=None) | kinds, axis_name='data')
      return jax.lax.pmean(local, 'data')

    mesh = devices.make_mesh(count)
    sharded = jax.shard_map(loss, mesh=mesh, in_specs=P('data'), out_specs=P())
    return jax.jit(jax.value_and_grad(lambda z: sharded(*z, LABELS)))((Z1, Z2))

  with jax.enable_x64(True):
    (one, grads_one), (eight, grads_eight) = of(1), of(8)
    kinds = {'labels': None, 'related': LABELS} if labels is None else {'labels': labels}
    whole, grads = jax.value_and_grad(lambda z: contrastive.supcon(*z, **kinds))((Z1, Z2))
  np.testing.assert_allclose([one, eight], whole, rtol=1e-12)
  for a, b, c in zip(grads_one, grads_eight, grads, strict=True):
    np.testing.assert_allclose(a, c, atol=1e-12)
    np.testing.assert_allclose(b, c, atol=1e-12)


def test_equal_views_and_zeros_stay_finite():
  zeros = np.zeros((4, D), np.float32)
  value, grads = jax.value_and_grad(contrastive.supcon, argnums=(0, 1))(zeros, zeros, None)
  np.testing.assert_allclose(value, np.log(7), rtol=1e-6)  # all others alike
  assert all(np.isfinite(g).all() for g in grads)
