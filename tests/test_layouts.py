"""The files of generators that people have: each form gives the same network, bit for bit."""

import argparse
import functools
import pathlib
import pickle
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy

from palm_jax.base.errors import UserError
from palm_jax.formats.kinds import AbsentError, SnapshotError
from palm_jax.generator import layouts, load_generator
from palm_jax.generator.convert import convert
from palm_jax.generator.snapshots import load_discriminator
from tests import snapshot_files as files
from tests.test_torch_files import damaged


def to_rosinality(tensors):
  """Official names as rosinality's convert_weight.py gives them, by its own loops."""
  t = dict(tensors)
  resolutions = sorted({int(n.split('.')[1][1:]) for n in t if n.startswith('synthesis.b')})
  filter4 = files.FILTER * 4
  state = {}
  for i in range(sum(n.startswith('mapping.fc') and n.endswith('bias') for n in t)):
    for kind in ('weight', 'bias'):
      state[f'style.{i + 1}.{kind}'] = t[f'mapping.fc{i}.{kind}']

  def conv(target, source, up):
    state[f'{target}.conv.weight'] = t[f'{source}.weight'][None]
    if up:
      state[f'{target}.conv.blur.kernel'] = filter4
    state[f'{target}.conv.modulation.weight'] = t[f'{source}.affine.weight']
    state[f'{target}.conv.modulation.bias'] = t[f'{source}.affine.bias']
    state[f'{target}.noise.weight'] = t[f'{source}.noise_strength'].reshape(1)
    state[f'{target}.activate.bias'] = t[f'{source}.bias']

  def to_rgb(target, source, up):
    state[f'{target}.bias'] = t[f'{source}.bias'].reshape(1, -1, 1, 1)
    if up:
      state[f'{target}.upsample.kernel'] = filter4
    state[f'{target}.conv.weight'] = t[f'{source}.weight'][None]
    state[f'{target}.conv.modulation.weight'] = t[f'{source}.affine.weight']
    state[f'{target}.conv.modulation.bias'] = t[f'{source}.affine.bias']

  state['input.input'] = t['synthesis.b4.const'][None]
  conv('conv1', 'synthesis.b4.conv1', False)
  to_rgb('to_rgb1', 'synthesis.b4.torgb', False)
  noises = [t['synthesis.b4.conv1.noise_const']]
  for i, r in enumerate(resolutions[1:]):
    conv(f'convs.{2 * i}', f'synthesis.b{r}.conv0', True)
    conv(f'convs.{2 * i + 1}', f'synthesis.b{r}.conv1', False)
    to_rgb(f'to_rgbs.{i}', f'synthesis.b{r}.torgb', True)
    noises += [t[f'synthesis.b{r}.conv{j}.noise_const'] for j in (0, 1)]
  return state | {f'noises.noise_{i}': x[None, None] for i, x in enumerate(noises)}


BUILDER = files.Builder(7)
MODULE = BUILDER.generator(5, 6, 0, (6, 4, 4), 3, layers=2)
STATE = {name.lstrip('.'): x for name, x in BUILDER.tensors.items()}


@pytest.fixture(scope='module')
def expected(tmp_path_factory):
  path = tmp_path_factory.mktemp('expected') / 'x.pkl'
  path.write_bytes(files.pickled({'G_ema': MODULE}))
  return load_generator(path)


def tensors(state):
  return {name: files.Tensor(x) for name, x in state.items()}


def prefixed(prefix, state):
  return {prefix + name: x for name, x in state.items()}


def npz(path, state, **settings):
  np.savez(path, **state, **{name: np.asarray(value) for name, value in settings.items()})


