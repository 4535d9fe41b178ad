"""Networks out of other people's files: NVIDIA's snapshots, state dicts, arrays by name."""

import contextlib
import math
import os
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from palm_jax.base.errors import UserError
from palm_jax.formats.arrays import check_numbers, read_arrays
from palm_jax.formats.kinds import SnapshotError, kind_of
from palm_jax.formats.pickle_values import short
from palm_jax.formats.torch_files import MAX_NAME, read
from palm_jax.generator import layouts, parts
from palm_jax.generator.discriminator import Discriminator
from palm_jax.generator.official import (
  discriminator_from_official,
  generator_from_official,
  rescaled,
)
from palm_jax.generator.official3 import stylegan3_from_official
from palm_jax.generator.stylegan2 import LR_MULTIPLIER, Generator
from palm_jax.generator.stylegan3 import StyleGAN3

# What a network does besides its tensors, and what is assumed where a file does not say.
ASSUMED = dict(conv_clamp=None, lr_multiplier=LR_MULTIPLIER, activation='lrelu', mbstd_group=4)
MAX_RESOLUTION = 2048
MAX_WIDTH = 1 << 16  # of latents
DRAWS = 10_000  # latents, of which a missing w_avg is the mean
DRAWN_NUMBERS = 1 << 22  # at once


def load_snapshot(
  path: str | os.PathLike, network: str = 'G_ema'
) -> tuple[Generator | StyleGAN3, dict]:
  """A generator out of a file that another program wrote.

  Args:
    path: a file with a StyleGAN2 in the layout of stylegan2-ada-pytorch, or of rosinality's
      stylegan2-pytorch: a snapshot or a state_dict (pickle, torch.save), an .npz or a .safetensors;
      or a snapshot of NVlabs/stylegan3. Tensors may stand below a prefix
      ('G_ema/synthesis.b4.const', 'decoder.conv1...'). Files without the network's objects may give
      the settings of `ASSUMED` as entries (.npz) or metadata (.safetensors).
    network: 'G_ema', the average over the training, or 'G'. A network without a label is both.

  Returns:
    (network, variables): float32 numpy arrays. Networks that ran partly in float16 run in
      float32.

  Raises:
    SnapshotError: no such file, damage, numbers that are not finite, or a network that ours are
      not.
  """
  path = pathlib.Path(path)
  if network not in ('G', 'G_ema'):
    raise UserError(f'network {network!r}: expected G_ema (the average over the training) or G')
  with _path_in_errors(path):
    settings: dict[str, Any]
    found, contents, settings = _open(path, network)
    state, module = found.arrays, found.module
    if found.layout == 'stylegan3':
      G3, variables = stylegan3_from_official(state, module)
      _log(path, found.label or network, G3, G3.image_shape, _latents(G3), variables)
      return G3, variables
    average = layouts.latent_average(contents, state)
    if average is not None:
      check_numbers({'latent_avg': average})
    if found.layout == 'rosinality':
      module = None  # its objects are of other classes
      state = layouts.official_names(state)
    elif module is not None:
      settings = parts.check_generator(module, network)
      state = rescaled(state, parts.lr_multipliers(module))
      state = _silenced(state, parts.without_noise(module))
    if module is None:
      if 'lr_multiplier' not in settings:
        _doubt_multiplier(path, state)
      settings = _settings(path, settings, 'conv_clamp', 'lr_multiplier', 'activation')
      state = rescaled(state, dict.fromkeys(_mapping_layers(state), settings['lr_multiplier']))
    if average is not None:
      state = {'mapping.w_avg': average, **state}
    G, variables = generator_from_official(state, conv_clamp=settings['conv_clamp'])
    sizes = G.z_dim, G.w_dim, G.image_channels, *G.channels
    if not 0 < min(sizes) <= max(sizes) <= MAX_WIDTH:
      raise SnapshotError(f'sizes of {sizes}: expected 1 to {MAX_WIDTH}; it is damaged')
    if module is not None:
      parts.check_sizes(
        module,
        z_dim=G.z_dim,
        w_dim=G.w_dim,
        c_dim=G.num_classes,
        img_resolution=G.resolution,
        img_channels=G.image_channels,
        num_ws=G.num_ws,
      )
    if 'mapping.w_avg' not in state:
      logging.info(f'{path} holds no average of w: it is the mean of {DRAWS} drawn w')
      variables['buffers']['w_avg'] = mean_w(G, variables)
  more = f'{_latents(G)}, conv_clamp {G.conv_clamp}'
  _log(path, found.label or network, G, G.image_shape, more, variables)
  return G, variables


def load_discriminator(path: str | os.PathLike) -> tuple[Discriminator, dict]:
  """The discriminator 'D' of a file as for `load_snapshot`, in NVIDIA's layout.

  Returns:
    (Discriminator, variables): float32 numpy arrays.

  Raises:
    SnapshotError: as `load_snapshot`.
  """
  path = pathlib.Path(path)
  with _path_in_errors(path):
    found, _, settings = _open(path, 'D')
    state, module = found.arrays, found.module
    if module is not None:
      settings = parts.check_discriminator(module, 'D')
      state = rescaled(state, parts.lr_multipliers(module))
    else:
      settings = _settings(path, settings, *ASSUMED)
      state = rescaled(state, dict.fromkeys(_mapping_layers(state), settings['lr_multiplier']))
    group = settings['mbstd_group']
    if type(group) is not int or not 0 < group < 1 << 31:
      raise SnapshotError(
        f'mbstd_group={short(group)}, expected a positive number: a discriminator of another kind'
      )
    D, variables = discriminator_from_official(
      state, mbstd_group=group, conv_clamp=settings['conv_clamp']
    )
    if module is not None:
      parts.check_sizes(
        module, c_dim=D.num_classes, img_resolution=D.resolution, img_channels=D.image_channels
      )
  shape = D.resolution, D.resolution, D.image_channels
  _log(path, 'D', D, shape, f'{D.architecture}, minibatch-std group {D.mbstd_group}', variables)
  return D, variables


