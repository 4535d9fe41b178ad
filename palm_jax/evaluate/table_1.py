"""Table 1 of the paper, and our own results in its layout.

Liu et al. 2022, arXiv 2210.10913v2: AUROC in percent, mean and standard deviation of five trials
where given; classifiers (ResNet-18) of CIFAR-10. LSUN is ODIN's LSUN_resize, which CSI used.
"""

import collections
import re
from collections.abc import Iterable, Mapping
from typing import Any

from palm_jax.base.tables import aligned, protocol_line
from palm_jax.evaluate.image_sets import RESIZED, UNMIXED

COLUMNS = ('SVHN', 'LSUN', 'CIFAR-100', 'Interp.', 'CelebA')
TABLE_1: dict[str, dict[str, tuple[float, ...]]] = {
  method: dict(zip(COLUMNS, numbers, strict=True))
  for method, numbers in {
    'PALM': ((97.9, 0.2), (96.1, 0.3), (91.5, 0.2), (79.9, 0.2), (76.8, 0.4)),
    'CSI': ((96.5,), (96.3,), (90.5,), (78.5,), (75.1,)),
    'SupCLR': ((97.3,), (92.8,), (88.6,), (75.7,), (73.2,)),
    'Standard': ((88.6,), (90.7,), (85.8,), (75.4,), (64.1,)),
  }.items()
}
CIFAR10 = {'airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck'}


def column(name: str) -> str | None:
  """The column that a set's name stands for ('svhn', 'CIFAR100', 'interp:pairs'), or None."""
  plain = lambda text: re.sub(r'[^a-z0-9]', '', text.lower().split(':')[0])
  return next((known for known in COLUMNS if plain(known) == plain(name)), None)


def papers(sets: Mapping[str, str], class_names: Iterable[str]) -> dict[str, Any] | None:
  """The paper's numbers of these sets; None where it has none, or the data are not CIFAR-10.

  Args:
    sets: {name: image_sets' description}. LSUN that was resized here is another than the paper's.
    class_names: of the data.
  """
  found = {name: column(name) for name in sets}
  ours = lambda name: found[name] == 'LSUN' and RESIZED in sets[name]
  columns = {name: known for name, known in found.items() if known and not ours(name)}
  if not columns or {name.lower() for name in class_names} != CIFAR10:
    return None
  rows = {
    method: {name: list(numbers[known]) for name, known in columns.items()}
    for method, numbers in TABLE_1.items()
  }
  found = dict(source='arXiv 2210.10913v2, Table 1, AUROC in percent', rows=rows)
  other = [
    name for name, known in columns.items() if known == 'Interp.' and UNMIXED not in sets[name]
  ]
  if other:
    found['note'] = (
      f"the paper's Interp. is CSI's (interp:csi), whose first 100 pictures are no averages: not "
      f'that of {", ".join(other)}'
    )
  return found


def table(results: dict[str, Any]) -> str:
  """The AUROCs of the job ood as text: a row an encoder and score, a column a set.

  Below them stand the paper's, and the protocol.
  """
  sets = list(results['protocol']['sets'])
  rows = collections.defaultdict(dict)
  for row in results['rows']:
    rows[row['encoder'], row['score']][row['set']] = _percent(row['auroc'])
  cells = [['AUROC %', 'score', *sets, 'ID accuracy %']]
  for (encoder, score), row in rows.items():
    accuracy = _percent(results['accuracy'][encoder])
    cells.append([encoder, score, *(row[name] for name in sets), accuracy])
  if 'paper' in results:
    for method, numbers in results['paper']['rows'].items():
      known = [_cell(*numbers[name]) if name in numbers else '-' for name in sets]
      cells.append([f'paper: {method}', '-', *known, '-'])
  notes = [results['paper']['note']] if 'note' in results.get('paper', {}) else []
  return '\n'.join([*aligned(cells, left=2), *notes, protocol_line(results['protocol'])])


def _percent(part):
  """A share's mean and standard deviation, in percent."""
  if part['sd'] is None:
    return _cell(100 * part['mean'])
  return _cell(100 * part['mean'], 100 * part['sd'])


def _cell(mean, sd=None):
  return f'{mean:.1f}' if sd is None else f'{mean:.1f} +- {sd:.1f}'