def forms(module, state):
  """{form: (suffix, how to write it)} of a module and its tensors."""
  rosinality = to_rosinality(state)
  average = files.Tensor(state['mapping.w_avg'])
  other = files.Persistent('Other', parameters={'w': files.Tensor(np.ones(3, np.float32))})
  rows = files.Tensor(np.tile(state['mapping.w_avg'], (6, 1)))
  trainer = files.foreign('somebody.train', 'Trainer')()
  trainer.__dict__.update(step=3, G_ema=module)
  config = files.foreign('somebody.config', 'Config', dict)(
    G_ema=module, args=argparse.Namespace(lr=0.1), where=pathlib.PurePosixPath('/data/x')
  )
  size = np.asarray([16, 16])
  plain = files.plain_module('training.networks', module)
  optimiser = {'state': {0: {'step': 1, 'exp_avg': average}}, 'param_groups': [{'params': [0]}]}
  bytes_ = lambda content: lambda path: path.write_bytes(content)
  return {
    'a state dict, zip': ('.pth', bytes_(files.zipped(tensors(state)))),
    'a state dict, before torch 1.6': ('.pt', bytes_(files.legacy(tensors(state)))),
    'a state dict as a pickle': ('.pkl', bytes_(files.pickled(tensors(state)))),
    'below state_dict': ('.ckpt', bytes_(files.zipped({'epoch': 3, 'state_dict': tensors(state)}))),
    'of DataParallel': ('.pt', bytes_(files.zipped(tensors(prefixed('module.', state))))),
    'an average beside it': (
      '.pt',
      bytes_(files.zipped({'G': tensors({**state, 'mapping.w_avg': 2 * state['mapping.w_avg']}),
                           'g_ema': tensors(state), 'optim': optimiser})),
    ),
    'averages by underscore': (
      '.pt', bytes_(files.zipped({'params_ema': tensors(state), 'params': tensors({})}))
    ),
    'a module': ('', bytes_(files.pickled(module, 4))),
    'a module, capitals': ('.PKL', bytes_(files.pickled(module, 2))),
    'a module without its source': ('.pt', bytes_(files.zipped(plain))),
    'D of another kind': ('.pickle', bytes_(files.pickled({'D': other, 'G_ema': module}, 5))),
    'in an object': ('.pkl', bytes_(files.pickled(trainer, 2))),
    'in a dict of a class of its own': ('.pkl', bytes_(files.pickled(config, 4))),
    'arrays and paths beside it': (
      '.pkl',
      bytes_(files.pickled({'G_ema': module, 'size': size, 'run': pathlib.PurePosixPath('/x')}, 4)),
    ),
    'rosinality': ('.pt', bytes_(files.zipped({'g_ema': tensors(rosinality),
                                               'latent_avg': average}))),
    'rosinality, alone': (
      '.pt', bytes_(files.zipped(tensors(rosinality | {'latent_avg': state['mapping.w_avg']})))
    ),
    'rosinality, training': (
      '.pt',
      bytes_(files.zipped({
        'g': tensors({**rosinality, 'style.1.bias': 2 * rosinality['style.1.bias']}),
        'd': tensors({'convs.0.0.weight': np.ones((2, 2), np.float32)}),
        'g_ema': tensors(rosinality), 'g_optim': optimiser,
        'args': argparse.Namespace(size=16), 'ada_aug_p': 0.3, 'latent_avg': average,
      })),
    ),
    'pSp': (
      '.pt',
      bytes_(files.zipped({
        'state_dict': tensors(prefixed('decoder.', rosinality)
                              | {'encoder.body.0.weight': np.ones((2, 2), np.float32)}),
        'opts': {'output_size': 16, 'device': 'cuda'}, 'latent_avg': rows,
      })),
    ),
    'npz': ('.npz', lambda path: npz(path, state)),
    'npz without a suffix': (
      '', lambda path: (npz(f'{path}.npz', state), shutil.move(f'{path}.npz', path))
    ),
    'npz with its multiplier': (
      '.npz',
      lambda path: npz(
        path, {n: x / 4 if 'mapping.fc' in n else x for n, x in state.items()}, lr_multiplier=0.04
      ),
    ),
    'safetensors with a prefix': (
      '.safetensors',
      lambda path: safetensors.numpy.save_file(prefixed('generator.', state), path),
    ),
    'safetensors with its multiplier': (
      '.st',
      lambda path: safetensors.numpy.save_file(
        {n: x / 4 if 'mapping.fc' in n else x for n, x in state.items()}, path,
        {'lr_multiplier': '0.04', 'activation': 'lrelu', 'conv_clamp': 'None', 'format': 'pt'},
      ),
    ),
  }  # fmt: skip


