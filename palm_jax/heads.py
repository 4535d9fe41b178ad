"""Networks on top of an encoder that only its training needs: projector and predictor."""

from typing import Any

import flax.linen as nn

from palm_jax.layers.normalization import EPSILON, MOMENTUM

# torch's nn.Linear: uniform within 1 / sqrt(fan_in).
LINEAR = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')


class Projector(nn.Module):
  """(Linear, BatchNorm, ReLU) `layers - 1` times, then Linear, BatchNorm; no biases.

  Attributes:
    output_norm: has the last BatchNorm.
    output_affine: learn scale and offset in the last BatchNorm.
    axis_name: mesh axis over which batch statistics are averaged in training; None keeps them
      local.
    dtype: compute type; None follows parameters and input. Batch statistics are at least float32.
  """

  layers: int = 2
  hidden: int = 2048
  dim: int = 2048
  output_affine: bool = False
  axis_name: str | None = None
  dtype: Any = None
  output_norm: bool = True

  @nn.compact
  def __call__(self, h, train: bool):
    """h (B, F) -> z (B, dim)."""
    x = h
    for layer in range(1, self.layers + 1):
      last = layer == self.layers
      x = nn.Dense(
        self.dim if last else self.hidden,
        use_bias=False,
        kernel_init=LINEAR,
        dtype=self.dtype,
        name=f'linear{layer}',
      )(x)
      if last and not self.output_norm:
        return x
      affine = self.output_affine or not last
      x = nn.BatchNorm(
        not train,
        momentum=MOMENTUM,
        epsilon=EPSILON,
        axis_name=self.axis_name,
        dtype=self.dtype,
        use_scale=affine,
        use_bias=affine,
        name=f'norm{layer}',
      )(x)
      if not last:
        x = nn.relu(x)
    return x


class Predictor(nn.Module):
  """Linear without bias, BatchNorm, ReLU, Linear with bias. Attributes as in `Projector`."""

  hidden: int = 512
  dim: int = 2048
  axis_name: str | None = None
  dtype: Any = None

  @nn.compact
  def __call__(self, z, train: bool):
    """z (B, dim) -> p (B, dim)."""
    x = nn.Dense(self.hidden, use_bias=False, kernel_init=LINEAR, dtype=self.dtype, name='linear1')(
      z
    )
    x = nn.BatchNorm(
      not train,
      momentum=MOMENTUM,
      epsilon=EPSILON,
      axis_name=self.axis_name,
      dtype=self.dtype,
      name='norm1',
    )(x)
    return nn.Dense(self.dim, kernel_init=LINEAR, dtype=self.dtype, name='linear2')(nn.relu(x))
