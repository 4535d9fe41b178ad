"""What a study's numbers say: intervals, comparisons, the table, the long form, and the figure,
which needs matplotlib."""

import csv
import io

import numpy as np
from absl import logging
from scipy import special

from palm_jax.base.errors import UserError
from palm_jax.base.files import replacing
from palm_jax.base.tables import aligned, protocol_line

RESAMPLES = 10_000  # of a bootstrap interval
COLUMNS = ('study', 'arm', 'x', 'seed', 'measure', 'value', 'run')
COLOURS = (
  '#0072B2',
  '#E69F00',
  '#009E73',
  '#D55E00',
  '#CC79A7',
  '#56B4E9',
  '#000000',
  '#999999',
)  # Okabe and Ito
MARKERS = 'os^Dv<>P'


def at(x):
  """' @ x', or nothing without an axis."""
  return '' if x == '' else f' @ {x}'


def same(value, text):
  """Whether a value of a file is what a text names: numbers as numbers, all else as text."""
  if isinstance(value, (int, float)) and not isinstance(value, bool):
    try:
      return float(text) == value
    except ValueError:
      return False
  return str(value) == text


def contests(claim, values):
  """What the claim 'a > b' compares.

  Args:
    claim: 'arm > arm'; an arm may be 'arm @ x'. Without it, arms are compared at each x that both
      have, and one of a single x with the other at all of its.
    values: {(arm, x): of any kind}.

  Returns:
    [(x or '', values of a, values of b)].

  Raises:
    UserError: no such claim, or an arm that is not there.
  """
  names = claim.split(' > ')
  if len(names) != 2:
    raise UserError(
      f'study.orderings: {claim!r} is no claim: expected "arm > arm" or "arm @ x > arm @ x"'
    )
  (a, b) = sides = [_places(name.strip(), values) for name in names]
  if min(map(len, sides)) == 1:
    found = [(x, y) for x in a for y in b]
  else:
    found = [(x, x) for x in a if x in b]
  return [
    (x if len(a) > 1 else y if len(b) > 1 else x if x == y else '', a[x], b[y]) for x, y in found
  ]


def _places(term, values):
  """{x: values} of the arm, or of the one place 'arm @ x'."""
  name, one, x = term.partition(' @ ')
  found = {
    place: numbers
    for (arm, place), numbers in values.items()
    if arm == name and (not one or same(place, x))
  }
  if not found:
    raise UserError(
      f'study: {term!r} is no arm with the first measure: expected one of '
      f'{", ".join(dict.fromkeys(arm for arm, _ in values))}, with @ and an x that it has where '
      'one is meant'
    )
  return found


def reference_of(reference, values):
  """{x: values} of the arm, or 'arm @ x', that others are compared with; '' is the first. UserError
  where it is none."""
  return _places(reference or next(iter(values))[0], values)


def interval(values, resamples=RESAMPLES, seed=0):
  """95% percentile bootstrap interval of the mean of values (n,): (low, high) in float64, or None
  of fewer than two."""
  values = np.asarray(values, np.float64)
  if len(values) < 2:
    return None
  rows = np.random.default_rng(seed).integers(0, len(values), (resamples, len(values)))
  return tuple(map(float, np.percentile(values[rows].mean(1), (2.5, 97.5))))


def student(values):
  """95% interval of the mean of values (n,) by Student's t, n - 1 degrees of freedom: (low, high),
  or None of fewer than two."""
  if len(values) < 2:
    return None
  half = (
    float(special.stdtrit(len(values) - 1, 0.975)) * np.std(values, ddof=1) / np.sqrt(len(values))
  )
  return float(np.mean(values) - half), float(np.mean(values) + half)


def difference(a, b):
  """a - b of {seed: value}, paired by seed.

  Returns:
    dict: `n` seeds that both have, mean `difference`, bootstrap interval `low` and `high`,
      Student's `t_low` and `t_high`.
  """
  paired = [a[seed] - b[seed] for seed in a if seed in b]
  low, high = interval(paired) or (None, None)
  t_low, t_high = student(paired) or (None, None)
  mean = float(np.mean(paired)) if paired else None
  return dict(n=len(paired), difference=mean, low=low, high=high, t_low=t_low, t_high=t_high)


