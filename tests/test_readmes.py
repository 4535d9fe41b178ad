"""READMEs do not rot: their links resolve, their commands run or at least parse.

Above each ```bash block of a README stands a comment that says how it is tested:

  <!-- test: run [FLAGS] -->    its commands are run with TINY sizes, and FLAGS behind
  <!-- test: slow [FLAGS] -->   the same, among the slow tests
  <!-- test: parse -->          too long to run: flags, config, keys and jobs are only checked

Commands of blocks that run are checked, too. Of ```python blocks all are compiled, and those marked
`run` are executed. What runs does so in a folder that holds runs/digits. Lines of pip are never
executed.
"""

import importlib
import os
import pathlib
import re
import shlex
import subprocess
import sys
import textwrap
from typing import NamedTuple

import pytest
from absl import flags
from absl.testing import flagsaver

from configs import digits
from launch import local
from palm_jax import runner
from palm_jax.base.checkpoints import Checkpoints
from palm_jax.encoder import make_encoder
from tests import chaos, compiler
from tests.test_encoder import random_variables

ROOT = pathlib.Path(__file__).parents[1]
READMES = sorted(
  path.relative_to(ROOT).as_posix()
  for path in ROOT.rglob('README.md')
  if not any(part.startswith('.') for part in path.relative_to(ROOT).parts)
)
MARK = re.compile(r'<!-- test: (run|slow|parse)(?: (.*))? -->')
# For palm_jax.main, whatever the config: seconds instead of minutes.
TINY = shlex.split("""
  --config.generator.z_dim=8 --config.generator.w_dim=8 --config.generator.mapping_layers=2
  --config.generator.channel_base=64 --config.generator.channel_max=8
  --config.generator.d_channel_base=64 --config.generator.d_channel_max=8
  --config.generator.batch_size=32 --config.generator.mbstd_group=4
  --config.generator.kimg=0.512 --config.generator.iterations_per_call=16
  --config.replay.capacity=2048 --config.encoder.width=4 --config.sac.hidden=(32,32)
  --config.sac.trunk=16 --config.simsiam.proj_hidden=32 --config.simsiam.proj_dim=32
  --config.simsiam.pred_hidden=16 --config.pretrain.env_steps=1024
  --config.pretrain.num_envs=32 --config.pretrain.rollout_length=4
  --config.pretrain.batch_size=64 --config.pretrain.warmup_steps=256
  --config.pretrain.iterations_per_call=4 --config.quality.num_images=256
  --config.quality.proxy_epochs=2
""")


class Block(NamedTuple):
  """A fenced block of code."""

  readme: str
  line: int  # of its first fence, from 1
  language: str
  code: str
  how: str  # 'run', 'slow', 'parse', or '' without a mark
  flags: list[str]

  def __str__(self):
    return f'{self.readme}:{self.line}'


def blocks_of(readme):
  """[Block] of a README."""
  blocks, before = [], ''
  lines = iter(enumerate((ROOT / readme).read_text().splitlines(), 1))
  for number, line in lines:
    fence = re.fullmatch(r'\s*```(\w*)', line)
    if not fence:
      before = line
      continue
    code = []
    for _, inner in lines:
      if inner.strip() == '```':
        break
      code.append(inner)
    mark = MARK.fullmatch(before.strip())
    how, extra = mark.groups('') if mark else ('', '')
    text = textwrap.dedent('\n'.join(code))
    blocks.append(Block(readme, number, fence[1], text, how, shlex.split(extra)))
    before = ''
  return blocks


BLOCKS = [block for readme in READMES for block in blocks_of(readme)]
BASH = [block for block in BLOCKS if block.language == 'bash']
PYTHON = [block for block in BLOCKS if block.language == 'python']


def commands_of(block):
  """Commands of a bash block, each a list of words; variables before the name are left out."""
  commands = []
  for line in block.code.replace('\\\n', ' ').splitlines():
    words = shlex.split(line, comments=True)
    while words:
      end = words.index('&&') if '&&' in words else len(words)
      command, words = words[:end], words[end + 1 :]
      while re.match(r'[A-Z_]+=', command[0]):
        del command[0]
      commands.append(command)
  return commands


def is_pip(command):
  return command[0] == 'pip' or command[:3] == ['python', '-m', 'pip']


def prose_of(readme):
  """The text without its blocks of code."""
  return re.sub(r'^\s*```.*?^\s*```', '', (ROOT / readme).read_text(), flags=re.M | re.S)


def anchors_of(path):
  """Anchors that GitHub gives the headings of a file."""
  titles = re.findall(r'^#+ (.*)$', prose_of(path.relative_to(ROOT)), re.M)
  return {re.sub(r'[^\w\- ]', '', title.strip().lower()).replace(' ', '-') for title in titles}


@pytest.mark.parametrize('readme', READMES)
def test_links_resolve(readme):
  links = re.findall(r'\]\(([^)\s]+)\)', prose_of(readme))
  for link in links:
    if re.match(r'https?://', link):
      continue
    place, _, anchor = link.partition('#')
    path = (ROOT / readme).parent / place if place else ROOT / readme
    path = path.resolve()
    assert path.exists(), f'{readme}: {link} is missing'
    assert not anchor or anchor in anchors_of(path), f'{readme}: {link} has no such heading'


@pytest.mark.parametrize('readme', READMES)
def test_named_files_exist(readme):
  """Files named in tables and trees, relative to the README, its package or the root."""
  folders = (ROOT / readme).parent, ROOT / 'palm_jax', ROOT
  for line in prose_of(readme).splitlines():
    for name in re.findall(r'`([\w/]+\.(?:py|sh|yaml))`', line):
      exists = any((folder / name).exists() for folder in folders)
      assert exists, f'{readme}: {name} is missing'


