"""Where positive pairs come from: play, its record, real images, or the generator alone.

A source either plays, and its pairs are consecutive frames of the replay ring, or draws pairs by
itself on the device. Draws are functions of (key, global group id), so they do not depend on the
number of devices. One entry of SOURCES a source.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from palm_jax import replay, rollout
from palm_jax.base import checks
from palm_jax.base.errors import UserError
from palm_jax.rollout import Play, World


def default_config() -> ConfigDict:
  return ConfigDict(
    dict(
      source='explored',  # see SOURCES
      # unique samples that there are to draw from, for sources that do not play; 0: no limit
      samples=0,
      record='',  # workdir of a run with pretrain.record, for passive_*
      std=0.25,  # of jahanian_gaussian in z: ali-design/GenRep, its StyleGAN2 script
      truncation_psi=0.9,  # of jahanian_gaussian: the same
      # from the replay: so many pairs of an episode are drawn together, which gives 'supcon'
      # several positives (StableRep, arXiv 2306.00984, has them of one prompt)
      group=1,
      window=0,  # steps of an episode within which they lie; 0: all
    )
  )


RANGES = dict(
  samples=checks.COUNT_OR_0,
  std=checks.Range(0, 100),
  truncation_psi=checks.Range(0, 2),
  group=checks.Range(1, 10**6),
  window=checks.COUNT_OR_0,
)


class Pairs(NamedTuple):
  """B positive pairs, and what is known of them.

  Attributes:
    frames: (B, H, W, C) uint8.
    next_frames: (B, H, W, C) uint8, their partners.
    actions: (B, z_dim) packed as in the replay, where someone acted between the two; else None.
    labels: (B,) int32, where the source sees classes; else None.
    episodes: (B,) int32 that frames of one episode share, where the source plays; else None.
  """

  frames: jax.Array
  next_frames: jax.Array
  actions: jax.Array | None = None
  labels: jax.Array | None = None
  episodes: jax.Array | None = None


class Source(NamedTuple):
  """Where pairs come from.

  Attributes:
    collect: (play, state, world, key, warm) -> State, record: what happens before the updates of
      an iteration; see rollout.collect.
    sample: (play, ring, world, keys (V,), n) -> Pairs, n for each of the V keys of local groups.
    needs: 'record' or 'images', which lie on the devices beside the generator; None: nothing.
    plays: whether environments step, by a policy or at random.
    keeps: whether there is a replay ring.
    learns_policy: whether an agent acts, and learns.
  """

  collect: Callable
  sample: Callable
  needs: str | None = None
  plays: bool = False
  keeps: bool = False
  learns_policy: bool = False


class Draw(NamedTuple):
  """What a source draws with.

  Attributes:
    config: the whole config.
    material: see material.load; in shard_map, this device's share of it.
    render: (z (B, z_dim), labels (B,), truncation_psi) -> (B, H, W, C) uint8.
    z_dim, num_classes: of the generator.
    dtype: of latents.
  """

  config: ConfigDict
  material: Any
  render: Callable
  z_dim: int
  num_classes: int
  dtype: Any


# frames (V * n, H, W, C) uint8 of V keys, their partners, labels (V * n,) int32
Drawn = tuple[jax.Array, jax.Array, jax.Array]


def independent(d: Draw, keys: jax.Array, n: int) -> Drawn:
  """Two independent latents of one label (Jahanian et al., arXiv 2106.05258: 'random')."""

  def one(key):
    key_label, key_z = jax.random.split(key)
    return jax.random.normal(key_z, (2, d.z_dim), d.dtype), _label(d, key_label)

  return _rendered(d, one, keys, n, d.config.environment.truncation_psi)


def gaussian(d: Draw, keys: jax.Array, n: int) -> Drawn:
  """A latent and the same with normal noise of pairs.std, truncated (Jahanian: 'Gaussian')."""

  def one(key):
    key_label, key_z = jax.random.split(key)
    z, noise = jax.random.normal(key_z, (2, d.z_dim), d.dtype)
    return jnp.stack([z, z + d.config.pairs.std * noise]), _label(d, key_label)

  return _rendered(d, one, keys, n, d.config.pairs.truncation_psi)


def recorded(d: Draw, keys: jax.Array, n: int) -> Drawn:
  """Consecutive steps, uniformly from all of the record ('random passive')."""
  record, length = d.material, d.config.environment.episode_length
  rows, num_envs = record.step.shape
  env, row = replay.draw_rows(jnp.int32(rows), rows, keys, n, record.step[0], length, num_envs)

  def render(row):
    z, label = record.z[row, env].astype(d.dtype), record.label[row, env]
    return d.render(z, label, d.config.environment.truncation_psi)

  return render(row), render(row + 1), record.label[row, env]


def same_label(d: Draw, keys: jax.Array, n: int) -> Drawn:
  """Two different real images of one label ('static')."""
  m = d.material

  def one(key):
    key_label, key_rows = jax.random.split(key)
    label = jax.random.randint(key_label, (), 0, len(m.count), jnp.int32)
    first, step = jax.random.randint(
      key_rows, (2,), 0, jnp.stack([m.count[label], m.count[label] - 1])
    )
    return m.first[label] + jnp.stack([first, (first + 1 + step) % m.count[label]])

  first, second = jax.vmap(one)(_sample_keys(keys, n)).T
  return m.images[first], m.images[second], m.labels[first]


def same_image(d: Draw, keys: jax.Array, n: int) -> Drawn:
  """One real image twice, for simsiam.augment to make two views of."""
  rows = jax.vmap(lambda key: jax.random.randint(key, (), 0, len(d.material.labels)))(
    _sample_keys(keys, n)
  )
  return d.material.images[rows], d.material.images[rows], d.material.labels[rows]


def _label(d, key):
  return jax.random.randint(key, (), 0, max(d.num_classes, 1), jnp.int32)


def _sample_keys(keys, n):
  """(V,) group keys -> (V * n,) keys."""
  return jax.vmap(lambda key: jax.random.split(key, n))(keys).reshape(-1)


def _rendered(d, one, keys, n, truncation_psi):
  """Pictures of the latents (2, z_dim) and label that `one` draws from each key.

  pairs.samples limits how many different keys there are.
  """
  keys, samples = _sample_keys(keys, n), d.config.pairs.samples
  if samples:
    numbers = jax.vmap(lambda key: jax.random.randint(key, (), 0, samples))(keys)
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.wrap_key_data(d.material), i))(numbers)
  z, labels = jax.vmap(one)(keys)
  return (
    d.render(z[:, 0], labels, truncation_psi),
    d.render(z[:, 1], labels, truncation_psi),
    labels,
  )


def rerun(
  play: Play, state: Any, world: World, key: jax.Array, warm: jax.Array
) -> tuple[Any, tuple]:
  """The rows that another run recorded in this iteration, drawn again and added to the ring."""
  del key, warm  # nothing is chosen
  count, dtype = play.config.pretrain.rollout_length, play.action_dtype
  rows = jax.tree.map(
    lambda x: jax.lax.dynamic_slice_in_dim(x, state.iteration * count, count), world.material
  )
  one_row = lambda _, row: (None, rollout.render(play, world, row.z.astype(play.real), row.label))
  frames = jax.lax.scan(one_row, None, rows)[1]  # (T, E, H, W, C)
  unused = jnp.zeros((*frames.shape[:2], play.generator.z_dim), dtype)
  return state.replace(ring=replay.add(state.ring, frames, unused)), ()


def collect_nothing(
  play: Play, state: Any, world: World, key: jax.Array, warm: jax.Array
) -> tuple[Any, tuple]:
  """For sources that draw their pairs when they are asked for them."""
  del play, world, key, warm
  return state, ()


def from_ring(play: Play, ring: Any, world: World, keys: jax.Array, n: int) -> Pairs:
  """Consecutive frames of the replay, with the action between them."""
  del world
  ids, c = play.local_env_ids(), play.config.pairs
  first_steps, length = play.first_steps(ids), play.config.environment.episode_length
  frames, actions, next_frames, env, row = replay.sample(
    ring, keys, n, first_steps, length, play.image_shape, c.group, c.window
  )
  episodes = rollout.episode_numbers(play, ids[env], row)
  return Pairs(frames, next_frames, actions=actions, episodes=episodes)


def drawn(
  draw: Callable[[Draw, jax.Array, int], Drawn],
  play: Play,
  ring: Any,
  world: World,
  keys: jax.Array,
  n: int,
) -> Pairs:
  """Pairs of one of DRAWS."""
  del ring
  drawing = Draw(
    play.config,
    world.material,
    functools.partial(rollout.render, play, world),
    play.generator.z_dim,
    play.generator.num_classes,
    play.real,
  )
  frames, next_frames, labels = draw(drawing, keys, n)
  return Pairs(frames, next_frames, labels=labels)


DRAWS = {
  'passive_random': recorded,  # paper Figure 6
  'static': same_label,  # Figure 6
  'two_views': same_image,  # SimSiam and SimCLR on real images, with augmentation
  'jahanian_random': independent,  # Figure 6
  'jahanian_gaussian': gaussian,  # Figure 6
}
NEEDS = {'passive_random': 'record', 'static': 'images', 'two_views': 'images'}
PLAYED = Source(rollout.collect, from_ring, plays=True, keeps=True)

SOURCES = {
  'explored': PLAYED._replace(learns_policy=True),  # PALM
  'random_action': PLAYED,  # Figure 4
  'passive_ordered': Source(rerun, from_ring, needs='record', keeps=True),  # Figure 6
  **{
    name: Source(collect_nothing, functools.partial(drawn, draw), NEEDS.get(name))
    for name, draw in DRAWS.items()
  },
}


def check(config: ConfigDict) -> None:
  """Raises UserError on invalid settings of the whole config's section `pairs`."""
  c = config.pairs
  checks.choice('pairs.source', c.source, SOURCES)
  source, given = SOURCES[c.source], f'with pairs.source={c.source!r}'
  checks.ranges('pairs', c, RANGES)
  if c.samples and c.source not in DRAWS:
    raise UserError(
      f'pairs.samples={c.samples} {given}: sources that play see pretrain.env_steps samples; '
      'set it to 0'
    )
  if bool(c.record) != (source.needs == 'record'):
    raise UserError(
      f'pairs.record={c.record!r} {given}: give the workdir of a run made with pretrain.record for '
      'passive_*, and none for others'
    )
  if config.pretrain.record and not source.plays:
    raise UserError(f'pretrain.record {given}: nobody plays there; leave it off')
  if config.environment.stack > 1 and not source.plays:
    raise UserError(
      f'environment.stack={config.environment.stack} {given}: only who plays sees pictures one '
      'after another; set it to 1'
    )
  if c.source == 'two_views' and config.simsiam.augment == 'none':
    raise UserError(
      "pairs.source='two_views' with simsiam.augment='none' gives the same picture twice: "
      "set simsiam.augment='simsiam'"
    )
  _check_episodes(config, given)


