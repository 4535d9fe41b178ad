"""Shares a run's encoder, or the generator that it trained, on the Hugging Face hub.

  python -m palm_jax.zoo.push --workdir=runs/cifar_small --repo=user/name
  python -m palm_jax.zoo.push --workdir=runs/cifar --repo=user/name --what=generator

It needs `pip install -e '.[hub]'`, and a login: `hf auth login`, or HF_TOKEN.
"""

from absl import flags

from palm_jax.base import command
from palm_jax.base.errors import UserError
from palm_jax.zoo import hub


def parse_flags(argv: list[str]) -> list[str]:
  """Defines the flags and reads them; returns what absl leaves of argv. Raises UserError."""
  flags.DEFINE_string('workdir', None, 'Of the run.')
  flags.DEFINE_string('repo', None, 'user/name on the hub; made if absent.')
  flags.DEFINE_string('what', 'encoder', f'One of {", ".join(hub.KINDS)}.')
  flags.DEFINE_bool('private', False, 'Whether a repository that is made is private.')
  flags.DEFINE_integer('step', None, "Of the encoder's checkpoint; default: the newest.")
  flags.DEFINE_string('licence', '', 'SPDX identifier, for the card; default: none is stated.')
  flags.DEFINE_string('command', '', 'The command that made the run, for the card of an encoder.')
  return command.parse_flags(argv)


def main(argv: list[str]) -> None:
  """The command, after `parse_flags`. Raises UserError."""
  command.no_arguments(argv)
  given = flags.FLAGS
  if not given.workdir or not given.repo:
    raise UserError('--workdir and --repo are needed, such as --workdir=runs/cifar --repo=me/palm')
  command.start()
  hub.quieten()
  commit = hub.push(
    given.workdir,
    given.repo,
    given.what,
    given.private,
    given.step,
    given.licence,
    command=given.command,
  )
  print(f'{given.repo}: the {given.what} of {given.workdir}, commit {commit}')


if __name__ == '__main__':
  command.run(main, parse_flags)
