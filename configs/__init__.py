"""Configs, a file an experiment. A wheel holds them as `palm_jax.configs`."""

import sys

sys.modules.setdefault('configs', sys.modules[__name__])  # as they import each other
