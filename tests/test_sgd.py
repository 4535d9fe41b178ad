"""Linear heads by SGD: against scikit-learn, over seeds, devices, and views of images."""

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from sklearn.linear_model import LogisticRegression

from palm_jax.base import devices
from palm_jax.base.errors import NonFiniteError, UserError
from palm_jax.evaluate import features, linear, sgd
from tests import worlds

N, M, F, C = 300, 120, 6, 3


@pytest.fixture(scope='module')
def blobs():
  return worlds.blobs(N, M, F, C)


def settings(**changes):
  return ConfigDict(
    dict(
      lr=0.5,
      momentum=0.9,
      weight_decay=0.0,
      batch_size=32,
      epochs=5,
      schedule='cosine',
      augment='none',
    )
    | changes
  )


def standard(blobs):
  x, y, _, _ = blobs
  return ((x - x.mean(0)) / x.std(0)).astype(np.float32), y


@pytest.fixture(scope='module')
def mesh():
  return devices.make_mesh()


def test_sgd_reaches_scikit_learns_minimum(blobs, mesh):
  """All rows in every step: gradient descent. optax decays the bias, too, so it is compared as a
  feature of ones."""
  x, y = standard(blobs)
  x, y = x[: N // 8 * 8], y[: N // 8 * 8]
  l2 = 0.05
  c = settings(batch_size=len(x), epochs=1500, weight_decay=l2, lr=0.3)
  [head] = sgd.fit_heads(x, y, C, c, [3], mesh)
  ones = np.ones((len(x), 1))
  truth = LogisticRegression(
    C=1 / (l2 * len(x)), tol=1e-10, max_iter=5000, fit_intercept=False
  ).fit(np.append(x, ones, 1), y)
  np.testing.assert_allclose(np.append(head.weight, head.bias[None], 0), truth.coef_.T, atol=2e-3)
  np.testing.assert_array_equal(
    linear.logits(head, x).argmax(1), truth.predict(np.append(x, ones, 1))
  )


def test_heads_of_several_seeds_are_those_of_each_alone(blobs, mesh):
  x, y = standard(blobs)
  both = sgd.fit_heads(x, y, C, settings(schedule='step'), [3, 8], mesh)
  alone = [sgd.fit_heads(x, y, C, settings(schedule='step'), [seed], mesh)[0] for seed in (3, 8)]
  for a, b in zip(both, alone, strict=True):
    np.testing.assert_allclose(a.weight, b.weight, atol=1e-6)
    np.testing.assert_allclose(a.bias, b.bias, atol=1e-6)
  assert np.abs(both[0].weight - both[1].weight).max() > 1e-3


def test_augmented_heads_do_not_depend_on_the_number_of_devices(mesh):
  """A fixed random projection as encoder; its images are drawn anew from (seed, epoch, step, place
  in the batch)."""
  images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
  labels = np.arange(40) % C
  weight = np.random.default_rng(1).normal(size=(192, 5)).astype(np.float32) / 8
  seen = []

  def apply(weight, images):
    seen.append(images.dtype)
    return images.reshape(len(images), -1) @ weight

  encoder = features.Encoder('projection', jax.tree_util.Partial(apply, weight), '', {})
  c = settings(batch_size=16, epochs=2, augment='crop_flip', lr=0.1)
  heads = [
    sgd.fit_heads((encoder, images), labels, C, c, [0, 1], m) for m in (mesh, devices.make_mesh(1))
  ]
  for a, b in zip(*heads, strict=True):
    np.testing.assert_allclose(a.weight, b.weight, atol=1e-5)
  assert all(dtype == np.float32 for dtype in seen)  # augmented, not the uint8 images themselves
  plain = sgd.fit_heads(
    (encoder, images),
    labels,
    C,
    settings(batch_size=16, epochs=2, lr=0.1),
    [0],
    devices.make_mesh(1),
  )
  assert np.abs(plain[0].weight - heads[1][0].weight).max() > 1e-3


@pytest.mark.parametrize(
  'schedule, truth',
  [
    ('cosine', lambda step: 0.05 * (1 + np.cos(np.pi * step / 100))),
    ('step', lambda step: 0.1 * 0.1 ** ((step >= 60) + (step >= 75) + (step >= 90))),
  ],
)
def test_schedules(schedule, truth):
  optimizer = sgd.make_optimizer(
    settings(lr=0.1, momentum=0.0, schedule=schedule, epochs=10), 10, nesterov=False
  )
  state = optimizer.init(np.float32(0))
  for step in range(100):
    change, state = optimizer.update(np.float32(1), state, np.float32(0))
    np.testing.assert_allclose(-change, truth(step), rtol=1e-5, atol=1e-8)


def test_warmup_and_nesterov_are_torchs():
  """Against torch.optim.SGD(nesterov=True), written out, with a linear rise and half a cosine."""
  c = settings(lr=0.1, momentum=0.9, weight_decay=0.01, epochs=10)
  with c.unlocked():
    c.warmup = 0.2
  optimizer = sgd.make_optimizer(c, 10, nesterov=True)
  p = x = np.float32(1)
  state, v = optimizer.init(p), 0.0
  for t in range(100):
    change, state = optimizer.update(np.float32(0.3), state, p)
    p = p + change
    gradient = 0.3 + 0.01 * x
    v = 0.9 * v + gradient
    rate = 0.1 * (t / 20 if t < 20 else 0.5 * (1 + np.cos(np.pi * (t - 20) / 80)))
    x = x - rate * (gradient + 0.9 * v)
    np.testing.assert_allclose(p, x, rtol=1e-4, atol=1e-5)


def test_bad_sgd_settings_are_named(blobs, mesh):
  x, y = standard(blobs)
  for changes, message in [
    (dict(schedule='linear'), "schedule='linear'.*cosine, step"),
    (dict(epochs=0), 'epochs=0'),
    (dict(lr=float('nan')), 'lr=nan'),
    (dict(augment='crop'), "augment 'crop'"),
    (dict(augment='crop_flip'), 'needs an encoder and images'),
  ]:
    with pytest.raises(UserError, match=message):
      sgd.fit_heads(x, y, C, settings(**changes), [0], mesh)
  with pytest.raises(UserError, match='5 images on 8 devices'):
    sgd.fit_heads(x[:5], y[:5], C, settings(), [0], mesh)
  with pytest.raises(NonFiniteError, match='lower lr=1000'):
    sgd.fit_heads(x * 1e30, y, C, settings(lr=1000.0), [0], mesh)
