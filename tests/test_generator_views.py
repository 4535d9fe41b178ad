import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from palm_jax import experience, pretrain, worlds
from palm_jax.base import devices
from palm_jax.base.digests import digest
from palm_jax.base.errors import UserError
from palm_jax.generator import LoadedGenerator, views
from palm_jax.generator.stylegan2 import Generator
from palm_jax.generator.views import WLatents, cropped, prompts, style_mixed, w_latents
from palm_jax.layers.pixels import to_uint8
from tests.worlds import LinearGenerator, nature_config


def test_a_world_of_w_is_known_by_what_was_given():
  """Its measured mean and root differ in their last bits from device to device."""
  given = {'params': np.arange(3.0)}
  world = WLatents(None, dict(generator=given, mean=np.zeros((1, 2)), root=np.eye(2)))
  other = WLatents(None, dict(generator=given, mean=np.full((1, 2), 1e-7), root=np.eye(2)))
  another = WLatents(None, dict(world.variables, generator={'params': np.arange(1.0, 4)}))
  here = experience.world_digest(world)
  assert here == experience.world_digest(other) == experience.world_digest(cropless(other))
  assert here != experience.world_digest(another)
  older = digest(world.variables, {})
  assert older != here and all(experience.is_world_of(world, x) for x in (here, older))
  assert not experience.is_world_of(another, here)
  assert here != experience.world_digest(WLatents(None, given))


def test_a_world_is_known_without_its_average_of_w():
  """Where a file has none, it is drawn, and its last bits differ from device to device."""
  world_of = lambda weight, average: SimpleNamespace(
    variables=dict(params=dict(w=weight), buffers=dict(w_avg=average))
  )
  world = world_of(np.ones(3), np.ones(2))
  here = experience.world_digest(world)
  assert here == experience.world_digest(world_of(np.ones(3), np.full(2, 1e-7)))
  assert here != experience.world_digest(world_of(np.zeros(3), np.zeros(2)))
  assert here != experience.world_digest(world_of(np.ones(3), np.zeros((4, 2))))  # by class
  of_w = WLatents(None, dict(generator=world.variables, mean=np.zeros((1, 2)), root=np.eye(2)))
  for each, older in ((world, world.variables), (of_w, {'w': world.variables})):
    assert experience.is_world_of(each, digest(older, {}))
    assert experience.world_digest(each) != digest(older, {})


def cropless(world):
  return views.Cropped(world, 1)


def mapped(generator, z, labels):
  ws = jax.jit(functools.partial(generator.network.apply, method='mapping'))(
    generator.variables, z, labels
  )
  return np.asarray(ws[:, 0], np.float64)


def drawn(world, z, labels, psi=1.0):
  """Compiled: call by call these networks take seconds."""
  return np.asarray(jax.jit(world.apply)(world.variables, z, labels, psi))


@pytest.fixture(scope='module')
def generator():
  network = Generator(
    z_dim=6, w_dim=5, num_classes=3, channels=(4, 4), image_channels=1, mapping_layers=2
  )
  variables = jax.jit(network.init)(jax.random.key(0), jnp.zeros((1, 6)), jnp.zeros(1, jnp.int32))
  variables['buffers']['w_avg'] = jnp.arange(5.0) / 10
  return LoadedGenerator(network, jax.device_get(variables))


def test_w_has_the_spread_that_mapped_latents_have(generator):
  world = w_latents(generator, samples=6000)
  assert (world.z_dim, world.num_classes, world.image_shape) == (5, 3, (8, 8, 1))
  labels = jnp.arange(6000) % 3
  z = jax.random.normal(jax.random.key(5), (6000, 6))  # others than those that were measured
  w = mapped(generator, z, labels)
  u = np.random.default_rng(0).normal(size=(6000, 5))
  v = world.variables['mean'][np.asarray(labels)] + u @ world.variables['root'].T
  for label in range(3):
    of = np.asarray(labels) == label
    assert (
      np.abs(v[of].mean(0) - w[of].mean(0)) < 5 * w[of].std(0) / np.sqrt(1000)
    ).all()  # two samples of 2,000
  within = lambda x: np.cov(
    np.concatenate([x[labels == k] - x[labels == k].mean(0) for k in range(3)]).T
  )
  np.testing.assert_allclose(within(v), within(w), atol=0.1 * np.abs(within(w)).max())


