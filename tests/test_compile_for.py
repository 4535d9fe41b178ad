"""What is read off a compiled program, against closed forms and XLA's own counts; a slow test
compiles for a TPU slice."""

import importlib.util
import json
import re
import subprocess
import sys

import jax
import pytest

from configs import cifar
from launch import chips, compile_for, described
from palm_jax import pretrain, worlds
from palm_jax.base import devices
from palm_jax.base.errors import UserError
from palm_jax.speed import plan
from tests.worlds import LinearGenerator, tiny_config

F32 = 4
NEEDS_LIBTPU = pytest.mark.skipif(
  importlib.util.find_spec('libtpu') is None, reason="libtpu is not installed ('.[tpu]')"
)


def test_roofline():
  chip = chips.Chip(flops=1e12, hbm=1e9, ici=1e8, memory=1)
  total = {
    'flops': 1e12,
    'passes': 6e12,
    'bytes': 4e9,
    ('all-reduce', 'count'): 4,
    ('all-reduce', 'sent'): 1e8,
    ('all-gather', 'count'): 6,
    ('all-gather', 'sent'): 1e8,
  }
  seconds = compile_for.roofline(chip, [4, 8], total, 2)
  network = 1 + 10 * 6e-6 / 2  # 10 collectives over 2 + 4 hops
  assert seconds == pytest.approx(
    {'compute': 3, 'memory': 2, 'network': network, 'iteration': 3 + network}
  )


def test_scaled_sizes_keep_each_chips_share():
  config = cifar.get_config()
  compile_for.scale(config, 256, 8)  # chips, of which the config was for
  assert (config.pretrain.num_envs, config.pretrain.batch_size, config.replay.num_shards) == (
    512 * 32,
    512 * 32,
    256,
  )
  pretrain.check(config, 256)
  with pytest.raises(UserError, match='pretrain.num_envs=16384 .*multiple of 3000'):
    compile_for.scale(config, 8, 3000)


def test_the_generator_takes_no_memory():
  config = tiny_config()
  generator = plan.untrained_generator(config)
  leaves = jax.tree.leaves(generator.variables)
  assert sum(x.size for x in leaves) > 1e7 and all(x.strides == (0,) * x.ndim for x in leaves)
  assert generator.image_shape == (32, 32, 3) and generator.num_classes == 10


@pytest.mark.parametrize('topology', ['v9z:2x4', 'v5e', 'v5e:', 'v5e:2y4', 'v5e:8', ''])
def test_unknown_topologies(topology):
  with pytest.raises(
    UserError, match=f'^--topology={topology} is unknown: .*v5e, v5p, v6e.*v5e:2x4, '
  ):
    chips.make_mesh(topology)


def test_missing_libtpu(monkeypatch):
  monkeypatch.setitem(sys.modules, 'libtpu', None)  # as where it is not installed
  with pytest.raises(UserError, match=r"libtpu is not installed.*pip install 'palm_jax\[tpu\]'"):
    chips.make_mesh('v5e:2x4')


def test_too_large_for_the_chip():
  memory = dict(total=20 * 2**30, chip=16 * 2**30)
  with pytest.raises(
    UserError, match=r'takes 20.00 GiB of each chip .*v5e:2x4 has 16.00 GiB: lower replay.capacity'
  ):
    compile_for.check_memory(dict(topology='v5e:2x4', memory=memory))
  compile_for.check_memory(dict(topology='v5e:2x4', memory=dict(memory, total=2**30)))


def test_mistakes_on_the_command_line_are_one_line():
  run = subprocess.run(
    [sys.executable, '-m', 'launch.compile_for', '--topology=v1:1x1', '--config=configs/cifar.py'],
    capture_output=True,
    text=True,
  )
  assert run.returncode == 2
  assert re.fullmatch(r'palm_jax: --topology=v1:1x1 is unknown: [^\n]*\n', run.stderr)


@NEEDS_LIBTPU
def test_layouts_that_are_none():
  with pytest.raises(UserError, match='--topology=v5e:3x5 is refused by libtpu'):
    chips.make_mesh('v5e:3x5')


@NEEDS_LIBTPU
@pytest.mark.slow
def test_a_slice_of_eight():
  config = tiny_config()
  result = compile_for.study(config, 'v5e:2x4', LinearGenerator())
  assert result['chips'] == 8 and not result['loops_of_unknown_length']
  json.dumps(result)
  assert 'v5e:2x4: 8 chips' in described.describe(result)
  memory = result['memory']
  assert 0 < memory['total'] < 1e9
  # The rollout's scan and the updates' lie within that over iterations.
  assert result['flops'] * config.pretrain.iterations_per_call > 8 * result['counted_once']['flops']
  # Gradients are summed once an update: every parameter of SimSiam and SAC crosses the network, in
  # float32.
  program = pretrain.make_program(config, LinearGenerator(), devices.make_mesh())
  world = worlds.make_world(config, LinearGenerator(), devices.make_mesh())
  state = jax.eval_shape(program.init, jax.random.key(0), world)
  parameters = sum(x.size for x in jax.tree.leaves(state.ssl['params']))
  sent = result['collectives']['all-reduce']['sent']
  assert sent > config.pretrain.updates_per_iteration * parameters * F32 * 2 * 7 / 8
