"""The section on results/probe.json: accuracies of classifiers on the features."""

from typing import NamedTuple

from palm_jax.report import page
from palm_jax.report.page import Headline, Row
from palm_jax.report.read import Report, RunFiles
from palm_jax.report.values import cell, if_several, protocols, source_of

ROWS = dict(features=str, method=str, labels=str, fraction=(int, float), draw=int, accuracy=dict)
METHODS = {
  'sgd': 'linear, SGD',
  'lbfgs': 'linear, L-BFGS',
  'knn': 'kNN vote',
  'finetune': 'end to end, fine-tuned',
  'supervised': 'end to end, from scratch',
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


class Key(NamedTuple):
  """What tells rows apart."""

  features: str
  method: str
  labels: str
  fraction: float
  draw: int


def section(report: Report) -> str:
  """A row for each kind of features, method and labels; a column for each run and test set."""
  runs = report.runs
  places = {}  # Key -> {name of a run: number of its row}
  for run in runs:
    for i, row in enumerate(run.results['probe']['rows']):
      key = Key(*(row[field] for field in Key._fields))
      places.setdefault(key, {})[run.name] = i
  whole = [key for key in places if key.fraction == 1]
  fewer = [key for key in places if key.fraction != 1]
  words = ['features', 'method']
  if len({key.labels for key in places}) > 1:
    words.append('labels')
  out = (
    '<p>Share of test images given their class; ± is the half width of the 95% Wilson interval.</p>'
  )
  if whole:
    out += _table(runs, places, whole, words, 'Accuracy, %, with all labels')
  if fewer:
    words = [*words, 'fraction', 'draw']
    out += page.details(
      f'With a share of the labels: {len(fewer)} rows',
      _table(runs, places, fewer, words, 'Accuracy, %, with a share of the labels'),
    )
  return out + _published(runs)


def _table(runs, places, keys, words, title):
  """Accuracies of those keys; `words` are the fields of Key that are shown."""
  columns = [(run, test) for run in runs for test in _tests(run)]
  heads = []
  for run, test in columns:
    head = if_several(runs, run.name)
    if test != 'clean' or len(runs) == 1:
      head.append(test)
    heads.append(', '.join(head))
  rows = [
    Row(
      [
        *(_word(key, field) for field in words),
        *(_accuracy(run, places[key].get(run.name), test) for run, test in columns),
      ],
      'strong' if key.features == 'PALM encoder' else '',
    )
    for key in keys
  ]
  header = ['share of labels' if field == 'fraction' else field for field in words]
  return page.table(
    title,
    header + heads,
    rows,
    source_of(runs, 'probe'),
    protocols(runs, 'probe'),
    len(header),
  )


def _tests(run):
  """The sets of test images that a run was judged on."""
  return dict.fromkeys(test for row in run.results['probe']['rows'] for test in row['accuracy'])


def _word(key, field):
  value = getattr(key, field)
  if field == 'method':
    return METHODS[value] if value in METHODS else value
  return f'{value:.4g}' if field == 'fraction' else str(value)


def _accuracy(run, i, test):
  if i is None:
    return '-'
  spread = ('rows', i, 'half_width') if test == 'clean' else None
  return cell(run, 'probe', 'rows', i, 'accuracy', test, spread=spread, percent=True, bar=True)


def _published(runs):
  """Numbers of the literature where the data are CIFAR."""
  data = ', '.join(
    dict.fromkeys(str(run.results['probe']['protocol'].get('data', '')) for run in runs)
  )
  if 'cifar' not in data.lower():
    return ''
  return page.table(
    'Published, for comparison: accuracy, %, ResNet-18',
    ['method', 'CIFAR-10', 'CIFAR-100', 'source'],
    [Row(list(row), 'paper') for row in PUBLISHED],
    'From the literature, on the original pixels: not comparable with numbers on JPEG copies or '
    f'other pixels. Ours were measured on {data}. The paper gives its own linear accuracies as a '
    'figure only (Figure 3), so none is here.',
  )


def card(run: RunFiles) -> Headline | None:
  """The linear accuracy with all labels, beside other features and methods."""
  rows = [
    (i, row)
    for i, row in enumerate(run.results['probe']['rows'])
    if row['fraction'] == 1 and row['labels'] == 'fine' and 'clean' in row['accuracy']
  ]
  used = {row['method'] for _, row in rows}
  if not used & {'lbfgs', 'sgd'}:
    return None
  method = 'lbfgs' if 'lbfgs' in used else 'sgd'  # pixels have no sgd
  (first, name), *others = [(i, row['features']) for i, row in rows if row['method'] == method]
  if method != 'sgd':
    others += [
      (i, f'{name}, {METHODS["sgd"]}')
      for i, row in rows
      if row['features'] == name and row['method'] == 'sgd'
    ]
  others += [(i, row['features']) for i, row in rows if row['method'] in ('finetune', 'supervised')]
  number = lambda i: cell(run, 'probe', 'rows', i, 'accuracy', 'clean', percent=True)
  return (
    'Linear accuracy, %',
    number(first),
    f'{name}, {METHODS[method]}',
    [(name, number(i)) for i, name in others],
  )
