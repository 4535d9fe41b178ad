"""An encoder as an ONNX graph, written node by node: no tracer, and torch is not needed."""

from types import ModuleType

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
  name: str,
  state: dict[str, np.ndarray],
  channels: int,
  features: int,
  metadata: dict[str, str],
) -> bytes:
  """The bytes of a checked ONNX model of an encoder.

  It maps `images` (N, H, W, channels) uint8 to `features` (N, features) float32; N, H and W are
  symbolic. Weights have torch's names. Batch normalisation stays a node: the file then holds the
  numbers of the checkpoint, and runtimes fold it into the convolution when they load it.

  Args:
    name: 'resnet18' or 'nature'.
    state: {torch's name: array}; written as float32.
    metadata: into the model's metadata_props.

  Raises:
    UserError: onnx is not installed.
  """
  onnx = import_onnx()
  helper, types = onnx.helper, onnx.TensorProto
  weights = {key: x for key, x in state.items() if not key.endswith('num_batches_tracked')}
  weights |= {'half_range': np.asarray(127.5), 'one': np.asarray(1)}
  nodes = _Nodes(helper, weights)
  x = nodes.add('Cast', 'float', 'images', to=types.FLOAT)
  x = nodes.add('Sub', 'scaled', nodes.add('Div', 'divided', x, 'half_range'), 'one')
  x = nodes.add('Transpose', 'nchw', x, perm=[0, 3, 1, 2])
  if name == 'nature':
    _nature(nodes, x)
  else:
    _resnet18(nodes, x)
  graph = helper.make_graph(
    nodes.made,
    'encoder',
    [helper.make_tensor_value_info('images', types.UINT8, ['N', 'H', 'W', channels])],
    [helper.make_tensor_value_info('features', types.FLOAT, ['N', features])],
    [
      onnx.numpy_helper.from_array(np.array(x, np.float32, order='C'), key)
      for key, x in weights.items()
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


def _nature(nodes, x):
  for module, kernel, stride in (('conv1', 8, 4), ('conv2', 4, 2), ('conv3', 3, 1)):
    x = nodes.relu(nodes.conv(x, module, kernel, stride))
  x = nodes.add('Flatten', 'flatten', x)
  x = nodes.add('Gemm', 'dense', x, 'dense.weight', 'dense.bias', transB=1)
  nodes.add('Relu', 'features', x)


def _resnet18(nodes, x):
  x = nodes.relu(nodes.norm(nodes.conv(x, 'conv1', 3, pad=1), 'bn1'))
  for block in (f'layer{stage}.{i}' for stage in range(1, 5) for i in range(2)):
    shortcut = x
    stride = 1
    if f'{block}.downsample.0.weight' in nodes.weights:
      stride = 2
      shortcut = nodes.conv(x, f'{block}.downsample.0', 1, stride)
      shortcut = nodes.norm(shortcut, f'{block}.downsample.1')
    x = nodes.conv(x, f'{block}.conv1', 3, stride, 1)
    x = nodes.relu(nodes.norm(x, f'{block}.bn1'))
    x = nodes.norm(nodes.conv(x, f'{block}.conv2', 3, pad=1), f'{block}.bn2')
    x = nodes.relu(nodes.add('Add', f'{block}.sum', x, shortcut))
  nodes.add('Flatten', 'features', nodes.add('GlobalAveragePool', 'pool', x))
