"""The zoo: encoders that can be called, their files and cards, and the way to the hub and back."""

import dataclasses
import importlib
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

import palm_jax
from palm_jax import encoder, export
from palm_jax.base import digests, files
from palm_jax.base.checkpoints import Checkpoints
from palm_jax.base.errors import UserError
from palm_jax.base.results import write_result
from palm_jax.encoder import make_encoder
from palm_jax.generator import load_generator, save_safetensors
from palm_jax.generator.convert import convert
from palm_jax.generator.stylegan2 import Generator
from palm_jax.zoo import bundle, card, hub, loaded
from tests import fake_hub
from tests.test_encoder import random_variables

ROOT = pathlib.Path(__file__).parents[1]
SETTINGS = dict(encoder.default_config(), width=3)
STEP = 7


@pytest.fixture(scope='module')
def variables():
  return random_variables(make_encoder(ConfigDict(SETTINGS)), (2, 8, 8, 3))


@pytest.fixture(scope='module')
def images():
  return np.random.default_rng(0).integers(0, 256, (11, 8, 8, 3), np.uint8)


@pytest.fixture(scope='module')
def workdir(variables, tmp_path_factory):
  """A finished run with a generator of its own, a probe and an OOD result."""
  folder = tmp_path_factory.mktemp('runs') / 'tiny'
  network = Generator(
    z_dim=6, w_dim=5, num_classes=3, channels=(4, 4), image_channels=3, mapping_layers=2
  )
  weights = jax.jit(network.init)(jax.random.key(0), jnp.zeros((1, 6)), jnp.zeros(1, jnp.int32))
  file = folder.parent / 'g.safetensors'
  save_safetensors(file, network, jax.device_get(weights), 'of a test')
  convert(file, folder / 'generator')
  config = dict(
    name='tiny',
    seed=4,
    data=dict(name='/home/someone/private/train.npz'),
    generator=dict(path=''),
    environment=dict(alpha=0.5),
    pretrain=dict(num_envs=4, rollout_length=2),
    encoder=SETTINGS,
  )
  (folder / 'config.json').write_text(json.dumps(config))
  with Checkpoints(folder / 'pretrain' / 'checkpoints') as checkpoints:
    changed = jax.tree.map(lambda x: x + np.float32(0.1), variables)
    checkpoints.save(3, {'encoder': changed}, {})
    checkpoints.save(STEP, {'encoder': variables}, {'world': 'f' * 64})
  write_results(folder, digests.digest(variables, SETTINGS))
  return folder


def write_results(folder, sha256):
  """Results as the jobs write them, as far as a card reads them."""
  pretrain = dict(
    job='pretrain', checkpoint_step=STEP, env_steps=56, seconds=1.5, devices='1 x cpu'
  )
  row = dict(features='PALM encoder', F=24, labels='fine', num_classes=3, fraction=1.0, draw=0)
  row |= dict(n_train=100, n_test=50, half_width=0.1, seconds=1.0)
  rows = [dict(row, method='lbfgs', accuracy=dict(clean=0.625))]
  rows += [dict(row, method='knn', accuracy=dict(clean=0.5))]
  protocol = dict(data='/data/pictures/train.npz', seed=4, encoder_sha256=sha256)
  probe = dict(job='probe', rows=rows, protocol=protocol)
  auroc = dict(mean=0.75, sd=0.01, values=[0.74, 0.76])
  ood = dict(encoder='PALM encoder', score='msp', set='svhn', n_id=50, n=40, trials=2, auroc=auroc)
  seen = dict(seeds=[4, 5], encoders={'PALM encoder': [dict(sha256=sha256)]})
  heads = {'PALM encoder': dict(mean=0.6, sd=0.1, values=[0.5, 0.7])}
  for result in (pretrain, probe, dict(job='ood', rows=[ood], accuracy=heads, protocol=seen)):
    write_result(folder / 'results' / f'{result["job"]}.json', result, {}, {})


@pytest.fixture(scope='module')
def written(workdir, tmp_path_factory):
  """What the command writes of it."""
  folder = tmp_path_factory.mktemp('zoo')
  return bundle.write(workdir, 'palm-tiny', folder, licence='Apache-2.0', command='palm --seed 4')


