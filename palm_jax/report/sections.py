"""Sections of the report that show what results files and configs say: strings of HTML, nothing
computed anew."""

import json
import math

from palm_jax import encoder, environment, pairs, pretrain, replay, reward, sac, simsiam
from palm_jax.base.steps import list_steps
from palm_jax.report import page as report_page
from palm_jax.report.page import Cell, Row

# Sections of the config that make a run what it is, in the order of the table, with the modules of
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
SETTINGS = (
  '/name',
  '/seed',
  '/data/name',
  '/generator/path',
)  # JSON pointers; before those sections
METHODS = {
  'sgd': 'linear, SGD',
  'lbfgs': 'linear, L-BFGS',
  'knn': 'kNN vote',
  'finetune': 'end to end, fine-tuned',
  'supervised': 'end to end, from scratch',
}
# What rows of a results file must have for its own table; a file of another shape is shown as plain
# values.
SHAPES = {
  'probe': dict(
    features=str, method=str, labels=str, fraction=(int, float), draw=int, accuracy=dict
  ),
  'ood': dict(encoder=str, score=str, set=str, auroc=dict),
  'diversity': dict(set=str, n=int),
  'quality': dict(set=str, n=int),
  'study': dict(measure=str, arm=str, n=int),
}

# Accuracy in percent on the test images of CIFAR-10 and CIFAR-100, ResNet-18 with the CIFAR stem.
PUBLISHED = (
  (
    'SimSiam',
    '90.51',
    '66.04',
    'solo-learn, README: 1000 epochs, linear classifier trained along on augmented views',
  ),
  ('SimCLR', '90.74', '65.78', 'solo-learn, README: the same'),
  ('BYOL', '92.58', '70.46', 'solo-learn, README: the same'),
  ('SupCon (with labels)', '93.82', '70.38', 'solo-learn, README: the same'),
  (
    'SimSiam',
    '90.83',
    '-',
    'PatrickHua/SimSiam, README: 800 epochs, linear probe of the frozen encoder',
  ),
  ('supervised', '94.1', '-', 'jvlmdr/flax-cifar, README: ResNetV1-18'),
)


# What is in the files.


def leaves(tree, keys=()):
  """[(keys, value)] of a tree of dicts and lists; a list without either is a value, and so is an
  empty one."""
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
  return f'{value:,}' if is_number(value) else str(value)


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

  show = lambda x: f'{100 * x:.2f}' if percent and is_number(x) else plain(x)
  value, sd = at(keys), at(spread) if spread else None
  if value is None:
    return '-'
  text = show(value) + (f' ± {show(sd) if percent else f"{sd:.2g}"}' if is_number(sd) else '')
  share = value if bar and percent and is_number(value) else None
  return Cell(
    text,
    run.name,
    f'results/{name}.json',
    pointer(keys),
    pointer(spread) if is_number(sd) else '',
    str(value),
    share,
  )


def well_formed(name, result):
  """Whether results/<name>.json has the rows that its own section shows."""
  rows = result.get('rows')
  return (
    name in SHAPES
    and isinstance(result.get('protocol'), dict)
    and isinstance(rows, list)
    and bool(rows)
    and all(
      isinstance(row, dict)
      and all(isinstance(row.get(key), kind) for key, kind in SHAPES[name].items())
      for row in rows
    )
  )


def several(runs, text):
  """[text] where there are several runs: a first column says whose a row is."""
  return [text] if len(runs) > 1 else []


def source_of(runs, name):
  return f'From results/{name}.json' + (
    f' of {", ".join(run.name for run in runs)}' if len(runs) > 1 else ''
  )


def protocols(runs, name):
  """How each run's numbers were made, folded."""
  parts = []
  for run in runs:
    result = run.results[name]
    about = {
      key: result[key] for key in ('devices', 'processes', 'versions', 'seconds') if key in result
    }
    known = [
      ('.'.join(map(str, keys)), plain(value))
      for keys, value in leaves({**result.get('protocol', {}), **about})
    ]
    parts.append(
      report_page.fold(
        f'Protocol{f" of {run.name}" if len(runs) > 1 else ""}', report_page.facts(known), ''
      )
    )
  return ''.join(parts)


