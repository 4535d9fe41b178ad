"""PALM on CIFAR-10 at the paper's sizes, and smaller ones.

  python -m palm_jax.main --config=configs/cifar.py
    50M env steps, ResNet-18, StyleGAN2 with 512 channels: accelerators
  python -m palm_jax.main --config=configs/cifar.py:cifar100
    the same on CIFAR-100
  python -m palm_jax.main --config=configs/cifar.py:small --config.data.name=train.npz,test.npz
    small sizes: two CPU cores
  python -m palm_jax.main --config=configs/cifar.py:small --job=pretrain
    the same, without any data

The paper contradicts itself on alpha and beta, so both readings have a name: `paper_text` (0.5,
0.95: sections 4.1 and 6) and `paper_fig5` (0.95, 0.75: the best cell of Figure 5). Append one:
configs/cifar.py:small,paper_fig5. `able` gives the agent settings with which it is able to act.
`small,best` is what taught most at that size, and not the paper's method: figures over seeds are in
configs/studies/README.md (345,600 env steps, 8,076 updates: by two runs of --job=benchmark 41 and
45 minutes of two quiet cores).

`small` plays in the bundled generator; --config.generator.path= trains one (about 130 images/s on
two CPU cores). Measured once: 5.5 minutes for pretraining, 15 for the whole probe, 1.8 GB. Linear
accuracy on JPEG copies of CIFAR-10, 8,000 test pictures: PALM encoder 40.7%, untrained 34.5%,
pixels 41.2% (one seed, +- 1.1 by the test pictures alone; six seeds: configs/studies/README.md).

The full size was not run yet. Compiled for one H200, 50M steps take 0.41 hours by the arithmetic of
launch.compile_for, in bfloat16: a floor, not a measurement. The replay takes 5.3 GB over all
devices. To compare with: SimSiam with augmentation has 90.5 / 66.0% on CIFAR-10 / 100 (as published
by solo-learn).
"""

from ml_collections import ConfigDict

from palm_jax import encoder, environment, pairs, pretrain, replay, report, reward, sac, simsiam
from palm_jax.base.errors import UserError
from palm_jax.data import load
from palm_jax.evaluate import concepts, diversity, features, ood, probe, quality
from palm_jax.generator import train
from palm_jax.speed import benchmark, plan

PRESETS = {'paper_text': (0.5, 0.95), 'paper_fig5': (0.95, 0.75)}
# Of the section simsiam: to it frames of one episode are no negatives. Ours.
CONTRASTIVE = dict(objective='simclr', temperature=0.2, mask_episode=True)


def get_config(variant: str = '') -> ConfigDict:
  """The config of a variant: words as above with commas between, in any order. Raises UserError."""
  c = ConfigDict()
  c.name = 'cifar'
  c.seed = 0
  c.jobs = ('generator', 'pretrain', 'probe')
  c.data = load.default_config()

  c.generator = train.default_config()  # StyleGAN2-ADA's --cfg=cifar
  c.environment = environment.default_config()
  c.replay = replay.default_config()
  c.pairs = pairs.default_config()  # where positive pairs come from
  c.encoder = encoder.default_config()  # ResNet-18: paper section 5.1
  c.simsiam = simsiam.default_config()
  c.reward = reward.default_config()
  c.sac = sac.default_config()
  c.pretrain = pretrain.default_config()
  c.plan = plan.default_config()  # --job=plan: what a pretraining would take
  c.benchmark = benchmark.default_config()  # --job=benchmark: how fast a pretraining is
  c.features = features.default_config()  # of evaluations
  c.probe = probe.default_config()
  c.ood = ood.default_config()  # --job=ood
  c.diversity = diversity.default_config()  # --job=diversity: coverage of what was explored
  c.concepts = concepts.default_config()  # --job=concepts: what its feature maps are made of
  c.report = report.default_config()  # --job=report: one page
  c.quality = quality.default_config()  # --job=quality: FID and its like of the generator

  words = [word for word in variant.split(',') if word]
  presets = [word for word in words if word in PRESETS]
  for word in words:
    if word not in ('cifar100', 'small', 'able', 'best', *PRESETS):
      raise UserError(
        f'configs/cifar.py:{word} is unknown: variants are cifar100, small, able, best, '
        f'{", ".join(PRESETS)}'
      )
  if len(presets) > 1 or ('best' in words and 'small' not in words):
    raise UserError(
      f'configs/cifar.py:{variant} cannot be: best is a variant of small (small,best), and of '
      f'{", ".join(PRESETS)} one can be taken'
    )
  # In this order, as each may change or follow what one before it has set.
  if 'small' in words:
    small(c)
  if 'cifar100' in words:
    c.name = c.name.replace('cifar', 'cifar100')
    c.data.name = 'cifar100'
    c.plan.num_classes = 100
    c.generator.path = ''  # the bundled generator of `small` draws the classes of CIFAR-10
  if 'best' in words:
    best(c)
  for word in presets:
    c.environment.alpha, c.environment.beta = PRESETS[word]
  if 'able' in words:
    able(c)
  return c


