"""A device that is asked for and not there."""

import jax
import pytest

from palm_jax.base import devices
from palm_jax.base.errors import UserError


@pytest.mark.parametrize(
  'asked, extra', [('cuda', 'cuda12'), ('tpu', 'tpu'), ('cpu,gpu', 'cuda12')]
)
@pytest.mark.parametrize(
  'error',
  [AssertionError(), RuntimeError("Unable to\ninitialize (set JAX_PLATFORMS='' to choose)")],
)
def test_no_device_is_one_line_that_says_what_to_install(monkeypatch, asked, extra, error):
  def fail():
    raise error

  monkeypatch.setenv('JAX_PLATFORMS', asked)
  monkeypatch.setattr(jax, 'devices', fail)
  with pytest.raises(UserError) as caught:
    devices.make_mesh()
  reason = '; RuntimeError: Unable to initialize' if str(error) else ''
  assert str(caught.value).startswith(f'JAX finds no device (JAX_PLATFORMS={asked}{reason}): ')
  assert f"pip install -e '.[{extra}]'; else set JAX_PLATFORMS=cpu" in str(caught.value)
  assert str(devices.missing()) == str(caught.value)


@pytest.mark.parametrize('asked, wrong', [('nonsense', 'nonsense'), ('cpu,CPU', 'CPU'), (',', '')])
def test_an_unknown_platform_is_named(monkeypatch, asked, wrong):
  def fail():
    raise RuntimeError

  monkeypatch.setenv('JAX_PLATFORMS', asked)
  monkeypatch.setattr(jax, 'devices', fail)
  with pytest.raises(
    UserError, match=f'JAX_PLATFORMS={asked}: {wrong!r} is unknown: set cpu, cuda'
  ):
    devices.make_mesh()


def test_whatever_else_jax_raises_is_no_missing_device():
  assert devices.missing() is None


def test_layers_that_no_device_holds_are_named():
  mesh = devices.make_mesh(1)
  devices.check_layers({'a.hidden': (256, 256)}, 3, mesh)
  with pytest.raises(UserError, match=r'a.hidden=\(65536, 65536, 65536\) take .* lower a.hidden'):
    devices.check_layers({'a.hidden': (65_536,) * 3}, 100, mesh)


def test_keys_are_put_on_every_device():
  mesh = devices.make_mesh(4)
  keys = jax.random.split(jax.random.key(3, impl='rbg'), 5)
  [put] = devices.replicate(mesh, [keys])
  assert put.sharding.is_fully_replicated and len(put.sharding.device_set) == 4
  assert (put == keys).all() and jax.random.key_impl(put) == jax.random.key_impl(keys)


def test_memory_is_what_the_control_groups_leave(tmp_path):
  groups, root = tmp_path / 'cgroup', tmp_path / 'fs'

  def limit(lines, **files):
    groups.write_text(lines)
    for name, text in files.items():
      path = root / name.replace('__', '/').replace('_max', '.max')
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text(text)
    return devices._cgroup_memory(groups, root)

  none = limit('0::/\n')
  assert none > 2**50 and devices._cgroup_memory(tmp_path / 'absent', root) == none
  assert limit('0::/a/b\n', a__b__memory_max='max\n', a__memory_max='7000\n') == 7000
  assert limit('0::/of/the/host\n', memory_max='5000\n') == 5000  # as within a container
  (root / 'memory' / 'a').mkdir(parents=True)
  (root / 'memory' / 'a' / 'memory.limit_in_bytes').write_text('3000\n')
  assert limit('4:memory:/a\n3:cpu:/a\n') == 3000
  assert 0 < devices.machine_memory() <= none
