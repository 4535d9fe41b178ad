"""An encoder as an ONNX graph, written node by node: no tracer, and torch is not needed."""

from types import ModuleType
from typing import Any

import numpy as np

from palm_jax.base.errors import UserError

# Those of ONNX 1.12, which runtimes since 2022 read; onnx's own default would be its newest.
OPSET = 17
IR_VERSION = 8


def import_onnx() -> ModuleType:
  """The onnx package, which nothing else here needs.

  Raises:
    UserError: onnx is not installed.
  """
  try:
    import onnx  # pyright: ignore[reportMissingImports]: optional
  except ImportError as e:
    raise UserError(
      f'the format onnx needs the package onnx ({e}): python -m pip install onnx'
    ) from e
  return onnx


def build(
  settings: dict[str, Any],
  state: dict[str, np.ndarray],
  image_shape: tuple[int, int, int],
  features: int,
  metadata: dict[str, str],
) -> bytes:
  """The bytes of a checked ONNX model of an encoder.

  It maps `images` (N, H, W, C) uint8 to `features` (N, features) float32; N, H and W are symbolic,
  of a transformer N alone. Weights have torch's names. Batch normalisation stays a node: the file
  then holds the numbers of the checkpoint, and runtimes fold it into the convolution when they load
  it.

  Args:
    settings: dict with the keys of `encoder.default_config`, 'name' and 'width' at least.
    state: {torch's name: array}; written as float32.
    image_shape: (H, W, C).
    metadata: into the model's metadata_props.

  Raises:
    UserError: onnx is not installed.
  """
  onnx = import_onnx()
  helper, types = onnx.helper, onnx.TensorProto
  weights = {key: x for key, x in state.items() if not key.endswith('num_batches_tracked')}
  weights |= {'half_range': np.asarray(127.5), 'one': np.asarray(1.0)}
  nodes, vit = _Nodes(helper, weights), 'pos_embed' in state
  height, width, channels = image_shape if vit else ('H', 'W', image_shape[2])
  x = nodes.add('Cast', 'float', 'images', to=types.FLOAT)
  x = nodes.add('Sub', 'scaled', nodes.add('Div', 'divided', x, 'half_range'), 'one')
  x = nodes.add('Transpose', 'nchw', x, perm=[0, 3, 1, 2])
  if vit:
    _vit(nodes, x, features, features // settings['width'])
  elif settings['name'] == 'nature':
    _nature(nodes, x)
  else:
    _resnet(nodes, x)
  graph = helper.make_graph(
    nodes.made,
    'encoder',
    [helper.make_tensor_value_info('images', types.UINT8, ['N', height, width, channels])],
    [helper.make_tensor_value_info('features', types.FLOAT, ['N', features])],
    [
      onnx.numpy_helper.from_array(
        np.array(x, np.int64 if np.asarray(x).dtype.kind == 'i' else np.float32, order='C'), key
      )
      for key, x in nodes.weights.items()
    ],
  )
  model = helper.make_model(
    graph,
    opset_imports=[helper.make_opsetid('', OPSET)],
    ir_version=IR_VERSION,
    producer_name='palm_jax',
    producer_version=metadata['palm_jax_version'],
  )
  helper.set_model_props(model, metadata)
  onnx.checker.check_model(model, full_check=True)
  return model.SerializeToString()


class _Nodes:
  """The nodes of a graph; each method adds one and returns the name of its output.

  Attributes:
    made: the nodes so far, in order.
  """

  def __init__(self, helper, weights):
    self.helper = helper
    self.weights = weights
    self.made = []

  def add(self, op, output, *inputs, **attributes):
    self.made.append(self.helper.make_node(op, inputs, [output], name=output, **attributes))
    return output

  def conv(self, x, module, kernel, stride=1, pad=0):
    names = f'{module}.weight', f'{module}.bias'
    inputs = [name for name in names if name in self.weights]
    shape = dict(kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=[pad] * 4)
    return self.add('Conv', module, x, *inputs, **shape)

  def norm(self, x, module):
    leaves = 'weight', 'bias', 'running_mean', 'running_var'
    inputs = [f'{module}.{leaf}' for leaf in leaves]
    return self.add('BatchNormalization', module, x, *inputs, epsilon=1e-5)

  def relu(self, x):
    return self.add('Relu', f'{x}.relu', x)

  def linear(self, x, module):
    weight = self.add('Transpose', f'{module}.matrix', f'{module}.weight', perm=[1, 0])
    x = self.add('MatMul', f'{module}.product', x, weight)
    return self.add('Add', module, x, f'{module}.bias')

  def layer_norm(self, x, module):
    names = f'{module}.weight', f'{module}.bias'
    return self.add('LayerNormalization', module, x, *names, axis=-1, epsilon=1e-6)

  def gelu(self, x):
    y = self.add('Erf', f'{x}.erf', self.add('Mul', f'{x}.scaled', x, 'root_half'))
    y = self.add('Mul', f'{x}.half', self.add('Add', f'{x}.plus', y, 'one'), 'half')
    return self.add('Mul', f'{x}.gelu', x, y)


def _nature(nodes, x):
  for module, kernel, stride in (('conv1', 8, 4), ('conv2', 4, 2), ('conv3', 3, 1)):
    x = nodes.relu(nodes.conv(x, module, kernel, stride))
  x = nodes.add('Flatten', 'flatten', x)
  x = nodes.add('Gemm', 'dense', x, 'dense.weight', 'dense.bias', transB=1)
  nodes.add('Relu', 'features', x)


def _resnet(nodes, x):
  large = nodes.weights['conv1.weight'].shape[-1] == 7  # ImageNet's stem
  x = nodes.conv(x, 'conv1', 7, 2, 3) if large else nodes.conv(x, 'conv1', 3, pad=1)
  x = nodes.relu(nodes.norm(x, 'bn1'))
  if large:
    x = nodes.add('MaxPool', 'maxpool', x, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
  names = [name.rpartition('.conv1.')[0] for name in nodes.weights if '.conv1.weight' in name]
  for block in sorted(names, key=lambda name: [int(n) for n in name[len('layer') :].split('.')]):
    stride = 2 if block[-2:] == '.0' and not block.startswith('layer1') else 1
    y, through = x, x
    if f'{block}.downsample.0.weight' in nodes.weights:
      y = nodes.norm(nodes.conv(x, f'{block}.downsample.0', 1, stride), f'{block}.downsample.1')
    kernels = [1, 3, 1] if f'{block}.conv3.weight' in nodes.weights else [3, 3]
    strided = kernels.index(3)  # the first 3x3
    for i, kernel in enumerate(kernels):
      through = nodes.relu(through) if i else through
      step = stride if i == strided else 1
      through = nodes.conv(through, f'{block}.conv{i + 1}', kernel, step, kernel // 2)
      through = nodes.norm(through, f'{block}.bn{i + 1}')
    x = nodes.relu(nodes.add('Add', f'{block}.sum', through, y))
  nodes.add('Flatten', 'features', nodes.add('GlobalAveragePool', 'pool', x))


def _vit(nodes, x, size, heads):
  """timm's pre-norm transformer; x (N, C, H, W)."""
  patch = nodes.weights['patch_embed.proj.weight'].shape[-1]
  length = nodes.weights['pos_embed'].shape[1]
  token = 'cls_token' in nodes.weights
  nodes.weights |= {
    'patches_shape': np.asarray([0, size, -1]),
    'heads_shape': np.asarray([0, length, 3, heads, size // heads]),
    'joined_shape': np.asarray([0, length, size]),
    'scale': np.asarray((size // heads) ** -0.5),
    'half': np.asarray(0.5),
    'root_half': np.asarray(0.5**0.5),
    **{f'index{i}': np.asarray(i) for i in range(3)},
  }
  x = nodes.add('Reshape', 'rows', nodes.conv(x, 'patch_embed.proj', patch, patch), 'patches_shape')
  x = nodes.add('Transpose', 'patches', x, perm=[0, 2, 1])
  if token:
    nodes.weights['token_shape'] = np.asarray([1, size])
    count = nodes.add('Shape', 'count', x, start=0, end=1)
    shape = nodes.add('Concat', 'tokens_shape', count, 'token_shape', axis=0)
    tokens = nodes.add('Expand', 'tokens', 'cls_token', shape)
    x = nodes.add('Concat', 'tokens_and_patches', tokens, x, axis=1)
  x = nodes.add('Add', 'positioned', x, 'pos_embed')
  count = sum(name.endswith('.norm1.weight') for name in nodes.weights)
  for block in (f'blocks.{i}' for i in range(count)):
    y = _attention(nodes, nodes.layer_norm(x, f'{block}.norm1'), f'{block}.attn')
    x = nodes.add('Add', f'{block}.attended', x, y)
    y = nodes.linear(nodes.layer_norm(x, f'{block}.norm2'), f'{block}.mlp.fc1')
    y = nodes.linear(nodes.gelu(y), f'{block}.mlp.fc2')
    x = nodes.add('Add', f'{block}.sum', x, y)
  if token:
    x = nodes.layer_norm(nodes.add('Gather', 'token', x, 'index0', axis=1), 'norm')
  else:
    x = nodes.layer_norm(nodes.add('ReduceMean', 'pool', x, axes=[1], keepdims=0), 'fc_norm')
  nodes.add('Identity', 'features', x)


def _attention(nodes, x, module):
  y = nodes.add('Reshape', f'{module}.split', nodes.linear(x, f'{module}.qkv'), 'heads_shape')
  y = nodes.add('Transpose', f'{module}.heads', y, perm=[2, 0, 3, 1, 4])  # (3, N, heads, length, d)
  q, k, v = (nodes.add('Gather', f'{module}.{i}', y, f'index{i}', axis=0) for i in range(3))
  k = nodes.add('Transpose', f'{module}.keys', k, perm=[0, 1, 3, 2])
  y = nodes.add('Mul', f'{module}.logits', nodes.add('MatMul', f'{module}.qk', q, k), 'scale')
  y = nodes.add('Softmax', f'{module}.shares', y, axis=-1)
  y = nodes.add('MatMul', f'{module}.values', y, v)
  y = nodes.add('Transpose', f'{module}.rows', y, perm=[0, 2, 1, 3])
  return nodes.linear(nodes.add('Reshape', f'{module}.join', y, 'joined_shape'), f'{module}.proj')
