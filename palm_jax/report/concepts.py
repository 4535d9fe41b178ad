"""The section on results/concepts.json: the parts that an encoder's feature maps are made of."""

from palm_jax.report import page
from palm_jax.report.page import Row
from palm_jax.report.pictures import MOST_BYTES, embed
from palm_jax.report.read import Report
from palm_jax.report.values import cell, heads_of, if_several, protocols, source_of

ROWS = dict(concept=int, share=float, classes=dict, picture=str)


def section(report: Report) -> str:
  """Each concept's share, classes and strongest pictures; what is left by number of concepts."""
  runs, rows, shown = report.runs, [], ''
  count = sum(len(run.results['concepts']['rows']) for run in runs)
  for run in runs:
    for i, row in enumerate(run.results['concepts']['rows']):
      classes = ', '.join(map(str, row['classes']))
      number = lambda key, i=i, run=run: cell(
        run, 'concepts', 'rows', i, key, percent=True, bar=key == 'share'
      )
      words = [*if_several(runs, run.name), str(row['concept'])]
      rows.append(Row([*words, number('share'), number('fires'), classes]))
      path = run.folder / 'concepts' / f'{i}.png'
      uri = embed(path, MOST_BYTES // (3 * count)) if path.is_file() else None
      if uri:
        what = f'Concept {row["concept"]}'
        about = f'{what}: strongest pictures, and where it fires; most in {classes}'
        shown += page.picture(uri, f'{what} ({run.name})', page.esc(about), 'wide sharp')
  names = [*if_several(runs, 'run'), 'concept']
  table = page.table(
    'Concepts: parts of the last feature maps',
    [*names, 'share %', 'fires in %', 'most in'],
    rows,
    source_of(runs, 'concepts'),
    protocols(runs, 'concepts'),
    len(names),
  )
  return table + f'<div class="pictures">{shown}</div>' + _errors(runs)


def _errors(runs):
  ranks = list(dict.fromkeys(r for run in runs for r in run.results['concepts'].get('errors', {})))
  number = lambda run, rank: cell(run, 'concepts', 'errors', rank, percent=True, bar=True)
  return page.table(
    'Left unexplained, by number of concepts',
    ['concepts', *heads_of(runs, '%')],
    [Row([rank, *(number(run, rank) for run in runs)]) for rank in ranks],
    source_of(runs, 'concepts'),
  )
