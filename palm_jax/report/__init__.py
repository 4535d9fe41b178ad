"""The job `report`: what a workdir holds, or several beside each other, as one HTML page that opens
anywhere.

Every number of its tables stands in a file of the workdir, and says on hovering in which and where;
only the map is computed here. A job without a result has no section.
"""

import base64
import io
import json
import pathlib
from typing import NamedTuple

import jax
from absl import logging
from ml_collections import ConfigDict
from PIL import Image

from palm_jax.base import metrics
from palm_jax.base.errors import UserError
from palm_jax.base.files import replacing
from palm_jax.job import Job
from palm_jax.job import Run as JobRun
from palm_jax.report import map as report_map
from palm_jax.report import page as report_page
from palm_jax.report import sections as show
from palm_jax.report import study as report_study

PICTURE_BYTES = 6_000_000  # of all films, strips and grids together; a third more as text

# Charts in this order; all other scalars follow behind a fold. {job: (x, its unit, {metric:
# title})}
CURVES = {
  'pretrain': (
    'env_steps',
    'env steps',
    {
      'loss': 'SimSiam loss',
      'h_effective_rank': 'Effective rank of h',
      'z_effective_rank': 'Effective rank of z',
      'z_std_ratio': 'Spread of z (1: sphere)',
      'h_cosine': 'Cosine of consecutive h',
      'knn_accuracy': 'Accuracy of kNN',
      'reward': 'Reward',
      'entropy_per_dim': 'Policy entropy a dimension',
      'alpha_logp': 'alpha log pi',
      'alpha': 'Temperature alpha',
      'q': 'Q of the critics',
      'critic_loss': 'Critic loss',
    },
  ),
  'generator': (
    'images',
    'images',
    {
      'loss_g': 'Generator loss',
      'loss_d': 'Discriminator loss',
      'logits_real': 'Logits, real pictures',
      'logits_fake': 'Logits, generated pictures',
      'sign_real': 'Mean sign of D, real',
      'r1': 'R1 penalty',
      'augment_p': 'Augmentation p',
    },
  ),
}

TRAINING = {'generator': 'Generator', 'pretrain': 'Pretraining', 'benchmark': 'Speed'}


def default_config():
  return ConfigDict(
    dict(
      compare=(),  # other workdirs, to be put beside this one
      num_points=2000,  # of the map: test images
      # a second map by UMAP: 'auto' where the package umap-learn is installed, 'always', 'never'
      umap='auto',
    )
  )


def check(config, num_devices):
  """Raises UserError on settings of the whole config's section `report` that cannot work."""
  c = config.report
  if c.umap not in ('auto', 'always', 'never'):
    raise UserError(f"report.umap={c.umap!r} is unknown: choose 'auto', 'always' or 'never'")
  if c.umap == 'always' and not report_map.find_umap():
    raise UserError(
      "report.umap='always', but umap is not installed: pip install umap-learn, or set it to 'auto'"
    )
  if c.num_points < 3:
    raise UserError(f'report.num_points={c.num_points} is too small: set it to 3 or more')
  for folder in c.compare:
    if not (pathlib.Path(folder) / 'config.json').is_file():
      raise UserError(
        f'report.compare={tuple(c.compare)}: {folder} holds no config.json: name workdirs of this '
        'project'
      )


class Run(NamedTuple):
  """What a workdir holds, as read."""

  name: str
  folder: pathlib.Path
  config: dict
  metrics: dict[str, list]  # job -> lines
  results: dict[str, dict]  # name of the file -> content
  notes: list[str]  # what could not be read


def read_runs(folders):
  """[Run] of workdirs, named by as much of the ends of their paths as tells them apart.

  Raises:
    UserError: a config.json that is absent or damaged, or a workdir given twice.
  """
  folders = [pathlib.Path(folder).absolute() for folder in folders]
  if len(set(folders)) < len(folders):
    raise UserError(f'report.compare names a workdir twice: {", ".join(map(str, folders))}')
  length = next(
    n for n in range(1, 100) if len({folder.parts[-n:] for folder in folders}) == len(folders)
  )
  return [read_run('/'.join(folder.parts[-length:]), folder) for folder in folders]


