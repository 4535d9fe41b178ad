"""`python -m palm_jax.zoo`."""

from palm_jax.base import command
from palm_jax.zoo import main, parse_flags

if __name__ == '__main__':
  command.run(main, parse_flags)
