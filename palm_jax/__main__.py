"""palm [COMMAND] ...: `palm --config=digits` is `python -m palm_jax.main --config=digits`.

Commands, each with --help: export, zoo, push, pull, sample, convert, siren, dataset, play.
"""

import importlib
import sys

COMMANDS = {
  'main': 'palm_jax.main',
  'export': 'palm_jax.export',
  'zoo': 'palm_jax.zoo',
  'push': 'palm_jax.zoo.push',
  'pull': 'palm_jax.zoo.pull',
  'sample': 'palm_jax.generator.sample',
  'convert': 'palm_jax.generator.convert',
  'siren': 'palm_jax.generator.siren',
  'dataset': 'palm_jax.world.dataset',
  'play': 'palm_jax.play',
}


def main() -> None:
  """Runs the command that the first argument names, or `main`."""
  name = 'main'
  if len(sys.argv) > 1 and not sys.argv[1].startswith('-'):
    name = sys.argv.pop(1)
  from palm_jax.base import command

  if name not in COMMANDS:
    command.fail(f'{name!r} is no command: palm {", ".join(COMMANDS)}, or flags alone')
  module = importlib.import_module(COMMANDS[name])
  # For --help: absl shows this text, and the flags of the module that has the program's name.
  sys.modules['__main__'].__doc__ = module.__doc__
  sys.argv[0] = module.__name__
  command.run(module.main, module.parse_flags)


if __name__ == '__main__':
  main()
