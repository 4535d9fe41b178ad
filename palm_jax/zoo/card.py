"""The card of an encoder: how it was made, what was measured, its licence; as JSON and as text."""

import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from palm_jax.base.errors import UserError, one_line
from palm_jax.base.results import MADE_FROM, read_result

OUR_NAME = 'PALM encoder'  # in results
ROW_PARTS = 'features F method labels num_classes fraction draw n_train n_test'.split()
# Folders before a file's name, which say more about a machine than about a number.
ABSOLUTE = re.compile(r'(?:~[\w.-]*|[A-Za-z]:)?[/\\]')
FOLDERS = re.compile(r'(?<![\w./\\])(?:~|[A-Za-z]:)?[/\\](?:[^\s/\\,;=:\'"()]+[/\\])+')


def without_folders(tree: Any) -> Any:
  """The same JSON with the last part alone of each absolute path in its texts."""
  if isinstance(tree, Mapping):
    return {name: without_folders(branch) for name, branch in tree.items()}
  if isinstance(tree, list | tuple):
    return [without_folders(branch) for branch in tree]
  return ','.join(map(_without_folders, tree.split(','))) if isinstance(tree, str) else tree


def _without_folders(text):
  """Where the text is a path as a whole, there may be blanks in it."""
  name = pathlib.PureWindowsPath(text).name if ABSOLUTE.match(text) else ''
  return name or FOLDERS.sub('', text)


def read_pretraining(workdir: pathlib.Path, step: int) -> dict[str, Any]:
  """How far a pretraining was at a checkpoint, from results/pretrain.json.

  Returns:
    {'complete': False} where the pretraining goes on beyond the step, or is not at its end yet;
    else also env_steps, seconds, devices and versions.
  """
  result = _read(workdir / 'results' / 'pretrain.json')
  if result is None or result.get('checkpoint_step') != step:
    return dict(complete=False)
  names = 'env_steps', 'seconds', 'devices', 'versions'
  return dict(complete=True, **{name: result[name] for name in names if name in result})


def read_probe(workdir: pathlib.Path, sha256: str) -> dict[str, Any] | None:
  """Rows and protocol of results/probe.json; None without one.

  Args:
    workdir: of the run.
    sha256: digest of the encoder that it has to be of.

  Raises:
    UserError: a damaged file, or one about another encoder.
  """
  path = workdir / 'results' / 'probe.json'
  result = _read(path)
  if result is None:
    return None
  protocol = result.get('protocol', {})
  _check_encoder(path, protocol.get('encoder_sha256'), sha256)
  rows = [
    dict(
      {name: row[name] for name in ROW_PARTS if name in row},
      accuracy=row['accuracy'],
      half_width=row.get('half_width'),
    )
    for row in result.get('rows', [])
  ]
  return dict(rows=rows, protocol=protocol)


def read_ood(workdir: pathlib.Path, sha256: str, step: int) -> dict[str, Any] | None:
  """Rows (means and standard deviations), accuracy and protocol of results/ood.json, as
  `read_probe`; `step` is that of the checkpoint."""
  path = workdir / 'results' / 'ood.json'
  result = _read(path)
  if result is None:
    return None
  protocol = result.get('protocol', {})
  frozen = protocol.get('encoders', {}).get(OUR_NAME)
  if frozen:
    _check_encoder(path, frozen[0].get('sha256'), sha256)
  else:  # with ood.protocol=finetune only the checkpoint is known
    judged = result.get(MADE_FROM, {}).get('pretrain', {}).get('step')
    if judged != step:
      raise UserError(
        f'{path} is of the checkpoint at step {judged}, this is step {step}: run that job again, '
        'or give the --step that it judged'
      )
  means = lambda row: {name: _mean(part) for name, part in row.items()}
  return dict(
    rows=[means(row) for row in result.get('rows', [])],
    accuracy=means(result.get('accuracy', {})),
    protocol=protocol,
  )


def _mean(part):
  """A number of several trials without the trials."""
  return {k: x for k, x in part.items() if k != 'values'} if isinstance(part, dict) else part


def _read(path):
  if not path.exists():
    return None
  try:
    return read_result(path)
  except (OSError, ValueError) as e:
    raise UserError(f'{path} is damaged ({one_line(e)}): remove it and run its job again') from e


def _check_encoder(path, judged, sha256):
  if judged != sha256:
    raise UserError(
      f'{path} is about another encoder ({str(judged)[:12]}...) than this checkpoint of the run '
      f'({sha256[:12]}...): delete it and run that job again, or give the --step that it judged'
    )


def as_json(card: Mapping[str, Any]) -> bytes:
  """The card as it stands beside the weights, without the folders of this machine."""
  plain = json.loads(json.dumps(without_folders(card), default=lambda x: x.tolist()))
  return (json.dumps(plain, indent=2) + '\n').encode()