def test_a_mapped_latent_has_the_same_picture_through_the_other_door(generator):
  world = w_latents(generator, samples=600)
  labels = jnp.array([0, 2, 1, 1])
  z = jax.random.normal(jax.random.key(1), (4, 6))
  w = mapped(generator, z, labels)
  root, mean = (
    np.asarray(world.variables['root'], np.float64),
    world.variables['mean'][np.asarray(labels)],
  )
  u = np.linalg.solve(root, (w - mean).T).T.astype(np.float32)
  for psi in (1.0, 0.6):
    np.testing.assert_allclose(
      drawn(world, u, labels, psi), drawn(generator, z, labels, psi), atol=2e-3
    )


def test_too_few_samples(generator):
  with pytest.raises(UserError, match='5 samples do not span the 5 dimensions'):
    w_latents(generator, samples=5)


def test_prompts_are_rows_of_a_bank(generator):
  bank = np.array([[1, 0, 0], [0, 0, 1], [0.5, 0.5, 0], [0, 1, 0]], np.float32)
  world = prompts(generator, bank)
  assert world.num_classes == 4 and world.z_dim == 6
  z = jax.random.normal(jax.random.key(2), (4, 6))
  pictures = drawn(world, z, jnp.array([0, 1, 3, 2]))
  np.testing.assert_allclose(
    pictures[:3], drawn(generator, z, jnp.array([0, 2, 1, 0]))[:3], atol=1e-5
  )  # one-hot rows: classes
  np.testing.assert_allclose(pictures, drawn(generator, z, bank[np.array([0, 1, 3, 2])]), atol=1e-5)
  with pytest.raises(UserError, match=r'prompts are \(3,\)'):
    prompts(generator, bank[0])
  with pytest.raises(UserError, match='expected finite'):
    prompts(generator, bank * np.nan)
  with pytest.raises(UserError, match='no classes'):
    prompts(SimpleNamespace(num_classes=0), bank)


class Told(LinearGenerator):
  """Takes vectors for labels: the class offsets mixed by them."""

  @staticmethod
  def apply(variables, z, labels, truncation_psi=1.0):
    small = jnp.tanh(truncation_psi * z @ variables['w'] + labels @ variables['offset'])
    return small.reshape(-1, 8, 8, 1).repeat(5, 1).repeat(5, 2)

  image_shape = (40, 40, 1)


def test_views_compute_in_the_type_of_what_they_show(generator):
  """And generators that know only one stay as they are."""
  inner = Told()
  assert views.with_dtype(prompts(inner, np.eye(3)), jnp.bfloat16).generator is inner
  half = views.with_dtype(views.cropped(generator, 1), jnp.bfloat16)
  z, labels = np.ones((1, generator.z_dim), np.float32), np.zeros(1, np.int32)
  drawn = half.apply(half.variables, z, labels)
  wanted = generator.with_dtype(jnp.bfloat16).apply(generator.variables, z, labels)
  np.testing.assert_array_equal(drawn, wanted[:, 1:-1, 1:-1])
  assert not np.array_equal(wanted, generator.apply(generator.variables, z, labels))


