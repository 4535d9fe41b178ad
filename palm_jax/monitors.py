"""What people look at while an encoder trains: collapse monitors and films of the agent at play."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from palm_jax import environment, simsiam


class Monitors(NamedTuple):
  """Two functions of a run's state."""

  ranks: Any  # (State.ssl, World, key) -> dict of scalars
  # (State.ssl, State.agent, World, key) -> (rows, steps, H, W, C) uint8, (rows,) int32 labels
  film: Any


def make_monitors(config, generator, program, num_images=1024, num_rows=10, num_steps=64):
  """Monitors on pictures that the learner has not stored, the same for every step of a run when the
  key is.

  Args:
    config: the whole config.
    generator: as for pretrain.make_program.
    program: pretrain.Program.
    num_images: independent latents for the effective rank (a rank is at most this).
    num_rows: episodes of a film, one class a row.
    num_steps: frames of an episode of a film.

  Returns:
    Monitors.
  """
  modules, look = program.modules, program.look
  rows = min(num_rows, generator.num_classes) or 4

  @jax.jit
  def representations(ssl, world, key):
    ids = jnp.arange(num_images)
    env = environment.reset(
      key,
      ids,
      jnp.zeros_like(ids),
      generator.z_dim,
      generator.num_classes,
      kind=world.dynamics.kind,
    )
    variables = {
      name: {'params': ssl['params'][name], 'batch_stats': ssl['batch_stats'][name]}
      for name in ssl['params']
    }

    def encode(part):
      ids, env = part
      frames = look(world, env)
      for t in range(1, config.environment.stack):  # a stack that is full, as nearly all are
        key_action, key_env = jax.random.split(jax.random.fold_in(key, t))
        actions = environment.random_actions(
          environment.env_keys(key_action, ids), generator.z_dim, env.z.dtype
        )
        env = environment.step(
          env,
          actions,
          key_env,
          ids,
          world.dynamics,
          config.environment.stack,
          generator.num_classes,
        )
        frames = look(world, env, frames)
      h = modules.encoder.apply(variables['encoder'], frames, train=False)
      return h, modules.projector.apply(variables['projector'], h, train=False)

    batches = jax.tree.map(lambda x: x.reshape(-1, min(128, num_images), *x.shape[1:]), (ids, env))
    return jax.tree.map(lambda x: x.reshape(num_images, -1), jax.lax.map(encode, batches))

  def ranks(ssl, world, key):
    out = {}
    for name, x in zip('hz', jax.device_get(representations(ssl, world, key)), strict=True):
      out[f'{name}_effective_rank'], out[f'{name}_top_variance'] = simsiam.effective_rank(x)
    return out

  @jax.jit
  def film(ssl, agent, world, key):
    ids = jnp.arange(rows)
    env = environment.reset(
      key,
      ids,
      jnp.zeros_like(ids),
      generator.z_dim,
      generator.num_classes,
      kind=world.dynamics.kind,
    )
    env = env.replace(label=ids % max(generator.num_classes, 1))

    def one_step(carry, t):
      env, frames = carry
      key_policy, key_env = jax.random.split(jax.random.fold_in(key, t + 1))
      actions = program.action(ssl, agent, frames, environment.env_keys(key_policy, ids))
      # An episode of a film is never cut: one more step than it has.
      env = environment.step(
        env, actions, key_env, ids, world.dynamics, num_steps + 1, generator.num_classes
      )
      return (env, look(world, env, frames)), frames

    (env, _), frames = jax.lax.scan(one_step, (env, look(world, env)), jnp.arange(num_steps))
    return frames.swapaxes(0, 1), env.label

  return Monitors(ranks=ranks, film=film)