FORMS = forms(MODULE, STATE)


@pytest.mark.parametrize('form', FORMS)
def test_forms(form, expected, tmp_path):
  suffix, write = FORMS[form]
  path = tmp_path / f'network{suffix}'
  write(path)
  loaded = load_generator(path)
  assert loaded.network == expected.network
  jax.tree.map(np.testing.assert_array_equal, loaded.variables, expected.variables)


@pytest.mark.parametrize('form', [form for form in FORMS if not form.startswith('D of')])
def test_damaged_forms_end_in_one_line(form, expected, tmp_path):
  """Or in a network of finite numbers, where only these changed."""
  suffix, write = FORMS[form]
  path = tmp_path / f'network{suffix}'
  write(path)
  whole = path.read_bytes()
  rng = np.random.default_rng(0)
  for _ in range(10):
    path.write_bytes(damaged(whole, rng)[0])
    try:
      loaded = load_generator(path)
    except SnapshotError as e:
      assert '\n' not in str(e)
    else:
      assert all(np.isfinite(x).all() for x in jax.tree.leaves(loaded.variables))


def test_g_alone_is_asked_for(expected, tmp_path):
  path = tmp_path / 'x.pkl'
  path.write_bytes(files.pickled({'G': MODULE}))
  with pytest.raises(SnapshotError, match="no G_ema in it, but G: ask for that .*network='G'"):
    load_generator(path)
  assert load_generator(path, 'G').network == expected.network


def test_an_encoder_beside_a_generator_is_not_taken_for_it(tmp_path):
  """As where D looks with the features of another network."""
  path = tmp_path / 'x.pt'
  resnet = {'layer1.0.conv1.weight': np.ones((2, 2), np.float32)}
  path.write_bytes(files.zipped({'g_ema': tensors(STATE), 'd': tensors(resnet)}))
  with pytest.raises(AbsentError, match='no D in it'):
    load_discriminator(path)
  with pytest.raises(AbsentError, match='no G in it, but G_ema'):
    load_generator(path, 'G')


def test_an_average_of_w_is_drawn_where_there_is_none(expected, tmp_path, caplog):
  path = tmp_path / 'x.pt'
  path.write_bytes(files.zipped({'g_ema': tensors(to_rosinality(STATE))}))
  with caplog.at_level('INFO'):
    drawn = load_generator(path)
  assert 'the mean of 10000 drawn w' in caplog.text and 'lr_multiplier=0.01' in caplog.text
  z = np.random.default_rng(1).normal(size=(20_000, 5)).astype(np.float32)
  w = np.asarray(expected.network.apply(expected.variables, z, None, method='mapping'))[:, 0]
  error = w.std(0) / np.sqrt(10_000)
  assert (np.abs(drawn.variables['buffers']['w_avg'] - w.mean(0)) < 6 * error).all()


def test_noise_that_is_off(tmp_path):
  builder = files.Builder(7)
  module = builder.generator(5, 6, 0, (6, 4, 4), 3, layers=2)
  module.state['_modules']['synthesis'].state['_modules']['b8'].state['_modules'][
    'conv0'
  ].state.update(use_noise=False)
  path = tmp_path / 'x.pkl'
  path.write_bytes(files.pickled(module))
  b8 = load_generator(path).variables['params']['synthesis_network']['b8']
  assert b8['conv0']['noise_strength'] == 0 != b8['conv1']['noise_strength']
  silent = {n: x for n, x in STATE.items() if 'noise' not in n}
  npz(tmp_path / 'x.npz', silent)
  assert (
    load_generator(tmp_path / 'x.npz').variables['params']['synthesis_network']['b8']['conv1'][
      'noise_strength'
    ]
    == 0
  )


