"""The one loop that trains anything here: it stops on a signal, saves, and is resumed.

with Training('pretrain', folder, total, unit='env steps', per_step=512) as run:
  restored = run.resume({'state': template})
  state = restored.items['state'] if restored else init()
  while not run.over:
    state, metrics = call(state)
    run.advance()
    run.write(metrics)
    run.show(metrics)
    if run.should_save:
      run.save({'state': state})
"""

import contextlib
import pathlib
import signal
import threading
import time
from collections.abc import Mapping
from typing import Any, NoReturn, Self

import jax
from absl import logging

from palm_jax.base import signals
from palm_jax.base.checkpoints import Checkpoints
from palm_jax.base.errors import UserError
from palm_jax.base.metrics import MetricWriter, Progress
from palm_jax.base.processes import any_process, is_first, largest
from palm_jax.base.steps import Restored


class Stopped(Exception):
  """A signal stopped the work, and all of it is saved."""


class Preemption:
  """Within it a signal of base.signals only sets a flag, which a loop asks for between its steps.

  A second Ctrl-C raises Interrupted at once.

  Args:
    holds: whether there is something to save. Without it, until `hold` is called, signals of a run
      of one process raise Interrupted; several processes must stop together.
  """

  _unanswered = 0  # of this process: the signal that came after a loop's last question

  def __init__(self, holds: bool = True):
    self._holds = holds

  def __enter__(self) -> Self:
    self._received = Preemption._unanswered  # the signal that came here
    self._agreed = 0  # that of all processes, when they last asked
    self._before = {}
    self._together = jax.process_count() > 1
    # Python allows handlers in the main thread only; elsewhere signals keep their meaning.
    if threading.current_thread() is threading.main_thread():
      self._before = {number: signal.signal(number, self._receive) for number in signals.taken()}
      signals.holders.append(self._is_held)
    return self

  def __exit__(self, *_: object) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)
    if self._is_held in signals.holders:
      signals.holders.remove(self._is_held)
    if signals.watching():  # in a command it is the next loop's to stop
      Preemption._unanswered = 0 if self._agreed else self._received

  def hold(self) -> None:
    """From now on there is something to save."""
    self._holds = True

  def _is_held(self):
    return self._holds

  def _receive(self, number, frame):
    again = number == signal.SIGINT == self._received
    self._received = number  # first: the exception may be lost in a callback
    if again or not (self._holds or self._together):
      signals.interrupt(number)

  @property
  def requested(self) -> bool:
    """Whether any process was told to stop; all must ask together, and get one answer."""
    self._agreed = largest(self._received)
    return self._agreed > 0

  def stop(self) -> NoReturn:
    """Ends the work that was told to stop: Stopped after SIGTERM, else Interrupted."""
    if self._agreed in (signal.SIGINT, signals.HANGUP):
      signals.interrupt(self._agreed, agreed=True)
    raise Stopped


