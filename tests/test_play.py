"""The page: what a session computes, what its server answers and refuses, a browser that plays."""

import asyncio
import functools
import io
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys

import aiohttp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from aiohttp import test_utils
from PIL import Image

from palm_jax import agent, play, pretrain, rollout, train, worlds
from palm_jax.base import devices
from palm_jax.base.checkpoints import Checkpoints
from palm_jax.base.errors import NonFiniteError, UserError
from palm_jax.data.arrays import Data, Split
from palm_jax.play import controls, game, load, server, session
from palm_jax.play.controls import Controls
from palm_jax.world import Features, make
from tests.worlds import COMPILED, LargeGenerator, LinearGenerator, nature_config

GENERATOR = LinearGenerator()
PIXELS = Features(
  lambda variables, seen: seen.reshape(len(seen), -1)[:, ::7].astype(jnp.float32) / 255, (), 10
)
START = Controls(0.5, 0.9, 1.0)
PLAYERS = 'person', 'random'
TOKEN = 'token'


def images_of(count=90, shape=(8, 8, 1)):
  images = np.random.default_rng(0).integers(0, 256, (count, *shape), np.uint8)
  split = Split(images, np.arange(count) % 3)
  return Data(split, split, ('one', 'two', 'three'), 'noise')


@pytest.fixture(scope='module')
def opened():
  world, params = make(GENERATOR, 'entropy', encoder=PIXELS, alpha=0.5, beta=0.9, memory=40)
  return game.open_game(world, params, data=images_of(), about=dict(generator='lines'))


@pytest.fixture
def tab(opened):
  one = session.Session(opened, 3)
  one.take(dict(do='set', who='random'))
  return one


# ---- what a person sets


@pytest.mark.parametrize('z_dim', [1, 2, 64])
def test_a_drag_becomes_an_action_inside_the_box(z_dim):
  pair = controls.directions(z_dim, 5)
  assert pair.shape == (2, z_dim) and pair.dtype == np.float32
  if z_dim > 1:
    np.testing.assert_allclose(pair @ pair.T, np.eye(2), atol=1e-6)
  for angle in np.linspace(0, 6, 20):
    x, y = np.cos(angle), np.sin(angle)
    action, half = (controls.action_of(pair, (s * x, s * y)) for s in (1.0, 0.5))
    assert np.abs(action).max() == pytest.approx(1, abs=1e-5) and np.abs(action).max() <= 1
    np.testing.assert_allclose(half, action / 2, atol=1e-6)
    way = x * pair[0] + y * pair[1]
    np.testing.assert_allclose(
      action / np.linalg.norm(action), way / np.linalg.norm(way), atol=1e-5
    )
  assert not controls.action_of(pair, (0.0, 0.0)).any()


def test_other_seeds_are_other_directions():
  assert np.abs(controls.directions(8, 0) - controls.directions(8, 1)).max() > 0.1


def test_settings_follow_messages():
  c = controls.changed(START, dict(do='drag', x=30, y=-40), PLAYERS, 3)
  assert c.drag == (0.6, -0.8)  # as far as one can
  c = controls.changed(c, dict(do='set', alpha=1, beta=0.25, label=2, who='random'), PLAYERS, 3)
  assert (c.alpha, c.beta, c.label, c.who, c.drag) == (1, 0.25, 2, 'random', (0, 0))
  c = controls.changed(c, dict(do='set', paused=True, waits=False, length=64), PLAYERS, 3)
  assert (c.paused, c.waits, c.length) == (True, False, 64)
  for deed in controls.DEEDS:
    c = controls.changed(c, dict(do=deed), PLAYERS, 3)
  assert (c.steps, c.resets, c.turns) == (1, 1, 1)


