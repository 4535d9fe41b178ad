"""The section on results/quality.json: generated pictures against training images."""

from palm_jax.report import page
from palm_jax.report.page import Row
from palm_jax.report.read import Report
from palm_jax.report.values import cell, heads_of, if_several, protocols, source_of

ROWS = dict(set=str, n=int)


def section(report: Report) -> str:
  """Distances and precision of the generator's pictures, and whether a classifier knows them."""
  runs = report.runs
  all_rows = [(run, i, row) for run in runs for i, row in enumerate(run.results['quality']['rows'])]
  keys = list(dict.fromkeys(key for _, _, row in all_rows for key in row))
  keys = [key for key in keys if key != 'set' and not key.endswith('_sd')]
  rows = []
  for run, i, row in all_rows:
    numbers = [
      cell(run, 'quality', 'rows', i, key, spread=('rows', i, f'{key}_sd')) for key in keys
    ]
    words = [*if_several(runs, run.name), row['set']]
    rows.append(Row([*words, *numbers], 'strong' if row['set'] == 'generator' else ''))
  names = [*if_several(runs, 'run'), 'set']
  table = page.table(
    'Generated pictures against training images',
    names + keys,
    rows,
    source_of(runs, 'quality'),
    protocols(runs, 'quality'),
    len(names),
  )
  return table + _recognised(runs)


def _recognised(runs):
  """A table of the shares of pictures that a classifier recognises, where there are some."""
  shares = [run.results['quality'].get('recognised') for run in runs]
  sets = list(dict.fromkeys(name for of in shares if isinstance(of, dict) for name in of))
  if not sets:
    return ''
  number = lambda run, name: cell(run, 'quality', 'recognised', name, percent=True, bar=True)
  return page.table(
    'Given their class by the classifier behind the features',
    ['set', *heads_of(runs, '%')],
    [Row([name, *(number(run, name) for run in runs)]) for name in sets],
    source_of(runs, 'quality'),
  )
