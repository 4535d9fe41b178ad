"""PALM (arXiv 2210.10913) in JAX: a picture generator as a world, an agent that explores it, an
encoder that learns from it."""

import sys

if sys.argv[:1] == ['-m']:  # a command of this package, whose imports take seconds
  from palm_jax.base import signals

  signals.watch(importing=True)
