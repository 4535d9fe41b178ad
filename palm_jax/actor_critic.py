"""The agent's networks (ProtoRL proto.py; URLB agent/ddpg.py)."""

import math
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap

NEUTRAL_STD = 0.87  # of a Gaussian whose tanh is nearest to uniform
NEUTRAL_SCALE = 0.01  # of the actor's last layer


def orthogonal(scale: float = 1.0) -> Callable:
  """Flax's initialiser, one after the other under vmap.

  jaxlib's QR of a batch waits on the CPU for threads that wait for it: agents of many seeds, made
  by vmap, hung for ever now and then (jaxlib 0.10.2, two cores).
  """
  draw = nn.initializers.orthogonal(scale)

  def init(key, shape, dtype=jnp.float32):
    return sequential_vmap(lambda key: draw(key, shape, dtype))(key)

  return init


def _dense(features, scale=1.0):
  # ProtoRL utils.weight_init: gain 1
  return nn.Dense(features, kernel_init=orthogonal(scale))


class Trunk(nn.Module):
  """Linear, LayerNorm, tanh (URLB agent/ddpg.py; ProtoRL has no tanh); nothing when `features` is
  0."""

  features: int

  @nn.compact
  def __call__(self, h):
    if not self.features:
      return h
    x = _dense(self.features)(h)
    return jnp.tanh(nn.LayerNorm(epsilon=1e-5)(x))  # torch's epsilon


class MLP(nn.Module):
  """ReLU layers of sizes `hidden`, then a linear one.

  `last_scale` is the gain of the linear one's first weights.
  """

  hidden: Sequence[int]
  features: int
  last_scale: float = 1.0

  @nn.compact
  def __call__(self, x):
    for size in self.hidden:
      x = nn.relu(_dense(size)(x))
    return _dense(self.features, self.last_scale)(x)


class Actor(nn.Module):
  """(B, F) features -> mean, log_std of the Gaussian before tanh, (B, A) each (ProtoRL proto.py
  Actor).

  Attributes:
    action_dim: A.
    hidden: sizes of the hidden layers.
    trunk: size of the trunk's output, 0 for none.
    log_std_min: lower bound of log_std, which is a rescaled tanh, never clipped.
    log_std_max: upper bound.
    neutral: begin with means near 0 and a deviation of NEUTRAL_STD.
  """

  action_dim: int
  hidden: Sequence[int] = (1024, 1024)
  trunk: int = 50
  log_std_min: float = -10.0
  log_std_max: float = 2.0
  neutral: bool = False

  @nn.compact
  def __call__(self, h):
    x = Trunk(self.trunk)(h)
    scale = NEUTRAL_SCALE if self.neutral else 1.0
    head = MLP(self.hidden, 2 * self.action_dim, scale)(x)
    mean, raw = jnp.split(head, 2, axis=-1)
    half = 0.5 * (self.log_std_max - self.log_std_min)
    if self.neutral:
      raw += math.atanh((math.log(NEUTRAL_STD) - self.log_std_min) / half - 1)
    return mean, self.log_std_min + half * (jnp.tanh(raw) + 1)


class Critic(nn.Module):
  """(B, F) features, (B, A) actions -> (2, B) values; the two share a trunk (ProtoRL proto.py
  Critic).

  Attributes:
    hidden: sizes of the hidden layers of each.
    trunk: size of the trunk's output, 0 for none.
  """

  hidden: Sequence[int] = (1024, 1024)
  trunk: int = 50

  @nn.compact
  def __call__(self, h, action):
    x = jnp.concatenate([Trunk(self.trunk)(h), action], axis=-1)
    return jnp.stack([MLP(self.hidden, 1, name=name)(x)[..., 0] for name in ('q1', 'q2')])