def _check_episodes(config, given):
  """Raises UserError where frames are told apart by episodes, and the source has none."""
  c, s, p = config.pairs, config.simsiam, config.pretrain
  if not SOURCES[c.source].keeps:
    for name, value in (('pairs.group', c.group > 1), ('simsiam.mask_episode', s.mask_episode)):
      if value:
        raise UserError(f'{name} {given}: its pairs are of no episode; leave it as it is')
  if c.window and c.group == 1:
    raise UserError(f'pairs.window={c.window} with pairs.group=1: a window holds 2 pairs or more')
  if c.group > 1:
    most = c.window or config.environment.episode_length - 1
    if c.group > most:
      raise UserError(
        f'pairs.group={c.group}: {"a window" if c.window else "an episode"} holds {most} pairs, so '
        'some would be drawn twice; lower it'
      )
  if s.mask_episode and s.objective != 'simclr':
    raise UserError(
      f"simsiam.mask_episode with simsiam.objective={s.objective!r}: it is for 'simclr', whose "
      'negatives it takes away; set one of the two'
    )
  share = p.batch_size // config.replay.num_shards
  checks.divisible('pretrain.batch_size // replay.num_shards', share, c.group, 'pairs.group')


def require_policy(config: ConfigDict, job: str) -> None:
  """Raises UserError where a job asks for a policy, and the source of pairs trains none."""
  check(config)
  if not SOURCES[config.pairs.source].learns_policy:
    raise UserError(
      f'--job={job} asks for a policy, which pairs.source={config.pairs.source!r} trains none of: '
      "it is for pairs.source='explored'"
    )
