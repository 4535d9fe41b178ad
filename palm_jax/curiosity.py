"""Rewards that are learned: what a model cannot predict yet, and how surely a skill is recognised.

URLB's three knowledge-based agents (Laskin et al., arXiv 2110.15191; rll-research/url_benchmark
agent/rnd.py, icm.py, disagreement.py) and the skill term of APS (Liu and Abbeel, arXiv 2108.13956;
agent/aps.py), each a pure loss and a pure reward on detached features.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from palm_jax.actor_critic import MLP
from palm_jax.base import devices
from palm_jax.contrastive import normalize

# What every loss and reward sees: (B, F) features of s, (B, A) actions, (B, F) features of s'.
Seen = tuple[jax.Array, jax.Array, jax.Array]


class Scale(flax.struct.PyTreeNode):
  """Running mean and variance of the rewards, and their weight (URLB utils.py RMS); () each."""

  mean: jax.Array
  var: jax.Array
  count: jax.Array


class State(flax.struct.PyTreeNode):
  """Parameters, Adam's state, and the Scale where a reward is divided by its deviation, else ()."""

  params: Any
  opt_state: Any
  scale: Any = ()


class Kind(NamedTuple):
  """A learned reward.

  Attributes:
    init: (key, feature_dim, action_dim, config) -> params.
    loss: (params, Seen, config) -> (B,), whose mean is minimised.
    reward: (params, Seen, config) -> (B,).
    scaled: whether the reward is divided by its running standard deviation.
  """

  init: Callable
  loss: Callable
  reward: Callable
  scaled: bool = False


def _mlp(config, layers, features) -> Any:
  return MLP((config.hidden,) * layers, features)


def _init_rnd(key, feature_dim, action_dim, config):
  del action_dim
  net, h = _mlp(config, 2, config.rep_dim), jnp.zeros((1, feature_dim))
  keys = jax.random.split(key)
  return dict(predictor=net.init(keys[0], h), target=net.init(keys[1], h))


def _rnd(params, seen, config):
  """Mean squared error of a prediction of a random network's output."""
  net = _mlp(config, 2, config.rep_dim)
  target = net.apply(jax.lax.stop_gradient(params['target']), seen[0])
  return jnp.mean((net.apply(params['predictor'], seen[0]) - target) ** 2, axis=-1)


def _init_icm(key, feature_dim, action_dim, config):
  keys, pair = jax.random.split(key), jnp.zeros((1, 2 * feature_dim))
  both = jnp.zeros((1, feature_dim + action_dim))
  return dict(
    forward=_mlp(config, 1, feature_dim).init(keys[0], both),
    backward=_mlp(config, 1, action_dim).init(keys[1], pair),
  )


def _forward_error(params, seen, config):
  h, action, next_h = seen
  net = _mlp(config, 1, h.shape[-1])
  return _norm(next_h - net.apply(params['forward'], jnp.concatenate([h, action], axis=-1)))


def _icm_loss(params, seen, config):
  """Errors of predicting s' from (s, a), and a from (s, s')."""
  h, action, next_h = seen
  net = _mlp(config, 1, action.shape[-1])
  guess = jnp.tanh(net.apply(params['backward'], jnp.concatenate([h, next_h], axis=-1)))
  return _forward_error(params, seen, config) + _norm(action - guess)


def _icm_reward(params, seen, config):
  return jnp.log1p(_forward_error(params, seen, config))


def _init_disagreement(key, feature_dim, action_dim, config):
  net, both = _mlp(config, 1, feature_dim), jnp.zeros((1, feature_dim + action_dim))
  return jax.vmap(lambda k: net.init(k, both))(jax.random.split(key, config.models))


def _predictions(params, seen, config):
  """(models, B, F) of s'."""
  net, both = _mlp(config, 1, seen[0].shape[-1]), jnp.concatenate(seen[:2], axis=-1)
  return jax.vmap(lambda p: net.apply(p, both))(params)


