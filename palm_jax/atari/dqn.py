"""Double DQN on stacks of frames as pure functions; its keys also describe DrQ (see drq.py)."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from palm_jax.atari.replay import Batch
from palm_jax.base import checks
from palm_jax.encoder import NatureCNN

TRUNK = ('conv1', 'conv2', 'conv3')
OPTIMIZERS = ('adam', 'rmsprop')


def default_config() -> ConfigDict:
  """Settings of the agent."""
  return ConfigDict(
    dict(
      features=512,  # Mnih et al. 2015
      dueling=False,  # dqn_zoo double_q
      n_step=1,  # dqn_zoo double_q
      gamma=0.99,  # dqn_zoo double_q
      batch_size=32,  # dqn_zoo double_q
      learn_period=4,  # agent steps an update: dqn_zoo double_q, 16 frames
      target_period=8000,  # agent steps: dopamine jax/agents/dqn/configs/dqn.gin
      min_history=20_000,  # agent steps before the first update: dopamine dqn.gin
      capacity=1_000_000,  # frames: dqn_zoo double_q; 7.9 GB with the margin
      epsilon=0.01,  # dqn_zoo double_q, of training at its end
      epsilon_decay=250_000,  # agent steps from 1, after min_history: dopamine dqn.gin
      optimizer='adam',  # rmsprop: centred, decay 0.95, dqn_zoo double_q
      lr=6.25e-5,  # dopamine dqn.gin
      hidden_scale=1.0,  # of lr, for the layer between trunk and heads
      trunk_scale=1.0,  # of lr, for the convolutions; 0 freezes them
      adam_eps=1.5e-4,  # dopamine dqn.gin
      rmsprop_eps=0.01 / 32**2,  # dqn_zoo double_q
    )
  )


RANGES = dict(
  features=checks.SIZE,
  n_step=checks.Range(1, 1000),
  gamma=checks.SHARE,
  batch_size=checks.Range(1, 10**6),
  learn_period=checks.Range(1, 10**6),
  target_period=checks.COUNT,
  min_history=checks.COUNT,
  capacity=checks.COUNT,
  epsilon=checks.SHARE,
  epsilon_decay=checks.COUNT,
  lr=checks.Range(0, 1000, above=True),
  hidden_scale=checks.Range(0, 1000, above=True),
  trunk_scale=checks.RATE,
  adam_eps=checks.ABOVE_0,
  rmsprop_eps=checks.ABOVE_0,
)


def dqn_zoo_config() -> ConfigDict:
  """dqn_zoo's double_q/run_atari.py, "tuned", in agent steps of four frames.

  Its shared bias of the last layer is left out.
  """
  config = default_config()
  config.update(
    dict(
      target_period=30_000,
      min_history=50_000,
      epsilon_decay=1_000_000,
      optimizer='rmsprop',
      lr=2.5e-4,
    )
  )
  return config


def check_config(section: str, c: ConfigDict) -> None:
  """Raises UserError on invalid settings of an agent; `section` is its name in messages."""
  checks.choice(f'{section}.optimizer', c.optimizer, OPTIMIZERS)
  checks.ranges(section, c, RANGES)
  checks.divisible(f'{section}.target_period', c.target_period, c.learn_period, 'learn_period')


class QNetwork(nn.Module):
  """The Nature CNN ('encoder': conv1, conv2, conv3, dense) and a linear head for each action.

  Attributes:
    num_actions: A.
    features: width of the dense layer, which value and advantage share.
    dueling: add a value and take the mean from the advantages (Wang et al. 2016, equation 9).
  """

  num_actions: int
  features: int = 512
  dueling: bool = False

  @nn.compact
  def __call__(self, stacks: jax.Array) -> jax.Array:
    """stacks (B, H, W, 4), uint8 or floats in [-1, 1] -> (B, A)."""
    h = NatureCNN(self.features, name='encoder')(stacks, train=False)
    q = nn.Dense(self.num_actions, name='advantage')(h)
    if self.dueling:
      return nn.Dense(1, name='value')(h) + q - q.mean(axis=-1, keepdims=True)
    return q


class Agent(flax.struct.PyTreeNode):
  """State of the agent.

  Attributes:
    params: of QNetwork.
    target: the copy that values s'; None where target_period is learn_period, so that params are
      their own target.
    opt_state: of the optimizer.
    updates: () int32.
  """

  params: Any
  target: Any
  opt_state: Any
  updates: jax.Array


def _network(params, config) -> Any:
  return QNetwork(params['advantage']['bias'].shape[0], config.features, config.dueling)


def _optimizer(config):
  """Adam or RMSProp, then a learning rate for each of trunk, dense layer and heads.

  Its `update` needs no parameters.
  """

  def by_group(updates, _):
    descend = lambda lr, tree: jax.tree.map(lambda u: -lr * u, tree)
    encoder = {}
    for name, tree in updates['encoder'].items():
      scale = config.trunk_scale if name in TRUNK else config.hidden_scale
      encoder[name] = descend(config.lr * scale, tree)
    return {
      name: encoder if name == 'encoder' else descend(config.lr, tree)
      for name, tree in updates.items()
    }

  if config.optimizer == 'adam':
    normalise = optax.scale_by_adam(eps=config.adam_eps)
  else:
    normalise = optax.scale_by_stddev(decay=0.95, eps=config.rmsprop_eps)
  return optax.chain(normalise, optax.stateless(by_group))


def init(
  key: jax.Array,
  stack_shape: tuple[int, ...],
  num_actions: int,
  config: ConfigDict,
  trunk: Any = None,
) -> Agent:
  """A new agent.

  Args:
    key: one typed key.
    stack_shape: (H, W, 4).
    num_actions: A.
    config: attributes of `default_config()`.
    trunk: parameters {'conv1', 'conv2', 'conv3'} of a NatureCNN to begin with, leaf for leaf; all
      else is fresh.
  """
  network = QNetwork(num_actions, config.features, config.dueling)
  params = network.init(key, jnp.zeros((1, *stack_shape)))['params']
  if trunk:
    convolutions = {name: jax.tree.map(jnp.asarray, trunk[name]) for name in TRUNK}
    params = dict(params, encoder=dict(params['encoder'], **convolutions))
  own_target = config.target_period == config.learn_period
  return Agent(
    params=params,
    target=None if own_target else jax.tree.map(jnp.copy, params),
    opt_state=_optimizer(config).init(params),
    updates=jnp.zeros((), jnp.int32),
  )


def q_values(params: Any, stacks: jax.Array, config: ConfigDict) -> jax.Array:
  """(B, A) for stacks (B, H, W, 4)."""
  return _network(params, config).apply({'params': params}, stacks)


def act(
  params: Any,
  stacks: jax.Array,
  epsilon: float | jax.Array,
  key: jax.Array,
  config: ConfigDict,
) -> jax.Array:
  """Actions (E,) int32 for stacks (E, H, W, 4): random with probability epsilon, else the best.

  Row e draws by (key, e).
  """
  q = q_values(params, stacks, config)

  def one(e, best):
    explore_key, action_key = jax.random.split(jax.random.fold_in(key, e))
    explore = jax.random.uniform(explore_key) < epsilon
    return jnp.where(explore, jax.random.randint(action_key, (), 0, q.shape[1]), best)

  return jax.vmap(one)(jnp.arange(len(q)), jnp.argmax(q, axis=1))


def targets(
  next_q_online: jax.Array, next_q_target: jax.Array, returns: jax.Array, discounts: jax.Array
) -> jax.Array:
  """Double Q-learning's targets (B,); van Hasselt et al. 2016, equation 4.

  Args:
    next_q_online: (B, A), by which the action is chosen.
    next_q_target: (B, A), by which it is valued.
    returns: (B,) as in palm_jax.atari.replay.Batch.
    discounts: (B,) likewise.
  """
  chosen = jnp.argmax(next_q_online, axis=1)
  return returns + discounts * jnp.take_along_axis(next_q_target, chosen[:, None], axis=1)[:, 0]


def update(
  agent: Agent,
  batches: Batch,
  key: jax.Array,
  config: ConfigDict,
  augment: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
) -> tuple[Agent, dict[str, jax.Array]]:
  """Updates in the order of `batches`, in one scan.

  Args:
    agent: as of `init`, or of the update before.
    batches: arrays (U, B, ...).
    key: one typed key; update u of an agent's life draws by (key, u).
    config: attributes of `default_config()`.
    augment: (keys (B,), stacks (B, H, W, 4) uint8) -> floats in [-1, 1]; s and s' are drawn
      independently.

  Returns:
    The agent, and scalars, means over the U updates: loss, q, target_q, grad_norm.
  """
  optimizer, network = _optimizer(config), _network(agent.params, config)
  copy_every = config.target_period // config.learn_period

  def one(agent, batch):
    stacks, next_stacks = batch.stacks, batch.next_stacks
    if augment:
      size = len(stacks)
      step_key = jax.random.fold_in(key, agent.updates)
      keys = jax.vmap(lambda i: jax.random.fold_in(step_key, i))(jnp.arange(2 * size))
      stacks, next_stacks = augment(keys[:size], stacks), augment(keys[size:], next_stacks)

    next_q = network.apply({'params': agent.params}, next_stacks)
    if agent.target is None:
      next_q_target = next_q
    else:
      next_q_target = network.apply({'params': agent.target}, next_stacks)
    target_q = targets(next_q, next_q_target, batch.returns, batch.discounts)

    def loss_fn(params):
      if not config.trunk_scale:  # spares the gradients of a frozen trunk
        encoder = {
          name: jax.lax.stop_gradient(tree) if name in TRUNK else tree
          for name, tree in params['encoder'].items()
        }
        params = dict(params, encoder=encoder)
      q = network.apply({'params': params}, stacks)
      q = jnp.take_along_axis(q, batch.actions[:, None], axis=1)[:, 0]
      return jnp.mean(optax.huber_loss(q, target_q, delta=1.0)), q

    (loss, q), grads = jax.value_and_grad(loss_fn, has_aux=True)(agent.params)
    steps, opt_state = optimizer.update(grads, agent.opt_state)
    params = optax.apply_updates(agent.params, steps)
    updates = agent.updates + 1
    target = agent.target
    if target is not None:
      target = jax.tree.map(
        lambda new, old: jnp.where(updates % copy_every == 0, new, old), params, target
      )
    metrics = dict(
      loss=loss, q=q.mean(), target_q=target_q.mean(), grad_norm=optax.tree.norm(grads)
    )
    return Agent(params=params, target=target, opt_state=opt_state, updates=updates), metrics

  agent, metrics = jax.lax.scan(one, agent, batches)
  return agent, jax.tree.map(jnp.mean, metrics)


def epsilon_at(step: int, config: ConfigDict) -> float:
  """Share of random actions at an agent step.

  1 until config.min_history, then linearly down to config.epsilon (dopamine).
  """
  done = (step - config.min_history) / config.epsilon_decay
  return 1 - (1 - config.epsilon) * min(max(done, 0.0), 1.0)
