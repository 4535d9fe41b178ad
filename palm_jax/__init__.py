"""PALM (arXiv 2210.10913) in JAX: a picture generator as a world, an agent that explores it, an
encoder that learns from it."""

import importlib
import pathlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from palm_jax.zoo import load_encoder as load_encoder

__version__ = '0.1.0'


def _is_command():
  """Whether this process is `python -m palm_jax...` or the script `palm`."""
  script = pathlib.Path(sys.argv[0] if sys.argv else '')
  if script.name != '-m':
    return script.stem == 'palm' and script.suffix in ('', '.exe')
  # Python is importing the packages of the module to run, whose name stands before its arguments.
  word = next(iter(sys.orig_argv[-len(sys.argv) :]), '')
  name = word.rpartition('-m')[2]  # of `-mNAME` as well
  return name.partition('.')[0] == 'palm_jax'


if _is_command():  # its imports take seconds
  from palm_jax.base import signals

  signals.watch(importing=True)


FUNCTIONS = {'load_encoder': 'palm_jax.zoo'}  # that stand here, too, and where they are


def __getattr__(name: str) -> Any:
  """A module of the package, or one of FUNCTIONS, imported when it is first asked for."""
  if name in FUNCTIONS:
    return getattr(importlib.import_module(FUNCTIONS[name]), name)
  try:
    return importlib.import_module(f'palm_jax.{name}')
  except ModuleNotFoundError as e:
    if e.name != f'palm_jax.{name}':
      raise
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}') from None
