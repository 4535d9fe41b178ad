"""The report's section on a study: its means with intervals, and what they say of the claims."""

from palm_jax.report import page as report_page
from palm_jax.report.page import Row
from palm_jax.report.sections import cell, protocols, several, source_of


def study_section(runs):
  """A table for each measure, and one of the claims."""
  rows_of = lambda run: run.results['study']['rows']
  words = [*several(runs, 'study'), 'arm', 'x']
  ends = ['bootstrap from', 'to']
  out = ''
  for measure in dict.fromkeys(row['measure'] for run in runs for row in rows_of(run)):
    rows = []
    for run in runs:
      for i, row in enumerate(rows_of(run)):
        value = lambda *keys, i=i, run=run: cell(run, 'study', 'rows', i, *keys)
        minus = [value('minus_reference', key) for key in ('difference', 'low', 'high')]
        if row['measure'] == measure:
          rows.append(
            Row(
              [
                *several(runs, run.name),
                row['arm'],
                value('x'),
                value('n'),
                value('mean'),
                value('low'),
                value('high'),
                *minus,
              ]
            )
          )
    reference = ', '.join(
      dict.fromkeys(str(run.results['study']['protocol'].get('reference', '')) for run in runs)
    )
    out += report_page.table(
      measure,
      [*words, 'seeds', 'mean', *ends, f'minus {reference}', *ends],
      rows,
      source_of(runs, 'study'),
      texts=len(words),
    )
  claims = [
    (run, i, found)
    for run in runs
    for i, found in enumerate(run.results['study'].get('orderings', []))
  ]
  if claims:
    rows = [
      Row(
        [
          *several(runs, run.name),
          found['ordering'],
          found['verdict'],
          *(
            cell(run, 'study', 'orderings', i, key)
            for key in ('x', 'difference', 't_low', 't_high', 'n')
          ),
        ]
      )
      for run, i, found in claims
    ]
    header = [
      *several(runs, 'study'),
      'claim',
      'verdict',
      'x',
      'difference',
      't from',
      'to',
      'seeds',
    ]
    out += report_page.table(
      'Claims', header, rows, source_of(runs, 'study'), texts=len(header) - 4
    )
  return out + protocols(runs, 'study')
