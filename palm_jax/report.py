"""The job `report`: what a workdir holds, or several beside each other, as one HTML page that opens anywhere.

Every number of its tables stands in a file of the workdir, and says on hovering in which and where; only the map is computed
here. A job without a result has no section.
"""
import base64
import io
import json
import math
import pathlib
from typing import NamedTuple

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict
from PIL import Image

from palm_jax import encoder, environment, metrics, pairs, pictures, pretrain, replay, report_page, reward, sac, simsiam
from palm_jax.checkpoint import list_steps
from palm_jax.errors import UserError
from palm_jax.evaluate import features
from palm_jax.files import replacing
from palm_jax.report_page import Cell, Row

# Sections of the config that make a run what it is, in the order of the table, with the modules of their defaults.
DEFAULTS = dict(environment=environment, pairs=pairs, encoder=encoder, simsiam=simsiam, reward=reward, sac=sac,
                replay=replay, pretrain=pretrain)
SETTINGS = ('/name', '/seed', '/data/name', '/generator/path')  # JSON pointers; before those sections
PICTURE_BYTES = 6_000_000  # of all films, strips and grids together; a third more as text
NEIGHBOURS, QUERIES = 7, 8
RIGHT, WRONG, GREY = (0, 158, 115), (213, 94, 0), (128, 128, 128)  # Okabe and Ito: colour-blind readers tell them apart

# Charts in this order; all other scalars follow behind a fold. {job: (x, its unit, {metric: title})}
CURVES = {
    'pretrain': ('env_steps', 'env steps', {
        'loss': 'SimSiam loss', 'h_effective_rank': 'Effective rank of h', 'z_effective_rank': 'Effective rank of z',
        'z_std_ratio': 'Spread of z (1: sphere)', 'h_cosine': 'Cosine of consecutive h', 'knn_accuracy': 'Accuracy of kNN',
        'reward': 'Reward', 'entropy_per_dim': 'Policy entropy a dimension', 'alpha_logp': 'alpha log pi',
        'alpha': 'Temperature alpha', 'q': 'Q of the critics', 'critic_loss': 'Critic loss'}),
    'generator': ('images', 'images', {
        'loss_g': 'Generator loss', 'loss_d': 'Discriminator loss', 'logits_real': 'Logits, real pictures',
        'logits_fake': 'Logits, generated pictures', 'sign_real': 'Mean sign of D, real', 'r1': 'R1 penalty',
        'augment_p': 'Augmentation p'}),
}
METHODS = {'sgd': 'linear, SGD', 'lbfgs': 'linear, L-BFGS', 'knn': 'kNN vote', 'finetune': 'end to end, fine-tuned',
           'supervised': 'end to end, from scratch'}
# What rows of a results file must have for its own table; a file of another shape is shown as plain values.
SHAPES = {
    'probe': dict(features=str, method=str, labels=str, fraction=(int, float), draw=int, accuracy=dict),
    'ood': dict(encoder=str, score=str, set=str, auroc=dict),
    'diversity': dict(set=str, n=int),
    'quality': dict(set=str, n=int),
}
TRAINING = {'generator': 'Generator', 'pretrain': 'Pretraining', 'benchmark': 'Speed'}

# Accuracy in percent on the test images of CIFAR-10 and CIFAR-100, ResNet-18 with the CIFAR stem.
PUBLISHED = (
    ('SimSiam', '90.51', '66.04', 'solo-learn, README: 1000 epochs, linear classifier trained along on augmented views'),
    ('SimCLR', '90.74', '65.78', 'solo-learn, README: the same'),
    ('BYOL', '92.58', '70.46', 'solo-learn, README: the same'),
    ('SupCon (with labels)', '93.82', '70.38', 'solo-learn, README: the same'),
    ('SimSiam', '90.83', '-', 'PatrickHua/SimSiam, README: 800 epochs, linear probe of the frozen encoder'),
    ('supervised', '94.1', '-', 'jvlmdr/flax-cifar, README: ResNetV1-18'),
)


def default_config():
  return ConfigDict(dict(
      compare=(),  # other workdirs, to be put beside this one
      num_points=2000,  # of the map: test images
      umap='auto',  # a second map by UMAP: 'auto' where the package umap-learn is installed, 'always', 'never'
  ))


def check_config(config, num_devices):
  """Raises UserError on settings of the whole config's section `report` that cannot work."""
  c = config.report
  if c.umap not in ('auto', 'always', 'never'):
    raise UserError(f"report.umap={c.umap!r} is unknown: choose 'auto', 'always' or 'never'")
  if c.umap == 'always' and not find_umap():
    raise UserError("report.umap='always', but umap is not installed: pip install umap-learn, or set it to 'auto'")
  if c.num_points < 3:
    raise UserError(f'report.num_points={c.num_points} is too small: set it to 3 or more')
  for folder in c.compare:
    if not (pathlib.Path(folder) / 'config.json').is_file():
      raise UserError(f'report.compare={tuple(c.compare)}: {folder} holds no config.json: name workdirs of this project')


