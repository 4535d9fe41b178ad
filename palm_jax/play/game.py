"""What all tabs of a page share: the world and its one compiled step, the map, real pictures."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from palm_jax import agent as agents
from palm_jax import environment
from palm_jax.base.errors import NonFiniteError, UserError
from palm_jax.data.arrays import Data
from palm_jax.play.controls import ENDLESS, Controls
from palm_jax.world import LatentManifold, Params, State

POINTS = 256  # random pictures of the map
REAL = 2000  # real pictures among which the nearest are sought
NEAREST = 6
BATCH = 50  # real pictures a call
PATIENCE = (
  20.0  # seconds for the map, and for the real pictures; fewer of them where they take long
)
LEAST = 32  # of either, however long they take


class Told(NamedTuple):
  """What does not change while people play but is traced.

  Attributes:
    params: of the world.
    policy: agent.Agent that only acts, or ().
    center: (F,) mean of the map's features.
    axes: (F, 2) their principal components.
  """

  params: Params
  policy: Any
  center: jax.Array
  axes: jax.Array


class Asked(NamedTuple):
  """What a step is asked for: numbers of the host, all traced.

  Attributes:
    count: () int32 of the tab's steps, for its randomness.
    who: () int32 among the players.
    action: (z_dim,) the person's.
    alpha, beta, psi: () float32.
    length: () int32 frames of an episode; 0 begins the next one.
    still: () bool, whether the latent stays, and only psi and label are shown anew.
    label: () int32 class; -1 keeps the episode's.
    episode: () int32 number of the episode, by which an agent with skills has one.
  """

  count: Any
  who: Any
  action: Any
  alpha: Any
  beta: Any
  psi: Any
  length: Any
  still: Any
  label: Any
  episode: Any


class Shown(NamedTuple):
  """What a step shows.

  Attributes:
    picture: (H, W, C) uint8.
    features: (F,).
    point: (2,) on the map.
    reward: () of the task.
    label: () int32 class.
    step: () int32 since the episode began.
  """

  picture: Any
  features: Any
  point: Any
  reward: Any
  label: Any
  step: Any


class Real(NamedTuple):
  """Real pictures, and their features.

  Attributes:
    images: (N, H, W, C) uint8.
    labels: (N,) class numbers.
    names: of the classes.
    center: (F,) mean of the features.
    bank: (N, F) features less it, at unit length.
    source: where they are from.
  """

  images: np.ndarray
  labels: np.ndarray
  names: tuple[str, ...]
  center: jax.Array
  bank: jax.Array
  source: str


@dataclasses.dataclass(frozen=True, eq=False)
class Game:
  """Everything that sessions share; `open_game` makes one.

  Attributes:
    world: whose task is 'entropy'.
    told: Told.
    advance: jitted (told, key, state, asked) -> (State, Shown); donates the state.
    players: who may act.
    start: the Controls that a session begins with.
    class_names: of the generator, none for an unconditional one.
    points: (N, 2) of the map's random pictures.
    real: Real, or None.
    template: shapes of a state.
    about: words for the page: 'generator', 'features', 'trained', 'data'.
  """

  world: LatentManifold
  told: Told
  advance: Callable[..., tuple[State, Shown]]
  players: tuple[str, ...]
  start: Controls
  class_names: tuple[str, ...]
  points: np.ndarray
  real: Real | None
  template: State
  about: dict[str, str]

  def blank(self) -> State:
    """A state of nothing, which a step of length 0 begins an episode from."""
    return blank(self.template)

  def nearest(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosines (K,) and rows (K,) of the real pictures that features (F,) are nearest to."""
    assert self.real is not None
    cosines, rows = _find(self.real.bank, self.real.center, features)
    return np.asarray(cosines), np.asarray(rows)


def make_advance(world: LatentManifold, sac: ConfigDict | None = None) -> Callable[..., Any]:
  """`Game.advance`, compiled when first called; `sac` is the config's section of a policy."""
  z_dim = world.generator.z_dim

  def person(told, key, state, asked):
    return asked.action[None]

  def at_random(told, key, state, asked):
    return environment.random_actions(key[None], z_dim, jnp.float32)

  def trained(told, key, state, asked):
    assert sac is not None
    noise = jax.random.normal(key, (1, z_dim))
    h = state.features
    return agents.act(told.policy, h, noise, asked.episode[None], sac).astype(jnp.float32)

  players = [person, at_random] if sac is None else [person, at_random, trained]

  def advance(told, key, state, asked):
    key_act, key_step = jax.random.split(jax.random.fold_in(key, asked.count))
    still, before = asked.still, state.env
    params = told.params.replace(
      alpha=asked.alpha,
      beta=jnp.where(still, 1, asked.beta),
      truncation_psi=asked.psi,
      episode_length=jnp.where(still, ENDLESS, asked.length),
      label=asked.label,
    )
    at_rest = jax.tree.map(lambda x: jnp.where(still, 0, x), before.velocity)
    # Of a stack the picture is replaced, and those before it stay.
    channels = world.generator.image_shape[-1]
    seen = jnp.where(still, jnp.roll(state.seen, channels, -1), state.seen)
    state = state.replace(env=before.replace(velocity=at_rest), seen=seen)
    actions = jax.lax.switch(asked.who, players, told, key_act, state, asked)
    _, state, rewards, _ = world.step_all(key_step[None], state, actions, params)
    kept = lambda old, new: jnp.where(still, old, new)
    env = state.env.replace(
      velocity=jax.tree.map(kept, before.velocity, state.env.velocity),
      step=kept(before.step, state.env.step),
    )
    state = state.replace(env=env)
    shown = Shown(
      picture=state.seen[0, ..., -world.generator.image_shape[-1] :],
      features=state.features[0],
      point=(state.features[0] - told.center) @ told.axes,
      reward=rewards[0],
      label=state.env.label[0],
      step=state.env.step[0],
    )
    return state, shown

  return jax.jit(advance, donate_argnums=2)


