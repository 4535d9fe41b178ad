"""`python -m palm_jax.play`."""

from palm_jax.base import command
from palm_jax.play import main, parse_flags

if __name__ == '__main__':
  command.run(main, parse_flags)
