"""Plans against the arrays of a real run."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from palm_jax import encoder, pretrain, settings, train, worlds
from palm_jax.base import devices
from palm_jax.base.errors import UserError
from palm_jax.generator import LoadedGenerator
from palm_jax.generator.networks import make_networks
from palm_jax.runner import run
from palm_jax.speed import cost, plan, workload
from tests.jobs import finish
from tests.worlds import LinearGenerator, tiny_config

pytestmark = pytest.mark.usefixtures('shallow')


@pytest.fixture(scope='module')
def planned():
  with pytest.MonkeyPatch.context() as patch:
    # With the tests' own flag, first states are compiled another way.
    flag = 'xla_backend_optimization_level'
    flags = os.environ['XLA_FLAGS'].split()
    patch.setenv('XLA_FLAGS', ' '.join(each for each in flags if flag not in each))
    return plan.estimate(tiny_config(), LinearGenerator(), 2)


def test_memory_is_that_of_the_state(planned):
  config, generator, mesh = tiny_config(), LinearGenerator(), devices.make_mesh(2)
  program, world = (
    pretrain.make_program(config, generator, mesh),
    worlds.make_world(config, generator, mesh),
  )
  state = program.init(jax.random.key(0), world)
  on_first = lambda tree: sum(
    shard.data.nbytes
    for x in jax.tree.leaves(tree)
    for shard in x.addressable_shards
    if shard.device == mesh.devices[0]
  )
  found = planned['bytes']
  assert found['frames'] == on_first(state.ring.frames) and found['actions'] == on_first(
    state.ring.actions
  )
  assert found['environments'] == on_first((state.env, state.frames))
  assert found['networks'] == on_first((world, state.ssl, state.agent))
  assert planned['parameters']['encoder'] == sum(
    x.size for x in jax.tree.leaves(state.ssl['params']['encoder'])
  )
  assert planned['parameters']['generator'] == sum(
    x.size for x in jax.tree.leaves(generator.variables)
  )


@pytest.mark.parametrize('features', ['train', 'eval'])
def test_arithmetic_is_that_of_the_program(planned, features):
  """What the parts have counted in sum is what the whole call does, but for the policy's own small
  network."""
  config, generator, mesh = tiny_config(), LinearGenerator(), devices.make_mesh(2)
  if features == 'eval':
    config.sac.update(features='eval', updates_per_batch=4)
    planned = plan.estimate(config, generator, 2)
  program = pretrain.make_program(config, generator, mesh)
  world = jax.eval_shape(lambda: worlds.host_world(config, generator))
  traced = program.call.trace(jax.eval_shape(program.init, jax.random.key(0), world), world)
  whole = cost.flops(traced) / config.pretrain.iterations_per_call
  assert 0.95 * whole < planned['flops_per_iteration'] <= whole
  assert (
    planned['flops']['simsiam'] > planned['flops']['acting'] > planned['flops']['generator'] > 0
  )


def test_a_replay_beyond_the_memory_is_refused_before_it_is_made():
  config, generator, mesh = tiny_config(), LinearGenerator(), devices.make_mesh(2)
  config.replay.capacity = 1 << 33
  program, world = (
    pretrain.make_program(config, generator, mesh),
    worlds.host_world(config, generator),
  )
  state = jax.eval_shape(program.init, jax.random.key(0), world)
  with pytest.raises(
    UserError,
    match=r'replay, networks and activations take 3\d\d.\d GiB on each of 2 device'
    '.*lower replay.capacity',
  ):
    train.check_memory(state, world, mesh, dict(activations=0))
  with pytest.raises(UserError, match=r'take \d+.\d GiB .* lower pretrain.batch_size or encoder'):
    train.check_memory(state.replace(ring=()), world, mesh, dict(activations=1 << 40))
  eyes = encoder.cheaper_eyes(config.encoder, (512, 512, 3))
  assert encoder.cheaper_eyes(config.encoder, (64, 64, 3)) == ''
  with pytest.raises(UserError, match="encoder.width, or set encoder.stem to 'imagenet' .for 512x"):
    train.check_memory(state.replace(ring=()), world, mesh, dict(activations=1 << 40), eyes)


@pytest.mark.parametrize('objective', ['simclr', 'supcon', 'byol', 'vicreg', 'barlow'])
def test_activations_of_each_objective_are_counted(objective):
  config, generator = tiny_config(), LinearGenerator()
  config.simsiam.update(dict(objective=objective, mask_episode=objective == 'simclr'))
  program = pretrain.make_program(config, generator, plan.abstract_mesh(1))
  world = worlds.host_world(config, generator)
  state = jax.eval_shape(program.init, jax.random.key(0), world)
  found = cost.activation_bytes(config, generator, state.ssl, 1)
  pictures = 2 * config.pretrain.batch_size * np.prod(program.setup.image_shape)
  assert 4 * pictures < found < 4000 * pictures
  config.pretrain.batch_size *= 2
  doubled = cost.activation_bytes(config, generator, state.ssl, 1)
  assert found * 1.8 < doubled < found * 2.2


def test_what_is_drawn_at_once_is_counted():
  # Beside what the compiler says that the same drawing takes.
  c = tiny_config()
  c.generator.update(dict(z_dim=8, w_dim=8, mapping_layers=2, channel_base=512, channel_max=32))
  network, _ = make_networks(c.generator, (32, 32, 3), 0)
  variables = jax.jit(network.init)(jax.random.key(0), jnp.zeros((1, network.z_dim)))
  generator = LoadedGenerator(network, variables)
  found = cost.rendering_bytes(c, generator, 1)
  z = jnp.zeros((c.pretrain.num_envs, generator.z_dim))
  draw = jax.jit(lambda v, z: generator.apply(v, z, jnp.zeros(len(z), jnp.int32)))
  compiled = draw.lower(variables, z).compile().memory_analysis().temp_size_in_bytes
  assert compiled / 3 < found < 3 * compiled
  assert cost.rendering_bytes(c, generator, 2) == found / 2
  few, many = plan.estimate(c, generator, 1)['bytes'], 64 * c.pretrain.num_envs
  c.pretrain.num_envs, c.replay.capacity = many, 3 * many * c.pretrain.rollout_length
  c.pretrain.warmup_steps, c.pretrain.env_steps = 3 * many, 100 * many
  assert 'activations' in few and 'rendering' not in few
  assert plan.estimate(c, generator, 1)['bytes'].keys() == {*few, 'rendering'} - {'activations'}
  c.pairs.source = 'two_views'
  assert not cost.rendering_bytes(c, generator, 1)


def test_more_devices_share(planned):
  four = plan.estimate(tiny_config(), LinearGenerator(), 4)
  for name in ('frames', 'actions', 'environments'):
    assert 2 * four['bytes'][name] == planned['bytes'][name]
  assert four['bytes']['networks'] == planned['bytes']['networks']
  assert four['bytes']['activations'] < 0.7 * planned['bytes']['activations']
  assert 2 * four['flops']['acting'] == planned['flops']['acting']


def planning_config(**settings):
  """No generator is there: the plan's own sizes."""
  config = tiny_config()
  config.generator.update(dict(z_dim=8, w_dim=8, channel_base=32, channel_max=4))
  config.plan.update(dict(dict(image_size=8, tflops=1e-3), **settings))
  return config


