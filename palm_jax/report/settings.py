"""Sections on what the runs are: the facts at the head of the page, and their settings."""

import json

from palm_jax import encoder, environment, pairs, pretrain, replay, reward, sac, simsiam
from palm_jax.base.steps import list_steps
from palm_jax.report import page
from palm_jax.report.page import Cell, Row
from palm_jax.report.read import Report, RunFiles
from palm_jax.report.values import exact, leaves, plain, pointer

# Sections of the config that make a run what it is, in the order of the table, and the modules with
# their defaults.
DEFAULTS = dict(
  environment=environment,
  pairs=pairs,
  encoder=encoder,
  simsiam=simsiam,
  reward=reward,
  sac=sac,
  replay=replay,
  pretrain=pretrain,
)
# JSON pointers; before those sections.
SETTINGS = ('/name', '/seed', '/data/name', '/generator/path')


def facts(report: Report) -> str:
  """What the runs are, as HTML: a list for one, a table for several."""
  runs = report.runs
  known = [_facts_of(run) for run in runs]
  if len(runs) == 1:
    return page.facts(known[0].items())
  return page.table(
    'The runs',
    ['', *(run.name for run in runs)],
    [Row([key, *(facts[key] for facts in known)]) for key in known[0]],
    'From config.json, metrics and results of each',
    texts=1 + len(runs),
  )


def _facts_of(run: RunFiles) -> dict[str, str]:
  results = run.results.values()
  protocols = [result['protocol'] for result in results if isinstance(result.get('protocol'), dict)]
  data = [p['data'] for p in protocols if isinstance(p.get('data'), str)]
  devices = {result['devices'] for result in results if isinstance(result.get('devices'), str)}
  lines = run.metrics.get('pretrain', [])
  done = plain(int(lines[-1]['env_steps'])) if lines else 'none yet'
  steps = list_steps(run.folder / 'pretrain' / 'checkpoints')
  size = 'features' if _setting(run, 'encoder', 'name') == 'nature' else 'width'
  at = lambda section, key: plain(_setting(run, section, key))
  return {
    'Name': f'{plain(run.config.get("name"))}, seed {plain(run.config.get("seed"))}',
    'Data': min(data, key=len, default=at('data', 'name')),
    'Generator': plain(_setting(run, 'generator', 'path') or 'trained in the same workdir'),
    'World': f'alpha {at("environment", "alpha")}, beta {at("environment", "beta")}, '
    f'episodes of {at("environment", "episode_length")}',
    'Encoder': f'{at("encoder", "name")}, {size} {at("encoder", size)}',
    'Env steps': f'{done} of {at("pretrain", "env_steps")}',
    'Checkpoint': f'step {plain(steps[-1])}' if steps else 'none here',
    'Computed on': ', '.join(sorted(devices)) or 'unknown: no result yet',
  }


def _setting(run, section, key):
  """A value of the config, or None."""
  settings = run.config.get(section)
  return settings.get(key) if isinstance(settings, dict) else None


def section(report: Report) -> str:
  """The settings in which the runs differ, or one run from the defaults; behind them the others."""
  runs = report.runs
  known = [{pointer(keys): value for keys, value in leaves(run.config)} for run in runs]
  keys = list(dict.fromkeys(key for settings in known for key in settings))
  if len(runs) == 1:
    defaults = _defaults()
    changed = {key for key in keys if key in defaults and known[0][key] != defaults[key]}
    header = ['setting', 'this run', 'default']
    title = "Unlike the package's defaults, which are of the paper's size"
  else:
    defaults = None
    changed = {key for key in keys if _differs(key, known)}
    header = ['setting', *(run.name for run in runs)]
    title = 'Where the runs differ'
  matters = [key for key in SETTINGS if key in keys] + [
    key for name in DEFAULTS for key in keys if key.startswith(f'/{name}/')
  ]
  differ = [key for key in matters if key in changed]
  # Generator, evaluations and the like matter less, and differ most with the version.
  minor = [key for key in keys if len(runs) > 1 and key in changed and key not in differ]
  others = [key for key in keys if key not in differ + minor]

  def table(title, keys):
    rows = [_row(key, runs, known, defaults) for key in keys]
    return page.table(title, header, rows, 'From config.json', texts=len(header))

  out = '<p>No setting of world, encoder and learner differs.</p>'
  if differ:
    out = table(title, differ)
  for what, some in (('differences elsewhere', minor), ('other settings', others)):
    if some:
      out += page.details(f'{len(some)} {what}', table(what.capitalize(), some))
  return out


def _defaults():
  """{JSON pointer: default} of the sections of DEFAULTS."""
  return {
    pointer((name, *keys)): value
    for name, module in DEFAULTS.items()
    for keys, value in leaves(json.loads(module.default_config().to_json_best_effort()))
  }


def _differs(key, known):
  texts = {json.dumps(settings[key]) if key in settings else '' for settings in known}
  return len(texts) > 1


def _row(key, runs, known, defaults):
  """A setting of each run, and of the defaults unless they are None."""
  cells = [
    Cell(exact(settings[key]), run.name, 'config.json', key, '', json.dumps(settings[key]))
    if key in settings
    else 'absent'
    for run, settings in zip(runs, known, strict=True)
  ]
  if defaults is not None:
    cells.append(exact(defaults.get(key)))
  return Row([key[1:].replace('/', '.'), *cells])
