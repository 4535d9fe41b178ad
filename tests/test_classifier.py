import contextlib
import os
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import cifar
from palm_jax.base import checkpoints, devices, digests, files
from palm_jax.base.errors import UserError
from palm_jax.base.training import Stopped
from palm_jax.data.arrays import Split
from palm_jax.encoder import make_encoder
from palm_jax.evaluate import classifier, features, linear


@pytest.fixture(scope='module')
def mesh():
  return devices.make_mesh(2)


@pytest.fixture(scope='module')
def split():
  """Three classes: which third of the picture is bright."""
  generator = np.random.default_rng(0)
  labels = generator.integers(0, 3, 96)
  images = generator.integers(0, 60, (96, 36, 36, 1))
  for image, label in zip(images, labels, strict=True):
    image[12 * label : 12 * label + 12] += 150
  return Split(images.astype(np.uint8), labels)


def tiny():
  c = cifar.get_config()
  c.encoder.update(dict(name='nature', features=16))  # compiles in a tenth of ResNet-18's time
  c.probe.supervised.update(
    dict(epochs=4, batch_size=32, augment='none', lr=0.02, checkpoint_minutes=0.0)
  )
  return c


def same(a, b):
  return all(
    np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  )


@pytest.fixture(scope='module')
def trained(split, mesh, tmp_path_factory):
  workdir, c = tmp_path_factory.mktemp('run'), tiny()
  return workdir, classifier.fit(c, c.probe.supervised, split, 3, 0, mesh, workdir, 'supervised')


def test_it_learns_what_is_plain_to_see(trained, split):
  _, (encoder, head) = trained
  assert linear.accuracy(head, features.extract(encoder.apply, split.images), split.labels) > 0.9
  assert encoder.sha256 == digests.digest(encoder.apply.args[0], tiny().encoder.to_dict())


def test_a_killed_training_goes_on_and_ends_the_same(trained, split, mesh, tmp_path, monkeypatch):
  _, (encoder, head) = trained
  c, save, epochs = tiny(), checkpoints.Checkpoints.save, []

  def killed_after_the_second(self, step, *args):
    save(self, step, *args)
    self.wait()
    epochs.append(step)
    if len(epochs) == 2:
      raise KeyboardInterrupt

  monkeypatch.setattr(checkpoints.Checkpoints, 'save', killed_after_the_second)
  with pytest.raises(KeyboardInterrupt):
    classifier.fit(c, c.probe.supervised, split, 3, 0, mesh, tmp_path, 'supervised')
  again, head_again = classifier.fit(
    c, c.probe.supervised, split, 3, 0, mesh, tmp_path, 'supervised'
  )
  assert epochs == [1, 2, 3, 4]
  assert same(again.apply.args, encoder.apply.args) and same(head_again, head)
  classifier.fit(c, c.probe.supervised, split, 3, 0, mesh, tmp_path, 'supervised')
  assert epochs == [1, 2, 3, 4]  # read, not trained


def test_a_training_waits_for_another_of_the_same(split, mesh, tmp_path, monkeypatch):
  """As `supervised` of the probe and of ood, started together in one workdir."""
  c, locks, order = tiny(), [], []

  def train(network, variables, *rest):
    folder = rest[-1]
    locks.append(folder.with_name(f'.{folder.name}.lock'))
    order.append('trains' if files.held(locks[-1]) else 'is not alone')
    return variables

  monkeypatch.setattr(classifier, 'train', train)
  fit = lambda: classifier.fit(c, c.probe.supervised, split, 3, 0, mesh, tmp_path, 'supervised')
  fit()
  assert not locks[0].exists()
  other = contextlib.ExitStack()
  assert other.enter_context(files.locked(locks[0]))
  timer = threading.Timer(0.3, lambda: order.append('other ends') or other.close())
  timer.start()
  fit()
  timer.join()
  assert order == ['trains', 'other ends', 'trains']


def test_a_training_stopped_within_an_epoch_resumes_there(split, mesh, tmp_path, monkeypatch):
  """One update a call, three calls an epoch."""
  monkeypatch.setattr(classifier, 'STEPS_PER_CALL', 1)
  c, save, steps = tiny(), checkpoints.Checkpoints.save, []
  whole, head = classifier.fit(c, c.probe.supervised, split, 3, 0, mesh, tmp_path / 'a', 'x')

  def terminated_after_the_fifth(self, step, *args):
    save(self, step, *args)
    steps.append(step)
    if len(steps) == 5:
      os.kill(os.getpid(), signal.SIGTERM)

  monkeypatch.setattr(checkpoints.Checkpoints, 'save', terminated_after_the_fifth)
  with pytest.raises(Stopped):
    classifier.fit(c, c.probe.supervised, split, 3, 0, mesh, tmp_path / 'b', 'x')
  again, head_again = classifier.fit(c, c.probe.supervised, split, 3, 0, mesh, tmp_path / 'b', 'x')
  assert steps == list(range(1, 13))
  assert same(again.apply.args, whole.apply.args) and same(head_again, head)


def test_another_seed_other_labels_and_another_start_are_other_classifiers(trained, split, mesh):
  workdir, (encoder, _) = trained
  c = tiny()
  c.probe.supervised.epochs = 1
  before = jax.tree.map(np.copy, encoder.apply.args)
  tuned, _ = classifier.fit(c, c.probe.supervised, split, 3, 0, mesh, workdir, 'finetune', encoder)
  assert same(before, encoder.apply.args) and not same(before, tuned.apply.args)
  fresh = make_encoder(c.encoder).init(jax.random.key(0), jnp.zeros((1, 36, 36, 1)), train=False)[
    'params'
  ]
  distance = lambda a, b: sum(
    float(np.sum((x - y) ** 2)) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  )
  assert distance(tuned.apply.args[0]['params'], before[0]['params']) < distance(
    tuned.apply.args[0]['params'], fresh
  )
  count = lambda: len(list((workdir / 'classifiers').iterdir()))
  there = count()
  classifier.fit(
    c,
    c.probe.supervised,
    split._replace(labels=(split.labels + 1) % 3),
    3,
    0,
    mesh,
    workdir,
    'finetune',
    encoder,
  )
  assert count() == there + 1


def test_refusals(split, mesh, tmp_path):
  c = tiny()
  with pytest.raises(UserError, match='one class'):
    classifier.fit(
      c,
      c.probe.supervised,
      split._replace(labels=split.labels * 0),
      1,
      0,
      mesh,
      tmp_path,
      'supervised',
    )
  few = Split(split.images[:1], split.labels[:1])
  with pytest.raises(UserError, match='1 images on 2 devices'):
    classifier.fit(c, c.probe.supervised, few, 3, 0, mesh, tmp_path, 'supervised')
