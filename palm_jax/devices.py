"""Devices: what must be set before the backend starts, the mesh, and checks of sizes against it."""
import importlib.metadata
import os

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from palm_jax.errors import UserError


def configure():
  """Sets compiler flags; call before anything touches a device.

  XLA:CPU's YNN fusions make convolution gradients 1.5 to 2.2 times slower (jaxlib 0.10.2), so they are turned off.
  """
  flag = '--xla_cpu_experimental_ynn_fusion_type'
  flags = os.environ.get('XLA_FLAGS', '')
  if jax.__version__.startswith('0.10.') and flag not in flags:  # an unknown flag would abort the process
    os.environ['XLA_FLAGS'] = f'{flags} {flag}='.strip()


def make_mesh(num_devices=None):
  """A one-dimensional mesh, axis 'data', over all devices (or the first `num_devices`)."""
  devices = jax.devices()[:num_devices]
  return jax.sharding.Mesh(devices, ('data',), axis_types=(AxisType.Auto,))


def shardings(mesh, specs):
  """NamedShardings for a tree of PartitionSpecs."""
  return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, P))


def replicate(mesh, tree):
  """Puts a tree of host arrays on every device of the mesh."""
  return jax.device_put(tree, NamedSharding(mesh, P()))


def check_divisible(name, value, divisor, divisor_name):
  """Raises UserError unless value is a positive multiple of divisor."""
  if value < 1 or value % divisor:
    raise UserError(f'{name}={value} is not a positive multiple of {divisor_name}={divisor}: '
                    f'set {name} to {max(1, round(value / divisor)) * divisor}, for example')


def describe(mesh):
  """What a result was computed on, for its file."""
  return dict(devices=f'{mesh.size} x {mesh.devices.flat[0].device_kind}', processes=jax.process_count(),
              versions={name: importlib.metadata.version(name) for name in ('jax', 'flax', 'optax')})
