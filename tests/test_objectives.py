"""BYOL, VICReg and Barlow Twins against their equations, term by term in float64, and on eight
devices against one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from palm_jax import monitors, objectives, simsiam
from palm_jax.base import devices
from palm_jax.base.errors import UserError
from tests.test_contrastive import in_numpy as supcon_in_numpy
from tests.test_simsiam import TinyEncoder, numpy_forward, small_config

B, D = 16, 5
# Unequal spreads and offsets, so that each term of VICReg has something to say.
SHAPED = np.random.default_rng(0).normal(size=(4, B, D)) * np.linspace(0.2, 2, D) + 0.3
P1, P2, Z1, Z2 = SHAPED
Z2 = 0.7 * Z1 + 0.3 * Z2


def byol_in_numpy(p1, t1, p2, t2):
  """Equation 2: squared distance of unit vectors, both ways."""
  unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
  ways = ((p1, t2), (p2, t1))
  return sum(((unit(p) - unit(t)) ** 2).sum(1).mean() for p, t in ways)


def vicreg_in_numpy(z1, z2):
  """Equations 1 to 6, and the mean over dimensions of algorithm 1 for the invariance."""
  total = 25 * ((z1 - z2) ** 2).mean()
  for z in (z1, z2):
    deviations = np.sqrt(z.var(axis=0, ddof=1) + 1e-4)
    total += 25 * np.maximum(0, 1 - deviations).mean()
    c = np.cov(z, rowvar=False)
    total += sum(c[i, j] ** 2 for i in range(D) for j in range(D) if i != j) / D
  return total


def barlow_in_numpy(z1, z2):
  """Equation 1 with the cross-correlation of equation 2, and batch norm's epsilon."""
  a, b = ((z - z.mean(0)) / np.sqrt(z.var(0) + 1e-5) for z in (z1, z2))
  total = 0.0
  for i in range(D):
    for j in range(D):
      c = (a[:, i] * b[:, j]).mean()
      total += (1 - c) ** 2 if i == j else 0.0051 * c**2
  return total


CASES = {
  'byol': (objectives.byol, byol_in_numpy, (P1, Z1, P2, Z2)),
  'vicreg': (objectives.vicreg, vicreg_in_numpy, (Z1, Z2)),
  'barlow': (objectives.barlow, barlow_in_numpy, (Z1, Z2)),
}


@pytest.mark.parametrize('name', CASES)
def test_they_equal_their_equations(name):
  f, in_numpy, arrays = CASES[name]
  narrow = [np.float32(x) for x in arrays]
  np.testing.assert_allclose(f(*narrow), in_numpy(*arrays), rtol=1e-5)
  assert f(*(jnp.asarray(x, jnp.bfloat16) for x in arrays)).dtype == jnp.float32


@pytest.mark.parametrize('count', [8, pytest.param(2, marks=pytest.mark.slow)])
def test_values_and_gradients_do_not_depend_on_the_number_of_devices(count):
  """All in one program, against the whole batch on one device."""
  cases = list(CASES.values())
  arrays = [arrays for _, _, arrays in cases]

  def losses(arrays, axis_name=None):
    each = zip(cases, arrays, strict=True)
    return jnp.stack([f(*xs, axis_name=axis_name) for (f, _, _), xs in each])

  def differentiated(losses):
    total = lambda arrays: (losses(arrays).sum(), losses(arrays))
    return jax.jit(jax.grad(total, has_aux=True))(arrays)

  sharded = jax.shard_map(
    functools.partial(losses, axis_name='data'),
    mesh=devices.make_mesh(count),
    in_specs=(P('data'),),
    out_specs=P(),
  )
  with jax.enable_x64(True):
    (grads, values), (whole, of_whole) = differentiated(sharded), differentiated(losses)
  expected = [in_numpy(*arrays) for _, in_numpy, arrays in cases]
  np.testing.assert_allclose(values, expected, rtol=1e-12)
  np.testing.assert_allclose(of_whole, expected, rtol=1e-12)
  for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(whole), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-11)


