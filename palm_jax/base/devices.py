"""Devices: what must be set before the backend starts, the mesh, and checks of sizes against it."""

import contextlib
import importlib.metadata
import importlib.util
import itertools
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from palm_jax.base.errors import UserError, one_line

PLATFORMS = 'cpu', 'cuda', 'gpu', 'rocm', 'tpu'
_sharing = {'processes': 1}  # of the run, on this machine


def configure() -> None:
  """Sets compiler flags; call before anything touches a device.

  XLA:CPU's YNN fusions make convolution gradients 1.5 to 2.2 times slower (jaxlib 0.10.2; in 0.11.2
  they make no difference), so they are turned off.
  """
  flag = '--xla_cpu_experimental_ynn_fusion_type'
  flags = os.environ.get('XLA_FLAGS', '')
  # In other versions it may be unknown, and an unknown flag aborts the process.
  if jax.__version__.startswith('0.10.') and flag not in flags:
    os.environ['XLA_FLAGS'] = f'{flags} {flag}='.strip()


def jit_once(f: Callable, out_shardings: Any = None) -> Any:
  """jax.jit of a large program that runs once, such as a first state; not within another trace.

  On CPU LLVM's dearer passes take half of the time that it is compiled in, and change no bit of it.
  """
  flag = 'xla_backend_optimization_level'
  cheaper = jax.default_backend() == 'cpu' and flag not in os.environ.get('XLA_FLAGS', '')
  options = {flag: 1} if cheaper else None
  return jax.jit(f, out_shardings=out_shardings, compiler_options=options)


def platform() -> str:
  """'cpu', 'gpu' or 'tpu': that of the mesh being traced for.

  It is not the process's own where a program is compiled ahead of time.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  return device.platform if device else jax.default_backend()


def vary_alike(*arrays: jax.Array) -> tuple[jax.Array, ...]:
  """The arrays, each varying over all mesh axes that any of them varies over.

  Custom gradients inside shard_map need it.
  """
  varying = [jax.typeof(a).manual_axis_type.varying for a in arrays]
  axes = frozenset().union(*varying)
  return tuple(
    lax.pcast(a, tuple(axes - own), to='varying') for a, own in zip(arrays, varying, strict=True)
  )


def make_mesh(num_devices: int | None = None) -> Mesh:
  """A one-dimensional mesh, axis 'data', over all devices (or the first `num_devices`).

  Raises:
    UserError: JAX finds no device of the kind that was asked for.
  """
  try:
    devices = jax.devices()[:num_devices]
  except (RuntimeError, AssertionError) as e:
    raise _missing(e) from e
  return mesh_of(devices)


def mesh_of(devices: Sequence[Any]) -> Mesh:
  """The one-dimensional mesh, axis 'data', that everything here runs on."""
  return Mesh(devices, ('data',), axis_types=(AxisType.Auto,))


def missing() -> UserError | None:
  """What to say where JAX finds no device of the kind that was asked for, else None."""
  try:
    jax.devices()
    return None
  except (RuntimeError, AssertionError) as e:
    return _missing(e)


def _missing(error):
  asked = os.environ.get('JAX_PLATFORMS', '')
  unknown = [name for name in asked.split(',') if name not in PLATFORMS]
  if asked and unknown:
    return UserError(
      f'JAX_PLATFORMS={asked}: {unknown[0]!r} is unknown: set cpu, cuda or tpu, or leave it unset'
    )
  reason = f'; {one_line(error)}'.partition(' (set JAX_PLATFORMS')[0] if str(error) else ''
  extra = 'tpu' if 'tpu' in asked else 'cuda12'
  return UserError(
    f'JAX finds no device (JAX_PLATFORMS={asked}{reason}): on a machine that has one, install '
    f"JAX for it, such as pip install -e '.[{extra}]'; else set JAX_PLATFORMS=cpu"
  )


def shardings(mesh: Mesh, specs: Any) -> Any:
  """NamedShardings for a tree of PartitionSpecs."""
  return jax.tree.map(
    lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, P)
  )


def replicate(mesh: Mesh, tree: Any) -> Any:
  """Puts a tree of arrays, the same in all processes, on every device of the mesh."""
  everywhere = NamedSharding(mesh, P())

  def put(x):
    if isinstance(x, jax.Array) and jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key):
      # device_put to the devices of several processes takes no typed keys.
      data = put(np.asarray(jax.random.key_data(x)))
      return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    if not isinstance(x, (np.ndarray, np.generic)):
      return jax.device_put(x, everywhere)
    # device_put would gather a host's array from all processes to compare it.
    array = np.asarray(x)
    return jax.make_array_from_callback(array.shape, everywhere, lambda index: array[index])

  return jax.tree.map(put, tree)


def shard(mesh: Mesh, array: np.ndarray, spec: P) -> jax.Array:
  """Puts a host's array, the same in all processes, on the mesh in shares."""
  return jax.make_array_from_callback(
    array.shape, NamedSharding(mesh, spec), lambda index: array[index]
  )


