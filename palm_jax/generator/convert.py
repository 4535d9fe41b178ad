"""Writes a generator that `load_generator` reads in a form of ours.

  python -m palm_jax.generator.convert network.pkl out/ [--which=G]
  python -m palm_jax.generator.convert network.pkl out.safetensors [--which=G] [--about=WORDS]

--class_averages gives each class the average w of its own, to which truncation then pulls.

The form is a folder with a checkpoint in full precision, which --config.generator.path takes, or
one .safetensors file of half the size, in float16.
"""

import os
import pathlib
import shutil

from absl import flags

from palm_jax.base import command, files
from palm_jax.base.checkpoints import Checkpoints
from palm_jax.base.errors import UserError
from palm_jax.base.files import user_path, write_json
from palm_jax.generator import (
  LoadedGenerator,
  load_generator,
  network_fields,
  save_safetensors,
)
from palm_jax.generator.snapshots import mean_w
from palm_jax.generator.stylegan2 import Generator


def convert(
  source: str | os.PathLike,
  target: str | os.PathLike,
  network: str = 'G_ema',
  about: str = '',
  class_averages: bool = False,
) -> None:
  """Reads a generator as `load_generator` does and writes it to `target`: whole, or nothing of it.

  Args:
    source: path or name for `load_generator`.
    target: *.safetensors, or a folder, which is new or empty.
    network: 'G_ema' or 'G'.
    about: for people, into a .safetensors file: where it comes from, under which licence.
    class_averages: whether truncation pulls towards the average w of a picture's class.

  Raises:
    UserError: what `load_generator` refuses, a target that holds something or is the working
      folder, or class averages without classes.
  """
  source = pathlib.Path(source)
  target = user_path(target)
  in_file = target.suffix == '.safetensors'
  used_folder = target.is_dir() and (in_file or any(target.iterdir()))
  if used_folder or (target.exists() and not target.is_dir() and not in_file):
    raise UserError(
      f'{target} holds something already: name an empty or new folder, or a new .safetensors file'
    )
  if target.is_dir() and target.samefile('.'):
    raise UserError(f'{target} is the folder you are in, which would be replaced: name a new one')
  files.check_writable(target)
  generator = load_generator(source, network)
  if class_averages:
    generator = with_class_averages(generator)
  if in_file:
    words = about or f'{network} of {source.name}'
    save_safetensors(target, generator.network, generator.variables, words)
    return
  part = target.with_name(f'.{target.name}.{os.getpid()}.part')
  try:
    fields = network_fields(generator.network)
    write_json(part / 'network.json', fields)
    with Checkpoints(part / 'checkpoints') as checkpoints:
      origin = dict(source=source.name, network=network, fields=fields)
      checkpoints.save(0, {'generator': generator.variables}, origin)
    os.rename(part, target)
  finally:
    shutil.rmtree(part, ignore_errors=True)


def with_class_averages(generator: LoadedGenerator) -> LoadedGenerator:
  """The generator with w_avg (num_classes, w_dim), measured.

  Raises:
    UserError: without classes, or no StyleGAN2.
  """
  network = generator.network
  if not generator.num_classes:
    raise UserError('class averages of a generator without classes: leave --class_averages out')
  if not isinstance(network, Generator):
    raise UserError('class averages are of StyleGAN2 only: leave --class_averages out')
  averages = mean_w(network, generator.variables, each_class=True)
  variables = {
    **generator.variables,
    'buffers': {**generator.variables['buffers'], 'w_avg': averages},
  }
  return LoadedGenerator(network.clone(class_averages=True), variables)


def parse_flags(argv: list[str]) -> list[str]:
  """Defines the flags and reads them; returns what absl leaves of argv. Raises UserError."""
  flags.DEFINE_string(
    'about', '', 'Words into a .safetensors file: where it comes from, under which licence.'
  )
  flags.DEFINE_bool(
    'class_averages', False, 'Truncation pulls towards the average w of a class, not of all.'
  )
  flags.DEFINE_string(
    'which', 'G_ema', 'Network to convert: G_ema (the average over the training) or G.'
  )
  return command.parse_flags(argv)


def main(argv: list[str]) -> None:
  """The command, after `parse_flags`. Raises UserError."""
  if len(argv) != 3:
    raise UserError(
      f'{len(argv) - 1} arguments: expected two, the network to read and the folder or '
      '.safetensors to write'
    )
  command.start()
  given = flags.FLAGS
  convert(argv[1], argv[2], given.which, given.about, given.class_averages)


if __name__ == '__main__':
  command.run(main, parse_flags)
