"""The job of pretraining: runs `pretrain`'s program, watches it, and saves what it has reached."""

import math
import pathlib
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from palm_jax import encoder, experience, monitors, pairs, pretrain, worlds
from palm_jax.base import devices, pictures
from palm_jax.base.errors import NonFiniteError, UserError
from palm_jax.base.files import user_path
from palm_jax.base.processes import agree, from_first, is_first
from palm_jax.base.steps import newest_step
from palm_jax.base.training import Training
from palm_jax.experience import Experience
from palm_jax.job import Job, Run
from palm_jax.rollout import World
from palm_jax.speed import cost

PROGRESS_METRICS = (
  'loss',
  'z_std_ratio',
  'h_effective_rank',
  'reward',
  'alpha',
  'alpha_logp',
  'entropy_per_dim',
  'cone',
)


def run(this: Run) -> dict:
  """The job: pretrains in the world of config.generator.path, or this workdir's own generator.

  Writes checkpoints, metrics and films under <workdir>/pretrain, and resumes what is there.

  Returns:
    What stands in results/pretrain.json.

  Raises:
    UserError: impossible sizes, missing or damaged files.
    NonFiniteError: pictures, a loss or a gradient are NaN or infinite; the last good checkpoint
      stays.
    Stopped: by a signal; everything is saved.
  """
  config, workdir, mesh = this.config, this.workdir, this.mesh
  folder, p = workdir / 'pretrain', config.pretrain
  generator = worlds.load_world_generator(config, workdir)
  program = pretrain.make_program(config, generator, mesh)
  world = worlds.make_world(config, generator, mesh, this.data)
  watch = monitors.make_monitors(program.setup)
  key = first_key(config)
  template = template_of(program, key, world)
  working = cost.working_bytes(config, generator, template.ssl, mesh.size)
  eyes = encoder.cheaper_eyes(config.encoder, program.setup.image_shape)
  check_memory(template, world, mesh, working, eyes)
  worlds.check_pictures(config, generator)
  per_call, env_steps = p.iterations_per_call, program.env_steps_per_iteration
  total = program.setup.num_calls * per_call
  check_record(config, world, total)
  monitor_every = max(1, round(program.setup.num_calls * p.monitor_fraction)) * per_call
  origin = origin_of(config, generator)

  with Training(
    'pretrain',
    folder,
    total,
    unit='env steps',
    per_step=env_steps,
    checkpoint_minutes=p.checkpoint_minutes,
    data_digest=this.data_digest if needs_data(config) else None,
  ) as training:
    restored = training.resume({'state': template})
    if restored:
      check_origin(this, restored.metadata, origin, generator)
      note_devices(restored.metadata.get('devices', mesh.size), mesh.size)
      state, scalars = restored.items['state'], restored.metadata['metrics']
    else:
      state, scalars = program.init(key, world), {}
    warned = set()
    if p.record:
      experience.forget(folder / 'experience', training.step * p.rollout_length)
    while not training.over:
      state, output = program.call(state, world)
      scalars = scalars | mean_metrics(output.metrics, training.step, folder)
      if p.record:
        row = training.step * p.rollout_length
        experience.write(folder / 'experience', row, output.experience)
      training.advance(per_call)
      if training.step % monitor_every == 0 or training.complete:
        scalars = scalars | watch.ranks(state.ssl, world, key)
        film = watch.film(state.ssl, state.agent, world, key)
        write_film(folder / 'rollouts', training.step * env_steps, *jax.device_get(film))
      warned |= warn(scalars, warned)
      training.write(dict(scalars, env_steps=training.step * env_steps))
      training.show({name: scalars[name] for name in PROGRESS_METRICS if name in scalars})
      if training.should_save:
        items = {'state': state, 'encoder': encoder_of(state)}
        training.save(items, metrics=scalars, devices=mesh.size, **origin)
  return dict(
    metrics=scalars,
    env_steps=total * env_steps,
    iterations=total,
    checkpoint_step=total,
    seconds=training.seconds,
    seed=config.seed,
    generator=str(config.generator.path or 'own'),
    **devices.describe(mesh),
  )


def first_key(config: ConfigDict) -> jax.Array:
  """The key of the first state.

  With a record's own weights and batches the run would be the recorded one again.
  """
  key = jax.random.key(config.seed)
  passive = pairs.SOURCES[config.pairs.source].needs == 'record'
  return jax.random.fold_in(key, 1) if passive else key