def verdict(found):
  """'holds' or 'does not hold' where Student's interval of a `difference` leaves out 0, else
  'undecided'.

  Not the bootstrap's: that of three seeds is their range, so it would decide whenever three signs
  agree.
  """
  if found['t_low'] is None or found['t_low'] <= 0 <= found['t_high']:
    return 'undecided'
  return 'holds' if found['t_low'] > 0 else 'does not hold'


def summarise(c, lines):
  """What the numbers say.

  Args:
    c: the config's section `study`.
    lines: [dict] of COLUMNS, long form.

  Returns:
    {'rows': [dict] for each measure, arm and x, with `minus_reference` of `difference`;
    'orderings': [dict]}, all of it JSON.
  """
  measures = {}
  for line in lines:
    by_place = measures.setdefault(line['measure'], {})
    by_place.setdefault((line['arm'], line['x']), {})[line['seed']] = line['value']
  rows, orderings = [], []
  for measure, values in measures.items():
    try:
      references = reference_of(c.reference, values)
    except UserError:  # the reference has no such measure
      references = {}
    for (arm, x), numbers in values.items():
      low, high = interval(list(numbers.values())) or (None, None)
      reference = references.get(
        x, next(iter(references.values())) if len(references) == 1 else None
      )
      compared = reference is not None and reference is not numbers
      rows.append(
        dict(
          measure=measure,
          arm=arm,
          x=x,
          n=len(numbers),
          mean=float(np.mean(list(numbers.values()))),
          low=low,
          high=high,
          minus_reference=difference(numbers, reference) if compared else None,
        )
      )
  first = c.measures[0][0]
  for claim in c.orderings:
    for x, a, b in contests(claim, measures[first]):
      found = difference(a, b)
      orderings.append(dict(ordering=claim, x=x, measure=first, **found, verdict=verdict(found)))
  return dict(rows=rows, orderings=orderings)


def table(results):
  """The results of `study.run` as text: a block for each measure, the orderings, and the protocol
  in one line."""
  number = lambda value: '-' if value is None else f'{value:.4g}'
  ends = lambda low, high: '-' if low is None else f'[{number(low)}, {number(high)}]'
  span = lambda found: ends(found['low'], found['high'])
  reference, lines = results['protocol']['reference'], []
  for measure in dict.fromkeys(row['measure'] for row in results['rows']):
    cells = [[measure, 'x', 'n', 'mean', 'bootstrap', f'minus {reference}', 'bootstrap']]
    for row in results['rows']:
      if row['measure'] == measure:
        minus = row['minus_reference'] or dict(difference=None, low=None, high=None)
        cells.append(
          [
            row['arm'],
            str(row['x']),
            str(row['n']),
            number(row['mean']),
            span(row),
            number(minus['difference']),
            span(minus),
          ]
        )
    lines += [*aligned(cells), '']
  lines += [
    f'{found["ordering"]}{at(found["x"])}: {number(found["difference"])}, t '
    f'{ends(found["t_low"], found["t_high"])}, '
    f'{found["verdict"]} ({found["measure"]}, {found["n"]} seeds)'
    for found in results['orderings']
  ]
  return '\n'.join([*lines, protocol_line(results['protocol'])])


def write_lines(path, lines):
  """Long form: one line for each arm, x, seed and measure."""
  text = io.StringIO()
  writer = csv.DictWriter(text, COLUMNS, lineterminator='\n')
  writer.writeheader()
  writer.writerows(lines)
  with replacing(path) as file:
    file.write(text.getvalue().encode())


