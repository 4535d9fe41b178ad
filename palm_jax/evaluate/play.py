"""Pictures from the latent world after training: a policy plays again, or a record is drawn."""

import functools
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import v1 as ocp

from palm_jax import agent as agents
from palm_jax import environment, experience, pretrain, replay, rollout, worlds
from palm_jax.base import devices, digests
from palm_jax.base.errors import UserError
from palm_jax.base.signals import raise_if_interrupted

# (key, ids (E,) int32 or latents (E, z_dim), labels (E,) int32) -> (E, H, W, C) uint8 on the host
Arm = Callable[[jax.Array, np.ndarray, np.ndarray], np.ndarray]


def policy_template(program: pretrain.Program, mesh: Mesh) -> dict[str, Any]:
  """Shapes of what a pretraining's policy acts by, to be read onto every device of the mesh."""
  world = worlds.host_world(program.setup.config, program.setup.generator)
  state = jax.eval_shape(program.init, jax.random.key(0), world)
  return devices.templates(agents.acting(state.agent), NamedSharding(mesh, P()))


def load_policy(folder: pathlib.Path, step: int, template: dict[str, Any]) -> dict[str, Any]:
  """What the policy of a pretraining checkpoint acts by.

  The rest of its state, with the replay, stays on the disk.

  Args:
    folder: of the checkpoints.
    step: one whose item `encoder` is whole.
    template: see `policy_template`.

  Raises:
    UserError: no policy there, that of another config, or a damaged one.
  """
  path = (folder / str(step)).absolute()
  metadata = json.loads((path / '_CHECKPOINT_METADATA').read_text())
  record = metadata['custom_metadata']['record']['items'].get('state', {})
  for name, leaf in _named(template).items():
    there = record.get(name, dict(shape='absent', dtype=''))
    if (there['shape'], there['dtype']) != (list(leaf.shape), str(leaf.dtype)):
      raise UserError(
        f'{path}: {name} is {there["dtype"]}{there["shape"]}, expected '
        f'{leaf.dtype}{list(leaf.shape)}: give the config of that run'
      )
  try:
    policy = _read(path, template)
    damaged = [
      name
      for name, leaf in _named(policy).items()
      if [digests.of_arrays(leaf)] != [digest for _, digest in record[name]['blocks']]
    ]
  except jax.errors.JaxRuntimeError:  # out of memory says nothing about the files
    raise
  except Exception as e:  # orbax raises whatever the damaged bytes lead it into
    raise_if_interrupted(e)
    raise UserError(
      f'the policy in {path} is damaged ({type(e).__name__}): restore a copy, or remove that step'
    ) from e
  if damaged:
    raise UserError(
      f'the policy in {path} is damaged ({damaged[0]} holds other values than were saved): '
      'restore a copy, or remove that step'
    )
  return policy


def _named(policy):
  return {f'agent/{path}': leaf for path, leaf in digests.leaves(policy).items()}


def _read(path, template):
  """The policy's parameters alone, by this process alone."""
  context, process = ocp.Context(), jax.process_index()
  context.pytree_options.loading.partial_load = True
  context.multiprocessing_options.primary_host = process
  context.multiprocessing_options.active_processes = {process}
  with context:
    items = ocp.load_checkpointables(path, {'state': {'agent': template}})
  return items['state']['agent']


def make_arms(
  play: rollout.Play, mesh: Mesh, variables: dict[str, Any], policy: dict[str, Any]
) -> dict[str, Arm]:
  """The sources of generated pictures, compiled when first called.

  Args:
    play: pretrain.Program's setup.
    mesh: one-dimensional mesh, axis 'data'.
    variables: the encoder's.
    policy: of `load_policy`.

  Returns:
    {name: arm}, E a multiple of the mesh's size: 'policy' and 'uniform', the frame of a uniformly
    random step of the episode of that id and label; 'independent', of a normal latent; and
    'record', which takes latents in place of ids. A picture is a function of (key, id, label).
  """
  ssl = {
    'params': {'encoder': variables['params']},
    'batch_stats': {'encoder': variables.get('batch_stats', {})},
  }
  agent = agents.only_acting(policy)
  fixed = worlds.make_world(play.config, play.generator, mesh), ssl, agent
  sources = dict(
    policy=functools.partial(_chosen_latents, _policy_actions),
    uniform=functools.partial(_chosen_latents, _uniform_actions),
    independent=_independent_latents,
    record=_given_latents,
  )
  return {name: _compile(play, mesh, fixed, latents) for name, latents in sources.items()}