def is_number(x):
  return isinstance(x, (int, float)) and not isinstance(x, bool)


def is_finite(x):
  return is_number(x) and math.isfinite(x)


# Sections, each a string of HTML.


def facts_of(runs):
  """What the runs are: beneath each other for one, a table for several."""

  def of(run):
    c = run.config
    at = lambda section, key: c[section].get(key) if isinstance(c.get(section), dict) else None
    protocols = [
      result['protocol']
      for result in run.results.values()
      if isinstance(result.get('protocol'), dict)
    ]
    data = [p['data'] for p in protocols if isinstance(p.get('data'), str)]
    last = run.metrics.get('pretrain', [])[-1:]
    size = 'features' if at('encoder', 'name') == 'nature' else 'width'
    devices = sorted(
      {
        result['devices']
        for result in run.results.values()
        if isinstance(result.get('devices'), str)
      }
    )
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
      'Computed on': ', '.join(devices) or 'unknown: no result yet',
    }

  known = [of(run) for run in runs]
  if len(runs) == 1:
    return report_page.facts(known[0].items())
  rows = [Row([key, *(facts[key] for facts in known)]) for key in known[0]]
  return report_page.table(
    'The runs',
    ['', *(run.name for run in runs)],
    rows,
    'From config.json, metrics and results of each',
    texts=1 + len(runs),
  )


def config_section(runs):
  """Settings in which the runs differ; for one run, from the package's defaults. The others
  folded."""
  known = [{pointer(keys): value for keys, value in leaves(run.config)} for run in runs]
  keys = list(dict.fromkeys(key for settings in known for key in settings))
  matters = [key for key in SETTINGS if key in keys] + [
    key for name in DEFAULTS for key in keys if key.startswith(f'/{name}/')
  ]
  if len(runs) == 1:
    defaults = {
      pointer((name, *place)): value
      for name, module in DEFAULTS.items()
      for place, value in leaves(json.loads(module.default_config().to_json_best_effort()))
    }
    differs = lambda key: key in defaults and known[0][key] != defaults[key]
    header, title = (
      ['setting', 'this run', 'default'],
      "Unlike the package's defaults, which are of the paper's size",
    )
  else:
    defaults = {}
    differs = lambda key: (
      len({json.dumps(settings[key]) if key in settings else '' for settings in known}) > 1
    )
    header, title = ['setting', *(run.name for run in runs)], 'Where the runs differ'

  def row(key):
    cells = [
      Cell(exact(settings[key]), run.name, 'config.json', key, '', json.dumps(settings[key]))
      if key in settings
      else 'absent'
      for run, settings in zip(runs, known, strict=True)
    ]
    return Row(
      [key[1:].replace('/', '.'), *cells, *([exact(defaults.get(key))] if len(runs) == 1 else [])]
    )

  def make(title, keys):
    return report_page.table(title, header, map(row, keys), 'From config.json', texts=len(header))

  differ = [key for key in matters if differs(key)]
  # Generator, evaluations and the like matter less, and differ most with the version.
  minor = [key for key in keys if len(runs) > 1 and key not in differ and differs(key)]
  others = [key for key in keys if key not in differ + minor]
  out = (
    make(title, differ) if differ else '<p>No setting of world, encoder and learner differs.</p>'
  )
  for what, some in (('differences elsewhere', minor), ('other settings', others)):
    out += report_page.fold(f'{len(some)} {what}', make(what.capitalize(), some)) if some else ''
  return out


