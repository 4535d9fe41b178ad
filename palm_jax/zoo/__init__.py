"""Writes the encoder of a finished run as a file of a few megabytes, with a card beside it.

  python -m palm_jax.zoo --workdir=runs/cifar_small_best --name=palm-cifar10-small [--out=FOLDER]

NAME.safetensors has its kernels in float16; NAME.json says how it was made and what was measured:
results/probe.json and results/ood.json of the run, where they are. `palm_jax.load_encoder` reads
both; `palm push` shares them.
"""

from absl import flags

from palm_jax.base import command
from palm_jax.base.errors import UserError
from palm_jax.zoo.loaded import LoadedEncoder, load_encoder, names

__all__ = ['LoadedEncoder', 'load_encoder', 'names']

LICENCE = 'Apache-2.0'  # of this package, in which bundled encoders are


def parse_flags(argv: list[str]) -> list[str]:
  """Defines the flags and reads them; returns what absl leaves of argv. Raises UserError."""
  flags.DEFINE_string('workdir', None, 'Of the pretraining run whose encoder is wanted.')
  flags.DEFINE_string('name', None, 'Of the encoder, such as palm-cifar10-small.')
  flags.DEFINE_string('out', None, 'Folder for both files; default: the workdir.')
  flags.DEFINE_integer('step', None, 'Of the checkpoint; default: the newest.')
  flags.DEFINE_string('licence', LICENCE, 'SPDX identifier, for the card.')
  flags.DEFINE_string('command', '', 'The command that made the run, for the card.')
  return command.parse_flags(argv)


def main(argv: list[str]) -> None:
  """The command, after `parse_flags`. Raises UserError."""
  command.no_arguments(argv)
  given = flags.FLAGS
  if not given.workdir or not given.name:
    raise UserError(
      '--workdir and --name are needed: those of a pretraining run and of its encoder, such as '
      '--workdir=runs/cifar_small_best --name=palm-cifar10-small'
    )
  command.start()
  from palm_jax.zoo import bundle  # here, because load_encoder needs no generators

  path = bundle.write(
    given.workdir, given.name, given.out, given.step, given.licence, command=given.command
  )
  card = load_encoder(path).card or {}
  measured = [name for name, result in card['results'].items() if result]
  print(
    f'{path}: {card["file_bytes"] / 1e6:.2f} MB, features differ by '
    f'{card["difference"]["largest"]:.1e} from those in float32'
  )
  print(
    f'{path.with_suffix(".json")}: its card, with results of {" and ".join(measured) or "none"}'
  )
