"""Measures of speed: what is in them, not how large they are."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict

from palm_jax.base import devices
from palm_jax.base.errors import UserError
from palm_jax.data.arrays import Data, Split
from palm_jax.generator import LoadedGenerator, train
from palm_jax.generator.sines import SirenGenerator
from palm_jax.generator.stylegan2 import Generator
from palm_jax.speed import benchmark, drawing, timing
from tests.jobs import finish, saved_result
from tests.worlds import LargeGenerator, nature_config, tiny_config


@pytest.mark.slow
@pytest.mark.parametrize(
  'augment, phases',
  [
    ('none', {'g_main', 'd_main'}),
    ('blit', {'g_main', 'd_main', 'r1', 'path_lengths', 'ada'}),
  ],
)
def test_shares_of_the_generators_training(tmp_path, augment, phases):
  c = train.default_config()
  c.update(
    dict(
      z_dim=4,
      w_dim=4,
      mapping_layers=1,
      base_size=3,
      channel_base=24,
      channel_max=4,
      conv_clamp=0.0,
      d_mapping_layers=0,
      mbstd_group=2,
      batch_size=4,
      r1_interval=4,
      r1_gamma=0.01 * ('r1' in phases),
      pl_weight=2.0 * ('path_lengths' in phases),
      augment=augment,
      iterations_per_call=4,
    )
  )
  split = Split(
    np.random.default_rng(0).integers(0, 256, (20, 6, 6, 4), np.uint8), np.zeros(20, np.int64)
  )
  config, mesh = ConfigDict(dict(seed=0, jobs=('generator',), generator=c)), devices.make_mesh(2)
  result = finish(benchmark.JOB, config, tmp_path, Data(split, split, ('all',), 'noise'), mesh)
  assert saved_result(tmp_path / 'results' / 'benchmark.json') == result
  found = result['generator']
  assert found['phase_seconds'].keys() == found['phase_shares'].keys() == phases
  assert (
    math.isclose(sum(found['phase_shares'].values()), 1)
    and min(found['phase_seconds'].values()) >= 0
  )
  assert math.isclose(found['images_per_second'] * found['seconds_per_iteration'], 4)
  assert result['devices'].startswith('2 x') and found['settings']['augment'] == augment


@pytest.mark.slow  # eight compilations
def test_the_loop_against_its_parts(tmp_path):
  config, mesh = nature_config(), devices.make_mesh(2)
  config.pretrain.iterations_per_call = 2
  found = benchmark.pretraining(config, LargeGenerator(), mesh)
  parts = found['part_seconds']
  assert (
    parts.keys() == {'generator', 'acting', 'simsiam', 'reward', 'sac', 'replay'}
    and min(parts.values()) > 0
  )
  unavoidable = parts['generator'] + parts['acting'] + parts['simsiam']
  assert math.isclose(found['efficiency'], unavoidable / found['seconds_per_iteration'])
  assert math.isclose(found['env_steps_per_second'] * found['seconds_per_iteration'], 4 * 16)
  assert math.isclose(found['updates_per_second'] * found['seconds_per_iteration'], 2)
  assert 0 < found['share_of_matmul'] < 1
  assert (
    found['bytes']['arguments'] > found['bytes']['results_beside_them']
  )  # the state is updated in place
  for word in ('env steps/s', 'SimSiam, both passes', 'efficiency'):
    assert word in benchmark.table(found, devices.describe(mesh))


def test_compiling_is_timed_without_programs_on_disk(tmp_path, monkeypatch):
  cache = dict(
    jax_compilation_cache_dir=str(tmp_path), jax_persistent_cache_min_compile_time_secs=0.0
  )
  before = {name: getattr(jax.config, name) for name in cache}
  for name, value in cache.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()
  try:
    lowered = lambda: jax.jit(lambda x: jnp.sin(x) * 3).lower(np.zeros(3, np.float32))
    took, compiled = timing.compile_seconds(lowered())
    assert took > 0 and not list(tmp_path.iterdir())
    np.testing.assert_allclose(compiled(np.ones(3, np.float32)), 3 * np.sin(1), rtol=1e-6)
    lowered().compile()
    assert list(tmp_path.iterdir())  # kept again
  finally:
    for name, value in before.items():
      jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_nothing_to_measure(tmp_path):
  config = tiny_config()
  config.jobs = ('probe',)
  with pytest.raises(UserError, match='nothing to measure: put generator or pretrain'):
    finish(benchmark.JOB, config, tmp_path, None, devices.make_mesh())


def test_drawing_beside_a_stylegan2_of_the_same_widths():
  network = SirenGenerator(4, 4, 2, resolution=8, width=6, layers=2, image_channels=1)
  other = drawing.counterpart(network)
  assert other == Generator(4, 4, 2, (6, 6), image_channels=1, mapping_layers=2)
  assert drawing.counterpart(other) is None
  assert drawing.counterpart(network.clone(resolution=6)) is None  # no size of StyleGAN2
  rates = drawing.measure(LoadedGenerator(network, None), 3)
  assert rates.keys() == {'SirenGenerator', 'StyleGAN2'} and min(rates.values()) > 0
  assert 'of the same widths (ratio ' in drawing.table(rates, 3)