def cards(run):
  """[(title, big Cell, what it is, [(name, Cell)])] of what was measured."""
  found = []
  if well_formed('probe', run.results.get('probe', {})):
    rows = [
      (i, row)
      for i, row in enumerate(run.results['probe']['rows'])
      if row['fraction'] == 1 and row['labels'] == 'fine' and 'clean' in row['accuracy']
    ]
    at = lambda i: cell(run, 'probe', 'rows', i, 'accuracy', 'clean', percent=True)
    method = next(
      (m for m in ('lbfgs', 'sgd') if any(row['method'] == m for _, row in rows)), None
    )  # pixels have no sgd
    same = [(i, row['features']) for i, row in rows if row['method'] == method]
    if same:
      (first, name), *rest = same
      others = [
        (i, f'{name}, {METHODS["sgd"]}')
        for i, row in rows
        if method != 'sgd' and (row['features'], row['method']) == (name, 'sgd')
      ]
      others += [
        (i, row['features']) for i, row in rows if row['method'] in ('finetune', 'supervised')
      ]
      found.append(
        (
          'Linear accuracy, %',
          at(first),
          f'{name}, {METHODS[method]}',
          [(n, at(i)) for i, n in rest + others],
        )
      )
  if well_formed('ood', run.results.get('ood', {})):
    rows = run.results['ood']['rows']
    first = rows[0]
    at = lambda i: cell(
      run, 'ood', 'rows', i, 'auroc', 'mean', spread=('rows', i, 'auroc', 'sd'), percent=True
    )
    shown = [
      (
        row['set'] if row['encoder'] == first['encoder'] else f'{row["set"]}, {row["encoder"]}',
        at(i),
      )
      for i, row in enumerate(rows)
      if i
      and row['score'] == first['score']
      and (row['encoder'] == first['encoder'] or row['set'] == first['set'])
    ]
    paper = cell(
      run,
      'ood',
      'paper',
      'rows',
      'PALM',
      first['set'],
      0,
      spread=('paper', 'rows', 'PALM', first['set'], 1),
    )
    shown += [(f'{first["set"]}, PALM in the paper', paper)] if isinstance(paper, Cell) else []
    found.append(
      ('AUROC, %', at(0), f'{first["set"]}, {first["encoder"]}, score {first["score"]}', shown)
    )
  if well_formed('diversity', run.results.get('diversity', {})):
    rows = run.results['diversity']['rows']
    key = prefix_of(rows) + 'unique_nn'
    at = lambda i: cell(
      run, 'diversity', 'rows', i, key, spread=('rows', i, f'{key}_sd'), percent=True
    )
    shown = [(row['set'], at(i)) for i, row in enumerate(rows) if i]
    found.append(
      (
        'Coverage of training images, %',
        at(0),
        rows[0]['set'],
        [*shown, ('ceiling', cell(run, 'diversity', 'ceiling', percent=True))],
      )
    )
  return found


def prefix_of(rows):
  """What the features of the coverage put before the names of its numbers: 'encoder-', '', ..."""
  return next((key for key in rows[0] if key.endswith('unique_nn')), 'unique_nn').removesuffix(
    'unique_nn'
  )


def headline(runs):
  grouped = {}
  for run in runs:
    for title, *part in cards(run):
      grouped.setdefault(title, []).append((run.name if len(runs) > 1 else '', *part))
  return (
    '<div class="cards">'
    + ''.join(report_page.card(title, parts) for title, parts in grouped.items())
    + '</div>'
  )


