"""A result says what it was made from, and is made again when that has changed."""

import importlib
import json
import sys
import types

import jax
import numpy as np
import pytest

from configs import atari
from palm_jax import provenance, runner, train
from palm_jax.base.checkpoints import Checkpoints
from palm_jax.base.digests import file_digest
from palm_jax.base.errors import UserError
from palm_jax.base.results import read_result, write_result
from palm_jax.base.training import Training
from palm_jax.data.identity import fingerprint
from palm_jax.job import Job, Run
from tests.worlds import tiny_config


@pytest.fixture
def toy(monkeypatch):
  """An evaluation of the pretraining on data, and how often it ran."""
  runs = []
  module = types.ModuleType('toy_evaluation')
  module.JOB = Job(
    'toy',
    lambda this: runs.append(this) or dict(mean=float(this.data.test.images.mean())),
    lambda config, num_devices: None,
    reads=('pretrain',),
  )
  monkeypatch.setitem(sys.modules, 'toy_evaluation', module)
  monkeypatch.setitem(runner.JOBS, 'toy', 'toy_evaluation')
  return runs


def config_for(tmp_path, seed=0):
  images = np.random.default_rng(seed).integers(0, 256, (30, 8, 8, 1), np.uint8)
  np.savez(tmp_path / 'data.npz', images=images, labels=np.arange(30) % 3)
  c = tiny_config()
  c.name, c.data.name = 'x', str(tmp_path / 'data.npz')
  return c


def pretrain(workdir, step, value=0.0):
  with Checkpoints(workdir / 'pretrain' / 'checkpoints') as checkpoints:
    checkpoints.save(step, {'encoder': {'x': np.full(3, value)}}, {})


def warnings_of(caplog):
  found = [r.getMessage() for r in caplog.records if r.levelname == 'WARNING']
  caplog.clear()
  return found


def test_a_result_that_no_longer_fits_is_made_again(toy, tmp_path, caplog):
  c, workdir = config_for(tmp_path), tmp_path / 'run'
  runner.claim(workdir, c)
  pretrain(workdir, 5)
  runner.run(c, 'toy', workdir)
  [line] = warnings_of(caplog)
  assert line == 'toy: the pretraining is not complete: its step 5 is read'
  result = read_result(workdir / 'results' / 'toy.json')
  assert result['made_from']['pretrain']['step'] == 5 and len(result['made_from']['data']) == 1
  assert result['config'] == json.loads((workdir / 'config.json').read_text())
  runner.run(c, 'toy', workdir)
  assert len(toy) == 1 and not warnings_of(caplog)

  pretrain(workdir, 7)
  write_result(workdir / 'results' / 'pretrain.json', {}, {}, {})
  runner.run(c, 'toy', workdir)
  [line] = warnings_of(caplog)
  assert 'made from pretrain at step 5, which is now at step 7: it runs again' in line
  assert len(toy) == 2

  before = result['mean']
  config_for(tmp_path, seed=1)  # other images in the same file
  runner.run(c, 'toy', workdir)
  [line] = warnings_of(caplog)
  assert 'made from data, which is now another: it runs again' in line
  assert len(toy) == 3 and read_result(workdir / 'results' / 'toy.json')['mean'] != before


def test_a_changed_bit_in_a_result_is_seen(toy, tmp_path, caplog):
  c, workdir = config_for(tmp_path), tmp_path / 'run'
  runner.run(c, 'toy', workdir)
  path = workdir / 'results' / 'toy.json'
  whole = path.read_bytes()
  rng = np.random.default_rng(0)
  content = read_result(path)
  for place in rng.choice(len(whole), 300, replace=False):
    damaged = bytearray(whole)
    damaged[place] ^= 1 << rng.integers(8)
    path.write_bytes(damaged)
    try:
      assert read_result(path) == content  # white space, or a number written otherwise
    except ValueError:
      pass
  path.write_bytes(whole[: len(whole) // 2])
  runner.run(c, 'toy', workdir)
  assert len(toy) == 2 and 'is damaged' in warnings_of(caplog)[0]


def test_results_of_older_versions_have_no_digest(tmp_path):
  path = tmp_path / 'probe.json'
  path.write_text('{"rows": [1]}')
  assert read_result(path) == {'rows': [1]}
  for content in ('{"rows": [1], "config": {}}', '[1]', '[' * 100_000, '{"sha256": "x"}'):
    path.write_text(content)
    with pytest.raises(ValueError):
      read_result(path)


def test_quality_is_of_the_generator_that_it_judged(tmp_path):
  c = config_for(tmp_path)
  files = [tmp_path / 'a.pkl', tmp_path / 'b.pkl']
  for file in files:
    file.write_text(file.name)
  c.generator.path, c.quality.path = map(str, files)
  made_from = lambda job: provenance.made_from(
    runner.find(job), Run(c, tmp_path, None, data_digest='x')
  )
  digests = [file_digest(file) for file in files]
  assert made_from('quality') == {'data': {'sha256': 'x'}, 'judged': {'sha256': digests[1]}}
  assert made_from('diversity')['generator'] == {'sha256': digests[0]}
  c.quality.path = ''
  assert made_from('quality')['generator'] == {'sha256': digests[0]}


def test_a_training_is_not_resumed_on_other_data(tmp_path):
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])

  def train(digest, total):
    with Training('toy', tmp_path, total, data_digest=digest, writes_metrics=False) as run:
      run.resume({'x': {'x': jax.ShapeDtypeStruct((1,), np.float32, sharding=place)}})
      while not run.over:
        run.advance()
        if run.should_save:
          run.save({'x': {'x': np.zeros(1, np.float32)}})

  train('a' * 64, 2)
  train('a' * 64, 3)
  train(None, 4)  # it cannot be told
  with pytest.raises(UserError, match='began with other data'):
    train('b' * 64, 9)


