"""A map of the features of test images, and their nearest neighbours: all that the report
computes."""

import base64
import io

import numpy as np
from absl import logging
from ml_collections import ConfigDict
from PIL import Image

from palm_jax import encoder
from palm_jax.base import pictures
from palm_jax.base.errors import UserError
from palm_jax.base.steps import list_steps
from palm_jax.evaluate import features
from palm_jax.report import page as report_page

NEIGHBOURS, QUERIES = 7, 8
RIGHT, WRONG, GREY = (
  (0, 158, 115),
  (213, 94, 0),
  (128, 128, 128),
)  # Okabe and Ito: colour-blind readers tell them apart


# The map: the only thing that is computed here.


def pca(h, num=2):
  """Scores (N, num) of h (N, F) on its leading principal components, and the shares (num,) of the
  variance; float64."""
  h = np.asarray(h, np.float64)
  u, s, _ = np.linalg.svd(h - h.mean(0), full_matrices=False)
  return u[:, :num] * s[:num], s[:num] ** 2 / max((s**2).sum(), np.finfo(np.float64).tiny)


def nearest(h, queries, k=NEIGHBOURS):
  """(Q, k) row numbers of the features h (N, F) nearest to each query row by cosine, nearest first,
  without itself."""
  h = np.asarray(h, np.float64)
  h = h / np.maximum(np.linalg.norm(h, axis=1, keepdims=True), 1e-12)
  cosines = h[queries] @ h.T
  cosines[np.arange(len(queries)), queries] = -np.inf
  return np.argsort(-cosines, axis=1, kind='stable')[:, :k]


def find_umap():
  """The class of umap-learn, or None; other packages and folders are called umap, too."""
  try:
    from umap import UMAP  # here: seconds that other jobs need not spend
  except ImportError:
    return None
  return UMAP


def map_section(config, runs, data, workdir, mesh, notes):
  """Maps of test images by each run's encoder, and nearest neighbours of some; '' where no run has
  an encoder."""
  images, labels = data.test.images, np.asarray(data.test.labels)
  rng = np.random.default_rng(config.seed)
  rows = np.sort(rng.permutation(len(images))[: config.report.num_points])
  classes = np.unique(labels)
  queries = [int(rng.choice(np.flatnonzero(labels == label))) for label in classes[:QUERIES]]
  UMAP, out = None if config.report.umap == 'never' else find_umap(), []
  for run in runs:
    if not list_steps(run.folder / 'pretrain' / 'checkpoints'):
      continue
    section = encoder.default_config()
    section.update(run.config.get('encoder', {}))
    try:
      frozen = features.load_encoder(
        ConfigDict(dict(seed=config.seed, encoder=section)), run.folder, images.shape[1:]
      )
    except UserError as e:
      notes.append(f'{run.name}: no map ({e})')
      logging.warning('report: %s', notes[-1])
      continue
    h = features.cached(
      frozen, images, features.folder_of(config, workdir), mesh, config.features.batch_size
    )
    if not np.isfinite(h).all():
      notes.append(f'{run.name}: no map (features are NaN or infinite)')
      continue
    points, shares = pca(h[rows])
    maps = [
      (
        'PCA',
        points,
        [f'component {i + 1}: {share:.1%} of the variance' for i, share in enumerate(shares)],
      )
    ]
    if UMAP:
      maps.append(
        ('UMAP', UMAP(random_state=config.seed, n_jobs=1).fit_transform(h[rows]), ['', ''])
      )
    about = (
      f'{run.name + ", " if len(runs) > 1 else ""}checkpoint step {frozen.about["checkpoint_step"]}'
    )
    panels = ''.join(
      report_page.scatter(
        f'{name} of {len(rows):,} test images ({about})',
        points,
        labels[rows],
        data.class_names,
        axes,
      )
      for name, points, axes in maps
    )
    neighbours = strips(images, labels, data.class_names, queries, nearest(h, queries), about)
    out.append(f'<div class="map"><div>{panels}</div>{neighbours}</div>')
  if not out:
    return ''
  return (
    f'<p class="soft">Features h of the test images of {report_page.esc(data.source)}; batch '
    'statistics fixed, newest '
    f'checkpoint, points drawn with seed {config.seed}. Computed for this page.</p>{"".join(out)}'
  )


def strips(images, labels, names, queries, found, about):
  """Each query and its nearest neighbours in a row; framed by whether the class is the query's."""
  out = ''
  for query, rows in zip(queries, found, strict=True):
    frames = [GREY] + [RIGHT if labels[row] == labels[query] else WRONG for row in rows]
    cells = np.stack(
      [framed(images[row], colour) for row, colour in zip([query, *rows], frames, strict=True)]
    )
    file = io.BytesIO()
    Image.fromarray(pictures.grid(cells[None], scale=1)).save(file, 'PNG')
    uri = f'data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}'
    words = [names[labels[row]] for row in rows]
    shown = ', '.join(
      report_page.esc(word) if labels[row] == labels[query] else f'<b>{report_page.esc(word)}</b>'
      for row, word in zip(rows, words, strict=True)
    )
    caption = f'<strong>{report_page.esc(names[labels[query]])}</strong>: {shown}'
    out += report_page.picture(
      uri, f'Test image of {names[labels[query]]}, and its nearest: {", ".join(words)}', caption
    )
  return (
    '<div class="strips card"><h3>Nearest by cosine of h, among all test images '
    f'({report_page.esc(about)})</h3>'
    '<p class="soft">Left the query. Green frame: its class; <b>orange, bold: '
    f'another</b>.</p>{out}</div>'
  )


def framed(image, colour, side=72, width=3):
  """(H, W, C) uint8 enlarged by whole pixels to about `side`, within a frame of (3,) colour: (h, w,
  3). Of stacks, the last."""
  image = image if image.shape[-1] in (1, 3) else image[..., -1:]
  image = np.broadcast_to(image, (*image.shape[:2], 3))
  scale = max(1, side // max(image.shape[:2]))
  image = image.repeat(scale, 0).repeat(scale, 1)
  out = np.full((image.shape[0] + 2 * width + 2, image.shape[1] + 2 * width + 2, 3), 255, np.uint8)
  out[1:-1, 1:-1] = colour
  out[1 + width : -1 - width, 1 + width : -1 - width] = image
  return out
