"""The section with a map of the features of test images, and their nearest neighbours.

It is all that the report computes.
"""

import base64
import io

import numpy as np
from absl import logging
from ml_collections import ConfigDict
from PIL import Image

from palm_jax import encoder
from palm_jax.base import pictures
from palm_jax.base.errors import UserError
from palm_jax.base.processes import from_first
from palm_jax.base.steps import list_steps
from palm_jax.evaluate import features
from palm_jax.report import charts, page
from palm_jax.report.read import Report, RunFiles

NEIGHBOURS = 7
QUERIES = 8
# Okabe and Ito: colour-blind readers tell them apart.
RIGHT = (0, 158, 115)
WRONG = (213, 94, 0)
GREY = (128, 128, 128)


def pca(h: np.ndarray, num: int = 2) -> tuple[np.ndarray, np.ndarray]:
  """Leading principal components.

  Args:
    h: (N, F).
    num: of components.

  Returns:
    (scores (N, num), shares (num,) of the variance), float64.
  """
  h = np.asarray(h, np.float64)
  u, s, _ = np.linalg.svd(h - h.mean(0), full_matrices=False)
  return u[:, :num] * s[:num], s[:num] ** 2 / max((s**2).sum(), np.finfo(np.float64).tiny)


def nearest(h: np.ndarray, queries: list[int], k: int = NEIGHBOURS) -> np.ndarray:
  """Nearest neighbours by cosine.

  Args:
    h: (N, F) features.
    queries: (Q,) row numbers.
    k: how many.

  Returns:
    (Q, k) row numbers, nearest first, without the query itself.
  """
  h = np.asarray(h, np.float64)
  h = h / np.maximum(np.linalg.norm(h, axis=1, keepdims=True), 1e-12)
  cosines = h[queries] @ h.T
  cosines[np.arange(len(queries)), queries] = -np.inf
  return np.argsort(-cosines, axis=1, kind='stable')[:, :k]


def find_umap() -> type | None:
  """The class of umap-learn, or None. Other packages and folders are called umap, too."""
  try:
    # Here, because it is optional and takes seconds.
    from umap import UMAP  # pyright: ignore[reportMissingImports]
  except ImportError:
    return None
  return UMAP


def section(report: Report) -> str:
  """Maps of test images by each run's encoder, and nearest neighbours of some.

  '' without data, or where no run has an encoder.
  """
  data = report.data
  if data is None:
    return ''
  config = report.config
  test = data.test
  labels = np.asarray(test.labels)
  rng = np.random.default_rng(config.seed)
  rows = np.sort(rng.permutation(len(test.images))[: config.report.num_points])
  queries = [
    int(rng.choice(np.flatnonzero(labels == label))) for label in np.unique(labels)[:QUERIES]
  ]
  umap = None if config.report.umap == 'never' else find_umap()
  out = ''
  for run in report.runs:
    if not from_first(list_steps(run.folder / 'pretrain' / 'checkpoints')):
      continue
    try:
      frozen = _load_encoder(run, config.seed, test.images.shape[1:])
    except UserError as e:
      report.notes.append(f'{run.name}: no map ({e})')
      logging.warning('report: %s', report.notes[-1])
      continue
    folder = features.folder_of(config, report.workdir)
    h = features.cached(frozen, test.images, folder, report.mesh, config.features.batch_size)
    if not np.isfinite(h).all():
      report.notes.append(f'{run.name}: no map (features are NaN or infinite)')
      continue
    whose = f'{run.name}, ' if len(report.runs) > 1 else ''
    about = f'{whose}checkpoint step {frozen.about["checkpoint_step"]}'
    panels = _panels(data, h, rows, umap, config.seed, about)
    found = nearest(h, queries)
    neighbours = strips(test.images, labels, data.class_names, queries, found, about)
    out += f'<div class="map"><div>{panels}</div>{neighbours}</div>'
  if not out:
    return ''
  return (
    f'<p class="soft">Features h of the test images of {page.esc(data.source)}; batch statistics '
    f'fixed, newest checkpoint, points drawn with seed {config.seed}. Computed for this page.</p>'
    f'{out}'
  )


