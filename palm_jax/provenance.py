"""What a result was made from: the data, the generator, the pretraining; and whether it still is.

A digest of each stands in the result, and in the checkpoints on the way to it.
"""

import hashlib
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging
from ml_collections import ConfigDict

from palm_jax.base.digests import file_digest
from palm_jax.base.errors import one_line
from palm_jax.base.files import user_path
from palm_jax.base.processes import any_process, is_first
from palm_jax.base.results import MADE_FROM, read_result
from palm_jax.base.steps import newest_step
from palm_jax.data.collected import COLLECTED, collected_digest
from palm_jax.data.identity import fingerprint
from palm_jax.job import Job, Run
from palm_jax.workdir import result_path

ABSENT = 'absent'


def made_from(job: Job, this: Run) -> dict[str, Any]:
  """{name: {'step': of its checkpoint, if it is one, 'sha256'}} of what the job would read now.

  What is not there, or cannot be told, is left out.
  """
  found, reads = {}, _reads(job, this.config)
  if job.needs_data(this.config):
    found['data'] = {'sha256': this.data_digest}
  if 'generator' in reads:
    judged = this.config.quality.path if job.name == 'quality' else ''
    path = user_path(judged or this.config.generator.path or this.workdir)
    # Older results name under 'generator' what was not judged.
    found['judged' if judged else 'generator'] = _generator(path)
  if 'pretrain' in reads:
    found['pretrain'] = newest_step(this.workdir / 'pretrain')
  if 'record' in reads and this.config.pairs.record:
    found['record'] = newest_step(user_path(this.config.pairs.record) / 'pretrain')
  if 'encoder' in reads and this.config.world.encoder != 'random':
    found['encoder'] = newest_step(user_path(this.config.world.encoder) / 'pretrain')
  if 'trunk' in reads:
    found['trunk'] = newest_step(user_path(this.config.finetune.trunk) / 'pretrain')
  if job.reads_files and (files := sorted(job.reads_files(this))):
    lines = [f'{path} {file_digest(path)}' for path in files]
    found['files'] = {'sha256': hashlib.sha256('\n'.join(lines).encode()).hexdigest()}
  return {name: about for name, about in found.items() if about.get('sha256')}


def _reads(job, config):
  """What a job reads: a trunk is the pretraining of this workdir, of another, or of none."""
  if 'trunk' not in job.reads:
    return job.reads
  return {'own': ('pretrain',), 'scratch': ()}.get(config.finetune.trunk, job.reads)


def begin(job: Job, this: Run) -> dict[str, Any]:
  """`made_from` as the job begins; the log says where it judges an incomplete pretraining."""
  found = made_from(job, this)
  step = found.get('pretrain', {}).get('step')
  if step and not (this.workdir / 'results' / 'pretrain.json').exists():
    logging.warning('%s: the pretraining is not complete: its step %d is read', job.name, step)
  return found


def data_digest(config: ConfigDict, jobs: Sequence[Job], workdir: pathlib.Path) -> str | None:
  """Digest of the data that config.data names; None where no job reads them, or it is unknown."""
  read = any(job.claims and job.needs_data(config) for job in jobs)
  if not read or not config.data.name:
    return None
  if config.data.name == COLLECTED:
    return collected_digest(workdir)
  return fingerprint(str(config.data.name), config.data.dir or None, config.data.get('size', 0))


def _generator(path):
  """Of a file, of a bundled one by name, or of a folder with a checkpoint."""
  if path.is_file():
    return {'sha256': file_digest(path)}
  if not path.is_dir():
    return {'sha256': hashlib.sha256(str(path).encode()).hexdigest()}
  return newest_step(path if (path / 'network.json').is_file() else path / 'generator')


def waiting(jobs: Sequence[Job], this: Run) -> list[Job]:
  """Those that will run: what is not there or no longer fits, and what is of one before it."""
  found = []
  for job in jobs:
    if _reason_to_run(job, this) or {each.name for each in found} & set(_reads(job, this.config)):
      found.append(job)
  return found


def is_current(job: Job, this: Run) -> bool:
  """Whether a job's result is there and fits; the log says why it does not."""
  reason = _reason_to_run(job, this)
  if reason not in ('', ABSENT):
    path = result_path(this.workdir, job)
    logging.warning('%s: %s %s: it runs again', job.name, path, reason)
  return not reason


def _reason_to_run(job, this):
  """Why a job is not complete: ABSENT, or a sentence's end; '' where it is.

  The first process decides for all.
  """
  reason = ''
  path = result_path(this.workdir, job)
  if not job.claims or not path.exists():
    reason = ABSENT
  elif is_first():
    try:
      before = read_result(path).get(MADE_FROM, {})
    except (OSError, ValueError) as e:
      reason = f'is damaged ({one_line(e)})'
    else:
      other = difference(before, made_from(job, this))
      reason = f'was made from {other}' if other else ''
  if not any_process(reason and is_first()):
    return ''
  return reason or ABSENT


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
  """What of both differs, for people; None where nothing that can be compared does."""
  for name in before.keys() & now.keys():
    if before[name] != now[name]:
      return f'{name}{_at(before[name])}, which is now {_now(before[name], now[name])}'
  return None


def _at(about):
  return f' at step {about["step"]}' if 'step' in about else ''


def _now(before, about):
  moved = 'step' in about and about['step'] != before.get('step')
  return f'at step {about["step"]}' if moved else 'another'
