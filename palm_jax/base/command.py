"""What all commands have in common: flags, mistakes in one line with exit code 2, quiet logs."""

import ast
import contextlib
import functools
import importlib.util
import itertools
import logging as python_logging
import os
import pathlib
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

import jax
from absl import app, flags
from ml_collections import ConfigDict, config_flags

from palm_jax.base import checks, compiling, console, devices, files, processes, signals
from palm_jax.base.errors import UserError, one_line
from palm_jax.base.signals import raise_if_interrupted

try:
  import resource
except ImportError:  # Windows
  resource = None

SIGPIPE = 13
CONFIG_FLAG = '--config', '-config'  # absl takes both
LEAST_MEMORY = 3_000_000_000  # bytes of addresses: with fewer JAX aborts without a word
# How Python says that a flag has a value of another type, and what it wants instead.
OTHER_TYPES = {
  ': invalid literal for int()': 'a whole number',
  ': could not convert string to float': 'a number',
  ": ('Non-boolean argument": 'True or False',
}


def run(main: Callable, parse_flags: Callable) -> None:
  """Runs a command: parse_flags(argv) -> rest of argv, then main(rest).

  A UserError of either becomes one line and exit code 2, a signal one line and 128 + its number.
  """
  signals.watch()
  app.run(exit_on_user_error(main), flags_parser=exit_on_user_error(parse_flags))


def exit_on_user_error(main: Callable) -> Callable:
  """Wraps a main function: a UserError, or what the disk refuses, ends in one line and code 2."""

  def wrapped(argv):
    try:
      return signals.call(main, argv)
    except UserError as e:
      fail(e)
    except KeyboardInterrupt as e:
      number = getattr(e, 'number', signal.SIGINT)
      if signals.watching() and not jax.distributed.is_initialized():
        signals.end_at_once(number)  # what Python's own way out would wait for is of no use
      if getattr(e, 'agreed', False):
        processes.wait_for_all()
      signals.say()
      sys.exit(signals.exit_code(number))
    except BrokenPipeError:  # as by `| head`
      os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what Python still has to write goes nowhere
      fail('whoever read the output has ended', signals.exit_code(SIGPIPE))
    except OSError as e:
      remedy = files.remedy(e)
      if not remedy:
        raise
      where = e.filename or 'the file being written'
      # Libraries would try to write on their way out, and say so at length.
      at_once = signals.watching() and not jax.distributed.is_initialized()
      fail(f'{e.strerror}: {where}: {remedy}, or choose another {_place(where)}', at_once=at_once)
    except (RuntimeError, ValueError, AssertionError) as e:  # of JAX, which names no kind
      missing = devices.missing()
      if missing:
        fail(missing)
      if 'Gloo' in str(e) and jax.process_count() > 1:
        fail('another process of the run has ended or cannot be reached: its last line says why')
      # With several processes only dying at once ends the others.
      if 'RESOURCE_EXHAUSTED' not in str(e) or jax.process_count() > 1:
        raise
      fail(
        f'a device has not enough memory ({" ".join(str(e).split())[:200]}): lower '
        'pretrain.batch_size, pretrain.num_envs, encoder.width, replay.capacity or, in '
        'evaluations, features.batch_size, raise generator.accumulate, or take more devices; '
        '--job=plan shows what takes how much'
      )

  return wrapped


def _place(where):
  """What says where a path lies: --workdir, unless that is given and lies elsewhere."""
  given = flags.FLAGS['workdir'].value if 'workdir' in flags.FLAGS else ''
  path = pathlib.Path(str(where)).absolute()
  within = given is None or (given and path.is_relative_to(pathlib.Path(given).absolute()))
  return '--workdir' if within else 'place to write to'


def fail(message: object, code: int = 2, at_once: bool = False) -> NoReturn:
  """Ends the process with one line and an exit code; at once: without Python's way out."""
  console.rest()
  with contextlib.suppress(OSError):  # nobody reads it
    print(f'palm_jax: {message}', file=sys.stderr, flush=True)
  if at_once:
    os._exit(code)
  processes.leave(code)


def start() -> None:
  """Settings of the process; call before anything touches a device. Raises UserError."""
  if resource:
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY and limit < LEAST_MEMORY:
      raise UserError(
        f'this process may take {limit / 1e9:.1f} GB of addresses, of which JAX needs '
        f'{LEAST_MEMORY / 1e9:.0f} GB: raise `ulimit -v`'
      )
  devices.configure()
  console.start()
  compiling.announce()
  # It tells of every backend that is not installed.
  python_logging.getLogger('jax').setLevel(python_logging.WARNING)


def no_arguments(argv: list[str]) -> None:
  """Raises UserError where the command line has anything besides flags."""
  if len(argv) > 1:
    raise UserError(f'unexpected argument {argv[1]!r}: flags begin with --')


def parse_flags(argv: list[str]) -> list[str]:
  """Reads the flags that were defined; returns what absl leaves of argv. Raises UserError."""
  try:
    return flags.FLAGS(argv)
  except flags.Error as e:
    raise UserError(_in_words(' '.join(str(e).split()))) from e


def _in_words(message):
  """The message of a flag's error, where it is Python's own in plain words."""
  for words, wanted in OTHER_TYPES.items():
    given, found, _ = message.partition(words)
    if found:
      return f'{given.removeprefix("flag ")}: expected {wanted}'
  return message


