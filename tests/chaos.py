"""Signals at random moments: a job that is resumed ends as one that nothing disturbed.

  python -m tests.chaos --trials=200 --seed=0

Each trial takes the workdir as it was before one job of a tiny chain, starts the job, sends a
signal (SIGKILL, SIGTERM, Ctrl-C, Ctrl-C twice, SIGHUP) once or twice, and lets it finish.
Checkpoints, results, records and metrics must then be those of a run that nothing disturbed, no
good step may have been set aside, nothing half-written may lie about, and every signal must have
ended the job within 10 seconds.
"""

import argparse
import collections
import concurrent.futures
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np

from palm_jax import experience
from palm_jax.base.metrics import check_jsonl
from palm_jax.base.results import read_result
from palm_jax.base.steps import list_steps
from tests import compiler

ROOT = pathlib.Path(__file__).parents[1]
JOBS = 'generator', 'pretrain', 'probe', 'ood', 'diversity', 'quality', 'report'
KINDS = 'KILL', 'TERM', 'INT', 'INT twice', 'HUP'
PATIENCE = 10  # seconds that a signal may take
EARLY = 1.5  # seconds in which Python itself may be starting, and a signal is its own affair
CLOCKS = 'seconds', 'images_per_second', 'sha256', 'made_from', 'config'

CONFIG = """
from tests.worlds import tiny_config


def get_config():
  c = tiny_config()
  c.data.name = {data!r}
  c.jobs = {jobs!r}
  c.generator.update(dict(
    z_dim=4, w_dim=4, mapping_layers=1, channel_base=32, channel_max=4, conv_clamp=0.0,
    d_mapping_layers=0, mbstd_group=2, batch_size=4, r1_gamma=0.1, r1_interval=4, kimg=0.224,
    ema_kimg=0.1, iterations_per_call=4, snapshot_kimg=0.1, checkpoint_minutes=0.001,
    augment='color'))
  c.simsiam.update(dict(proj_hidden=8, proj_dim=8, pred_hidden=4))
  c.replay.num_shards = 1
  c.pretrain.update(dict(
    env_steps=14 * 2 * 16, num_envs=8, rollout_length=2, batch_size=16, updates_per_iteration=1,
    warmup_steps=48, iterations_per_call=2, checkpoint_minutes=0.001, monitor_fraction=0.5,
    record=True))
  c.probe.methods = 'lbfgs', 'knn', 'finetune'
  c.probe.finetune.update(dict(epochs=6, batch_size=8, checkpoint_minutes=0.001))
  c.ood.update(dict(seeds=2, knn_k=3))
  c.ood.head.update(dict(epochs=2, batch_size=8))
  c.diversity.update(dict(num_images=8, neighbours=2, draws=2, batch_size=8))
  c.quality.update(dict(num_images=32, batch_size=16, kid_subsets=2, kid_subset_size=4,
                        proxy_width=4, proxy_epochs=2, proxy_batch_size=8))
  c.report.num_points = 10
  return c
"""


class Wrong(Exception):
  """What a trial found that must not be."""


def halt(process, moment, patience=300):
  """Stops a process at the first moment at which `moment()` holds -> whether there was one."""
  deadline = time.monotonic() + patience
  while process.poll() is None and time.monotonic() < deadline:
    if moment():
      process.send_signal(signal.SIGSTOP)
      if moment():  # it may have passed before the process stood still
        return True
      process.send_signal(signal.SIGCONT)
    time.sleep(0.001)
  return False


