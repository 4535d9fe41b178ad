"""What is recorded against the frames that the agent stored, and against damage."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from palm_jax import environment, experience, pretrain, replay, worlds
from palm_jax.base import devices
from palm_jax.base.errors import UserError
from palm_jax.experience import Experience
from palm_jax.layers.pixels import to_uint8
from tests.worlds import LargeGenerator, nature_config


@pytest.fixture(scope='module')
def recorded(tmp_path_factory):
  """Two calls on two devices, whose 12 rows the ring holds all -> folder, ring, key, config."""
  folder, config, generator = (
    tmp_path_factory.mktemp('recorded') / 'experience',
    nature_config(),
    LargeGenerator(),
  )
  config.pretrain.update(
    dict(record=True, iterations_per_call=2, rollout_length=3, batch_size=16, warmup_steps=48)
  )
  config.replay.update(dict(capacity=16 * 12, actions='int8'))
  mesh = devices.make_mesh(2)
  program, world = (
    pretrain.make_program(config, generator, mesh),
    worlds.make_world(config, generator, mesh),
  )
  state = program.init(jax.random.key(0), world)
  for call in range(2):
    state, output = program.call(state, world)
    experience.write(folder, 6 * call, output.experience)
  return folder, jax.device_get(state.ring), state.key, config


def test_frames_are_drawn_again_bit_for_bit(recorded):
  folder, ring, *_ = recorded
  generator = LargeGenerator()
  render = jax.jit(lambda z, label: to_uint8(generator.apply(generator.variables, z, label)))
  drawn = [experience.frames(part, render) for part in experience.read(folder)]
  assert [len(part) for part in drawn] == [6, 6]
  np.testing.assert_array_equal(np.concatenate(drawn).reshape(12, 16, -1), ring.frames)


def test_the_actions_taken_are_those_stored(recorded):
  """The world again, driven by the ring's rounded actions."""
  folder, ring, key, config = recorded
  z, label, step, action = (np.concatenate(x) for x in zip(*experience.read(folder), strict=True))
  np.testing.assert_array_equal(action, ring.actions)
  dynamics = environment.Dynamics(
    np.float32(config.environment.alpha), np.float32(config.environment.beta)
  )
  again = jax.jit(
    lambda state, action, key: environment.step(
      state,
      action,
      key,
      jnp.arange(16),
      dynamics,
      config.environment.episode_length,
      LargeGenerator.num_classes,
    )
  )
  for row in range(11):
    key_rollout, _ = jax.random.split(jax.random.fold_in(key, row // 3))
    _, key_env = jax.random.split(jax.random.fold_in(key_rollout, row % 3))
    state = environment.EnvState(z[row], label[row], step[row])
    state = again(state, replay.unpack(jnp.asarray(ring.actions[row]), jnp.float32), key_env)
    np.testing.assert_allclose(state.z, z[row + 1], rtol=0, atol=1e-6)
    np.testing.assert_array_equal((state.label, state.step), (label[row + 1], step[row + 1]))
  assert (step == 0).any()


def test_rows_beyond_a_checkpoint_are_forgotten(tmp_path):
  """Those of more processes than go on would else lie between what is written anew."""
  names = [
    '0000000000_000000.npz',
    '0000000006_000000.npz',
    '0000000006_000008.npz',
    '0000000012_000000.npz',
    'other.npz',
  ]
  for name in names:
    (tmp_path / name).touch()
  experience.forget(tmp_path, 6)
  assert sorted(path.name for path in tmp_path.iterdir()) == [names[0], names[-1]]


def test_a_record_that_was_removed_is_missed_by_who_writes_on(recorded, tmp_path):
  part = jax.tree.map(jnp.asarray, next(experience.read(recorded[0])))
  experience.write(tmp_path / 'new', 0, part)
  with pytest.raises(UserError, match='rows 0 to 5 of the record are lost; restore it, or record'):
    experience.write(tmp_path / 'removed', 6, part)
  assert not (tmp_path / 'removed').exists()


def test_processes_write_their_own_environments(tmp_path):
  x = Experience(
    z=np.arange(60.0).reshape(3, 4, 5),
    label=np.arange(12).reshape(3, 4),
    step=np.arange(12).reshape(3, 4),
    action=np.arange(60.0).reshape(3, 4, 5),
  )
  np.savez(
    tmp_path / '0000000000_000000.npz',
    **Experience(*(field[:, :3] for field in x))._asdict(),
  )
  np.savez(
    tmp_path / '0000000000_000003.npz',
    **Experience(*(field[:, 3:] for field in x))._asdict(),
  )
  (part,) = experience.read(tmp_path)
  jax.tree.map(np.testing.assert_array_equal, part, x)


@pytest.mark.parametrize(
  'damage, words',
  [
    (lambda folder: (folder / '0000000000_000000.npz').unlink(), 'rows 0 to 5 are missing'),
    (
      lambda folder: (folder / '0000000006_000000.npz').rename(folder / '0000000006_000008.npz'),
      'does not follow',
    ),
    (
      lambda folder: (folder / '0000000006_000000.npz').write_bytes(b'PK'),
      'is damaged .* restore it or record again',
    ),
    (
      lambda folder: [path.unlink() for path in folder.glob('*.npz')],
      'holds no experience: .*pretrain.record',
    ),
  ],
)
def test_what_is_missing_is_named(damage, words, recorded, tmp_path):
  for path in recorded[0].iterdir():
    (tmp_path / path.name).write_bytes(path.read_bytes())
  damage(tmp_path)
  with pytest.raises(UserError, match=words):
    list(experience.read(tmp_path))


def test_a_lost_last_file_is_missed_where_a_checkpoint_is_beyond_it(recorded, tmp_path):
  folder = tmp_path / 'pretrain' / 'experience'
  folder.mkdir(parents=True)
  for path in recorded[0].iterdir():
    (folder / path.name).write_bytes(path.read_bytes())
  rows = sum(len(part.step) for part in experience.read(folder))
  (tmp_path / 'config.json').write_text('{"pretrain": {"rollout_length": 2}}')
  (tmp_path / 'pretrain' / 'checkpoints' / str(rows // 2)).mkdir(parents=True)
  assert sum(len(part.step) for part in experience.read(folder)) == rows
  max(folder.iterdir()).unlink()
  with pytest.raises(UserError, match=f'to {rows - 1} are missing'):
    list(experience.read(folder))
