"""What each source's pairs are, and that a recorded run's order gives its encoder again."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from palm_jax import environment, experience, material, pairs, pretrain, worlds
from palm_jax.base import devices
from palm_jax.base.checkpoints import Checkpoints
from palm_jax.base.digests import digest
from palm_jax.base.errors import UserError
from palm_jax.data.arrays import Data, Split
from tests.worlds import LargeGenerator, LinearGenerator, nature_config

GENERATOR = LinearGenerator()
KEYS = jax.random.split(jax.random.key(3), 8)


def config_of(source, **changes):
  c = nature_config()
  c.pairs.update(dict(source=source, **changes))
  return c


def seen(z, labels, psi):
  """In place of pictures: the latents themselves, with psi and label behind them."""
  rest = jnp.stack([jnp.full(len(z), psi), labels.astype(z.dtype)], 1)
  return jnp.concatenate([z, rest], 1)


def load(c, generator, mesh, data=None):
  """What the config's source needs beside the generator."""
  return material.load(c, pairs.SOURCES[c.pairs.source].needs, generator, mesh, data)


def draw(c, n, material=(), keys=KEYS, render=seen, num_classes=3):
  drawing = pairs.Draw(c, material, render, GENERATOR.z_dim, num_classes, jnp.float32)
  return [np.asarray(x) for x in pairs.DRAWS[c.pairs.source](drawing, keys, n)]


@pytest.fixture(scope='module')
def data():
  """Every picture is its own number; labels in no order."""
  labels = np.random.default_rng(0).integers(0, 3, 90)
  images = np.arange(90, dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 1), np.uint8)
  return Data(Split(images, labels), Split(images[:9], labels[:9]), ('a', 'b', 'c'), 'numbers')


def test_independent_latents_of_one_label():
  c = config_of('jahanian_random')
  c.environment.truncation_psi = 0.5
  first, second, labels = draw(c, 500)
  np.testing.assert_array_equal(first[:, -1], labels)
  np.testing.assert_array_equal(second[:, -1], labels)
  z1, z2 = first[:, :-2], second[:, :-2]
  correlation = np.mean(z1 * z2)
  assert abs(correlation) < 5 / np.sqrt(z1.size) and abs(np.std(z1) - 1) < 0.05
  assert set(labels) == {0, 1, 2} and (first[:, -2] == 0.5).all()


@pytest.mark.parametrize('std', [0.1, 0.25, 1.0])
def test_gaussian_neighbours(std):
  first, second, labels = draw(config_of('jahanian_gaussian', std=std), 500)
  z1, z2 = first[:, :-2], second[:, :-2]
  np.testing.assert_allclose(np.std(z2 - z1), std, rtol=0.05)
  cosine = np.mean(z1 * z2) / np.sqrt(np.mean(z1**2) * np.mean(z2**2))
  np.testing.assert_allclose(cosine, 1 / np.sqrt(1 + std**2), atol=0.02)
  np.testing.assert_allclose(first[:, -2], 0.9, rtol=1e-6)
  np.testing.assert_array_equal(first[:, -1], second[:, -1])


def test_few_samples_come_again():
  for source in ('jahanian_random', 'jahanian_gaussian'):
    c = config_of(source, samples=7)
    first, second, _ = draw(c, 100, load(c, GENERATOR, devices.make_mesh(1)))
    assert len(np.unique(first, axis=0)) == len(np.unique(second, axis=0)) == 7
    assert len(np.unique(np.append(first, second, 1), axis=0)) == 7  # a sample is a pair


def test_an_unconditional_generator_has_label_zero():
  assert not draw(config_of('jahanian_random'), 50, num_classes=0)[2].any()


def test_two_images_of_one_label(data):
  c = config_of('static')
  material = load(c, GENERATOR, devices.make_mesh(), data)
  first, second, labels = draw(c, 2000, material)
  numbers = [x[:, 0, 0, 0] for x in (first, second)]
  assert (numbers[0] != numbers[1]).all()
  for of_view in numbers:
    np.testing.assert_array_equal(data.train.labels[of_view], labels)
  counts = np.bincount(labels)
  assert np.abs(counts - 16000 / 3).max() < 5 * np.sqrt(16000 * 2 / 9)
  # Every ordered pair of class 0 is as likely as another.
  rows = np.flatnonzero(data.train.labels == 0)
  drawn = {pair for pair in zip(*(of_view[labels == 0] for of_view in numbers), strict=True)}
  assert len(drawn) > 0.98 * len(rows) * (len(rows) - 1)


def test_few_images_are_balanced(data):
  c = config_of('static', samples=12)
  first, second, labels = draw(c, 500, load(c, GENERATOR, devices.make_mesh(), data))
  for label in range(3):
    assert len(np.unique(first[labels == label, 0, 0, 0])) == 4
  assert len(np.unique(second[:, 0, 0, 0])) == 12