class Chain:
  """A tiny chain in `base`: its workdir before and after each job, and how long each takes."""

  def __init__(self, base: pathlib.Path, jobs=JOBS, warm=True):
    # As in a terminal: whoever starts this in the background has signals ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    self.base = base
    self.jobs = jobs
    self.seconds = {}
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (60, 8, 8, 1), dtype=np.uint8)
    np.savez(base / 'data.npz', images=images, labels=np.arange(60) % 3)
    config = CONFIG.format(data=str(base / 'data.npz'), jobs=jobs)
    (base / 'config.py').write_text(config)
    workdir = base / 'workdir'
    for job in jobs if warm else ():
      self.finish(job, base / 'warm')  # compiles, so that `seconds` are those of what follows
    for job in jobs:
      workdir.mkdir(exist_ok=True)
      shutil.copytree(workdir, base / f'before_{job}')
      began = time.monotonic()
      self.finish(job, workdir)
      self.seconds[job] = time.monotonic() - began
      shutil.copytree(workdir, base / f'after_{job}')

  def start(self, job, workdir, log):
    """The command that people type."""
    cache = os.environ.get('JAX_COMPILATION_CACHE_DIR', str(self.base / 'cache'))
    environment = dict(
      os.environ,
      JAX_PLATFORMS='cpu',
      XLA_FLAGS=compiler.FLAGS,
      JAX_COMPILATION_CACHE_DIR=cache,
      JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS='0',
      PYTHONUNBUFFERED='1',
    )
    command = [sys.executable, '-m', 'palm_jax.main', f'--config={self.base / "config.py"}']
    command += [f'--job={job}', f'--workdir={workdir}']
    with log.open('w') as file:
      return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)

  def finish(self, job, workdir):
    """Runs a job to its end and returns the log."""
    log = workdir.with_suffix('.log')
    process = self.start(job, workdir, log)
    try:
      code = process.wait(600)
    except subprocess.TimeoutExpired:
      raise Wrong(f'{job} did not end in 600 s:\n{log.read_text()[-3000:]}') from None
    finally:
      process.kill()
    text = log.read_text()
    if code or 'Traceback' in text:
      raise Wrong(f'{job}: ended with {code}:\n{text[-3000:]}')
    return text

  def interrupt(self, job, workdir, kind, after=0.0, moment=None):
    """Starts a job, sends signals `after` so many seconds, and checks how it ends.

    Instead of a time there may be a function `moment`, which says when it has come.
    """
    log = workdir.with_suffix('.log')
    process = self.start(job, workdir, log)
    began = time.monotonic()
    try:
      time.sleep(after)
      if moment and not halt(process, moment):
        raise Wrong(f'{job}: the moment for a signal did not come:\n{log.read_text()[-3000:]}')
      after = time.monotonic() - began
      number = getattr(signal, f'SIG{kind.split()[0]}')
      process.send_signal(number)
      process.send_signal(signal.SIGCONT)
      if kind == 'INT twice':
        time.sleep(0.3)
        process.send_signal(number)
      sent = time.monotonic()
      try:
        code = process.wait(PATIENCE)
      except subprocess.TimeoutExpired:
        raise Wrong(f'{kind} after {after:.2f} s did not end {job} in {PATIENCE} s') from None
      taken = time.monotonic() - sent
    finally:
      process.kill()
      process.wait()
    text = log.read_text()
    expected = {128 + number}
    if kind == 'TERM' or is_complete(job, workdir):  # whoever sends SIGTERM expects the end
      expected.add(0)
    if kind == 'KILL' or after < EARLY:
      expected.add(-number)
    if after < EARLY and 'init_import_site' in text:  # Python's own way to end in the middle of it
      expected.add(1)
    if code not in expected:
      raise Wrong(f'{kind} after {after:.2f} s: {job} ended with {code}:\n{text[-3000:]}')
    if 'Traceback' in text and after >= EARLY:
      raise Wrong(f'{kind} after {after:.2f} s: {job} ended with a traceback:\n{text[-3000:]}')
    if 'is damaged' in text or 'passed over' in text:
      raise Wrong(f'{kind} after {after:.2f} s: {job} took work for damaged:\n{text[-3000:]}')
    return taken

  def trial(self, number, seed):
    """One trial -> (job, kinds, seconds that the slowest signal took). Raises Wrong."""
    rng = random.Random(f'{seed} {number}')
    job = rng.choice(self.jobs)
    kinds = [rng.choice(KINDS) for _ in range(rng.choice((1, 1, 2)))]
    workdir = self.base / f'trial_{number}'
    shutil.copytree(self.base / f'before_{job}', workdir)
    slowest = 0.0
    try:
      for kind in kinds:
        after = rng.uniform(0, 1.1) * self.seconds[job]
        slowest = max(slowest, self.interrupt(job, workdir, kind, after))
      text = self.finish(job, workdir)
      if 'is damaged' in text or 'passed over' in text:
        raise Wrong(f'{job}: work was taken for damaged:\n{text[-3000:]}')
      compare(workdir, self.base / f'after_{job}')
    except Wrong as e:
      raise Wrong(f'trial {number} (seed {seed}, {job}, {", ".join(kinds)}): {e}') from None
    shutil.rmtree(workdir)
    return job, kinds, slowest


def is_complete(job: str, workdir: pathlib.Path) -> bool:
  """Whether a job has its result; that of the report is its page."""
  return (workdir / ('report.html' if job == 'report' else f'results/{job}.json')).exists()