class Run(NamedTuple):
  """What a workdir holds, as read."""
  name: str
  folder: pathlib.Path
  config: dict
  metrics: dict[str, list]  # job -> lines
  results: dict[str, dict]  # name of the file -> content
  notes: list[str]  # what could not be read


def read_runs(folders):
  """[Run] of workdirs, named by as much of the ends of their paths as tells them apart.

  Raises:
    UserError: a config.json that is absent or damaged, or a workdir given twice.
  """
  folders = [pathlib.Path(folder).absolute() for folder in folders]
  if len(set(folders)) < len(folders):
    raise UserError(f'report.compare names a workdir twice: {", ".join(map(str, folders))}')
  length = next(n for n in range(1, 100) if len({folder.parts[-n:] for folder in folders}) == len(folders))
  return [read_run('/'.join(folder.parts[-length:]), folder) for folder in folders]


def read_run(name, folder):
  run = Run(name, folder, {}, {}, {}, [])

  def read(path, parse):
    try:
      return parse(path)
    except (OSError, ValueError) as e:
      run.notes.append(f'{name}: {path.relative_to(folder)} cannot be read and is left out ({" ".join(str(e).split())})')
      logging.warning('report: %s', run.notes[-1])

  def parse_json(path):
    content = json.loads(path.read_text())
    if not isinstance(content, dict):
      raise ValueError(f'expected a JSON object, found {type(content).__name__}')
    return content

  try:
    run.config.update(parse_json(folder / 'config.json'))
  except (OSError, ValueError) as e:
    raise UserError(f'{folder / "config.json"} cannot be read ({e}): name the workdir of a run') from e
  for path in sorted((folder / 'results').glob('*.json')):
    content = read(path, parse_json)
    if content is not None:
      run.results[path.stem] = content
  for job, (x, _, _) in CURVES.items():
    if (folder / job / 'metrics.jsonl').exists():
      rows = read(folder / job / 'metrics.jsonl', metrics.read_jsonl) or []
      run.metrics[job] = [row for row in rows if isinstance(row, dict) and _is_finite(row.get(x))]
  return run


def evaluate(config, workdir, data, mesh):
  """The job: writes `<workdir>/report.html`, of this workdir and those of config.report.compare.

  Args:
    config: the whole config; read are seed, features and report.
    workdir: pathlib.Path.
    data: palm_jax.data.Data, whose test images are mapped by each run's encoder; None leaves the map out.
    mesh: one-dimensional mesh, axis 'data'.

  Returns:
    {'job', 'path', 'bytes', 'sections': their ids, 'notes': what is left out and why}.

  Raises:
    UserError: settings that cannot be, or a workdir without a readable config.json.
  """
  check_config(config, mesh.size)
  runs = read_runs([workdir, *config.report.compare])
  notes = [note for run in runs for note in run.notes]
  sections = [('config', 'Settings', config_section(runs))]
  if any(map(cards, runs)):
    sections.insert(0, ('headline', 'At a glance', headline(runs)))
  build = {'probe': probe_section, 'ood': ood_section, 'diversity': diversity_section, 'quality': quality_section}
  titles = {'probe': 'Labels in the features', 'ood': 'Out-of-distribution detection', 'diversity': 'Coverage of the data',
            'quality': 'Quality of the generator'}
  for job, make in build.items():
    judged = [run for run in runs if well_formed(job, run.results.get(job, {}))]
    if judged:
      sections.append((job, titles[job], make(judged)))
  if data is not None:
    mapped = map_section(config, runs, data, workdir, mesh, notes)
    if mapped:
      sections.append(('map', 'Map of the features', mapped))
  for job, title in (('pretrain', 'Pretraining'), ('generator', 'Training of the generator')):
    content = curves_section(job, runs) + pictures_section(job, runs, notes)
    if content:
      sections.append((f'{job}-curves', title, content))
  content = ''.join(values_tables(name, title, runs) for name, title in TRAINING.items())
  if content:
    sections.append(('training', 'Numbers of the training', content))
  others = sorted({name for run in runs for name in run.results if name not in TRAINING
                   and not well_formed(name, run.results[name])})
  if others:
    unlike = lambda name: [run for run in runs if name in run.results and not well_formed(name, run.results[name])]
    sections.append(('other', 'Other results', ''.join(values_tables(name, name, unlike(name)) for name in others)))

  title = f'{runs[0].config.get("name", runs[0].name)}: report' if len(runs) == 1 else f'{len(runs)} runs compared'
  head = ''.join(f'<p class="note">{report_page.esc(note)}</p>' for note in notes)
  foot = ('<p>Every number in a table stands in the file named beneath it; hover over a number for its place. Only the map is '
          'computed for this page. Method: <a href="https://arxiv.org/abs/2210.10913">Liu, Zahavy, Mnih and Singh, '
          'arXiv 2210.10913</a>.</p>')
  text = report_page.document(title, facts_of(runs) + head, sections, foot).encode(errors='replace')
  path = pathlib.Path(workdir) / 'report.html'
  if jax.process_index() == 0:
    with replacing(path) as file:
      file.write(text)
    logging.info('report: %s, %.1f MB', path, len(text) / 1e6)
  return dict(job='report', path=str(path), bytes=len(text), sections=[name for name, _, _ in sections], notes=notes)