WRONG = [
  None,
  5,
  [],
  {},
  dict(do='explode'),
  dict(do=['set']),
  dict(do='drag', x=1),
  dict(do='drag', x='1', y=0),
  dict(do='drag', x=True, y=0),
  dict(do='drag', x=10**400, y=0),
  dict(do='set', alpha=-0.1),
  dict(do='set', psi=2.5),
  dict(do='set', label=3),
  dict(do='set', label=0.5),
  dict(do='set', length=1),
  dict(do='set', paused=1),
  dict(do='set', who='trained'),
  dict(do='set', who=['person']),
  dict(do='set', beta=0.5, color='red'),
  dict(do='set', __class__=1),
]
GARBAGE = [
  *map(json.dumps, WRONG),
  '',
  'nonsense',
  '{"do": "drag", "x": NaN, "y": 0}',
  '{"do": "set", "rate": Infinity}',
  '{"do": "film"}',
  '{"do": "film", "seconds": 1e9}',
  '[' * 4000,
]


@pytest.mark.parametrize('message', WRONG, ids=str)
def test_what_is_wrong_with_a_message_is_said(message):
  with pytest.raises(UserError):
    controls.changed(START, message, PLAYERS, 3)


# ---- what a session computes


def test_steps_are_the_worlds_own(opened):
  """Against `step_all` by itself, and a reward that numpy computes from the features."""
  one = session.Session(opened, 3)
  one.take(dict(do='drag', x=0.3, y=0.2))
  world, params, key = opened.world, opened.told.params, jax.random.key(3)
  step, state, features = jax.jit(world.step_all), opened.blank(), []
  for count in range(60):
    shown = one.step()
    _, key_step = jax.random.split(jax.random.fold_in(key, count))
    now = params.replace(episode_length=jnp.int32(controls.ENDLESS if count else 0))
    action = controls.action_of(one.pair, (0.3, 0.2))[None]  # directions of the first step
    _, state, rewards, _ = step(key_step[None], state, action, now)
    np.testing.assert_array_equal(shown.picture, state.seen[0])
    assert shown.reward == pytest.approx(float(rewards[0]), abs=1e-6) and shown.step == count
    features = [*features, np.asarray(shown.features, np.float64)][-40:]  # its memory
    distances = np.sort(np.linalg.norm(np.array(features)[:-1] - features[-1], axis=1))
    wanted = np.log1p(distances[:12].mean()) if len(features) > 12 else 0
    assert shown.reward == pytest.approx(wanted, abs=1e-5)
  assert shown.reward > 0


def test_nothing_that_is_set_compiles_anew(opened, tab):
  for _ in range(3):
    tab.step()
  tab.nearest()
  before = len(COMPILED)
  changes = [
    dict(do='set', alpha=0.9, beta=0.1, psi=0.4),
    dict(do='set', who='person'),
    dict(do='drag', x=0.5, y=0.1),
    dict(do='set', label=2),
    dict(do='set', label=-1),
    dict(do='set', length=5, rate=60),
    *(dict(do=deed) for deed in controls.DEEDS),
  ]
  for change in changes:
    tab.take(change)
    tab.step()
    tab.nearest()
  session.Session(opened, 9).step()
  assert len(COMPILED) == before


def test_episodes_and_classes(tab):
  assert tab.step().step == 0 and tab.episode == 1
  tab.take(dict(do='set', length=4))
  assert [int(tab.step().step) for _ in range(5)] == [1, 2, 3, 0, 1]
  assert tab.episode == 2
  tab.take(dict(do='reset'))
  shown = tab.step()
  assert shown.step == 0 and shown.reward == 0 and tab.episode == 3
  tab.take(dict(do='set', length=1000, label=1))
  assert {int(tab.step().label) for _ in range(5)} == {1}
  seen = set()
  for _ in range(20):
    tab.take(dict(do='set', label=-1))
    shown = [int(tab.step().label) for _ in range(2)]
    assert shown[0] == shown[1]  # it stays
    seen |= set(shown)
  assert seen == {0, 1, 2}