def as_text(card: Mapping[str, Any], use: str) -> str:
  """The card as the README.md of a model on the hub.

  Args:
    card: of `bundle.make_card`.
    use: lines of Python that load it.
  """
  made, encoder = card['made'], card['encoder']
  header = ['library_name: palm_jax', 'pipeline_tag: image-feature-extraction']
  if card['licence']:
    header.append(f'license: {card["licence"].lower()}')
  header += ['tags:', '- palm', '- self-supervised', '- jax']
  height, width, channels = card['image_shape']
  size = f'width {encoder["width"]}' if encoder['name'] != 'nature' else ''
  facts = {
    'encoder': f'{encoder["name"]} {size}'.strip(),
    'features': card['features'],
    'pictures': f'{height}x{width}x{channels}, uint8; it takes {card["sides"]}',
    'parameters': f'{card["parameters"]:,}',
    'licence': card['licence'] or 'not stated',
    'SHA-256 of the file': card['file_sha256'],
    'SHA-256 of the trained encoder, as in results': card['encoder_sha256'],
    'stored as': f'{card["stored"]}; features differ by {card["difference"]["largest"]:.1e} at '
    f'most ({card["difference"]["what"]}, {card["difference"]["n"]} pictures)',
  }
  unfinished = '' if made['complete'] else ', the pretraining was not complete'
  how = {
    'config': made['config_name'],
    'command': f'`{made["command"]}`' if made['command'] else None,
    'generator': f'{made["generator"]["name"]}, SHA-256 {made["generator"]["sha256"]}',
    'env steps': f'{made["env_steps"]:,}{unfinished}',
    'checkpoint step': made['checkpoint_step'],
    'seed': made['seed'],
    'devices': made.get('devices'),
    'palm_jax': card['palm_jax_version'],
  }
  parts = [
    '---\n' + '\n'.join(header) + '\n---',
    f'# {card["name"]}',
    'An encoder that learned by playing in the latent space of a picture generator: PALM (Liu, '
    'Zahavy, Mnih and Singh, arXiv 2210.10913), by palm_jax.',
    f'```python\n{use.strip()}\n```',
    _table([('what', 'value')], facts.items()),
    '## How it was made',
    _table([('what', 'value')], how.items()),
    'All settings are in the card as JSON beside the weights, under `config`.',
    '## What was measured',
    *_measured(card['results']),
  ]
  return '\n\n'.join(parts) + '\n'


def _measured(results):
  found = []
  if results.get('probe'):
    head = 'features', 'F', 'method', 'labels', 'accuracy, %', 'n train', 'n test'
    rows = [_probe_cells(row) for row in results['probe']['rows']]
    found += ['### Probe', _table([head], rows), _protocol(results['probe'])]
  if results.get('ood'):
    head = 'encoder', 'score', 'set', 'AUROC, %', 'FPR at 95% TPR, %', 'n ID', 'n OOD', 'trials'
    rows = [_ood_cells(row) for row in results['ood']['rows']]
    found += ['### Out-of-distribution detection', _table([head], rows), _protocol(results['ood'])]
  return found or ['Nothing yet.']


def _probe_cells(row):
  share = row.get('fraction', 1.0)
  labels = f'{row.get("labels", "")} {share:.0%}'.strip()
  half = f' +- {100 * row["half_width"]:.2f}' if row.get('half_width') else ''
  accuracy = f'{100 * row["accuracy"]["clean"]:.2f}{half}'
  cells = row['features'], row['F'], row['method'], labels, accuracy
  return *cells, row.get('n_train'), row.get('n_test')


def _ood_cells(row):
  numbers = [_percent(row.get(name)) for name in ('auroc', 'fpr_at_95_tpr')]
  sizes = [row.get(name) for name in ('n_id', 'n', 'trials')]
  return row['encoder'], row['score'], row['set'], *numbers, *sizes


def _percent(part):
  if not part:
    return '-'
  sd = f' +- {100 * part["sd"]:.1f}' if part.get('sd') is not None else ''
  return f'{100 * part["mean"]:.1f}{sd}'


def _protocol(result):
  return f'Protocol: `{json.dumps(result["protocol"], sort_keys=True)}`'


def _table(heads: Sequence[Sequence[Any]], rows: Any) -> str:
  """Lines of a table in Markdown; rows whose value is None are left out."""
  lines = [heads[0], ['---'] * len(heads[0]), *(row for row in rows if row[1] is not None)]
  return '\n'.join('| ' + ' | '.join(map(_cell, line)) + ' |' for line in lines)


def _cell(x):
  return str('-' if x is None else x).replace('|', '\\|').replace('\n', ' ')