def test_ends_of_their_ranges():
  np.testing.assert_allclose(objectives.byol(P1, P2, 3 * P2, 2 * P1), 0, atol=1e-6)
  np.testing.assert_allclose(objectives.byol(P1, P2, -P2, -P1), 8, atol=1e-5)
  np.testing.assert_allclose(objectives.byol(P1, None, None, -P1), 4, atol=1e-5)
  gradient = jax.grad(objectives.byol, (0, 1, 2, 3))(*map(np.float32, (P1, Z1, P2, Z2)))
  assert [bool(np.any(g)) for g in gradient] == [True, False, True, False]  # targets are fixed
  # Orthogonal columns of deviation 1: nothing is left to do.
  perfect = np.linalg.qr(np.concatenate([np.ones((B, 1)), SHAPED[0]], axis=1))[0][:, 1:]
  np.testing.assert_allclose(objectives.barlow(perfect, perfect), 0, atol=1e-3)
  perfect = perfect * np.sqrt(B - 1)
  np.testing.assert_allclose(objectives.vicreg(perfect, perfect), 0, atol=1e-4)
  for f in (objectives.vicreg, objectives.barlow):  # a collapsed batch
    value, gradient = jax.value_and_grad(f)(jnp.ones((B, D)), jnp.ones((B, D)))
    np.testing.assert_allclose(value, 2 * 25 * 0.99 if f is objectives.vicreg else D, rtol=1e-5)
    assert np.all(np.isfinite(gradient))


def test_target_follows_by_a_cosine_to_one():
  """BYOL 3.2: tau_k = 1 - (1 - tau) (cos(pi k / K) + 1) / 2."""
  rate = objectives.target_rate(0.996, 200)
  for k in (0, 50, 100, 199, 200):
    tau = 1 - (1 - 0.996) * (np.cos(np.pi * k / 200) + 1) / 2
    np.testing.assert_allclose(1 - rate(k), tau, atol=1e-7)
  target = {'encoder': {'w': np.float32([1, 2])}}
  params = {'encoder': {'w': np.float32([3, 0])}, 'predictor': {'w': np.zeros(1)}}
  after = objectives.follow(target, params, 0.25)
  assert set(after) == {'encoder'}
  np.testing.assert_allclose(after['encoder']['w'], [1.5, 1.5])


@functools.cache
def pairs():
  rng = np.random.default_rng(0)
  s, other = (rng.uniform(-1, 1, (16, 4, 4, 3)).astype(np.float32) for _ in range(2))
  return s, 0.5 * s + 0.5 * other


def made(objective, **changes):
  """(config, modules, params, batch_stats) on a tiny encoder."""
  config = small_config(objective=objective, **changes)
  modules = simsiam.make_modules(TinyEncoder(), config)
  return config, modules, *simsiam.init(modules, jax.random.key(0), pairs()[0])


def test_byol_in_the_forward_pass():
  """The target has other weights and the batch's own statistics, which it leaves as they are."""
  config, modules, params, batch_stats = made('byol')
  assert 'norm2' not in batch_stats['projector']  # BYOL has none there
  target = simsiam.first_target(params, config)['target']
  assert set(target) == {'encoder', 'projector'}
  target = jax.tree.map(lambda x: 0.8 * x + 0.1, target)
  s, s_next = pairs()

  def forward(params, target):
    return simsiam.forward(
      modules, params, batch_stats, s, s_next, target=target, **simsiam.options(config)
    )

  (value, aux), gradient = jax.jit(jax.value_and_grad(forward, has_aux=True))(params, target)
  online, stats = numpy_forward(params, batch_stats, (s, s_next))
  fixed, _ = numpy_forward(params | target, batch_stats, (s, s_next))
  expected = byol_in_numpy(online[0][2], fixed[0][1], online[1][2], fixed[1][1])
  np.testing.assert_allclose(value, expected, rtol=1e-4)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), aux.batch_stats, stats)
  assert all(np.any(g) for g in jax.tree.leaves(gradient['encoder']))