# What is in the files.

def leaves(tree, keys=()):
  """[(keys, value)] of a tree of dicts and lists; a list without either is a value, and so is an empty one."""
  if isinstance(tree, list) and any(isinstance(x, (dict, list)) for x in tree):
    tree = dict(enumerate(tree))
  if not isinstance(tree, dict) or not tree:
    return [(keys, tree)]
  return [leaf for key, sub in tree.items() for leaf in leaves(sub, (*keys, key))]


def pointer(keys):
  """JSON pointer, RFC 6901."""
  return ''.join('/' + str(key).replace('~', '~0').replace('/', '~1') for key in keys)


def plain(value):
  """A value of a file as text: integers whole, floats with four digits."""
  if value is None or value == '':
    return '-'
  if isinstance(value, list):
    return ', '.join(map(plain, value))
  if isinstance(value, float):
    return f'{value:,.0f}' if value.is_integer() and 1e3 <= abs(value) < 1e15 else f'{value:.4g}'
  return f'{value:,}' if _is_number(value) else str(value)


def exact(value):
  """A setting as text, with all digits."""
  if isinstance(value, list):
    return ', '.join(map(exact, value))
  return str(value) if isinstance(value, float) else plain(value)


def cell(run, name, *keys, spread=None, percent=False, bar=False):
  """The value at `keys` of results/<name>.json as it is shown; '-' where there is none.

  Args:
    spread: keys of what stands behind the +-.
    percent: a share; shown times 100 with two decimals, and a bar beneath it if `bar`.
  """
  def at(keys):
    value = run.results[name]
    for key in keys:
      try:
        value = value[key]
      except (KeyError, IndexError, TypeError):
        return None
    return value

  show = lambda x: f'{100 * x:.2f}' if percent and _is_number(x) else plain(x)
  value, sd = at(keys), at(spread) if spread else None
  if value is None:
    return '-'
  text = show(value) + (f' ± {show(sd) if percent else f"{sd:.2g}"}' if _is_number(sd) else '')
  share = value if bar and percent and _is_number(value) else None
  return Cell(text, run.name, f'results/{name}.json', pointer(keys), pointer(spread) if _is_number(sd) else '', str(value), share)


def well_formed(name, result):
  """Whether results/<name>.json has the rows that its own section shows."""
  rows = result.get('rows')
  return name in SHAPES and isinstance(result.get('protocol'), dict) and isinstance(rows, list) and bool(rows) and all(
      isinstance(row, dict) and all(isinstance(row.get(key), kind) for key, kind in SHAPES[name].items()) for row in rows)


def several(runs, text):
  """[text] where there are several runs: a first column says whose a row is."""
  return [text] if len(runs) > 1 else []


def source_of(runs, name):
  return f'From results/{name}.json' + (f' of {", ".join(run.name for run in runs)}' if len(runs) > 1 else '')


def protocols(runs, name):
  """How each run's numbers were made, folded."""
  parts = []
  for run in runs:
    result = run.results[name]
    about = {key: result[key] for key in ('devices', 'processes', 'versions', 'seconds') if key in result}
    known = [('.'.join(map(str, keys)), plain(value)) for keys, value in leaves({**result.get('protocol', {}), **about})]
    parts.append(report_page.fold(f'Protocol{f" of {run.name}" if len(runs) > 1 else ""}', report_page.facts(known), ''))
  return ''.join(parts)


def _is_number(x):
  return isinstance(x, (int, float)) and not isinstance(x, bool)


def _is_finite(x):
  return _is_number(x) and math.isfinite(x)


# Sections, each a string of HTML.

def facts_of(runs):
  """What the runs are: beneath each other for one, a table for several."""
  def of(run):
    c = run.config
    at = lambda section, key: c[section].get(key) if isinstance(c.get(section), dict) else None
    protocols = [result['protocol'] for result in run.results.values() if isinstance(result.get('protocol'), dict)]
    data = [p['data'] for p in protocols if isinstance(p.get('data'), str)]
    last = run.metrics.get('pretrain', [])[-1:]
    size = 'features' if at('encoder', 'name') == 'nature' else 'width'
    devices = sorted({result['devices'] for result in run.results.values() if isinstance(result.get('devices'), str)})
    steps = list_steps(run.folder / 'pretrain' / 'checkpoints')
    return {
        'Name': f'{plain(c.get("name"))}, seed {plain(c.get("seed"))}',
        'Data': min(data, key=len, default=plain(at('data', 'name'))),
        'Generator': plain(at('generator', 'path') or 'trained in the same workdir'),
        'World': f'alpha {plain(at("environment", "alpha"))}, beta {plain(at("environment", "beta"))}, '
                 f'episodes of {plain(at("environment", "episode_length"))}',
        'Encoder': f'{plain(at("encoder", "name"))}, {size} {plain(at("encoder", size))}',
        'Env steps': f'{plain(int(last[0]["env_steps"])) if last else "none yet"} of {plain(at("pretrain", "env_steps"))}',
        'Checkpoint': f'step {plain(steps[-1])}' if steps else 'none here',
        'Computed on': ', '.join(devices) or 'unknown: no result yet'}
  known = [of(run) for run in runs]
  if len(runs) == 1:
    return report_page.facts(known[0].items())
  rows = [Row([key, *(facts[key] for facts in known)]) for key in known[0]]
  return report_page.table('The runs', ['', *(run.name for run in runs)], rows, 'From config.json, metrics and results of each',
                           texts=1 + len(runs))


