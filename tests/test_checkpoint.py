"""What was saved comes back, on any number of devices; what was damaged is noticed, named, and
passed over."""

import contextlib
import errno
import gc
import json
import os
import pathlib
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl import logging
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from palm_jax.base import steps
from palm_jax.base.checkpoints import Checkpoints, load_item
from palm_jax.base.errors import UserError
from palm_jax.base.files import write_json
from palm_jax.base.steps import list_steps
from palm_jax.base.training import Preemption
from palm_jax.checkpoint import load_encoder

# Orbax leaves its coroutines behind where they fail.
pytestmark = pytest.mark.filterwarnings(
  'ignore::pytest.PytestUnraisableExceptionWarning', 'ignore:coroutine:RuntimeWarning'
)


@pytest.fixture(scope='module', autouse=True)
def collected():
  """What failed is collected while its warnings are ignored."""
  yield
  gc.collect()


@flax.struct.dataclass
class State:
  step: Any
  key: Any
  ring: Any
  params: Any
  opt_state: Any


SPECS = State(step=P(), key=P(), ring=P(None, 'data'), params=P(), opt_state=P())


def shardings(num_devices, tree):
  mesh = jax.sharding.Mesh(jax.devices()[:num_devices], ('data',))
  return jax.tree.map(
    lambda spec, part: jax.tree.map(lambda _: NamedSharding(mesh, spec), part),
    SPECS,
    tree,
    is_leaf=lambda x: isinstance(x, P),
  )


def make_state(seed, num_devices=8):
  rng = np.random.default_rng(seed)
  params = {
    'conv': {
      'kernel': rng.normal(size=(3, 5)).astype(np.float32),
      'bias': jnp.full(5, seed, jnp.bfloat16),
    }
  }
  state = State(
    step=np.int32(seed),
    key=jax.random.key(seed),
    params=params,
    opt_state=optax.adam(0.1).init(params),
    ring=rng.integers(0, 256, (4, 8, 16, 16), dtype=np.uint8),
  )
  return jax.device_put(state, shardings(num_devices, state))


def make_items(seed):
  state = make_state(seed)
  encoder = {'params': state.params, 'batch_stats': {'mean': state.params['conv']['kernel'][0]}}
  return {'state': state, 'encoder': encoder}


def template(num_devices=8):
  state = jax.eval_shape(lambda: make_state(0))
  return {
    'state': jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      state,
      shardings(num_devices, state),
    )
  }


def assert_same(got, want):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert a.dtype == b.dtype
    if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
      a, b = jax.random.key_data(a), jax.random.key_data(b)
    np.testing.assert_array_equal(a, b)


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """A workdir with steps 10 and 20; tests that change it take a copy."""
  workdir = tmp_path_factory.mktemp('run')
  with Checkpoints(workdir / 'pretrain' / 'checkpoints') as checkpoints:
    for step in (10, 20):
      checkpoints.save(step, make_items(step), {'seconds': step / 3, 'name': 'é'})
  write_json(workdir / 'config.json', {'name': 'test'})
  return workdir


@pytest.fixture
def copy(saved, tmp_path):
  shutil.copytree(saved, tmp_path / 'run')
  return tmp_path / 'run' / 'pretrain' / 'checkpoints'


@pytest.fixture
def warnings(monkeypatch):
  seen = []
  monkeypatch.setattr(logging, 'warning', lambda message, *args: seen.append(message % args))
  return seen


@pytest.mark.parametrize('num_devices', [8, 4, 1])
def test_round_trip_on_any_number_of_devices(saved, num_devices):
  folder, wanted = saved / 'pretrain' / 'checkpoints', template(num_devices)
  step, items, metadata = Checkpoints(folder).restore(wanted)
  assert step == 20 and metadata == {'seconds': 20 / 3, 'name': 'é'}
  assert_same(items, {'state': make_state(20)})
  assert all(
    a.sharding.is_equivalent_to(t.sharding, a.ndim)
    for a, t in zip(jax.tree.leaves(items), jax.tree.leaves(wanted), strict=True)
  )
  assert jax.random.uniform(items['state'].key) == jax.random.uniform(jax.random.key(20))


