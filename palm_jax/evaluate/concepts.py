"""What an encoder's feature maps are made of: parts, by non-negative matrix factorisation.

V ~ W H (Lee and Seung, NIPS 2000): a row of V is what one place of one picture's last feature map
holds, a row of H a concept, W where it fires. scikit-learn's multiplicative updates.
"""

import time
import warnings
from typing import Any

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict
from PIL import Image
from sklearn.decomposition import NMF
from sklearn.exceptions import ConvergenceWarning

from palm_jax.base import checks, devices
from palm_jax.base.errors import UserError
from palm_jax.base.pictures import grid, save_png
from palm_jax.base.processes import is_first
from palm_jax.base.tables import aligned, protocol_line
from palm_jax.encoder import VITS, make_encoder
from palm_jax.evaluate import features, preconditions
from palm_jax.job import Job, Run
from palm_jax.layers.maps import feature_maps

LOSSES = 'frobenius', 'kullback-leibler'
HEAT = np.array([255, 40, 0], np.float32)  # where a concept fires
INIT = 'nndsvdar'
TOLERANCE = 1e-4  # of scikit-learn: at less improvement it stops


def default_config() -> ConfigDict:
  """Sizes of the factorisation and of what is shown."""
  return ConfigDict(
    dict(
      num_images=1000,  # of the test set, drawn at random; fewer where there are no more
      concepts=8,
      errors=(2, 4, 8, 16),  # numbers of concepts whose error is compared
      loss='frobenius',
      iterations=300,
      shown=8,  # strongest pictures of each concept
    )
  )


RANGES = dict(
  num_images=checks.Range(2, 10**6),
  concepts=checks.Range(1, 1000),
  errors=checks.Range(1, 1000, many=True),
  iterations=checks.Range(1, 10**6),
  shown=checks.Range(1, 100),
)


def check(config: ConfigDict, num_devices: int) -> None:
  """Raises UserError on invalid settings of the config's section `concepts`."""
  del num_devices
  preconditions.check_single_pictures(config, 'concepts')
  if config.encoder.name in VITS:
    raise UserError(
      f'--job=concepts with encoder.name={config.encoder.name}: its maps have negative values; '
      'judge a ResNet or the Nature CNN'
    )
  checks.choice('concepts.loss', config.concepts.loss, LOSSES)
  checks.ranges('concepts', config.concepts, RANGES)


def factorise(
  v: np.ndarray, rank: int, loss: str = 'frobenius', iterations: int = 300, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, float]:
  """V ~ W H, all non-negative.

  Args:
    v: (n, F).
    rank: r, the number of concepts.
    loss: one of LOSSES.
    iterations: at most.
    seed: of the small values that take the place of zeros at the start (nndsvdar).

  Returns:
    W (n, r), H (r, F) with rows of length 1, and |V - WH| / |V|, Frobenius whatever the loss.

  Raises:
    UserError: negative values, nothing but zeros, or more concepts than rows or columns.
  """
  if v.min() < 0 or not v.any():
    raise UserError('maps with negative values, or with none but zeros, have no parts')
  if rank > min(v.shape):
    raise UserError(
      f'concepts={rank} of maps with {v.shape[1]} channels at {v.shape[0]} places: choose '
      f'{min(v.shape)} or fewer'
    )
  model: Any = NMF(
    rank,  # pyright: ignore[reportArgumentType]: its annotation knows 'auto' only
    init=INIT,
    solver='mu',
    beta_loss=loss,
    max_iter=iterations,
    tol=TOLERANCE,
    random_state=seed,
  )
  with warnings.catch_warnings(action='ignore', category=ConvergenceWarning):
    w = model.fit_transform(v)
  lengths = np.maximum(np.linalg.norm(model.components_, axis=1), 1e-12)
  h = model.components_ / lengths[:, None]
  w = w * lengths
  return w, h, float(np.linalg.norm(v - w @ h) / np.linalg.norm(v))


