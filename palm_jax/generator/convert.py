"""python -m palm_jax.generator.convert network.pkl out/   (or out.safetensors) [--which=G]
[--about=words]

Writes a generator that `load_generator` reads in a form of ours: a folder with a checkpoint in full
precision, which --config.generator.path takes, or one .safetensors file of half the size in
float16.
"""

import os
import pathlib
import shutil

from absl import flags

from palm_jax.base import command
from palm_jax.base.checkpoints import Checkpoints
from palm_jax.base.errors import UserError
from palm_jax.base.files import write_json
from palm_jax.generator import load_generator, network_fields, save_safetensors


def convert(source, target, network='G_ema', about=''):
  """Reads a generator as `load_generator` does and writes it to `target`: whole, or nothing of it.

  Args:
    source: path or name for `load_generator`.
    target: folder that is empty or not there, or *.safetensors.
    network: 'G_ema' or 'G'.
    about: for people, into a .safetensors file: where it comes from, under which licence.

  Raises:
    UserError: what `load_generator` refuses, or a target that holds something.
  """
  target, source = pathlib.Path(target), pathlib.Path(source)
  in_file = target.suffix == '.safetensors'
  if target.is_dir() and (in_file or any(target.iterdir())) or target.is_file() and not in_file:
    raise UserError(
      f'{target} holds something already: name an empty or new folder, or a new .safetensors file'
    )
  generator = load_generator(source, network)
  if in_file:
    save_safetensors(
      target, generator.network, generator.variables, about or f'{network} of {source.name}'
    )
    return
  part = target.with_name(f'.{target.name}.{os.getpid()}.part')
  try:
    write_json(part / 'network.json', network_fields(generator.network))
    with Checkpoints(part / 'checkpoints') as checkpoints:
      checkpoints.save(
        0, {'generator': generator.variables}, dict(source=source.name, network=network)
      )
    os.rename(part, target)
  finally:
    shutil.rmtree(part, ignore_errors=True)


def parse_flags(argv: list[str]) -> list[str]:
  """Defines the flags and reads them; returns what absl leaves of argv. Raises UserError."""
  flags.DEFINE_string(
    'about', '', 'Words into a .safetensors file: where it comes from, under which licence.'
  )
  flags.DEFINE_string(
    'which', 'G_ema', 'Network to convert: G_ema (the average over the training) or G.'
  )
  return command.parse_flags(argv)


def main(argv: list[str]) -> None:
  if len(argv) != 3:
    raise UserError(
      f'{len(argv) - 1} arguments: expected two, the network to read and the folder or '
      '.safetensors to write'
    )
  command.start()
  convert(argv[1], argv[2], flags.FLAGS.which, flags.FLAGS.about)


if __name__ == '__main__':
  command.run(main, parse_flags)