def mean_w(
  G: Generator, variables: Any, each_class: bool = False, draws: int = DRAWS
) -> np.ndarray:
  """The mean of mapped latents, to which truncation pulls.

  Args:
    G: the network.
    variables: {'params', 'buffers'}.
    each_class: whether each class has a mean of its own; else labels are drawn, too.
    draws: number of latents (of each class) at least, from a fixed key.

  Returns:
    (w_dim,), or (num_classes, w_dim); float32.
  """
  count = max(1, min(draws, DRAWN_NUMBERS // G.z_dim))

  @jax.jit
  def mean(variables, label):
    def some(i):
      z = jax.random.normal(jax.random.fold_in(jax.random.key(0), i), (count, G.z_dim))
      drawn = (i * count + jnp.arange(count)) % max(G.num_classes, 1)
      labels = jnp.where(label < 0, drawn, label)
      ws: Any = G.apply(variables, z, labels, method='mapping')
      return ws[:, 0].mean(0)

    return jax.lax.map(some, jnp.arange(-(-draws // count))).mean(0)

  with jax.default_matmul_precision('highest'):
    if not each_class:
      return np.asarray(mean(variables, -1))
    return np.stack([mean(variables, k) for k in range(G.num_classes)])


@contextlib.contextmanager
def _path_in_errors(path):
  """Puts the path before what is wrong, once.

  What damaged sizes lead to becomes a SnapshotError too.
  """
  try:
    yield
  except UserError as e:
    message, kind = str(e), type(e) if isinstance(e, SnapshotError) else SnapshotError
    raise kind(message if message.startswith(f'{path}') else f'{path}: {message}') from e
  except (ArithmeticError, AttributeError, LookupError, MemoryError, TypeError, ValueError) as e:
    raise SnapshotError(
      f'{path}: the weights do not belong together ({type(e).__name__}); fetch or save it again'
    ) from e


def _open(path, network):
  """(layouts.Found, what the file holds, its {setting: text})."""
  in_objects = kind_of(path) == 'torch'
  if in_objects:
    contents, settings = read(path), {}
  else:
    contents, settings = read_arrays(path)
    settings |= {name: str(contents.pop(name)) for name in ASSUMED if name in contents}
  found = layouts.find(contents, network)
  arrays = found.arrays
  if in_objects and sum(x.nbytes for x in arrays.values()) > path.stat().st_size:
    raise SnapshotError(f'{network} names the same numbers twice; it is damaged')
  for name in arrays:
    if not name.isprintable() or len(name) > MAX_NAME:
      raise SnapshotError(f'{name[:40]!r} in it is no name of a tensor; it is damaged')
  resolutions = [int(r) for name in arrays for r in re.findall(r'\bb(\d{1,9})\.', name)]
  if max(resolutions, default=0) > MAX_RESOLUTION:
    raise SnapshotError(f'resolution {max(resolutions)}: expected at most {MAX_RESOLUTION}')
  check_numbers(arrays)
  return found, contents, settings


def _settings(path, given, *names) -> dict[str, Any]:
  """{name: value} of the settings of a network without objects."""
  unsaid = ', '.join(f'{name}={ASSUMED[name]}' for name in names if name not in given)
  if unsaid:
    logging.info(f'{path} does not say {unsaid}: assumed. An entry of that name would say it')
  settings = {
    name: ASSUMED[name] if given.get(name, '') in ('', 'None') else _setting(name, given[name])
    for name in names
  }
  if settings.get('activation', 'lrelu') != 'lrelu':
    raise SnapshotError(
      f'activation={short(settings["activation"])}, expected lrelu: a network of another kind, '
      'whose images would differ'
    )
  return settings


def _setting(name, text):
  if name == 'activation':
    return text
  whole = name == 'mbstd_group'
  try:
    number = int(text) if whole else float(text)
  except ValueError:
    number = math.nan
  if not 0 < number < (1 << 31 if whole else math.inf):
    raise SnapshotError(f'{name}={short(text)}, expected a positive number')
  return number


def _doubt_multiplier(path, state):
  """Warns where weights of the mapping are not as large as LR_MULTIPLIER makes them."""
  weights = [state[f'{layer}.weight'] for layer in _mapping_layers(state)]
  size = np.sqrt(np.mean([np.square(x, dtype=np.float64).mean() for x in weights or [np.ones(1)]]))
  if weights and not 1 / 3 < size * LR_MULTIPLIER < 3:
    logging.warning(
      f'{path}: the weights of its mapping are {size:.2g} large, as lr_multiplier={1 / size:.1g} '
      f'would make them, but it says none and {LR_MULTIPLIER} is assumed: its pictures are '
      'probably wrong. Save it as .npz with an entry lr_multiplier'
    )


def _mapping_layers(state):
  names = (re.fullmatch(r'(mapping\.fc\d+)\.weight', name) for name in state)
  return [match[1] for match in names if match]


def _silenced(state, layers):
  """The tensors with layers that add no noise."""
  return {**state, **{f'{layer}.noise_strength': np.zeros((), np.float32) for layer in layers}}


def _latents(network):
  return f'z {network.z_dim}, w {network.w_dim}'


def _log(path, label, module, image_shape, more, variables):
  height, width, channels = image_shape
  count = sum(x.size for x in jax.tree.leaves(variables['params']))
  logging.info(
    f'{path}: {label}, {height} x {width} x {channels}, {module.num_classes} classes, {more}, '
    f'{module.mapping_layers} mapping layers, channels {module.channels}, {count} parameters'
  )
