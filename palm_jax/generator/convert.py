"""python -m palm_jax.generator.convert network.pkl out/   (or out.safetensors) [--which=G]
[--about=words]

Writes a generator that `load_generator` reads in a form of ours: a folder with a checkpoint in full
precision, which --config.generator.path takes, or one .safetensors file of half the size in
float16.
"""

import logging as python_logging
import os
import pathlib
import shutil

from absl import app, flags

from palm_jax.base import devices
from palm_jax.base.errors import UserError
from palm_jax.checkpoint import Checkpoints, write_json_atomic
from palm_jax.generator import load_generator, network_fields, save_safetensors
from palm_jax.main import exit_on_user_error


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
    write_json_atomic(part / 'network.json', network_fields(generator.network))
    with Checkpoints(part / 'checkpoints') as checkpoints:
      checkpoints.save(
        0, {'generator': generator.variables}, dict(source=source.name, network=network)
      )
    os.rename(part, target)
  finally:
    shutil.rmtree(part, ignore_errors=True)


def parse_flags(argv):
  """Defines the flags and reads them; returns what absl leaves of argv. Raises UserError, in one
  line."""
  flags.DEFINE_string(
    'about', '', 'Words into a .safetensors file: where it comes from, under which licence.'
  )
  flags.DEFINE_string(
    'which', 'G_ema', 'Network to convert: G_ema (the average over the training) or G.'
  )
  try:
    return flags.FLAGS(argv)
  except flags.Error as e:
    raise UserError(' '.join(str(e).split())) from e


def main(argv):
  if len(argv) != 3:
    raise UserError(
      f'{len(argv) - 1} arguments: expected two, the network to read and the folder or '
      '.safetensors to write'
    )
  devices.configure()
  python_logging.getLogger('jax').setLevel(python_logging.WARNING)
  convert(argv[1], argv[2], flags.FLAGS.which, flags.FLAGS.about)


if __name__ == '__main__':
  app.run(exit_on_user_error(main), flags_parser=exit_on_user_error(parse_flags))