def _compile(play, mesh, fixed, latents):
  """The arm that renders the latents of one source."""

  def call(world, ssl, agent, key, which, labels):
    z = latents(play, world, ssl, agent, key, which, labels)
    return rollout.render(play, world, z, labels)

  in_specs = P(), P(), P(), P(), P('data'), P('data')
  sharded = jax.shard_map(call, mesh=mesh, in_specs=in_specs, out_specs=P('data'))
  compiled = jax.jit(sharded, out_shardings=NamedSharding(mesh, P()))

  def arm(key, which, labels):
    which, labels = (devices.shard(mesh, x, P('data')) for x in (which, labels))
    return jax.device_get(compiled(*fixed, key, which, labels))

  return arm


def _policy_actions(play, world, ssl, agent, env, keys, ids):
  frames = rollout.render(play, world, env.z, env.label)
  return rollout.act(play, ssl, agent, frames, keys, ids)


def _uniform_actions(play, world, ssl, agent, env, keys, ids):
  return environment.random_actions(keys, play.generator.z_dim, play.real)


def _chosen_latents(act, play, world, ssl, agent, key, ids, labels):
  """The latents (E, z_dim) of a uniformly random step of each episode, played by `act`."""
  length, num_classes = play.config.environment.episode_length, play.generator.num_classes
  z_dim, dynamics = play.generator.z_dim, world.dynamics
  key_start, key_steps, key_chosen = jax.random.split(key, 3)
  env = environment.reset(
    key_start, ids, jnp.zeros_like(ids), z_dim, num_classes, dynamics, play.real
  ).replace(label=labels)
  chosen = chosen_steps(key_chosen, ids, length)

  def one_step(carry):
    t, env, kept = carry
    key_policy, key_env = jax.random.split(jax.random.fold_in(key_steps, t))
    actions = act(play, world, ssl, agent, env, environment.env_keys(key_policy, ids), ids)
    taken = replay.unpack(replay.pack(actions, play.action_dtype), play.real)  # as in pretraining
    env = environment.step(env, taken, key_env, ids, dynamics, length, num_classes)
    return t + 1, env, jnp.where((env.step == chosen)[:, None], env.z, kept)

  # Nobody asks for what comes after the last chosen step.
  return jax.lax.while_loop(
    lambda carry: carry[0] < chosen.max(), one_step, (jnp.zeros_like(chosen[0]), env, env.z)
  )[2]


def _independent_latents(play, world, ssl, agent, key, ids, labels):
  keys = environment.env_keys(jax.random.fold_in(key, 1), ids)
  z_dim, num_classes = play.generator.z_dim, play.generator.num_classes
  return environment.first_latent_and_label(keys, z_dim, num_classes, play.real)[0]


def _given_latents(play, world, ssl, agent, key, z, labels):
  return z.astype(play.real)


def by_chosen_step(key: jax.Array, ids: np.ndarray, episode_length: int) -> np.ndarray:
  """ids (n,), those whose step comes early in `make_arms`'s episodes of this key first.

  So batches of them end early.
  """
  steps = chosen_steps(jax.random.split(key, 3)[2], ids, episode_length)
  return ids[np.argsort(steps, kind='stable')]


def chosen_steps(key: jax.Array, ids: jax.Array | np.ndarray, episode_length: int) -> jax.Array:
  """(E,) int32 steps, each uniform in [0, episode_length), functions of (key, id)."""
  keys = environment.env_keys(key, jnp.asarray(ids))
  return jax.vmap(lambda key: jax.random.randint(key, (), 0, episode_length, jnp.int32))(keys)


def recorded(
  folder: pathlib.Path, count: int, seed: int | Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
  """Frames of a record, each as likely as any other, drawn without replacement.

  Args:
    folder: of palm_jax.experience.
    count: how many; fewer where there are no more.
    seed: of numpy's generator.

  Returns:
    z (n, z_dim) and labels (n,) int32, in random order.

  Raises:
    UserError: no record.
  """
  rng = np.random.default_rng(seed)
  kept: list[np.ndarray] = []  # z, label and rank of the frames of lowest rank so far
  for part in experience.read(folder):
    z = part.z.reshape(-1, part.z.shape[-1])
    found = z, part.label.reshape(-1), rng.random(len(z))
    if kept:
      found = [np.concatenate(arrays) for arrays in zip(kept, found, strict=True)]
    order = np.argsort(found[2])[:count]
    kept = [x[order] for x in found]
  return kept[0], kept[1].astype(np.int32)