def template_of(program: pretrain.Program, key: jax.Array, world: World) -> pretrain.State:
  """State of jax.ShapeDtypeStructs, with where each part lies."""
  place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
  return jax.tree.map(place, jax.eval_shape(program.init, key, world), program.state_shardings)


def encoder_of(state: pretrain.State) -> dict[str, Any]:
  """{'params', 'batch_stats'} of the encoder alone; the second where it has any."""
  found = {name: state.ssl[name]['encoder'] for name in ('params', 'batch_stats')}
  return {name: tree for name, tree in found.items() if tree}


def origin_of(config: ConfigDict, generator: Any) -> dict[str, str | None]:
  """Digests of the 'world' and, where one is read, the 'record' that a run is of.

  Raises:
    UserError: the processes of the run have other generators.
  """
  origin: dict[str, str | None] = {'world': experience.world_digest(generator)}
  # Each would play in a world of its own, and nothing would tell.
  agree({'the generator': origin['world']}, 'give all of them the same files')
  if config.pairs.record:
    record = from_first(newest_step(user_path(config.pairs.record) / 'pretrain'))
    origin['record'] = record.get('sha256')
  return origin


def check_origin(
  this: Run, before: dict[str, Any], now: dict[str, str | None], generator: Any
) -> None:
  """Raises UserError where the run began in another world or with another record than now.

  Args:
    before: metadata of its checkpoint; what older versions did not write fits any.
    now: of `origin_of`.
    generator: that the world has now, which older versions digested otherwise.
  """
  config = this.config
  of = {
    'world': ('in the world of another generator', config.generator.path or this.workdir),
    'record': ('with another record', config.pairs.record),
  }
  for name, value in now.items():
    there = before.get(name, value)
    older = name == 'world' and there != value and experience.is_world_of(generator, there)
    if there != value and not older:
      what, path = of[name]
      raise UserError(
        f'{this.workdir / "pretrain"} began {what} than {path} holds now: give that one back, or '
        'choose another --workdir'
      )


def note_devices(before: int, now: int) -> None:
  """Says what a run on another number of devices is."""
  if before != now:
    logging.info(
      'pretrain: %d device(s) go on where %d were: the same run in exact arithmetic; in float32 '
      'another order of rounding, so it drifts apart from the undisturbed one',
      now,
      before,
    )


def check_memory(
  state: pretrain.State, world: World, mesh: Mesh, working: dict[str, int], eyes: str = ''
) -> None:
  """Raises UserError where what a device holds exceeds its memory; reads shapes only.

  Args:
    state, world: arrays or their shapes.
    mesh: whose devices share them.
    working: of `cost.working_bytes`, what a device needs besides.
    eyes: of `encoder.cheaper_eyes`.
  """
  split, whole = [state.ring, state.env, state.frames], [state.ssl, state.agent]
  (split if isinstance(world.material, Experience) else whole).append(world.material)
  whole.append(world._replace(material=()))
  less_learning = cost.LESS_LEARNING + (f', or set {eyes}' if eyes else '')
  takes = {
    'lower replay.capacity': cost.nbytes(split) / mesh.size,
    'lower encoder.width, simsiam.* or sac.hidden': cost.nbytes(whole),
    less_learning: working.get('activations', 0),
    cost.LESS_DRAWING: working.get('rendering', 0),
  }
  remedy = f'{max(takes, key=takes.__getitem__)}; --job=plan says what fits'
  what = f'replay, networks and {" and ".join(working)} take'
  devices.check_fits(sum(takes.values()), mesh, what, remedy)


def check_record(config: ConfigDict, world: World, iterations: int) -> None:
  """Raises UserError where pairs.source=passive_ordered would come to the end of the record."""
  rows = iterations * config.pretrain.rollout_length
  if config.pairs.source == 'passive_ordered' and len(world.material.step) < rows:
    raise UserError(
      f'pairs.record={config.pairs.record} holds {len(world.material.step)} rows, but '
      f'{iterations} iterations read {rows}: lower pretrain.env_steps, or record a longer run'
    )


