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


def strided_conv(x, kernel):
  """Correlation with stride 2: 3x3 padded by one on all sides, or 1x1. (N, H, W, I) -> (N, ceil(H/2), ceil(W/2), O).

  Two by two pixels become channels, so the 3x3 kernel is a 2x2 one of stride 1 with a zero row and column.
  """
  if kernel.shape[:2] == (1, 1):
    return x[:, ::2, ::2] @ kernel[0, 0]
  x = jnp.pad(x, ((0, 0), (1, 1 + x.shape[1] % 2), (1, 1 + x.shape[2] % 2), (0, 0)))
  n, height, width, channels = x.shape
  x = x.reshape(n, height // 2, 2, width // 2, 2, channels).transpose(0, 1, 3, 2, 4, 5)
  kernel = jnp.pad(kernel, ((0, 1), (0, 1), (0, 0), (0, 0))).reshape(2, 2, 2, 2, channels, -1).transpose(0, 2, 1, 3, 4, 5)
  return conv(x.reshape(n, height // 2, width // 2, 4 * channels), kernel.reshape(2, 2, 4 * channels, -1), 'VALID')


def flax_conv(x, kernel, strides, padding, **_):
  """For nn.Conv(conv_general_dilated=flax_conv): strides 1, or 2 with the kernels of `strided_conv`."""
  return conv(x, kernel, padding) if tuple(strides) == (1, 1) else strided_conv(x, kernel)


def _platform():
  """That of the mesh being traced for: ahead of time it is not the process's own."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return device.platform if device else jax.default_backend()


def _plain(x, kernel, padding):
  return lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=('NHWC', 'HWIO', 'NHWC'))


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
