"""PALM (arXiv 2210.10913) in JAX: a picture generator as a world, an agent that explores it, an
encoder that learns from it."""

import importlib
import pathlib
import sys
from typing import Any

__version__ = '0.1.0'

if pathlib.Path(sys.argv[0] if sys.argv else '').stem in ('-m', 'palm'):
  # A command of this package, whose imports take seconds.
  from palm_jax.base import signals

  signals.watch(importing=True)


def __getattr__(name: str) -> Any:
  """A module of the package, imported when it is first asked for: `palm_jax.checkpoint`."""
  try:
    return importlib.import_module(f'palm_jax.{name}')
  except ModuleNotFoundError as e:
    if e.name != f'palm_jax.{name}':
      raise
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}') from None