def test_the_world_waits(opened):
  one = session.Session(opened, 0)
  assert one.due
  one.step()
  assert not one.due  # nobody acts
  one.take(dict(do='drag', x=0.1, y=0))
  assert one.due
  one.take(dict(do='set', paused=True))
  assert not one.due
  for change in (dict(do='step'), dict(do='reset'), dict(do='set', psi=0.3)):
    one.take(change)
    assert one.due
    one.step()
    assert not one.due
  one.take(dict(do='set', paused=False, waits=False))
  one.take(dict(do='drag', x=0, y=0))
  assert one.due


def test_what_is_only_shown_anew_begins_no_episode(opened):
  one = session.Session(opened, 0)
  one.step()
  assert one.episode == 1
  for psi in (0.2, 0.4):
    one.take(dict(do='set', psi=psi))
    assert one.step().step == 0 and one.episode == 1


def test_of_a_stack_the_last_picture_alone_is_shown_anew():
  eyes = Features(lambda v, seen: seen.reshape(len(seen), -1).astype(jnp.float32) / 255, (), 128)
  made = make(GENERATOR, 'entropy', encoder=eyes, beta=0.5, memory=40, stack=2)
  one = session.Session(game.open_game(*made), 3)
  one.take(dict(do='set', who='random'))
  for _ in range(3):
    one.step()
  one.take(dict(do='set', paused=True))
  before = np.array(one._state.seen[0])
  for psi in (0.0, 0.5):
    one.take(dict(do='set', psi=psi))
    shown = one.step()
    now = np.array(one._state.seen[0])
    np.testing.assert_array_equal(now[..., 0], before[..., 0])
    assert (now[..., 1] != before[..., 1]).any()
    np.testing.assert_allclose(shown.features, now.reshape(-1) / 255, rtol=1e-6)


def test_each_press_of_step_is_a_step(opened):
  one = session.Session(opened, 0)
  one.step()
  one.take(dict(do='set', paused=True))
  for _ in range(3):
    one.take(dict(do='step'))
  reached = [int(one.step().step) for _ in range(3) if one.due]
  assert reached == [1, 2, 3] and not one.due


@pytest.mark.parametrize('dynamics', ['ema', 'momentum'])
def test_while_it_is_paused_psi_and_class_move_nothing(dynamics):
  made = make(
    GENERATOR, 'entropy', encoder=PIXELS, alpha=0.5, beta=0.9, memory=40, dynamics=dynamics
  )
  one = session.Session(game.open_game(*made), 3)
  one.take(dict(do='set', who='random', length=8))
  before = [one.step() for _ in range(8)][-1]  # the next step would begin another episode
  latent = lambda: jax.tree.map(np.array, (one._state.env.z, one._state.env.velocity))
  where = latent()
  one.take(dict(do='set', paused=True, psi=1.0))
  for psi in (0.0, 1.7, 1.0):
    one.take(dict(do='set', psi=psi))
    assert one.due
    shown = one.step()
    assert (shown.step, one.episode) == (before.step, 1) and not one.due
    assert (psi == 1) == np.array_equal(shown.picture, before.picture)
  for old, new in zip(jax.tree.leaves(where), jax.tree.leaves(latent()), strict=True):
    np.testing.assert_array_equal(old, new)
  one.take(dict(do='step'))
  assert one.step().step == 0 and one.episode == 2


def test_real_pictures_that_lie_by_class_are_of_all_of_them(monkeypatch):
  """Also where there is no time for all."""
  monkeypatch.setattr(game, 'PATIENCE', 0.0)
  data = images_of(2000)
  data.train.labels.sort()
  made = make(GENERATOR, 'entropy', encoder=PIXELS, memory=40)
  real = game.open_game(*made, data=data).real
  assert len(real.labels) < 200 and set(real.labels) == {0, 1, 2}


def test_nearest_is_the_picture_itself(opened):
  one = session.Session(opened, 0)
  shown = one.step()
  row = 7
  h = PIXELS.apply((), opened.real.images[row : row + 1])[0]
  one.last = shown._replace(features=h)
  found = one.nearest()
  assert len(found) == game.NEAREST and found[0]['id'] == row and found[0]['name'] == 'two'
  assert found[0]['cosine'] == pytest.approx(1, abs=1e-3)
  cosines = [each['cosine'] for each in found]
  assert cosines == sorted(cosines, reverse=True)