def test_job(tmp_path, capsys):
  run(planning_config(), 'plan', tmp_path / 'run')
  assert not (tmp_path / 'run').exists()  # a plan claims no workdir
  printed = capsys.readouterr().out
  assert 'plan for 8 device(s)' in printed and '0.001 TFLOP/s a device (plan.tflops)' in printed
  # With a benchmark there, its rate counts.
  (tmp_path / 'run' / 'results').mkdir(parents=True)
  config = planning_config(tflops=0.0)
  measured = dict(flops=dict(whole=6e9), seconds_per_iteration=2.0)
  measured['settings'] = workload.settings(config)
  (tmp_path / 'run' / 'results' / 'benchmark.json').write_text(json.dumps(dict(pretrain=measured)))
  result = finish(plan.JOB, config, tmp_path / 'run')
  assert result['flops_per_second'] == 3e9
  assert result['hours'] == pytest.approx(
    result['iterations'] * result['flops_per_iteration'] / 3e9 / 3600
  )
  config.encoder.width *= 2  # that of another encoder does not
  assert 'guess' in plan.sustained_rate(config, tmp_path / 'run')[1]


def test_pictures_of_an_impossible_size():
  with pytest.raises(UserError, match='plan.image_size=65536 is too large'):
    settings.check(planning_config(image_size=65_536))


@pytest.mark.slow
def test_what_does_not_fit_is_refused_with_what_would(tmp_path):
  config = planning_config(devices=1, memory_gb=0.004)
  config.replay.capacity = 64 * 1000
  words = 'replay.capacity=64000 .* set replay.capacity to .* or less, replay.actions to int8'
  with pytest.raises(UserError, match=words) as caught:
    finish(plan.JOB, config, tmp_path)
  config.replay.capacity = int(str(caught.value).split('capacity to ')[1].split()[0])
  assert 0 < config.replay.capacity < 64000
  finish(plan.JOB, config, tmp_path)
  with pytest.raises(UserError, match='lower pretrain.batch_size'):
    finish(plan.JOB, planning_config(devices=1, memory_gb=1e-4), tmp_path)
  with pytest.raises(UserError, match='plan.devices=-1 is negative'):
    finish(plan.JOB, planning_config(devices=-1), tmp_path)