def parse_config_flags(argv: list[str], default: str) -> list[str]:
  """Defines --config and its --config.KEY=VALUE, and reads all flags that were defined.

  Args:
    argv: of the command.
    default: config file where none is given.

  Returns:
    What absl leaves of argv.

  Raises:
    UserError: an invalid flag, config file, variant, key or value; in one line.
  """
  argv[:] = _located(argv)
  default = find_config(default)
  define = functools.partial(
    config_flags.DEFINE_config_file,
    'config',
    default,
    'Config file, with `:variant` where it has some.',
  )
  try:
    # First without --config.KEY=VALUE: ml_collections meets an unknown key with a traceback.
    plain = flags.FlagValues()
    plain.set_gnu_getopt(True)  # reads on beyond the values of flags that it does not know
    define(flag_values=plain, sys_argv=[])
    with _mistakes_in_config_files():
      plain([arg for arg in argv if not arg.startswith('--config.')], known_only=True)
    flag: Any = plain['config']  # ml_collections' own kind of flag
    _check_keys(argv, plain.config, flag.config_filename, default)
    define()
    return flags.FLAGS(argv)
  except flags.Error as e:
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    message = lines[0] if len(lines) == 1 else f'{lines[0]} {lines[-1]}'  # between: a traceback
    if 'get_config() takes 0 positional arguments' in message:
      path, _, variant = message.partition(': Error')[0].removeprefix('flag ').rpartition(':')
      message = f'{path} has no variants: leave :{variant} out'
    raise UserError(_in_words(message)) from e


@contextlib.contextmanager
def _mistakes_in_config_files():
  """What a config file raises, which may be anything, in one line with its place."""
  try:
    yield
  except (UserError, flags.Error):
    raise
  except Exception as e:
    raise_if_interrupted(e)
    *_, last = traceback.extract_tb(e.__traceback__)
    file, line = last.filename, last.lineno
    if isinstance(e, SyntaxError) and e.filename:
      file, line = e.filename, e.lineno
    raise UserError(
      f'--config: {file}, line {line}, ended in {one_line(e)}: fix it there, or give another file'
    ) from e


def find_config(value: str) -> str:
  """Path of the config file, with its variant, that `--config=` names.

  Args:
    value: path of a file, or the name of one of the package's: 'digits', 'cifar:small',
      'configs/studies/figure3.py:laptop'. A file of the working folder comes first.
  """
  value = os.path.expanduser(value)
  path, colon, variant = value.partition(':')
  folder = _configs()
  if folder is None or pathlib.Path(path).is_file():
    return value
  own = folder / f'{path.removeprefix("configs/").removesuffix(".py")}.py'
  return f'{own}{colon}{variant}' if own.exists() else value


def _located(argv):
  """argv with paths for the names of configs, in one word (--config=NAME) or two."""
  located = []
  for before, argument in itertools.pairwise(['', *argv]):
    name, equals, value = argument.partition('=')
    if before in CONFIG_FLAG:
      argument = find_config(argument)
    elif name in CONFIG_FLAG and equals:
      argument = f'{name}={find_config(value)}'
    located.append(argument)
  return located


def _configs():
  """The folder of the package's configs, which import each other as `configs`; None without."""
  package = pathlib.Path(__file__).parents[1]
  found = [
    x for x in (package.parent / 'configs', package / 'configs') if (x / 'cifar.py').exists()
  ]
  if not found:
    return None
  if 'configs' not in sys.modules:  # it need not be on the path, where others may be
    places = [str(found[0]), str(pathlib.Path('configs').resolve())]
    spec = importlib.util.spec_from_file_location(
      'configs', found[0] / '__init__.py', submodule_search_locations=places
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules['configs'] = module
    spec.loader.exec_module(module)
  return found[0]


def _check_keys(argv, config, path, default):
  """Raises UserError unless the config is readable and has each key of argv's --config.KEY."""
  file = pathlib.Path(path.partition(':')[0])
  # What a file lacks, ml_collections takes from the default, which it has read before.
  if file.is_file() and 'get_config' not in file.read_text(errors='replace'):
    raise UserError(
      f'--config={path} has no function get_config: add one that returns a ConfigDict'
    )
  if file.is_file() and (config is None or isinstance(config, dict)):
    raise UserError(
      f'--config={path}: its get_config returned a {type(config).__name__}, expected a ConfigDict '
      'of ml_collections: return one'
    )
  if not isinstance(config, ConfigDict):  # ml_collections' stand-in for a file it cannot read
    raise UserError(
      f'--config={path} cannot be read (working folder: {pathlib.Path.cwd()}): give a config file, '
      f'such as {default}'
    )
  known = checks.flatten(config.to_dict())
  for argument in argv:
    key, _, value = argument.removeprefix('--config.').partition('=')
    if not argument.startswith('--config.'):
      continue
    if key not in known:
      near = checks.nearest(key, known)
      raise UserError(f'--config.{key} is unknown: expected a key of {path}{near}')
    if not isinstance(known[key], tuple) or ',' not in value or _is_literal(value):
      continue
    if value.startswith(('(', '[')):
      example = known[key] or ('a', 'b')
      raise UserError(
        f'--config.{key}={value} cannot be read: write numbers or quoted texts, such as {example}'
      )
    raise UserError(
      f'--config.{key}={value} is no list: write --config.{key}="{tuple(value.split(","))}", '
      f'or "{(value,)}" for one'
    )


def _is_literal(text):
  try:
    ast.literal_eval(text)
  except (SyntaxError, ValueError):
    return False
  return True