@pytest.mark.parametrize('objective', ['simclr', 'supcon'])
def test_the_contrastive_ones_in_the_forward_pass(objective):
  config, modules, params, stats = made(objective, temperature=0.2, symmetric=False)
  assert simsiam.options(config)['symmetric'] is False
  s, s_next = pairs()
  labels, related = np.arange(16) % 4, np.arange(16) // 2

  @jax.jit
  def forward(params):
    given = dict(labels=labels, **simsiam.options(config))
    masked, _ = simsiam.forward(modules, params, stats, s, s_next, related=related, **given)
    return *simsiam.forward(modules, params, stats, s, s_next, **given), masked

  value, aux, masked = forward(params)
  kinds = labels if objective == 'supcon' else np.arange(16)
  z, z_next = (np.asarray(x, np.float64) for x in (aux.z, aux.z_next))
  np.testing.assert_allclose(value, supcon_in_numpy(z, z_next, kinds, 0.2), rtol=1e-4)
  assert abs(masked - value) > 1e-3


def test_the_others_in_the_forward_pass():
  changes = dict(vicreg_weights=(10.0, 20.0, 3.0), barlow_lambda=0.1)
  made_of = {name: made(name, **changes) for name in ('vicreg', 'barlow')}
  s, s_next = pairs()

  def forward(name, params):
    config, modules, _, batch_stats = made_of[name]
    assert not simsiam.first_target(params, config)
    return simsiam.forward(modules, params, batch_stats, s, s_next, **simsiam.options(config))

  with_gradient = lambda name, params: jax.value_and_grad(
    functools.partial(forward, name), has_aux=True
  )(params)
  all_params = {name: params for name, (_, _, params, _) in made_of.items()}
  found = jax.jit(lambda trees: {name: with_gradient(name, x) for name, x in trees.items()})(
    all_params
  )
  for name, ((value, aux), gradient) in found.items():
    z, z_next = aux.z, aux.z_next
    if name == 'vicreg':
      expected = objectives.vicreg(z, z_next, (10, 20, 3))
    else:
      expected = objectives.barlow(z, z_next, 0.1)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert not any(np.any(g) for g in jax.tree.leaves(gradient['predictor']))
    assert ('norm2' in made_of[name][3]['projector']) == (name == 'barlow')


def test_monitors_see_a_collapse_whatever_the_objective():
  """VICReg's projections may lie far from the origin; those of the others may not."""
  z = np.random.default_rng(0).normal(size=(256, 64))
  ratio = lambda z, objective: float(simsiam.spread(z, objective, None)['z_std_ratio'])
  warned = lambda z, objective: bool(monitors.troubles({'z_std_ratio': ratio(z, objective)}))
  for objective in simsiam.OBJECTIVES:
    assert ratio(z, objective) == pytest.approx(1, abs=0.1) and not warned(z, objective)
    assert warned(1e-3 * z + 1, objective)
  assert not warned(z + 50, 'vicreg') and warned(z + 50, 'byol') and ratio(3 * z, 'vicreg') <= 1
  unit = z / np.linalg.norm(z, axis=1, keepdims=True)
  found = simsiam.spread(np.float32(z), 'byol', None)['z_std']
  np.testing.assert_allclose(found, unit.std(0).mean(), rtol=1e-5)


def test_settings():
  config = simsiam.default_config()
  for changes, message in (
    (dict(objective='boyl'), "simsiam.objective='boyl' is unknown .did you mean byol"),
    (dict(vicreg_weights=(25.0, 1.0)), 'simsiam.vicreg_weights=.*expected three'),
    (dict(vicreg_weights=(25.0, -1.0, 1.0)), 'simsiam.vicreg_weights=-1'),
    (dict(tau=1.5), 'simsiam.tau=1.5'),
    (dict(barlow_lambda=-0.1), 'simsiam.barlow_lambda=-0.1'),
  ):
    changed = config.copy_and_resolve_references()
    changed.update(changes)
    with pytest.raises(UserError, match=message):
      simsiam.check(changed)