def config_section(runs):
  """Settings in which the runs differ; for one run, from the package's defaults. The others folded."""
  known = [{pointer(keys): value for keys, value in leaves(run.config)} for run in runs]
  keys = list(dict.fromkeys(key for settings in known for key in settings))
  matters = [key for key in SETTINGS if key in keys] + [key for name in DEFAULTS for key in keys if key.startswith(f'/{name}/')]
  if len(runs) == 1:
    defaults = {pointer((name, *place)): value for name, module in DEFAULTS.items()
                for place, value in leaves(json.loads(module.default_config().to_json_best_effort()))}
    differs = lambda key: key in defaults and known[0][key] != defaults[key]
    header, title = ['setting', 'this run', 'default'], 'Unlike the package\'s defaults, which are of the paper\'s size'
  else:
    defaults = {}
    differs = lambda key: len({json.dumps(settings[key]) if key in settings else '' for settings in known}) > 1
    header, title = ['setting', *(run.name for run in runs)], 'Where the runs differ'

  def row(key):
    cells = [Cell(exact(settings[key]), run.name, 'config.json', key, '', json.dumps(settings[key])) if key in settings else
             'absent' for run, settings in zip(runs, known, strict=True)]
    return Row([key[1:].replace('/', '.'), *cells, *([exact(defaults.get(key))] if len(runs) == 1 else [])])

  def make(title, keys):
    return report_page.table(title, header, map(row, keys), 'From config.json', texts=len(header))
  differ = [key for key in matters if differs(key)]
  # Generator, evaluations and the like matter less, and differ most with the version.
  minor = [key for key in keys if len(runs) > 1 and key not in differ and differs(key)]
  others = [key for key in keys if key not in differ + minor]
  out = make(title, differ) if differ else '<p>No setting of world, encoder and learner differs.</p>'
  for what, some in (('differences elsewhere', minor), ('other settings', others)):
    out += report_page.fold(f'{len(some)} {what}', make(what.capitalize(), some)) if some else ''
  return out


def cards(run):
  """[(title, big Cell, what it is, [(name, Cell)])] of what was measured."""
  found = []
  if well_formed('probe', run.results.get('probe', {})):
    rows = [(i, row) for i, row in enumerate(run.results['probe']['rows'])
            if row['fraction'] == 1 and row['labels'] == 'fine' and 'clean' in row['accuracy']]
    at = lambda i: cell(run, 'probe', 'rows', i, 'accuracy', 'clean', percent=True)
    method = next((m for m in ('lbfgs', 'sgd') if any(row['method'] == m for _, row in rows)), None)  # pixels have no sgd
    same = [(i, row['features']) for i, row in rows if row['method'] == method]
    if same:
      (first, name), *rest = same
      others = [(i, f'{name}, {METHODS["sgd"]}') for i, row in rows
                if method != 'sgd' and (row['features'], row['method']) == (name, 'sgd')]
      others += [(i, row['features']) for i, row in rows if row['method'] in ('finetune', 'supervised')]
      found.append(('Linear accuracy, %', at(first), f'{name}, {METHODS[method]}', [(n, at(i)) for i, n in rest + others]))
  if well_formed('ood', run.results.get('ood', {})):
    rows = run.results['ood']['rows']
    first = rows[0]
    at = lambda i: cell(run, 'ood', 'rows', i, 'auroc', 'mean', spread=('rows', i, 'auroc', 'sd'), percent=True)
    shown = [(row['set'] if row['encoder'] == first['encoder'] else f'{row["set"]}, {row["encoder"]}', at(i))
             for i, row in enumerate(rows) if i and row['score'] == first['score']
             and (row['encoder'] == first['encoder'] or row['set'] == first['set'])]
    paper = cell(run, 'ood', 'paper', 'rows', 'PALM', first['set'], 0, spread=('paper', 'rows', 'PALM', first['set'], 1))
    shown += [(f'{first["set"]}, PALM in the paper', paper)] if isinstance(paper, Cell) else []
    found.append(('AUROC, %', at(0), f'{first["set"]}, {first["encoder"]}, score {first["score"]}', shown))
  if well_formed('diversity', run.results.get('diversity', {})):
    rows = run.results['diversity']['rows']
    key = prefix_of(rows) + 'unique_nn'
    at = lambda i: cell(run, 'diversity', 'rows', i, key, spread=('rows', i, f'{key}_sd'), percent=True)
    shown = [(row['set'], at(i)) for i, row in enumerate(rows) if i]
    found.append(('Coverage of training images, %', at(0), rows[0]['set'],
                  [*shown, ('ceiling', cell(run, 'diversity', 'ceiling', percent=True))]))
  return found


