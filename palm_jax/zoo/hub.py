"""A run's encoder or generator to the Hugging Face hub, and back.

All of HTTP is huggingface_hub's. A repository holds one thing of ours:

  encoder.safetensors    of bundle.py, card.json beside it
  generator.safetensors  of palm_jax.generator.convert
  README.md              the card for people
"""

import contextlib
import logging as python_logging
import os
import pathlib
import re
import tempfile
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from absl import logging

from palm_jax import __version__
from palm_jax.base import checks
from palm_jax.base.digests import file_digest
from palm_jax.base.errors import UserError, one_line
from palm_jax.base.files import replacing, user_path
from palm_jax.base.signals import raise_if_interrupted
from palm_jax.generator import load_generator
from palm_jax.generator.convert import convert
from palm_jax.zoo import bundle
from palm_jax.zoo import card as cards
from palm_jax.zoo.loaded import SUFFIX, load_file, read_card

KINDS = 'encoder', 'generator'
CARD = 'card.json'
README = 'README.md'
THEIRS = '.gitattributes', README  # what the hub itself puts into a new repository
REPO = re.compile(r'[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*')
LOG_IN = 'log in with `hf auth login` (`huggingface-cli login` before version 1), or set HF_TOKEN'
USE = """\
import palm_jax  # after: palm pull --repo={repo} --out={name}.safetensors

encoder = palm_jax.load_encoder('{name}.safetensors')
features = encoder(images)  # (N, H, W, {channels}) uint8 -> (N, {features}) float32
"""
GENERATOR_README = """\
---
library_name: palm_jax
pipeline_tag: unconditional-image-generation
{licence}tags:
- palm
- jax
---

# {name}

A picture generator of palm_jax: {shape} pictures of latents of {z_dim} numbers, {classes}. Its
weights are float16; SHA-256 of the file {sha256}.

```python
from palm_jax.generator import load_generator

# after: palm pull --repo={repo} --out={name}.safetensors
G = load_generator('{name}.safetensors')
```

With `--config.generator.path={name}.safetensors` palm_jax plays in it.
"""


def import_hub() -> ModuleType:
  """The package huggingface_hub. Raises UserError where it is not installed."""
  try:
    import huggingface_hub
  except ImportError as e:
    raise UserError(
      f"the hub needs the package huggingface_hub ({e}): python -m pip install -e '.[hub]'"
    ) from e
  return huggingface_hub


def quieten() -> None:
  """For commands: each HTTP request would be a line, and each warning would be said twice."""
  for name in ('httpx', 'httpx2'):
    python_logging.getLogger(name).setLevel(python_logging.WARNING)
  python_logging.getLogger('huggingface_hub').propagate = False


def push(
  workdir: str | os.PathLike,
  repo: str,
  what: str = 'encoder',
  private: bool = False,
  step: int | None = None,
  licence: str = '',
  command: str = '',
) -> str:
  """Uploads a run's encoder or generator with its card, in one commit.

  Args:
    workdir: of the run.
    repo: 'user/name' on the hub; made if absent.
    what: one of KINDS.
    private: whether a repository that is made is private.
    step: of the pretraining's checkpoint; None is the newest. An encoder's only.
    licence: SPDX identifier; '' states none.
    command: that made the run, for the card of an encoder.

  Returns:
    The commit's hash.

  Raises:
    UserError: nothing of this kind in the workdir, no huggingface_hub or token, a repository that
      holds something else or refuses, or no network.
  """
  checks.choice('--what', what, KINDS)
  _check_repo(repo)
  if not bundle.LICENCE.fullmatch(licence):
    raise UserError(f'--licence={licence}: expected an SPDX identifier, such as Apache-2.0')
  hub = import_hub()
  api = _api(hub)
  with _refusals(repo):
    token = hub.get_token()
  if not token:
    raise UserError(f'the hub takes uploads of those only whom it knows: {LOG_IN}')
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / f'{what}{SUFFIX}'
    if what == 'encoder':
      files = _encoder_files(path, workdir, repo, step, licence, command)
    else:
      files = _generator_files(path, workdir, repo, licence)
    with _refusals(repo):
      api.create_repo(repo, private=private, exist_ok=True)
      there = api.list_repo_files(repo)
    others = sorted(set(there) - {*files, *THEIRS})
    if others:
      raise UserError(
        f'{repo} holds {others[0]} already, which is no part of {what}s of palm_jax: choose '
        'another --repo'
      )
    operations = [hub.CommitOperationAdd(name, content) for name, content in files.items()]
    message = f'{what.capitalize()} of palm_jax {__version__}'
    with _refusals(repo):
      return api.create_commit(repo, operations, commit_message=message).oid


def _encoder_files(path, workdir, repo, step, licence, command) -> dict[str, Any]:
  """{name in the repository: path or bytes}."""
  name = repo.rpartition('/')[2]
  bundle.write(workdir, path.stem, path.parent, step, licence, command)
  card = dict(read_card(path) or {}, name=name)
  use = USE.format(repo=repo, name=name, channels=card['image_shape'][2], features=card['features'])
  return {
    path.name: str(path),
    CARD: cards.as_json(card),
    README: cards.as_text(card, use).encode(),
  }


def _generator_files(path, workdir, repo, licence) -> dict[str, Any]:
  """The same of a generator."""
  name = repo.rpartition('/')[2]
  convert(workdir, path, about=f'{name}; licence: {licence or "not stated"}')
  generator = load_generator(path)
  classes = f'{generator.num_classes} classes' if generator.num_classes else 'without classes'
  text = GENERATOR_README.format(
    repo=repo,
    name=name,
    licence=f'license: {licence.lower()}\n' if licence else '',
    shape='x'.join(map(str, generator.image_shape)),
    z_dim=generator.z_dim,
    classes=classes,
    sha256=file_digest(path),
  )
  return {path.name: str(path), README: text.encode()}


