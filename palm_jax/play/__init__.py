"""A page on which a person plays in the latent world.

  python -m palm_jax.play --generator=cifar10-small
  python -m palm_jax.play --workdir=runs/cifar --data=cifar10

It is served to this machine alone, at the address that is printed. Ctrl-C ends it.
"""

import importlib.util
import signal

from absl import flags

from palm_jax.base import command, signals
from palm_jax.base.errors import UserError
from palm_jax.play.load import GENERATOR, load_game


def parse_flags(argv: list[str]) -> list[str]:
  """Defines the flags and reads them; returns what absl leaves of argv. Raises UserError."""
  flags.DEFINE_string(
    'generator', None, f"Path or name; default: the workdir's own, or {GENERATOR}."
  )
  flags.DEFINE_string(
    'workdir', None, "Of a pretraining run: features are its encoder's, and its agent may play."
  )
  flags.DEFINE_string(
    'data', None, 'Real pictures, such as digits, x.npz or a folder: the nearest are shown.'
  )
  flags.DEFINE_integer(
    'port', 0, 'On 127.0.0.1; 0 is a free one.', lower_bound=0, upper_bound=65_535
  )
  return command.parse_flags(argv)


def main(argv: list[str]) -> None:
  """The command, after `parse_flags`. Raises UserError."""
  command.no_arguments(argv)
  if importlib.util.find_spec('aiohttp') is None:
    raise UserError("the page is served by aiohttp: python -m pip install -e '.[play]'")
  command.start()
  signals.watch(importing=True)
  from palm_jax.play import server  # here, because aiohttp is optional

  signals.watch()

  given = flags.FLAGS
  try:
    with server.listen(given.port) as socket:
      game = load_game(given.generator, given.workdir, given.data)
      server.serve(game, socket)
  except KeyboardInterrupt as e:
    number = getattr(e, 'number', signal.SIGINT)
    command.fail('the page has ended', signals.exit_code(number), at_once=True)