def prefix_of(rows):
  """What the features of the coverage put before the names of its numbers: 'encoder-', '', ..."""
  return next((key for key in rows[0] if key.endswith('unique_nn')), 'unique_nn').removesuffix('unique_nn')


def headline(runs):
  grouped = {}
  for run in runs:
    for title, *part in cards(run):
      grouped.setdefault(title, []).append((run.name if len(runs) > 1 else '', *part))
  return '<div class="cards">' + ''.join(report_page.card(title, parts) for title, parts in grouped.items()) + '</div>'


def probe_section(runs):
  """Accuracies: a row for each kind of features, method and labels; a column for each run and set of test images."""
  places, tests = {}, {}
  for run in runs:
    for i, row in enumerate(run.results['probe']['rows']):
      key = row['features'], row['method'], row['labels'], row['fraction'], row['draw']
      places.setdefault(key, {})[run.name] = i
      tests |= {(run.name, test): run for test in row['accuracy']}
  coarse = len({key[2] for key in places}) > 1
  columns = sorted(tests, key=lambda column: [run.name for run in runs].index(column[0]))

  def number(key, name, test):
    i = places[key].get(name)
    spread = ('rows', i, 'half_width') if test == 'clean' else None
    return '-' if i is None else cell(tests[name, test], 'probe', 'rows', i, 'accuracy', test, spread=spread, percent=True,
                                      bar=True)

  def make(title, keys, shown):
    words = lambda key: [key[0], METHODS.get(key[1], key[1]), key[2], f'{key[3]:.4g}', str(key[4])]
    chosen = lambda texts: [text for text, show in zip(texts, shown, strict=True) if show]
    header = chosen(['features', 'method', 'labels', 'share of labels', 'draw'])
    heads = [', '.join([*several(runs, name), *([test] if test != 'clean' or len(runs) == 1 else [])]) for name, test in columns]
    rows = [Row([*chosen(words(key)), *(number(key, *column) for column in columns)],
                'strong' if key[0] == 'PALM encoder' else '') for key in keys]
    return report_page.table(title, header + heads, rows, source_of(runs, 'probe'), protocols(runs, 'probe'), len(header))

  whole, fewer = [key for key in places if key[3] == 1], [key for key in places if key[3] != 1]
  out = '<p>Share of test images given their class; ± is the half width of the 95% Wilson interval.</p>'
  if whole:
    out += make('Accuracy, %, with all labels', whole, (True, True, coarse, False, False))
  if fewer:
    out += report_page.fold(f'With a share of the labels: {len(fewer)} rows', make(
        'Accuracy, %, with a share of the labels', fewer, (True, True, coarse, True, True)))
  data = ', '.join(dict.fromkeys(str(run.results['probe']['protocol'].get('data', '')) for run in runs))
  if 'cifar' in data.lower():
    out += report_page.table(
        'Published, for comparison: accuracy, %, ResNet-18', ['method', 'CIFAR-10', 'CIFAR-100', 'source'],
        [Row([name, ten, hundred, source], 'paper') for name, ten, hundred, source in PUBLISHED],
        'From the literature, on the original pixels: not comparable with numbers on JPEG copies or other pixels. Ours were '
        f'measured on {data}. The paper gives its own linear accuracies as a figure only (Figure 3), so none is here.')
  return out