def test_an_empty_folder_has_nothing_to_restore(tmp_path):
  checkpoints = Checkpoints(tmp_path / 'a' / 'b')
  assert (
    checkpoints.restore(template()) is None
    and checkpoints.steps() == []
    and checkpoints.latest_step() is None
  )


def test_only_the_newest_are_kept(tmp_path):
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    for step in (1, 2, 3, 11):
      checkpoints.save(step, {'a': {'x': jnp.full(3, step)}}, {})
    checkpoints.wait()
    assert checkpoints.steps() == [3, 11] and checkpoints.latest_step() == 11
    with pytest.raises(UserError, match='already holds step 11'):
      checkpoints.save(5, {'a': {'x': jnp.zeros(3)}}, {})
  assert sorted(p.name for p in tmp_path.iterdir()) == ['11', '3']


def test_arrays_may_be_donated_and_overwritten_right_after_save(tmp_path):
  overwrite = jax.jit(lambda x: jax.tree.map(lambda a: a + 1, x), donate_argnums=0)
  sharding = NamedSharding(jax.sharding.Mesh(jax.devices(), ('data',)), P('data'))
  x = {
    'ring': jax.device_put(
      np.random.default_rng(0).integers(0, 256, (64, 1 << 16), dtype=np.uint8), sharding
    )
  }
  overwrite(jax.tree.map(jnp.copy, x))  # compiled before, so that it runs while the save does
  wanted = {
    's': jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), x)
  }
  with Checkpoints(tmp_path) as checkpoints:
    for step in (1, 2):
      expected = np.array(x['ring'])
      checkpoints.save(step, {'s': x}, {})
      for _ in range(3):
        x = overwrite(x)
      restored = checkpoints.restore(wanted)
      assert restored.step == step
      np.testing.assert_array_equal(restored.items['s']['ring'], expected)
      np.testing.assert_array_equal(x['ring'], expected + np.uint8(3))


def flip(position):
  def damage(path):
    data = bytearray(path.read_bytes())
    data[int(position * (len(data) - 1))] ^= 0x10
    path.write_bytes(data)

  return damage