def read_run(name, folder):
  run = Run(name, folder, {}, {}, {}, [])

  def read(path, parse):
    try:
      return parse(path)
    except (OSError, ValueError) as e:
      run.notes.append(
        f'{name}: {path.relative_to(folder)} cannot be read and is left out '
        f'({" ".join(str(e).split())})'
      )
      logging.warning('report: %s', run.notes[-1])

  def parse_json(path):
    content = json.loads(path.read_text())
    if not isinstance(content, dict):
      raise ValueError(f'expected a JSON object, found {type(content).__name__}')
    return content

  try:
    run.config.update(parse_json(folder / 'config.json'))
  except (OSError, ValueError) as e:
    raise UserError(
      f'{folder / "config.json"} cannot be read ({e}): name the workdir of a run'
    ) from e
  for path in sorted((folder / 'results').glob('*.json')):
    content = read(path, parse_json)
    if content is not None:
      run.results[path.stem] = content
  for job, (x, _, _) in CURVES.items():
    if (folder / job / 'metrics.jsonl').exists():
      rows = read(folder / job / 'metrics.jsonl', metrics.read_jsonl) or []
      run.metrics[job] = [
        row for row in rows if isinstance(row, dict) and show.is_finite(row.get(x))
      ]
  return run


def run(this: JobRun) -> dict:
  """The job: writes `<workdir>/report.html`, of this workdir and those of config.report.compare.

  Args:
    config: the whole config; read are seed, features and report.
    workdir: pathlib.Path.
    data: palm_jax.data.arrays.Data, whose test images are mapped by each run's encoder; None leaves the
      map out.
    mesh: one-dimensional mesh, axis 'data'.

  Returns:
    {'job', 'path', 'bytes', 'sections': their ids, 'notes': what is left out and why}.

  Raises:
    UserError: settings that cannot be, or a workdir without a readable config.json.
  """
  config, workdir, data, mesh = this.config, this.workdir, this.data, this.mesh
  runs = read_runs([workdir, *config.report.compare])
  notes = [note for run in runs for note in run.notes]
  sections = [('config', 'Settings', show.config_section(runs))]
  if any(map(show.cards, runs)):
    sections.insert(0, ('headline', 'At a glance', show.headline(runs)))
  build = {
    'probe': show.probe_section,
    'ood': show.ood_section,
    'diversity': show.diversity_section,
    'quality': show.quality_section,
    'study': report_study.study_section,
  }
  titles = {
    'probe': 'Labels in the features',
    'ood': 'Out-of-distribution detection',
    'diversity': 'Coverage of the data',
    'quality': 'Quality of the generator',
    'study': 'Arms of the study',
  }
  for job, make in build.items():
    judged = [run for run in runs if show.well_formed(job, run.results.get(job, {}))]
    if judged:
      sections.append(
        (
          job,
          titles[job],
          make(judged) + (pictures_section(job, judged, notes) if job == 'study' else ''),
        )
      )
  if data is not None:
    mapped = report_map.map_section(config, runs, data, workdir, mesh, notes)
    if mapped:
      sections.append(('map', 'Map of the features', mapped))
  for job, title in (('pretrain', 'Pretraining'), ('generator', 'Training of the generator')):
    content = curves_section(job, runs) + pictures_section(job, runs, notes)
    if content:
      sections.append((f'{job}-curves', title, content))
  content = ''.join(show.values_tables(name, title, runs) for name, title in TRAINING.items())
  if content:
    sections.append(('training', 'Numbers of the training', content))
  others = sorted(
    {
      name
      for run in runs
      for name in run.results
      if name not in TRAINING and not show.well_formed(name, run.results[name])
    }
  )
  if others:
    unlike = lambda name: [
      run for run in runs if name in run.results and not show.well_formed(name, run.results[name])
    ]
    sections.append(
      (
        'other',
        'Other results',
        ''.join(show.values_tables(name, name, unlike(name)) for name in others),
      )
    )

  title = (
    f'{runs[0].config.get("name", runs[0].name)}: report'
    if len(runs) == 1
    else f'{len(runs)} runs compared'
  )
  head = ''.join(f'<p class="note">{report_page.esc(note)}</p>' for note in notes)
  foot = (
    '<p>Every number in a table stands in the file named beneath it; hover over a number for its '
    'place. Only the map is '
    'computed for this page. Method: <a href="https://arxiv.org/abs/2210.10913">Liu, Zahavy, Mnih '
    'and Singh, '
    'arXiv 2210.10913</a>.</p>'
  )
  text = report_page.document(title, show.facts_of(runs) + head, sections, foot).encode(
    errors='replace'
  )
  path = pathlib.Path(workdir) / 'report.html'
  if jax.process_index() == 0:
    with replacing(path) as file:
      file.write(text)
    logging.info('report: %s, %.1f MB', path, len(text) / 1e6)
  return dict(
    job='report',
    path=str(path),
    bytes=len(text),
    sections=[name for name, _, _ in sections],
    notes=notes,
  )


