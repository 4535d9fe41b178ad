"""The page's server: HTTP and a websocket on the loopback interface, for this machine's browser.

A web page from anywhere can send requests to 127.0.0.1. So only requests that name this server as
host and, where they say so, come from its own page are answered, and paths begin with a random
token.
"""

import asyncio
import concurrent.futures
import importlib.resources
import io
import json
import secrets
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
from absl import logging
from aiohttp import WSMsgType, web
from PIL import Image

from palm_jax.base.errors import UserError, one_line
from palm_jax.play import controls, session
from palm_jax.play.game import Game
from palm_jax.play.session import Session

ADDRESS = '127.0.0.1'  # never another: there is no password
NAMES = ADDRESS, 'localhost'
LONGEST = 4096  # bytes of a message of the page
MOST_TABS = 16  # a tab holds up to FILM_BYTES
LOOKS = 0.2  # seconds between looks for the nearest real pictures
FILES = {'': ('page.html', 'text/html'), 'page.css': ('page.css', 'text/css')} | {
  'page.js': ('page.js', 'text/javascript')
}


def listen(port: int) -> socket.socket:
  """A socket that listens on the loopback interface; port 0 is a free one. Raises UserError."""
  bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
  try:
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind((ADDRESS, port))
    bound.listen()  # from now on no other has the port; who comes early waits
  except OSError as e:
    bound.close()
    raise UserError(
      f'--port={port} cannot be had ({e.strerror}): leave it out, or give another'
    ) from e
  return bound


def serve(game: Game, bound: socket.socket) -> None:
  """Serves the page until the process is interrupted."""
  asyncio.run(_serve(game, bound))


async def _serve(game, bound):
  port, token = bound.getsockname()[1], secrets.token_urlsafe(16)
  runner = web.AppRunner(make_app(game, port, token), access_log=None, shutdown_timeout=1.0)
  await runner.setup()
  try:
    await web.SockSite(runner, bound).start()
    print(f'play at http://{ADDRESS}:{port}/{token}/   (Ctrl-C ends it)', flush=True)
    await asyncio.Event().wait()
  finally:
    await runner.cleanup()


def make_app(game: Game, port: int, token: str) -> web.Application:
  """The application, for a server at a port of the loopback interface.

  Args:
    game: what is played.
    port: that requests must name.
    token: that their paths must begin with.
  """
  app = web.Application(middlewares=[_guard(port, token)], client_max_size=LONGEST)
  room = Room(game)
  for path in FILES:
    app.router.add_get(f'/{{token}}/{path}', _file)
  app.router.add_get('/{token}/real/{row:[0-9]{1,9}}.png', room.real)
  app.router.add_get('/{token}/play', room.play)
  app.on_shutdown.append(room.end)
  return app


def _guard(port, token):
  """Refuses other hosts (names that were pointed to this machine), other pages, other tokens."""
  hosts = {name if port == 80 else f'{name}:{port}' for name in NAMES}  # as browsers write them
  origins = {f'http://{host}' for host in hosts}
  sockets = ' '.join(sorted(f'ws://{host}' for host in hosts))  # 'self' lacks them in older Safari
  headers = {
    'Content-Security-Policy': "default-src 'none'; script-src 'self'; style-src 'self'; "
    f"img-src 'self' blob: data:; connect-src 'self' {sockets}; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    'Cross-Origin-Resource-Policy': 'same-origin',
    'Referrer-Policy': 'no-referrer',
    'X-Content-Type-Options': 'nosniff',
    'Cache-Control': 'no-store',
  }

  @web.middleware
  async def guard(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
  ) -> web.StreamResponse:
    if request.headers.getall('Host', []) not in [[host] for host in hosts]:
      raise web.HTTPForbidden(text='this server answers to 127.0.0.1 and localhost only\n')
    if not set(request.headers.getall('Origin', [])) <= origins:
      raise web.HTTPForbidden(text='this server answers to its own page only\n')
    given = request.match_info.get('token', '').encode()
    if not secrets.compare_digest(given, token.encode()):
      raise web.HTTPNotFound(text='open the address that palm_jax.play has printed\n')
    response = await handler(request)
    if not response.prepared:
      response.headers.update(headers)
    return response

  return guard


async def _file(request):
  name, kind = FILES[request.path.rpartition('/')[2]]
  text = importlib.resources.files('palm_jax.play').joinpath(name).read_text('utf-8')
  return web.Response(text=text, content_type=kind, charset='utf-8')


