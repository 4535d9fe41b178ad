"""Finds the network that is asked for in what a file holds, and gives it the official names.

People's files are snapshots of several networks, one network, or tensors by name, in dicts of a
training program's making. A network is known by the names of its tensors.
"""

import dataclasses
import re
from typing import Any

import numpy as np

from palm_jax.formats.kinds import AbsentError, SnapshotError
from palm_jax.formats.pickle_values import Inert
from palm_jax.formats.torch_files import MAX_NAME, modules, state_dict

MAX_DEPTH = 4  # dicts in dicts around a network
MAX_PLACES = 10_000  # in a file, to be looked at
MAX_TENSORS = 1_000_000  # names of all networks in a file, which references may multiply
MAX_LISTED = 16  # things in a list that could be networks
# The tensor that tells a layout, below whatever prefix.
ANCHORS = {
  'stylegan2': 'synthesis.b4.const',
  'stylegan3': 'synthesis.input.freqs',
  'rosinality': 'conv1.conv.modulation.weight',
  'discriminator': 'b4.conv.weight',
}
RECIPE = (
  'only StyleGAN2 and 3 are read from files; for another network see "A generator" in '
  'palm_jax/README.md'
)
LOOKALIKES = [  # as OTHERS; they hold tensors of ANCHORS, too
  (r'embed_proj\.', 'StyleGAN-XL', RECIPE),
  (r'(^|\.)backbone\.synthesis\.', 'EG3D', RECIPE),
]
OTHERS = [  # tensors' names, what has such names, what to do
  (r'(^|\.)(feat_\d+|se_\d+|to_big)\.', 'FastGAN', RECIPE),
  (r'(^|\.)(progression\.\d+|g_mapping|g_synthesis|G_synthesis)\.', 'StyleGAN1', RECIPE),
  (r'(^|\.)(scaleLayers|toRGBLayers|prog_blocks|initial_block\.\d)', 'a progressive GAN', RECIPE),
  (r'(^|\.)(style_mlp|style_conv1)\.', 'StyleGAN2 of BasicSR', 'convert it to the names of '
   "stylegan2-ada-pytorch or of rosinality's stylegan2-pytorch"),
  (r'(^|\.)(style_mapping|initial_conv\.)', 'a StyleGAN of another library', 'convert it to the '
   "names of stylegan2-ada-pytorch or of rosinality's stylegan2-pytorch"),
  (r'(^|\.)(diffusion_model|time_embed|time_embedding|down_blocks)\.', 'a diffusion model', RECIPE),
  (r'(^|\.)(gen_z|shared)\.(weight|embed)', 'BigGAN', RECIPE),
  (r'(^|\.)(conv_in|quant_conv)\.', 'an autoencoder', RECIPE),
  (r'(^|\.)(layer1\.0\.conv1|blocks\.0\.attn|patch_embed)\.?', 'an encoder, not a generator',
   'give the file of a generator'),
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Found:
  """A network in a file.

  Attributes:
    label: where it was, for messages.
    layout: a key of ANCHORS.
    arrays: {name below its prefix: array}.
    module: what the file says of its parts; None where it has tensors only.
  """

  label: str
  layout: str
  arrays: dict[str, np.ndarray]
  module: Inert | None


@dataclasses.dataclass
class _Known:
  """What was found so far: by a holder's id, since it may stand under many names."""

  found: dict[int, Any] = dataclasses.field(default_factory=dict)
  tensors: int = 0  # in all of them


def find(contents: Any, network: str) -> Found:
  """The network 'G_ema', 'G' or 'D' of what `torch_files.read` gives, or of {name: array}.

  One that has no such label counts as G_ema, or as G if that is asked for.

  Raises:
    SnapshotError: it is not there, is there twice, or is of another kind; says what is there.
  """
  places = _places(contents)
  kinds = ('discriminator',) if network == 'D' else ('stylegan2', 'stylegan3', 'rosinality')
  labelled = [place for place in places if _role(place[0]) == network]
  right, known = [], _Known()
  for group in (labelled, places):
    if not right:
      alone = len(group) == 1
      found = [f for label, x in group for f in _networks(label, x, alone, known)]
      right = [f for f in found if f.layout in kinds]
  chosen = [f for f in right if _role(f.label) == network]
  chosen = chosen or [f for f in right if not _role(f.label)]
  chosen = [f for f in chosen if f.label == network] or chosen
  if len(chosen) == 1:
    return chosen[0]
  if chosen:
    places = ', '.join(f.label for f in chosen[:4])
    raise SnapshotError(f'{network} is in it more than once ({places}): save one alone')
  _refuse(network, places, right)
  raise AssertionError


def latent_average(contents: Any, arrays: dict[str, np.ndarray]) -> np.ndarray | None:
  """The mean of w that rosinality's files keep beside the network: (w_dim,), or None."""
  beside = contents.get('latent_avg') if type(contents) is dict else None
  average = arrays.get('latent_avg', beside)
  if not isinstance(average, np.ndarray):
    return None
  rows = average.reshape(-1, average.shape[-1]) if average.ndim else average.reshape(1, 1)
  if not (rows == rows[0]).all():
    raise SnapshotError('its latent_avg has another mean for each layer: save one, of all')
  return rows[0]


def official_names(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Tensors of rosinality's stylegan2-pytorch (model.py) under the official names.

  Their shapes have axes of one more; blur kernels carry the gain 4 of an up-sampling. Layers
  without a noise picture, which older files lack, get one of zeros.

  Raises:
    SnapshotError: names the first tensor that this layout does not have.
  """
  renamed = {}
  for name, x in arrays.items():
    if name == 'latent_avg':
      continue
    place = _official_name(name)
    if place is None:
      raise SnapshotError(
        f"{name[:80]} is no tensor of rosinality's stylegan2-pytorch, whose names the others are; "
        'its images would differ'
      )
    if place.endswith('resample_filter'):
      x = x / 4
    elif place.endswith(('const', 'conv0.weight', 'conv1.weight', 'torgb.weight')):
      x = _without_ones(name, x, 2 if place.endswith('noise_const') else len(x.shape) - 1)
    elif place.endswith('noise_strength'):
      x = _without_ones(name, x, 0)
    elif place.endswith('torgb.bias'):
      x = x.reshape(-1)
    renamed[place] = x
  height, width = renamed['synthesis.b4.const'].shape[1:]
  for name in list(renamed):
    layer, _, kind = name.rpartition('.')
    if kind == 'noise_strength':
      resolution = int(layer.split('.')[1].removeprefix('b'))
      picture = np.zeros((resolution, resolution * width // height), np.float32)
      renamed.setdefault(f'{layer}.noise_const', picture)
  return renamed


def _official_name(name):
  layer = re.fullmatch(r'style\.(\d{1,3})\.(weight|bias)', name)
  if layer:
    return f'mapping.fc{int(layer[1]) - 1}.{layer[2]}'
  if name == 'input.input':
    return 'synthesis.b4.const'
  noise = re.fullmatch(r'noises\.noise_(\d{1,2})', name)
  if noise:
    return f'{_conv(int(noise[1]))}.noise_const'
  parts = {
    'conv.weight': 'weight',
    'conv.modulation.weight': 'affine.weight',
    'conv.modulation.bias': 'affine.bias',
    'conv.blur.kernel': 'resample_filter',
    'upsample.kernel': 'resample_filter',
    'activate.bias': 'bias',
    'noise.weight': 'noise_strength',
    'bias': 'bias',
  }
  where = re.fullmatch(r'(conv1|to_rgb1|convs\.\d{1,2}|to_rgbs\.\d{1,2})\.(.+)', name)
  if not where or where[2] not in parts:
    return None
  kind, _, index = where[1].partition('.')
  if kind.startswith('to_rgb'):
    block = f'synthesis.b{4 << (int(index) + 1 if index else 0)}.torgb'
  else:
    block = _conv(int(index) + 1 if index else 0)
  return f'{block}.{parts[where[2]]}'


def _conv(index):
  """The index-th convolution: one at 4 x 4, then two at each resolution."""
  return f'synthesis.b{4 << (index + 1) // 2}.conv{(index + 1) % 2}'


def _without_ones(name, x, rank):
  """x without axes of one in front, down to `rank` of them."""
  extra = x.ndim - rank
  if extra < 0 or any(n != 1 for n in x.shape[:extra]):
    raise SnapshotError(f'{name} has shape {x.shape}, expected ones before the last {rank} axes')
  return x.reshape(x.shape[extra:])


def _places(contents):
  """[(label, Inert or {name: array})] of all that could be networks."""
  places = []
  looked = {}  # id of a dict: itself, and the arrays in it
  visited = 0

  def visit(label, value, depth):
    nonlocal visited
    visited += 1
    if visited > MAX_PLACES:
      raise SnapshotError('it is too deeply nested for a file of networks; it is damaged')
    if isinstance(value, Inert):
      if '_modules' in value.state or value.class_name.startswith('__torch__'):
        places.append((label, value))
        return
      value = value.state
    if type(value) in (list, tuple):
      value = {f'{i}': inner for i, inner in enumerate(value[:MAX_LISTED])}
    if type(value) is not dict:
      return
    if id(value) not in looked:
      named = [(k, x) for k, x in value.items() if type(k) is str]
      looked[id(value)] = value, {k: x for k, x in named if isinstance(x, np.ndarray)}
    arrays = looked[id(value)][1]
    if arrays:
      places.append((label, arrays))
    for key, inner in value.items():
      if type(key) is str and isinstance(inner, dict | list | tuple | Inert) and depth < MAX_DEPTH:
        visit(f'{label}.{key[:MAX_NAME]}' if label else key[:MAX_NAME], inner, depth + 1)

  visit('', contents, 0)
  return places


def _networks(label, holder, alone, known):
  """[Found] of a module or {name: array}. What is damaged among others has none.

  `known` keeps what was found in it: in a file it may stand under many names.
  """
  if id(holder) not in known.found:
    try:
      arrays = state_dict(holder)
      known.tensors += len(arrays)
      known.found[id(holder)] = _unlabelled(holder, arrays)
    except SnapshotError as e:
      known.found[id(holder)] = e
    if known.tensors > MAX_TENSORS:
      raise SnapshotError('it names too many tensors for a file of networks; it is damaged')
  found = known.found[id(holder)]
  if isinstance(found, SnapshotError):
    if alone:
      raise found
    return []
  if found:
    _refuse_others(found[0][1], LOOKALIKES)
  join = lambda prefix: f'{label}.{prefix}' if label and prefix else label or prefix
  return [Found(join(prefix), *rest) for prefix, _, *rest in found]


def _unlabelled(holder, arrays):
  """[(prefix, names of all tensors, layout, tensors below the prefix, module there)]."""
  of_parts = isinstance(holder, Inert) and '_modules' in holder.state
  parts = dict(modules(holder)) if of_parts else {}
  found = []
  for layout, anchor in ANCHORS.items():
    for name in arrays:
      prefix = name.removesuffix(anchor)
      if prefix == name or (prefix and prefix[-1] not in './'):
        continue
      if len(found) == MAX_LISTED:
        raise SnapshotError('it holds more networks than a snapshot does: save one alone')
      below = {n.removeprefix(prefix): x for n, x in arrays.items() if n.startswith(prefix)}
      found.append((prefix[:-1], arrays, layout, below, parts.get(prefix[:-1])))
  return found


def _role(label):
  """'G_ema', 'G', 'D', or '' of a label that does not say."""
  parts = [part.lower() for part in re.split('[./]', label)]
  averaged = any('ema' in part.split('_') or part == 'gema' for part in parts)
  if any(part in ('d', 'netd', 'discriminator', 'd_ema') for part in parts):
    return 'D'
  if averaged:
    return 'G_ema'
  return 'G' if any(part in ('g', 'netg') for part in parts) else ''


def _refuse(network, places, right):
  roles = sorted({_role(f.label) for f in right} | {_role(label) for label, _ in places} - {''})
  roles = [role for role in roles if role != network]
  # Beside a generator stands what it was trained with, such as an encoder.
  if network != 'D' and not right:
    for holder in {id(holder): holder for _, holder in places}.values():
      _refuse_others(_names(holder), LOOKALIKES + OTHERS)
  generators = [role for role in roles if role != 'D']
  if network != 'D' and generators:
    raise AbsentError(
      f"no {network} in it, but {generators[0]}: ask for that (network='{generators[0]}', or "
      f'--which={generators[0]})'
    )
  known = f', but {", ".join(roles)}' if roles else ''
  kinds = {holder.class_name[:60] for _, holder in places if isinstance(holder, Inert)}
  classes = f' (there is {", ".join(sorted(kinds)[:3])})' if kinds else ''
  raise AbsentError(
    f'no {network} in it{known}{classes}: expected a snapshot or state_dict of StyleGAN2 or 3, '
    'with the names of NVIDIA or rosinality'
  )


def _refuse_others(names, others):
  for pattern, what, remedy in others:
    if any(re.search(pattern, name) for name in names):
      raise SnapshotError(f'it is {what}: {remedy}')


def _names(holder):
  """The names of its tensors, or none where it is no network."""
  try:
    return list(state_dict(holder))
  except SnapshotError:
    return []
