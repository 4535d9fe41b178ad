"""Eight CPU devices for every test; must be set before jax is imported."""

import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# The tests compile far more than they compute: no machine-code optimisation halves their time.
os.environ['XLA_FLAGS'] = ' '.join(
  [
    os.environ.get('XLA_FLAGS', ''),
    '--xla_force_host_platform_device_count=8',
    '--xla_backend_optimization_level=0',
  ]
)
# Collectives of several programs in flight deadlock when the pool has fewer threads than devices.
os.environ['NPROC'] = '16'

import pathlib

import pytest

SHARED = pathlib.Path(
  os.environ.get('PALM_SHARED', pathlib.Path(__file__).parents[1] / '..' / 'shared')
).resolve()


@pytest.fixture(scope='session')
def shared():
  """The folder of reference arrays and real images; skips where it is absent."""
  if not SHARED.is_dir():
    pytest.skip(f'no reference data at {SHARED} (set PALM_SHARED)')
  return SHARED
