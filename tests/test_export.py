"""Exported encoders against float64 numpy, and in the programs that they are for: torch,
torchvision, onnxruntime."""

import json
import os
import pathlib
import resource
import subprocess
import sys

import flax.linen as nn
import jax
import numpy as np
import pytest
import safetensors
from ml_collections import ConfigDict
from scipy.signal import correlate

from palm_jax import encoder, export
from palm_jax.base import digests
from palm_jax.base.checkpoints import Checkpoints
from palm_jax.base.errors import UserError
from palm_jax.evaluate import features
from palm_jax.resnet import ResNet
from tests.test_encoder import numpy_resnet, numpy_vit, random_variables

ROOT = pathlib.Path(__file__).parents[1]
RESNET = dict(encoder.default_config(), width=3)
NATURE = dict(encoder.default_config(), name='nature', features=6)


@pytest.fixture(scope='module')
def resnet():
  """(settings, variables, images (2, 10, 10, 3) uint8, features in float64); the odd 5 pads unlike
  'SAME' would."""
  images = np.random.default_rng(0).integers(0, 256, (2, 10, 10, 3), np.uint8)
  variables = random_variables(ResNet(3), images.shape)
  return RESNET, variables, images, numpy_resnet(variables, images, train=False)[0]


@pytest.fixture(scope='module')
def nature():
  """The same of a Nature CNN whose last map is 2x2, on images (2, 44, 44, 4)."""
  images = np.random.default_rng(0).integers(0, 256, (2, 44, 44, 4), np.uint8)
  variables = random_variables(encoder.NatureCNN(6), images.shape)
  params = jax.tree.map(np.float64, variables['params'])
  params['dense']['bias'] -= 0.7  # some features at 0, some not
  variables = {'params': jax.tree.map(np.float32, params)}
  x = images / 127.5 - 1
  for name, stride in (('conv1', 4), ('conv2', 2), ('conv3', 1)):
    kernel = params[name]['kernel']
    full = [
      [correlate(image, kernel[..., o], 'valid')[..., 0] for o in range(kernel.shape[-1])]
      for image in x
    ]
    x = np.maximum(
      np.moveaxis(np.array(full), 1, -1)[:, ::stride, ::stride] + params[name]['bias'], 0
    )
  h = np.maximum(x.reshape(2, -1) @ params['dense']['kernel'] + params['dense']['bias'], 0)
  return NATURE, variables, images, h


@pytest.fixture(scope='module')
def workdir(resnet, tmp_path_factory):
  """A run with the encoder at step 3, and at step 7 with the same numbers but one."""
  settings, variables, _, _ = resnet
  folder = tmp_path_factory.mktemp('run')
  (folder / 'config.json').write_text(json.dumps(dict(name='test', encoder=settings)))
  with Checkpoints(folder / 'pretrain' / 'checkpoints') as checkpoints:
    changed = jax.tree.map(np.copy, variables)
    changed['params']['stem_norm']['bias'][0] = 5
    checkpoints.save(3, {'encoder': changed}, {})
    checkpoints.save(7, {'encoder': variables, 'rest': {'x': np.zeros(2)}}, {})
  return folder


def metadata_of(path):
  with safetensors.safe_open(path, 'np') as file:
    return file.metadata()


def follow(usage, path, images):
  """The features that somebody gets who runs the lines of 'usage'."""
  names = dict(path=str(path), images=images)
  exec(usage, names)
  return np.asarray(names['features'])


