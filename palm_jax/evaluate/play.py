"""Pictures from the latent world after training: a policy or random actions play again, or what was
recorded is drawn again."""

import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import v1 as ocp

from palm_jax import environment, experience, replay, rollout, sac, worlds
from palm_jax.base import devices
from palm_jax.base.errors import UserError
from palm_jax.layers.pixels import to_uint8


def actor_template(config, generator, program, mesh):
  """Shapes of the policy's parameters in a pretraining of this config, to be read onto every device
  of the mesh."""
  state = jax.eval_shape(program.init, jax.random.key(0), worlds.host_world(config, generator))
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P())),
    state.agent.actor,
  )


def load_actor(folder, step, template):
  """The policy's parameters of a pretraining checkpoint; the rest of its state, with the replay,
  stays on the disk.

  Args:
    folder: pathlib.Path of the checkpoints.
    step: one whose item `encoder` is whole.
    template: see `actor_template`.

  Raises:
    UserError: no policy there, that of another config, or a damaged one.
  """
  path = (folder / str(step)).absolute()
  record = json.loads((path / '_CHECKPOINT_METADATA').read_text())['custom_metadata']['record'][
    'items'
  ].get('state', {})
  named = lambda tree: {
    'agent/actor/' + jax.tree_util.keystr(at, simple=True, separator='/'): leaf
    for at, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }
  for name, leaf in named(template).items():
    there = record.get(name, dict(shape='absent', dtype=''))
    if (there['shape'], there['dtype']) != (list(leaf.shape), str(leaf.dtype)):
      raise UserError(
        f'{path}: {name} is {there["dtype"]}{there["shape"]}, expected '
        f'{leaf.dtype}{list(leaf.shape)}: '
        'give the config of that run'
      )
  context, this = ocp.Context(), jax.process_index()
  context.pytree_options.loading.partial_load = True
  context.multiprocessing_options.primary_host, context.multiprocessing_options.active_processes = (
    this,
    {this},
  )
  try:
    with context:
      actor = ocp.load_checkpointables(path, {'state': {'agent': {'actor': template}}})['state'][
        'agent'
      ]['actor']
    damaged = [
      name
      for name, leaf in named(actor).items()
      if [hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest()]
      != [digest for _, digest in record[name]['blocks']]
    ]
  except jax.errors.JaxRuntimeError:  # out of memory says nothing about the files
    raise
  except Exception as e:  # orbax raises whatever the damaged bytes lead it into
    raise UserError(
      f'the policy in {path} is damaged ({type(e).__name__}): restore a copy, or remove that step'
    ) from e
  if damaged:
    raise UserError(
      f'the policy in {path} is damaged ({damaged[0]} holds other values than were saved): '
      'restore a copy, or '
      'remove that step'
    )
  return actor