def pull(
  repo: str, revision: str | None = None, out: str | os.PathLike | None = None
) -> tuple[pathlib.Path, str]:
  """Downloads an encoder or generator that `push` uploaded, and checks it.

  Args:
    repo: 'user/name' on the hub.
    revision: branch, tag or commit; None is the newest.
    out: *.safetensors in an existing folder; None is <name>.safetensors in this one. An encoder's
      card is written beside it, as .json. Files that are there and differ are not replaced.

  Returns:
    Path of the file, and the hash of the commit that it is of.

  Raises:
    UserError: no such repository or revision, nothing of ours in it, damage, no network or right,
      or a file in the way: nothing is written.
  """
  _check_repo(repo)
  hub = import_hub()
  target = user_path(out or f'{repo.rpartition("/")[2]}{SUFFIX}')
  if target.suffix != SUFFIX or not target.absolute().parent.is_dir():
    raise UserError(f'--out={target}: expected a name that ends with {SUFFIX}, in a folder that is')
  api = _api(hub)
  with _refusals(repo, revision):
    found = api.model_info(repo, revision=revision)
  names = {file.rfilename for file in found.siblings or ()}
  kind = next((kind for kind in KINDS if f'{kind}{SUFFIX}' in names), None)
  if kind is None or not found.sha:
    raise UserError(
      f'{repo} holds neither encoder{SUFFIX} nor generator{SUFFIX}: expected a repository of '
      '`palm push`'
    )
  wanted = [f'{kind}{SUFFIX}', *({CARD} & names if kind == 'encoder' else ())]
  with tempfile.TemporaryDirectory() as folder:
    with _refusals(repo, revision):
      # Not the user's cache: a damaged file would stay in it.
      got = [
        pathlib.Path(
          api.hf_hub_download(
            repo, name, revision=found.sha, local_dir=folder, cache_dir=f'{folder}/cache'
          )
        )
        for name in wanted
      ]
    contents = [file.read_bytes() for file in got]
    _check(repo, kind, *got)
  _write_all(dict(zip((target, target.with_suffix('.json')), contents, strict=False)))
  return target, found.sha


def _write_all(contents):
  """Writes {path: bytes}: all, or none. Raises UserError where another file is in the way."""
  for path, content in contents.items():
    if path.exists() and not (path.is_file() and path.read_bytes() == content):
      raise UserError(f'{path} is there and differs: choose another --out, or remove it')
  new = [path for path in contents if not path.exists()]
  try:
    for path in new:
      with replacing(path) as file:
        file.write(contents[path])
  except BaseException:
    for path in new:
      path.unlink(missing_ok=True)
    raise


def _check(repo, kind, weights, card=None):
  """Raises UserError where the files are not what their names say."""
  try:
    if kind == 'generator':
      load_generator(weights)
      return
    if card is not None:
      os.rename(card, weights.with_suffix('.json'))
    if load_file(weights).card is None and card is not None:
      raise UserError(f'{CARD} is damaged, or of another file than {weights.name}')
  except UserError as e:
    what = str(e).replace(f'{weights.parent}{os.sep}', '')
    raise UserError(f'{repo}: {what}; nothing was written') from e


def _api(hub):
  return hub.HfApi(library_name='palm_jax', library_version=__version__)


def _check_repo(repo):
  if not REPO.fullmatch(repo or ''):
    raise UserError(f'--repo={repo}: expected user/name')


@contextlib.contextmanager
def _refusals(repo: str, revision: str | None = None) -> Iterator[None]:
  """What huggingface_hub and the HTTP library under it raise, as a UserError of one line."""
  try:
    yield
  except Exception as e:  # its kinds, and those under it, are of several libraries
    raise_if_interrupted(e)
    if isinstance(e, OSError) and e.filename is not None:  # the disk's
      raise
    logging.debug('huggingface_hub: %r', e)
    raise UserError(_in_words(e, repo, revision)) from e


def _in_words(error, repo, revision):
  """What happened, and what to do."""
  from huggingface_hub import errors

  status = getattr(getattr(error, 'response', None), 'status_code', None)
  if isinstance(error, errors.RevisionNotFoundError):
    return f'--revision={revision}: {repo} has no such branch, tag or commit'
  if isinstance(error, errors.GatedRepoError):
    return f'{repo} is given to some users only: ask for it on its page, then {LOG_IN}'
  if isinstance(error, errors.RepositoryNotFoundError) or status == 404:
    return f'{repo} is not on the hub, or private: check the name; for a private one, {LOG_IN}'
  if status == 401:
    return f'the hub does not know you (401), the token may have ended: {LOG_IN}'
  if status == 403:
    return (
      f'your token has no right to that in {repo} (403): take one that may write there, or another '
      '--repo'
    )
  if status is not None and status >= 400:
    said = getattr(error, 'server_message', None) or ''
    again = 'run the command again later' if status >= 429 else 'check the command'
    return f'the hub refuses {repo} ({status} {" ".join(said.split())[:120]}): {again}'
  if isinstance(error, errors.OfflineModeIsEnabled):
    return 'HF_HUB_OFFLINE is set, so the hub is not asked: unset it'
  reason = one_line(error.__cause__ or error)
  return f'{repo} could not be had from the hub ({reason}): check the network and try again'