def run(this: Run) -> dict[str, Any]:
  """The job: concepts of the pretrained encoder, in the order of their share.

  Writes <workdir>/concepts/<i>.png: strongest pictures, and where the concept fires in them.

  Returns:
    What stands in results/concepts.json: `rows`, one a concept; `errors`, by number of concepts.

  Raises:
    UserError: no encoder, one without feature maps, or more concepts than it has channels.
  """
  started, config, c = time.monotonic(), this.config, this.config.concepts
  assert this.data is not None
  split, names = this.data.test, this.data.class_names
  # Not the first: many sets are sorted by class.
  drawn = np.random.default_rng(config.seed).permutation(len(split.images))[: c.num_images]
  images, labels = split.images[drawn], split.labels[drawn]
  encoder = features.load_encoder(config, this.workdir, images.shape[1:])
  [variables], step = encoder.apply.args, encoder.about['checkpoint_step']
  network = make_encoder(config.encoder)
  shape = jax.eval_shape(lambda v: feature_maps(network, v, images[:1]), variables).shape[1:]
  flat = jax.tree_util.Partial(
    lambda v, x: feature_maps(network, v, x).reshape(len(x), -1), variables
  )
  maps = features.extract(flat, images, config.features.batch_size, this.mesh)
  v = maps.reshape(-1, shape[-1])  # (N * h * w, F)
  errors = {}
  for rank in sorted({*c.errors, c.concepts}):
    if rank <= min(v.shape) or rank == c.concepts:
      w, _, errors[rank] = factorise(v, rank, c.loss, c.iterations, config.seed)
      logging.info('concepts: %d leave %.1f%% unexplained', rank, 100 * errors[rank])
      if rank == c.concepts:
        chosen = w.reshape(len(images), *shape[:2], rank)  # (N, h, w, r)
  rows, order = _rows(chosen, labels, names, c.shown, drawn)
  if is_first():
    for i, k in enumerate(order):
      save_png(this.workdir / 'concepts' / f'{i}.png', _picture(images, chosen[..., k], c.shown))
  return dict(
    rows=rows,
    errors={str(rank): error for rank, error in errors.items()},
    seconds=time.monotonic() - started,
    protocol=dict(
      data=this.data.source,
      images=f'{len(images)} test images, drawn by the seed',
      maps=' x '.join(map(str, shape)),
      checkpoint_step=step,
      loss=c.loss,
      iterations=f'{c.iterations} at most, to a tolerance of {TOLERANCE}',
      init=INIT,
      concepts=c.concepts,
      seed=config.seed,
    ),
    **devices.describe(this.mesh),
  )


def _rows(w, labels, names, shown, places):
  """A dict a concept, the largest share first, and the order; pictures by places in the set."""
  amount = w.sum((1, 2))  # (N, r)
  shares = amount.sum(0) / amount.sum()
  order = np.argsort(-shares, kind='stable')
  rows = []
  for i, k in enumerate(order):
    by_class = np.bincount(labels, amount[:, k], len(names))
    by_class /= max(by_class.sum(), 1e-12)
    best = np.argsort(-by_class, kind='stable')[:3]
    rows.append(
      dict(
        concept=i,
        share=float(shares[k]),
        fires=float((w[..., k].max((1, 2)) > 0.5 * w[..., k].max()).mean()),
        classes={str(names[j]): float(by_class[j]) for j in best},
        strongest=places[_strongest(w[..., k], shown)].tolist(),
        picture=f'concepts/{i}.png',
      )
    )
  return rows, order


def _strongest(w, count):
  """Indices of the pictures in which a concept (N, h, w) fires most at one place."""
  return np.argsort(-w.max((1, 2)), kind='stable')[:count]


def _picture(images, w, count):
  """The strongest pictures above the same with the concept's places in colour: uint8 RGB."""
  chosen = _strongest(w, count)
  seen = images[chosen]
  channels = 3 if seen.shape[-1] >= 3 else 1
  seen = np.broadcast_to(seen[..., -channels:], (*seen.shape[:3], 3))
  size = seen.shape[2], seen.shape[1]
  heat = w[chosen] / max(w[chosen].max(), 1e-12)
  heat = np.stack(
    [np.asarray(Image.fromarray(x.astype(np.float32)).resize(size, 2)) for x in heat]
  )[..., None]
  painted = (1 - 0.7 * heat) * (0.3 * seen + 0.7 * seen.mean(-1, keepdims=True)) + 0.7 * heat * HEAT
  return grid(np.stack([seen, np.clip(painted, 0, 255).astype(np.uint8)]))


def table(result: dict[str, Any]) -> str:
  """Shares and classes."""
  cells = [('concept', 'share', 'fires in', 'most in')]
  for row in result['rows']:
    classes = ', '.join(f'{name} {share:.0%}' for name, share in row['classes'].items())
    cells.append((str(row['concept']), f'{row["share"]:.1%}', f'{row["fires"]:.1%}', classes))
  errors = ', '.join(f'{rank}: {error:.3f}' for rank, error in result['errors'].items())
  left = f'unexplained by number of concepts: {errors}'
  return '\n'.join([*aligned(cells), left, protocol_line(result['protocol'])])


JOB = Job('concepts', run, check, table=table, reads=('pretrain',), judges=True)
