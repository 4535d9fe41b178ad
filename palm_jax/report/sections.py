"""The sections of the page, in one table.

A new evaluation needs no line in it: results without a section are shown as plain values.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from palm_jax.report import (
  concepts,
  curves,
  diversity,
  feature_map,
  ood,
  page,
  pictures,
  probe,
  quality,
  settings,
  study,
)
from palm_jax.report.page import Headline
from palm_jax.report.read import Report, RunFiles
from palm_jax.report.values import values_table

TRAINING = {'generator': 'Generator', 'pretrain': 'Pretraining', 'benchmark': 'Speed'}


class Section(NamedTuple):
  """A section of the page.

  Attributes:
    name: its id; with `rows`, also that of results/<name>.json.
    title: its heading.
    build: (Report) -> HTML; '' leaves the section out.
    rows: {key: type} that each row of the results file must have; a run whose file has another
      shape is left to the plain values. None: the section is not that of a results file.
    card: (RunFiles) -> its headline, or None.
  """

  name: str
  title: str
  build: Callable[[Report], str]
  rows: Mapping[str, Any] | None = None
  card: Callable[[RunFiles], Headline | None] | None = None


def build(report: Report) -> list[tuple[str, str, str]]:
  """[(id, title, HTML)] of the sections that have something to show."""
  found = []
  for section in SECTIONS:
    runs = report.runs
    if section.rows is not None:
      runs = [run for run in runs if is_shown_by(section, run)]
    html = section.build(dataclasses.replace(report, runs=runs)) if runs else ''
    if html:
      found.append((section.name, section.title, html))
  return found


def is_shown_by(section: Section, run: RunFiles) -> bool:
  """Whether the run's results file has the rows that the section shows."""
  result = run.results.get(section.name, {})
  rows = result.get('rows')
  return (
    section.rows is not None
    and isinstance(result.get('protocol'), dict)
    and isinstance(rows, list)
    and bool(rows)
    and all(_is_row(row, section.rows) for row in rows)
  )


def _is_row(row, kinds):
  return isinstance(row, dict) and all(isinstance(row.get(key), kinds[key]) for key in kinds)


def cards(run: RunFiles) -> list[Headline]:
  """The headlines of what was measured."""
  found = [section.card(run) for section in SECTIONS if section.card and is_shown_by(section, run)]
  return [card for card in found if card]


def _headline(report):
  grouped = {}
  for run in report.runs:
    whose = run.name if len(report.runs) > 1 else ''
    for title, *parts in cards(run):
      grouped.setdefault(title, []).append((whose, *parts))
  if not grouped:
    return ''
  content = ''.join(page.card(title, parts) for title, parts in grouped.items())
  return f'<div class="cards">{content}</div>'


def _training(job, report):
  """Curves and pictures of a training job."""
  return curves.section(job, report) + pictures.section(job, report)


def _training_values(report):
  return ''.join(values_table(name, title, report.runs) for name, title in TRAINING.items())


def _other_values(report):
  """All values of the results that no other section shows."""
  others = {}  # name -> runs
  for run in report.runs:
    shown = {section.name for section in SECTIONS if is_shown_by(section, run)}
    for name in run.results.keys() - shown - TRAINING.keys():
      others.setdefault(name, []).append(run)
  return ''.join(values_table(name, name, others[name]) for name in sorted(others))


SECTIONS = (
  Section('headline', 'At a glance', _headline),
  Section('config', 'Settings', settings.section),
  Section('probe', 'Labels in the features', probe.section, probe.ROWS, probe.card),
  Section('ood', 'Out-of-distribution detection', ood.section, ood.ROWS, ood.card),
  Section('diversity', 'Coverage of the data', diversity.section, diversity.ROWS, diversity.card),
  Section('quality', 'Quality of the generator', quality.section, quality.ROWS),
  Section('study', 'Arms of the study', study.section, study.ROWS),
  Section('concepts', 'Concepts', concepts.section, concepts.ROWS),
  Section('map', 'Map of the features', feature_map.section),
  Section('pretrain-curves', 'Pretraining', functools.partial(_training, 'pretrain')),
  Section(
    'generator-curves', 'Training of the generator', functools.partial(_training, 'generator')
  ),
  Section('training', 'Numbers of the training', _training_values),
  Section('other', 'Other results', _other_values),
)