def ood_section(runs):
  """AUROCs in the layout of the paper's Table 1, its rows beneath; the other measures folded."""
  sets = list(dict.fromkeys(row['set'] for run in runs for row in run.results['ood']['rows']))
  names, rows, others, paper = several(runs, 'run'), [], [], []
  for run in runs:
    places = {}
    for i, row in enumerate(run.results['ood']['rows']):
      places.setdefault((row['encoder'], row['score']), {})[row['set']] = i
    for key, found in places.items():
      whose = [*several(runs, run.name), *key]
      value = lambda i, metric, run=run: cell(run, 'ood', 'rows', i, metric, 'mean', spread=('rows', i, metric, 'sd'),
                                              percent=True)
      accuracy = cell(run, 'ood', 'accuracy', key[0], 'mean', spread=('accuracy', key[0], 'sd'), percent=True)
      rows.append(Row([*whose, *(value(found[ood], 'auroc') if ood in found else '-' for ood in sets), accuracy],
                      'strong' if key[1] == 'msp' else ''))
      others += [Row([*whose, ood, *(value(i, metric) for metric in ('aupr_in', 'aupr_out', 'fpr_at_95_tpr'))])
                 for ood, i in found.items()]
    known = run.results['ood'].get('paper')
    if isinstance(known, dict) and isinstance(known.get('rows'), dict) and not paper:
      number = lambda method, ood, run=run: cell(run, 'ood', 'paper', 'rows', method, ood, 0,
                                                 spread=('paper', 'rows', method, ood, 1))
      paper = [Row([*several(runs, 'the paper'), f'{method}, paper' if len(runs) == 1 else method, 'Table 1',
                    *(number(method, ood) for ood in sets), '-'], 'paper') for method in known['rows']]
  out = report_page.table('AUROC, %', [*names, 'encoder', 'score', *sets, 'ID accuracy'], rows + paper,
                          source_of(runs, 'ood'), protocols(runs, 'ood'), len(names) + 2)
  out += '<p class="soft">' + (
      'The paper\'s classifiers learned from the original pixels of CIFAR-10; how they were trained, and with which score, it '
      'does not say.' if paper else 'Table 1 of the paper has classifiers of CIFAR-10 and its own five sets: no row of it fits '
      'here.') + '</p>'
  return out + report_page.fold('AUPR and FPR', report_page.table(
      'Other measures, %', [*names, 'encoder', 'score', 'set', 'AUPR, ID', 'AUPR, OOD', 'FPR at 95% TPR of ID'], others,
      source_of(runs, 'ood'), texts=len(names) + 3))


def diversity_section(runs):
  """The paper's Table 3 beside ours; PRDC and FID."""
  names, comparable, shares, others = several(runs, 'run'), True, [], []
  for run in runs:
    result = run.results['diversity']
    prefix, kind = prefix_of(result['rows']), plain(result['protocol'].get('features'))
    comparable &= kind == 'inception' and result['protocol'].get('n') == 10_000
    for i, row in enumerate(result['rows']):
      value = lambda key, percent=False, i=i, run=run, prefix=prefix: cell(
          run, 'diversity', 'rows', i, prefix + key, spread=('rows', i, f'{prefix}{key}_sd'), percent=percent,
          bar=key == 'unique_nn')
      whose = [*several(runs, run.name), row['set'], kind]
      shares.append(Row([*whose, cell(run, 'diversity', 'rows', i, 'n'), value('unique_nn', True),
                         cell(run, 'diversity', 'paper', row['set']), value('symmetric', True), value('hit_once', True)],
                        'strong' if i == 0 else ''))
      others.append(Row([*whose, *map(value, ('precision', 'recall', 'density', 'coverage', 'FID'))], 'strong' if i == 0 else ''))
    shares.append(Row([*several(runs, run.name), 'ceiling: hits spread evenly', '', '', cell(
        run, 'diversity', 'ceiling', percent=True), '', '', ''], 'paper'))
  out = '<p>Share of training images that are the nearest of at least one image of a set; ± is the standard deviation over draws.'
  out += '</p>' if comparable else (
      ' The paper\'s Table 3 has Inception features and 10,000 images of each set: <strong>its numbers and these are not '
      'comparable</strong>.</p>')
  words = [*names, 'set', 'features']
  return out + report_page.table(
      'Coverage of training images, %', [*words, 'n', 'nearest of any', 'paper, Table 3', 'symmetric', 'hit once'], shares,
      source_of(runs, 'diversity'), protocols(runs, 'diversity'), len(words)) + report_page.table(
      'Fidelity and spread', [*words, 'precision', 'recall', 'density', 'coverage (PRDC)', 'FID'], others,
      source_of(runs, 'diversity'), texts=len(words))


def quality_section(runs):
  """Distances and precision of the generator's pictures."""
  rows_of = lambda run: run.results['quality']['rows']
  keys = list(dict.fromkeys(key for run in runs for row in rows_of(run) for key in row))
  keys = [key for key in keys if key != 'set' and not key.endswith('_sd')]
  rows = [Row([*several(runs, run.name), row['set'],
               *(cell(run, 'quality', 'rows', i, key, spread=('rows', i, f'{key}_sd')) for key in keys)],
              'strong' if row['set'] == 'generator' else '') for run in runs for i, row in enumerate(rows_of(run))]
  names = [*several(runs, 'run'), 'set']
  out = report_page.table('Generated pictures against training images', names + keys, rows, source_of(runs, 'quality'),
                          protocols(runs, 'quality'), len(names))
  recognised = lambda run: run.results['quality'].get('recognised')
  sets = list(dict.fromkeys(name for run in runs if isinstance(recognised(run), dict) for name in recognised(run)))
  if sets:
    out += report_page.table(
        'Given their class by the classifier behind the features', ['set', *heads_of(runs, '%')],
        [Row([name, *(cell(run, 'quality', 'recognised', name, percent=True, bar=True) for run in runs)]) for name in sets],
        source_of(runs, 'quality'))
  return out


def heads_of(runs, otherwise):
  """Headers of a column a run."""
  return [run.name for run in runs] if len(runs) > 1 else [otherwise]


