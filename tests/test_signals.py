"""A signal ends a command in one line, whatever the main thread is doing."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from palm_jax.base import files, signals

pytestmark = pytest.mark.usefixtures('terminal')


# What the main thread does when the signal comes.
SLEEPING = 'time.sleep(60)'
# One call that Python cannot interrupt, as a compilation is.
COMPILING = "hashlib.pbkdf2_hmac('sha256', b'x' * 1000, b'y', 10**9)"
# Most signals come while a callback runs, where exceptions are lost.
LOST = """
class Lost:
  def __del__(self):
    time.sleep(0.2)
while True:
  Lost()
"""
# A library's callback turns it into an error of its own, without a cause.
MASKED = """
try:
  time.sleep(60)
except KeyboardInterrupt:
  pass
raise ValueError('while checking equality of metadata fields')
"""
SAVING = """
from palm_jax.base.training import Preemption
with Preemption() as preemption:
  print('held', flush=True)
  while not preemption.requested:
    time.sleep(0.1)
  time.sleep(1)
  print('saved', flush=True)
  {more}
  preemption.stop()
"""


def start(body, tmp_path):
  script = tmp_path / 'script.py'
  script.write_text(f"""
import hashlib, pathlib, sys, time
from palm_jax.base import command, files, signals
signals.GRACE = 0.5
def main(argv):
  signals.unfinished.add(pathlib.Path(sys.argv[1]))
  open(sys.argv[1], 'w').close()
  print('ready', flush=True)
{chr(10).join('  ' + line for line in body.splitlines())}
command.run(main, command.parse_flags)
""")
  process = subprocess.Popen(
    [sys.executable, str(script), str(tmp_path / 'half.part')],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env=dict(os.environ, PYTHONPATH=os.getcwd(), PYTHONUNBUFFERED='1'),
  )
  assert process.stdout.readline() == 'ready\n', process.stderr.read()
  return process


@pytest.mark.parametrize('number', signals.SIGNALS)
@pytest.mark.parametrize('body', [SLEEPING, COMPILING, LOST, MASKED])
def test_it_ends_in_one_line(body, number, tmp_path):
  if number != signal.SIGINT and body != SLEEPING:
    pytest.skip('one signal is enough')
  process = start(body, tmp_path)
  time.sleep(0.1)
  began = time.monotonic()
  process.send_signal(number)
  _, errors = process.communicate(timeout=60)
  assert time.monotonic() - began < 30  # COMPILING would take minutes
  assert errors == f'palm_jax: {signals.MESSAGE}\n' and process.returncode == 128 + number
  assert body == SLEEPING or not (tmp_path / 'half.part').exists()


@pytest.mark.parametrize(
  'number, code, line',
  [
    (signal.SIGINT, 130, f'palm_jax: {signals.MESSAGE}\n'),
    (signal.SIGHUP, 129, f'palm_jax: {signals.MESSAGE}\n'),
  ],
)
def test_who_saves_is_waited_for(tmp_path, number, code, line):
  process = start(SAVING.format(more=''), tmp_path)
  assert process.stdout.readline() == 'held\n'
  process.send_signal(number)
  out, errors = process.communicate(timeout=60)
  assert out == 'saved\n' and errors == line and process.returncode == code


@pytest.mark.parametrize('body', [SLEEPING, COMPILING])
def test_who_reads_the_output_may_have_ended(body, tmp_path):
  """As `tee` by the same Ctrl-C."""
  process = start(body, tmp_path)
  process.stdout.close()
  process.stderr.close()
  time.sleep(0.1)
  process.send_signal(signal.SIGINT)
  assert process.wait(30) == 130


def test_a_second_ctrl_c_ends_at_once(tmp_path):
  process = start(SAVING.format(more=COMPILING), tmp_path)
  assert process.stdout.readline() == 'held\n'
  process.send_signal(signal.SIGINT)
  assert process.stdout.readline() == 'saved\n'
  process.send_signal(signal.SIGINT)
  began = time.monotonic()
  _, errors = process.communicate(timeout=60)
  assert time.monotonic() - began < 30
  assert errors == f'palm_jax: {signals.MESSAGE}\n' and process.returncode == 130


@pytest.mark.parametrize('kind', [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_interruption_in_a_chain_of_causes_is_raised(kind):
  def fail():
    try:
      try:
        raise kind
      except BaseException as e:
        raise ValueError('as orbax wraps it') from e
    except ValueError as e:
      raise RuntimeError('and again') from e

  with pytest.raises(RuntimeError) as caught:
    fail()
  with pytest.raises(kind):
    signals.raise_if_interrupted(caught.value)
  with pytest.raises(kind), files.reading(str):
    fail()
  signals.raise_if_interrupted(ValueError('of its own'))


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize('module', ['main', 'export', 'generator.convert', 'play'])
def test_a_signal_while_a_command_imports_is_one_line(module, number, tmp_path):
  (tmp_path / 'sitecustomize.py').write_text(f"""
import os, sys
class Interrupting:
  def find_spec(self, name, *_):
    if name == 'absl':
      os.kill(os.getpid(), {int(number)})
sys.meta_path.insert(0, Interrupting())
""")
  root = pathlib.Path(signals.__file__).parents[2]
  done = subprocess.run(
    [sys.executable, '-m', f'palm_jax.{module}'],
    capture_output=True,
    text=True,
    timeout=60,
    env={**os.environ, 'PYTHONPATH': f'{tmp_path}:{root}'},
  )
  assert done.stderr == f'palm_jax: {signals.MESSAGE}\n' and done.returncode == 128 + number


@pytest.mark.parametrize('words', [('palm.py',), ('-m', 'lab.train', 'palm_jax.main')])
def test_a_program_of_the_users_keeps_its_ctrl_c(words, tmp_path):
  """Also one of the command's name, and one whose package imports this one."""
  (tmp_path / 'lab').mkdir()
  (tmp_path / 'lab' / '__init__.py').write_text('import palm_jax')
  for path in (tmp_path / 'palm.py', tmp_path / 'lab' / 'train.py'):
    path.write_text("""
import os, signal
import palm_jax
try:
  os.kill(os.getpid(), signal.SIGINT)
  [None for _ in range(10**6)]
except KeyboardInterrupt:
  print('saved')
""")
  done = subprocess.run(
    [sys.executable, *words],
    cwd=tmp_path,
    capture_output=True,
    text=True,
    timeout=60,
    env=dict(os.environ, PYTHONPATH=str(pathlib.Path(signals.__file__).parents[2])),
  )
  assert done.stdout == 'saved\n' and done.returncode == 0, done.stderr


def test_nothing_is_raised_while_modules_are_imported(tmp_path):
  """A compiled module whose start an exception leaves would abort the process."""
  program = """
import os, signal
from palm_jax.base import signals
signals.watch(importing=True)
try:
  os.kill(os.getpid(), signal.SIGTERM)
  [None for _ in range(10**6)]
except BaseException as e:
  os.abort()
"""
  done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True)
  assert done.returncode == 143 and done.stderr == f'palm_jax: {signals.MESSAGE}\n'
