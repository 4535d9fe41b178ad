"""What counts is on the disk before what it replaces goes: power may fail between the two."""

import errno
import os
import pathlib

import numpy as np
import pytest

from palm_jax.base.checkpoints import Checkpoints
from palm_jax.base.errors import UserError
from palm_jax.base.files import replacing

FILES = pathlib.Path('/proc/self/fd')  # which file a number is
pytestmark = pytest.mark.skipif(not FILES.is_dir(), reason='needs /proc/self/fd')


@pytest.fixture
def calls(monkeypatch):
  """[(name of the function, paths)] of what was synced and renamed so far, in order."""
  found = []

  def noted(name):
    call = getattr(os, name)

    def wrapper(*arguments, **options):
      paths = [(FILES / str(x)).readlink() for x in arguments if name == 'fsync']
      found.append((name, *(paths or map(pathlib.Path, arguments))))
      return call(*arguments, **options)

    monkeypatch.setattr(os, name, wrapper)

  for name in ('fsync', 'rename', 'replace'):
    noted(name)
  return found


def save(checkpoints, step):
  checkpoints.save(step, {'state': {'x': np.full(3, step)}, 'other': {'y': np.zeros(2)}}, {})


def test_a_step_is_on_the_disk_before_an_older_one_goes(tmp_path, calls):
  with Checkpoints(tmp_path, keep=1) as checkpoints:
    save(checkpoints, 1)
    checkpoints.wait()
    calls.clear()
    save(checkpoints, 2)
  assert checkpoints.steps() == [2]
  removed = calls.index(('rename', tmp_path / '1', tmp_path / '1.deleted'))
  named = next(i for i, call in enumerate(calls) if call[-1] == tmp_path / '2')
  assert calls[named][0] in ('rename', 'replace')
  synced = {call[1] for call in calls[named:removed] if call[0] == 'fsync'}
  step = {tmp_path / '2', *(tmp_path / '2').rglob('*')}
  assert sum(path.is_file() for path in step) > 3
  assert synced == {tmp_path, *step}


@pytest.mark.parametrize('number', [errno.EIO, errno.EINVAL])
def test_a_step_that_does_not_get_there_costs_no_other(tmp_path, monkeypatch, number):
  """A file system that knows no sync is no reason to stop."""
  checkpoints = Checkpoints(tmp_path, keep=1)
  save(checkpoints, 1)
  checkpoints.wait()

  def fail(handle):
    raise OSError(number, os.strerror(number))

  monkeypatch.setattr(os, 'fsync', fail)
  save(checkpoints, 2)
  if number == errno.EINVAL:
    checkpoints.wait()
    assert checkpoints.steps() == [2]
  else:
    with pytest.raises(UserError, match='step 2 could not be written .*earlier steps are untouch'):
      checkpoints.wait()
    assert 1 in checkpoints.steps()


def test_a_file_is_on_the_disk_before_it_replaces_another(tmp_path, calls, monkeypatch):
  path, sizes = tmp_path / 'file', []
  path.write_text('before')
  noted = os.fsync

  def fsync(handle):
    sizes.append(os.fstat(handle).st_size)
    noted(handle)

  monkeypatch.setattr(os, 'fsync', fsync)
  with replacing(path, 'w') as file:
    file.write('now')
  (_, part), (_, source, target), (_, folder) = calls
  assert [name for name, *_ in calls] == ['fsync', 'replace', 'fsync']
  assert part == source and target == path and folder == tmp_path
  assert sizes[0] == 3 and path.read_text() == 'now'  # Python's own buffer was empty
