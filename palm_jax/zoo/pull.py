"""Fetches an encoder or generator that `palm push` shared, from the Hugging Face hub.

  python -m palm_jax.zoo.pull --repo=user/name [--revision=COMMIT] [--out=FILE.safetensors]

`palm_jax.load_encoder` reads the file of an encoder, --config.generator.path= that of a generator.
It needs `pip install -e '.[hub]'`.
"""

from absl import flags

from palm_jax.base import command
from palm_jax.base.errors import UserError
from palm_jax.zoo import hub


def parse_flags(argv: list[str]) -> list[str]:
  """Defines the flags and reads them; returns what absl leaves of argv. Raises UserError."""
  flags.DEFINE_string('repo', None, 'user/name on the hub.')
  flags.DEFINE_string('revision', None, 'Branch, tag or commit; default: the newest.')
  flags.DEFINE_string('out', None, 'File to write; default: name.safetensors in this folder.')
  return command.parse_flags(argv)


def main(argv: list[str]) -> None:
  """The command, after `parse_flags`. Raises UserError."""
  command.no_arguments(argv)
  given = flags.FLAGS
  if not given.repo:
    raise UserError('--repo is missing: user/name on the hub')
  command.start()
  hub.quieten()
  path, commit = hub.pull(given.repo, given.revision, given.out)
  print(f'{path}: of {given.repo}, commit {commit}')


if __name__ == '__main__':
  command.run(main, parse_flags)