def open_game(
  world: LatentManifold,
  params: Params,
  policy: Any = (),
  sac: ConfigDict | None = None,
  class_names: tuple[str, ...] = (),
  data: Data | None = None,
  about: dict[str, str] | None = None,
) -> Game:
  """Compiles the step, draws the map and takes the features of the real pictures.

  Args:
    world, params: of `palm_jax.world.make` with the task 'entropy'.
    policy: of `agent.only_acting`, or () for none.
    sac: the config's section of it.
    class_names: of the generator; numbers where they are not given.
    data: of real pictures with the generator's shape.
    about: see Game.

  Raises:
    UserError: pictures of another shape.
    NonFiniteError: features of NaN or infinity.
  """
  if data is not None:
    check_shape(data, world.generator.image_shape)
  assert world.features is not None
  size, num_classes = world.features.size, world.generator.num_classes
  told = Told(params, policy, jnp.zeros(size), jnp.zeros((size, 2)))
  advance = make_advance(world, None if policy == () else sac)
  start = Controls(float(params.alpha), float(params.beta), float(params.truncation_psi))
  template = jax.eval_shape(world.reset_all, jax.random.split(jax.random.key(0), 1), params)[1]
  h = _random_features(world, told, advance, start, blank(template))
  center, axes, points = principal_plane(h)
  return Game(
    world=world,
    told=told._replace(center=jnp.asarray(center), axes=jnp.asarray(axes)),
    advance=advance,
    players=('person', 'random') if policy == () else ('person', 'random', 'trained'),
    start=start,
    class_names=class_names or tuple(str(i) for i in range(num_classes)),
    points=points,
    real=None if data is None else _real(world, params, data),
    template=template,
    about=about or {},
  )


def check_shape(data: Data, image_shape: tuple[int, int, int]) -> None:
  """Raises UserError where real pictures have another shape than the generator's (H, W, C)."""
  there = data.train.images.shape[1:]
  if there != tuple(image_shape):
    raise UserError(
      f'--data: pictures of {there} (height, width, channels), but the generator draws '
      f'{tuple(image_shape)}: give pictures of that shape, or leave --data out'
    )


def principal_plane(h: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Mean (F,), two principal components (F, 2) and the coordinates (N, 2) of features (N, F).

  Each component is scaled so that no coordinate is beyond -1 or 1: of an untrained encoder the
  first is far wider than all others.
  """
  center = h.mean(0)
  _, _, rows = np.linalg.svd(h - center, full_matrices=False)
  axes = np.zeros((h.shape[1], 2), np.float32)  # a single feature has one component
  axes[:, : len(rows[:2])] = rows[:2].T
  axes /= np.maximum(np.abs((h - center) @ axes).max(0), 1e-12)
  return center, axes, (h - center) @ axes


def blank(template: State) -> State:
  """A state of nothing, by its shapes."""
  return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), template)


def _random_features(world, told, advance, start, state):
  """Features (N, F) of random pictures: the first of so many episodes, drawn by the one step."""
  key, found, began = jax.random.key(1), [], None
  for count in range(POINTS):
    asked = Asked(
      np.int32(count),
      np.int32(0),
      np.zeros(world.generator.z_dim, np.float32),
      alpha=np.float32(start.alpha),
      beta=np.float32(start.beta),
      psi=np.float32(start.psi),
      length=np.int32(0),
      still=np.bool_(False),
      label=np.int32(-1),
      episode=np.int32(0),
    )
    state, shown = advance(told, key, state, asked)
    found.append(np.asarray(shown.features))
    began = began or time.monotonic()  # the first compiles
    if len(found) >= LEAST and time.monotonic() - began > PATIENCE:
      break
  h = np.stack(found)
  if not np.isfinite(h).all():
    raise NonFiniteError(
      'features of random pictures are NaN or infinite: give another generator or run'
    )
  return h


def _real(world, params, data):
  """Real of at most REAL training pictures, drawn with one seed."""
  # Not sorted: where not all are looked at, sets that lie by class would show the first ones.
  rows = np.random.default_rng(0).permutation(len(data.train.images))[:REAL]
  images = data.train.images[rows]
  look, found, began = jax.jit(world.look), [], None
  for at in range(0, len(images), BATCH):
    batch = images[at : at + BATCH]
    short = BATCH - len(batch)
    h = look(params, np.pad(batch, ((0, short), (0, 0), (0, 0), (0, 0))))
    found.append(np.asarray(h)[: len(batch)])
    began = began or time.monotonic()
    if at >= LEAST and time.monotonic() - began > PATIENCE:
      break
  h = np.concatenate(found)
  if len(h) < len(rows):
    logging.info('play: %d of %d real pictures: more would take long', len(h), len(rows))
  center = h.mean(0)
  bank = (h - center) / np.maximum(np.linalg.norm(h - center, axis=1, keepdims=True), 1e-8)
  labels = data.train.labels[rows][: len(h)]
  return Real(
    images[: len(h)], labels, data.class_names, jnp.asarray(center), jnp.asarray(bank), data.source
  )


@jax.jit
def _find(bank, center, features):
  """The mean is taken away before directions are compared, since any two features lie close
  together."""
  here = features - center
  cosines = bank @ (here / jnp.maximum(jnp.linalg.norm(here), 1e-8))
  return jax.lax.top_k(cosines, min(NEAREST, len(bank)))
