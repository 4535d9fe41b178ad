"""A small world for tests: the generator's protocol with one matrix behind it; and a count of what
is compiled."""

import jax
import jax.numpy as jnp
import numpy as np

from configs import cifar

COMPILED = []  # seconds of each compilation so far


def note_compilation(event, seconds, **_):
  if event == '/jax/core/compile/backend_compile_duration':
    COMPILED.append(seconds)


jax.monitoring.register_event_duration_secs_listener(note_compilation)


class LinearGenerator:
  """tanh(z W + offset of the class) as an 8x8 grey picture."""

  z_dim, num_classes, image_shape = 6, 3, (8, 8, 1)

  def __init__(self):
    keys = jax.random.split(jax.random.key(7))
    self.variables = dict(
      w=jax.random.normal(keys[0], (self.z_dim, 64)) / 2,
      offset=jax.random.normal(keys[1], (self.num_classes, 64)),
    )

  @staticmethod
  def apply(variables, z, labels, truncation_psi=1.0):
    return jnp.tanh(truncation_psi * z @ variables['w'] + variables['offset'][labels]).reshape(
      -1, 8, 8, 1
    )


class LargeGenerator(LinearGenerator):
  """The same at 40x40, each pixel five times: the Nature CNN compiles in a tenth of ResNet-18's
  time."""

  image_shape = (40, 40, 1)

  @staticmethod
  def apply(variables, z, labels, truncation_psi=1.0):
    return LinearGenerator.apply(variables, z, labels, truncation_psi).repeat(5, 1).repeat(5, 2)


def tiny_config():
  """Everything small; the ring wraps and episodes end within a few iterations."""
  c = cifar.get_config()
  c.encoder.width = 4
  c.environment.episode_length = 7
  c.replay.update(dict(capacity=16 * 12, num_shards=8))
  c.simsiam.update(dict(proj_hidden=16, proj_dim=16, pred_hidden=8))
  c.sac.update(dict(hidden=(16, 16), trunk=8))
  c.reward.k = 3
  c.pretrain.update(
    dict(
      env_steps=16 * 4 * 24,
      num_envs=16,
      rollout_length=4,
      batch_size=32,
      updates_per_iteration=2,
      warmup_steps=128,
      iterations_per_call=8,
      checkpoint_minutes=60.0,
    )
  )
  return c


def nature_config():
  """The same with the encoder that LargeGenerator is for."""
  c = tiny_config()
  c.encoder.update(dict(name='nature', features=16))
  return c


def blobs(train=300, test=120, width=6, classes=3):
  """Overlapping Gaussian classes with unequal scales and offsets: (train_x, train_y, test_x,
  test_y)."""
  generator = np.random.default_rng(0)
  y = generator.integers(0, classes, train + test)
  centres = generator.normal(size=(classes, width))
  x = (generator.normal(size=(train + test, width)) + centres[y]) * np.logspace(
    -2, 2, width
  ) + np.arange(width)
  x = x.astype(np.float32)
  return x[:train], y[:train], x[train:], y[train:]
