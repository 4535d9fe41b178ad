"""Concepts: parts that are known are found; the job on an encoder of known maps."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy.optimize import linear_sum_assignment

from configs import cifar
from palm_jax import encoder
from palm_jax.base.errors import UserError
from palm_jax.data.arrays import Data, Split
from palm_jax.evaluate import concepts, features
from palm_jax.layers.maps import feature_maps
from palm_jax.report import concepts as section
from palm_jax.report.read import Report, read_runs
from tests.jobs import finish

PARTS = 4


def known_parts(places=600, channels=24, seed=0):
  """V = W H of sparse parts, and H with rows of length 1."""
  rng = np.random.default_rng(seed)
  h = rng.gamma(1.0, size=(PARTS, channels)) * (rng.random((PARTS, channels)) < 0.3)
  h[np.arange(PARTS), np.arange(PARTS)] += 1  # none is empty
  w = rng.gamma(1.0, size=(places, PARTS)) * (rng.random((places, PARTS)) < 0.4)
  return (w @ h).astype(np.float32), h / np.linalg.norm(h, axis=1, keepdims=True)


@pytest.mark.parametrize('loss', concepts.LOSSES)
def test_known_parts_are_found(loss):
  v, parts = known_parts()
  w, h, error = concepts.factorise(v, PARTS, loss, 500)
  np.testing.assert_allclose(np.linalg.norm(h, axis=1), 1, rtol=1e-5)
  assert (w >= 0).all() and (h >= 0).all() and error < 0.05
  cosine = h @ parts.T
  rows, columns = linear_sum_assignment(-cosine)
  assert cosine[rows, columns].min() >= 0.95
  np.testing.assert_allclose(error, np.linalg.norm(v - w @ h) / np.linalg.norm(v), rtol=1e-4)


def test_more_concepts_leave_less():
  v, _ = known_parts()
  errors = [concepts.factorise(v, rank)[2] for rank in (1, 2, 3, 4)]
  assert all(a > b for a, b in zip(errors, errors[1:], strict=False))


def test_what_has_no_parts():
  v, _ = known_parts()
  with pytest.raises(UserError, match='negative'):
    concepts.factorise(v - 1, 2)
  with pytest.raises(UserError, match='choose 24 or fewer'):
    concepts.factorise(v, 25)


def test_maps_are_what_the_features_average():
  c = encoder.default_config()
  c.width = 4
  network = encoder.make_encoder(c)
  images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 1), np.uint8)
  variables = network.init(jax.random.key(0), images, train=False)
  assert set(variables) == {'params', 'batch_stats'}
  maps = feature_maps(network, variables, images)
  h = network.apply(variables, images, train=False)
  assert maps.shape == (3, 2, 2, 32) and (maps >= 0).all()
  np.testing.assert_allclose(maps.mean((1, 2)), h, rtol=1e-5)

  class Blind(nn.Module):
    @nn.compact
    def __call__(self, images, train):
      return nn.Dense(2)(images.reshape(len(images), -1).astype(jnp.float32))

  blind = Blind().init(jax.random.key(0), images, train=False)
  with pytest.raises(UserError, match='Blind has no feature maps'):
    feature_maps(Blind(), blind, images)


@pytest.fixture(scope='module')
def done(tmp_path_factory):
  """The job on quarters: in pictures of class k the k-th quarter is bright -> workdir, result."""
  workdir = tmp_path_factory.mktemp('concepts')
  rng = np.random.default_rng(0)
  labels = np.repeat(np.arange(4), 20)  # sorted, as many sets are
  images = rng.integers(0, 20, (80, 16, 16, 1)).astype(np.uint8)
  for image, k in zip(images, labels, strict=True):
    image[8 * (k // 2) :, 8 * (k % 2) :][:8, :8] += 200
  split = Split(images, labels.astype(np.int64))
  c = cifar.get_config('small')
  c.data.name = 'quarters'
  c.concepts.update(dict(concepts=4, errors=(1, 2, 4), shown=3, num_images=40))
  maps = lambda network, variables, images: jnp.stack(
    [
      (images[:, 8 * i : 8 * i + 8, 8 * j : 8 * j + 8, 0] / 255).mean((1, 2))[:, None, None]
      * jnp.ones((1, 2, 2))
      for i in range(2)
      for j in range(2)
    ],
    -1,
  )
  (workdir / 'config.json').write_text(c.to_json_best_effort())
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(concepts, 'feature_maps', maps)
    encoder = features.Encoder('x', jax.tree_util.Partial(len, {}), '', dict(checkpoint_step=7))
    patch.setattr(concepts.features, 'load_encoder', lambda *_: encoder)
    data = Data(split, split, ('a', 'b', 'c', 'd'), 'quarters')
    result = finish(concepts.JOB, c, workdir, data)
  return workdir, result, c


def test_stacks_of_pictures_are_refused():
  c = cifar.get_config('small')
  c.environment.stack = 2
  with pytest.raises(UserError, match='--job=concepts shows single pictures'):
    concepts.check(c, 1)


def test_the_job_finds_what_the_classes_show(done):
  workdir, result, _ = done
  best = {max(row['classes'], key=row['classes'].get) for row in result['rows']}
  assert best == set('abcd')
  for row in result['rows']:
    top = max(row['classes'].values())
    name = max(row['classes'], key=row['classes'].get)
    assert top > 0.7 and all('abcd'[i // 20] == name for i in row['strongest'])
    assert Image.open(workdir / row['picture']).size == (3 * 64, 2 * 64)
  np.testing.assert_allclose(sum(row['share'] for row in result['rows']), 1, rtol=1e-6)
  errors = [result['errors'][rank] for rank in ('1', '2', '4')]
  assert errors[0] > errors[1] > errors[2]
  saved = json.loads((workdir / 'results' / 'concepts.json').read_text())
  assert saved['rows'] == result['rows'] and saved['protocol']['checkpoint_step'] == 7
  assert 'unexplained' in concepts.table(result)


def test_the_page_shows_them(done):
  workdir, result, c = done
  runs = read_runs([workdir])
  html = section.section(Report(runs, c, workdir, None, None, []))
  assert html.count('data:image/') == 4 and 'Left unexplained' in html
  assert '/rows/0/share' in html
