"""What a generator's training is fed with, against the pictures themselves."""

import importlib.util
import itertools

import numpy as np
import pytest
from ml_collections import ConfigDict

from palm_jax.base import devices
from palm_jax.base.errors import UserError
from palm_jax.generator import feed

NEEDS_GRAIN = pytest.mark.skipif(
  importlib.util.find_spec('grain') is None, reason="grain is not installed ('.[stream]')"
)


@pytest.fixture
def images():
  return np.random.default_rng(0).integers(0, 256, (10, 2, 3, 1), np.uint8)


def calls(images, where, first, count, mirror=True):
  walk = feed.Walk(seed=3, batch=4, per_call=2, mirror=mirror)
  labels = np.arange(len(images), dtype=np.int32)
  fed = feed.feed(images, labels, walk, where, first, devices.make_mesh(2))
  return [tuple(map(np.asarray, x)) for x in itertools.islice(fed, count)]


@NEEDS_GRAIN
def test_fed_pictures_are_those_of_the_set(images, tmp_path):
  """Each epoch of the set and its flipped copies has every picture once; files are not changed."""
  np.save(tmp_path / 'images.npy', images)
  mapped = np.load(tmp_path / 'images.npy', mmap_mode='r')
  whole, fed = calls(images, 'device', 0, 5), calls(mapped, 'host', 0, 5)
  both = np.concatenate([images, images[:, :, ::-1]])
  seen = np.concatenate([indices.ravel() for *_, indices in whole])
  assert sorted(seen[:20]) == sorted(seen[20:40]) == list(range(20))
  for (there, labels, indices), (block, other_labels, other) in zip(whole, fed, strict=True):
    np.testing.assert_array_equal(there, images)
    np.testing.assert_array_equal(labels, other_labels)
    np.testing.assert_array_equal(indices, other)
    np.testing.assert_array_equal(block, both[indices])
  np.testing.assert_array_equal(mapped, images)


@NEEDS_GRAIN
@pytest.mark.parametrize('where', ['device', 'host'])
def test_a_resumed_run_goes_on_where_it_was(images, where):
  at_once, later = calls(images, where, 0, 5), calls(images, where, 3, 2)
  for a, b in zip(at_once[3:], later, strict=True):
    for x, y in zip(a, b, strict=True):
      np.testing.assert_array_equal(x, y)


def test_where_pictures_lie(images, monkeypatch):
  mesh = devices.make_mesh(1)
  found = lambda where: feed.place(ConfigDict(dict(data_on=where)), images, mesh)
  monkeypatch.setattr(feed.importlib.util, 'find_spec', lambda name: name)
  assert [found(where) for where in feed.PLACES] == ['device', 'device', 'host']
  monkeypatch.setattr(feed.devices, 'memory_bytes', lambda mesh: 4 * images.nbytes - 1)
  assert found('auto') == 'host'
  monkeypatch.setattr(feed.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(UserError, match=r"data_on=auto: .*grain.*pip install 'palm_jax\[stream\]'"):
    found('auto')
