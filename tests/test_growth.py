"""How an iteration grows: by the numbers that are counted; times are not judged."""

import pytest

from configs.studies import scales
from palm_jax.base import devices
from palm_jax.base.errors import UserError
from palm_jax.speed import benchmark, growth
from tests.jobs import finish, saved_result


def test_one_setting_grows():
  config = scales.smoke()
  found = growth.grown(config, 'pretrain.num_envs', 4)
  assert found.pretrain.num_envs == 4 * config.pretrain.num_envs
  found.pretrain.num_envs = config.pretrain.num_envs
  assert found.to_dict() == config.copy_and_resolve_references().to_dict()


@pytest.mark.parametrize(
  'key, words',
  [
    ('pretrain.num_env', 'did you mean pretrain.num_envs'),
    ('pretrain.dtype', 'no number of the config'),
    ('simsiam.symmetric', 'no number of the config'),
    ('pretrain', 'no number of the config'),
  ],
)
def test_what_cannot_grow(key, words):
  config = scales.smoke()
  config.jobs = ('pretrain',)
  config.benchmark.grow = (key,)
  with pytest.raises(UserError, match=words):
    benchmark.check(config, 1)


@pytest.mark.parametrize(
  'key, times, words',
  [
    ('pretrain.num_envs', 1.3, 'is no whole number'),
    ('pretrain.num_envs', 1024, 'replay.capacity=8192 is not a positive multiple'),
  ],
)
def test_what_cannot_grow_so_much(key, times, words):
  config = scales.smoke()
  config.jobs = ('pretrain',)
  config.benchmark.update(dict(grow=(key,), times=(1, times)))
  with pytest.raises(UserError, match=words):
    benchmark.check(config, 1)


@pytest.mark.slow  # five compilations
def test_environments_and_batch_share_the_work(tmp_path):
  """All of an iteration is done by environment or by sample; the reward alone is quadratic."""
  config = scales.smoke()
  config.jobs = ('pretrain',)
  config.benchmark.grow = 'pretrain.num_envs', 'pretrain.batch_size'
  config.benchmark.times = 2, 4
  result = finish(benchmark.JOB, config, tmp_path, None, devices.make_mesh(1))
  assert saved_result(tmp_path / 'results' / 'benchmark.json') == result
  rows = {(row['key'], row['times']): row for row in result['growth']}
  assert list(rows)[0] == ('', 1) and len(rows) == 5
  assert all(row['seconds'] > 0 < row['bytes'] for row in rows.values())
  for times in (2, 4):
    envs, batch = (
      rows[f'pretrain.{name}', times]['flops_ratio'] - 1 for name in ('num_envs', 'batch_size')
    )
    assert 0.05 < envs < batch and times - 1 <= envs + batch < 1.2 * (times - 1)
  assert 'pretrain.num_envs' in growth.table(result['growth'])
