"""Training that starts from trained networks, as --resume of stylegan2-ada-pytorch does."""

import contextlib
import os
from typing import Any

import jax
import numpy as np
from absl import logging

from palm_jax.base.checkpoints import load_item
from palm_jax.base.errors import UserError
from palm_jax.base.files import user_path
from palm_jax.formats.arrays import read_arrays
from palm_jax.formats.kinds import AbsentError, kind_of
from palm_jax.generator import load_generator, snapshots
from palm_jax.generator.saved import NETWORK_KEY
from palm_jax.generator.step import State


def load_networks(path: str | os.PathLike, template: State) -> dict[str, Any]:
  """The networks to start from; optimisers, augmentation and path lengths begin anew.

  Args:
    path: workdir of a palm_jax run whose generator job has saved at least once, a file (see
      `snapshots.load_snapshot`) with G_ema and, where it has them, G and D, or what
      `load_generator` reads else, which has no D. G_ema stands in for a G that is not there.
    template: shapes, dtypes and shardings of the State that they go into.

  Returns:
    Fields of that State: {'G', 'G_ema', 'D'}, the last where there is one.

  Raises:
    UserError: nothing of this kind there, or networks of other sizes.
  """
  given, path = path, user_path(path)
  if (path / 'generator').is_dir():
    try:
      step, state = load_item(path / 'generator' / 'checkpoints', 'state', template=template)
    except UserError as e:
      raise UserError(
        f'generator.init_from={path} is no run with networks of this size: {e}'
      ) from e
    networks = dict(G=state.G, G_ema=state.G_ema, D=state.D)
    after = f'iteration {step}'
  else:
    found = _in_file(given, path)
    networks = {
      name: fit(f'{path}: {name}', tree, getattr(template, name)) for name, tree in found.items()
    }
    after = 'its training'
    if 'D' not in found:
      after += '; there is no D of a known layout, and a new one begins (generator.d_alone_kimg)'
  logging.info('generator: starts from the networks of %s after %s', path, after)
  return networks


def _in_file(given, path):
  """The networks as `load_networks` returns them, but of any size."""
  if not path.is_file() or _is_ours(path):
    variables = load_generator(given).variables
    return dict(G=variables, G_ema=variables)
  averaged = snapshots.load_snapshot(path)[1]
  found = dict(G=averaged, G_ema=averaged)
  with contextlib.suppress(AbsentError):
    found['G'] = snapshots.load_snapshot(path, 'G')[1]
  with contextlib.suppress(AbsentError):
    found['D'] = snapshots.load_discriminator(path)[1]['params']
  return found


def _is_ours(path):
  """Whether a file is of `save_safetensors`."""
  return kind_of(path) == 'safetensors' and NETWORK_KEY in read_arrays(path)[1]


def fit(name: str, tree: Any, template: Any) -> Any:
  """The arrays of `tree` with the dtypes and shardings of `template`.

  Raises:
    UserError: the names and shapes of the arrays are not those of `template`; begins with `name`.
  """
  found, expected = _shapes(tree), _shapes(template)
  for leaf in [*expected, *(found.keys() - expected.keys())]:
    if found.get(leaf) != expected.get(leaf):
      raise UserError(
        f'{name} has {leaf} of shape {found.get(leaf, "(none)")}, this config '
        f'{expected.get(leaf, "(none)")}: set the sizes in config.generator to those of the file; '
        'none fits StyleGAN3, pictures that are not square, and averages of w by class'
      )
  return jax.tree.map(
    lambda x, like: jax.device_put(np.asarray(x, like.dtype), like.sharding), tree, template
  )


def _shapes(tree):
  """{path of a leaf: its shape}."""
  return {
    jax.tree_util.keystr(where, simple=True, separator='/'): np.shape(x)
    for where, x in jax.tree.leaves_with_path(tree)
  }