def make_arms(config, generator, program, mesh, variables, actor):
  """The sources of generated pictures, compiled when first called.

  Args:
    config: the whole config.
    generator: as for pretrain.make_program.
    program: pretrain.Program of them.
    mesh: one-dimensional mesh, axis 'data'.
    variables: the encoder's.
    actor: the policy's.

  Returns:
    {name: f(key, ids (E,) int32, labels (E,) int32) -> (E, H, W, C) uint8 on the host}, E a
    multiple of the mesh's size: 'policy' and 'uniform', the frame of a uniformly random step of the
    episode of that id and label; 'independent', of a normal latent; and 'record', which takes
    latents (E, z_dim) in place of ids. A picture is a function of (key, id, label).
  """
  length, num_classes = config.environment.episode_length, generator.num_classes
  real = jnp.promote_types(rollout.DTYPES[config.pretrain.dtype], jnp.float32)
  action_dtype = replay.ACTION_DTYPES[config.replay.actions] or real
  ssl = {
    'params': {'encoder': variables['params']},
    'batch_stats': {'encoder': variables.get('batch_stats', {})},
  }
  agent = sac.SAC(
    actor=actor,
    critic=None,
    target_critic=None,
    log_alpha=None,
    actor_opt=None,
    critic_opt=None,
    alpha_opt=None,
  )

  def render(world, z, labels):
    images = generator.apply(
      world.variables, z, labels, truncation_psi=config.environment.truncation_psi
    )
    return to_uint8(images)

  def policy(world, ssl, agent, env, keys):
    return rollout.act(program.setup, ssl, agent, render(world, env.z, env.label), keys)

  def uniform(world, ssl, agent, env, keys):
    return environment.random_actions(keys, generator.z_dim, real)

  def episodes(act):
    def latents(world, ssl, agent, key, ids, labels):
      key_start, key_steps, key_chosen = jax.random.split(key, 3)
      env = environment.reset(
        key_start, ids, jnp.zeros_like(ids), generator.z_dim, num_classes, real, world.dynamics.kind
      ).replace(label=labels)
      chosen = chosen_steps(key_chosen, ids, length)

      def one_step(carry):
        t, env, kept = carry
        key_policy, key_env = jax.random.split(jax.random.fold_in(key_steps, t))
        actions = act(world, ssl, agent, env, environment.env_keys(key_policy, ids))
        taken = replay.unpack(replay.pack(actions, action_dtype), real)  # as in pretraining
        env = environment.step(env, taken, key_env, ids, world.dynamics, length, num_classes)
        return t + 1, env, jnp.where((env.step == chosen)[:, None], env.z, kept)

      # Nobody asks for what comes after the last chosen step.
      return jax.lax.while_loop(
        lambda carry: carry[0] < chosen.max(), one_step, (jnp.zeros_like(chosen[0]), env, env.z)
      )[2]

    return latents

  def independent(world, ssl, agent, key, ids, labels):
    keys = environment.env_keys(jax.random.fold_in(key, 1), ids)
    return environment.first_latent_and_label(keys, generator.z_dim, num_classes, real)[0]

  def given(world, ssl, agent, key, z, labels):
    return z.astype(real)

  world = worlds.make_world(config, generator, mesh)

  def compiled(latents):
    def call(world, ssl, agent, key, which, labels):
      return render(world, latents(world, ssl, agent, key, which, labels), labels)

    call = jax.shard_map(
      call, mesh=mesh, in_specs=(P(), P(), P(), P(), P('data'), P('data')), out_specs=P('data')
    )
    call = jax.jit(call, out_shardings=NamedSharding(mesh, P()))
    return lambda key, which, labels: jax.device_get(
      call(
        world,
        ssl,
        agent,
        key,
        devices.shard(mesh, which, P('data')),
        devices.shard(mesh, labels, P('data')),
      )
    )

  return dict(
    policy=compiled(episodes(policy)),
    uniform=compiled(episodes(uniform)),
    independent=compiled(independent),
    record=compiled(given),
  )


def by_chosen_step(key, ids, episode_length):
  """ids (n,), those whose step comes early in `make_arms`'s episodes of this key first: batches of
  them end early."""
  return ids[
    np.argsort(chosen_steps(jax.random.split(key, 3)[2], ids, episode_length), kind='stable')
  ]


def chosen_steps(key, ids, episode_length):
  """(E,) int32 steps, each uniform in [0, episode_length), functions of (key, id)."""
  return jax.vmap(lambda key: jax.random.randint(key, (), 0, episode_length, jnp.int32))(
    environment.env_keys(key, ids)
  )


def recorded(folder, episode_length, num_episodes, seed):
  """One uniformly random step of each of some complete recorded episodes, drawn without
  replacement.

  Args:
    folder: of palm_jax.experience.
    episode_length: frames an episode.
    num_episodes: how many; fewer where there are no more.
    seed: of numpy's generator.

  Returns:
    z (n, z_dim) and labels (n,) int32.

  Raises:
    UserError: no record, or no complete episode in it.
  """
  rng, kept, chosen = np.random.default_rng(seed), None, None
  for part in experience.read(folder):
    new = [(part.z[0, :0], part.label[0, :0], np.empty(0))]
    for z, label, step in zip(*part, strict=True):
      if chosen is None:
        chosen, held = (
          np.full(step.shape, -1),
          np.zeros_like(z),
        )  # -1: it had begun before the record
      begins = step == 0
      chosen[begins] = rng.integers(episode_length, size=begins.sum())
      hit = step == chosen
      held[hit] = z[hit]
      ends = (step == episode_length - 1) & (chosen >= 0)
      if ends.any():
        new.append((held[ends], label[ends], rng.random(ends.sum())))
    z, label, rank = (
      np.concatenate(arrays) for arrays in zip(*([kept] if kept else []), *new, strict=True)
    )
    order = np.argsort(rank)[:num_episodes]
    kept = z[order], label[order], rank[order]
  if not len(kept[0]):
    raise UserError(
      f'{folder} holds no complete episode of {episode_length} steps: record a longer pretraining'
    )
  return kept[0], kept[1].astype(np.int32)
