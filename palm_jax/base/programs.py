"""Compiled programs on the disk: JAX writes them in place, and never again."""

import hashlib
import importlib
import importlib.util
import json
import os
import pathlib
import zlib

import jax
from absl import logging
from jax.experimental.compilation_cache import compilation_cache

from palm_jax.base.files import write_json
from palm_jax.base.signals import raise_if_interrupted

FOLDER = 'compilation_cache'  # of a workdir
DIGESTS = 'digests.json'  # in there
ZSTD = b'\x28\xb5\x2f\xfd'  # how its files begin


def keep(workdir: pathlib.Path) -> None:
  """Keeps compiled programs in the workdir, unless JAX_COMPILATION_CACHE_DIR names a place."""
  if not jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update('jax_compilation_cache_dir', str(workdir / FOLDER))


def forget(folder: pathlib.Path) -> None:
  """Keeps none there any more."""
  if jax.config.jax_compilation_cache_dir == str(folder):  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update('jax_compilation_cache_dir', None)
    compilation_cache.reset_cache()


def remove_damaged(folder: pathlib.Path) -> None:
  """Removes compiled programs that are not whole; the log names each.

  Their digests are kept, so that a flipped bit is seen, too.
  """
  if not folder.is_dir():
    return
  known = _known(folder / DIGESTS)
  found = {}
  for path in folder.glob('*-cache'):
    program = path.read_bytes()
    digest = hashlib.sha256(program).hexdigest()
    if known.get(path.name, digest) == digest and (path.name in known or _is_whole(program)):
      found[path.name] = digest
    else:
      logging.warning('%s is damaged and removed: it is compiled again', path)
      path.unlink(missing_ok=True)
  if found != known and os.access(folder, os.W_OK):  # a complete run may be read-only
    write_json(folder / DIGESTS, found)


def _known(path):
  try:
    known = json.loads(path.read_text())
  except (OSError, ValueError, RecursionError):
    known = {}
  return known if isinstance(known, dict) else {}


def _is_whole(program):
  """Whether a compiled program can be decompressed, as far as that can be told here."""
  try:
    if not program.startswith(ZSTD):
      zlib.decompress(program)
    elif importlib.util.find_spec('zstandard'):
      importlib.import_module('zstandard').ZstdDecompressor().decompress(program)
  except Exception as e:  # zlib and zstandard have their own
    raise_if_interrupted(e)
    return False
  return True
