"""The job of pretraining: runs `pretrain`'s program, watches it, and saves what it has reached."""

import time

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from palm_jax import experience, pairs, pretrain
from palm_jax.base import devices, pictures
from palm_jax.base.checkpoints import Checkpoints
from palm_jax.base.digests import digest
from palm_jax.base.errors import NonFiniteError, UserError
from palm_jax.base.metrics import MetricWriter, Progress
from palm_jax.base.processes import any_process
from palm_jax.base.training import Preemption
from palm_jax.job import Job, Run
from palm_jax.monitors import make_monitors
from palm_jax.speed import cost

PROGRESS_METRICS = (
  'loss',
  'z_std_ratio',
  'h_effective_rank',
  'reward',
  'alpha',
  'alpha_logp',
  'entropy_per_dim',
)


def run(this: Run) -> dict | None:
  """The job: pretrains in the world of `config.generator.path` (or this workdir's own generator),
  going on where it was.

  Writes checkpoints, metrics and films under `<workdir>/pretrain` and, when complete,
  `<workdir>/results/pretrain.json`.

  Args:
    config: the whole config.
    workdir: pathlib.Path.
    mesh: one-dimensional mesh, axis 'data'.
    data: palm_jax.data.load.Data, for pairs of real images.

  Returns:
    True when complete, False when stopped by SIGTERM; then everything is saved.

  Raises:
    UserError: impossible sizes, missing or damaged files.
    NonFiniteError: a loss or gradient became NaN or infinite; the last good checkpoint stays.
  """
  config, workdir, mesh, data = this.config, this.workdir, this.mesh, this.data
  folder, first_process = workdir / 'pretrain', jax.process_index() == 0
  generator = pretrain.load_world_generator(config, workdir)
  program = pretrain.make_program(config, generator, mesh)
  world = pretrain.make_world(config, generator, mesh, data)
  monitors = make_monitors(config, generator, program)
  key = jax.random.key(config.seed)
  if (
    pairs.SOURCES[config.pairs.source].needs == 'record'
  ):  # with that run's own weights and batches it would be that run again
    key = jax.random.fold_in(key, 1)
  template = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    jax.eval_shape(program.init, key, world),
    program.state_shardings,
  )
  check_memory(template, world, mesh)
  total = program.num_calls * config.pretrain.iterations_per_call
  check_record(config, world, total)
  checkpoints = Checkpoints(folder / 'checkpoints')
  restored, world_sha256 = checkpoints.restore({'state': template}), digest(generator.variables, {})
  if restored:
    step, state = restored.step, restored.items['state']
    scalars, seconds = restored.metadata['metrics'], restored.metadata['seconds']
    if restored.metadata.get('world', world_sha256) != world_sha256:
      raise UserError(
        f'{folder} began in the world of another generator than '
        f'{config.generator.path or workdir} holds now: give '
        'that one back, or choose another --workdir'
      )
    logging.info('pretrain: going on from iteration %d', step)
  else:
    step, state, scalars, seconds = 0, program.init(key, world), {}, 0.0

  p, per_call = config.pretrain, config.pretrain.iterations_per_call
  if p.record:
    experience.forget(folder / 'experience', step * p.rollout_length)
  monitor_every = max(1, round(program.num_calls * p.monitor_fraction)) * per_call
  writer = MetricWriter(folder, step) if first_process else None
  progress = Progress('pretrain', total * program.env_steps_per_iteration, 'env steps')
  started, saved_at = time.monotonic() - seconds, time.monotonic()
  with Preemption() as preemption, checkpoints:  # which waits for its last save
    while step < total:
      state, output = program.call(state, world)
      metrics = jax.device_get(output.metrics)
      updated = metrics.pop('updated')
      check_finite(metrics, step, folder)
      if p.record:
        experience.write(folder / 'experience', step * p.rollout_length, output.experience)
      step += per_call
      env_steps = step * program.env_steps_per_iteration
      if updated.any():
        scalars = scalars | {
          name: float(values[updated].mean()) for name, values in metrics.items()
        }
      if step % monitor_every == 0 or step == total:
        scalars = scalars | monitors.ranks(state.ssl, world, key)
        film = jax.device_get(monitors.film(state.ssl, state.agent, world, key))
        if first_process:
          write_film(folder / 'rollouts', env_steps, *film)
      if first_process:
        writer.write(step, dict(scalars, env_steps=env_steps))
        progress.update(
          env_steps, {name: scalars[name] for name in PROGRESS_METRICS if name in scalars}
        )
      stop = preemption.requested
      if (
        step == total
        or stop
        or any_process(time.monotonic() - saved_at > 60 * p.checkpoint_minutes)
      ):
        encoder = {
          name: state.ssl[name]['encoder']
          for name in ('params', 'batch_stats')
          if state.ssl[name]['encoder']
        }
        checkpoints.save(
          step,
          {'state': state, 'encoder': encoder},
          {'seconds': time.monotonic() - started, 'metrics': scalars, 'world': world_sha256},
        )
        saved_at = time.monotonic()
      if stop:
        break
  if first_process:
    writer.close()
  if step < total:
    return None
  return dict(
    metrics=scalars,
    env_steps=step * program.env_steps_per_iteration,
    iterations=step,
    checkpoint_step=step,
    seconds=time.monotonic() - started,
    seed=config.seed,
    generator=str(config.generator.path or 'own'),
    **devices.describe(mesh),
  )