def _disagreement_loss(params, seen, config):
  return jnp.mean(_norm(seen[2] - _predictions(params, seen, config)), axis=0)


def _disagreement(params, seen, config):
  """Variance over the models, mean over the dimensions."""
  return jnp.mean(jnp.var(_predictions(params, seen, config), axis=0, ddof=1), axis=-1)


def _init_aps(key, feature_dim, skill_dim, config):
  return _mlp(config, 2, skill_dim).init(key, jnp.zeros((1, feature_dim)))


def _recognised(params, seen, config):
  """Cosine between the skill, in the place of the action, and where s' lies among skills.

  Up to a factor and a term of the state alone this is METRA's displacement (arXiv 2310.08887) on
  the same features: a sum of gamma^t (phi(s_t+1) - phi(s_t)) w is (1 - gamma) times one of gamma^t
  phi(s_t+1) w, less phi(s_0) w.
  """
  _, skill, next_h = seen
  features = _mlp(config, 2, skill.shape[-1]).apply(params, next_h)
  return jnp.sum(normalize(features) * skill, axis=-1)


def _norm(x):
  """Euclidean, with a gradient at 0."""
  return jnp.sqrt(jnp.maximum(jnp.sum(x * x, axis=-1), 1e-12))


KINDS = {
  'rnd': Kind(_init_rnd, _rnd, _rnd, scaled=True),
  'icm': Kind(_init_icm, _icm_loss, _icm_reward),
  'disagreement': Kind(_init_disagreement, _disagreement_loss, _disagreement),
  'aps': Kind(_init_aps, lambda *arguments: -_recognised(*arguments), _recognised),
}


def init(key: jax.Array, kind: str, feature_dim: int, action_dim: int, config: ConfigDict) -> State:
  """A new State; `config` is the section `reward`; of 'aps' action_dim is that of the skill."""
  params = KINDS[kind].init(key, feature_dim, action_dim, config)
  # URLB utils.py RMS starts at mean 0, variance 1, weight 1e-4
  scale = Scale(jnp.zeros(()), jnp.ones(()), jnp.full((), 1e-4)) if KINDS[kind].scaled else ()
  return State(params, optax.adam(0.0).init(params), scale)


def update(
  state: State, kind: str, seen: Seen, config: ConfigDict, axis_name: str | None = None
) -> tuple[State, jax.Array, dict[str, jax.Array]]:
  """One step of learning on a batch, then the batch's rewards by what was learned.

  Args:
    state: State of the kind.
    kind: one of KINDS.
    seen: features, actions and next features of this device; nothing passes a gradient on.
    config: the section `reward`.
    axis_name: mesh axis over which the batch is sharded.

  Returns:
    State, (B,) rewards, and {kind + '_loss'}.
  """
  of = KINDS[kind]
  seen = jax.lax.stop_gradient(seen)
  average = lambda x: devices.mean(x, axis_name)
  loss, grads = jax.value_and_grad(lambda p: average(of.loss(p, seen, config)))(state.params)
  updates, opt_state = optax.adam(config.lr).update(grads, state.opt_state)
  params, scale = optax.apply_updates(state.params, updates), state.scale
  r = jax.lax.stop_gradient(of.reward(params, seen, config))
  if of.scaled:
    count = len(r) * (1 if axis_name is None else jax.lax.axis_size(axis_name))
    scale = _seen_more(state.scale, average(r), average(r**2), count)
    r = r / (jnp.sqrt(scale.var) + 1e-8)
  return State(params, opt_state, scale), r, {f'{kind}_loss': loss}


def _seen_more(scale, mean, square, count):
  """The Scale of all rewards so far and `count` more, of which mean and mean square are given."""
  total = scale.count + count
  share = count / total
  delta = mean - scale.mean
  between = delta**2 * scale.count * count / total
  var = (scale.var * scale.count + (square - mean**2) * count + between) / total
  return Scale(scale.mean + delta * share, var, total)