DAMAGES = {
  'flip at the start': flip(0),
  'flip in the middle': flip(0.5),
  'flip at 3/4': flip(0.75),
  'flip at the end': flip(1),
  'truncate': lambda path: os.truncate(path, path.stat().st_size // 2),
  'remove': pathlib.Path.unlink,
}


@pytest.mark.parametrize('damage', DAMAGES)
def test_no_damage_to_any_file_goes_unnoticed(copy, warnings, damage):
  """Either the file did not matter and the values are those saved, or the step before is taken and
  the log says why."""
  expected, wanted, fell_back = {10: make_state(10), 20: make_state(20)}, template(), []
  files = [
    p
    for p in sorted((copy / '20').rglob('*'))
    if p.is_file() and p.stat().st_size and 'encoder' not in p.parts
  ]
  for path in files:
    data = path.read_bytes()
    DAMAGES[damage](path)
    restored = Checkpoints(copy).restore(wanted)
    path.write_bytes(data)
    assert_same(restored.items['state'], expected[restored.step])
    assert restored.metadata['seconds'] == restored.step / 3
    if restored.step == 10:
      fell_back.append(path)
      [line] = warnings
      assert f'checkpoint step 20 in {copy} is damaged' in line and '\n' not in line
    assert bool(warnings) == (restored.step == 10)
    warnings.clear()
  assert copy / '20' / '_CHECKPOINT_METADATA' in fell_back
  if damage != 'flip at the end':  # which orbax's largest file does not use
    assert max(files, key=lambda p: p.stat().st_size) in fell_back


def test_after_a_fallback_the_run_goes_on_past_the_damaged_step(copy, warnings):
  """A lower step than the damaged one can be saved, and neither counts among those kept nor is met
  again."""
  (copy / '20' / '_CHECKPOINT_METADATA').write_bytes(b'{')
  with Checkpoints(copy) as checkpoints:
    assert checkpoints.restore(template()).step == 10
    checkpoints.save(15, make_items(15), {})
    checkpoints.wait()
    assert checkpoints.steps() == [10, 15]
    checkpoints.save(20, make_items(20), {})
  assert checkpoints.steps() == [15, 20] and (copy / '20.damaged').is_dir()
  warnings.clear()
  assert Checkpoints(copy).restore(template()).step == 20 and not warnings


def test_when_every_step_is_damaged_nothing_is_loaded(copy):
  for step in ('10', '20'):
    shutil.rmtree(copy / step / 'state')
  with pytest.raises(UserError, match='checkpoint step 10, 20 in .* is damaged'):
    Checkpoints(copy).restore(template())


@pytest.mark.parametrize(
  'error',
  [
    OSError(errno.EIO, 'Input/output error'),
    OSError(errno.EACCES, 'Permission denied'),
    OSError(errno.ENOTCONN, 'Transport endpoint is not connected'),
    MemoryError(),
    ValueError("Error reading: [os_error_code='5'] [strerror='Input/output error']"),
  ],
)
def test_what_cannot_be_read_now_is_not_damaged(copy, monkeypatch, error):
  def fail(*_, **__):
    raise RuntimeError('orbax') from error

  monkeypatch.setattr(steps.ocp, 'load_checkpointables', fail)
  before = sorted(copy.rglob('*'))
  with pytest.raises(UserError, match='cannot be read now .*nothing was changed'):
    Checkpoints(copy).restore(template())
  assert sorted(copy.rglob('*')) == before


def test_a_checkpoint_of_another_config_is_refused(saved):
  folder, good = saved / 'pretrain' / 'checkpoints', template()['state']
  kernel = good.params['conv']['kernel']

  def restore(**conv):
    return Checkpoints(folder).restore(
      {'state': good.replace(params={'conv': {**good.params['conv'], **conv}})}
    )

  with pytest.raises(
    UserError, match=r'state/params/conv/kernel is float32\(3, 5\) there, float32\(3, 6\)'
  ):
    restore(kernel=jax.ShapeDtypeStruct((3, 6), kernel.dtype, sharding=kernel.sharding))
  with pytest.raises(
    UserError, match=r'params/conv/bias is bfloat16\(5,\) there, float32\(5,\) expected'
  ):
    restore(bias=jax.ShapeDtypeStruct((5,), jnp.float32, sharding=kernel.sharding))
  with pytest.raises(
    UserError, match=r'params/conv/scale is absent there, float32\(3, 5\) expected'
  ):
    restore(scale=kernel)
  with pytest.raises(UserError, match=r'params/conv/bias is bfloat16\(5,\) there, absent expected'):
    Checkpoints(folder).restore({'state': good.replace(params={'conv': {'kernel': kernel}})})


def test_the_encoder_is_read_without_the_state(copy):
  workdir = copy.parents[1]
  for step in ('10', '20'):
    shutil.rmtree(copy / step / 'state')
  for wanted, expected in ((None, 20), (10, 10)):
    config, variables, step = load_encoder(workdir, wanted)
    assert config == {'name': 'test'} and step == expected
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(variables))
    assert_same(variables, jax.device_get(make_items(expected)['encoder']))
  with pytest.raises(UserError, match=r'no checkpoint step 15, only \[10, 20\]'):
    load_encoder(workdir, 15)
  with pytest.raises(UserError, match="no item 'decoder', only state, encoder"):
    load_item(copy, 'decoder')
  for path in (copy / '20' / 'encoder').rglob('*'):
    if path.is_file():
      path.write_bytes(b'x' * path.stat().st_size)
  assert load_encoder(workdir)[2] == 10
  with pytest.raises(UserError, match='step 20 in .* is damaged'):
    load_encoder(workdir, 20)
  (workdir / 'config.json').unlink()
  with pytest.raises(UserError, match='config.json is missing'):
    load_encoder(workdir)


