"""How fast a generator draws, beside a StyleGAN2 of its widths."""

import functools
import statistics
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging

from palm_jax.generator import LoadedGenerator
from palm_jax.generator.stylegan2 import Generator
from palm_jax.generator.stylegan3 import StyleGAN3
from palm_jax.speed import timing

MARGIN = 20  # pixels that pictures between StyleGAN3's layers have more than they show


def measure(generator: LoadedGenerator, count: int) -> dict[str, float]:
  """Pictures a second of one device, the two networks taking turns.

  Args:
    generator: with any weights.
    count: pictures at once.

  Returns:
    {name of the network's class: pictures a second}; without StyleGAN2 where none has its size.
  """
  networks = {type(generator.network).__name__: generator.network}
  other = counterpart(generator.network)
  if other is not None:
    networks['StyleGAN2'] = other
  z = jax.random.normal(jax.random.key(0), (count, generator.z_dim))
  labels = jnp.arange(count) % max(generator.num_classes, 1)
  calls = {}
  for name, network in networks.items():
    variables = jax.jit(network.init)(jax.random.key(0), z[:1], labels[:1])
    calls[name] = jax.jit(network.apply).lower(variables, z, labels).compile(), variables
  times = {name: [] for name in networks}
  for _ in range(timing.REPEATS + 1):
    for name, (call, variables) in calls.items():
      times[name].append(timing.seconds(functools.partial(call, variables, z, labels))[0])
  rates = {name: count / statistics.median(taken[1:]) for name, taken in times.items()}
  logging.info('%s', table(rates, count))
  return rates


def counterpart(network: Any) -> Generator | None:
  """A StyleGAN2 with the latents, classes, picture and widths of another network.

  None where that is one itself, or its picture is not 4 pixels doubled.
  """
  height, width, image_channels = network.image_shape
  doublings = (height // 4).bit_length() - 1
  if isinstance(network, Generator) or height != width or doublings < 1 or height != 4 << doublings:
    return None
  return Generator(
    z_dim=network.z_dim,
    w_dim=network.w_dim,
    num_classes=network.num_classes,
    channels=tuple(_width(network, 4 << i) for i in range(doublings + 1)),
    image_channels=image_channels,
    mapping_layers=network.mapping_layers,
    dtype=network.dtype,
  )


def _width(network, resolution):
  if not isinstance(network, StyleGAN3):
    return network.width
  layers = network.layers[:-1]
  fitting = [layer.out_channels for layer in layers if layer.out_size <= resolution + MARGIN]
  return fitting[-1] if fitting else layers[0].out_channels


def table(rates: dict[str, float], count: int) -> str:
  """The rates in one line."""
  words = ', '.join(f'{name} {rate:,.1f} images/s' for name, rate in rates.items())
  if len(rates) > 1:
    first, second = rates.values()
    words += f' of the same widths (ratio {first / second:.2f})'
  return f'drawing alone, {count} pictures at once: {words}'