def test_front_page_is_short():
  text = (ROOT / 'README.md').read_text()
  lines = text.splitlines()
  assert len(lines) <= 130
  assert len(text.split()) <= 1200
  for number, line in enumerate(lines, 1):
    is_table_or_link = line.startswith('|') or '](' in line
    assert len(line) <= 160 or is_table_or_link, f'README.md:{number} has {len(line)} characters'


@pytest.mark.parametrize('words', ['-m palm_jax.main --config=configs/digits.py', '-m pytest'])
def test_front_page_has_the_two_commands(words):
  assert any(words == ' '.join(command[1:]) for b in BASH for command in commands_of(b))


@pytest.mark.parametrize('block', BASH, ids=str)
def test_commands_parse(block, monkeypatch):
  assert block.how, f'{block}: say above it how it is tested, <!-- test: run|slow|parse -->'
  monkeypatch.chdir(ROOT)
  for command in commands_of(block):
    check_command(command, monkeypatch)


def check_command(command, monkeypatch):
  """Parses a command as the program itself would, or finds its file."""
  name, *arguments = command
  if is_pip(command) or name in ('ruff', 'pyright'):
    return
  if name == 'python' and arguments[0] == '-m':
    module, arguments = arguments[1], arguments[2:]
    if module == 'pytest':
      assert arguments in ([], ['-m', 'slow'])
    elif module == 'tests.chaos':
      chaos.parse(arguments)
    else:
      check_flags(module, arguments, monkeypatch)
  elif name == 'python':
    assert arguments[0] == 'launch/local.py'
    check_flags('palm_jax.main', local.parse(arguments[1:]).arguments, monkeypatch)
  elif name == 'sky':
    assert (ROOT / arguments[2]).exists()
    given = next(a for a in arguments if a.startswith('ARGUMENTS='))
    check_flags('palm_jax.main', given.removeprefix('ARGUMENTS=').split(), monkeypatch)
  else:
    assert os.access(ROOT / name, os.X_OK), name
    of_main = arguments[arguments.index('--') + 1 :] if '--' in arguments else arguments
    if any(argument.startswith('--config') for argument in of_main):
      check_flags('palm_jax.main', of_main, monkeypatch)


def check_flags(module, arguments, monkeypatch):
  """Reads the flags as `python -m module` does; of palm_jax.main also finds and checks the jobs."""
  argv = [module, *arguments]
  monkeypatch.setattr(sys, 'argv', argv)  # where ml_collections looks for --config.KEY=VALUE
  with flagsaver.flagsaver():
    importlib.import_module(module).parse_flags(argv)
    if module != 'palm_jax.main':
      return
    config, job = flags.FLAGS.config, flags.FLAGS.job
    names = config.jobs if job == 'all' else (job,)
    for name in names:
      if job == 'all' and name == 'generator' and config.generator.path:
        continue  # as the runner: a given generator is not trained
      runner.find(name).check(config, 1)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A working folder with the repository's packages, and an encoder in runs/digits, untrained."""
  path = tmp_path_factory.mktemp('readmes')
  link_packages(path)
  config = digits.get_config()
  config.encoder.width = 4
  variables = random_variables(make_encoder(config.encoder), (2, 8, 8, 1))
  with Checkpoints(path / 'runs/digits/pretrain/checkpoints') as checkpoints:
    checkpoints.save(1, {'encoder': variables}, {})
  (path / 'runs/digits/config.json').write_text(config.to_json_best_effort())
  return path


def link_packages(path):
  for name in ('palm_jax', 'configs', 'launch'):
    (path / name).symlink_to(ROOT / name)


def execute(block, path):
  """Runs the commands of a block at their smallest -> what they print."""
  # One device, unlike the tests' eight: as a user has it.
  environment = dict(os.environ, XLA_FLAGS=compiler.FLAGS)
  printed = ''
  for command in commands_of(block):
    if is_pip(command):
      continue
    tiny = TINY if command[2] == 'palm_jax.main' else []
    done = subprocess.run(
      [sys.executable, *command[1:], *tiny, *block.flags],
      cwd=path,
      env=environment,
      capture_output=True,
      text=True,
    )
    assert done.returncode == 0, f'{block}: {shlex.join(command)}\n{done.stderr[-3000:]}'
    printed += done.stdout
  return printed


@pytest.mark.parametrize('block', [block for block in BASH if block.how == 'run'], ids=str)
def test_commands_run(block, folder):
  execute(block, folder)


@pytest.mark.slow
def test_long_commands_run(tmp_path):
  """In order, in one folder: the first makes runs/digits, and its table has the rows shown."""
  link_packages(tmp_path)
  first, *others = [block for block in BASH if block.how == 'slow']
  printed = [line.split()[:2] for line in execute(first, tmp_path).splitlines()]
  shown = next(block.code for block in BLOCKS if block.code.startswith('features '))
  rows = [line.split()[:2] for line in shown.splitlines()[:-1]]
  assert [words for words in printed if words in rows] == rows
  for block in others:
    execute(block, tmp_path)


@pytest.mark.parametrize('block', PYTHON, ids=str)
def test_python_compiles(block):
  compile(block.code, str(block), 'exec')


@pytest.mark.parametrize('block', [block for block in PYTHON if block.how == 'run'], ids=str)
def test_python_runs(block, folder, monkeypatch):
  monkeypatch.chdir(folder)
  exec(compile(block.code, str(block), 'exec'), {'__name__': 'readme'})