def test_looking_at_a_running_job_removes_nothing(copy):
  (copy / '30.orbax-checkpoint-tmp').mkdir()
  load_encoder(copy.parents[1])
  assert (copy / '30.orbax-checkpoint-tmp').is_dir()
  Checkpoints(copy)  # the job itself, started again, cleans up
  assert sorted(p.name for p in copy.iterdir()) == ['10', '20']


def test_a_full_disk_is_one_line_and_leaves_the_steps_before(copy, capfd):
  checkpoints = Checkpoints(copy)
  restored = checkpoints.restore(template())
  limit = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
  try:
    with pytest.raises(
      UserError, match='checkpoint step 30 could not be written .*File too large'
    ) as caught:
      checkpoints.save(30, {'state': restored.items['state']}, {})
      checkpoints.wait()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
  assert '\n' not in str(caught.value) and 'Traceback' not in capfd.readouterr().err
  assert sorted(p.name for p in copy.iterdir()) == ['10', '20']
  assert_same(checkpoints.restore(template()).items['state'], make_state(20))
  checkpoints.save(30, make_items(30), {})  # once there is room again
  checkpoints.close()
  assert checkpoints.steps() == [20, 30]


def test_a_save_after_one_that_failed_is_not_lost_with_it(copy, warnings):
  checkpoints = Checkpoints(copy)
  limit = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
  try:
    checkpoints.save(30, make_items(30), {})
    with pytest.raises(UserError, match='checkpoint step 31 could not be written'):
      checkpoints.save(31, make_items(31), {})  # there is no room yet
    checkpoints.save(32, make_items(32), {})
    with contextlib.suppress(ValueError):  # it fails before there is room
      checkpoints._pending[1].result()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
  checkpoints.save(40, make_items(40), {})
  assert checkpoints.steps() == [20, 40]  # at once, whoever kills the run now
  assert [line.partition(' could')[0] for line in warnings] == [
    'checkpoint step 30',
    'checkpoint step 32',
  ]
  assert_same(checkpoints.restore(template()).items['state'], make_state(40))


@pytest.mark.parametrize('number', [errno.ESTALE, errno.EXDEV, errno.EBUSY])
def test_a_file_server_that_refuses_to_rename(copy, monkeypatch, number):
  """Steps that were saved stay; one that cannot be removed keeps nobody from going on."""
  rename = os.rename
  refused = ''

  def renamed(source, target):
    if refused in str(target):
      raise OSError(number, os.strerror(number))
    rename(source, target)

  checkpoints = Checkpoints(copy)
  with monkeypatch.context() as patched:
    patched.setattr(os, 'rename', renamed)
    with pytest.raises(UserError, match=f'step 30 could not .*{os.strerror(number)}') as caught:
      checkpoints.save(30, make_items(30), {})
      checkpoints.wait()
    assert '\n' not in str(caught.value)
    assert sorted(p.name for p in copy.iterdir()) == ['10', '20']
    refused = '.deleted'
    checkpoints.save(30, make_items(30), {})
    checkpoints.wait()
    assert checkpoints.steps() == [10, 20, 30]
    refused = '.damaged'
    checkpoints._damaged = [30]
    with pytest.raises(UserError, match='step 31 could not be written'):
      checkpoints.save(31, make_items(31), {})
    assert checkpoints.steps() == [10, 20, 30]
  checkpoints._damaged = []
  checkpoints.save(40, make_items(40), {})
  checkpoints.close()
  assert sorted(p.name for p in copy.iterdir()) == ['30', '40']
  (copy / '20.deleted').mkdir()
  with monkeypatch.context() as patched:
    patched.setattr(os, 'rmdir', lambda *_, **__: renamed('', ''))
    assert Checkpoints(copy).steps() == [30, 40]  # what a server still holds is no reason to stop
  Checkpoints(copy)
  assert not (copy / '20.deleted').exists()


