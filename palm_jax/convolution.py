"""2-D convolutions, NHWC and HWIO, whose gradients stay fast inside a compiled loop on CPU.

XLA:CPU brings convolutions into the layout of its fast kernel in the outermost computation only (jaxlib 0.10.2): the
gradients of a convolution inside lax.scan or lax.cond fall back to a naive loop, 30 to 100 times slower. Here they are
written in that layout to begin with. Everything can be differentiated any number of times in reverse.
Other platforms keep XLA's own gradients.
"""
import jax
import jax.numpy as jnp
from jax import lax


def conv(x, kernel, padding='SAME'):
  """Correlation with stride 1.

  Args:
    x: (N, H, W, I).
    kernel: (h, w, I, O).
    padding: 'SAME' (odd kernels), 'VALID', or ((top, bottom), (left, right)).

  Returns:
    (N, H', W', O).
  """
  height, width = kernel.shape[:2]
  if padding == 'SAME':
    padding = ((height // 2, height // 2), (width // 2, width // 2))
  elif padding == 'VALID':
    padding = ((0, 0), (0, 0))
  if height == width == 1 and padding == ((0, 0), (0, 0)):
    return x @ kernel[0, 0]
  if _platform() != 'cpu':
    return _plain(x, kernel, tuple(map(tuple, padding)))
  # Inside shard_map a custom gradient must vary over the mesh as its argument does.
  varying = lambda a: jax.typeof(a).manual_axis_type.varying
  axes = varying(x) | varying(kernel)
  x, kernel = (lax.pcast(a, tuple(axes - varying(a)), to='varying') for a in (x, kernel))
  return _canonical(x, kernel, tuple(map(tuple, padding)))


def strided_conv(x, kernel, stride, padding):
  """Correlation with the same stride on both axes: (N, H, W, I) -> (N, H', W', O). Padding as in `conv`, without 'SAME'.

  On CPU stride by stride pixels become channels, so that a smaller kernel of stride 1, with zeros for what is beyond the
  given one, does the same.
  """
  padding = ((0, 0), (0, 0)) if padding == 'VALID' else tuple(map(tuple, padding))
  if _platform() != 'cpu':
    return _strided(x, kernel, padding, stride)
  if kernel.shape[:2] == (1, 1) and padding == ((0, 0), (0, 0)):
    return x[:, ::stride, ::stride] @ kernel[0, 0]
  blocks = [-(-size // stride) for size in kernel.shape[:2]]  # of the kernel
  lengths = [((n + sum(pad) - size) // stride + b) * stride for n, pad, size, b in zip(
      x.shape[1:3], padding, kernel.shape[:2], blocks, strict=True)]  # of the pixels that are seen
  x = jnp.pad(x, ((0, 0), *((before, stride + after) for before, after in padding), (0, 0)))[:, :lengths[0], :lengths[1]]
  kernel = jnp.pad(kernel, (*((0, b * stride - size) for b, size in zip(blocks, kernel.shape[:2], strict=True)), (0, 0), (0, 0)))
  return conv(_as_channels(x, stride), _as_channels(kernel.transpose(3, 0, 1, 2), stride).transpose(1, 2, 3, 0), 'VALID')


def _as_channels(x, size):
  """(N, H, W, C) -> (N, H/size, W/size, size * size * C)."""
  n, height, width, channels = x.shape
  x = x.reshape(n, height // size, size, width // size, size, channels).transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(n, height // size, width // size, -1)


def flax_conv(x, kernel, strides, padding, **_):
  """For nn.Conv(conv_general_dilated=flax_conv), with the same stride on both axes."""
  return conv(x, kernel, padding) if strides[0] == 1 else strided_conv(x, kernel, strides[0], padding)


def _platform():
  """That of the mesh being traced for: ahead of time it is not the process's own."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return device.platform if device else jax.default_backend()


def _strided(x, kernel, padding, stride):
  return lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=('NHWC', 'HWIO', 'NHWC'))


def _plain(x, kernel, padding):
  return _strided(x, kernel, padding, 1)


_canonical = jax.custom_vjp(_plain, nondiff_argnums=(2,))


def _forward(x, kernel, padding):
  return _canonical(x, kernel, padding), (x, kernel)


def _backward(padding, residuals, g):
  x, kernel = residuals
  size = kernel.shape[:2]
  rest = tuple((k - 1 - before, k - 1 - after) for k, (before, after) in zip(size, padding, strict=True))
  to_x = _canonical(g, kernel[::-1, ::-1].swapaxes(2, 3), rest)
  # Channels take the place of the batch and the batch that of the channels.
  to_kernel = _canonical(x.transpose(3, 1, 2, 0), g.transpose(1, 2, 0, 3), padding)  # (I, h, w, O)
  return to_x, to_kernel.transpose(1, 2, 0, 3)


_canonical.defvjp(_forward, _backward)
