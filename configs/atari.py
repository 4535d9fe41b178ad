"""Atari: a world made of one game's frames, and what its encoder is worth in that game.

  python -m palm_jax.main --config=configs/atari.py:Assault

That is at the paper's sizes (section 5.3, Atari-100k), for accelerators. Words behind the game:

  Assault,laptop    the whole chain on one CPU core
  Assault,eps       DrQ(eps), which the paper did not compare with
  Assault,sgi       SGI's learning rates for the pretrained layers
  Assault,rmsprop   the learner of dqn_zoo plays for the frames
  Assault,single    the generator draws single frames, which are stacked as they come

The jobs: collect (double DQN plays, stacks of frames are kept), generator, pretrain, finetune (DrQ
from the pretrained trunk), scratch (the same from fresh convolutions, in <workdir>/scratch) and
scores.
Needs `pip install -e '.[atari]'`: ale-py is GPL-2.0. Without any pretraining: --job=finetune
--config.finetune.trunk=scratch. Only `laptop` was run to its end so far.
"""

from ml_collections import ConfigDict

from configs import generator
from palm_jax.atari import collect, dqn, drq, environment, finetune, scores
from palm_jax.base.errors import UserError

WORDS = 'rmsprop', 'sgi', 'eps', 'single', 'laptop'


def get_config(variant: str = 'Assault') -> ConfigDict:
  """The config of a game, and of words behind it: see above. UserError where one is unknown."""
  game, *words = variant.split(',')
  environment.rom_id(game)
  c = generator.get_config('atari')
  c.name = f'atari_{variant.replace(",", "_")}'
  c.jobs = ('collect', 'generator', 'pretrain', 'finetune', 'scratch', 'scores')
  c.data.name = 'collect'  # what that job left in the workdir
  c.atari = ConfigDict(dict(game=game))
  c.collect = collect.default_config()
  c.finetune = finetune.default_config()
  c.scores = scores.default_config()
  c.generator.pad = 6  # 84 to 96: nothing is resized
  c.environment.crop = 6  # and back
  c.encoder.name = 'nature'  # the fine-tuner's convolutions; its dense layer stays behind
  c.pretrain.env_steps = 6_000_000  # paper Table 2
  c.replay.capacity = 131_072  # 3.7 GB of stacks, as many bytes as CIFAR's; also of each checkpoint
  # laptop last: it changes the sizes of what the other words chose.
  for word in sorted(words, key='laptop'.__eq__):
    if word == 'laptop':
      laptop(c)
    elif word == 'sgi':
      c.finetune.agent.update(drq.SGI)
    elif word == 'rmsprop':
      c.collect.agent = dqn.dqn_zoo_config()
    elif word == 'single':
      c.environment.stack = 4
      c.plan.image_channels = 1
    elif word == 'eps':
      c.finetune.agent.update(drq.EPSILON)
    else:
      raise UserError(
        f'configs/atari.py:{variant}: {word!r} is unknown: expected a game, then any of '
        f'{", ".join(WORDS)}'
      )
  return c


def laptop(c: ConfigDict) -> None:
  """Sizes for one CPU core and 45 minutes, to see every job work.

  A tenth of the steps of Atari-100k; the pictures are blurred.
  """
  c.collect.update(
    dict(frames=80_000, max_bytes=120_000_000, num_envs=4, log_steps=2000, checkpoint_minutes=2.0)
  )
  c.collect.agent.update(
    dict(min_history=2000, epsilon_decay=10_000, capacity=20_000, target_period=1000)
  )
  c.generator.update(
    dict(
      z_dim=64,
      w_dim=64,
      mapping_layers=2,
      channel_base=1536,
      channel_max=64,
      batch_size=8,
      mbstd_group=4,
      pl_weight=0.0,
      style_mixing=0.0,
      kimg=24.0,
      ema_kimg=2.0,
      conv_clamp=0.0,
      augment='none',
      r1_gamma=1.0,  # 0.06, the heuristic of a batch of 32, diverged after 12 kimg
      snapshot_kimg=2.0,
      checkpoint_minutes=2.0,
    )
  )
  c.replay.capacity = 16_384  # 462 MB of stacks
  c.simsiam.update(dict(proj_hidden=256, proj_dim=256, pred_hidden=64))
  c.sac.hidden = (256, 256)
  c.pretrain.update(
    dict(
      env_steps=20_000,
      num_envs=16,
      rollout_length=4,
      batch_size=64,
      warmup_steps=1024,
      iterations_per_call=10,
      checkpoint_minutes=2.0,
    )
  )
  c.finetune.update(
    dict(agent_steps=10_000, eval_episodes=20, log_steps=500, checkpoint_minutes=2.0)
  )
  c.finetune.agent.epsilon_decay = 500  # DrQ's twentieth of the steps