def test_the_newest_step_is_that_of_the_largest_number(copy):
  """Clocks of several machines differ, and go back."""
  os.utime(copy / '10', (2e9, 2e9))
  os.utime(copy / '20', (1, 1))
  assert Checkpoints(copy).restore(template()).step == 20
  assert load_encoder(copy.parents[1])[2] == 20


def test_a_place_that_is_no_folder_is_one_line(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match='cannot hold checkpoints'):
    Checkpoints(tmp_path / 'file' / 'checkpoints')
  checkpoints = Checkpoints(tmp_path / 'checkpoints')
  (tmp_path / 'checkpoints').rmdir()
  (tmp_path / 'checkpoints').write_text('')
  with pytest.raises(UserError, match='checkpoint step 1 could not be written .*Not a directory'):
    checkpoints.save(1, {'a': {'x': jnp.zeros(3)}}, {})
    checkpoints.wait()


def start(script, *args, devices=1):
  environment = dict(
    os.environ, XLA_FLAGS=f'--xla_force_host_platform_device_count={devices}', JAX_PLATFORMS='cpu'
  )
  return subprocess.Popen(
    [sys.executable, '-c', script, *map(str, args)],
    env=environment,
    text=True,
    stdout=subprocess.PIPE,
    cwd=pathlib.Path(__file__).parents[1],
  )


SAVE_FOR_EVER = """
import sys, numpy as np, jax
from palm_jax.base.checkpoints import Checkpoints
from palm_jax.checkpoint import load_encoder
kernel = load_encoder(sys.argv[2])[1]['params']['conv']['kernel']
print(jax.device_count(), kernel.tobytes().hex(), flush=True)
checkpoints, step = Checkpoints(sys.argv[1]), 0
while True:
  step += 1
  x = np.random.default_rng(step).integers(0, 256, 4_000_000, dtype=np.uint8)
  checkpoints.save(step, {'a': {'x': jax.device_put(x), 'step': jax.numpy.int32(step)}}, {})
"""


def test_a_kill_in_the_middle_of_a_save_leaves_the_step_before(tmp_path, saved):
  """And in its one-device process, the encoder saved on eight devices loads."""
  process = start(SAVE_FOR_EVER, tmp_path, saved)
  try:
    devices, kernel = process.stdout.readline().split()
    assert (
      devices == '1'
      and kernel == np.asarray(make_state(20).params['conv']['kernel']).tobytes().hex()
    )
    deadline = time.monotonic() + 60
    # The moment to kill: at least two steps are complete and another is being written.
    while len(list_steps(tmp_path)) < 2 or not any(tmp_path.glob('*-tmp')):
      assert time.monotonic() < deadline and process.poll() is None
  finally:
    process.kill()
    process.wait()
  newest = list_steps(tmp_path)[-1]
  assert any(tmp_path.glob('*-tmp'))
  Checkpoints(tmp_path)  # removes what the kill left
  step, tree = load_item(tmp_path, 'a')
  assert step == newest == tree['step'] and not any(tmp_path.glob('*-tmp'))
  np.testing.assert_array_equal(
    tree['x'], np.random.default_rng(step).integers(0, 256, 4_000_000, dtype=np.uint8)
  )