def _load_encoder(run: RunFiles, seed, image_shape):
  """The run's newest encoder, as its own config describes it."""
  described = encoder.default_config()
  described.update(run.config.get('encoder', {}))
  config = ConfigDict(dict(seed=seed, encoder=described))
  return features.load_encoder(config, run.folder, image_shape)


def _panels(data, h, rows, umap, seed, about):
  """Scatter plots of those rows of the features: by PCA, and by UMAP where there is one."""
  points, shares = pca(h[rows])
  axes = [f'component {i}: {share:.1%} of the variance' for i, share in enumerate(shares, 1)]
  maps = [('PCA', points, axes)]
  if umap:
    embedding = umap(random_state=seed, n_jobs=1)
    maps.append(('UMAP', embedding.fit_transform(h[rows]), ['', '']))
  labels = np.asarray(data.test.labels)[rows]
  return ''.join(
    charts.scatter(
      f'{name} of {len(rows):,} test images ({about})',
      points,
      labels,
      data.class_names,
      axes,
    )
    for name, points, axes in maps
  )


def strips(
  images: np.ndarray,
  labels: np.ndarray,
  names: tuple[str, ...],
  queries: list[int],
  found: np.ndarray,
  about: str,
) -> str:
  """Each query and its nearest neighbours in a row, framed by whether the class is the query's.

  Args:
    images: (N, H, W, C) uint8.
    labels: (N,) class numbers.
    names: of the classes.
    queries: (Q,) row numbers.
    found: (Q, k) row numbers of their neighbours.
    about: whose features, for the heading.
  """
  out = ''
  for query, rows in zip(queries, found, strict=True):
    name = names[labels[query]]
    right = [labels[row] == labels[query] for row in rows]
    frames = [framed(images[query], GREY)]
    frames += [
      framed(images[row], RIGHT if same else WRONG) for row, same in zip(rows, right, strict=True)
    ]
    file = io.BytesIO()
    Image.fromarray(pictures.grid(np.stack(frames)[None], scale=1)).save(file, 'PNG')
    uri = f'data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}'
    words = [names[labels[row]] for row in rows]
    shown = ', '.join(
      page.esc(word) if same else f'<b>{page.esc(word)}</b>'
      for word, same in zip(words, right, strict=True)
    )
    caption = f'<strong>{page.esc(name)}</strong>: {shown}'
    alt = f'Test image of {name}, and its nearest: {", ".join(words)}'
    out += page.picture(uri, alt, caption)
  return (
    '<div class="strips card"><h3>Nearest by cosine of h, among all test images '
    f'({page.esc(about)})</h3>'
    '<p class="soft">Left the query. Green frame: its class; <b>orange, bold: '
    f'another</b>.</p>{out}</div>'
  )


def framed(
  image: np.ndarray, colour: tuple[int, int, int], side: int = 72, width: int = 3
) -> np.ndarray:
  """An image within a frame.

  Args:
    image: (H, W, C) uint8; of a stack of grey frames, the last is shown.
    colour: of the frame.
    side: pixels; the image is enlarged by whole pixels to about so many.
    width: of the frame, pixels.

  Returns:
    (h, w, 3) uint8.
  """
  image = image if image.shape[-1] in (1, 3) else image[..., -1:]
  image = np.broadcast_to(image, (*image.shape[:2], 3))
  scale = max(1, side // max(image.shape[:2]))
  image = image.repeat(scale, 0).repeat(scale, 1)
  out = np.full((image.shape[0] + 2 * width + 2, image.shape[1] + 2 * width + 2, 3), 255, np.uint8)
  out[1:-1, 1:-1] = colour
  out[1 + width : -1 - width, 1 + width : -1 - width] = image
  return out