def probe_section(runs):
  """Accuracies: a row for each kind of features, method and labels; a column for each run and set
  of test images."""
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
    return (
      '-'
      if i is None
      else cell(
        tests[name, test],
        'probe',
        'rows',
        i,
        'accuracy',
        test,
        spread=spread,
        percent=True,
        bar=True,
      )
    )

  def make(title, keys, shown):
    words = lambda key: [key[0], METHODS.get(key[1], key[1]), key[2], f'{key[3]:.4g}', str(key[4])]
    chosen = lambda texts: [text for text, show in zip(texts, shown, strict=True) if show]
    header = chosen(['features', 'method', 'labels', 'share of labels', 'draw'])
    heads = [
      ', '.join([*several(runs, name), *([test] if test != 'clean' or len(runs) == 1 else [])])
      for name, test in columns
    ]
    rows = [
      Row(
        [*chosen(words(key)), *(number(key, *column) for column in columns)],
        'strong' if key[0] == 'PALM encoder' else '',
      )
      for key in keys
    ]
    return report_page.table(
      title, header + heads, rows, source_of(runs, 'probe'), protocols(runs, 'probe'), len(header)
    )

  whole, fewer = [key for key in places if key[3] == 1], [key for key in places if key[3] != 1]
  out = (
    '<p>Share of test images given their class; ± is the half width of the 95% Wilson interval.</p>'
  )
  if whole:
    out += make('Accuracy, %, with all labels', whole, (True, True, coarse, False, False))
  if fewer:
    out += report_page.fold(
      f'With a share of the labels: {len(fewer)} rows',
      make('Accuracy, %, with a share of the labels', fewer, (True, True, coarse, True, True)),
    )
  data = ', '.join(
    dict.fromkeys(str(run.results['probe']['protocol'].get('data', '')) for run in runs)
  )
  if 'cifar' in data.lower():
    out += report_page.table(
      'Published, for comparison: accuracy, %, ResNet-18',
      ['method', 'CIFAR-10', 'CIFAR-100', 'source'],
      [Row([name, ten, hundred, source], 'paper') for name, ten, hundred, source in PUBLISHED],
      'From the literature, on the original pixels: not comparable with numbers on JPEG copies or '
      'other pixels. Ours were '
      f'measured on {data}. The paper gives its own linear accuracies as a figure only (Figure '
      '3), so none is here.',
    )
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
      value = lambda i, metric, run=run: cell(
        run, 'ood', 'rows', i, metric, 'mean', spread=('rows', i, metric, 'sd'), percent=True
      )
      accuracy = cell(
        run, 'ood', 'accuracy', key[0], 'mean', spread=('accuracy', key[0], 'sd'), percent=True
      )
      rows.append(
        Row(
          [
            *whose,
            *(value(found[ood], 'auroc') if ood in found else '-' for ood in sets),
            accuracy,
          ],
          'strong' if key[1] == 'msp' else '',
        )
      )
      others += [
        Row(
          [*whose, ood, *(value(i, metric) for metric in ('aupr_in', 'aupr_out', 'fpr_at_95_tpr'))]
        )
        for ood, i in found.items()
      ]
    known = run.results['ood'].get('paper')
    if isinstance(known, dict) and isinstance(known.get('rows'), dict) and not paper:
      number = lambda method, ood, run=run: cell(
        run, 'ood', 'paper', 'rows', method, ood, 0, spread=('paper', 'rows', method, ood, 1)
      )
      paper = [
        Row(
          [
            *several(runs, 'the paper'),
            f'{method}, paper' if len(runs) == 1 else method,
            'Table 1',
            *(number(method, ood) for ood in sets),
            '-',
          ],
          'paper',
        )
        for method in known['rows']
      ]
  out = report_page.table(
    'AUROC, %',
    [*names, 'encoder', 'score', *sets, 'ID accuracy'],
    rows + paper,
    source_of(runs, 'ood'),
    protocols(runs, 'ood'),
    len(names) + 2,
  )
  out += (
    '<p class="soft">'
    + (
      "The paper's classifiers learned from the original pixels of CIFAR-10; how they were "
      'trained, and with which score, it '
      'does not say.'
      if paper
      else 'Table 1 of the paper has classifiers of CIFAR-10 and its own five sets: no row of it fits '
      'here.'
    )
    + '</p>'
  )
  return out + report_page.fold(
    'AUPR and FPR',
    report_page.table(
      'Other measures, %',
      [*names, 'encoder', 'score', 'set', 'AUPR, ID', 'AUPR, OOD', 'FPR at 95% TPR of ID'],
      others,
      source_of(runs, 'ood'),
      texts=len(names) + 3,
    ),
  )