ONE_OF_TWO = """
import os, pathlib, signal, sys, numpy as np, jax
from jax.sharding import NamedSharding, PartitionSpec as P
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from configs import digits
from palm_jax import runner
from palm_jax.base import checkpoints as checkpoint_module
from palm_jax.base import processes, steps
from palm_jax.base.checkpoints import Checkpoints
from palm_jax.base.errors import UserError
from palm_jax.base.training import Preemption
sharding = NamedSharding(jax.sharding.Mesh(jax.devices(), ('data',)), P('data'))
value = np.arange(4000.).reshape(4, 1000)
x = jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])
wanted = {'a': {'x': jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)}}
checkpoints = Checkpoints(sys.argv[3])
checkpoints.save(1, {'a': {'x': x}}, {})
checkpoints.save(2, {'a': {'x': x * 2}}, {})
checkpoints.wait()
assert checkpoints.restore(wanted).step == 2
told = {'by': jax.process_index(), 'x': [1, None, 'text' * jax.process_index()]}
told = processes.from_first(told)
assert told == {'by': 0, 'x': [1, None, '']}
second = jax.process_index() == 1
for failing in (0, 1):  # both raise where one has an error
  mine = UserError('mine') if jax.process_index() == failing else None
  try:
    processes.together(mine, 'it cannot be')
  except UserError as e:
    assert str(e) == ('mine' if mine else 'it cannot be: another process says why')
  else:
    raise AssertionError
# A file server that shows the second process nothing new.
read, listed = pathlib.Path.read_text, steps.list_steps
def stale(path, *_):
  if second and path.name in ('config.json', '_CHECKPOINT_METADATA'):
    raise FileNotFoundError(2, 'No such file', str(path))
  return read(path)
pathlib.Path.read_text = stale
checkpoint_module.list_steps = lambda folder: [1] if second else listed(folder)
runner.claim(pathlib.Path(sys.argv[3]) / 'run', digits.get_config())
assert checkpoint_module.load(checkpoints.folder, 'a', template=wanted['a']).step == 2
pathlib.Path.read_text, checkpoint_module.list_steps = read, listed
if jax.process_index() == 1:  # what only the second process reads
  [path] = [p for p in (checkpoints.folder / '2').rglob('ocdbt.process_1/d/*')]
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)
jax.experimental.multihost_utils.sync_global_devices('damaged')
restored = checkpoints.restore(wanted)
assert restored.step == 1
for shard in restored.items['a']['x'].addressable_shards:
  assert (np.asarray(shard.data) == value[shard.index]).all()
with Preemption() as preemption:
  assert not preemption.requested
  if jax.process_index() == 1:
    os.kill(os.getpid(), signal.SIGTERM)
  assert preemption.requested
processes.wait_for_all()
print('good', flush=True)
"""


def test_two_processes_agree_on_damage_and_on_stopping(tmp_path):
  with socket.socket() as s:
    s.bind(('localhost', 0))
    address = f'localhost:{s.getsockname()[1]}'
  processes = [start(ONE_OF_TWO, address, i, tmp_path, devices=2) for i in range(2)]
  try:
    assert [p.communicate(timeout=100)[0].split()[-1] for p in processes] == ['good', 'good']
  finally:
    for p in processes:
      p.kill()
  restored = load_item(tmp_path, 'a')  # by one process, what two had saved
  np.testing.assert_array_equal(restored[1]['x'], np.arange(4000.0).reshape(4, 1000))


def test_sigterm_sets_a_flag_and_the_handler_before_comes_back():
  before = signal.getsignal(signal.SIGTERM)
  with Preemption() as preemption:
    assert not preemption.requested
    os.kill(os.getpid(), signal.SIGTERM)
    assert preemption.requested
  assert signal.getsignal(signal.SIGTERM) == before


def test_json_is_whole_or_as_it_was(tmp_path):
  path = tmp_path / 'new' / 'a.json'
  write_json(path, {'x': np.float32(0.5), 'y': jnp.arange(2), 'z': [1, None]})
  assert json.loads(path.read_text()) == {'x': 0.5, 'y': [0, 1], 'z': [1, None]}
  with pytest.raises(AttributeError):
    write_json(path, {'x': 1, 'y': object()})
  assert json.loads(path.read_text())['x'] == 0.5 and [p.name for p in path.parent.iterdir()] == [
    'a.json'
  ]