@pytest.mark.slow
def test_a_world_of_prompts_is_played_in_with_momentum_and_seen_in_stacks():
  c = nature_config()
  c.environment.update(dict(dynamics='momentum', stack=3))
  c.pretrain.record = True
  c.pretrain.iterations_per_call = 4
  world_of, mesh = prompts(Told(), np.eye(3)[[0, 2, 1, 1, 0]]), devices.make_mesh()
  program, world = pretrain.make_program(c, world_of, mesh), worlds.make_world(c, world_of, mesh)
  state = program.init(jax.random.key(0), world)
  assert set(np.asarray(state.env.label)) <= set(range(5))
  assert not np.any(state.env.velocity)
  state, output = program.call(state, world)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(output.metrics)))
  assert int(state.iteration) == 4 and np.abs(state.env.velocity).max() > 0

  z, label, step = jax.device_get(output.experience)  # (rows, E, ...): the record
  draw = lambda z, label: to_uint8(world_of.apply(world.variables, z, label))
  pictures = experience.frames(output.experience, draw)
  ring = np.asarray(state.ring.frames).reshape(-1, 16, 40, 40, 3)
  for row in range(len(step) - len(ring), len(step)):
    for age in range(3):  # the newest picture is the last channel
      expected = np.where((step[row] >= age)[:, None, None], pictures[row - age, ..., 0], 0)
      differ = np.abs(ring[row % len(ring), ..., 2 - age].astype(int) - expected)
      assert differ.max() <= 1 and np.mean(differ > 0) < 0.01  # compiled into another program


def test_a_config_opens_the_door_to_w():
  c = nature_config()
  c.generator.path, c.environment.latent_space = 'cifar10-small', 'w'
  world = worlds.load_world_generator(c, None)
  assert isinstance(world, WLatents) and (world.z_dim, world.num_classes) == (64, 10)
  c.environment.latent_space = 'y'
  with pytest.raises(
    UserError, match="environment.latent_space='y' is unknown: choose one of z, w"
  ):
    pretrain.check(c, 8)


def test_fine_layers_take_another_style(generator):
  """The other latent is a function of the latent: the same picture for the same latent, another
  fine style for any other."""
  z, labels = jax.random.normal(jax.random.key(2), (3, 6)), jnp.array([0, 1, 2])
  network = generator.network
  mixed = style_mixed(generator, 2)
  first = drawn(mixed, z, labels)
  np.testing.assert_array_equal(first, drawn(mixed, z, labels))
  np.testing.assert_allclose(first[1], drawn(mixed, z[1:], labels[1:])[0], atol=1e-5)
  assert np.abs(first - drawn(generator, z, labels)).max() > 1e-3
  near = drawn(mixed, z + 1e-6, labels)  # coarse layers alike, fine ones not
  assert np.abs(first - near).max() > 1e-3 > np.abs(z - (z + 1e-6)).max()

  @jax.jit
  def by_hand(variables):
    other = jax.vmap(views._another_latent)(z)
    coarse, fine = (network.apply(variables, x, labels, method='mapping') for x in (z, other))
    ws = jnp.concatenate([coarse[:, :2], fine[:, 2:]], 1)
    return network.apply(variables, ws, method='synthesis')

  want = by_hand(generator.variables)
  np.testing.assert_allclose(first, want, atol=1e-5)
  for layer in (0, network.num_ws):
    with pytest.raises(UserError, match=f'environment.style_mixing={layer}: expected one of 1 to'):
      style_mixed(generator, layer)


def test_the_other_latents_are_standard_normal():
  z = jax.random.normal(jax.random.key(2), (2000, 6))
  other = np.asarray(jax.vmap(views._another_latent)(z))
  assert stats.kstest(other.ravel(), 'norm').pvalue > 1e-3
  correlation = np.corrcoef(np.asarray(z).T, other.T)[:6, 6:]
  assert np.abs(correlation).max() < 5 / np.sqrt(2000)


def test_a_margin_is_cut_off(generator):
  world, z, labels = (
    cropped(generator, 2),
    jax.random.normal(jax.random.key(2), (3, 6)),
    jnp.array([0, 1, 2]),
  )
  assert world.image_shape == (4, 4, 1) and (world.z_dim, world.num_classes) == (6, 3)
  np.testing.assert_array_equal(drawn(world, z, labels), drawn(generator, z, labels)[:, 2:6, 2:6])
  for margin in (4, -1):
    with pytest.raises(UserError, match=f'environment.crop={margin} of pictures of 8x8'):
      cropped(generator, margin)
