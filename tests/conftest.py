"""Eight CPU devices and one store of compiled programs; set before jax is imported."""

import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# The tests compile far more than they compute: no machine-code optimisation halves their time.
os.environ['XLA_FLAGS'] = ' '.join(
  [
    os.environ.get('XLA_FLAGS', ''),
    '--xla_force_host_platform_device_count=8',
    '--xla_backend_optimization_level=0',
    '--xla_llvm_disable_expensive_passes=true',
    '--xla_cpu_parallel_codegen_split_count=1',
  ]
)
# Collectives of several programs in flight deadlock when the pool has fewer threads than devices.
os.environ['NPROC'] = '16'

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
