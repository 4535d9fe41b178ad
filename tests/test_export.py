"""Exported encoders against float64 numpy, and in the programs that they are for: torch,
torchvision, onnxruntime."""

import json
import os
import pathlib
import resource
import subprocess
import sys

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
from tests.test_encoder import numpy_resnet, random_variables

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


def torchvision_shapes(width, channels):
  """The state of torchvision's ResNet-18 without fc, by its module tree: conv1, bn1, layer1-4 of
  two BasicBlocks."""
  shapes = {'conv1.weight': (width, channels, 3, 3)}

  def norm(name, planes):
    shapes.update(
      {f'{name}.{leaf}': (planes,) for leaf in ('weight', 'bias', 'running_mean', 'running_var')}
    )
    shapes[f'{name}.num_batches_tracked'] = ()

  norm('bn1', width)
  inplanes = width
  for layer, planes in enumerate([width, 2 * width, 4 * width, 8 * width], 1):
    for block in range(2):
      name = f'layer{layer}.{block}'
      shapes[f'{name}.conv1.weight'] = (planes, inplanes, 3, 3)
      norm(f'{name}.bn1', planes)
      shapes[f'{name}.conv2.weight'] = (planes, planes, 3, 3)
      norm(f'{name}.bn2', planes)
      if inplanes != planes:
        shapes[f'{name}.downsample.0.weight'] = (planes, inplanes, 1, 1)
        norm(f'{name}.downsample.1', planes)
      inplanes = planes
  return shapes


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


def plain_resnet(width):
  """torchvision's module tree with the CIFAR stem, in torch alone."""
  import torch
  from torch import nn

  class BasicBlock(nn.Module):
    def __init__(self, inplanes, planes, stride):
      super().__init__()
      self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
      self.bn1 = nn.BatchNorm2d(planes)
      self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
      self.bn2 = nn.BatchNorm2d(planes)
      self.downsample = nn.Identity()
      if inplanes != planes:
        self.downsample = nn.Sequential(
          nn.Conv2d(inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes)
        )

    def forward(self, x):
      y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
      return torch.relu(y + self.downsample(x))

  class ResNet(nn.Module):
    def __init__(self):
      super().__init__()
      self.conv1, self.bn1 = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
      planes = [width, width, 2 * width, 4 * width, 8 * width]
      for i in range(1, 5):
        first = BasicBlock(planes[i - 1], planes[i], 1 if i == 1 else 2)
        setattr(self, f'layer{i}', nn.Sequential(first, BasicBlock(planes[i], planes[i], 1)))

    def forward(self, x):
      x = torch.relu(self.bn1(self.conv1(x)))
      return self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean((2, 3))

  return ResNet().eval()


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


def test_features_in_onnxruntime_by_the_lines_of_usage(resnet, nature, tmp_path):
  onnx = pytest.importorskip('onnx')
  pytest.importorskip('onnxruntime')
  for settings, variables, images, expected in (resnet, nature):
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


def test_workdirs_without_an_encoder(workdir, tmp_path):
  with pytest.raises(UserError, match='config.json cannot be read'):
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