def templates(tree: Any, sharding: Any) -> Any:
  """jax.ShapeDtypeStructs of a tree of arrays or their shapes, all of them with one sharding."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def memory_bytes(mesh: Mesh) -> int:
  """Memory of one device: what its allocator may take; of CPU devices a share of the machine's."""
  limit = (mesh.local_devices[0].memory_stats() or {}).get('bytes_limit')
  if limit:
    return limit
  return machine_memory() // len(mesh.local_devices)


def machine_memory() -> int:
  """Bytes of this machine's memory that its container or batch system lets this process have.

  It is shared with the run's other processes on this machine (`share_machine`). More than any has
  where the machine does not say (Windows).
  """
  if not hasattr(os, 'sysconf'):
    return 2**60
  whole = min(os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES'), _cgroup_memory())
  return whole // _sharing['processes']


def share_machine(processes: int) -> None:
  """Says how many processes of the run are on this machine."""
  _sharing['processes'] = processes


def _cgroup_memory(groups='/proc/self/cgroup', root='/sys/fs/cgroup'):
  """The least that Linux's control groups of this process set, of version 2 and 1."""
  limit = 2**60
  try:
    lines = pathlib.Path(groups).read_text().splitlines()
  except OSError:
    return limit
  for line in lines:
    _, kinds, group = line.split(':', 2)
    if kinds not in ('', 'memory'):
      continue
    name = 'memory.limit_in_bytes' if kinds else 'memory.max'
    place = pathlib.Path(root, kinds)
    below = pathlib.PurePosixPath(group.lstrip('/'))
    for folder in (below, *below.parents):  # within a container only the last one may be there
      with contextlib.suppress(OSError, ValueError):  # ValueError: 'max'
        limit = min(limit, int((place / folder / name).read_text()))
  return limit


def mean(x: jax.Array, axis_name: str | None = None, axis: int | None = None) -> jax.Array:
  """Mean of an array, over the devices of a mesh axis too where it is split over one."""
  x = jax.numpy.mean(x, axis=axis)
  return x if axis_name is None else jax.lax.pmean(x, axis_name)


def nbytes(tree: Any) -> int:
  """Bytes of a tree of arrays or their shapes, over all devices.

  Typed keys count as their words.
  """

  def size(x):
    if jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key):
      x = jax.eval_shape(jax.random.key_data, x)
    return math.prod(x.shape) * x.dtype.itemsize

  return sum(map(size, jax.tree.leaves(tree)))


def check_fits(need: float, mesh: Mesh, what: str, remedy: str) -> None:
  """Raises UserError where a device has fewer than `need` bytes; `what` takes them."""
  memory = memory_bytes(mesh)
  if need > memory:
    raise UserError(
      f'{what} {need / 2**30:.1f} GiB on each of {mesh.size} device(s), which have '
      f'{memory / 2**30:.1f} GiB: {remedy}'
    )


def check_layers(widths: Mapping[str, Sequence[int]], copies: int, mesh: Mesh) -> None:
  """Raises UserError where a device cannot hold layers between layers, before any is made.

  Args:
    widths: {setting: widths of one network's hidden layers}.
    copies: of each network, of which Adam has two more.
    mesh: whose devices all hold them.
  """
  for name, sizes in widths.items():
    need = 4 * 3 * copies * sum(a * b for a, b in itertools.pairwise(sizes))
    check_fits(need, mesh, f'networks of {name}={tuple(sizes)} take', f'lower {name}')


def describe(mesh: Mesh) -> dict[str, Any]:
  """What a result was computed on, for its file."""
  return dict(
    devices=f'{mesh.size} x {mesh.devices.flat[0].device_kind}',
    processes=jax.process_count(),
    versions={name: importlib.metadata.version(name) for name in ('jax', 'flax', 'optax')},
  )
