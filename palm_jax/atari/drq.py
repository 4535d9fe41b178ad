"""DrQ for Atari-100k: a dueling double DQN on pictures that are shifted and dimmed at random.

Source: google/dopamine, labs/atari_100k/configs/DrQ.gin. Update and network are those of
palm_jax.atari.dqn. Differences:
- The convolutions have no padding (there SAME), so that a pretrained Nature CNN fits.
- Pictures are in [-1, 1], as that CNN has seen them (there [0, 1]).
- Shifts reach +4 (there only +3).
- A stack is kept over a lost life (there it begins anew).
- A window that a game's cut-off shortens bootstraps from its last picture.
"""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from palm_jax.atari import dqn
from palm_jax.base.errors import UserError
from palm_jax.checkpoint import load_encoder

PAD = 4  # Kostrikov et al. 2020 (DrQ), and spr src/models.py
INTENSITY = 0.05  # spr src/models.py, dopamine; DrQ's appendix may mean 0.1


# DrQ(eps) of Agarwal et al. 2021 (arXiv 2108.13264), with fewer random actions.
EPSILON = dict(epsilon=0.01, eval_epsilon=0.001)
# The learning rates of SGI for a pretrained trunk: Schwarzer et al. 2021,
# scripts/experiments/sgim_finetune.sh.
SGI = dict(lr=1e-4, hidden_scale=0.3, trunk_scale=0.01)


def default_config() -> ConfigDict:
  """Settings of the agent."""
  config = dqn.default_config()
  config.update(
    dict(
      dueling=True,  # DrQ.gin
      n_step=10,  # DrQ.gin
      learn_period=1,  # DrQ.gin
      target_period=1,  # DrQ.gin: the network is its own target
      min_history=1600,  # DrQ.gin
      capacity=110_000,  # nothing of 100k steps is forgotten (DrQ.gin: 1M)
      epsilon=0.1,  # DrQ.gin
      epsilon_decay=5000,  # DrQ.gin
      lr=1e-4,  # DrQ.gin
    )
  )
  config.eval_epsilon = 0.05  # DrQ.gin
  config.augment = True  # DrQ; PALM section 5.3 can be read either way
  return config


def augment(keys: jax.Array, stacks: jax.Array) -> jax.Array:
  """Shifts by up to 4 pixels each way, edges repeated, then one factor on the brightness.

  Both are the same for all frames of a stack.

  Args:
    keys: (B,) typed keys, one a stack.
    stacks: (B, H, W, 4) uint8.

  Returns:
    (B, H, W, 4) float32 around [-1, 1]: bright pictures may exceed it by the factor, 1 + 0.05
    clip(N(0, 1), -2, 2).
  """

  def one(key, stack):
    crop_key, intensity_key = jax.random.split(key)
    top, left = jax.random.randint(crop_key, (2,), 0, 2 * PAD + 1)
    padded = jnp.pad(stack, ((PAD, PAD), (PAD, PAD), (0, 0)), mode='edge')
    picture = jax.lax.dynamic_slice(padded, (top, left, 0), stack.shape).astype(jnp.float32) / 255
    factor = 1 + INTENSITY * jnp.clip(jax.random.normal(intensity_key, dtype=jnp.float32), -2, 2)
    return 2 * picture * factor - 1

  return jax.vmap(one)(keys, stacks)


def load_trunk(workdir: str | pathlib.Path) -> tuple[dict[str, Any], int]:
  """The convolutions of a workdir's pretrained encoder.

  Returns:
    ({'conv1', 'conv2', 'conv3'}, step of the checkpoint).

  Raises:
    UserError: no pretrained encoder there, or not a Nature CNN on stacks of four frames.
  """
  config, variables, step = load_encoder(workdir)
  name = config.get('encoder', {}).get('name')
  if name != 'nature':
    raise UserError(
      f"the encoder of {workdir} is {name!r}, expected 'nature': pretrain with "
      "encoder.name='nature'"
    )
  channels = variables['params']['conv1']['kernel'].shape[2]
  if channels != 4:
    raise UserError(
      f'the encoder of {workdir} takes pictures of {channels} channel(s), expected 4, the frames '
      'of a stack: pretrain in a generator of stacks'
    )
  return {name: variables['params'][name] for name in dqn.TRUNK}, step