def test_a_base_that_is_not_square(tmp_path):
  wide = {
    n: np.repeat(x, 2, -1) if n.endswith(('.const', 'noise_const')) else x for n, x in STATE.items()
  }
  npz(tmp_path / 'wide.npz', wide)
  G = load_generator(tmp_path / 'wide.npz')
  assert G.image_shape == (16, 32, 3)
  assert jax.eval_shape(G, np.zeros((2, 5), np.float32), None).shape == (2, 16, 32, 3)
  convert(tmp_path / 'wide.npz', tmp_path / 'out')
  assert load_generator(tmp_path / 'out').network == G.network
  high = {n: x[:, 1:3] if n.endswith('.const') else x for n, x in STATE.items()}
  npz(tmp_path / 'low.npz', high)
  with pytest.raises(SnapshotError, match='2 x 4, expected a height of 4'):
    load_generator(tmp_path / 'low.npz')


def test_settings_of_arrays(tmp_path, caplog):
  small = {n: x / 100 if 'mapping.fc' in n else x for n, x in STATE.items()}
  npz(tmp_path / 'x.npz', small)
  with caplog.at_level('INFO'):
    load_generator(tmp_path / 'x.npz')
  assert 'conv_clamp=None, lr_multiplier=0.01, activation=lrelu: assumed' in caplog.text
  assert 'would make them, but it says none' in caplog.text
  caplog.clear()
  npz(tmp_path / 'x.npz', small, lr_multiplier=1.0, conv_clamp=256, activation='lrelu')
  with caplog.at_level('INFO'):
    load_generator(tmp_path / 'x.npz')
  assert 'assumed' not in caplog.text
  for name, value in (('activation', 'relu'), ('lr_multiplier', 'x'), ('lr_multiplier', np.nan)):
    npz(tmp_path / 'x.npz', STATE, **{name: value})
    with pytest.raises(SnapshotError, match=f'{name}='):
      load_generator(tmp_path / 'x.npz')


def test_averages_of_classes(tmp_path):
  """Truncation pulls towards the mean of the picture's own class, which is measured."""
  snapshot, _ = files.small_snapshot()
  (tmp_path / 'x.pkl').write_bytes(files.pickled(snapshot))
  convert(tmp_path / 'x.pkl', tmp_path / 'classes.safetensors', class_averages=True)
  G, one = load_generator(tmp_path / 'classes.safetensors'), load_generator(tmp_path / 'x.pkl')
  averages = G.variables['buffers']['w_avg']
  assert averages.shape == (3, 6)
  z = np.random.default_rng(0).normal(size=(3 * 4000, 5)).astype(np.float32)
  labels = np.arange(len(z)) % 3
  w = np.asarray(one.network.apply(one.variables, z, labels, method='mapping'))[:, 0]
  for k in range(3):
    mine = w[labels == k]
    assert (np.abs(averages[k] - mine.mean(0)) < 6 * mine.std(0) / np.sqrt(3000) + 1e-3).all()
  mapped = lambda network, variables, psi: np.asarray(
    network.apply(variables, z[:6], labels[:6], method='mapping', truncation_psi=psi)
  )
  np.testing.assert_allclose(
    mapped(G.network, G.variables, 0.0)[:, 0], averages[labels[:6]], rtol=1e-6
  )
  np.testing.assert_allclose(
    mapped(G.network, G.variables, 1.0), mapped(one.network, one.variables, 1.0), atol=0.02
  )
  with pytest.raises(UserError, match='without classes'):
    npz(tmp_path / 'x.npz', STATE)
    convert(tmp_path / 'x.npz', tmp_path / 'no.safetensors', class_averages=True)


@pytest.mark.parametrize(
  'names, words',
  [
    (['mapping.embed_proj.weight', 'synthesis.input.freqs'], 'it is StyleGAN-XL'),
    (['backbone.synthesis.b4.const'], 'it is EG3D'),
    (['init.init.1.weight_orig', 'feat_8.1.weight_orig'], 'it is FastGAN'),
    (['generator.progression.0.conv1.conv.weight_orig'], 'it is StyleGAN1'),
    (['scaleLayers.0.0.module.weight'], 'it is a progressive GAN'),
    (['style_mlp.1.weight'], 'StyleGAN2 of BasicSR'),
    (['model.diffusion_model.time_embed.0.weight'], 'a diffusion model'),
    (['layer1.0.conv1.weight', 'fc.weight'], 'an encoder'),
    (['b4.conv.weight'], 'no G_ema in it'),
    (['whatever'], 'expected a snapshot or state_dict of StyleGAN2 or 3'),
  ],
)
def test_other_kinds_are_named(names, words, tmp_path):
  path = tmp_path / 'x.pth'
  path.write_bytes(files.zipped(tensors({name: np.ones(2, np.float32) for name in names})))
  with pytest.raises(SnapshotError, match=words) as caught:
    load_generator(path)
  assert '\n' not in str(caught.value)