def test_the_map_is_of_principal_components():
  h = np.random.default_rng(0).normal(size=(100, 5)) * [1, 9, 2, 5, 1] + 7
  center, axes, points = game.principal_plane(h.astype(np.float32))
  np.testing.assert_allclose(np.abs(points).max(0), 1, atol=1e-5)
  assert abs(np.corrcoef(points.T)[0, 1]) < 1e-3
  assert [np.abs(axes[:, i]).argmax() for i in range(2)] == [1, 3]
  np.testing.assert_allclose(points, (h - center) @ axes, atol=1e-4)
  assert np.isfinite(game.principal_plane(np.ones((9, 1), np.float32))[2]).all()


def test_a_film_has_the_frames(tab):
  shown = [tab.step().picture for _ in range(25)]
  tab._times.clear()  # as if they came at the rate that is set
  frames, fps = tab.recent(0.5)
  assert len(frames) == 15 and fps == 30
  with Image.open(io.BytesIO(session.film(frames, fps))) as film:
    assert film.format == 'WEBP' and film.n_frames == 15 and film.size == (256, 256)
    film.seek(14)
    np.testing.assert_array_equal(np.asarray(film)[::32, ::32, 0], shown[-1][..., 0])
  with pytest.raises(UserError, match='no frames yet'):
    session.film([], 30)


# ---- what a command line names


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """(workdir, program, encoder, policy) of a pretraining with random numbers for weights."""
  path = tmp_path_factory.mktemp('run')
  config, generator, rng = nature_config(), LargeGenerator(), np.random.default_rng(0)
  program = pretrain.make_program(config, generator, devices.make_mesh(1))
  world = worlds.host_world(config, generator)
  shapes = jax.eval_shape(program.init, jax.random.key(0), world)  # to compile it takes long
  draw = lambda x: (rng.normal(size=x.shape) / 20).astype(x.dtype)
  encoder, policy = jax.tree.map(draw, (train.encoder_of(shapes), agent.acting(shapes.agent)))
  with Checkpoints(path / 'pretrain/checkpoints') as checkpoints:
    checkpoints.save(1, {'state': {'agent': policy}, 'encoder': encoder}, {})
  (path / 'config.json').write_text(config.to_json_best_effort())
  return path, program, encoder, policy


def test_the_trained_agent_acts_as_in_its_run(run, monkeypatch):
  """Against `rollout.act`, which plays in pretraining, and the formulas of T_com and T_ema."""
  workdir, program, encoder, policy = run
  monkeypatch.setattr(worlds, 'load_world_generator', lambda config, workdir: LargeGenerator())
  monkeypatch.setattr(game, 'POINTS', 8)
  config = json.loads((workdir / 'config.json').read_text())
  config['reward']['kind'] = 'mine'  # of someone's own config file, which nobody reads here
  (workdir / 'config.json').write_text(json.dumps(config))
  opened = load.load_game(workdir=workdir)
  assert opened.players == ('person', 'random', 'trained') and not opened.about['trained']
  one = session.Session(opened, 5)
  one.take(dict(do='set', who='trained'))
  frame, z = one.step().picture[None], np.array(one._state.env.z)
  key_act, key_step = jax.random.split(jax.random.fold_in(jax.random.key(5), 1))
  ssl = dict(params=dict(encoder=encoder['params']), batch_stats=dict(encoder={}))
  acting = jax.jit(functools.partial(rollout.act, program.setup))
  episodes = np.ones(1, np.int32)
  action = acting(ssl, agent.only_acting(policy), frame, key_act[None], episodes)
  assert np.abs(action).max() > 0.1
  eps = jax.random.normal(jax.random.split(key_step)[0], z.shape[1:])
  one.step()
  alpha, beta = opened.start.alpha, opened.start.beta
  wanted = beta * z + (1 - beta) * (alpha * action + (1 - alpha) * eps)
  np.testing.assert_allclose(one._state.env.z, wanted, atol=1e-5)


