"""A workdir is one config's and one command's, and what killed commands left is removed."""

import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
import time
import zlib

import pytest

from palm_jax import runner
from palm_jax import workdir as workdirs
from palm_jax.base import files, programs, signals
from palm_jax.base.errors import UserError
from palm_jax.base.files import replacing, scratch
from tests.worlds import tiny_config


def config_of(**settings):
  c = tiny_config()
  c.name = 'x'
  c.update_from_flattened_dict(settings)
  return c


def claim(workdir, **settings):
  runner.claim(workdir, config_of(**settings))


def saved(workdir):
  return json.loads((workdir / 'config.json').read_text())


def test_until_a_job_begins_the_config_may_change(tmp_path):
  claim(tmp_path, seed=0)
  claim(tmp_path, seed=1)
  assert saved(tmp_path)['seed'] == 1
  (tmp_path / 'pretrain').mkdir()
  with pytest.raises(UserError, match='another config .seed: 1 there, 2 now'):
    claim(tmp_path, seed=2)


def test_sections_that_others_settled_stay_theirs(tmp_path):
  """As in a run that two studies share, of which one has judged."""
  there = {'diversity.features': ('pixels', 'proxy'), 'diversity.num_images': 100}
  assert workdirs.as_there(tmp_path, config_of(), {'diversity'}).diversity.num_images == 10_000
  claim(tmp_path, **there)
  (tmp_path / 'results').mkdir()
  (tmp_path / 'results' / 'diversity.json').write_text('{}')
  with pytest.raises(UserError, match='diversity.features'):
    claim(tmp_path)
  config = config_of(seed=0)
  settled = workdirs.as_there(tmp_path, config, {'diversity'})
  runner.claim(tmp_path, settled)
  assert settled.diversity.features == there['diversity.features']
  assert config.diversity.features != settled.diversity.features
  with pytest.raises(UserError, match='sac.gamma'):
    runner.claim(tmp_path, workdirs.as_there(tmp_path, config_of(**{'sac.gamma': 0.5}), {'ood'}))


def test_what_is_shown_and_saved_in_between_may_change(tmp_path):
  claim(tmp_path)
  (tmp_path / 'pretrain').mkdir()
  claim(tmp_path, **{'pretrain.monitor_fraction': 0.5, 'pretrain.checkpoint_minutes': 3.0})
  assert saved(tmp_path)['pretrain']['monitor_fraction'] == 0.5
  claim(tmp_path, **{'generator.checkpoint_minutes': 2.0, 'generator.snapshot_kimg': 1.0})
  with pytest.raises(UserError, match='pretrain.batch_size'):
    claim(tmp_path, **{'pretrain.batch_size': 64})


def test_features_of_others_may_change_until_they_were_judged(tmp_path):
  """Other settings of that section always may."""
  claim(tmp_path)
  (tmp_path / 'results').mkdir()
  (tmp_path / 'results' / 'quality.json').write_text('{}')
  claim(tmp_path, **{'features.path': 'a.npz', 'features.batch_size': 7})
  (tmp_path / 'results' / 'ood.json').write_text('{}')
  claim(tmp_path, **{'features.path': 'a.npz', 'features.batch_size': 8})
  with pytest.raises(UserError, match='features.path: a.npz there, b.npz now.*delete results/ood'):
    claim(tmp_path, **{'features.path': 'b.npz', 'features.batch_size': 8})


def test_what_another_job_read_of_a_section_is_bound_by_its_result(tmp_path):
  """Diversity reads the section quality, too."""
  claim(tmp_path)
  (tmp_path / 'results').mkdir()
  (tmp_path / 'results' / 'diversity.json').write_text('{}')
  with pytest.raises(UserError, match='quality.proxy_width: .*delete results/diversity.json$'):
    claim(tmp_path, **{'quality.proxy_width': 2})
  (tmp_path / 'results' / 'quality.json').write_text('{}')
  both = 'delete results/diversity.json and results/quality.json$'
  with pytest.raises(UserError, match=both):
    claim(tmp_path, **{'quality.proxy_width': 2})


