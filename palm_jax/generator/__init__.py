"""Picture generators behind one protocol."""
import dataclasses
import json
import pathlib
from typing import Any

from palm_jax.checkpoint import load_item
from palm_jax.errors import UserError
from palm_jax.generator.stylegan2 import Generator


@dataclasses.dataclass(frozen=True)
class LoadedGenerator:
  """A network with its variables; `apply` is pure, so that variables can be arguments of a compiled function."""
  network: Generator
  variables: Any  # {'params', 'buffers'}

  @property
  def z_dim(self):
    return self.network.z_dim

  @property
  def num_classes(self):
    return self.network.num_classes

  @property
  def image_shape(self):
    return self.network.image_shape

  def apply(self, variables, z, labels, truncation_psi=1., truncation_cutoff=None, noise='const', noise_keys=None):
    """z (N, z_dim), labels (N,) int -> (N, H, W, C) images, nominally in [-1, 1], at least float32.

    noise 'random' takes noise_keys, (N,) typed keys.
    """
    return self.network.apply(variables, z, labels, truncation_psi, truncation_cutoff, noise, noise_keys)

  def __call__(self, z, labels, truncation_psi=1., truncation_cutoff=None, noise='const', noise_keys=None):
    return self.apply(self.variables, z, labels, truncation_psi, truncation_cutoff, noise, noise_keys)


def load_generator(path):
  """The newest averaged generator (G_ema) of a run.

  Args:
    path: workdir of a palm_jax run whose generator job has saved at least once.

  Returns:
    LoadedGenerator with variables as numpy arrays.

  Raises:
    UserError: the path is no such workdir, or its checkpoints are damaged.
  """
  folder = pathlib.Path(path) / 'generator'
  try:
    fields = json.loads((folder / 'network.json').read_text())
    network = Generator(**dict(fields, channels=tuple(fields['channels'])))
  except (OSError, ValueError, TypeError, KeyError) as e:
    raise UserError(f'{path} holds no generator ({type(e).__name__} on generator/network.json): give the workdir of a '
                    'palm_jax run whose generator job has started') from e
  return LoadedGenerator(network, load_item(folder / 'checkpoints', 'generator')[1])
