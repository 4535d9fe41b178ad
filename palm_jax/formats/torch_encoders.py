"""Encoders under the names of torchvision, timm and torch.nn: their state, and the Python that runs
it."""

import math
from typing import Any

import numpy as np
from flax import traverse_util

# Our modules and leaves -> torchvision/models/resnet.py and torch.nn; other names are the same.
MODULES = {
  'stem_conv': 'conv1',
  'stem_norm': 'bn1',
  'norm1': 'bn1',
  'norm2': 'bn2',
  'norm3': 'bn3',
  'shortcut_conv': 'downsample.0',
  'shortcut_norm': 'downsample.1',
  **{
    f'stage{stage}_block{block}': f'layer{stage}.{block - 1}'
    for stage in range(1, 5)
    for block in range(1, 7)
  },
}
LEAVES = {'kernel': 'weight', 'scale': 'weight', 'mean': 'running_mean', 'var': 'running_var'}
# Ours -> timm/models/vision_transformer.py
VIT = {'class_token': 'cls_token', 'position': 'pos_embed', 'patch': 'patch_embed.proj'}
VIT_BLOCK = {'qkv': 'attn.qkv', 'proj': 'attn.proj', 'fc1': 'mlp.fc1', 'fc2': 'mlp.fc2'}

# ---- the Python; `path` and `images`, (N, H, W, C) uint8 numpy, are the reader's

RESNET = """\
import torch
from safetensors.torch import load_file
from torchvision.models import {name}

model = {name}()
"""
# torchvision's width_per_group does not fit: of a BasicBlock it must be 64, and of a Bottleneck it
# leaves the outer channels as they are.
NARROW_RESNET = """\
import torch
from safetensors.torch import load_file
from torchvision.models.resnet import {block}, ResNet

class Narrow(ResNet):  # of width {width}; torchvision's own is 64
  def _make_layer(self, block, planes, *args, **kwargs):
    if planes == 64:
      self.inplanes = {width}
    return super()._make_layer(block, planes * {width} // 64, *args, **kwargs)

model = Narrow({block}, {counts})
model.bn1 = torch.nn.BatchNorm2d({width})
"""
CIFAR_STEM = """\
model.conv1 = torch.nn.Conv2d({channels}, {width}, 3, 1, 1, bias=False)
model.maxpool = torch.nn.Identity()
"""
IMAGENET_STEM = """\
model.conv1 = torch.nn.Conv2d({channels}, {width}, 7, 2, 3, bias=False)
"""
WITHOUT_CLASSES = """\
model.fc = torch.nn.Identity()
"""
NATURE = """\
from collections import OrderedDict
import torch
from safetensors.torch import load_file

model = torch.nn.Sequential(OrderedDict(
  conv1=torch.nn.Conv2d({channels}, 32, 8, 4), relu1=torch.nn.ReLU(), \
conv2=torch.nn.Conv2d(32, 64, 4, 2), relu2=torch.nn.ReLU(),
  conv3=torch.nn.Conv2d(64, 64, 3), relu3=torch.nn.ReLU(), flatten=torch.nn.Flatten(),
  dense=torch.nn.Linear({flat}, {features}), relu4=torch.nn.ReLU()))
"""
TIMM = """\
import timm
import torch
from safetensors.torch import load_file

model = timm.create_model(
  '{name}_patch16_224', img_size={side}, patch_size={patch}, in_chans={channels},
  embed_dim={features}, num_heads={heads}, num_classes=0{pool})
"""
MEAN_POOL = ", class_token=False, global_pool='avg'"
RUN = """\
model.load_state_dict(load_file(path))
model.eval()
with torch.no_grad():
  features = model(torch.as_tensor(images).permute(0, 3, 1, 2) / 127.5 - 1)
"""


def usage(
  settings: dict[str, Any],
  variables: dict[str, Any],
  image_shape: tuple[int, int, int],
  features: int,
) -> str:
  """The Python that loads `torch_state` from a file `path`, and makes `features` of `images`.

  Args:
    settings: dict with the keys of `encoder.default_config`, 'name' and 'width' at least.
    variables: {'params', 'batch_stats'}.
    image_shape: (H, W, C) of the images; for a transformer exactly.
    features: their number.
  """
  params, (side, _, channels) = variables['params'], image_shape
  if 'dense' in params:
    flat = params['dense']['kernel'].shape[0]
    model = NATURE.format(channels=channels, features=features, flat=flat)
  elif 'patch' in params:
    model = TIMM.format(
      name=settings['name'],
      side=side,
      patch=params['patch']['kernel'].shape[0],
      channels=channels,
      features=features,
      heads=features // settings['width'],
      pool='' if 'class_token' in params else MEAN_POOL,
    )
  else:
    model = _resnet_usage(settings, params, channels)
  return model + RUN


def _resnet_usage(settings, params, channels):
  width, own = settings['width'], 64
  counts = [sum(name.startswith(f'stage{stage}_') for name in params) for stage in range(1, 5)]
  model = RESNET if width == own else NARROW_RESNET
  if params['stem_conv']['kernel'].shape[0] == 3:
    model += CIFAR_STEM
  elif (width, channels) != (own, 3):
    model += IMAGENET_STEM
  block = 'Bottleneck' if 'conv3' in params['stage1_block1'] else 'BasicBlock'
  return (model + WITHOUT_CLASSES).format(
    name=settings['name'], channels=channels, width=width, block=block, counts=counts
  )


def torch_state(variables: dict[str, Any]) -> dict[str, np.ndarray]:
  """The variables under torch's names and in its layouts: {name: array}, convolutions OIHW.

  Running variances stay divided by n, as torch's eval mode takes them. The rows of the dense layer
  of nature are put into the order of a flattened (C, H, W). The blocks of a transformer, stacked
  here, are one by one.
  """
  if 'patch' in variables['params']:
    return _vit_state(variables['params'])
  state: dict[str, Any] = {}
  flat: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(variables)
  for (_, *modules, leaf), x in flat.items():
    module = '.'.join(MODULES.get(name, name) for name in modules)
    if x.ndim == 4:
      x = x.transpose(3, 2, 0, 1)
    elif x.ndim == 2:
      channels = variables['params']['conv3']['kernel'].shape[-1]
      side = math.isqrt(len(x) // channels)
      x = x.reshape(side, side, channels, -1).transpose(3, 2, 0, 1).reshape(x.shape[::-1])
    state[f'{module}.{LEAVES.get(leaf, leaf)}'] = x
    if leaf == 'mean':
      # Unused: torch's running averages have a fixed momentum.
      state[f'{module}.num_batches_tracked'] = np.zeros((), np.int64)
  return state


def _vit_state(params):
  params, state = dict(params), {}
  for module, leaves in params.pop('blocks').items():
    for leaf, stacked in leaves.items():
      name = f'{VIT_BLOCK.get(module, module)}.{LEAVES.get(leaf, leaf)}'
      for i, x in enumerate(stacked):
        state[f'blocks.{i}.{name}'] = x.T
  last = 'norm' if 'class_token' in params else 'fc_norm'  # timm, where the mean is normalised
  for leaf, x in params.pop('norm').items():
    state[f'{last}.{LEAVES.get(leaf, leaf)}'] = x
  patch = params.pop('patch')
  state[f'{VIT["patch"]}.weight'] = patch['kernel'].transpose(3, 2, 0, 1)
  state[f'{VIT["patch"]}.bias'] = patch['bias']
  return state | {VIT[name]: x for name, x in params.items()}