def test_a_refused_command_takes_back_what_it_wrote(tmp_path):
  workdir = tmp_path / 'run'
  claim(workdir)
  (workdir / 'benchmark').mkdir()
  (workdir / 'compilation_cache').mkdir()
  workdirs.release(workdir, ['benchmark', 'pretrain'])
  assert not workdir.exists()
  claim(workdir)
  (workdir / 'notes').write_text('mine')
  workdirs.release(workdir, ['pretrain'])
  assert [path.name for path in workdir.iterdir()] == ['notes']


def test_what_a_job_wrote_is_not_taken_back(tmp_path):
  claim(tmp_path)
  (tmp_path / 'pretrain').mkdir()
  (tmp_path / 'pretrain' / 'metrics.jsonl').write_text('')
  workdirs.release(tmp_path, ['pretrain'])
  assert (tmp_path / 'config.json').exists() and (tmp_path / 'pretrain').exists()


def test_what_another_command_works_on_is_not_taken_back(tmp_path):
  claim(tmp_path)
  with (tmp_path / '.pretrain.lock').open('w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    workdirs.release(tmp_path, ['pretrain'])
  assert (tmp_path / 'config.json').exists()


def test_a_command_that_begins_meanwhile_keeps_its_lock(tmp_path, monkeypatch):
  monkeypatch.setattr(workdirs, 'held', lambda path: False)  # as nobody worked when it was asked
  with (tmp_path / '.pretrain.lock').open('w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    claim(tmp_path)
    assert (tmp_path / '.pretrain.lock').exists()
  claim(tmp_path)
  assert not (tmp_path / '.pretrain.lock').exists()


def test_names_that_are_no_folder():
  c = config_of()
  for name in ('', '..', '/'):
    c.name = name
    with pytest.raises(UserError, match='is no name of a folder: set --config.name'):
      workdirs.locate(c, None)


def test_a_file_in_place_of_the_folder(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match='file is a file, expected a folder: choose another'):
    claim(tmp_path / 'file')


def test_a_job_at_work_holds_the_config(tmp_path):
  claim(tmp_path, seed=0)
  with (tmp_path / '.generator.lock').open('w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(UserError, match='another config .seed: 0 there, 1 now'):
      claim(tmp_path, seed=1)
  claim(tmp_path, seed=1)
  with pytest.raises(UserError, match='another config .seed: 1 there, 0 now'):
    workdirs.compare(tmp_path, config_of(seed=0), [])


def test_an_evaluation_at_work_holds_its_section(tmp_path):
  claim(tmp_path)
  claim(tmp_path, **{'probe.knn_k': 5})
  with (tmp_path / '.probe.lock').open('w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(UserError, match='probe.knn_k: 5 there, 7 now.*wait for the end of probe'):
      claim(tmp_path, **{'probe.knn_k': 7})
    claim(tmp_path, **{'probe.knn_k': 5})
  claim(tmp_path, **{'probe.knn_k': 7})


def test_data_may_be_named_when_nothing_has_read_any(tmp_path):
  """As where a pretraining plays in a given generator, and is judged later."""
  given = {'generator.path': 'x.pkl'}
  claim(tmp_path, **given)
  (tmp_path / 'pretrain').mkdir()
  claim(tmp_path, **given, **{'data.name': 'mine'})
  assert saved(tmp_path)['data']['name'] == 'mine'
  (tmp_path / 'results').mkdir()
  (tmp_path / 'results' / 'probe.json').write_text('{}')
  with pytest.raises(UserError, match='data.name: mine there, other now'):
    claim(tmp_path, **given, **{'data.name': 'other'})
  (tmp_path / 'results' / 'probe.json').unlink()
  (tmp_path / 'generator').mkdir()
  with pytest.raises(UserError, match='data.name: mine there, other now'):
    claim(tmp_path, **given, **{'data.name': 'other'})


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, caplog):
  def no_locks(*_):
    raise OSError(errno.ENOLCK, 'No locks available')

  monkeypatch.setattr(files.fcntl, 'flock', no_locks)
  with files.locked(tmp_path / 'lock') as mine:
    assert mine
  assert 'this file system has no locks (No locks available)' in caplog.text


def test_the_folder_of_a_study_with_runs_is_not_taken_back(tmp_path):
  claim(tmp_path)
  claim(tmp_path / 'arm' / 'seed0')
  workdirs.release(tmp_path, ['pretrain'])
  assert (tmp_path / 'config.json').exists()


def test_another_machines_file_may_be_finished_at_any_moment(tmp_path):
  assert not files.abandoned(tmp_path / '.x.npz.elsewhere.7.part')


def test_a_lost_config_is_not_replaced_by_any(tmp_path):
  claim(tmp_path)
  (tmp_path / 'results').mkdir()
  (tmp_path / 'config.json').unlink()
  with pytest.raises(UserError, match='config.json is missing, but jobs have .*: restore'):
    claim(tmp_path)


@pytest.mark.parametrize('content', ['', '[1]', '{"a": ', '[' * 100_000, 'null'])
def test_a_damaged_config_is_said(tmp_path, content):
  claim(tmp_path)
  (tmp_path / 'pretrain').mkdir()
  (tmp_path / 'config.json').write_text(content)
  with pytest.raises(UserError, match='config.json is damaged .*: restore it or choose another'):
    claim(tmp_path)


def test_what_killed_commands_left_is_removed(tmp_path):
  claim(tmp_path)
  dead = subprocess.Popen([sys.executable, '-c', ''])
  dead.wait()
  with replacing(tmp_path / 'results' / 'a.json', 'w') as file:
    mine = next((tmp_path / 'results').glob('.*.part'))  # another command's, at work
    host = mine.name.split('.')[-3]
    left = [
      tmp_path / 'results' / f'.b.json.{host}.{dead.pid}.part',
      tmp_path / '.pretrain.lock',
      tmp_path / 'pretrain' / 'checkpoints' / '3.damaged' / 'x',
      tmp_path / 'features' / '.c.npz.elsewhere.1.part',
    ]
    kept = [
      tmp_path / 'pretrain' / 'checkpoints' / '4' / 'x',
      tmp_path / 'features' / '.d.npz.elsewhere.1.part',  # of another machine, and young
      mine,
    ]
    for path in (*left, *kept[:-1]):
      path.parent.mkdir(parents=True, exist_ok=True)
      path.touch()
    day_before = time.time() - 2 * 86_400
    os.utime(left[-1], (day_before, day_before))
    claim(tmp_path)
    assert not any(path.exists() for path in left) and all(path.exists() for path in kept)
    file.write('{}')


def test_scratch_is_removed_and_so_is_that_of_killed_commands(tmp_path):
  dead = subprocess.Popen([sys.executable, '-c', ''])
  dead.wait()
  with scratch(tmp_path / 'sets') as part:
    host = part.name.split('.')[-3]
    left = tmp_path / 'sets' / f'.scratch.{host}.{dead.pid}.part'
    (left / 'data').mkdir(parents=True)
    (part / 'data').mkdir()
    assert part in signals.unfinished
    with pytest.raises(ValueError), scratch(tmp_path / 'others'):
      raise ValueError
    with scratch(tmp_path / 'sets2'):
      assert part.exists()
  assert not any((tmp_path / 'others').iterdir()) and not signals.unfinished
  assert [*(tmp_path / 'sets').iterdir()] == [left]
  with scratch(tmp_path / 'sets'):
    assert not left.exists()


def test_what_is_left_is_known_by_a_machine_whose_name_has_dots(tmp_path, monkeypatch):
  monkeypatch.setattr(files.socket, 'gethostname', lambda: 'node1.example.com')
  dead = subprocess.Popen([sys.executable, '-c', ''])
  dead.wait()
  with replacing(tmp_path / 'a.json'):
    (mine,) = tmp_path.glob('.*.part')
    left = tmp_path / mine.name.replace(f'.{os.getpid()}.', f'.{dead.pid}.')
    left.touch()
    assert files.abandoned(left) and not files.abandoned(mine)


def test_a_link_to_nothing(tmp_path):
  (tmp_path / 'run').symlink_to(tmp_path / 'nothing')
  with pytest.raises(UserError, match='run is a link to nothing, expected a folder'):
    claim(tmp_path / 'run')


def test_a_config_that_was_removed_is_written_again(tmp_path):
  claim(tmp_path)
  content = (tmp_path / 'config.json').read_text()
  (tmp_path / 'config.json').unlink()
  workdirs.restore(tmp_path, config_of())
  assert (tmp_path / 'config.json').read_text() == content


def test_compiled_programs_that_are_not_whole_are_removed(tmp_path):
  folder = tmp_path / programs.FOLDER
  folder.mkdir()
  whole = zlib.compress(b'program' * 1000)
  for name, content in (('a', whole), ('b', whole[:-5]), ('c', b''), ('d', whole)):
    (folder / f'jit_{name}-cache').write_bytes(content)
  claim(tmp_path)
  names = lambda: sorted(path.name[4] for path in folder.glob('jit_*'))
  assert names() == ['a', 'd']
  (folder / 'jit_d-cache').write_bytes(zlib.compress(b'another'))  # JAX never writes one again
  claim(tmp_path)
  assert names() == ['a']


def test_a_lock_that_is_a_folder(tmp_path):
  (tmp_path / '.claim.lock').mkdir()
  with pytest.raises(UserError, match=r'\.claim\.lock cannot be written'):
    claim(tmp_path)


def test_an_empty_workdir_is_an_unset_variable():
  with pytest.raises(UserError, match='--workdir= is empty'):
    workdirs.locate(config_of(), '')


def test_a_command_that_begins_during_a_claim_waits_for_it(tmp_path, monkeypatch):
  """Else it would run with what config.json said before."""
  claim(tmp_path, seed=0)
  said, write = [], workdirs.write_json

  def begin():
    try:
      with workdirs.only_one(tmp_path, 'pretrain'):
        workdirs.compare(tmp_path, config_of(seed=0), list(map(runner.find, runner.names())))
        said.append('it runs')
    except UserError as e:
      said.append(str(e))

  first = threading.Thread(target=begin)

  def write_slowly(*arguments):
    first.start()
    time.sleep(0.3)
    write(*arguments)

  monkeypatch.setattr(workdirs, 'write_json', write_slowly)
  claim(tmp_path, seed=1)  # nobody works there yet
  first.join()
  assert 'seed: 1 there, 0 now' in said[0]


def test_of_three_commands_started_together_one_runs(tmp_path):
  """The others are told which config has the workdir."""
  script = """
import sys, time
from palm_jax import runner
from palm_jax.base import command
from tests.test_workdir import config_of
import types
from palm_jax.job import Job
def run(this):
  time.sleep(0.5)
  return dict(seed=this.config.seed)
module = types.ModuleType('toy')
module.JOB = Job('toy', run, lambda config, n: None, lambda config: False)
sys.modules['toy'] = module
runner.JOBS['toy'] = 'toy'
workdir, seed, until = sys.argv[1:]
time.sleep(max(0, float(until) - time.time()))
command.exit_on_user_error(lambda _: runner.run(config_of(seed=int(seed)), 'toy', workdir))([])
"""
  workdir = tmp_path / 'run'
  until = str(time.time() + 8)
  processes = [
    subprocess.Popen(
      [sys.executable, '-c', script, str(workdir), str(seed), until],
      stderr=subprocess.PIPE,
      text=True,
    )
    for seed in range(3)
  ]
  errors = [process.communicate(timeout=100)[1] for process in processes]
  codes = [process.returncode for process in processes]
  assert sorted(codes) == [0, 2, 2], errors
  winner = codes.index(0)
  assert saved(workdir)['seed'] == winner
  assert json.loads((workdir / 'results' / 'toy.json').read_text())['seed'] == winner
  for seed, text in enumerate(errors):
    if seed != winner:
      assert f'seed: {winner} there, {seed} now' in text.splitlines()[-1]