def curves_section(job, runs):
  """Small multiples of the scalars of a training, the runs over each other."""
  x, unit, titles = CURVES[job]
  with_lines = [(i, run) for i, run in enumerate(runs) if run.metrics.get(job)]
  names = list(
    dict.fromkeys(name for _, run in with_lines for row in run.metrics[job] for name in row)
  )
  names = [name for name in names if name not in (x, 'step')]

  def chart(name):
    series = []
    for i, run in with_lines:
      rows = [row for row in run.metrics[job] if name in row]
      ys = [row[name] if show.is_finite(row[name]) else None for row in rows]
      series.append((i, run.name, [row[x] for row in rows], ys))
    return report_page.chart(titles.get(name, name), series, unit)

  def charts(names):
    content = ''.join(map(chart, names))
    return f'<div class="charts">{content}</div>' if content else ''

  main, others = (
    charts([name for name in titles if name in names]),
    [name for name in names if name not in titles],
  )
  if not main:
    return ''
  key = report_page.legend([(i, run.name) for i, run in with_lines]) if len(runs) > 1 else ''
  out = f'<p class="soft">From {job}/metrics.jsonl, against {unit}.</p>{key}{main}'
  return out + (report_page.fold(f'{len(others)} other scalars', charts(others)) if others else '')


def pictures_section(job, runs, notes):
  """The newest films, strips and grids, or a study's figure, within the page's bound of bytes."""
  found = []
  for run in runs:
    if job == 'pretrain':
      for ending, what in (
        ('webp', 'The agent at play'),
        ('png', 'Its episodes, every fourth frame'),
      ):
        newest = sorted((run.folder / job / 'rollouts').glob(f'*.{ending}'))[-1:]
        found += [
          (
            run,
            path,
            f'{what}, after {int(path.stem):,} env steps' if path.stem.isdigit() else what,
          )
          for path in newest
        ]
    elif job == 'study':
      found += [(run, path, 'The measures of the study') for path in run.folder.glob('figure.png')]
    else:
      newest = sorted((run.folder / job / 'samples').glob('*.png'))[-1:]
      found += [
        (run, path, 'Training pictures') for path in (run.folder / job).glob('real.png') if newest
      ]
      found += [
        (
          run,
          path,
          'Generated pictures'
          + (f', after {int(path.stem)},000 images' if path.stem.isdigit() else ''),
        )
        for path in newest
      ]
  shown = []
  for run, path, what in found:
    where = f'{path.relative_to(run.folder)}' + (f' of {run.name}' if len(runs) > 1 else '')
    uri = embed(path, PICTURE_BYTES // (3 * len(runs)))
    if uri:
      film = path.suffix == '.webp'
      classes = 'wide sharp' if film else 'wide'  # a strip's pixels are smaller than the page's
      shown.append(
        report_page.picture(
          uri, f'{what} ({run.name})', report_page.esc(f'{what}: {where}'), classes, film
        )
      )
    else:
      notes.append(
        f'{run.name}: {path.relative_to(run.folder)} is no picture that can be shown within the '
        'page, and is left out'
      )
      logging.warning('report: %s', notes[-1])
  return f'<div class="pictures">{"".join(shown)}</div>' if shown else ''


def embed(path, most):
  """A picture file as a data: address of at most `most` bytes before encoding, made smaller where
  it must; None if it cannot."""
  content = path.read_bytes()
  kind = {'.png': 'png', '.webp': 'webp'}[path.suffix]
  try:
    with Image.open(io.BytesIO(content)) as image:
      image.load()
      for factor in (0.75, 0.5, 0.35, 0.25, 0.15):
        if len(content) <= most:
          break
        kind, frames = 'webp', []
        for i in range(getattr(image, 'n_frames', 1)):
          image.seek(i)
          frame = image.convert('RGB')
          frames.append(
            frame.resize(
              (max(1, round(frame.width * factor)), max(1, round(frame.height * factor))), Image.BOX
            )
          )
        file = io.BytesIO()
        film = dict(
          save_all=True, append_images=frames[1:], duration=image.info.get('duration', 125), loop=0
        )
        frames[0].save(file, 'WEBP', quality=80, method=2, **(film if len(frames) > 1 else {}))
        content = file.getvalue()
  except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
    return None
  return (
    f'data:image/{kind};base64,{base64.b64encode(content).decode()}'
    if len(content) <= most
    else None
  )


JOB = Job('report', run, check, lambda config: bool(config.data.name), claims=False)
