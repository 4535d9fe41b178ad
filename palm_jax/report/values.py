"""Values of results files as cells of tables, nothing computed anew."""

from collections.abc import Sequence
from typing import Any

from palm_jax.report import page
from palm_jax.report.page import Cell, Row
from palm_jax.report.read import RunFiles, is_number

ABOUT = ('job', 'protocol', 'settings', 'versions')  # what is no result of a file


def leaves(tree: Any, keys: tuple = ()) -> list[tuple[tuple, Any]]:
  """[(keys, value)] of a tree of dicts and lists; a list without either is a value, as is {}."""
  if isinstance(tree, list) and any(isinstance(x, (dict, list)) for x in tree):
    tree = dict(enumerate(tree))
  if not isinstance(tree, dict) or not tree:
    return [(keys, tree)]
  return [leaf for key, sub in tree.items() for leaf in leaves(sub, (*keys, key))]


def pointer(keys: Sequence[Any]) -> str:
  """JSON pointer, RFC 6901."""
  return ''.join('/' + str(key).replace('~', '~0').replace('/', '~1') for key in keys)


def plain(value: Any) -> str:
  """A value of a file as text: integers whole, floats with four digits."""
  if value is None or value == '':
    return '-'
  if isinstance(value, list):
    return ', '.join(map(plain, value))
  if isinstance(value, float):
    return f'{value:,.0f}' if value.is_integer() and 1e3 <= abs(value) < 1e15 else f'{value:.4g}'
  return f'{value:,}' if is_number(value) else str(value)


def exact(value: Any) -> str:
  """A setting as text, with all digits."""
  if isinstance(value, list):
    return ', '.join(map(exact, value))
  return str(value) if isinstance(value, float) else plain(value)


def cell(
  run: RunFiles,
  name: str,
  *keys: Any,
  spread: Sequence[Any] | None = None,
  percent: bool = False,
  bar: bool = False,
) -> Cell | str:
  """A value of a results file as it is shown; '-' where there is none.

  Args:
    run: whose it is.
    name: of results/<name>.json.
    *keys: its place there.
    spread: keys of what stands behind the +-.
    percent: it is a share; shown times 100 with two decimals.
    bar: with `percent`, a bar beneath it.
  """
  value = _value_at(run.results[name], keys)
  if value is None:
    return '-'
  text = _percent(value) if percent else plain(value)
  spread_at = ''
  if spread:
    sd = _value_at(run.results[name], spread)
    if is_number(sd):
      text += f' ± {_percent(sd)}' if percent else f' ± {sd:.2g}'
      spread_at = pointer(spread)
  return Cell(
    text,
    run.name,
    f'results/{name}.json',
    pointer(keys),
    spread_at,
    str(value),
    value if bar and percent and is_number(value) else None,
  )


def _value_at(tree: Any, keys: Sequence[Any]) -> Any:
  """What the keys lead to, or None."""
  for key in keys:
    try:
      tree = tree[key]
    except (KeyError, IndexError, TypeError):
      return None
  return tree


def _percent(value):
  return f'{100 * value:.2f}' if is_number(value) else plain(value)


def if_several(runs: Sequence[RunFiles], text: str) -> list[str]:
  """[text] where there are several runs: a first column says whose a row is."""
  return [text] if len(runs) > 1 else []


def heads_of(runs: Sequence[RunFiles], alone: str) -> list[str]:
  """Headers of a column a run; `alone` is that of a single one."""
  return [run.name for run in runs] if len(runs) > 1 else [alone]


def source_of(runs: Sequence[RunFiles], name: str) -> str:
  """Where the numbers of a table stand."""
  whose = f' of {", ".join(run.name for run in runs)}' if len(runs) > 1 else ''
  return f'From results/{name}.json{whose}'


def protocols(runs: Sequence[RunFiles], name: str) -> str:
  """How each run's numbers were made, hidden until asked for: HTML."""
  out = ''
  for run in runs:
    result = run.results[name]
    about = {
      key: result[key] for key in ('devices', 'processes', 'versions', 'seconds') if key in result
    }
    known = [
      ('.'.join(map(str, keys)), plain(value))
      for keys, value in leaves({**result.get('protocol', {}), **about})
    ]
    whose = f' of {run.name}' if len(runs) > 1 else ''
    out += page.details(f'Protocol{whose}', page.facts(known), '')
  return out


def values_table(name: str, title: str, runs: Sequence[RunFiles]) -> str:
  """All values of results/<name>.json but its protocol and settings, as HTML.

  A run has a column; '' where no run has the file.
  """
  runs = [run for run in runs if name in run.results]
  if not runs:
    return ''
  trees = [
    {key: value for key, value in run.results[name].items() if key not in ABOUT} for run in runs
  ]
  keys = list(dict.fromkeys(keys for tree in trees for keys, _ in leaves(tree) if keys))
  rows = [Row(['.'.join(map(str, key)), *(cell(run, name, *key) for run in runs)]) for key in keys]
  header = ['', *heads_of(runs, 'value')]
  table = page.table(title, header, rows, source_of(runs, name), protocols(runs, name))
  return table if len(rows) <= 12 else page.details(f'{title}: {len(rows)} values', table)
