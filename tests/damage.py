"""Flips bits in files of a workdir, or cuts them: whoever reads them must notice, or read the same.

python -m tests.damage WORKDIR --trials=400 --seed=0
"""

import argparse
import collections
import json
import pathlib
import random
import shutil
import sys
import tempfile

import jax
import numpy as np

from palm_jax import experience, workdir
from palm_jax.base import checks, programs
from palm_jax.base.checkpoints import load_item
from palm_jax.base.errors import UserError
from palm_jax.base.results import read_result
from palm_jax.base.steps import list_steps
from palm_jax.generator import load_generator
from palm_jax.report import read


def same(a, b):
  """Whether two trees hold the same."""
  if jax.tree.structure(a) != jax.tree.structure(b):  # names, too
    return False
  return all(
    np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  )


def of_checkpoint(job, item):
  """Of the newest step alone: else a damaged one is passed over with a warning."""

  def load(root):
    folder = root / job / 'checkpoints'
    return load_item(folder, item, max(list_steps(folder)))[1]

  return load


def of_metrics(root, job):
  """As the report reads it."""
  run = read.read_run('run', root)
  if any(f'{job}/metrics.jsonl' in note for note in run.notes):
    raise ValueError(run.notes)
  return run.metrics.get(job)


def of_config(root):
  """As report and runner read it."""
  run = read.read_run('run', root)
  if any('config.json' in note for note in run.notes):
    raise ValueError(run.notes)
  flat = checks.flatten(run.config)
  return {key: x for key, x in flat.items() if key.partition('.')[0] not in workdir.FREE}


def of_programs(root):
  programs.remove_damaged(root / programs.FOLDER)
  return sorted(path.name for path in (root / programs.FOLDER).glob('*-cache'))


def readers(root):
  """[(file, how its content is read)] of all that others read in a workdir."""
  found = [(root / 'config.json', of_config)]
  found += [
    (path, lambda root, name=path.name: read_result(root / 'results' / name))
    for path in (root / 'results').glob('*.json')
  ]
  found.append((root / 'generator' / 'network.json', lambda root: load_generator(root).variables))
  for job in ('generator', 'pretrain'):
    found.append((root / job / 'metrics.jsonl', lambda root, job=job: of_metrics(root, job)))
  items = (('generator', 'generator'), ('pretrain', 'encoder'), ('pretrain', 'state'))
  for job, item in items:
    step = max(list_steps(root / job / 'checkpoints'))
    folder = root / job / 'checkpoints' / str(step)
    files = [*(folder / item).rglob('*'), folder / '_CHECKPOINT_METADATA']
    found += [(path, of_checkpoint(job, item)) for path in files if path.is_file()]
  found += [
    (path, lambda root: [*experience.read(root / 'pretrain' / 'experience')])
    for path in (root / 'pretrain' / 'experience').glob('*.npz')
  ]
  found += [(path, of_programs) for path in (root / programs.FOLDER).glob('*-cache')]
  return found


def damage(path, rng):
  """Flips a bit, cuts the file, or removes it -> what was done."""
  content = bytearray(path.read_bytes())
  kind = rng.choice(('bit', 'bit', 'cut', 'removed'))
  if kind == 'removed' or not content:
    path.unlink()
    return 'removed'
  if kind == 'cut':
    path.write_bytes(content[: rng.randrange(len(content))])
    return kind
  place = rng.randrange(len(content))
  content[place] ^= 1 << rng.randrange(8)
  path.write_bytes(content)
  return f'bit of byte {place}'


def trial(root, there, rng):
  """Damages one file, and repairs it -> (its name, what was done, what came of it)."""
  path, reader = rng.choice(there)
  name = path.relative_to(root)
  wanted = reader(root)
  whole = path.read_bytes()
  known = root / programs.FOLDER / programs.DIGESTS
  digests = known.read_bytes() if known.exists() else b''
  done = damage(path, rng)
  try:
    outcome = 'the same' if same(reader(root), wanted) else 'SILENT'
    if reader is of_programs and not path.exists():
      outcome = 'noticed'
  except (UserError, OSError, ValueError):
    outcome = 'noticed'
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(whole)
  if digests:
    known.write_bytes(digests)
  return str(name), done, outcome


def count_silent(of, trials, seed):
  """Damages files of a copy of a workdir, prints what was silent -> how much was."""
  rng = random.Random(seed)
  counts = collections.Counter()
  with tempfile.TemporaryDirectory() as folder:
    root = pathlib.Path(folder) / 'run'
    shutil.copytree(of, root)
    by_kind = collections.defaultdict(list)
    for path, reader in readers(root):
      kind = 'checkpoints' if 'checkpoints' in path.parts else path.parent.name
      by_kind[kind].append((path, reader))
    for _ in range(trials):
      kind = rng.choice(sorted(by_kind))
      name, done, outcome = trial(root, by_kind[kind], rng)
      counts[kind, outcome] += 1
      if outcome == 'SILENT':
        print(f'SILENT: {done} of {name}', flush=True)
  print(json.dumps({' '.join(key): n for key, n in sorted(counts.items())}, indent=1))
  return sum(n for (_, outcome), n in counts.items() if outcome == 'SILENT')


def main():
  """The command."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('workdir')
  parser.add_argument('--trials', type=int, default=400)
  parser.add_argument('--seed', type=int, default=0)
  options = parser.parse_args()
  return count_silent(options.workdir, options.trials, options.seed)


if __name__ == '__main__':
  sys.exit(bool(main()))