@pytest.fixture
def bundled(written, tmp_path, monkeypatch):
  """As if the package had it."""
  for path in (written, written.with_suffix('.json')):
    (tmp_path / path.name).write_bytes(path.read_bytes())
  monkeypatch.setattr(loaded, 'BUNDLED', tmp_path)


def applied(settings, variables, images):
  """Features by the network itself."""
  network = make_encoder(ConfigDict(settings))
  return np.asarray(jax.jit(lambda v, x: network.apply(v, x, train=False))(variables, images))


def assert_close(h, expected):
  assert h.shape == expected.shape and h.dtype == np.float32
  np.testing.assert_allclose(h, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


# ---- a call


def test_features_are_those_of_the_network(workdir, variables, images):
  """In one batch, in several with a rest, of floats, and of JAX's arrays."""
  expected = applied(SETTINGS, variables, images)
  found = palm_jax.load_encoder(workdir)
  assert (found.name, found.features, found.image_shape) == ('tiny', 24, (None, None, 3))
  assert found.settings == SETTINGS and found.card is None
  assert_close(found(images), expected)
  assert_close(found(images, batch_size=4), expected)
  assert_close(found(jnp.asarray(images)), expected)
  assert_close(found(images.astype(np.float64) / 127.5 - 1), expected)
  assert_close(found(images[:3]), expected[:3])
  assert found(images[:0]).shape == (0, 24)
  assert_close(np.asarray(jax.jit(found.apply)(found.variables, images)), expected)


def test_calls_of_any_number_share_few_programs(written, images, monkeypatch):
  shapes = set()
  count = lambda apply, batches, n: loaded_batches(apply, note(batches, shapes), n)
  loaded_batches = loaded.extract_batches
  monkeypatch.setattr(loaded, 'extract_batches', count)
  found = palm_jax.load_encoder(written)
  for n in range(1, 10):
    found(images[:n], batch_size=8)
  assert {shape[0] for shape in shapes} == {1, 2, 4, 8}


def note(batches, shapes):
  for batch in batches:
    shapes.add(batch.shape)
    yield batch


@pytest.mark.parametrize(
  'make, message',
  [
    (lambda x: x[0], r'uint8 of shape \(8, 8, 3\), expected \(N, H, W, 3\).*images\[None\]'),
    (lambda x: x.transpose(0, 3, 1, 2), r'transpose\(0, 2, 3, 1\)'),
    (lambda x: x[..., :1], r'shape \(11, 8, 8, 1\), expected \(N, H, W, 3\) uint8'),
    (lambda x: x.astype(np.int64), r'int64 .*astype\(numpy.uint8\)'),
    (lambda x: x / 255 * 2, r'floats from 0 to 2, expected \[-1, 1\]: scale'),
    (lambda x: x * np.nan, r'floats from nan'),
    (lambda x: x.tolist(), r'are a list, expected'),
    (lambda x: x[:, :0], r'shape \(11, 0, 8, 3\)'),
  ],
)
def test_other_images_are_refused_in_one_line(written, images, make, message):
  with pytest.raises(UserError, match=message) as e:
    palm_jax.load_encoder(written)(make(images))
  assert '\n' not in str(e.value)
  with pytest.raises(UserError, match='batch_size is 0'):
    palm_jax.load_encoder(written)(images, batch_size=0)


@pytest.mark.parametrize(
  'settings, side, shape, wrong',
  [
    (dict(name='vit_tiny', width=2, patch=4), 8, (8, 8, 3), r'9x9.*takes H and W 8; resize'),
    (dict(name='nature', features=5), 36, (36, 36, 3), r'9x9.*takes H and W 36 to 43; resize'),
  ],
)
def test_sizes_of_others(tmp_path, settings, side, shape, wrong):
  """A transformer and the Nature CNN take only some sizes."""
  settings = dict(encoder.default_config(), **settings)
  images = np.random.default_rng(0).integers(0, 256, (2, side, side, 3), np.uint8)
  variables = random_variables(make_encoder(ConfigDict(settings)), images.shape)
  export.save(tmp_path / 'e.safetensors', 'safetensors', settings, variables, 0)
  found = palm_jax.load_encoder(tmp_path / 'e.safetensors')
  assert found.image_shape == shape and found.name == 'e'
  assert_close(found(images), applied(settings, variables, images))
  with pytest.raises(UserError, match=wrong):
    found(np.zeros((2, 9, 9, 3), np.uint8))


# ---- names and paths


def test_a_name_a_file_and_a_run_are_found(bundled, written, workdir, images, variables):
  by_name = palm_jax.load_encoder('palm-tiny')
  assert loaded.names() == ('palm-tiny',) and by_name.image_shape == (8, 8, 3)
  assert by_name.card == json.loads(written.with_suffix('.json').read_text())
  np.testing.assert_array_equal(by_name(images), palm_jax.load_encoder(written)(images))
  exported, _ = export.export(workdir, out=written.with_name('whole.safetensors'))
  assert_close(palm_jax.load_encoder(exported)(images), applied(SETTINGS, variables, images))
  assert palm_jax.load_encoder(exported).card is None


@pytest.mark.parametrize(
  'name, message',
  [
    ('palm-tinny', r"'palm-tinny' is neither .*bundled are palm-tiny \(did you mean palm-tiny\?\)"),
    ('absent/e.safetensors', r'absent/e.safetensors: no such file or folder; bundled'),
    ('someone/palm', r'on the hub, run `palm pull --repo=someone/palm` first'),
    ('hf:someone/palm', r'unasked; run `palm pull --repo=someone/palm --out=palm.safetensors`'),
    ('https://example.org/e.safetensors', r'is an address, and nothing is downloaded'),
    ('x' * 5000, r'cannot be looked for'),
    ('a\0b', r'cannot be looked for'),
    ('', r"encoder '': expected the name of a bundled one, a file or a run's workdir"),
    (None, r'encoder None: expected the name'),
    (3, r'encoder 3: expected the name'),
  ],
)
def test_names_that_are_nowhere(bundled, tmp_path, monkeypatch, name, message):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(UserError, match=message):
    palm_jax.load_encoder(name)


def test_paths_in_the_home_folder(workdir, monkeypatch):
  monkeypatch.setenv('HOME', str(workdir.parent))
  path, _ = export.export('~/tiny', out='~/home.safetensors')
  assert path == workdir.parent / 'home.safetensors' and export.load('~/home.safetensors')
  for there in ('~/tiny', '~/home.safetensors'):
    assert palm_jax.load_encoder(there).features == 24
  assert load_generator('~/tiny').z_dim == 6


def test_without_bundled_encoders_paths_are_read(written, tmp_path, monkeypatch):
  monkeypatch.setattr(loaded, 'BUNDLED', tmp_path / 'absent')
  assert loaded.names() == () and palm_jax.load_encoder(str(written)).features == 24
  with pytest.raises(UserError, match="'palm' is neither .* bundled are none: give"):
    palm_jax.load_encoder('palm')


def test_other_files_and_folders_are_refused(written, workdir, tmp_path):
  with pytest.raises(UserError, match='config.json is missing'):
    palm_jax.load_encoder(tmp_path)
  with pytest.raises(UserError, match='--format=safetensors'):
    palm_jax.load_encoder(workdir.parent / 'g.safetensors')
  content = written.read_bytes()
  path = tmp_path / 'e.safetensors'
  path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
  with pytest.raises(UserError, match='e.safetensors is damaged'):
    palm_jax.load_encoder(path)


def test_a_card_of_another_file_is_left_out(written, tmp_path):
  path = tmp_path / 'e.safetensors'
  path.write_bytes(written.read_bytes())
  for text in ('{', '[]', '{"file_sha256": "other"}', '{"lr": 1}'):
    path.with_suffix('.json').write_text(text)
    assert palm_jax.load_encoder(path).card is None


def test_importing_the_package_imports_no_encoder():
  code = 'import palm_jax, sys; assert "jax" not in sys.modules; print(palm_jax.load_encoder)'
  done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
  assert 'function load_encoder' in done.stdout, done.stderr


def test_what_is_bundled_is_small_whole_and_described():
  """All of the package's own."""
  assert 'palm-cifar10-small' in loaded.names()
  for name in loaded.names():
    path = loaded.BUNDLED / f'{name}.safetensors'
    assert path.stat().st_size <= 3_000_000
    found = palm_jax.load_encoder(name)
    assert found.card and found.card['name'] == name and found.card['licence']
    assert found.card['made']['complete'] and found.card['results']['probe']['rows']
    pictures = np.zeros((1, *found.card['image_shape']), np.uint8)
    assert np.isfinite(found(pictures)).all()


# ---- files and cards


def test_kernels_lose_eleven_bits_and_vectors_none(written, variables):
  _, stored, metadata = export.load(written)
  assert json.loads(metadata['image_shape']) == [8, 8, 3] and metadata['checkpoint_step'] == '7'
  of = lambda tree: dict(jax.tree_util.tree_leaves_with_path(tree))
  was, now = of(variables), of(stored)
  assert was.keys() == now.keys()
  for path, x in was.items():
    if x.ndim < 2:
      assert now[path].dtype == np.float32 and now[path].tobytes() == x.tobytes()
    else:
      assert now[path].dtype == np.float16
      error = np.abs(now[path].astype(np.float64) - x)
      assert (error <= 2.0**-11 * np.abs(x) + 2.0**-25).all()  # the second: of subnormal numbers


def test_features_of_the_file_are_near_and_exported_files_usage_runs_it(written, variables, images):
  expected = applied(SETTINGS, variables, images)
  found = palm_jax.load_encoder(written)
  change = np.linalg.norm(found(images) - expected, axis=1) / np.linalg.norm(expected, axis=1)
  assert 0 < change.max() < bundle.TOLERANCE
  names = dict(path=str(written), images=images)
  exec(export.load(written)[2]['usage'], names)
  assert_close(np.asarray(names['features']), found(images))


def test_the_card_says_how_it_was_made_and_what_was_measured(written, variables, workdir):
  about = json.loads(written.with_suffix('.json').read_text())
  made = about['made']
  assert about['name'] == 'palm-tiny' and about['licence'] == 'Apache-2.0'
  assert about['file_sha256'] == digests.file_digest(written)
  assert about['file_bytes'] == written.stat().st_size
  assert about['encoder_sha256'] == digests.digest(variables, SETTINGS)
  assert about['encoder'] == SETTINGS and about['image_shape'] == [8, 8, 3]
  assert about['parameters'] == sum(x.size for x in jax.tree.leaves(variables['params']))
  assert about['palm_jax_version'] == palm_jax.__version__
  assert made['config_name'] == 'tiny' and made['seed'] == 4 and made['command'] == 'palm --seed 4'
  assert made['complete'] and made['env_steps'] == 56 and made['checkpoint_step'] == STEP
  assert made['generator'] == dict(name="the run's own", sha256='f' * 64)
  assert about['config']['environment'] == dict(alpha=0.5)
  difference = about['difference']
  assert 0 < difference['largest'] < difference['tolerance'] == bundle.TOLERANCE
  assert difference['n'] == bundle.PICTURES
  probe, ood = about['results']['probe'], about['results']['ood']
  assert [row['accuracy']['clean'] for row in probe['rows']] == [0.625, 0.5]
  assert probe['rows'][0]['n_test'] == 50 and probe['protocol']['seed'] == 4
  assert ood['rows'][0]['auroc'] == dict(mean=0.75, sd=0.01) and ood['rows'][0]['n'] == 40
  assert ood['protocol']['seeds'] == [4, 5]
  text = written.with_suffix('.json').read_text()
  assert 'train.npz' in text and 'someone' not in text and '/data/' not in text
  found = card.as_text(about, 'use = 1')
  for words in ('62.50 +- 10.00', '| lbfgs |', '75.0 +- 1.0', 'use = 1', about['file_sha256']):
    assert words in found
  assert re.match(r'---\n(?:.+\n)*license: apache-2.0\n(?:.+\n)*---\n', found)


@pytest.mark.parametrize(
  'text, expected',
  [
    ('/home/me/train.npz,/home/me/test.npz', 'train.npz,test.npz'),
    ('celeba:/data/celeba/', 'celeba:'),
    ('lsun=~/sets/lsun.mat', 'lsun=lsun.mat'),
    (r'C:\sets\x.npz', 'x.npz'),
    ('/home/Jane Doe/a.npz,/home/Jane Doe/b (2).npz', 'a.npz,b (2).npz'),
    (r'\\server\share\x.npz', 'x.npz'),
    ('~/my runs/cifar/', 'cifar'),
    ('runs/cifar', 'runs/cifar'),
    ('x / 127.5 - 1, linear/kNN', 'x / 127.5 - 1, linear/kNN'),
    ('https://example.org/a/b', 'https://example.org/a/b'),
  ],
)
def test_folders_of_the_machine_are_left_out(text, expected):
  assert card.without_folders({'a': [text, 1, None]}) == {'a': [expected, 1, None]}


def test_results_of_another_encoder_are_refused(workdir, tmp_path):
  with pytest.raises(UserError, match=r'probe.json is about another encoder .*--step'):
    bundle.write(workdir, 'earlier', tmp_path, step=3)
  assert not list(tmp_path.iterdir())


def test_an_unfinished_run_says_so(workdir, tmp_path):
  run = tmp_path / 'run'
  run.mkdir()
  for name in ('config.json', 'generator', 'pretrain'):
    (run / name).symlink_to(workdir / name)
  path = bundle.write(run, 'e', tmp_path, step=3)
  about = json.loads(path.with_suffix('.json').read_text())
  assert not about['made']['complete'] and about['made']['env_steps'] == 3 * 4 * 2
  assert about['results'] == dict(probe=None, ood=None) and about['licence'] == ''
  assert '24, the pretraining was not complete' in card.as_text(about, '')
  (run / 'results').mkdir()
  (run / 'results' / 'ood.json').write_text('{')
  with pytest.raises(UserError, match='ood.json is damaged'):
    bundle.write(run, 'e', tmp_path, step=3)
  finetuned = dict(job='ood', rows=[], accuracy={}, protocol=dict(encoders={'fine-tuned': []}))
  write_result(run / 'results' / 'ood.json', finetuned, {'pretrain': {'step': 3}}, {})
  bundle.write(run, 'e', tmp_path, step=3)
  with pytest.raises(UserError, match=f'of the checkpoint at step 3, this is step {STEP}: run'):
    bundle.write(run, 'e', tmp_path, step=STEP)


def test_numbers_that_float16_does_not_hold_are_refused(written, variables, images):
  params = dict(variables['params'])
  params['stem_conv'] = dict(kernel=params['stem_conv']['kernel'] * np.float32(1e6))
  with pytest.raises(UserError, match='params/stem_conv/kernel has numbers that float16 does not'):
    bundle.halved(dict(variables, params=params))
  found = palm_jax.load_encoder(written)
  other = dataclasses.replace(found, variables=variables)
  assert bundle.difference(found, other, images)['largest'] < bundle.TOLERANCE
  far = jax.tree.map(lambda x: x * np.float32(1.01), variables)
  with pytest.raises(UserError, match='differ by .* of their length'):
    bundle.difference(found, dataclasses.replace(found, variables=far), images)


def test_of_stacked_blocks_each_has_its_own_axes():
  stacked = dict(norm1=dict(scale=np.ones((12, 8), np.float32)))
  stacked['dense'] = dict(kernel=np.ones((12, 8, 8), np.float32))
  found = bundle.halved(dict(params=dict(blocks=stacked, head=dict(kernel=np.ones((8, 8))))))
  types = jax.tree.map(lambda x: str(x.dtype), found['params'])
  assert types['blocks'] == dict(norm1=dict(scale='float32'), dense=dict(kernel='float16'))
  assert types['head'] == dict(kernel='float16')


@pytest.mark.parametrize(
  'arguments, message',
  [
    (dict(name='a/b'), r'--name=a/b: expected'),
    (dict(name='e.safetensors'), r'without .safetensors'),
    (dict(name='e', licence='my own'), r'--licence=my own: expected an SPDX'),
    (dict(name='e', out='absent'), r'--out=absent: no such folder'),
    (dict(name='e', step=5), r'no checkpoint step 5, only \[3, 7\]'),
  ],
)
def test_refusals(workdir, tmp_path, monkeypatch, arguments, message):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(UserError, match=message):
    bundle.write(workdir, **arguments)
  assert not list(tmp_path.iterdir())


def test_a_file_that_is_no_card_is_not_replaced(workdir, monkeypatch):
  monkeypatch.setenv('HOME', str(workdir.parent))
  before = (workdir / 'config.json').read_text()
  with pytest.raises(UserError, match=f'^{workdir}/config.json is there and no card .*--name'):
    bundle.write('~/tiny', 'config')
  assert (workdir / 'config.json').read_text() == before
  assert not (workdir / 'config.safetensors').exists()


def test_a_card_is_replaced(workdir, tmp_path):
  for licence in ('MIT', 'Apache-2.0'):
    path = bundle.write(workdir, 'e', tmp_path, licence=licence)
  assert json.loads(path.with_suffix('.json').read_text())['licence'] == licence


def test_frames_as_channels_are_drawn_as_such(workdir):
  config = dict(generator=dict(path=''), environment=dict(stack=2, crop=1))
  pictures, about = bundle.world_of(workdir, config, 3)
  assert pictures.shape == (bundle.PICTURES, 6, 6, 6) and pictures.dtype == np.uint8
  assert not np.array_equal(pictures[..., :3], pictures[..., 3:])
  generator = load_generator(workdir)
  assert about['sha256'] == digests.digest(generator.variables, {})  # the checkpoint names none


# ---- the hub


@pytest.fixture
def server(monkeypatch, tmp_path):
  """A hub on this machine that knows us; nothing is asked of any other."""
  constants = pytest.importorskip('huggingface_hub.constants')
  with fake_hub.running() as found:
    template = found.url + '/{repo_id}/resolve/{revision}/{filename}'
    for module in (constants, importlib.import_module('huggingface_hub.file_download')):
      # Versions before 1 have copies in the second.
      monkeypatch.setattr(module, 'ENDPOINT', found.url, raising=False)
      monkeypatch.setattr(module, 'HUGGINGFACE_CO_URL_TEMPLATE', template, raising=False)
    monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', True, raising=False)
    monkeypatch.setattr(constants, 'HF_TOKEN_PATH', str(tmp_path / 'no token'))
    monkeypatch.setenv('HF_TOKEN', fake_hub.TOKEN)
    yield found


@pytest.fixture
def shared(server, workdir):
  """The commit of the encoder in me/palm."""
  return hub.push(workdir, 'me/palm', licence='Apache-2.0')


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """An empty one to work in."""
  path = tmp_path / 'here'
  path.mkdir()
  monkeypatch.chdir(path)
  return path


def test_what_is_pulled_is_what_was_pushed(server, shared, folder, written, images):
  path, commit = hub.pull('me/palm')
  assert commit == shared and {p.name for p in folder.iterdir()} == {
    'palm.safetensors',
    'palm.json',
  }
  assert path.read_bytes() == server.files('me/palm')[0]['encoder.safetensors']
  found = palm_jax.load_encoder(path)
  np.testing.assert_array_equal(found(images), palm_jax.load_encoder(written)(images))
  assert found.card['name'] == 'palm' and found.card['results']['probe']
  readme = server.files('me/palm')[0]['README.md'].decode()
  assert "load_encoder('palm.safetensors')" in readme and '62.50' in readme
  assert 'me/palm' not in server.private
  assert hub.pull('me/palm')[0] == path  # once more: the same, and nothing to replace


def test_a_generator_goes_the_same_way(server, workdir, folder):
  hub.push(workdir, 'me/world', 'generator', private=True)
  path, _ = hub.pull('me/world', out='w.safetensors')
  assert server.private == {'me/world'} and [p.name for p in folder.iterdir()] == [path.name]
  assert path.read_bytes() == server.files('me/world')[0]['generator.safetensors']
  ours = load_generator(workdir)
  for x, y in zip(
    jax.tree.leaves(load_generator(path).variables), jax.tree.leaves(ours.variables), strict=True
  ):
    np.testing.assert_allclose(x, y, rtol=2.0**-10, atol=1e-6)
  with pytest.raises(UserError, match='me/world holds generator.safetensors already'):
    hub.push(workdir, 'me/world')


def test_an_earlier_commit_can_be_had(server, shared, workdir, folder):
  second = hub.push(workdir, 'me/palm', licence='MIT')
  assert second != shared and len(server.repos['me/palm']) == 3
  assert hub.pull('me/palm', revision=shared, out='old.safetensors')[1] == shared
  assert palm_jax.load_encoder('old.safetensors').card['licence'] == 'Apache-2.0'
  with pytest.raises(UserError, match='--revision=nothing: me/palm has no such branch'):
    hub.pull('me/palm', revision='nothing')
  with pytest.raises(UserError, match='old.safetensors is there and differs'):
    hub.pull('me/palm', out='old.safetensors')
  assert palm_jax.load_encoder('old.safetensors').card['licence'] == 'Apache-2.0'


def test_without_a_token_there_is_the_way_to_log_in(server, shared, workdir, folder, monkeypatch):
  monkeypatch.delenv('HF_TOKEN')
  requests = len(server.requests)
  with pytest.raises(UserError, match='hf auth login.*HF_TOKEN'):
    hub.push(workdir, 'me/other')
  assert len(server.requests) == requests
  assert hub.pull('me/palm')[1] == shared  # which anybody may
  server.private.add('me/palm')
  with pytest.raises(UserError, match='me/palm is not on the hub, or private: .*hf auth login'):
    hub.pull('me/palm', out='other.safetensors')
  assert not (folder / 'other.safetensors').exists()


@pytest.mark.parametrize(
  'token, message', [('hf_ended', r'does not know you \(401\)'), ('hf_read', r'no right .*\(403\)')]
)
def test_tokens_that_may_not_write(server, workdir, monkeypatch, token, message):
  server.readers.add('hf_read')
  monkeypatch.setenv('HF_TOKEN', token)
  with pytest.raises(UserError, match=message):
    hub.push(workdir, 'me/palm')
  assert not server.repos


def test_repositories_that_hold_something_else(server, workdir, folder):
  server.repos['me/bert'] = [{'model.safetensors': b'x', 'README.md': b'mine'}]
  with pytest.raises(UserError, match='me/bert holds model.safetensors already'):
    hub.push(workdir, 'me/bert')
  assert server.files('me/bert')[0]['README.md'] == b'mine'
  with pytest.raises(UserError, match='me/bert holds neither encoder.safetensors nor'):
    hub.pull('me/bert')
  with pytest.raises(UserError, match='me/absent is not on the hub'):
    hub.pull('me/absent')
  assert not list(folder.iterdir())


def test_damage_on_the_way_leaves_nothing(server, shared, folder):
  for name, message in (
    ('encoder.safetensors', r'me/palm: encoder.safetensors is damaged .*nothing was written'),
    ('card.json', r'me/palm: card.json is damaged, or of another file'),
  ):
    server.damaged = {name}
    with pytest.raises(UserError, match=message):
      hub.pull('me/palm')
  server.damaged = set()
  for content in (b'<!doctype html>', b'', server.files('me/palm')[0]['encoder.safetensors'][:99]):
    server.repos['me/palm'][-1]['encoder.safetensors'] = content
    with pytest.raises(UserError, match='me/palm'):
      hub.pull('me/palm')
  assert not list(folder.iterdir())


def test_a_hub_that_is_away_or_out_of_order(server, shared, workdir, folder, monkeypatch):
  monkeypatch.setattr('time.sleep', lambda seconds: None)  # of its patience
  server.broken = 503
  for call in (lambda: hub.pull('me/palm'), lambda: hub.push(workdir, 'me/palm')):
    with pytest.raises(UserError, match=r'refuses me/palm \(503.*again later'):
      call()
  server.broken = None
  from huggingface_hub import constants

  monkeypatch.setattr(constants, 'ENDPOINT', 'http://127.0.0.1:9')  # where nobody listens
  for call in (lambda: hub.pull('me/palm'), lambda: hub.push(workdir, 'me/palm')):
    with pytest.raises(
      UserError, match=r'could not be had from the hub \(.*check the network'
    ) as e:
      call()
    assert '\n' not in str(e.value)
  assert not list(folder.iterdir())


def test_files_in_the_way_stay(server, shared, folder):
  (folder / 'palm.json').write_text('mine')
  with pytest.raises(UserError, match='palm.json is there and differs'):
    hub.pull('me/palm')
  assert [path.name for path in folder.iterdir()] == ['palm.json']
  for out in ('absent/e.safetensors', 'e.npz'):
    with pytest.raises(UserError, match=f'--out={out}: expected'):
      hub.pull('me/palm', out=out)


def test_a_full_disk_leaves_nothing(server, shared, folder, monkeypatch):
  """Full when the second file is written."""

  def full(path):
    if path.suffix == '.json':
      raise OSError(28, 'No space left on device', str(path))
    return files.replacing(path)

  monkeypatch.setattr(hub, 'replacing', full)
  with pytest.raises(OSError, match='No space left'):
    hub.pull('me/palm')
  assert not list(folder.iterdir())


def test_names_that_no_repository_has(workdir):
  for repo in ('palm', 'a/b/c', '../x', 'hf:a/b', ''):
    with pytest.raises(UserError, match='expected user/name'):
      hub.pull(repo)
  with pytest.raises(UserError, match="--what='agent' is unknown"):
    hub.push(workdir, 'me/palm', 'agent')


def test_without_huggingface_hub_there_is_the_command_that_installs_it(workdir, monkeypatch):
  monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
  with pytest.raises(UserError, match=r"pip install -e '\.\[hub\]'"):
    hub.push(workdir, 'me/palm')


@pytest.fixture
def run(server, folder):
  """Runs a command in a process of its own, by the environment that a user sets."""
  environment = os.environ | dict(HF_ENDPOINT=server.url, HF_TOKEN=fake_hub.TOKEN)
  environment |= dict(HF_HUB_DISABLE_XET='1', HF_HOME=str(folder.parent), PYTHONPATH=str(ROOT))
  return lambda *words, **more: subprocess.run(
    [sys.executable, '-m', 'palm_jax', *words],
    cwd=folder,
    capture_output=True,
    text=True,
    timeout=120,
    env=environment | more,
  )


def test_the_command_pull(run, server, shared, folder):
  done = run('pull', '--repo=me/palm', '--out=f.safetensors')
  assert done.returncode == 0, done.stderr
  assert done.stdout == f'f.safetensors: of me/palm, commit {shared}\n'
  assert 'HTTP' not in done.stderr
  content = server.files('me/palm')[0]['encoder.safetensors']
  assert (folder / 'f.safetensors').read_bytes() == content


@pytest.mark.slow
def test_the_other_commands(run, server, workdir, folder):
  done = run('zoo', f'--workdir={workdir}', '--name=e', '--out=.')
  assert done.returncode == 0, done.stderr
  assert 'results of probe and ood' in done.stdout
  assert {path.name for path in folder.iterdir()} == {'e.safetensors', 'e.json'}
  assert palm_jax.load_encoder('e.safetensors').card['licence'] == 'Apache-2.0'
  done = run('push', f'--workdir={workdir}', '--repo=me/palm')
  assert done.returncode == 0 and 'me/palm: the encoder of' in done.stdout, done.stderr
  same = server.files('me/palm')[0]['card.json'], (folder / 'e.json').read_bytes()
  assert len({json.loads(about)['encoder_sha256'] for about in same}) == 1
  for words, message in (
    (('pull',), '--repo is missing'),
    (('pull', '--repo=a/b'), 'HF_HUB_OFFLINE is set'),
    (('push', '--repo=a/b'), '--workdir and --repo are needed'),
    (('zoo', '--name=e'), '--workdir and --name are needed'),
  ):
    done = run(*words, HF_HUB_OFFLINE='1')
    assert done.returncode == 2 and done.stderr.startswith(f'palm_jax: {message}'), done.stderr
    assert done.stderr.count('\n') == 1
