"""An encoder as an ONNX graph, written node by node: no tracer, and torch is not needed."""

import numpy as np

from palm_jax.base.errors import UserError

OPSET, IR_VERSION = (
  17,
  8,
)  # ONNX 1.12, which runtimes since 2022 read; onnx's own default would be its newest


def import_onnx():
  """The onnx package, which nothing else here needs. Raises UserError where it is not installed."""
  try:
    import onnx
  except ImportError as e:
    raise UserError(
      f'the format onnx needs the package onnx ({e}): python -m pip install onnx'
    ) from e
  return onnx


def build(name, state, channels, features, metadata):
  """The bytes of a checked ONNX model: `images` (N, H, W, channels) uint8 -> `features` (N,
  features) float32.

  N, H and W are symbolic. Weights have torch's names. Batch normalisation stays a node: the file
  then holds the numbers of the checkpoint, and runtimes fold it into the convolution when they load
  it.

  Args:
    name: 'resnet18' or 'nature'.
    state: {torch's name: array}; written as float32.
    metadata: {str: str}, into the model's metadata_props.

  Raises:
    UserError: onnx is not installed.
  """
  onnx = import_onnx()
  helper, types = onnx.helper, onnx.TensorProto
  weights = {key: x for key, x in state.items() if not key.endswith('num_batches_tracked')}
  weights |= {'half_range': np.asarray(127.5), 'one': np.asarray(1)}
  nodes = []

  def node(op, output, *inputs, **attributes):
    nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
    return output

  def conv(x, module, kernel, stride=1, pad=0):
    inputs = [f'{module}.{leaf}' for leaf in ('weight', 'bias') if f'{module}.{leaf}' in weights]
    return node(
      'Conv', module, x, *inputs, kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=[pad] * 4
    )

  def norm(x, module):
    leaves = ('weight', 'bias', 'running_mean', 'running_var')
    return node(
      'BatchNormalization', module, x, *(f'{module}.{leaf}' for leaf in leaves), epsilon=1e-5
    )

  def relu(x):
    return node('Relu', f'{x}.relu', x)

  x = node('Cast', 'float', 'images', to=types.FLOAT)
  x = node('Sub', 'scaled', node('Div', 'divided', x, 'half_range'), 'one')
  x = node('Transpose', 'nchw', x, perm=[0, 3, 1, 2])
  if name == 'nature':
    for module, kernel, stride in (('conv1', 8, 4), ('conv2', 4, 2), ('conv3', 3, 1)):
      x = relu(conv(x, module, kernel, stride))
    x = node('Gemm', 'dense', node('Flatten', 'flatten', x), 'dense.weight', 'dense.bias', transB=1)
    node('Relu', 'features', x)
  else:
    x = relu(norm(conv(x, 'conv1', 3, pad=1), 'bn1'))
    for block in (f'layer{stage}.{i}' for stage in range(1, 5) for i in range(2)):
      shortcut, stride = x, 1
      if f'{block}.downsample.0.weight' in weights:
        stride = 2
        shortcut = norm(conv(x, f'{block}.downsample.0', 1, stride), f'{block}.downsample.1')
      x = relu(norm(conv(x, f'{block}.conv1', 3, stride, 1), f'{block}.bn1'))
      x = norm(conv(x, f'{block}.conv2', 3, pad=1), f'{block}.bn2')
      x = relu(node('Add', f'{block}.sum', x, shortcut))
    node('Flatten', 'features', node('GlobalAveragePool', 'pool', x))

  graph = helper.make_graph(
    nodes,
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
