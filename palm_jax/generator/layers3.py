"""What the layers of a StyleGAN3 do besides their weights, and which of that can be."""

from typing import Any, NamedTuple

from palm_jax.formats.pickle_values import short
from palm_jax.generator.ops3 import Padding, output_size

MAX_WIDTH = 1 << 16  # of channels and vectors
MAX_RESOLUTION = 2048
MAX_SIZE = 1 << 16  # of a picture between layers, and of a padding
MAX_LAYERS = 64  # of the mapping, and of the synthesis
MAX_NUMBER = 1e30  # of what is no size
MAX_KERNEL = 15
MAX_FACTOR = 16
MAX_TAPS = 128  # each is a part of the program
MAX_RADIAL_TAPS = 32


class Layer(NamedTuple):
  """What a layer of the synthesis does besides its weights.

  Attributes:
    in_channels, out_channels: widths.
    in_size, out_size: sides of its square pictures in pixels.
    kernel: side of the convolution, which pads kernel - 1 zeros on all sides.
    up, down: factors before and after the leaky ReLU.
    padding: left, right, top, bottom of the up-sampled picture.
    up_taps: length of the filter of the up-sampling; 1 is none.
    down_taps: length of the filter of the down-sampling; 1 is none.
    down_radial: whether that is (taps, taps), else (taps,) for both axes.
    is_torgb: without demodulation and leaky ReLU; the last layer alone.
    conv_clamp: limit after the leaky ReLU; None is no limit.
  """

  in_channels: int
  out_channels: int
  in_size: int
  out_size: int
  kernel: int
  up: int
  down: int
  padding: Padding
  up_taps: int
  down_taps: int
  down_radial: bool
  is_torgb: bool
  conv_clamp: float | None


def misfit(network: Any) -> str:
  """The first field of a StyleGAN3 that none has, or that does not fit another; '' without one."""
  bounds = dict(
    z_dim=(1, MAX_WIDTH),
    w_dim=(1, MAX_WIDTH),
    num_classes=(0, MAX_WIDTH),
    mapping_layers=(1, MAX_LAYERS),
  )
  wrong = _out_of_bounds(network, bounds)
  for name in ('sampling_rate', 'bandwidth', 'output_scale'):
    wrong = wrong or _not_positive(name, getattr(network, name))
  if wrong:
    return wrong
  if 2 * network.bandwidth >= network.sampling_rate:
    return f'bandwidth={network.bandwidth}, expected less than half of the sampling_rate'
  if not 1 <= len(network.layers) <= MAX_LAYERS:
    return f'{len(network.layers)} layers, expected 1 to {MAX_LAYERS}'
  before = network.layers[0].in_channels, network.layers[0].in_size
  last = len(network.layers) - 1
  for i, (name, layer) in enumerate(zip(network.layer_names, network.layers, strict=True)):
    wrong = _layer_misfit(layer, i == last, *before)
    if wrong:
      return f'synthesis.{name} has {wrong}'
    before = layer.out_channels, layer.out_size
  return ''


def _layer_misfit(layer, last, in_channels, in_size):
  """What of a layer does not fit, or follow on the channels and size before it."""
  bounds = dict(
    in_channels=(1, MAX_WIDTH),
    out_channels=(1, MAX_WIDTH),
    in_size=(1, MAX_SIZE),
    out_size=(1, MAX_RESOLUTION if last else MAX_SIZE),
    kernel=(1, MAX_KERNEL),
    up=(1, MAX_FACTOR),
    down=(1, MAX_FACTOR),
    up_taps=(1, MAX_TAPS),
    down_taps=(1, MAX_RADIAL_TAPS if layer.down_radial else MAX_TAPS),
  )
  wrong = _out_of_bounds(layer, bounds)
  if layer.conv_clamp is not None:
    wrong = wrong or _not_positive('conv_clamp', layer.conv_clamp)
  if wrong:
    return wrong
  if type(layer.down_radial) is not bool:
    return f'down_radial={short(layer.down_radial)}, expected True or False'
  if layer.is_torgb is not last:
    return f'is_torgb={short(layer.is_torgb)}, expected {last}: only the last layer is ToRGB'
  pads = layer.padding
  if len(pads) != 4 or not all(type(p) is int and abs(p) <= MAX_SIZE for p in pads):
    return f'padding={str(pads)[:80]}, expected four integers'
  if (layer.in_channels, layer.in_size) != (in_channels, in_size):
    return (
      f'in_channels={layer.in_channels} and in_size={layer.in_size}, expected {in_channels} and '
      f'{in_size} as before it'
    )
  for pad in (pads[:2], pads[2:]):
    size = output_size(
      in_size + layer.kernel - 1, layer.up, layer.down, pad, layer.up_taps, layer.down_taps
    )
    if size != layer.out_size:
      return (
        f'out_size={layer.out_size}, expected {size} by its in_size, conv_kernel, factors, taps '
        f'and padding={list(pads)}'
      )
  return ''


def _out_of_bounds(owner, bounds):
  for name, (least, most) in bounds.items():
    value = getattr(owner, name)
    if type(value) is not int or not least <= value <= most:
      return f'{name}={short(value)}, expected {least} to {most}'
  return ''


def _not_positive(name, value):
  if type(value) in (int, float) and 0 < value < MAX_NUMBER:
    return ''
  return f'{name}={short(value)}, expected a positive number'
