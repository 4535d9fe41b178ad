"""Sections with the newest films, strips and grids of a job, or a study's figure."""

import base64
import io
import pathlib

from absl import logging
from PIL import Image

from palm_jax.report import page
from palm_jax.report.read import Report, RunFiles

MOST_BYTES = 6_000_000  # of all films, strips and grids together; a third more as text
PARTS = 6  # pictures of a run, at most: of pretraining, its generator, a study, its concepts
FACTORS = (0.75, 0.5, 0.35, 0.25, 0.15)  # that a picture is made smaller by until it fits


def section(job: str, report: Report) -> str:
  """The pictures of a job, within the page's bound of bytes; '' without any."""
  runs = report.runs
  shown = ''
  for run in runs:
    for path, what in _find(job, run):
      name = path.relative_to(run.folder)
      uri = embed(path, MOST_BYTES // (PARTS * len(runs)))
      if uri is None:
        report.notes.append(
          f'{run.name}: {name} is no picture that can be shown within the page, and is left out'
        )
        logging.warning('report: %s', report.notes[-1])
        continue
      where = f'{name} of {run.name}' if len(runs) > 1 else f'{name}'
      film = path.suffix == '.webp'
      shown += page.picture(
        uri,
        f'{what} ({run.name})',
        page.esc(f'{what}: {where}'),
        'wide sharp' if film else 'wide',  # a strip's pixels are smaller than the page's
        film,
      )
  return f'<div class="pictures">{shown}</div>' if shown else ''


def _find(job: str, run: RunFiles) -> list[tuple[pathlib.Path, str]]:
  """[(file, what it shows)]."""
  if job == 'study':
    return [(path, 'The measures of the study') for path in run.folder.glob('figure.png')]
  if job == 'pretrain':
    rollouts = run.folder / job / 'rollouts'
    return [
      (path, f'{what}, after {int(path.stem):,} env steps' if path.stem.isdigit() else what)
      for suffix, what in (
        ('webp', 'The agent at play'),
        ('png', 'Its episodes, every fourth frame'),
      )
      for path in _newest(rollouts, suffix)
    ]
  generated = _newest(run.folder / job / 'samples', 'png')
  if not generated:
    return []
  found = [(path, 'Training pictures') for path in (run.folder / job).glob('real.png')]
  for path in generated:
    step = f', after {int(path.stem)},000 images' if path.stem.isdigit() else ''
    found.append((path, f'Generated pictures{step}'))
  return found


def _newest(folder, suffix):
  """[the file whose name is last], or []."""
  return sorted(folder.glob(f'*.{suffix}'))[-1:]


def embed(path: pathlib.Path, most: int) -> str | None:
  """A picture file as a data: address.

  Args:
    path: of a PNG or WEBP.
    most: bytes before encoding; a larger picture is made smaller.

  Returns:
    The address; None where the file is damaged or cannot be made small enough.
  """
  content = path.read_bytes()
  kind = {'.png': 'png', '.webp': 'webp'}[path.suffix]
  try:
    with Image.open(io.BytesIO(content)) as image:
      image.load()
      for factor in FACTORS:
        if len(content) <= most:
          break
        kind = 'webp'
        content = _smaller(image, factor)
  except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
    return None
  if len(content) > most:
    return None
  return f'data:image/{kind};base64,{base64.b64encode(content).decode()}'


def _smaller(image, factor):
  """All frames of a Pillow image, smaller by `factor`, as the bytes of a WEBP."""
  frames = []
  for i in range(getattr(image, 'n_frames', 1)):
    image.seek(i)
    frame = image.convert('RGB')
    size = max(1, round(frame.width * factor)), max(1, round(frame.height * factor))
    frames.append(frame.resize(size, Image.Resampling.BOX))
  film = {}
  if len(frames) > 1:
    duration = image.info.get('duration', 125)
    film = dict(save_all=True, append_images=frames[1:], duration=duration, loop=0)
  file = io.BytesIO()
  frames[0].save(file, 'WEBP', quality=80, method=2, **film)
  return file.getvalue()
