"""A device that is asked for and not there."""

import jax
import pytest

from palm_jax.base import devices
from palm_jax.base.errors import UserError


@pytest.mark.parametrize('asked, extra', [('cuda', 'cuda12'), ('tpu', 'tpu'), ('x', 'cuda12')])
@pytest.mark.parametrize('error', [AssertionError(), RuntimeError('Unable to\ninitialize')])
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
