"""Eight CPU devices and one store of compiled programs; set before jax is imported."""

import gc
import os

from tests import compiler

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
given, eight = os.environ.get('XLA_FLAGS', ''), '--xla_force_host_platform_device_count=8'
os.environ['XLA_FLAGS'] = f'{given} {eight} {compiler.FLAGS}'
# Collectives of several programs in flight deadlock when the pool has fewer threads than devices.
os.environ['NPROC'] = '16'

# Threads of linear algebra would spin, waiting for each other on cores that are busy.
for name in ('OPENBLAS_NUM_THREADS', 'OMP_NUM_THREADS'):
  os.environ.setdefault(name, '1')

# Tracing makes millions of objects that live: looking for cycles among them is a tenth of the time.
gc.set_threshold(200_000, 20, 100)

import pathlib
import shutil
import signal
import tempfile

# Programs that several tests compile, in whatever process, are compiled once. Workers and commands
# that tests start inherit the folder of the process that came first.
OWN_CACHE = 'JAX_COMPILATION_CACHE_DIR' not in os.environ
if OWN_CACHE:
  os.environ['JAX_COMPILATION_CACHE_DIR'] = tempfile.mkdtemp(prefix='palm_jax_compiled_')
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.3')

import pytest

SHARED = pathlib.Path(
  os.environ.get('PALM_SHARED', pathlib.Path(__file__).parents[1] / '..' / 'shared')
).resolve()


def pytest_unconfigure(config):
  """Removes the compiled programs at the end."""
  del config
  if OWN_CACHE:
    shutil.rmtree(os.environ['JAX_COMPILATION_CACHE_DIR'], ignore_errors=True)


@pytest.fixture(scope='session')
def shared():
  """The folder of reference arrays and real images; skips where it is absent."""
  if not SHARED.is_dir():
    pytest.skip(f'no reference data at {SHARED} (set PALM_SHARED)')
  return SHARED


@pytest.fixture
def terminal():
  """As in a terminal: whoever starts the tests in the background has signals ignored."""
  handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
  before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
  yield
  for number, handler in before.items():
    signal.signal(number, handler)


@pytest.fixture(scope='module')
def shallow():
  """The encoder resnet18 with one block a stage: half as much to compile, where any network will
  do."""
  from palm_jax import encoder, resnet

  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(resnet.BLOCKS, 10, (1, 1, 1, 1))
    patch.setitem(encoder.RESNETS, 'resnet18', 10)
    yield