class Room:
  """The tabs that are open. All computing is done in one thread, so that they take turns and the
  server's loop goes on."""

  def __init__(self, game: Game):
    self.game = game
    self._tabs: set[web.WebSocketResponse] = set()
    self._thread = concurrent.futures.ThreadPoolExecutor(1, 'play')

  async def compute(self, call: Callable[..., Any], *args: Any) -> Any:
    """call(*args), in the thread that computes."""
    return await asyncio.get_running_loop().run_in_executor(self._thread, call, *args)

  async def end(self, app: web.Application) -> None:
    """Closes all tabs."""
    del app
    await asyncio.gather(*(tab.close(code=1001) for tab in self._tabs), return_exceptions=True)
    self._thread.shutdown(wait=False, cancel_futures=True)

  async def real(self, request: web.Request) -> web.Response:
    """A real picture as PNG."""
    real, row = self.game.real, int(request.match_info['row'])
    if real is None or row >= len(real.images):
      raise web.HTTPNotFound
    file = io.BytesIO()
    picture = session.rgba(real.images[row])[..., :3]
    Image.fromarray(np.ascontiguousarray(picture)).save(file, 'PNG')
    return web.Response(body=file.getvalue(), content_type='image/png')

  async def play(self, request: web.Request) -> web.WebSocketResponse:
    """A tab: its session begins and ends with the websocket."""
    socket = web.WebSocketResponse(max_msg_size=LONGEST, heartbeat=30.0, timeout=2.0)
    await socket.prepare(request)
    if len(self._tabs) >= MOST_TABS:
      await socket.close(code=1013, message=b'too many tabs: close one')
      return socket
    self._tabs.add(socket)
    try:
      play = await self.compute(Session, self.game, secrets.randbits(31))
      await Tab(self, socket, play).run()
    finally:
      self._tabs.discard(socket)
    return socket


class Tab:
  """One open page: what it sends is obeyed, what its session shows is sent."""

  def __init__(self, room: Room, socket: web.WebSocketResponse, play: Session):
    self.room = room
    self.socket = socket
    self.session = play
    self._woken = asyncio.Event()
    self._film: asyncio.Task | None = None

  async def run(self) -> None:
    """Until the page is closed or something fails."""
    tasks = {asyncio.create_task(self._send()), asyncio.create_task(self._receive())}
    try:
      done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
      for task in done:
        task.result()
    except ConnectionError:  # closed while a frame was on its way
      pass
    except Exception as e:  # of the device, for example: this tab ends, the others go on
      logging.exception('play: a tab has ended by an error')
      await self._complain(f'the world has failed ({one_line(e)}): see the terminal')
    finally:
      tasks |= {self._film} if self._film else set()
      for task in tasks:
        task.cancel()
      await asyncio.gather(*tasks, return_exceptions=True)
      await self.socket.close()

  async def _send(self):
    """Frames, as fast as the settings allow, and at times the nearest real pictures."""
    play, socket, now = self.session, self.socket, time.monotonic
    await socket.send_str(json.dumps(hello(self.room.game)))
    due, looked, stale = now(), 0.0, False
    while True:
      if play.due:
        shown = await self.room.compute(play.step)
        await socket.send_bytes(session.frame_message(play, shown))
        stale = self.room.game.real is not None
      elif not stale:
        self._woken.clear()
        if not play.due:  # nothing came in between
          await self._woken.wait()
        due = now()
        continue
      if stale and (now() - looked > LOOKS or not play.due):
        found = await self.room.compute(play.nearest)
        await socket.send_str(json.dumps(dict(kind='nearest', found=found)))
        looked, stale = now(), False
      due = max(due + 1 / play.controls.rate, now() - 0.1)  # late frames are not made up for
      await asyncio.sleep(due - now())

  async def _receive(self):
    """Obeys messages; whatever is wrong with one is said, and nothing comes of it."""
    async for message in self.socket:
      if message.type == WSMsgType.ERROR:
        return
      try:
        if message.type != WSMsgType.TEXT:
          raise UserError('expected a text')
        self._obey(json.loads(message.data))
      except UserError as e:
        await self._complain(str(e))
      except (ValueError, RecursionError):
        await self._complain('expected JSON')

  def _obey(self, message):
    if isinstance(message, dict) and message.get('do') == 'film':
      seconds = controls.seconds_of(message, session.FILM_SECONDS)
      if self._film is not None and not self._film.done():
        raise UserError('a film is being made: wait for it')
      self._film = asyncio.create_task(self._make_film(seconds))
      return
    self.session.take(message)
    self._woken.set()

  async def _make_film(self, seconds):
    try:
      frames, fps = await self.room.compute(self.session.recent, seconds)
      content = await asyncio.to_thread(session.film, frames, fps)
      header = dict(kind='film', frames=len(frames), fps=round(fps, 1))
      await self.socket.send_bytes(session.packed(header, content))
    except ConnectionError:
      pass
    except (UserError, OSError) as e:  # of the folder for what is temporary
      await self._complain(str(e))

  async def _complain(self, text):
    try:
      await self.socket.send_str(json.dumps(dict(kind='error', text=text[:300])))
    except ConnectionError:
      pass


def hello(game: Game) -> dict[str, Any]:
  """What the page is told first."""
  height, width, _ = game.world.generator.image_shape
  start = game.start
  return dict(
    kind='hello',
    width=width,
    height=height,
    z_dim=game.world.generator.z_dim,
    classes=list(game.class_names),
    players=list(game.players),
    about=game.about,
    bounds=controls.BOUNDS,
    endless=controls.ENDLESS,
    set={name: getattr(start, name) for name in (*controls.BOUNDS, 'length', 'label', 'who')}
    | {name: getattr(start, name) for name in controls.SWITCHES},
    points=[[round(float(x), 4) for x in point] for point in game.points],
    real=None if game.real is None else len(game.real.images),
  )