def compare(got: pathlib.Path, want: pathlib.Path) -> None:
  """Raises Wrong where a workdir does not hold what the undisturbed one holds."""
  junk = [
    str(path.relative_to(got))
    for pattern in ('*.part', '*.damaged', '*.deleted', '*orbax-checkpoint-tmp*', '.*.lock')
    for path in got.rglob(pattern)
  ]
  if junk:
    raise Wrong(f'junk is left: {junk}')
  for path in sorted(want.rglob('*')):
    name = path.relative_to(want)
    if not (got / name).exists() and name.parts[0] != 'compilation_cache' and _is_fixed(name):
      raise Wrong(f'{name} is missing')
  for path in want.glob('results/*.json'):
    a, b = (_plain(root / 'results' / path.name) for root in (got, want))
    if a != b:
      raise Wrong(f'results/{path.name} differs: {a} instead of {b}')
  for job in ('generator', 'pretrain'):
    steps = [list_steps(root / job / 'checkpoints') for root in (got, want)]
    if [found[-1:] for found in steps][0] != [found[-1:] for found in steps][1]:
      raise Wrong(f'{job}: newest checkpoints are {steps}')
    if steps[1] and _digests(got, job, steps[0][-1]) != _digests(want, job, steps[1][-1]):
      raise Wrong(f'{job}: the newest checkpoints differ')
    if (want / job / 'metrics.jsonl').exists():
      rows, damaged = check_jsonl(got / job / 'metrics.jsonl')
      expected, _ = check_jsonl(want / job / 'metrics.jsonl')
      if damaged or [*map(_without_clocks, rows)] != [*map(_without_clocks, expected)]:
        raise Wrong(f'{job}/metrics.jsonl differs (damaged: {damaged})')
  if (want / 'pretrain' / 'experience').exists():
    records = [experience.read(root / 'pretrain' / 'experience') for root in (got, want)]
    for a, b in zip(*records, strict=True):
      if any((x != y).any() for x, y in zip(a, b, strict=True)):
        raise Wrong('the record differs')


def _is_fixed(name):
  """Whether a path has the same name in every run: not steps of checkpoints between, and events."""
  return 'checkpoints' not in name.parts and 'tfevents' not in name.name


def _plain(path):
  """A result without clocks and places."""
  places = re.escape(str(path.parents[2])) + r'/[^/"]*'
  return json.loads(re.sub(places, 'WORKDIR', json.dumps(_without_clocks(read_result(path)))))


def _digests(workdir, job, step):
  about = workdir / job / 'checkpoints' / str(step) / '_CHECKPOINT_METADATA'
  return json.loads(about.read_text())['custom_metadata']['record']['items']


def _without_clocks(value):
  if isinstance(value, list):
    return [_without_clocks(item) for item in value]
  if not isinstance(value, dict):
    return value
  return {name: _without_clocks(item) for name, item in value.items() if name not in CLOCKS}


def parse(arguments=None):
  """The options of the command."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument('--trials', type=int, default=200)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--side_by_side', type=int, default=2)
  parser.add_argument('--jobs', nargs='+', default=JOBS)
  return parser.parse_args(arguments)


def main() -> int:
  """Prints a line a trial and returns how many were wrong."""
  options = parse()
  base = pathlib.Path(tempfile.mkdtemp(prefix='palm_jax_chaos_'))
  chain = Chain(base, tuple(options.jobs))
  print('seconds undisturbed:', {job: round(s, 1) for job, s in chain.seconds.items()}, flush=True)
  count = collections.Counter()
  slowest = collections.Counter()
  with concurrent.futures.ThreadPoolExecutor(options.side_by_side) as pool:
    trials = [pool.submit(chain.trial, i, options.seed) for i in range(options.trials)]
    for i, trial in enumerate(trials):
      try:
        job, kinds, seconds = trial.result()
        count.update(kinds)
        for kind in kinds:
          slowest[kind] = max(slowest[kind], seconds)
        print(f'{i:4d} {job:10s} {", ".join(kinds):20s} {seconds:5.1f} s', flush=True)
      except Wrong as e:
        count['wrong'] += 1
        print(f'{i:4d} WRONG {e}', flush=True)
  print(f'{options.trials} trials, {sum(count[kind] for kind in KINDS)} signals: {dict(count)}')
  print('slowest end, seconds:', {kind: round(s, 1) for kind, s in slowest.items()})
  if not count['wrong']:
    shutil.rmtree(base)
  return count['wrong']


if __name__ == '__main__':
  sys.exit(bool(main()))
