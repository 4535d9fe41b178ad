"""The part of the hub's HTTP API that huggingface_hub calls to push and pull, on 127.0.0.1.

Weights go the way of Git LFS, all else stands in the commit, as on the hub itself.
"""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
import urllib.parse

TOKEN = 'hf_of_the_tests'


class Hub(http.server.ThreadingHTTPServer):
  """Repositories in memory.

  Attributes:
    repos: {'user/name': [files {name: bytes} of each commit]}.
    private: names of those that only TOKEN may read.
    readers: tokens that are known and may not write.
    broken: status that every answer has, if any.
    damaged: names of files that are sent with another last byte.
    requests: (method, path) of all.
  """

  daemon_threads = True

  def __init__(self):
    super().__init__(('127.0.0.1', 0), Handler)
    self.repos, self.private, self.readers, self.damaged = {}, set(), set(), set()
    self.broken, self.blobs, self.requests = None, {}, []
    self.url = f'http://127.0.0.1:{self.server_address[1]}'

  def files(self, repo, revision='main'):
    """The files of a commit, and its hash; None where there is no such."""
    commits = {commit_hash(repo, i): files for i, files in enumerate(self.repos[repo])}
    sha = list(commits)[-1] if revision == 'main' else revision
    return (commits[sha], sha) if sha in commits else None


def commit_hash(repo, number):
  return hashlib.sha1(f'{repo} {number}'.encode()).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
  server: Hub

  def log_message(self, *_):
    pass

  def do_GET(self):
    self._answer(
      [
        (r'/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?', self._model),
        (r'/api/models/([^/]+/[^/]+)/tree/([^/]+)', self._tree),
        (r'/([^/]+/[^/]+)/resolve/([^/]+)/(.+)', self._file),
      ]
    )

  do_HEAD = do_GET

  def do_POST(self):
    self._answer(
      [
        (r'/api/repos/create', self._create),
        (r'/api/validate-yaml', lambda: self._send(dict(errors=[], warnings=[]))),
        (r'/api/models/([^/]+/[^/]+)/preupload/main', self._preupload),
        (r'/([^/]+/[^/]+)\.git/info/lfs/objects/batch', self._batch),
        (r'/api/models/([^/]+/[^/]+)/commit/main', self._commit),
      ]
    )

  def do_PUT(self):
    self._answer([(r'/blobs/(\w+)', self._upload)])

  def _answer(self, routes):
    length = int(self.headers.get('Content-Length') or 0)
    self.body = self.rfile.read(length)
    path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
    self.server.requests.append((self.command, path))
    if self.server.broken:
      return self._send({'error': 'out of order'}, self.server.broken)
    for pattern, answer in routes:
      match = re.fullmatch(pattern, path)
      if match:
        return answer(*match.groups())
    return self._send({'error': 'no such route'}, 404)

  def _token(self):
    return (self.headers.get('Authorization') or '').removeprefix('Bearer ')

  def _may_write(self):
    if self._token() in self.server.readers:
      self._send({'error': 'you have no right to that'}, 403)
    elif self._token() != TOKEN:
      self._send({'error': 'Invalid username or password.'}, 401)
    else:
      return True
    return False

  def _found(self, repo, revision):
    """(files, hash), or None when the refusal was sent."""
    hidden = repo in self.server.private and self._token() != TOKEN
    if repo not in self.server.repos or hidden:
      code = 404 if self._token() == TOKEN else 401
      self._send({'error': 'Repository not found'}, code, {'X-Error-Code': 'RepoNotFound'})
      return None
    found = self.server.files(repo, revision or 'main')
    if found is None:
      self._send({'error': 'Invalid rev id'}, 404, {'X-Error-Code': 'RevisionNotFound'})
    return found

  def _create(self):
    if not self._may_write():
      return
    asked = json.loads(self.body)
    repo = f'{asked["organization"]}/{asked["name"]}'
    known = repo in self.server.repos
    if not known:
      self.server.repos[repo] = [{'.gitattributes': b'*.safetensors filter=lfs\n'}]
      if asked.get('private') or asked.get('visibility') == 'private':
        self.server.private.add(repo)
    answer = dict(url=f'{self.server.url}/{repo}', name=repo, id=repo)
    self._send(answer, 409 if known else 200)

  def _model(self, repo, revision):
    found = self._found(repo, revision)
    if found:
      files, sha = found
      siblings = [dict(rfilename=name) for name in files]
      self._send(dict(id=repo, modelId=repo, sha=sha, siblings=siblings, tags=[], private=False))

  def _tree(self, repo, revision):
    found = self._found(repo, revision)
    if found:
      self._send(
        [dict(type='file', path=name, size=len(x), oid='0' * 40) for name, x in found[0].items()]
      )

  def _preupload(self, repo):
    if self._may_write() and self._found(repo, 'main'):
      mode = lambda path: 'lfs' if path.endswith('.safetensors') else 'regular'
      self._send(
        dict(
          files=[
            dict(path=file['path'], uploadMode=mode(file['path']), shouldIgnore=False)
            for file in json.loads(self.body)['files']
          ]
        )
      )

  def _batch(self, repo):
    if self._may_write() and self._found(repo, 'main'):
      objects = []
      for asked in json.loads(self.body)['objects']:
        objects.append(dict(oid=asked['oid'], size=asked['size']))
        if asked['oid'] not in self.server.blobs:
          href = f'{self.server.url}/blobs/{asked["oid"]}'
          objects[-1]['actions'] = dict(upload=dict(href=href))
      self._send(dict(transfer='basic', objects=objects))

  def _upload(self, oid):
    same = hashlib.sha256(self.body).hexdigest() == oid
    if same:
      self.server.blobs[oid] = self.body
    self._send({}, 200 if same else 400)

  def _commit(self, repo):
    if not self._may_write() or not self._found(repo, 'main'):
      return
    files = dict(self.server.repos[repo][-1])
    for line in self.body.splitlines():
      entry = json.loads(line)
      value = entry['value']
      if entry['key'] == 'file':
        files[value['path']] = base64.b64decode(value['content'])
      elif entry['key'] == 'lfsFile':
        files[value['path']] = self.server.blobs[value['oid']]
    self.server.repos[repo].append(files)
    sha = commit_hash(repo, len(self.server.repos[repo]) - 1)
    url = f'{self.server.url}/{repo}/commit/{sha}'
    self._send(dict(success=True, commitOid=sha, commitUrl=url, hookOutput=''))

  def _file(self, repo, revision, name):
    found = self._found(repo, revision)
    if not found:
      return
    files, sha = found
    if name not in files:
      self._send({'error': 'Entry not found'}, 404, {'X-Error-Code': 'EntryNotFound'})
      return
    content = files[name]
    headers = {'X-Repo-Commit': sha, 'ETag': f'"{hashlib.sha256(content).hexdigest()}"'}
    if name in self.server.damaged:
      content = content[:-1] + bytes([content[-1] ^ 1])
    self._send(content, 200, headers)

  def _send(self, content, status=200, headers=()):
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    self.send_response(status)
    for name, value in dict(headers).items():
      self.send_header(name, value)
    self.send_header('Content-Length', str(len(body)))
    if not isinstance(content, bytes):
      self.send_header('Content-Type', 'application/json')
    self.end_headers()
    if self.command != 'HEAD':
      self.wfile.write(body)


@contextlib.contextmanager
def running():
  """A Hub that answers while the block lasts."""
  with Hub() as hub:
    thread = threading.Thread(target=hub.serve_forever, kwargs=dict(poll_interval=0.05))
    thread.start()
    try:
      yield hub
    finally:
      hub.shutdown()
      thread.join()
