"""The job `report`: what one or several workdirs hold, as one HTML page that opens anywhere.

Every number of its tables stands in a file of the workdir, and says on hovering in which and where;
only the map is computed here. A job without a result has no section.
"""

import pathlib

from absl import logging
from ml_collections import ConfigDict

from palm_jax.base import checks
from palm_jax.base.errors import UserError
from palm_jax.base.files import replacing, user_path
from palm_jax.base.processes import is_first
from palm_jax.job import Job, Run
from palm_jax.report import feature_map, page, read, sections, settings

FOOT = (
  '<p>Every number in a table stands in the file named beneath it; hover over a number for its '
  'place. Only the map is computed for this page. Method: '
  '<a href="https://arxiv.org/abs/2210.10913">Liu, Zahavy, Mnih and Singh, arXiv 2210.10913</a>.'
  '</p>'
)


def default_config() -> ConfigDict:
  """The config's section `report`."""
  return ConfigDict(
    dict(
      compare=(),  # other workdirs, shown beside this one
      num_points=2000,  # of the map: test images
      # A second map by UMAP: 'auto' (where the package umap-learn is installed), 'always', 'never'.
      umap='auto',
    )
  )


RANGES = dict(num_points=checks.Range(3, 10**7))


def check(config: ConfigDict, num_devices: int) -> None:
  """Raises UserError on invalid settings of the whole config's section `report`."""
  del num_devices
  c = config.report
  if c.umap not in ('auto', 'always', 'never'):
    raise UserError(f"report.umap={c.umap!r} is unknown: choose 'auto', 'always' or 'never'")
  if c.umap == 'always' and not feature_map.find_umap():
    raise UserError(
      "report.umap='always', but umap is not installed: pip install umap-learn, or set it to 'auto'"
    )
  checks.ranges('report', c, RANGES)
  for folder in c.compare:
    if not (user_path(folder) / 'config.json').is_file():
      raise UserError(
        f'report.compare={tuple(c.compare)}: {folder} holds no config.json: name workdirs of this '
        'project'
      )


def run(this: Run) -> dict:
  """The job: writes `<workdir>/report.html`, of this workdir and those of config.report.compare.

  Args:
    this: read are seed, features and report of its config; its data are mapped by each run's
      encoder.

  Returns:
    {'job', 'path', 'bytes', 'sections': their ids, 'notes': what is left out and why}.

  Raises:
    UserError: a workdir without a readable config.json.
  """
  runs = read.read_runs([this.workdir, *map(user_path, this.config.report.compare)])
  notes = [note for run in runs for note in run.notes]
  report = read.Report(runs, this.config, this.workdir, this.mesh, this.data, notes)
  shown = sections.build(report)
  title = f'{len(runs)} runs compared'
  if len(runs) == 1:
    title = f'{runs[0].config.get("name", runs[0].name)}: report'
  notes_html = ''.join(f'<p class="note">{page.esc(note)}</p>' for note in notes)
  text = page.document(title, settings.facts(report) + notes_html, shown, FOOT)
  content = text.encode(errors='replace')
  path = pathlib.Path(this.workdir) / 'report.html'
  if is_first():
    with replacing(path) as file:
      file.write(content)
    logging.info('report: %s, %.1f MB', path, len(content) / 1e6)
  return dict(
    job='report',
    path=str(path),
    bytes=len(content),
    sections=[name for name, _, _ in shown],
    notes=notes,
  )


JOB = Job('report', run, check, lambda config: bool(config.data.name), claims=False)
