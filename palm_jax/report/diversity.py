"""The section on results/diversity.json: the paper's Table 3 beside ours; PRDC and FID."""

from palm_jax.report import page
from palm_jax.report.page import Headline, Row
from palm_jax.report.read import Report, RunFiles
from palm_jax.report.values import cell, if_several, plain, protocols, source_of

ROWS = dict(set=str, n=int)


def section(report: Report) -> str:
  """The coverage of training images, and fidelity and spread."""
  runs = report.runs
  shares = []
  others = []
  for run in runs:
    rows = run.results['diversity']['rows']
    for i, row in enumerate(rows):
      words = [*if_several(runs, run.name), row['set'], plain(row.get('features'))]
      kind = 'strong' if row['set'] == rows[0]['set'] else ''
      share = [
        cell(run, 'diversity', 'rows', i, 'n'),
        _measure(run, i, 'unique_nn', percent=True, bar=True),
        cell(run, 'diversity', 'paper', row['set']),
        _measure(run, i, 'symmetric', percent=True),
        _measure(run, i, 'hit_once', percent=True),
      ]
      shares.append(Row([*words, *share], kind))
      names = ('precision', 'recall', 'density', 'coverage', 'FID')
      others.append(Row([*words, *(_measure(run, i, name) for name in names)], kind))
    shares.append(_ceiling(runs, run))
  words = [*if_several(runs, 'run'), 'set', 'features']
  coverage = page.table(
    'Coverage of training images, %',
    [*words, 'n', 'nearest of any', 'paper, Table 3', 'symmetric', 'hit once'],
    shares,
    source_of(runs, 'diversity'),
    protocols(runs, 'diversity'),
    len(words),
  )
  fidelity = page.table(
    'Fidelity and spread',
    [*words, 'precision', 'recall', 'density', 'coverage (PRDC)', 'FID'],
    others,
    source_of(runs, 'diversity'),
    texts=len(words),
  )
  return _explanation(runs) + coverage + fidelity


def _explanation(runs):
  """What the numbers are, and whether they can be compared with the paper's."""
  comparable = all(
    _features(run) == {'inception'} and run.results['diversity']['protocol'].get('n') == 10_000
    for run in runs
  )
  warning = (
    " The paper's Table 3 has Inception features and 10,000 images of each set: <strong>its "
    'numbers and these are not comparable</strong>.'
  )
  return (
    '<p>Share of training images that are the nearest of at least one image of a set; ± is the '
    f'standard deviation over draws.{"" if comparable else warning}</p>'
  )


def _features(run):
  return {row.get('features') for row in run.results['diversity']['rows']}


def _measure(run, i, name, percent=False, bar=False):
  key = _prefix(run.results['diversity']['rows'][i]) + name
  spread = ('rows', i, f'{key}_sd')
  return cell(run, 'diversity', 'rows', i, key, spread=spread, percent=percent, bar=bar)


def _prefix(row):
  """What the features of the coverage put before the names of its numbers: 'encoder-', '', ..."""
  key = next((key for key in row if key.endswith('unique_nn')), 'unique_nn')
  return key.removesuffix('unique_nn')


def _ceiling(runs, run):
  ceiling = cell(run, 'diversity', 'ceiling', percent=True)
  words = [*if_several(runs, run.name), 'ceiling: hits spread evenly', '', '']
  return Row([*words, ceiling, '', '', ''], 'paper')


def card(run: RunFiles) -> Headline:
  """The coverage of the first set, beside the others in the same features and the ceiling."""
  rows = run.results['diversity']['rows']
  rows = [row for row in rows if row.get('features') == rows[0].get('features')]
  numbers = [_measure(run, i, 'unique_nn', percent=True) for i in range(len(rows))]
  others = [(row['set'], number) for row, number in zip(rows[1:], numbers[1:], strict=True)]
  others.append(('ceiling', cell(run, 'diversity', 'ceiling', percent=True)))
  return 'Coverage of training images, %', numbers[0], rows[0]['set'], others
