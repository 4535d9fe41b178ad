"""Which world and record a training or a record is of: it does not go on in another."""

import os
from collections.abc import Mapping

from palm_jax.base.errors import UserError
from palm_jax.world.dataset import FEATURES, WORLD, identity
from palm_jax.world.manifold import LatentManifold

NAMES = {WORLD: 'generator', FEATURES: 'encoder'}


def of_world(world: LatentManifold | None) -> dict[str, str]:
  """{'generator', 'encoder': digest}; {} of None, an environment of Gymnasium's own."""
  return {NAMES[key]: value for key, value in identity(world).items()} if world else {}


def check(
  path: str | os.PathLike, before: Mapping[str, str] | None, now: Mapping[str, str]
) -> None:
  """Raises UserError where what is at a path was made with another generator, encoder or record.

  Args:
    path: of a training or a record.
    before: {name: digest} as it says; what older versions wrote says nothing, and fits any.
    now: {name: digest}.
  """
  before = before or {}
  other = [
    f'another {name} (digest {before[name][:12]}, now {value[:12]})'
    for name, value in now.items()
    if before.get(name, value) != value
  ]
  if other:
    raise UserError(
      f'{path} was made with {" and ".join(other)} than there is now: give back what it was made '
      'with, or choose another --workdir'
    )