def values_tables(name, title, runs):
  """All values of results/<name>.json but its protocol and settings, a column a run; '' where no run has it."""
  runs = [run for run in runs if name in run.results]
  if not runs:
    return ''
  about = ('job', 'protocol', 'settings', 'versions')
  keys = list(dict.fromkeys(keys for run in runs for keys, _ in leaves(
      {k: v for k, v in run.results[name].items() if k not in about}) if keys))
  rows = [Row(['.'.join(map(str, key)), *(cell(run, name, *key) for run in runs)]) for key in keys]
  header = ['', *heads_of(runs, 'value')]
  make = lambda caption, rows: report_page.table(caption, header, rows, source_of(runs, name), protocols(runs, name))
  return make(title, rows) if len(rows) <= 12 else report_page.fold(f'{title}: {len(rows)} values', make(title, rows))


def curves_section(job, runs):
  """Small multiples of the scalars of a training, the runs over each other."""
  x, unit, titles = CURVES[job]
  with_lines = [(i, run) for i, run in enumerate(runs) if run.metrics.get(job)]
  names = list(dict.fromkeys(name for _, run in with_lines for row in run.metrics[job] for name in row))
  names = [name for name in names if name not in (x, 'step')]

  def chart(name):
    series = []
    for i, run in with_lines:
      rows = [row for row in run.metrics[job] if name in row]
      ys = [row[name] if _is_finite(row[name]) else None for row in rows]
      series.append((i, run.name, [row[x] for row in rows], ys))
    return report_page.chart(titles.get(name, name), series, unit)

  def charts(names):
    content = ''.join(map(chart, names))
    return f'<div class="charts">{content}</div>' if content else ''

  main, others = charts([name for name in titles if name in names]), [name for name in names if name not in titles]
  if not main:
    return ''
  key = report_page.legend([(i, run.name) for i, run in with_lines]) if len(runs) > 1 else ''
  out = f'<p class="soft">From {job}/metrics.jsonl, against {unit}.</p>{key}{main}'
  return out + (report_page.fold(f'{len(others)} other scalars', charts(others)) if others else '')


