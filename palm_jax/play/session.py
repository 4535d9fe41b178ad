"""One tab's play: its state on the device, its settings, its last frames. Without a server."""

import collections
import dataclasses
import json
import pathlib
import statistics
import struct
import tempfile
import time
from typing import Any

import jax
import numpy as np

from palm_jax.base import pictures
from palm_jax.base.errors import UserError
from palm_jax.play import controls
from palm_jax.play.game import Asked, Game, Shown

FILM_SECONDS = 30.0  # that can be saved
FILM_BYTES = 256 << 20  # of a tab's last frames
FILM_SIDE = 256  # pixels that small pictures are enlarged to


class Session:
  """What one person plays. `take` may be called at any time; the other methods take turns.

  Attributes:
    game: what all sessions share.
    controls: settings; `take` replaces them, the next `step` obeys.
    count: steps so far.
    episode: number of the episode.
    last: Shown of the last step, or None.
  """

  def __init__(self, game: Game, seed: int):
    self.game = game
    self.controls = game.start
    self.count = 0
    self.episode = 0
    self.last: Shown | None = None
    self._rng = np.random.default_rng(seed)
    self._key = jax.random.key(seed)
    self._state = game.blank()
    self._done = dataclasses.replace(game.start, resets=-1, turns=-1)  # begins with an episode
    self._pair = np.zeros((2, 1), np.float32)
    height, width, channels = game.world.generator.image_shape
    most = FILM_BYTES // (height * width * channels)
    self._frames = collections.deque(maxlen=max(2, min(most, round(FILM_SECONDS * 60))))
    self._times = collections.deque(maxlen=60)  # of the last frames, for the film's rate

  def take(self, message: Any) -> None:
    """Obeys a message of the page, see `controls.changed`. Raises UserError."""
    self.controls = controls.changed(
      self.controls, message, self.game.players, self.game.world.generator.num_classes
    )

  @property
  def due(self) -> bool:
    """Whether the world is to move on."""
    c = self.controls
    return self._moves(c) or _look(c) != _look(self._done)

  def _moves(self, c):
    """Whether the latent is to move on by some settings."""
    done = self._done
    if (c.resets, c.steps) != (done.resets, done.steps):
      return True
    idle = c.waits and c.who == 'person' and c.drag == (0.0, 0.0)
    return not (c.paused or idle)

  @property
  def pair(self) -> np.ndarray:
    """(2, z_dim) directions in which a drag acts."""
    return self._pair

  def step(self) -> Shown:
    """One step of the world, as the settings have it."""
    c, done = self.controls, self._done
    if c.turns != done.turns:
      z_dim = self.game.world.generator.z_dim
      self._pair = controls.directions(z_dim, int(self._rng.integers(2**31)))
    begins, still = c.resets != done.resets, not self._moves(c)
    asked = Asked(
      count=np.int32(self.count),
      who=np.int32(self.game.players.index(c.who)),
      action=controls.action_of(self._pair, c.drag),
      alpha=np.float32(c.alpha),
      beta=np.float32(c.beta),
      psi=np.float32(c.psi),
      length=np.int32(0 if begins else c.length),
      still=np.bool_(still),
      label=np.int32(self._label(c, begins)),
      episode=np.int32(self.episode),
    )
    self._state, shown = self.game.advance(self.game.told, self._key, self._state, asked)
    shown = Shown(*jax.device_get(shown))
    stepped = (done.steps + 1) % controls.LAST if c.steps != done.steps else c.steps
    self._done = dataclasses.replace(c, steps=stepped)  # several were asked for, one is done
    self.count = (self.count + 1) % controls.LAST
    self.episode = (self.episode + int(shown.step == 0 and not still)) % controls.LAST
    self.last = shown
    self._frames.append(shown.picture)
    self._times.append(time.monotonic())
    return shown

  def _label(self, c, begins):
    """The class to draw; -1 keeps that of the episode, or lets a new one draw its own."""
    classes = self.game.world.generator.num_classes
    if c.label == -1 and c.draws != self._done.draws and not begins and classes:
      return self._rng.integers(classes)  # 'random' shows another class at once
    return c.label

  def nearest(self) -> list[dict[str, Any]]:
    """The real pictures that the last one's features are nearest to: id, name, cosine of each."""
    real, last = self.game.real, self.last
    if real is None or last is None:
      return []
    cosines, rows = self.game.nearest(last.features)
    return [
      dict(
        id=int(row),
        name=real.names[real.labels[row]],
        cosine=round(float(np.nan_to_num(cosine)), 3),
      )
      for cosine, row in zip(cosines, rows, strict=True)
    ]

  def rate(self) -> float:
    """Frames a second, as they came of late: the median, since people pause."""
    gaps = np.diff(self._times)
    return 1 / max(statistics.median(gaps), 1e-3) if len(gaps) else self.controls.rate

  def recent(self, seconds: float) -> tuple[list[np.ndarray], float]:
    """The last frames (H, W, C) uint8 that took so many seconds, and their rate; for `film`."""
    fps = float(np.clip(self.rate(), 1, 60))
    return list(self._frames)[-max(1, round(seconds * fps)) :], fps


def _look(c):
  """Settings that are seen at once, also while nothing moves."""
  return c.psi, c.label, c.draws


def film(frames: list[np.ndarray], fps: float) -> bytes:
  """Frames (H, W, C) uint8 as an animated WebP, small ones enlarged by whole pixels.

  Raises:
    UserError: no frames yet.
  """
  if not frames:
    raise UserError('there are no frames yet to make a film of: play first')
  scale = max(1, FILM_SIDE // max(frames[0].shape[:2]))
  with tempfile.TemporaryDirectory(prefix='palm_jax_film_') as folder:
    path = pathlib.Path(folder) / 'film.webp'
    pictures.save_webp(path, [pictures.grid(x[None, None], scale) for x in frames], fps)
    return path.read_bytes()


def rgba(picture: np.ndarray) -> np.ndarray:
  """(H, W, C) uint8 as (H, W, 4); of other channels than 3, the first is shown as grey."""
  height, width, channels = picture.shape
  out = np.full((height, width, 4), 255, np.uint8)
  out[..., :3] = picture if channels == 3 else picture[..., :1]
  return out


def packed(header: dict[str, Any], content: bytes) -> bytes:
  """A binary message: the length of a JSON header as uint32 (little-endian), it, the content."""
  text = json.dumps(header, allow_nan=False).encode()
  return struct.pack('<I', len(text)) + text + content


def frame_message(session: Session, shown: Shown) -> bytes:
  """A frame for the page: its numbers, and its pixels (H * W * 4 bytes)."""
  numbers = dict(reward=shown.reward, x=shown.point[0], y=shown.point[1])
  header = dict(
    kind='frame',
    step=int(shown.step),
    episode=session.episode,
    label=int(shown.label),
    # A generator or encoder of NaN must not end the page.
    **{name: float(value) if np.isfinite(value) else None for name, value in numbers.items()},
  )
  return packed(header, rgba(shown.picture).tobytes())