def able(c: ConfigDict) -> None:
  """An agent that is able to act: settings that follow the world's memory and the actions' number.

  Ours; the paper gives none.
  """
  c.environment.start = 'stationary'
  c.sac.update(
    dict(
      lr_actor=1e-3,
      lr_critic=1e-3,
      neutral_start=True,
      standardise=True,
      features='eval',
      updates_per_batch=4,
    )
  )
  # A latent forgets in 1 / (1 - beta) steps, and the value looks twice as far.
  c.sac.gamma = (1 + c.environment.get_ref('beta')) / 2
  # The entropy is a sum over the actions' dimensions, the reward is not. Set it where you give a
  # generator of another z_dim.
  c.sac.init_alpha = 0.2 / c.generator.z_dim


def best(c: ConfigDict) -> None:
  """What taught most of all that was measured at `small`; not the paper's method.

  A contrastive loss, to which frames of one episode are no negatives, on augmented frames, three
  updates an iteration for two, and 5.7 times the frames: in all 8.7 times the updates.
  """
  c.name += '_best'
  c.environment.alpha, c.environment.beta = PRESETS['paper_fig5']
  c.simsiam.update(dict(CONTRASTIVE, augment='simsiam'))
  c.pretrain.update(dict(env_steps=345_600, updates_per_iteration=3, iterations_per_call=6))


def small(c: ConfigDict) -> None:
  """Sizes for two CPU cores: 32x32 pictures, a narrow generator and a narrow ResNet-18."""
  c.name += '_small'
  c.generator.update(
    dict(
      path='cifar10-small',
      z_dim=64,
      w_dim=64,
      channel_base=1024,
      channel_max=128,
      batch_size=32,
      mbstd_group=8,
      kimg=600.0,
      ema_kimg=50.0,
      conv_clamp=0.0,
      iterations_per_call=16,
      augment='none',  # 50,000 pictures are enough for so short a training
      snapshot_kimg=20.0,
      checkpoint_minutes=5.0,
    )
  )
  # Paper Figure 5: the best alpha, and a beta of the best range.
  c.environment.update(dict(alpha=0.95, beta=0.5))
  c.replay.capacity = 65_536  # 200 MB of frames
  c.encoder.width = 16
  # The learning rate is ten times the paper's, because the updates are few.
  c.simsiam.update(dict(proj_hidden=256, proj_dim=256, pred_hidden=64, lr=0.3))
  c.sac.hidden = (256, 256)
  c.pretrain.update(
    dict(
      env_steps=60_000,
      num_envs=32,
      rollout_length=4,
      batch_size=64,
      updates_per_iteration=2,
      warmup_steps=1024,
      iterations_per_call=10,
      checkpoint_minutes=5.0,
    )
  )
  c.probe.methods = ('lbfgs', 'knn', 'finetune', 'supervised')
  for method in ('finetune', 'supervised'):
    c.probe[method].update(dict(epochs=3, warmup=0.2))
  c.ood.head.update(dict(momentum=0.9, batch_size=256, epochs=30, augment='none'))
  c.ood.finetune.update(dict(epochs=3, warmup=0.2))
  c.ood.supervised = 1  # that of the probe
  c.diversity.num_images = 1000
