"""Features of another encoder, from a file, to be judged beside ours."""

import numpy as np
from ml_collections import ConfigDict

from palm_jax.base.errors import UserError
from palm_jax.base.files import reading, user_path
from palm_jax.data.arrays import check_expansion


def load_foreign(config: ConfigDict, counts: dict[str, int]) -> dict[str, np.ndarray]:
  """Features of another encoder, from the .npz that config.features.path names; {} without one.

  The file holds train_features, test_features and, for --job=ood, an ood_<set> for each of its
  sets.

  Args:
    counts: {'train': images, 'test': images, 'ood_<set>': images, ...}, the parts that are needed.

  Returns:
    {part: (N, F) float32}.

  Raises:
    UserError: no such file, a damaged one, one without a part, or features that are not (images of
      that part, F).
  """
  if not config.features.path:
    return {}
  path = user_path(config.features.path)
  tell = lambda why: (
    f'features.path={path} cannot be read ({why}): give an .npz file with train_features and '
    'test_features'
  )
  with reading(tell):
    check_expansion(path)
    with np.load(path, allow_pickle=False) as file:
      arrays = dict(file)
  parts = {}
  for part, count in counts.items():
    name = part if part.startswith('ood_') else f'{part}_features'
    if name not in arrays:
      raise UserError(
        f'features.path={path} holds {", ".join(sorted(arrays))}: expected also {name}'
      )
    if arrays[name].dtype.kind not in 'fiu' or not arrays[name].size:
      raise UserError(
        f'features.path={path}: {name} is {arrays[name].dtype} of shape {arrays[name].shape}, '
        f'expected real numbers ({count}, F)'
      )
    parts[part] = arrays[name].astype(np.float32)
    if parts[part].ndim != 2 or parts[part].shape != (count, parts['train'].shape[1]):
      raise UserError(
        f'features.path={path}: {name} is {arrays[name].shape}, expected ({count}, F), a row for '
        'each image in order, with the same F in all'
      )
  return parts