def test_two_views_are_of_one_image(data):
  c = config_of('two_views')
  first, second, labels = draw(c, 300, load(c, GENERATOR, devices.make_mesh(), data))
  np.testing.assert_array_equal(first, second)
  np.testing.assert_array_equal(data.train.labels[first[:, 0, 0, 0]], labels)
  assert len(np.unique(first[:, 0, 0, 0])) == 90


def test_recorded_pairs_are_consecutive_steps_of_one_episode():
  length, rows, num_envs = 7, 30, 16
  start = np.asarray(environment.staggered_steps(jnp.arange(num_envs), num_envs, length))
  step = (start + np.arange(rows)[:, None]) % length
  z = np.arange(rows * num_envs, dtype=np.float32).reshape(rows, num_envs, 1).repeat(6, 2)
  recorded = experience.Experience(
    z, (np.arange(num_envs) % 3 + 0 * step).astype(np.int32), step.astype(np.int32)
  )
  c = config_of('passive_random')
  c.environment.truncation_psi = 0.5
  first, second, labels = draw(c, 1000, recorded)
  assert (first[:, -2] == 0.5).all() and (second[:, -2] == 0.5).all()
  place = first[:, 0].astype(int)
  np.testing.assert_array_equal(second[:, 0], place + num_envs)
  assert (step.ravel()[place] < length - 1).all()
  np.testing.assert_array_equal(labels, place % num_envs % 3)
  valid = [i for i in range((rows - 1) * num_envs) if step.ravel()[i] < length - 1]
  assert set(place) == set(valid)


@pytest.fixture(scope='module')
def explored(tmp_path_factory):
  """A recorded run of some iterations -> (its workdir, config, the state at the end)."""
  workdir, c = tmp_path_factory.mktemp('explored'), config_of('explored')
  c.pretrain.update(dict(record=True, iterations_per_call=4))
  (workdir / 'config.json').write_text(c.to_json_best_effort())
  return workdir, c, play(c, workdir, 3)


def play(c, workdir, calls, data=None):
  mesh, generator = devices.make_mesh(2), LargeGenerator()
  program, world = (
    pretrain.make_program(c, generator, mesh),
    worlds.make_world(c, generator, mesh, data),
  )
  state = program.init(jax.random.key(c.seed), world)
  for i in range(calls):
    state, output = program.call(state, world)
    if c.pretrain.record:
      experience.write(
        workdir / 'pretrain' / 'experience', 4 * i * c.pretrain.rollout_length, output.experience
      )
  return jax.device_get(state.replace(key=0))


def test_few_samples_of_a_record_are_its_first_rows(explored):
  workdir, c, _ = explored
  for samples, rows in ((1, 3), (16 * 5, 5), (10**6, 48), (0, 48)):
    recorded = load(
      config_of('passive_random', record=str(workdir), samples=samples),
      LargeGenerator(),
      devices.make_mesh(),
    )
    assert recorded.step.shape == (rows, 16)


def test_the_recorded_order_gives_the_same_encoder_bit_for_bit(explored):
  workdir, c, state = explored
  passive = c.copy_and_resolve_references()
  passive.pairs.update(dict(source='passive_ordered', record=str(workdir)))
  passive.pretrain.record = False
  again = play(passive, workdir, 3)
  assert again.agent == () and again.env == ()
  np.testing.assert_array_equal(again.ring.frames, state.ring.frames)
  for a, b in zip(jax.tree.leaves(again.ssl), jax.tree.leaves(state.ssl), strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
  'source, objective',
  [('random_action', 'simsiam'), ('passive_random', 'simclr'), ('static', 'supcon')],
)
def test_the_others_learn_from_what_they_draw(explored, source, objective):
  workdir, c, state = explored
  c = c.copy_and_resolve_references()
  c.pairs.update(dict(source=source, record=str(workdir) if source.startswith('passive') else ''))
  c.pretrain.record, c.simsiam.objective = False, objective
  images = np.random.default_rng(0).integers(0, 256, (30, 40, 40, 1), dtype=np.uint8)
  data = Data(
    Split(images, np.arange(30) % 3), Split(images, np.arange(30) % 3), ('a', 'b', 'c'), 'noise'
  )
  begun, end = play(c, workdir, 0, data), play(c, workdir, 3, data)
  assert end.agent == () and (end.ring == ()) == (source != 'random_action')
  assert begun.iteration == 0 < end.iteration
  encoder = lambda state: jax.tree.leaves(state.ssl['params']['encoder'])
  for other in (begun, state):
    same = [np.array_equal(a, b) for a, b in zip(encoder(end), encoder(other), strict=True)]
    assert not any(same)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(end.ssl))


@pytest.mark.parametrize(
  'changes, message',
  [
    (
      dict(source='explore'),
      "pairs.source='explore' is unknown .*: choose one of explored, random_action",
    ),
    (
      dict(source='passive_random'),
      "pairs.record='' with pairs.source='passive_random': give the workdir",
    ),
    (dict(record='runs/a'), "pairs.record='runs/a' with pairs.source='explored'"),
    (dict(samples=5), 'pairs.samples=5 with pairs.source=.explored.'),
    (dict(source='two_views'), "simsiam.augment='none' gives the same picture twice"),
    (dict(source='jahanian_gaussian', std=-1.0), 'pairs.std=-1'),
  ],
)
def test_settings_that_cannot_work(changes, message):
  c = nature_config()
  c.pairs.update(changes)
  with pytest.raises(UserError, match=message):
    pretrain.check(c, 8)


