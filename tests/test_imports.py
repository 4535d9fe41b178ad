"""The import law (palm_jax/README.md): arrows point one way, and there is no circle."""

import ast
import graphlib
import pathlib

ROOT = pathlib.Path(__file__).parents[1]
# A module imports from its own room and from those named. A longer name is the stricter rule.
PARTS = 'environment replay resnet vit heads contrastive augment reward sac experience'.split()
PARTS += ['optimizer']
SEEING = ['encoder', 'objectives', 'simsiam']
PLAYER = ['agent', 'curiosity', 'actor_critic']
WORK = [*PARTS, *SEEING, *PLAYER, 'material', 'rollout', 'pairs', 'setup', 'worlds', 'monitors']
METHOD = ['base', 'layers', 'formats', 'data', 'checkpoint', 'generator', *WORK, 'pretrain']
JOB = [*METHOD, 'job']
LAW = {
  'base': [],
  'layers': ['base'],
  'formats': ['base'],
  'data': ['base'],
  'checkpoint': ['base'],
  **{part: ['layers', 'base'] for part in PARTS},
  'encoder': ['layers', 'base', 'resnet', 'vit'],
  'objectives': ['base', 'contrastive'],
  'simsiam': ['base', 'contrastive', 'heads', 'objectives', 'layers'],
  'reward': ['layers', 'base', 'contrastive'],
  'actor_critic': [],
  'sac': ['base', 'actor_critic'],
  'curiosity': ['base', 'contrastive', 'actor_critic'],
  'agent': ['base', 'curiosity', 'reward', 'sac'],
  'material': ['base', 'data', 'experience'],
  'rollout': ['layers', 'base', 'environment', 'replay', 'agent', 'experience'],
  'pairs': ['base', 'rollout', 'replay'],
  'generator': ['layers', 'formats', 'base', 'checkpoint'],
  'generator.sample': ['layers', 'base', 'environment', 'rollout', 'generator'],
  'generator.train': ['base', 'generator', 'job'],
  'worlds': ['base', 'data', 'generator', 'environment', 'material', 'pairs', 'rollout'],
  'setup': ['base', 'worlds', 'rollout', 'pairs', 'replay', 'augment', 'optimizer', *SEEING],
  'monitors': ['environment', 'rollout', 'setup'],
  'pretrain': METHOD,
  'export': ['base', 'formats', 'checkpoint', 'encoder'],
  # Who calls an encoder computes as evaluations do; a card's pictures are of the run's world.
  'zoo': ['base', 'formats', 'checkpoint', 'encoder', 'export', 'evaluate.features'],
  'zoo.bundle': [
    *('layers', 'base', 'generator', 'environment', 'experience', 'worlds', 'export', 'zoo')
  ],
  'zoo.hub': ['base', 'generator', 'zoo'],
  'job': ['base', 'data'],
  'workdir': ['base', 'job'],
  'train': [*JOB, 'speed.cost'],
  'world': ['layers', 'base', 'environment', 'generator', 'encoder', 'reward', 'checkpoint'],
  'world.dataset': ['base', 'checkpoint', 'environment', 'experience', 'replay', 'worlds', 'world'],
  'play': [*METHOD, 'world', 'evaluate.play'],
  'meta': [*JOB, 'world'],
  'evaluate': JOB,
  'atari': JOB,
  'speed': [*JOB, 'world'],
  'offline': [*JOB, 'world'],
  'report': [*JOB, 'evaluate.features', 'workdir'],
  'study': [*JOB, 'workdir'],
  'settings': ['base'],
  'provenance': ['base', 'data', 'job', 'workdir'],
  'runner': ['base', 'data', 'job', 'workdir', 'provenance', 'settings'],
  'main': ['base', 'runner'],
  '__main__': ['base'],  # commands by name
}


def modules():
  """{'rollout': path, 'report': .../report/__init__.py, 'report.page': ...}."""
  found = {}
  for path in (ROOT / 'palm_jax').rglob('*.py'):
    name = '.'.join(path.relative_to(ROOT / 'palm_jax').with_suffix('').parts)
    found[name.removesuffix('.__init__')] = path
  del found['__init__']
  return found


def imports(path, known):
  """Names of the modules that a file imports, inside functions too."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    if isinstance(node, ast.ImportFrom):
      assert not node.level, f'{path}: a relative import'
      names = [f'{node.module}.{alias.name}' for alias in node.names]
    for name in names:
      name = name.removeprefix('palm_jax.') if name.startswith('palm_jax.') else ''
      while name and name not in known:
        name = name.rpartition('.')[0]
      found |= {name} - {''}
  return found


def broken(name, target):
  """Whether the law forbids that the module `name` imports `target`."""
  law = max((key for key in LAW if f'{name}.'.startswith(f'{key}.')), key=len)
  room = name.partition('.')[0]
  allowed = [*LAW[law], *([room] if law == room else [])]
  return not any(f'{target}.'.startswith(f'{key}.') for key in allowed)


def test_arrows_point_one_way():
  known = modules()
  arrows = {name: imports(path, known) - {name} for name, path in known.items()}
  assert not [
    f'{name} -> {x}' for name, targets in arrows.items() for x in targets if broken(name, x)
  ]
  # A package's __init__ is imported before its modules, which is no circle.
  inside = lambda name, x: name.startswith(f'{x}.')
  graph = {name: {x for x in xs if not inside(name, x)} for name, xs in arrows.items()}
  graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def test_a_turned_arrow_is_seen():
  assert broken('reward', 'sac') and broken('base.files', 'checkpoint')
  assert broken('generator.step', 'rollout') and not broken('generator.sample', 'rollout')
  assert broken('evaluate.probe', 'runner') and broken('study', 'main')
  assert broken('report.sections', 'evaluate.probe')
