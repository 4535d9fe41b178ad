"""Jobs run as the runner does, for tests."""

import dataclasses
import functools
import pathlib

from jax.sharding import Mesh
from ml_collections import ConfigDict

from palm_jax import runner
from palm_jax.base import devices
from palm_jax.base.results import CONFIG, MADE_FROM, read_result
from palm_jax.data.arrays import Data
from palm_jax.job import Job, Run


def finish(
  job: Job,
  config: ConfigDict,
  workdir: pathlib.Path,
  data: Data | None = None,
  mesh: Mesh | None = None,
  **options,
) -> dict | None:
  """Checks and runs a job, prints its table and writes its result, which it returns.

  Args:
    options: further arguments of job.run.
  """
  mesh = mesh or devices.make_mesh()
  run = Run(config, workdir, mesh, data, runner=runner)
  job.check(config, mesh.size)
  if data:
    job.check_data(run)
  if options:
    job = dataclasses.replace(job, run=functools.partial(job.run, **options))
  return runner.execute(job, run)


def saved_result(path: pathlib.Path) -> dict:
  """A result as the job gave it, without what it was made from and its config."""
  return {k: v for k, v in read_result(path).items() if k not in (MADE_FROM, CONFIG)}