class Training:
  """A training of known length: its checkpoints, metrics, progress lines, and signals.

  All processes go through it together. Leaving the block waits for the last save; where a signal
  came, it raises Stopped (Interrupted after Ctrl-C or SIGHUP). Before the first step nothing is to
  be saved, and a signal ends the work at once.

  Args:
    name: of the job, in progress lines.
    folder: for checkpoints/ and the metrics.
    total: steps of the whole training.
    unit: what progress counts, in the plural.
    per_step: how many of these a step is.
    metrics_per_step: by how much a step moves the step of the metrics.
    checkpoint_minutes: between two checkpoints.
    keep: newest checkpoints that stay.
    data_digest: of the data it learns from; a run that began with others is not resumed.
    writes_metrics: whether there are metrics.jsonl and TensorBoard's files.

  Attributes:
    step: how many steps are done.
    checkpoints: base.checkpoints.Checkpoints.
    preemption: Preemption.
  """

  def __init__(
    self,
    name: str,
    folder: pathlib.Path,
    total: int,
    *,
    unit: str = 'steps',
    per_step: int = 1,
    metrics_per_step: int = 1,
    checkpoint_minutes: float = 10.0,
    keep: int = 2,
    data_digest: str | None = None,
    writes_metrics: bool = True,
  ):
    self._name = name
    self._folder = folder
    self._total = total
    self._per_step = per_step
    self._metrics_per_step = metrics_per_step
    self._seconds_to_save = 60 * checkpoint_minutes
    self._data_digest = data_digest
    self._writes_metrics = writes_metrics
    self._progress = Progress(name, total * per_step, unit)
    self._writer: MetricWriter | None = None
    self._stopping = False
    self.step = 0
    self.checkpoints = Checkpoints(folder / 'checkpoints', keep)
    self.preemption = Preemption(holds=False)
    self._began = self._saved_at = time.monotonic()

  def __enter__(self) -> Self:
    self.preemption.__enter__()
    return self

  def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
    stopping = False
    with contextlib.ExitStack() as last:  # in the opposite order, whatever fails
      last.callback(self.preemption.__exit__)
      try:
        self.checkpoints.close()
      finally:
        if self._writer:
          self._writer.close()
      stopping = kind is None and self.preemption.requested
    if kind is None and (stopping or not self.complete):
      self.preemption.stop()

  def resume(self, templates: Mapping[str, Any]) -> Restored | None:
    """What the newest whole checkpoint holds, from which the loop resumes; None at the start.

    Args:
      templates: {name: tree of jax.ShapeDtypeStruct with shardings} of the items wanted.

    Raises:
      UserError: see Checkpoints.restore; or the run began with other data.
    """
    restored = self.checkpoints.restore(templates)
    if restored:
      self._check_data(restored.metadata.get('data'))
      self.step = restored.step
      self._began -= restored.metadata.get('seconds', 0.0)
      done, total = self.step * self._per_step, self._total * self._per_step
      logging.info('%s: resumed at step %d (%d of %d)', self._name, self.step, done, total)
    if self._writes_metrics and is_first():
      self._writer = MetricWriter(self._folder, self.step * self._metrics_per_step)
    return restored

  def _check_data(self, before):
    if before and self._data_digest and before != self._data_digest:
      raise UserError(
        f'{self._folder} began with other data than there are now (digest {before[:12]}, now '
        f'{self._data_digest[:12]}): give those back, or choose another --workdir'
      )
    self._data_digest = self._data_digest or before

  def _about(self):
    """What stands in each checkpoint."""
    return {'seconds': self.seconds} | ({'data': self._data_digest} if self._data_digest else {})

  @property
  def seconds(self) -> float:
    """That the training has taken, over all its starts."""
    return time.monotonic() - self._began

  @property
  def complete(self) -> bool:
    """Whether all steps are done."""
    return self.step >= self._total

  @property
  def over(self) -> bool:
    """Whether the loop ends here: complete, or stopped by a signal and saved."""
    return self.complete or self._stopping

  def advance(self, steps: int = 1) -> None:
    """Counts steps that were done."""
    self.preemption.hold()
    self.step += steps

  def write(self, scalars: Mapping[str, float]) -> None:
    """Adds a line to metrics.jsonl, in the first process."""
    if self._writer:
      self._writer.write(self.step * self._metrics_per_step, scalars)

  def show(self, scalars: Mapping[str, float]) -> None:
    """Logs a line of progress every few seconds."""
    self._progress.update(self.step * self._per_step, scalars)

  @property
  def should_save(self) -> bool:
    """Whether the training is complete, stops, or was last saved checkpoint_minutes ago.

    To be asked once after each step, by all processes.
    """
    self._stopping = self.preemption.requested
    due = time.monotonic() - self._saved_at > self._seconds_to_save
    return self.complete or self._stopping or any_process(due)

  def save(self, items: Mapping[str, Any], **metadata: Any) -> None:
    """Saves the items, and beside them the metadata, `seconds` and `data`. Raises UserError."""
    if self._writer:
      self._writer.sync()  # first: a step on the disk has its line
    self.checkpoints.save(self.step, dict(items), dict(metadata, **self._about()))
    self._saved_at = time.monotonic()
