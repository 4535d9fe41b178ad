"""The section on results/ood.json: the paper's Table 1, its rows beneath ours."""

from palm_jax.report import page
from palm_jax.report.page import Cell, Headline, Row
from palm_jax.report.read import Report, RunFiles
from palm_jax.report.values import cell, if_several, protocols, source_of

ROWS = dict(encoder=str, score=str, set=str, auroc=dict)


def section(report: Report) -> str:
  """AUROCs in the layout of the paper's Table 1; behind them the other measures."""
  runs = report.runs
  sets = list(dict.fromkeys(row['set'] for run in runs for row in run.results['ood']['rows']))
  rows = []
  others = []
  for run in runs:
    for (encoder, score), places in _places(run).items():
      words = [*if_several(runs, run.name), encoder, score]
      aurocs = [_measure(run, places[ood], 'auroc') if ood in places else '-' for ood in sets]
      accuracy = cell(
        run,
        'ood',
        'accuracy',
        encoder,
        'mean',
        spread=('accuracy', encoder, 'sd'),
        percent=True,
      )
      rows.append(Row([*words, *aurocs, accuracy], 'strong' if score == 'msp' else ''))
      for ood, i in places.items():
        measures = [_measure(run, i, name) for name in ('aupr_in', 'aupr_out', 'fpr_at_95_tpr')]
        others.append(Row([*words, ood, *measures]))
  paper = _paper_rows(runs, sets)
  names = if_several(runs, 'run')
  aurocs = page.table(
    'AUROC, %',
    [*names, 'encoder', 'score', *sets, 'ID accuracy'],
    rows + paper,
    source_of(runs, 'ood'),
    protocols(runs, 'ood'),
    len(names) + 2,
  )
  if paper:
    note = (
      "The paper's classifiers learned from the original pixels of CIFAR-10; how they were "
      'trained, and with which score, it does not say.'
    )
  else:
    note = (
      'Table 1 of the paper has classifiers of CIFAR-10 and its own five sets: no row of it fits '
      'here.'
    )
  measures = page.table(
    'Other measures, %',
    [*names, 'encoder', 'score', 'set', 'AUPR, ID', 'AUPR, OOD', 'FPR at 95% TPR of ID'],
    others,
    source_of(runs, 'ood'),
    texts=len(names) + 3,
  )
  return f'{aurocs}<p class="soft">{note}</p>{page.details("AUPR and FPR", measures)}'


def _places(run):
  """{(encoder, score): {set: number of the row}}."""
  places = {}
  for i, row in enumerate(run.results['ood']['rows']):
    places.setdefault((row['encoder'], row['score']), {})[row['set']] = i
  return places


def _measure(run, i, name):
  return cell(run, 'ood', 'rows', i, name, 'mean', spread=('rows', i, name, 'sd'), percent=True)


def _paper_rows(runs, sets):
  """The rows of the paper's table, from the first run that has them."""
  for run in runs:
    known = run.results['ood'].get('paper')
    if isinstance(known, dict) and isinstance(known.get('rows'), dict) and known['rows']:
      return [
        Row(
          [
            *if_several(runs, 'the paper'),
            f'{method}, paper' if len(runs) == 1 else method,
            'Table 1',
            *(_paper_number(run, method, ood) for ood in sets),
            '-',
          ],
          'paper',
        )
        for method in known['rows']
      ]
  return []


def _paper_number(run, method, ood):
  keys = ('paper', 'rows', method, ood)
  return cell(run, 'ood', *keys, 0, spread=(*keys, 1))


def card(run: RunFiles) -> Headline:
  """The first AUROC, beside those of the other sets, encoders and the paper."""
  rows = run.results['ood']['rows']
  first = rows[0]
  shown = []
  for i, row in enumerate(rows[1:], 1):
    same_encoder = row['encoder'] == first['encoder']
    if row['score'] == first['score'] and (same_encoder or row['set'] == first['set']):
      name = row['set'] if same_encoder else f'{row["set"]}, {row["encoder"]}'
      shown.append((name, _measure(run, i, 'auroc')))
  paper = _paper_number(run, 'PALM', first['set'])
  if isinstance(paper, Cell):
    shown.append((f'{first["set"]}, PALM in the paper', paper))
  what = f'{first["set"]}, {first["encoder"]}, score {first["score"]}'
  return 'AUROC, %', _measure(run, 0, 'auroc'), what, shown
