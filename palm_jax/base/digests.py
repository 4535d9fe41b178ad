"""SHA-256 of trees of arrays: of a whole tree, and of each block of each array of a checkpoint."""

import concurrent.futures
import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils


def digest(variables: Any, settings: Mapping[str, Any]) -> str:
  """SHA-256 of a tree of arrays, its names, and the settings of the network that it belongs to."""
  sha256 = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
  for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
    leaf = np.asarray(leaf)
    sha256.update(
      f'{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}'.encode() + leaf.tobytes()
    )
  return sha256.hexdigest()


def of_arrays(*arrays: np.ndarray) -> str:
  """SHA-256 of the arrays' bytes, one after the other."""
  sha256 = hashlib.sha256()
  for array in arrays:
    flat = np.ascontiguousarray(array).reshape(-1)
    sha256.update(flat.view(np.uint8).data if flat.size else b'')  # no copy of large ones
  return sha256.hexdigest()


def file_digest(path: str | os.PathLike) -> str:
  """SHA-256 of a file's bytes. Raises OSError."""
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def describe(tree: Any) -> dict[str, dict[str, Any]]:
  """{path: {'shape', 'dtype', 'blocks': [[box, SHA-256], ...]}}."""
  there = leaves(tree)
  arrays = {path: plain(leaf) for path, leaf in there.items()}
  blocks = [(path, box) for path, leaf in arrays.items() for box in _boxes(leaf)]
  record = {
    path: {
      'shape': list(np.shape(leaf)),
      'dtype': str(getattr(leaf, 'dtype', arrays[path].dtype)),
      'blocks': [],
    }
    for path, leaf in there.items()
  }
  found = _digests([(arrays[path], box) for path, box in blocks])
  for (path, box), sha256 in zip(blocks, found, strict=True):
    record[path]['blocks'].append([box, sha256.tobytes().hex()])
  return record


def difference(items: Mapping[str, Any], saved: Mapping[str, Any]) -> str | None:
  """What differs between restored items and their digests, or None.

  Args:
    items: {name: tree of arrays}.
    saved: {name: what `describe` said of it}.
  """
  names = []
  blocks = []
  expected = []
  for name, tree in items.items():
    for path, leaf in leaves(tree).items():
      for box, digest in saved[name][path]['blocks']:
        names.append(f'{name}/{path}')
        blocks.append((plain(leaf), tuple(map(tuple, box))))
        expected.append(digest)
  digests = [d.tobytes().hex() for d in _digests(blocks)]
  unknown = sum(d == '00' * 32 for d in digests)
  if unknown:
    logging.warning(
      '%d of %d blocks were saved by another layout of processes and could not be checked',
      unknown,
      len(digests),
    )
  for name, digest, want in zip(names, digests, expected, strict=True):
    if digest not in (want, '00' * 32):
      return f'{name} holds other values than were saved'
  return None


def json_digest(obj: Any) -> str:
  """SHA-256 of an object as JSON."""
  return hashlib.sha256(json.dumps(obj, sort_keys=True).encode()).hexdigest()


def leaves(tree: Any) -> dict[str, Any]:
  """{path: leaf}, the path like 'params/conv/kernel'."""
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): leaf
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
  }


def signatures(tree: Any) -> dict[str, str]:
  """{path: 'float32(3, 4)'}."""
  return {path: f'{leaf.dtype}{tuple(leaf.shape)}' for path, leaf in leaves(tree).items()}


def plain(leaf: Any) -> jax.Array | np.ndarray:
  """Typed keys as their integers, Python numbers as arrays."""
  if not isinstance(leaf, jax.Array):
    return np.asarray(leaf)
  if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    return jax.random.key_data(leaf)
  return leaf


def _box(index, shape):
  """Slices of one shard -> ((start, stop), ...)."""
  return tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))


def _boxes(leaf):
  """The distinct blocks in which an array lies on all devices of all processes."""
  if not isinstance(leaf, jax.Array):
    return [tuple((0, n) for n in leaf.shape)]
  return sorted(
    {_box(index, leaf.shape) for index in leaf.sharding.devices_indices_map(leaf.shape).values()}
  )


def _block(leaf, box):
  """One block as a host array; None where this process has only part of it."""
  if isinstance(leaf, jax.Array):
    for shard in leaf.addressable_shards:
      if _box(shard.index, leaf.shape) == box:
        return np.asarray(shard.data)
    if not leaf.is_fully_addressable:
      return None
  return np.asarray(leaf)[tuple(slice(*ends) for ends in box)]


def _digests(blocks):
  """[(array, box)] -> (N, 32) uint8 SHA-256, the same in all processes.

  They are zeros for blocks that no process has whole.
  """

  def digest(block):
    data = _block(*block)
    if data is None:
      return np.zeros(32, np.uint8)
    data = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    return np.frombuffer(hashlib.sha256(data.data).digest(), np.uint8)

  # hashlib leaves the interpreter's lock: 1 GB takes about half a second of one core.
  with concurrent.futures.ThreadPoolExecutor() as pool:
    digests = np.stack([*pool.map(digest, blocks), np.zeros(32, np.uint8)])[:-1]
  if jax.process_count() > 1:
    # A process that has a block has its digest, the others have zeros.
    digests = multihost_utils.process_allgather(digests).max(0)
  return digests