def draw(results, path):
  """Writes a PNG with a panel for each measure; without matplotlib only a line in the log.

  Args:
    results: of study.run; read are study, axis, grid and rows.
    path: of the PNG.

  Returns:
    Whether it was drawn.
  """
  try:
    from matplotlib.figure import Figure
  except ImportError:
    logging.warning(
      "%s is not drawn, because matplotlib is not installed: pip install 'palm_jax[figures]' or "
      'matplotlib, and '
      'give the same command again; results/study.csv has the numbers',
      path,
    )
    return False
  measures = list(dict.fromkeys(row['measure'] for row in results['rows']))
  columns = min(3, len(measures))
  lines = -(-len(measures) // columns)
  figure = Figure(figsize=(5.2 * columns, 4 * lines), dpi=150, layout='constrained')
  panels = np.ravel(figure.subplots(lines, columns, squeeze=False))
  for panel in panels[len(measures) :]:
    panel.set_axis_off()
  looks = {
    arm: (
      COLOURS[i % len(COLOURS)],
      MARKERS[(i + i // len(COLOURS)) % len(MARKERS)],
    )  # the same in all panels
    for i, arm in enumerate(dict.fromkeys(row['arm'] for row in results['rows']))
  }
  lined = {}  # an arm's mark in the legend
  for panel, measure in zip(panels, measures, strict=False):
    rows = [row for row in results['rows'] if row['measure'] == measure]
    on_axis = any(row['x'] != '' for row in rows)
    if on_axis and not results['grid']:
      lined.update(_lines(panel, rows, looks))
    else:
      (_map if on_axis else _points)(panel, rows)
    panel.set_title(measure)
    panel.set_xlabel(results['axis'] if on_axis else '')
  if lined:
    figure.legend(
      lined.values(),
      lined,
      loc='outside lower center',
      ncols=min(len(lined), 3 * columns),
      fontsize=8,
    )
  seeds = sorted({row['n'] for row in results['rows']})
  figure.suptitle(
    f'{results["study"]}: mean of {" to ".join(map(str, seeds[:1] + seeds[1:][-1:]))} seed(s)'
    f'{"" if results["grid"] or seeds[-1] < 2 else ", bootstrap interval"}',
    fontsize=9,
  )
  with replacing(path) as file:
    figure.savefig(file, format='png', bbox_inches='tight')
  return True


def _whiskers(rows):
  """(2, n) lengths below and above the means; 0 where there is no interval."""
  ends = [
    (row['mean'] - row['low'], row['high'] - row['mean']) if row['low'] is not None else (0, 0)
    for row in rows
  ]
  return np.maximum(
    np.transpose(ends), 0
  )  # the mean of few and uneven values may lie outside by rounding


def _points(panel, rows):
  places = np.arange(len(rows))[::-1]
  panel.errorbar(
    [row['mean'] for row in rows],
    places,
    xerr=_whiskers(rows),
    fmt='o',
    capsize=3,
    color=COLOURS[0],
  )
  panel.set_yticks(places, [row['arm'] for row in rows])
  panel.grid(axis='x', alpha=0.3)


def _lines(panel, rows, looks):
  """{arm: its line}; looks: {arm: (colour, marker)}."""
  numbers = [row['x'] for row in rows if isinstance(row['x'], (int, float))]
  if numbers and min(numbers) > 0 and max(numbers) >= 8 * min(numbers):
    panel.set_xscale('log')
  lined = {}
  for arm in dict.fromkeys(row['arm'] for row in rows):
    of_arm = [row for row in rows if row['arm'] == arm]
    colour, marker = looks[arm]
    if of_arm[0]['x'] == '':  # an arm without an axis, such as a reference
      lined[arm] = panel.axhline(of_arm[0]['mean'], color=colour, linestyle='--')
    else:
      lined[arm] = panel.errorbar(
        [row['x'] for row in of_arm],
        [row['mean'] for row in of_arm],
        yerr=_whiskers(of_arm),
        capsize=3,
        color=colour,
        marker=marker,
      )
  panel.grid(alpha=0.3)
  return lined


def _map(panel, rows):
  arms, places = (
    list(dict.fromkeys(row[key] for row in rows if row['x'] != '')) for key in ('arm', 'x')
  )
  means = np.full((len(arms), len(places)), np.nan)
  for row in rows:
    if row['x'] != '':
      means[arms.index(row['arm']), places.index(row['x'])] = row['mean']
  panel.imshow(means, cmap='cividis')
  middle = (np.nanmin(means) + np.nanmax(means)) / 2
  for (i, j), mean in np.ndenumerate(means):
    if np.isfinite(mean):
      panel.text(
        j, i, f'{mean:.3g}', ha='center', va='center', color='white' if mean < middle else 'black'
      )
  panel.set_yticks(range(len(arms)), arms)
  panel.set_xticks(range(len(places)), [str(place) for place in places])
