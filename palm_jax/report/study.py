"""The section on results/study.json: means with intervals, and what they say of the claims."""

from palm_jax.report import page, pictures
from palm_jax.report.page import Row
from palm_jax.report.read import Report
from palm_jax.report.values import cell, if_several, protocols, source_of

ROWS = dict(measure=str, arm=str, n=int)


def section(report: Report) -> str:
  """A table for each measure, one of the claims, and the figure."""
  runs = report.runs
  measures = dict.fromkeys(row['measure'] for run in runs for row in run.results['study']['rows'])
  tables = ''.join(_measure(runs, measure) for measure in measures)
  figure = pictures.section('study', report)
  return tables + _claims(runs) + protocols(runs, 'study') + figure


def _measure(runs, measure):
  """The means of one measure, and their differences from the reference."""
  rows = []
  for run in runs:
    for i, row in enumerate(run.results['study']['rows']):
      if row['measure'] == measure:
        words = [*if_several(runs, run.name), row['arm']]
        rows.append(Row([*words, *_numbers(run, i)]))
  references = (run.results['study']['protocol'].get('reference', '') for run in runs)
  reference = ', '.join(dict.fromkeys(map(str, references)))
  words = [*if_several(runs, 'study'), 'arm', 'x']
  ends = ['bootstrap from', 'to']
  return page.table(
    measure,
    [*words, 'seeds', 'mean', *ends, f'minus {reference}', *ends],
    rows,
    source_of(runs, 'study'),
    texts=len(words),
  )


def _numbers(run, i):
  own = [cell(run, 'study', 'rows', i, key) for key in ('x', 'n', 'mean', 'low', 'high')]
  minus = [
    cell(run, 'study', 'rows', i, 'minus_reference', key) for key in ('difference', 'low', 'high')
  ]
  return own + minus


def _claims(runs):
  """A table of the verdicts, where there are claims."""
  rows = []
  for run in runs:
    for i, found in enumerate(run.results['study'].get('orderings', [])):
      keys = ('x', 'difference', 't_low', 't_high', 'n')
      numbers = [cell(run, 'study', 'orderings', i, key) for key in keys]
      words = [*if_several(runs, run.name), found['ordering'], found['verdict']]
      rows.append(Row([*words, *numbers]))
  if not rows:
    return ''
  words = [*if_several(runs, 'study'), 'claim', 'verdict', 'x']
  return page.table(
    'Claims',
    [*words, 'difference', 't from', 'to', 'seeds'],
    rows,
    source_of(runs, 'study'),
    texts=len(words),
  )