def test_grey_pictures_in_a_stack_are_no_colours():
  c = config_of('explored')
  c.environment.stack, c.simsiam.augment = 3, 'simsiam'
  with pytest.raises(UserError, match='environment.stack=3 grey pictures for the colours of one'):
    pretrain.make_program(c, LargeGenerator(), devices.make_mesh())
  c.simsiam.augment = 'shift_flip'
  pretrain.make_program(c, LargeGenerator(), devices.make_mesh())


def test_objectives_that_cannot_work():
  c = config_of('explored')
  c.simsiam.objective = 'supcon'
  c.pairs.source, unconditional = 'jahanian_random', LargeGenerator()
  unconditional.num_classes = 0
  with pytest.raises(UserError, match="'supcon' with a generator without classes"):
    pretrain.make_program(c, unconditional, devices.make_mesh())
  c.pairs.source = 'static'  # whose labels are those of the images
  pretrain.make_program(c, unconditional, devices.make_mesh())
  c.simsiam.objective = 'moco'
  with pytest.raises(
    UserError, match="simsiam.objective='moco' is unknown: choose one of simsiam, simclr, supcon"
  ):
    pretrain.check(c, 8)
  c.simsiam.update(dict(objective='simclr', mask_episode=True))
  with pytest.raises(UserError, match='simsiam.mask_episode with pairs.source=.*of no episode'):
    pretrain.check(c, 8)
  c.pairs.source, c.simsiam.objective = 'explored', 'simsiam'
  with pytest.raises(UserError, match="simsiam.mask_episode with simsiam.objective='simsiam'"):
    pretrain.check(c, 8)
  c.simsiam.mask_episode = False
  c.pairs.window = 3
  with pytest.raises(UserError, match='pairs.window=3 with pairs.group=1'):
    pretrain.check(c, 8)
  c.pairs.group = 3
  with pytest.raises(UserError, match='=4 is not a positive multiple of pairs.group=3'):
    pretrain.check(c, 8)
  c.pairs.update(dict(group=1, window=0))
  c.simsiam.update(dict(objective='simclr', temperature=0.0))
  with pytest.raises(UserError, match='simsiam.temperature=0'):
    pretrain.check(c, 8)


def test_a_record_of_another_generator_is_refused(explored, tmp_path):
  workdir, generator, mesh = tmp_path / 'explored', LargeGenerator(), devices.make_mesh()
  shutil.copytree(explored[0], workdir)
  c = config_of('passive_random', record=str(workdir))
  load(c, generator, mesh)  # without checkpoints it does not say
  for step, world in enumerate([None, digest(generator.variables, {}), 'f' * 64]):
    with Checkpoints(workdir / 'pretrain' / 'checkpoints') as checkpoints:
      metadata = {'world': world} if world else {}
      checkpoints.save(step, {'encoder': {'x': np.zeros(1, np.float32)}}, metadata)
    if step < 2:
      load(c, generator, mesh)
  with pytest.raises(UserError, match='world of another generator .digest ffffffffffff, here'):
    load(c, generator, mesh)


def test_records_and_images_that_do_not_fit(explored, data, tmp_path):
  workdir, c, _ = explored
  mesh = devices.make_mesh()
  c = config_of('passive_ordered', record=str(workdir))
  c.environment.episode_length = 9
  with pytest.raises(UserError, match='in episodes of 7 steps, expected 6, 16 and 9'):
    load(c, LargeGenerator(), mesh)
  c.environment.update(dict(episode_length=7, truncation_psi=0.5))
  with pytest.raises(
    UserError, match='another world .environment.truncation_psi=1.0 there, 0.5 here'
  ):
    load(c, LargeGenerator(), mesh)
  c.pairs.record = str(tmp_path)
  with pytest.raises(
    UserError,
    match='config.json cannot be read .*: give the workdir of a run made with pretrain.record',
  ):
    load(c, LargeGenerator(), mesh)
  (tmp_path / 'config.json').write_text(c.to_json_best_effort())
  with pytest.raises(UserError, match='holds no experience'):
    load(c, LargeGenerator(), mesh)
  with pytest.raises(
    UserError, match=r'images are \(8, 8, 1\), but the generator makes \(40, 40, 1\)'
  ):
    load(config_of('static'), LargeGenerator(), mesh, data)
  one = data._replace(train=Split(data.train.images[:3], np.array([0, 1, 2])))
  with pytest.raises(UserError, match='class 0 has 1 images, expected 2 or more'):
    load(config_of('static'), GENERATOR, mesh, one)
  assert load(config_of('two_views'), GENERATOR, mesh, one).count.tolist() == [1, 1, 1]