def mean_metrics(
  metrics: dict[str, jax.Array], first_iteration: int, folder: pathlib.Path
) -> dict[str, float]:
  """Means over the iterations of a call that had updates; {} where none had.

  Raises:
    NonFiniteError: names the first metric and iteration that is NaN or infinite.
  """
  values = jax.device_get(metrics)
  updated = values.pop('updated')
  bad = {
    name: int(np.argmin(np.isfinite(x))) for name, x in values.items() if not np.isfinite(x).all()
  }
  if bad:
    # The rest of an iteration follows from its loss.
    name = min(bad, key=lambda name: (bad[name], name != 'loss'))
    raise NonFiniteError(
      f'pretrain: {name} is {values[name][bad[name]]} at iteration {first_iteration + bad[name]}: '
      'lower the learning rates (simsiam.lr, sac.lr_*), in another --workdir, which plays in the '
      f'same generator with --config.generator.path={folder.parent}, unless that is given already; '
      f'the last good checkpoint is in {folder / "checkpoints"}'
    )
  if not updated.any():
    return {}
  return {name: float(x[updated].mean()) for name, x in values.items()}


def warn(scalars: dict[str, float], before: set[str]) -> set[str]:
  """Logs each trouble that was not said before -> the names of those there are."""
  found = monitors.troubles(scalars)
  for name in found.keys() - before:
    logging.warning('pretrain: %s', found[name])
  return {*found}


def write_film(
  folder: pathlib.Path, env_steps: int, frames: np.ndarray, labels: np.ndarray
) -> None:
  """A strip like the paper's Figure 2, every fourth frame; and all frames as an animated WebP.

  The first process writes.

  Args:
    frames: (rows, steps, H, W, C) uint8, one episode a row.
    labels: (rows,).
  """
  if not is_first():
    return
  name = f'{env_steps:010d}'
  strip = pictures.grid(frames[:, ::4], labels=labels.tolist())
  pictures.save_png(folder / f'{name}.png', strip)
  shown = frames[: 5 * (len(frames) // 5) or len(frames)]
  # (rows, columns, steps, H, W, C)
  shown = shown.reshape(-1, min(5, len(frames)), *frames.shape[1:])
  film = [pictures.grid(shown[:, :, t]) for t in range(frames.shape[1])]
  pictures.save_webp(folder / f'{name}.webp', film)


def needs_data(config: ConfigDict) -> bool:
  """Whether pairs are of real images."""
  return pairs.SOURCES[config.pairs.source].needs == 'images'


def check_data(this: Run) -> None:
  """Raises UserError where the encoder could not see the data, by which it will be judged."""
  config, given = this.config, this.data.train.images.shape[1:]
  if not config.generator.path:
    crop, side = config.environment.crop, min(given[:2]) + 2 * config.generator.pad
    if 2 * crop >= side:
      raise UserError(
        f'environment.crop={crop} of pictures of {side}x{side}, which the generator will draw, '
        'leaves nothing: it is the margin that generator.pad adds'
      )
    grown = 2 * (config.generator.pad - crop)
    seen = given[0] + grown, given[1] + grown, given[2] * config.environment.stack
    encoder.check_picture(config.encoder, seen[:2])
    if pairs.SOURCES[config.pairs.source].keeps:
      frames = config.replay.capacity * math.prod(seen) / this.mesh.size
      remedy = f'lower replay.capacity={config.replay.capacity}; --job=plan says what fits'
      devices.check_fits(frames, this.mesh, "the replay's frames take", remedy)
    c = config.simsiam
    heads = c.proj_hidden, c.proj_hidden, c.proj_dim, c.pred_hidden
    names = 'simsiam.(proj_hidden, proj_hidden, proj_dim, pred_hidden)'
    devices.check_layers({names: heads, 'sac.hidden': config.sac.hidden}, 1, this.mesh)
    return
  generator = worlds.load_world_generator(config, this.workdir)
  seen = worlds.seen_shape(config, generator)
  encoder.check_picture(config.encoder, given)  # by what it will be judged
  if seen[2] != given[2]:
    raise UserError(
      f'the pictures of generator.path={config.generator.path} have {seen[2]} channels, those of '
      f'{config.data.name} {given[2]}: its encoder could not see them; give others, or train a '
      'generator on them'
    )
  if seen != given:
    logging.warning(
      'the encoder will be trained on pictures of %s and judged on pictures of %s', seen, given
    )


JOB = Job('pretrain', run, pretrain.check, needs_data, check_data, reads=('generator', 'record'))