def pictures_section(job, runs, notes):
  """The newest films, strips and grids, within the page's bound of bytes."""
  found = []
  for run in runs:
    if job == 'pretrain':
      for ending, what in (('webp', 'The agent at play'), ('png', 'Its episodes, every fourth frame')):
        newest = sorted((run.folder / job / 'rollouts').glob(f'*.{ending}'))[-1:]
        found += [(run, path, f'{what}, after {int(path.stem):,} env steps' if path.stem.isdigit() else what) for path in newest]
    else:
      newest = sorted((run.folder / job / 'samples').glob('*.png'))[-1:]
      found += [(run, path, 'Generated pictures, a class a row' + (f', after {int(path.stem)},000 images'
                                                                    if path.stem.isdigit() else '')) for path in newest]
  shown = []
  for run, path, what in found:
    where = f'{path.relative_to(run.folder)}' + (f' of {run.name}' if len(runs) > 1 else '')
    uri = embed(path, PICTURE_BYTES // (3 * len(runs)))
    if uri:
      film = path.suffix == '.webp'
      classes = 'wide sharp' if film else 'wide'  # a strip's pixels are smaller than the page's
      shown.append(report_page.picture(uri, f'{what} ({run.name})', report_page.esc(f'{what}: {where}'), classes, film))
    else:
      notes.append(f'{run.name}: {path.relative_to(run.folder)} is no picture that can be shown within the page, and is left out')
      logging.warning('report: %s', notes[-1])
  return f'<div class="pictures">{"".join(shown)}</div>' if shown else ''


def embed(path, most):
  """A picture file as a data: address of at most `most` bytes before encoding, made smaller where it must; None if it cannot."""
  content = path.read_bytes()
  kind = {'.png': 'png', '.webp': 'webp'}[path.suffix]
  try:
    with Image.open(io.BytesIO(content)) as image:
      image.load()
      for factor in (.75, .5, .35, .25, .15):
        if len(content) <= most:
          break
        kind, frames = 'webp', []
        for i in range(getattr(image, 'n_frames', 1)):
          image.seek(i)
          frame = image.convert('RGB')
          frames.append(frame.resize((max(1, round(frame.width * factor)), max(1, round(frame.height * factor))), Image.BOX))
        file = io.BytesIO()
        film = dict(save_all=True, append_images=frames[1:], duration=image.info.get('duration', 125), loop=0)
        frames[0].save(file, 'WEBP', quality=80, method=2, **(film if len(frames) > 1 else {}))
        content = file.getvalue()
  except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
    return None
  return f'data:image/{kind};base64,{base64.b64encode(content).decode()}' if len(content) <= most else None


# The map: the only thing that is computed here.

def pca(h, num=2):
  """Scores (N, num) of h (N, F) on its leading principal components, and the shares (num,) of the variance; float64."""
  h = np.asarray(h, np.float64)
  u, s, _ = np.linalg.svd(h - h.mean(0), full_matrices=False)
  return u[:, :num] * s[:num], s[:num] ** 2 / max((s ** 2).sum(), np.finfo(np.float64).tiny)


def nearest(h, queries, k=NEIGHBOURS):
  """(Q, k) row numbers of the features h (N, F) nearest to each query row by cosine, nearest first, without itself."""
  h = np.asarray(h, np.float64)
  h = h / np.maximum(np.linalg.norm(h, axis=1, keepdims=True), 1e-12)
  cosines = h[queries] @ h.T
  cosines[np.arange(len(queries)), queries] = -np.inf
  return np.argsort(-cosines, axis=1, kind='stable')[:, :k]


def find_umap():
  """The class of umap-learn, or None; other packages and folders are called umap, too."""
  try:
    from umap import UMAP  # here: seconds that other jobs need not spend
  except ImportError:
    return None
  return UMAP


def map_section(config, runs, data, workdir, mesh, notes):
  """Maps of test images by each run's encoder, and nearest neighbours of some; '' where no run has an encoder."""
  images, labels = data.test.images, np.asarray(data.test.labels)
  rng = np.random.default_rng(config.seed)
  rows = np.sort(rng.permutation(len(images))[:config.report.num_points])
  classes = np.unique(labels)
  queries = [int(rng.choice(np.flatnonzero(labels == label))) for label in classes[:QUERIES]]
  UMAP, out = None if config.report.umap == 'never' else find_umap(), []
  for run in runs:
    if not list_steps(run.folder / 'pretrain' / 'checkpoints'):
      continue
    section = encoder.default_config()
    section.update(run.config.get('encoder', {}))
    try:
      frozen = features.load_encoder(ConfigDict(dict(seed=config.seed, encoder=section)), run.folder, images.shape[1:])
    except UserError as e:
      notes.append(f'{run.name}: no map ({e})')
      logging.warning('report: %s', notes[-1])
      continue
    h = features.cached(frozen, images, workdir, mesh, config.features.batch_size)
    if not np.isfinite(h).all():
      notes.append(f'{run.name}: no map (features are NaN or infinite)')
      continue
    points, shares = pca(h[rows])
    maps = [('PCA', points, [f'component {i + 1}: {share:.1%} of the variance' for i, share in enumerate(shares)])]
    if UMAP:
      maps.append(('UMAP', UMAP(random_state=config.seed, n_jobs=1).fit_transform(h[rows]), ['', '']))
    about = f'{run.name + ", " if len(runs) > 1 else ""}checkpoint step {frozen.about["checkpoint_step"]}'
    panels = ''.join(report_page.scatter(f'{name} of {len(rows):,} test images ({about})', points, labels[rows],
                                         data.class_names, axes) for name, points, axes in maps)
    neighbours = strips(images, labels, data.class_names, queries, nearest(h, queries), about)
    out.append(f'<div class="map"><div>{panels}</div>{neighbours}</div>')
  if not out:
    return ''
  return (f'<p class="soft">Features h of the test images of {report_page.esc(data.source)}; batch statistics fixed, newest '
          f'checkpoint, points drawn with seed {config.seed}. Computed for this page.</p>{"".join(out)}')


def strips(images, labels, names, queries, found, about):
  """Each query and its nearest neighbours in a row; framed by whether the class is the query's."""
  out = ''
  for query, rows in zip(queries, found, strict=True):
    frames = [GREY] + [RIGHT if labels[row] == labels[query] else WRONG for row in rows]
    cells = np.stack([framed(images[row], colour) for row, colour in zip([query, *rows], frames, strict=True)])
    file = io.BytesIO()
    Image.fromarray(pictures.grid(cells[None], scale=1)).save(file, 'PNG')
    uri = f'data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}'
    words = [names[labels[row]] for row in rows]
    shown = ', '.join(report_page.esc(word) if labels[row] == labels[query] else f'<b>{report_page.esc(word)}</b>'
                      for row, word in zip(rows, words, strict=True))
    caption = f'<strong>{report_page.esc(names[labels[query]])}</strong>: {shown}'
    out += report_page.picture(uri, f'Test image of {names[labels[query]]}, and its nearest: {", ".join(words)}', caption)
  return (f'<div class="strips card"><h3>Nearest by cosine of h, among all test images ({report_page.esc(about)})</h3>'
          f'<p class="soft">Left the query. Green frame: its class; <b>orange, bold: another</b>.</p>{out}</div>')


def framed(image, colour, side=72, width=3):
  """(H, W, C) uint8 enlarged by whole pixels to about `side`, within a frame of (3,) colour: (h, w, 3). Of stacks, the last."""
  image = image if image.shape[-1] in (1, 3) else image[..., -1:]
  image = np.broadcast_to(image, (*image.shape[:2], 3))
  scale = max(1, side // max(image.shape[:2]))
  image = image.repeat(scale, 0).repeat(scale, 1)
  out = np.full((image.shape[0] + 2 * width + 2, image.shape[1] + 2 * width + 2, 3), 255, np.uint8)
  out[1:-1, 1:-1] = colour
  out[1 + width:-1 - width, 1 + width:-1 - width] = image
  return out