def assert_close(h, expected):
  assert h.shape == expected.shape and h.dtype == np.float32
  np.testing.assert_allclose(h, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def same_bits(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  return all(
    x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  )


# ---- our own names


def test_round_trip_of_a_workdir_is_bit_equal(resnet, workdir):
  settings, variables, _, _ = resnet
  path, step = export.export(workdir)
  assert (path, step) == (workdir / 'encoder.safetensors', 7)
  config, loaded, metadata = export.load(path)
  assert config == settings and same_bits(loaded, variables)
  assert metadata['checkpoint_step'] == '7' and '127.5' in metadata['preprocessing']
  assert (
    metadata['sha256']
    == features.load_encoder(
      ConfigDict(dict(seed=0, encoder=settings)), workdir, (10, 10, 3)
    ).sha256
  )
  assert metadata['palm_jax_version'] and json.loads(metadata['palm_jax_encoder']) == settings
  with safetensors.safe_open(path, 'np') as file:
    np.testing.assert_array_equal(
      file.get_tensor('params/stem_conv/kernel'), variables['params']['stem_conv']['kernel']
    )
  earlier, step = export.export(workdir, out=workdir / 'earlier.safetensors', step=3)
  assert step == 3 and export.load(earlier)[1]['params']['stem_norm']['bias'][0] == 5
  assert export.load(earlier)[2]['sha256'] != metadata['sha256']
  assert {p.name for p in workdir.iterdir()} == {
    'config.json',
    'pretrain',
    'encoder.safetensors',
    'earlier.safetensors',
  }


def test_all_bits_and_types_come_back(nature, tmp_path):
  settings, variables, _, _ = nature
  kernel = variables['params']['conv1']['kernel'].astype(np.float64)
  kernel[0, 0, 0, :4] = -0.0, np.nextafter(1, 2), 5e-324, 1e300
  params = dict(variables['params'], conv1=dict(variables['params']['conv1'], kernel=kernel))
  export.save(tmp_path / 'e.safetensors', 'safetensors', settings, {'params': params}, 0)
  config, loaded, _ = export.load(tmp_path / 'e.safetensors')
  assert config == settings and same_bits(loaded, {'params': params})


def test_features_by_the_lines_of_usage(resnet, nature, tmp_path):
  for settings, variables, images, expected in (resnet, nature):
    export.save(tmp_path / 'e.safetensors', 'safetensors', settings, variables, 0)
    assert_close(
      follow(metadata_of(tmp_path / 'e.safetensors')['usage'], tmp_path / 'e.safetensors', images),
      expected,
    )


def test_load_refuses_damage_and_other_files(resnet, tmp_path):
  settings, variables, _, _ = resnet
  path, other = tmp_path / 'e.safetensors', tmp_path / 'other.safetensors'
  export.save(path, 'safetensors', settings, variables, 0)
  content = path.read_bytes()
  for place in (len(content) - 2, len(content) // 2):
    path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    with pytest.raises(UserError, match='e.safetensors is damaged.*saved'):
      export.load(path)
  path.write_bytes(content.replace(rb'\"width\": 3', rb'\"width\": 5'))
  with pytest.raises(UserError, match='damaged.*saved'):
    export.load(path)
  path.write_bytes(content[:-1])
  with pytest.raises(UserError, match='not a readable'):
    export.load(path)
  export.save(other, 'torchvision', settings, variables, 0)
  with pytest.raises(UserError, match='--format=safetensors'):
    export.load(other)
  with pytest.raises(UserError, match='no such file'):
    export.load(tmp_path / 'absent.safetensors')


# ---- torch's names


def torchvision_shapes(width, channels, counts=(2, 2, 2, 2), bottleneck=False, stem=3):
  """The state of torchvision's ResNets without fc, by its module tree: conv1, bn1, layer1-4 of
  BasicBlocks or Bottlenecks."""
  shapes = {'conv1.weight': (width, channels, stem, stem)}

  def norm(name, planes):
    shapes.update(
      {f'{name}.{leaf}': (planes,) for leaf in ('weight', 'bias', 'running_mean', 'running_var')}
    )
    shapes[f'{name}.num_batches_tracked'] = ()

  norm('bn1', width)
  inplanes = width
  for layer, planes in enumerate([width, 2 * width, 4 * width, 8 * width], 1):
    out = 4 * planes if bottleneck else planes
    for block in range(counts[layer - 1]):
      name = f'layer{layer}.{block}'
      convs = [(planes, inplanes, 3), (planes, planes, 3)]
      if bottleneck:
        convs = [(planes, inplanes, 1), (planes, planes, 3), (out, planes, 1)]
      for i, (to, of, side) in enumerate(convs, 1):
        shapes[f'{name}.conv{i}.weight'] = (to, of, side, side)
        norm(f'{name}.bn{i}', to)
      if inplanes != out:
        shapes[f'{name}.downsample.0.weight'] = (out, inplanes, 1, 1)
        norm(f'{name}.downsample.1', out)
      inplanes = out
  return shapes


def timm_shapes(size, patch, channels, length, token):
  """The state of timm's VisionTransformer without head."""
  last = 'norm' if token else 'fc_norm'
  shapes = {'cls_token': (1, 1, size)} if token else {}
  shapes |= {
    'pos_embed': (1, length, size),
    'patch_embed.proj.weight': (size, channels, patch, patch),
    'patch_embed.proj.bias': (size,),
    f'{last}.weight': (size,),
    f'{last}.bias': (size,),
  }
  for i in range(12):
    for name in ('norm1', 'norm2'):
      shapes |= {f'blocks.{i}.{name}.{leaf}': (size,) for leaf in ('weight', 'bias')}
    linear = {'attn.qkv': (3, 1), 'attn.proj': (1, 1), 'mlp.fc1': (4, 1), 'mlp.fc2': (1, 4)}
    for name, (out, of) in linear.items():
      shapes[f'blocks.{i}.{name}.weight'] = (out * size, of * size)
      shapes[f'blocks.{i}.{name}.bias'] = (out * size,)
  return shapes


@pytest.fixture(scope='module')
def others():
  """{name: (settings, variables, images, features in float64)} of the other encoders, narrow."""
  rng, found = np.random.default_rng(0), {}
  for name, side, changes in (
    ('resnet50', 10, {}),
    ('resnet34', 38, dict(stem='imagenet')),
    ('vit_tiny', 8, dict(width=4, patch=2)),
    ('vit_small', 6, dict(width=2, patch=3, pool='mean')),
  ):
    settings = dict(encoder.default_config(), name=name, **(dict(width=2) | changes))
    images = rng.integers(0, 256, (2, side, side, 3), np.uint8)
    variables = random_variables(encoder.make_encoder(ConfigDict(settings)), images.shape)
    if name.startswith('vit'):
      h = numpy_vit(variables, images, encoder.VITS[name])
    else:
      h = numpy_resnet(variables, images, train=False)[0]
    found[name] = settings, variables, images, h
  return found


def test_names_and_shapes_of_the_others(others):
  """Full sizes differ in the width alone, and their parameters are counted in test_encoder."""
  counts = 3, 4, 6, 3
  expected = {
    'resnet50': torchvision_shapes(2, 3, counts, True),
    'resnet34': torchvision_shapes(2, 3, counts, stem=7),
    'vit_tiny': timm_shapes(12, 2, 3, 17, True),
    'vit_small': timm_shapes(12, 3, 3, 4, False),
  }
  for name, (_, variables, _, _) in others.items():
    state = export.torch_state(variables)
    assert {key: x.shape for key, x in state.items()} == expected[name]


def test_round_trip_of_a_transformer(others, tmp_path):
  path = tmp_path / 'e.safetensors'
  settings, variables, images, expected = others['vit_small']
  export.save(path, 'safetensors', settings, variables, 0)
  config, loaded, metadata = export.load(path)
  assert config == settings and same_bits(loaded, variables)
  assert 'H and W 6;' in metadata['preprocessing'] and metadata['features'] == '(N, 12)'
  assert_close(follow(metadata['usage'], path, images), expected)
  export.save(path, 'torchvision', settings, variables, 0)
  usage = metadata_of(path)['usage']
  compile(usage, 'usage', 'exec')
  assert "'vit_small_patch16_224', img_size=6, patch_size=3, in_chans=3," in usage
  assert 'embed_dim=12, num_heads=6, num_classes=0, class_token=False' in usage


def test_torchvision_names_shapes_and_values(resnet, tmp_path):
  settings, variables, _, _ = resnet
  path = tmp_path / 'e.safetensors'
  export.save(path, 'torchvision', settings, variables, 12)
  with safetensors.safe_open(path, 'np') as file:
    state = {name: file.get_tensor(name) for name in file.keys()}
  assert {name: x.shape for name, x in state.items()} == torchvision_shapes(3, 3)
  assert (
    state['bn1.num_batches_tracked'] == 0 and state['bn1.num_batches_tracked'].dtype == np.int64
  )
  params, stats = variables['params'], variables['batch_stats']
  np.testing.assert_array_equal(
    state['conv1.weight'][2, 1], params['stem_conv']['kernel'][:, :, 1, 2]
  )
  block = params['stage3_block1']
  np.testing.assert_array_equal(
    state['layer3.0.conv2.weight'][4, 7], block['conv2']['kernel'][:, :, 7, 4]
  )
  np.testing.assert_array_equal(
    state['layer3.0.downsample.0.weight'][4, 5, 0, 0], block['shortcut_conv']['kernel'][0, 0, 5, 4]
  )
  np.testing.assert_array_equal(
    state['layer3.0.downsample.1.weight'], block['shortcut_norm']['scale']
  )
  np.testing.assert_array_equal(
    state['layer4.1.bn2.running_var'], stats['stage4_block2']['norm2']['var']
  )
  np.testing.assert_array_equal(
    state['layer4.1.bn2.running_mean'], stats['stage4_block2']['norm2']['mean']
  )
  np.testing.assert_array_equal(
    state['layer1.1.bn1.bias'], params['stage1_block2']['norm1']['bias']
  )
  metadata = metadata_of(path)
  assert metadata['sha256'] == digests.digest(
    variables, settings
  )  # of the variables, whatever the format
  assert json.loads(metadata['palm_jax_encoder']) == settings


def test_dense_layer_of_nature_takes_torchs_order(nature):
  _, variables, _, _ = nature
  state = export.torch_state(variables)
  assert {name: x.shape for name, x in state.items()} == {
    'conv1.weight': (32, 4, 8, 8),
    'conv1.bias': (32,),
    'conv2.weight': (64, 32, 4, 4),
    'conv2.bias': (64,),
    'conv3.weight': (64, 64, 3, 3),
    'conv3.bias': (64,),
    'dense.weight': (6, 256),
    'dense.bias': (6,),
  }
  x = np.random.default_rng(2).normal(size=(2, 2, 64))  # (H, W, C)
  np.testing.assert_allclose(
    state['dense.weight'] @ x.transpose(2, 0, 1).ravel(),
    x.ravel() @ variables['params']['dense']['kernel'],
    rtol=1e-5,
  )


def plain_resnet(width, counts=(2, 2, 2, 2), bottleneck=False, stem=3):
  """torchvision's module tree in torch alone."""
  import torch
  from torch import nn

  class Block(nn.Module):
    def __init__(self, inplanes, planes, stride):
      super().__init__()
      sides = [1, 3, 1] if bottleneck else [3, 3]
      out = 4 * planes if bottleneck else planes
      self.count, self.downsample = len(sides), nn.Identity()
      for i, side in enumerate(sides, 1):
        step = stride if i == len(sides) - 1 else 1
        to = out if i == len(sides) else planes
        of = inplanes if i == 1 else planes
        setattr(self, f'conv{i}', nn.Conv2d(of, to, side, step, side // 2, bias=False))
        setattr(self, f'bn{i}', nn.BatchNorm2d(to))
      if inplanes != out:
        self.downsample = nn.Sequential(
          nn.Conv2d(inplanes, out, 1, stride, bias=False), nn.BatchNorm2d(out)
        )

    def forward(self, x):
      y = x
      for i in range(1, self.count + 1):
        y = getattr(self, f'bn{i}')(getattr(self, f'conv{i}')(y))
        y = torch.relu(y) if i < self.count else y
      return torch.relu(y + self.downsample(x))

  class ResNet(nn.Module):
    def __init__(self):
      super().__init__()
      self.conv1 = nn.Conv2d(3, width, stem, 1 if stem == 3 else 2, stem // 2, bias=False)
      self.bn1 = nn.BatchNorm2d(width)
      self.maxpool = nn.Identity() if stem == 3 else nn.MaxPool2d(3, 2, 1)
      inplanes = width
      for i, count in enumerate(counts):
        blocks, planes = [], width * 2**i
        for block in range(count):
          blocks.append(Block(inplanes, planes, 2 if i and not block else 1))
          inplanes = 4 * planes if bottleneck else planes
        setattr(self, f'layer{i + 1}', nn.Sequential(*blocks))

    def forward(self, x):
      x = self.maxpool(torch.relu(self.bn1(self.conv1(x))))
      return self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean((2, 3))

  return ResNet().eval()


def plain_vit(size, heads, patch, length, token):
  """timm's module tree in torch alone."""
  import torch
  from torch import nn

  class Attention(nn.Module):
    def __init__(self):
      super().__init__()
      self.qkv, self.proj = nn.Linear(size, 3 * size), nn.Linear(size, size)

    def forward(self, x):
      b, n, _ = x.shape
      q, k, v = self.qkv(x).reshape(b, n, 3, heads, size // heads).permute(2, 0, 3, 1, 4)
      shares = (q @ k.transpose(2, 3) / (size // heads) ** 0.5).softmax(-1)
      return self.proj((shares @ v).transpose(1, 2).reshape(b, n, size))

  class Mlp(nn.Module):
    def __init__(self):
      super().__init__()
      self.fc1, self.fc2 = nn.Linear(size, 4 * size), nn.Linear(4 * size, size)

    def forward(self, x):
      return self.fc2(nn.functional.gelu(self.fc1(x)))

  class Block(nn.Module):
    def __init__(self):
      super().__init__()
      self.norm1, self.norm2 = nn.LayerNorm(size, 1e-6), nn.LayerNorm(size, 1e-6)
      self.attn, self.mlp = Attention(), Mlp()

    def forward(self, x):
      x = x + self.attn(self.norm1(x))
      return x + self.mlp(self.norm2(x))

  class ViT(nn.Module):
    def __init__(self):
      super().__init__()
      self.patch_embed = nn.Module()
      self.patch_embed.proj = nn.Conv2d(3, size, patch, patch)
      self.pos_embed = nn.Parameter(torch.zeros(1, length, size))
      self.blocks = nn.Sequential(*[Block() for _ in range(12)])
      if token:
        self.cls_token = nn.Parameter(torch.zeros(1, 1, size))
        self.norm = nn.LayerNorm(size, 1e-6)
      else:
        self.fc_norm = nn.LayerNorm(size, 1e-6)

    def forward(self, x):
      x = self.patch_embed.proj(x).flatten(2).transpose(1, 2)
      if token:
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
      x = self.blocks(x + self.pos_embed)
      return self.norm(x)[:, 0] if token else self.fc_norm(x.mean(1))

  return ViT().eval()


@pytest.mark.slow
def test_features_of_the_others_in_torch(others, tmp_path):
  torch = pytest.importorskip('torch')
  from safetensors.torch import load_file

  counts = 3, 4, 6, 3
  models = {
    'resnet50': plain_resnet(2, counts, True),
    'resnet34': plain_resnet(2, counts, stem=7),
    'vit_tiny': plain_vit(12, 3, 2, 17, True),
    'vit_small': plain_vit(12, 6, 3, 4, False),
  }
  for name, model in models.items():
    settings, variables, images, expected = others[name]
    export.save(tmp_path / 'e.safetensors', 'torchvision', settings, variables, 0)
    model.load_state_dict(load_file(tmp_path / 'e.safetensors'), strict=True)
    with torch.no_grad():
      h = model(torch.as_tensor(images).permute(0, 3, 1, 2) / 127.5 - 1).numpy()
    assert_close(h, expected)
    ours = encoder.make_encoder(ConfigDict(settings)).apply(variables, images, train=False)
    assert_close(h, np.asarray(ours))


@pytest.mark.slow
@pytest.mark.parametrize('name', ['resnet50', 'resnet34', 'vit_tiny', 'vit_small'])
def test_features_of_the_others_by_the_lines_of_usage(others, tmp_path, name):
  pytest.importorskip('timm' if name.startswith('vit') else 'torchvision')
  settings, variables, images, expected = others[name]
  export.save(tmp_path / 'e.safetensors', 'torchvision', settings, variables, 0)
  usage = metadata_of(tmp_path / 'e.safetensors')['usage']
  assert_close(follow(usage, tmp_path / 'e.safetensors', images), expected)


@pytest.mark.slow
def test_features_in_torch(resnet, tmp_path):
  torch = pytest.importorskip('torch')
  from safetensors.torch import load_file

  settings, variables, images, expected = resnet
  export.save(tmp_path / 'e.safetensors', 'torchvision', settings, variables, 0)
  model = plain_resnet(3)
  model.load_state_dict(load_file(tmp_path / 'e.safetensors'), strict=True)
  with torch.no_grad():
    assert_close(model(torch.as_tensor(images).permute(0, 3, 1, 2) / 127.5 - 1).numpy(), expected)


@pytest.mark.slow
def test_features_of_nature_in_torch_by_the_lines_of_usage(nature, tmp_path):
  pytest.importorskip('torch')
  settings, variables, images, expected = nature
  export.save(tmp_path / 'e.safetensors', 'torchvision', settings, variables, 0)
  assert_close(
    follow(metadata_of(tmp_path / 'e.safetensors')['usage'], tmp_path / 'e.safetensors', images),
    expected,
  )


@pytest.mark.slow
@pytest.mark.parametrize('width', [3, 64])
def test_features_in_torchvision_by_the_lines_of_usage(resnet, tmp_path, width):
  pytest.importorskip('torchvision')
  settings, variables, images, expected = resnet
  if width == 64:  # torchvision's own resnet18()
    settings, variables = (
      dict(settings, width=64),
      random_variables(ResNet(64), images.shape),
    )
    expected = np.asarray(ResNet(64).apply(variables, images, train=False))
  export.save(tmp_path / 'e.safetensors', 'torchvision', settings, variables, 0)
  usage = metadata_of(tmp_path / 'e.safetensors')['usage']
  assert ('resnet18()' in usage) == (width == 64)
  assert_close(follow(usage, tmp_path / 'e.safetensors', images), expected)


# ---- ONNX


def test_onnx_graph_holds_the_numbers_of_the_checkpoint(resnet, tmp_path):
  onnx = pytest.importorskip('onnx')
  settings, variables, _, _ = resnet
  export.save(tmp_path / 'e.onnx', 'onnx', settings, variables, 12)
  model = onnx.load(tmp_path / 'e.onnx')
  assert [(o.domain, o.version) for o in model.opset_import] == [('', 17)] and model.ir_version == 8
  dimensions = lambda value: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
  (images,), (output,) = model.graph.input, model.graph.output
  assert (images.name, dimensions(images)) == ('images', ['N', 'H', 'W', 3])
  assert (output.name, dimensions(output)) == ('features', ['N', 24])
  weights = {x.name: onnx.numpy_helper.to_array(x) for x in model.graph.initializer}
  np.testing.assert_array_equal(
    weights['layer1.0.conv1.weight'],
    variables['params']['stage1_block1']['conv1']['kernel'].transpose(3, 2, 0, 1),
  )
  np.testing.assert_array_equal(
    weights['bn1.running_var'], variables['batch_stats']['stem_norm']['var']
  )
  metadata = {entry.key: entry.value for entry in model.metadata_props}
  assert (
    metadata['sha256'] == digests.digest(variables, settings)
    and metadata['checkpoint_step'] == '12'
  )


def test_features_in_onnxruntime_by_the_lines_of_usage(resnet, nature, others, tmp_path):
  onnx = pytest.importorskip('onnx')
  pytest.importorskip('onnxruntime')
  for settings, variables, images, expected in (resnet, nature, *others.values()):
    path = tmp_path / 'e.onnx'
    export.save(path, 'onnx', settings, variables, 0)
    usage = {entry.key: entry.value for entry in onnx.load(path).metadata_props}['usage']
    assert_close(follow(usage, path, images), expected)
    assert_close(follow(usage, path, images[1:]), expected[1:])  # any number of images
  settings, variables, images, _ = resnet
  export.save(path, 'onnx', settings, variables, 0)
  assert_close(
    follow(usage, path, images[:, :7, :6]),
    numpy_resnet(variables, images[:, :7, :6], train=False)[0],
  )


# ---- what people do wrong


def test_without_onnx_there_is_the_command_that_installs_it(workdir, monkeypatch, tmp_path):
  monkeypatch.setitem(sys.modules, 'onnx', None)
  with pytest.raises(UserError, match='pip install onnx'):
    export.export(workdir, 'onnx', tmp_path / 'e.onnx')
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  'arguments, message',
  [
    (dict(format='torch'), '--format=torch is unknown.*did you mean torchvision'),
    (dict(out='absent/e.safetensors'), 'absent/e.safetensors: its folder is missing'),
    (dict(out='.'), 'ends with .safetensors'),
    (dict(format='torchvision', out='e.pth'), r'--out=e.pth.*ends with \.safetensors'),
    (dict(out='e.onnx'), r'ends with \.safetensors'),
    (dict(step=5), r'no checkpoint step 5, only \[3, 7\]'),
  ],
)
def test_refusals(workdir, tmp_path, monkeypatch, arguments, message):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(UserError, match=message):
    export.export(workdir, **arguments)
  assert not list(tmp_path.iterdir())


def test_an_encoder_of_someones_own_says_what_pictures_it_takes(monkeypatch):
  class Own(nn.Module):
    stem: str

    @nn.compact
    def __call__(self, images, train):
      del train
      h = nn.Conv(7, (3, 3), name=self.stem)(images / 127.5 - 1)
      return h.mean((1, 2))

  for stem in ('stem_conv', 'patch'):
    monkeypatch.setattr(export, 'make_encoder', lambda c, stem=stem: Own(stem))
    variables = Own(stem).init(jax.random.key(0), np.zeros((1, 9, 9, 5)), train=False)
    if stem == 'stem_conv':
      found = export.sizes(dict(name='own'), variables)
      assert (found.image_shape, found.features) == ((8, 8, 5), 7)
      continue
    with pytest.raises(UserError, match="'own' has no stem_conv: call its first convolution so"):
      export.sizes(dict(name='own'), variables)


def test_workdirs_without_an_encoder(workdir, tmp_path):
  with pytest.raises(UserError, match='config.json is missing: give the --workdir'):
    export.export(tmp_path)
  (tmp_path / 'config.json').write_text((workdir / 'config.json').read_text())
  with pytest.raises(UserError, match='has no checkpoint'):
    export.export(tmp_path)
  (tmp_path / 'pretrain').symlink_to(workdir / 'pretrain')
  (tmp_path / 'config.json').write_text('{"name": "other"}')
  with pytest.raises(UserError, match='has no settings of an encoder'):
    export.export(tmp_path)
  for settings, message in (
    (dict(RESNET, width=4), r'\(3,\), expected \(4,\)'),
    (NATURE, 'do not belong'),
  ):
    (tmp_path / 'config.json').write_text(json.dumps(dict(encoder=settings)))
    with pytest.raises(UserError, match=message):
      export.export(tmp_path)
  assert {path.name for path in tmp_path.iterdir()} == {'config.json', 'pretrain'}


def test_a_full_disk_leaves_the_file_as_it_was(workdir, tmp_path):
  out = tmp_path / 'e.safetensors'
  out.write_bytes(b'before')
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
  try:
    with pytest.raises(UserError, match='e.safetensors cannot be written'):
      export.export(workdir, out=out)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert out.read_bytes() == b'before' and list(tmp_path.iterdir()) == [out]
  export.export(workdir, out=out)
  assert out.stat().st_size > 20_000


def test_command(workdir, tmp_path):
  run = lambda *flags: subprocess.run(
    [sys.executable, '-m', 'palm_jax.export', *flags],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=120,
    env=dict(os.environ, JAX_PLATFORMS='cpu'),
  )
  done = run(f'--workdir={workdir}', '--format=torchvision', f'--out={tmp_path}/e.safetensors')
  assert (done.returncode, done.stderr) == (0, '') and 'step 7' in done.stdout
  assert metadata_of(tmp_path / 'e.safetensors')['format'] == 'torchvision'
  done = run('--format=onnx')
  assert (
    done.returncode == 2
    and done.stderr.startswith('palm_jax: --workdir is missing')
    and done.stderr.count('\n') == 1
  )