def test_a_run_without_a_readable_agent_is_played_all_the_same(run, tmp_path):
  workdir = run[0]
  shutil.copytree(workdir, tmp_path / 'run')
  config, step = load.run_config(tmp_path / 'run')
  config.sac.hidden = (3, 3)
  policy, why_not = load.load_agent(config, tmp_path / 'run', LargeGenerator(), step)
  assert policy == () and 'give the config of that run' in why_not
  config.pairs.source = 'random_action'
  policy, why_not = load.load_agent(config, tmp_path / 'run', LargeGenerator(), step)
  assert policy == () and 'has no agent' in why_not
  (tmp_path / 'run/config.json').write_text('[]')
  with pytest.raises(UserError, match='is not the config of a pretraining'):
    load.run_config(tmp_path / 'run')


def test_mistakes_are_said_before_anything_compiles(tmp_path, monkeypatch):
  before = len(COMPILED)
  monkeypatch.setenv('HOME', str(tmp_path))
  for message, given in {
    'neither a path nor a bundled generator': dict(generator='cifar11-small'),
    'config.json is missing': dict(workdir=tmp_path),
    f'{tmp_path}/run/config.json is missing': dict(workdir='~/run'),
    'unknown data': dict(data='digit'),
    r'pictures of \(8, 8, 1\).*draws \(32, 32, 3\)': dict(data='digits'),
  }.items():
    with pytest.raises(UserError, match=message):
      load.load_game(**given)
  with server.listen(0) as bound:
    with pytest.raises(UserError, match='cannot be had'):
      server.listen(bound.getsockname()[1])
  monkeypatch.setattr(play.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(UserError, match=r"pip install -e '.\[play\]'"):
    play.main(['play'])
  assert len(COMPILED) == before


def test_a_world_of_nan_is_refused(opened, monkeypatch):
  def advance(told, key, state, asked):
    return state, game.Shown(*[np.full(3, np.nan)] * len(game.Shown._fields))

  monkeypatch.setattr(game, 'make_advance', lambda world, sac: advance)
  with pytest.raises(NonFiniteError, match='give another generator'):
    game.open_game(opened.world, opened.told.params)


# ---- the server


def with_server(opened, check):
  """Runs `check(client, port)` against a server of its own."""

  async def go():
    with server.listen(0) as bound:
      port = bound.getsockname()[1]
    app = server.make_app(opened, port, TOKEN)
    async with test_utils.TestClient(test_utils.TestServer(app, port=port)) as client:
      await asyncio.wait_for(check(client, port), 60)

  asyncio.run(go())


async def hear(tab, kind):
  """The next message of a kind: (header, content)."""
  while True:
    message = await tab.receive(30)
    if message.type == aiohttp.WSMsgType.TEXT:
      header, content = json.loads(message.data), b''
    else:
      assert message.type == aiohttp.WSMsgType.BINARY, message
      (length,) = struct.unpack('<I', message.data[:4])
      header, content = json.loads(message.data[4 : 4 + length]), message.data[4 + length :]
    if header['kind'] == kind:
      return header, content


def test_it_listens_on_the_loopback_interface_alone():
  with server.listen(0) as bound:
    address, port = bound.getsockname()
    assert address == '127.0.0.1'
    socket.create_connection((address, port), 5).close()
    with pytest.raises(ConnectionRefusedError):  # of this machine, too, but not bound
      socket.create_connection(('127.0.0.2', port), 5)


def test_only_its_own_page_is_answered(opened):
  async def check(client, port):
    for path in ('', 'page.css', 'page.js', 'real/3.png'):
      async with client.get(f'/{TOKEN}/{path}') as response:
        assert response.status == 200, path
        assert response.headers['Content-Security-Policy'].startswith("default-src 'none'")
    own = [f'http://127.0.0.1:{port}', f'http://localhost:{port}']
    foreign = ['http://evil.example', 'null', f'https://127.0.0.1:{port}', 'http://127.0.0.1:1']
    for path in ('', 'play'):
      for origin in foreign:
        async with client.get(f'/{TOKEN}/{path}', headers=dict(Origin=origin)) as response:
          assert response.status == 403, origin
      for host in (
        f'evil.example:{port}',
        '127.0.0.1',
        'localhost:1',
        f'127.0.0.1.a:{port}',
      ):
        async with client.get(f'/{TOKEN}/{path}', headers=dict(Host=host)) as response:
          assert response.status == 403, host
    for path in ('/', '/other/', '/other/play', f'/{TOKEN}x/', f'/{TOKEN}/real/90.png', '/%ff/'):
      async with client.get(path) as response:
        assert response.status == 404, path
    for origin in own:
      async with client.ws_connect(f'/{TOKEN}/play', headers=dict(Origin=origin)) as tab:
        await hear(tab, 'hello')

  with_server(opened, check)


def test_garbage_is_survived(opened):
  async def check(client, port):
    async with client.ws_connect(f'/{TOKEN}/play') as tab:
      for message in GARBAGE:
        await tab.send_str(message)
        assert (await hear(tab, 'error'))[0]['text'], message
      await tab.send_bytes(b'\x00' * 100)
      await hear(tab, 'error')
      await tab.send_json(dict(do='set', who='random', rate=60))
      header, pixels = await hear(tab, 'frame')
      assert len(pixels) == 8 * 8 * 4
      await tab.send_str('x' * 10_000)
      while not tab.closed:
        await tab.receive(30)
      assert tab.close_code == aiohttp.WSCloseCode.MESSAGE_TOO_BIG
    async with client.ws_connect(f'/{TOKEN}/play') as tab:
      await hear(tab, 'frame')

  with_server(opened, check)


def test_tabs_are_independent(opened):
  async def frames(tab, count):
    return [await hear(tab, 'frame') for _ in range(count)]

  async def check(client, port):
    one = await client.ws_connect(f'/{TOKEN}/play')
    other = await client.ws_connect(f'/{TOKEN}/play')
    hello, _ = await hear(one, 'hello')
    assert hello['players'] == ['person', 'random'] and len(hello['points']) == game.POINTS
    assert hello['classes'] == ['0', '1', '2'] and hello['real'] == 90
    await one.send_json(dict(do='set', who='random', rate=60, label=1))
    await other.send_json(dict(do='set', who='random', rate=60, label=2))
    seen = await frames(one, 12), await frames(other, 12)
    assert [{header['label'] for header, _ in them[5:]} for them in seen] == [{1}, {2}]
    assert seen[0][-1][1] != seen[1][-1][1]
    found, _ = await hear(other, 'nearest')
    assert len(found['found']) == game.NEAREST
    await one.close()
    await frames(other, 10)
    await other.send_json(dict(do='set', paused=True))
    await other.send_json(dict(do='film', seconds=0.2))
    header, content = await hear(other, 'film')
    with Image.open(io.BytesIO(content)) as film:
      assert film.format == 'WEBP' and film.n_frames == header['frames'] > 1
    await other.close()

  with_server(opened, check)


def test_there_are_not_endlessly_many_tabs(opened, monkeypatch):
  monkeypatch.setattr(server, 'MOST_TABS', 1)

  async def check(client, port):
    async with client.ws_connect(f'/{TOKEN}/play') as one:
      await hear(one, 'hello')
      async with client.ws_connect(f'/{TOKEN}/play') as other:
        await other.receive(30)
        assert other.close_code == aiohttp.WSCloseCode.TRY_AGAIN_LATER

  with_server(opened, check)


def test_a_failing_device_ends_its_tab_alone(opened, monkeypatch):
  async def check(client, port):
    async with client.ws_connect(f'/{TOKEN}/play') as good:
      await hear(good, 'frame')
      with monkeypatch.context() as broken:
        broken.setattr(session.Session, 'step', lambda self: 1 / 0)
        async with client.ws_connect(f'/{TOKEN}/play') as bad:
          assert 'the world has failed' in (await hear(bad, 'error'))[0]['text']
          assert (await bad.receive(30)).type in (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSED)
      await good.send_json(dict(do='step'))
      await hear(good, 'frame')

  with_server(opened, check)


def test_the_page_asks_nobody_else():
  folder = pathlib.Path(play.__file__).parent
  for name, _ in server.FILES.values():
    text = (folder / name).read_text()
    assert not re.search(r'https?://|//\w+\.\w|@import|url\(', text), name
  ids = set(re.findall(r'id="([\w-]+)"', (folder / 'page.html').read_text()))
  used = set(re.findall(r"\$\('([\w-]+)'\)", (folder / 'page.js').read_text()))
  assert used <= ids


# ---- as a person does


def start(*arguments):
  root = pathlib.Path(play.__file__).parents[2]
  return subprocess.Popen(
    [sys.executable, '-m', 'palm_jax.play', *arguments],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    cwd=root,
    env=dict(os.environ, XLA_FLAGS='', PYTHONUNBUFFERED='1'),
  )


@pytest.mark.parametrize('flag', ['--generator=nothing', '--port=70000', '--prot=1', 'words'])
@pytest.mark.slow
def test_a_wrong_flag_is_one_line(flag):
  process = start(flag)
  _, errors = process.communicate(timeout=60)
  assert process.returncode == 2 and len(errors.splitlines()) == 1 and 'palm_jax: ' in errors


@pytest.mark.slow
@pytest.mark.usefixtures('terminal')
def test_a_browser_plays():
  """Headless Chromium: pictures come, keys and drags act, a film is saved, Ctrl-C ends all."""
  api = pytest.importorskip('playwright.sync_api', reason='no playwright: pip install playwright')
  chromium = shutil.which('chromium') or shutil.which('chromium-browser')
  if chromium is None:
    pytest.skip('no Chromium on the path')
  process = start()
  try:
    url = re.search(r'http://\S+', process.stdout.readline())[0]
    with api.sync_playwright() as driver:
      browser = driver.chromium.launch(executable_path=chromium, args=['--no-sandbox'])
      wrong = []
      note = lambda what: wrong.append(str(what))
      for width in (1280, 400):
        page = browser.new_page(viewport=dict(width=width, height=800))
        page.on('pageerror', note)
        page.on('console', note)
        page.goto(url)
        play_in(page)
        assert page.evaluate('document.documentElement.scrollWidth') <= width
        assert not wrong
        page.close()
      browser.close()
  finally:
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
  assert process.returncode == 130 and errors.splitlines()[-1] == 'palm_jax: the page has ended'
  assert 'Traceback' not in errors


def play_in(page):
  steps = page.locator('#count')
  page.locator('#count:text-is("0")').wait_for()
  page.keyboard.down('ArrowRight')
  page.wait_for_timeout(1500)
  page.keyboard.up('ArrowRight')
  page.wait_for_timeout(300)
  reached = int(steps.text_content())
  assert reached > 5
  page.wait_for_timeout(300)
  assert int(steps.text_content()) == reached  # the world waits
  box = page.locator('#stage').bounding_box()
  page.mouse.move(box['x'] + 100, box['y'] + 100)
  page.mouse.down()
  page.mouse.move(box['x'] + 160, box['y'] + 60, steps=3)
  page.wait_for_timeout(1000)
  page.mouse.up()
  assert int(steps.text_content()) > reached
  page.get_by_role('button', name='random agent').click()
  page.get_by_role('button', name='ship').click()
  page.locator('#class:text-is("ship")').wait_for()
  page.keyboard.press(' ')  # the button has the focus, and takes it
  page.locator('#stage').focus()
  page.keyboard.press(' ')
  page.get_by_role('button', name='Go on').wait_for()
  with page.expect_download() as download:
    page.get_by_role('button', name='Save film').click()
  with Image.open(download.value.path()) as film:
    assert film.n_frames > 5