def test_fingerprints(tmp_path):
  c = config_for(tmp_path)
  one = fingerprint(c.data.name)
  assert one and fingerprint(c.data.name) == one
  (tmp_path / 'copy.npz').write_bytes((tmp_path / 'data.npz').read_bytes())
  assert fingerprint(str(tmp_path / 'copy.npz')) == one
  config_for(tmp_path, 1)
  assert fingerprint(c.data.name) != one
  folder = tmp_path / 'pictures'
  (folder / 'a').mkdir(parents=True)
  (folder / 'a' / '1.png').write_bytes(b'12')
  of_folder = fingerprint(str(folder))
  (folder / 'a' / '1.png').write_bytes(b'123')
  assert of_folder and fingerprint(str(folder)) != of_folder
  assert fingerprint('digits') and fingerprint(str(tmp_path / 'none.npz')) is None


@pytest.mark.parametrize('name', ['offline', 'meta'])
def test_a_result_is_of_the_encoder_that_its_agents_saw_by(name, tmp_path):
  c = importlib.import_module(f'configs.{name}').get_config('smoke')
  made_from = lambda: provenance.made_from(runner.find(name), Run(c, tmp_path, None))
  assert made_from().keys() == {'generator'}  # the random encoder is no checkpoint
  c.world.encoder = str(tmp_path / 'seeing')
  pretrain(tmp_path / 'seeing', 3)
  before = made_from()
  assert before['encoder'] == provenance.newest_step(tmp_path / 'seeing' / 'pretrain')
  pretrain(tmp_path / 'seeing', 4)
  expected = 'encoder at step 3, which is now at step 4'
  assert provenance.difference(before, made_from()) == expected


def test_a_finetuning_is_of_the_pretraining_whose_trunk_it_begins_with(tmp_path):
  c, workdir = atari.get_config('Pong,laptop'), tmp_path / 'run'
  this, job = Run(c, workdir, None), runner.find('finetune')
  pretrain(workdir, 3)
  pretrain(tmp_path / 'other', 5)
  begun = provenance.made_from(job, this)
  assert begun == {'pretrain': provenance.newest_step(workdir / 'pretrain')}
  write_result(workdir / 'results' / 'finetune.json', {}, begun, {})
  write_result(workdir / 'results' / 'pretrain.json', {}, {}, {})
  jobs = [runner.find('pretrain'), job]
  assert provenance.is_current(job, this) and not provenance.waiting(jobs, this)
  pretrain(workdir, 4)
  assert not provenance.is_current(job, this)
  c.finetune.trunk = str(tmp_path / 'other')
  assert provenance.made_from(job, this) == {
    'trunk': provenance.newest_step(tmp_path / 'other' / 'pretrain')
  }
  c.finetune.trunk = 'scratch'
  assert not provenance.made_from(job, this)
  assert not provenance.made_from(runner.find('scratch'), this)
  (workdir / 'results' / 'pretrain.json').unlink()
  names = lambda: [each.name for each in provenance.waiting(jobs, this)]
  assert names() == ['pretrain']
  c.finetune.trunk = 'own'
  assert names() == ['pretrain', 'finetune']


def test_a_passive_pretraining_is_of_the_record_that_it_reads(tmp_path):
  c, job = tiny_config(), runner.find('pretrain')
  c.pairs.update(dict(source='passive_random', record=str(tmp_path / 'played')))
  this = Run(c, tmp_path / 'run', None)
  pretrain(tmp_path / 'played', 3)
  before = provenance.made_from(job, this)
  assert before['record'] == provenance.newest_step(tmp_path / 'played' / 'pretrain')
  train.check_origin(this, {}, {'world': 'a', 'record': before['record']['sha256']}, None)
  pretrain(tmp_path / 'played', 4, 1.0)
  now = provenance.made_from(job, this)
  assert provenance.difference(before, now) == 'record at step 3, which is now at step 4'
  digests = ({'world': 'a', 'record': about['record']['sha256']} for about in (before, now))
  with pytest.raises(UserError, match='began with another record than .*played holds now'):
    train.check_origin(this, *digests, None)


def test_the_newest_step(tmp_path):
  assert provenance.newest_step(tmp_path / 'pretrain') == {}
  pretrain(tmp_path, 3)
  pretrain(tmp_path, 4, 1.0)
  found = provenance.newest_step(tmp_path / 'pretrain')
  assert found['step'] == 4 and len(found['sha256']) == 64
