"""What is installed: the wheel holds all there is, and runs from any folder."""

import os
import pathlib
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest
from absl import flags

import palm_jax
from palm_jax.base import command
from palm_jax.base.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
  """Built in a copy, since setuptools leaves a folder behind."""
  pytest.importorskip('setuptools')
  copy, out = tmp_path_factory.mktemp('copy'), tmp_path_factory.mktemp('wheel')
  for name in ('palm_jax', 'configs'):
    shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns('__pycache__'))
  for name in ('pyproject.toml', 'requirements.txt', 'README.md', 'LICENSE'):
    shutil.copy(ROOT / name, copy)
  subprocess.run(
    [sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation']
    + ['-w', str(out), str(copy)],
    check=True,
    timeout=300,
  )
  (path,) = out.glob('*.whl')
  return path


@pytest.fixture(scope='module')
def unpacked(wheel, tmp_path_factory):
  folder = tmp_path_factory.mktemp('unpacked')
  with zipfile.ZipFile(wheel) as archive:
    archive.extractall(folder)
  return folder


def run(folder, path, *arguments, code='from palm_jax.__main__ import main; main()'):
  environment = os.environ | dict(PYTHONPATH=str(path), JAX_PLATFORMS='cpu')
  return subprocess.run(
    [sys.executable, '-c', code, *arguments],
    cwd=folder,
    env=environment,
    capture_output=True,
    text=True,
    timeout=300,
  )


def test_the_wheel_holds_every_module_and_config(unpacked):
  """A room that pyproject.toml does not list would be missing."""
  of = lambda root, *kinds: {
    str(path.relative_to(root)) for kind in kinds for path in root.rglob(kind)
  }
  kinds = '*.py', '*.safetensors', '*.css', '*.html', '*.js', 'py.typed', '*.json'
  here = of(ROOT / 'palm_jax', *kinds) | {f'configs/{x}' for x in of(ROOT / 'configs', '*.py')}
  assert of(unpacked / 'palm_jax', *kinds) == here
  assert not (unpacked / 'tests').exists() and not (unpacked / 'configs').exists()


def test_it_runs_from_an_empty_folder(unpacked, tmp_path):
  """By short names of configs that import each other, by a path, and beside another `configs`."""
  (tmp_path / 'configs').mkdir()
  (tmp_path / 'configs' / 'cifar.py').write_text('raise SystemExit("the wrong one")')
  done = run(tmp_path, unpacked, '--config=studies/figure3:smoke', '--job=nothing')
  assert done.returncode == 2 and "job 'nothing' is unknown" in done.stderr, done.stderr
  path = unpacked / 'palm_jax' / 'configs' / 'digits.py'
  done = run(tmp_path, unpacked, f'--config={path}', '--config.sed=1')
  assert done.returncode == 2 and 'did you mean seed?' in done.stderr, done.stderr
  assert [x.name for x in tmp_path.iterdir()] == ['configs']


def test_commands_are_named(unpacked, tmp_path):
  done = run(tmp_path, unpacked, '--help')
  assert 'pretrain, probe, ood' in ' '.join(done.stdout.split()), done.stdout
  done = run(tmp_path, unpacked, 'sample', '--help')
  assert '--truncation' in done.stdout
  done = run(tmp_path, unpacked, 'play_chess')
  assert done.returncode == 2 and "'play_chess' is no command: palm main, export" in done.stderr


def test_from_python(unpacked, tmp_path):
  done = run(
    tmp_path,
    unpacked,
    code="""
import palm_jax
from palm_jax.configs import digits
assert digits.get_config().name == 'digits'
assert palm_jax.checkpoint.load_encoder and palm_jax.evaluate.knn
assert palm_jax.load_encoder is palm_jax.zoo.load_encoder
assert not hasattr(palm_jax, 'nothing')
print(palm_jax.__version__)
""",
  )
  assert done.stdout.strip() == palm_jax.__version__, done.stderr


def test_the_core_runs_without_what_other_systems_lack(unpacked, tmp_path):
  """Windows has no fcntl, resource and SIGHUP; tensorflow-datasets and its reader are optional."""
  done = run(
    tmp_path,
    unpacked,
    '--config=digits',
    '--job=nothing',
    code="""
import signal, sys
for name in ('fcntl', 'resource', 'tensorflow_datasets', 'array_record'):
  sys.modules[name] = None
del signal.SIGHUP
from palm_jax.__main__ import main
main()
""",
  )
  assert done.returncode == 2 and "job 'nothing' is unknown" in done.stderr, done.stderr


def test_a_file_of_the_working_folder_comes_first(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert command.find_config('cifar:small') == f'{ROOT / "configs" / "cifar.py"}:small'
  assert command.find_config('configs/digits.py') == str(ROOT / 'configs' / 'digits.py')
  assert command.find_config('configs/mine.py:a') == 'configs/mine.py:a'
  (tmp_path / 'configs').mkdir()
  (tmp_path / 'configs' / 'digits.py').touch()
  assert command.find_config('configs/digits.py:x') == 'configs/digits.py:x'
  monkeypatch.setenv('HOME', str(tmp_path))
  assert command.find_config('~/mine.py:a') == f'{tmp_path}/mine.py:a'


@pytest.mark.parametrize('words', [('--config=digits',), ('--config', 'digits')])
def test_a_config_is_named_in_one_word_or_two(tmp_path, monkeypatch, words):
  """Also beside a folder of its name."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'digits').mkdir()
  monkeypatch.setattr(flags, 'FLAGS', flags.FlagValues())
  with pytest.raises(UserError, match=f'{ROOT}/configs/digits.py .did you mean seed'):
    command.parse_config_flags(['palm', *words, '--config.sed=1'], 'cifar')


def test_versions_agree():
  project = tomllib.loads((ROOT / 'pyproject.toml').read_text())
  assert project['tool']['setuptools']['dynamic']['version'] == {'attr': 'palm_jax.__version__'}
  assert f'## {palm_jax.__version__}' in (ROOT / 'CHANGELOG.md').read_text()
  assert f'version: {palm_jax.__version__}' in (ROOT / 'CITATION.cff').read_text()


@pytest.mark.slow
def test_a_fresh_environment_runs_the_main_job(wheel, tmp_path):
  """Minutes: everything is installed anew."""
  subprocess.run([sys.executable, '-m', 'venv', str(tmp_path / 'venv')], check=True)
  scripts = tmp_path / 'venv' / ('Scripts' if os.name == 'nt' else 'bin')
  subprocess.run([scripts / 'pip', 'install', '-q', str(wheel)], check=True, timeout=900)
  (tmp_path / 'empty').mkdir()
  ours = 'XLA_FLAGS', 'NPROC', 'JAX_COMPILATION_CACHE_DIR', 'PYTHONPATH'  # of the tests
  done = subprocess.run(
    [scripts / 'palm', '--config=digits'],
    cwd=tmp_path / 'empty',
    env={name: value for name, value in os.environ.items() if name not in ours},
    capture_output=True,
    text=True,
    timeout=1800,
  )
  assert done.returncode == 0 and 'PALM encoder' in done.stdout, done.stderr
  assert (tmp_path / 'empty' / 'runs' / 'digits' / 'results' / 'probe.json').exists()


@pytest.mark.slow
@pytest.mark.parametrize('system', ['macos', 'windows'])
@pytest.mark.parametrize('version', ['3.11', '3.14'])
def test_other_systems_can_install_the_core(system, version):
  """By a resolver that judges markers for the system asked for; pip does for its own."""
  uv = shutil.which('uv')
  if not uv:
    pytest.skip('no uv: pip install uv')
  done = subprocess.run(
    [uv, 'pip', 'compile', '-q', '--only-binary', ':all:', '--python-platform', system]
    + ['--python-version', version, str(ROOT / 'requirements.txt')],
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0 and 'jaxlib==' in done.stdout, done.stderr
