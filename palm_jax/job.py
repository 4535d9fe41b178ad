"""What a job is, and what it works on."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from jax.sharding import Mesh
from ml_collections import ConfigDict


class Runner(Protocol):
  """What a job that runs others needs of palm_jax.runner; see there."""

  def run(
    self,
    config: ConfigDict,
    job: str,
    workdir: str | pathlib.Path | None,
    download: bool = False,
    patience: float = ...,
  ) -> bool: ...

  def find(self, name: str) -> 'Job': ...

  def claim(self, workdir: pathlib.Path, config: ConfigDict) -> None: ...

  def check(self, config: ConfigDict, num_devices: int) -> None: ...

  def names(self) -> tuple[str, ...]: ...


@dataclasses.dataclass(frozen=True)
class Run:
  """What a job works on.

  Attributes:
    config: the whole config.
    workdir: absolute path.
    mesh: one-dimensional, axis 'data'.
    data: data.arrays.Data where the job needs them, else None.
    download: whether published data may be fetched.
    runner: for a job that runs others.
    data_digest: of provenance.data_digest, where any job of the command needs data.
  """

  config: ConfigDict
  workdir: pathlib.Path
  mesh: Mesh
  data: Any = None
  download: bool = False
  runner: Runner | None = None
  data_digest: str | None = None


def always(config: ConfigDict) -> bool:
  """For jobs that cannot do without data."""
  del config
  return True


def never(config: ConfigDict) -> bool:
  """For jobs that read no data."""
  del config
  return False


def accept(run: Run) -> None:
  """For jobs that take any data, or have nothing to clean."""
  del run


@dataclasses.dataclass(frozen=True)
class Job:
  """Something that --job= can name. Each job's module ends with one: JOB = Job(...).

  Attributes:
    name: of the job, and of its results/<name>.json.
    run: does it. Returns the result, all of it JSON; None where a signal stopped it, with
      everything saved.
    check: (whole config, number of devices); UserError on settings that the job would refuse,
      before any job starts.
    needs_data: whether the data of config.data are to be loaded for it.
    check_data: UserError on data that the job would refuse, before any job starts.
    fetch: with --download, gets what the job needs besides config.data.
    clean: removes what only an incomplete job needs, when its result has been written, and when it
      is found complete.
    table: the result as text, for the screen.
    reads: what it reads of the workdir: 'generator' (or that of config.generator.path), 'pretrain',
      or of another: 'record' (config.pairs.record), 'encoder' (that of config.world.encoder),
      'trunk' (that of config.finetune.trunk, which may be this one's 'pretrain'). Its result is of
      their newest checkpoints, and no longer fits when there are newer ones.
    reads_files: whose results of other workdirs it reads, as far as they are there.
    result: where the result lies in the workdir; '' is results/<name>.json.
    judges: whether it only judges what other jobs made; its section of the config may then change
      until it has a result.
    judges_with: section of another job that judges, which it reads, too.
    claims: whether the workdir becomes the config's, the job is skipped where its result is
      there, and the result is written. False for jobs that run whenever they are asked for.
  """

  name: str
  run: Callable[[Run], dict[str, Any] | None]
  check: Callable[[ConfigDict, int], None]
  needs_data: Callable[[ConfigDict], bool] = always
  check_data: Callable[[Run], None] = accept
  fetch: Callable[[ConfigDict], None] | None = None
  clean: Callable[[Run], None] = accept
  table: Callable[[dict[str, Any]], str] | None = None
  reads: tuple[str, ...] = ()
  reads_files: Callable[[Run], Iterable[pathlib.Path]] | None = None
  result: str = ''
  judges: bool = False
  judges_with: str = ''
  claims: bool = True