def check_memory(state, world, mesh):
  """Raises UserError when a device has less memory than its share of the state takes, of which only
  shapes are read."""
  split = isinstance(world.material, experience.Experience)
  need = cost.nbytes(
    (state.ring, state.env, state.frames, world.material if split else ())
  ) / mesh.size + cost.nbytes(
    (state.ssl, state.agent, world._replace(material=()) if split else world)
  )
  memory = devices.memory_bytes(mesh)
  if need > memory:
    raise UserError(
      f'replay and networks take {need / 2**30:.1f} GiB on each of {mesh.size} device(s), which '
      'have '
      f'{memory / 2**30:.1f} GiB: lower replay.capacity; --job=plan says what fits'
    )


def check_record(config, world, iterations):
  """Raises UserError where pairs.source=passive_ordered would come to the end of the record."""
  rows = iterations * config.pretrain.rollout_length
  if config.pairs.source == 'passive_ordered' and len(world.material.step) < rows:
    raise UserError(
      f'pairs.record={config.pairs.record} holds {len(world.material.step)} rows, but '
      f'{iterations} iterations '
      f'read {rows}: lower pretrain.env_steps, or record a longer run'
    )


def check_finite(metrics, first_iteration, folder):
  """Raises NonFiniteError naming the first metric and iteration that is NaN or infinite;
  (iterations,) arrays."""
  bad = {
    name: int(np.argmin(np.isfinite(values)))
    for name, values in metrics.items()
    if not np.all(np.isfinite(values))
  }
  if bad:
    name = min(
      bad, key=lambda name: (bad[name], name != 'loss')
    )  # the rest of an iteration follows from its loss
    raise NonFiniteError(
      f'pretrain: {name} is {metrics[name][bad[name]]} at iteration {first_iteration + bad[name]}: '
      'lower the learning rates (simsiam.lr, sac.lr_*); the last good checkpoint is in '
      f'{folder / "checkpoints"}'
    )


def write_film(folder, env_steps, frames, labels):
  """A strip like the paper's Figure 2, one episode a row, every fourth frame; and all frames as an
  animated WebP."""
  name = f'{env_steps:010d}'
  pictures.save_png(folder / f'{name}.png', pictures.grid(frames[:, ::4], labels=labels))
  shown = frames[: 5 * (len(frames) // 5) or len(frames)]
  shown = shown.reshape(
    -1, min(5, len(frames)), *frames.shape[1:]
  )  # (rows, columns, steps, H, W, C)
  pictures.save_webp(
    folder / f'{name}.webp', [pictures.grid(shown[:, :, t]) for t in range(frames.shape[1])]
  )


def needs_data(config: ConfigDict) -> bool:
  """Whether pairs are of real images."""
  return pairs.SOURCES[config.pairs.source].needs == 'images'


def check_data(this: Run) -> None:
  """Raises UserError where the encoder could not see the data, by which it will be judged."""
  config = this.config
  if not config.generator.path:
    return
  generator = pretrain.load_world_generator(config, this.workdir)
  seen, given = pretrain.seen_shape(config, generator), this.data.train.images.shape[1:]
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


JOB = Job('pretrain', run, pretrain.check_config, needs_data, check_data)