def test_addresses_and_packed_files(tmp_path):
  with pytest.raises(UserError, match='an address, and nothing is downloaded'):
    load_generator('https://example.org/network.pkl')
  for content, words in (
    (b'\x1f\x8b\x08', 'gunzip'),
    (pickle.dumps({'G': 1}, 0), 'protocol 0 or 1'),
    (pickle.dumps({'G': 1}, 1), 'protocol 0 or 1'),
  ):
    (tmp_path / 'x').write_bytes(content)
    with pytest.raises(SnapshotError, match=words):
      load_generator(tmp_path / 'x')


@functools.lru_cache
def drawing(network):
  return jax.jit(network.apply, static_argnames='noise')


WILD = {
  'D_by_reference.pkl': ('ada16', 'G_ema'),
  'statedict.pkl': ('ada16', 'G_ema'),
  'state_dict.pth': ('ada16', 'G_ema'),
  'bare_module.pkl': ('ada16', 'G_ema'),
  'onlyG.pkl': ('ada16', 'G'),
  'rosinality.pt': ('rosinality', 'G_ema'),
  'rectangular.pkl': ('rectangular', 'G_ema'),
}


@pytest.mark.parametrize('name', WILD)
def test_files_of_the_original_programs(name, shared):
  reference, network = WILD[name]
  folder = shared / 'fixtures' / 'wild'
  G = load_generator(folder / name, network)
  with np.load(folder / f'{reference}.ref.npz') as arrays, jax.default_matmul_precision('highest'):
    z = arrays['z'].astype(np.float32)
    for key in set(arrays) - {'z'}:
      noise, psi = key.split('_')
      cutoff = int(noise[3:]) if noise.startswith('cut') else G.network.num_ws
      noise = 'none' if noise == 'none' else 'const'
      images = drawing(G.network)(G.variables, z, None, float(psi), cutoff, noise=noise)
      assert np.abs(images - arrays[key]).max() < 1e-5 * np.ptp(arrays[key]), key


def test_one_network_under_many_names_is_looked_at_once(monkeypatch):
  """References make a small file large: each name would cost the whole network again."""
  looked, whole = [], layouts.state_dict
  monkeypatch.setattr(layouts, 'state_dict', lambda x: looked.append(1) or whole(x))
  tensors = {'synthesis.b4.const': np.zeros((2, 4, 4), np.float32)}
  found = layouts.find({f'k{i}': tensors for i in range(500)} | {'G_ema': tensors}, 'G_ema')
  assert found.label == 'G_ema' and len(looked) == 1
  with pytest.raises(SnapshotError, match='G is in it more than once'):
    layouts.find({f'{i}': {'G': tensors} for i in range(500)}, 'G')
  many = {f'n{i}.synthesis.b4.const': tensors['synthesis.b4.const'] for i in range(500)}
  with pytest.raises(SnapshotError, match='more networks than a snapshot does'):
    layouts.find({'G_ema': many}, 'G_ema')


def test_references_do_not_multiply_a_file(monkeypatch):
  """A dict of tensors, or a part of modules, under very many names."""
  places = layouts._places
  tensors = {f't{i}': np.zeros(1, np.float32) for i in range(100)}
  found = []
  monkeypatch.setattr(layouts, '_places', lambda x: found.extend(places(x)) or found)
  with pytest.raises(SnapshotError, match='no G_ema in it'):
    layouts.find({f'k{i}': tensors for i in range(2000)}, 'G_ema')
  assert len(found) == 2000 and len({id(arrays) for _, arrays in found}) == 1
  monkeypatch.setattr(layouts, 'MAX_TENSORS', 1000)
  with pytest.raises(SnapshotError, match='too many tensors'):
    layouts.find({f'k{i}': dict(tensors) for i in range(11)}, 'G_ema')