def diversity_section(runs):
  """The paper's Table 3 beside ours; PRDC and FID."""
  names, comparable, shares, others = several(runs, 'run'), True, [], []
  for run in runs:
    result = run.results['diversity']
    prefix, kind = prefix_of(result['rows']), plain(result['protocol'].get('features'))
    comparable &= kind == 'inception' and result['protocol'].get('n') == 10_000
    for i, row in enumerate(result['rows']):
      value = lambda key, percent=False, i=i, run=run, prefix=prefix: cell(
        run,
        'diversity',
        'rows',
        i,
        prefix + key,
        spread=('rows', i, f'{prefix}{key}_sd'),
        percent=percent,
        bar=key == 'unique_nn',
      )
      whose = [*several(runs, run.name), row['set'], kind]
      shares.append(
        Row(
          [
            *whose,
            cell(run, 'diversity', 'rows', i, 'n'),
            value('unique_nn', True),
            cell(run, 'diversity', 'paper', row['set']),
            value('symmetric', True),
            value('hit_once', True),
          ],
          'strong' if i == 0 else '',
        )
      )
      others.append(
        Row(
          [*whose, *map(value, ('precision', 'recall', 'density', 'coverage', 'FID'))],
          'strong' if i == 0 else '',
        )
      )
    shares.append(
      Row(
        [
          *several(runs, run.name),
          'ceiling: hits spread evenly',
          '',
          '',
          cell(run, 'diversity', 'ceiling', percent=True),
          '',
          '',
          '',
        ],
        'paper',
      )
    )
  out = '<p>Share of training images that are the nearest of at least one image of a set; ± is the standard deviation over draws.'
  out += (
    '</p>'
    if comparable
    else (
      " The paper's Table 3 has Inception features and 10,000 images of each set: <strong>its "
      'numbers and these are not '
      'comparable</strong>.</p>'
    )
  )
  words = [*names, 'set', 'features']
  return (
    out
    + report_page.table(
      'Coverage of training images, %',
      [*words, 'n', 'nearest of any', 'paper, Table 3', 'symmetric', 'hit once'],
      shares,
      source_of(runs, 'diversity'),
      protocols(runs, 'diversity'),
      len(words),
    )
    + report_page.table(
      'Fidelity and spread',
      [*words, 'precision', 'recall', 'density', 'coverage (PRDC)', 'FID'],
      others,
      source_of(runs, 'diversity'),
      texts=len(words),
    )
  )


def quality_section(runs):
  """Distances and precision of the generator's pictures."""
  rows_of = lambda run: run.results['quality']['rows']
  keys = list(dict.fromkeys(key for run in runs for row in rows_of(run) for key in row))
  keys = [key for key in keys if key != 'set' and not key.endswith('_sd')]
  rows = [
    Row(
      [
        *several(runs, run.name),
        row['set'],
        *(cell(run, 'quality', 'rows', i, key, spread=('rows', i, f'{key}_sd')) for key in keys),
      ],
      'strong' if row['set'] == 'generator' else '',
    )
    for run in runs
    for i, row in enumerate(rows_of(run))
  ]
  names = [*several(runs, 'run'), 'set']
  out = report_page.table(
    'Generated pictures against training images',
    names + keys,
    rows,
    source_of(runs, 'quality'),
    protocols(runs, 'quality'),
    len(names),
  )
  recognised = lambda run: run.results['quality'].get('recognised')
  sets = list(
    dict.fromkeys(
      name for run in runs if isinstance(recognised(run), dict) for name in recognised(run)
    )
  )
  if sets:
    out += report_page.table(
      'Given their class by the classifier behind the features',
      ['set', *heads_of(runs, '%')],
      [
        Row(
          [
            name,
            *(cell(run, 'quality', 'recognised', name, percent=True, bar=True) for run in runs),
          ]
        )
        for name in sets
      ],
      source_of(runs, 'quality'),
    )
  return out


def heads_of(runs, otherwise):
  """Headers of a column a run."""
  return [run.name for run in runs] if len(runs) > 1 else [otherwise]


def values_tables(name, title, runs):
  """All values of results/<name>.json but its protocol and settings, a column a run; '' where no
  run has it."""
  runs = [run for run in runs if name in run.results]
  if not runs:
    return ''
  about = ('job', 'protocol', 'settings', 'versions')
  keys = list(
    dict.fromkeys(
      keys
      for run in runs
      for keys, _ in leaves({k: v for k, v in run.results[name].items() if k not in about})
      if keys
    )
  )
  rows = [Row(['.'.join(map(str, key)), *(cell(run, name, *key) for run in runs)]) for key in keys]
  header = ['', *heads_of(runs, 'value')]
  make = lambda caption, rows: report_page.table(
    caption, header, rows, source_of(runs, name), protocols(runs, name)
  )
  return (
    make(title, rows)
    if len(rows) <= 12
    else report_page.fold(f'{title}: {len(rows)} values', make(title, rows))
  )
