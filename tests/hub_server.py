"""A Hugging Face Hub on the loopback: enough of its protocol for the real huggingface_hub client, and its faults."""
from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Dict, List, Optional, Set
from urllib.parse import unquote

import timm_spot

Files = Dict[str, bytes]

# The client reads its settings when it is imported, so it runs in a process of its own: code in, `result` out.
CLIENT = """
import json, sys
import timm, torch, timm_spot
from timm_spot.tasks.publishing.hub import push_folder
from timm_spot.tasks.publishing.convert import convert
replies, sys.stdout = sys.stdout, sys.stderr
scope = dict(globals())
for line in sys.stdin:
    try:
        exec(json.loads(line), scope)
        reply = dict(result=scope.get('result'))
    except Exception as e:
        reply = dict(error=type(e).__name__, message=str(e))
    print(json.dumps(reply), file=replies, flush=True)
"""


class HubServer:
    """Repositories in memory.

    Attributes:
        repos: {repository: {branch: {file: content}}}.
        requests: 'METHOD path' of every request, in order.
        drops: File names whose next download stops half-way; one with '!' appended stops every time.
        damaged: File names that are sent with one byte changed.
        failing: File names that are answered with 503 (service unavailable).
    """

    def __init__(self) -> None:
        self.repos: Dict[str, Dict[str, Files]] = {}
        self.private: Set[str] = set()
        self.lfs: Files = {}
        self.requests: List[str] = []
        self.drops: Set[str] = set()
        self.damaged: Set[str] = set()
        self.failing: Set[str] = set()
        handler = type('Handler', (_Handler,), dict(hub=self))
        self._http = ThreadingHTTPServer(('127.0.0.1', 0), handler)
        self.url = f'http://127.0.0.1:{self._http.server_port}'
        self._thread = threading.Thread(target=self._http.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def commit_of(self, files: Files) -> str:
        """40 hexadecimal digits that change with the content."""
        return hashlib.sha1(b''.join(k.encode() + v for k, v in sorted(files.items()))).hexdigest()


def is_lfs(name: str) -> bool:
    return name.endswith(('.safetensors', '.bin', '.pth'))


def checksum(name: str, content: bytes) -> str:
    """What the Hub lists of a file: SHA-256 of large ones, git's own of all others."""
    if is_lfs(name):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(f'blob {len(content)}\0'.encode() + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    hub: HubServer

    def log_message(self, *_: object) -> None:
        pass

    def reply(self, status: int, body: bytes = b'', **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace('_', '-'), value)
        if 'Content_Length' not in headers:
            self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)

    def reply_json(self, content: object, status: int = 200) -> None:
        self.reply(status, json.dumps(content).encode(), Content_Type='application/json')

    def body(self) -> bytes:
        if self.headers.get('Transfer-Encoding') != 'chunked':
            return self.rfile.read(int(self.headers.get('Content-Length') or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b''.join(chunks)

    def do_HEAD(self) -> None:
        self.hub.requests.append(f'{self.command} {self.path}')
        match = re.fullmatch(r'/([^/]+/[^/]+)/resolve/([^/]+)/(.+)', unquote(self.path))
        if match is None:
            return self.reply(404)
        repo, revision, name = match.groups()
        branches = self.hub.repos.get(repo)
        if branches is None:
            return self.reply(401, X_Error_Code='RepoNotFound')
        by_commit = {self.hub.commit_of(files): files for files in branches.values()}
        files = branches.get(revision) or by_commit.get(revision)
        if files is None:
            return self.reply(404, X_Error_Code='RevisionNotFound')
        if name in self.hub.failing:
            return self.reply(503)
        if name not in files:
            return self.reply(404, X_Error_Code='EntryNotFound', X_Repo_Commit=self.hub.commit_of(files))
        self.send_file(name, files)

    do_GET = do_HEAD

    def send_file(self, name: str, files: Files) -> None:
        content = files[name]
        headers = dict(
            X_Repo_Commit=self.hub.commit_of(files), ETag=f'"{checksum(name, content)}"', Accept_Ranges='bytes')
        if name in self.hub.damaged:
            middle = len(content) // 2
            content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1:]
        start, status = 0, 200
        asked = re.fullmatch(r'bytes=(\d+)-', self.headers.get('Range', ''))
        if asked:
            start, status = int(asked[1]), 206
            headers['Content_Range'] = f'bytes {start}-{len(content) - 1}/{len(content)}'
        headers['Content_Length'] = str(len(content) - start)
        if self.command == 'HEAD' or not {name, name + '!'} & self.hub.drops:
            return self.reply(status, content[start:], **headers)
        self.hub.drops.discard(name)
        half = 0 if start else len(content) // 2  # of a repeated request, nothing
        self.close_connection = True
        self.reply(status, content[start:start + half], **headers)

    def do_POST(self) -> None:
        self.hub.requests.append(f'{self.command} {self.path}')
        path, body = unquote(self.path), self.body()
        if path == '/api/validate-yaml':
            return self.reply_json(dict(errors=[], warnings=[]))
        if path == '/api/repos/create':
            return self.create_repo(json.loads(body))
        match = re.fullmatch(r'/api/models/([^/]+/[^/]+)/(branch|preupload|commit)/(.+)', path)
        if match:
            repo, action, revision = match.groups()
            if repo not in self.hub.repos:
                return self.reply(401, X_Error_Code='RepoNotFound')
            return getattr(self, action)(repo, revision, body)
        if path.endswith('.git/info/lfs/objects/batch'):
            return self.lfs_batch(json.loads(body))
        self.reply(404)

    def create_repo(self, request: Dict) -> None:
        repo = f"{request['organization']}/{request['name']}"
        if repo in self.hub.repos:
            return self.reply_json(dict(error='exists', url=f'{self.hub.url}/{repo}'), 409)
        self.hub.repos[repo] = dict(main={})
        if request['visibility'] == 'private':
            self.hub.private.add(repo)
        self.reply_json(dict(url=f'{self.hub.url}/{repo}', name=repo))

    def branch(self, repo: str, revision: str, _: bytes) -> None:
        branches = self.hub.repos[repo]
        if revision in branches:
            return self.reply(409)
        branches[revision] = dict(branches['main'])
        self.reply_json({})

    def preupload(self, repo: str, revision: str, body: bytes) -> None:
        if revision not in self.hub.repos[repo]:
            return self.reply(404, X_Error_Code='RevisionNotFound')
        names = [file['path'] for file in json.loads(body)['files']]
        self.reply_json(dict(files=[
            dict(path=n, uploadMode='lfs' if is_lfs(n) else 'regular', shouldIgnore=False) for n in names]))

    def lfs_batch(self, request: Dict) -> None:
        self.reply_json(dict(transfer='basic', objects=[
            dict(oid=o['oid'], size=o['size'], actions=dict(upload=dict(href=f"{self.hub.url}/lfs/{o['oid']}")))
            for o in request['objects']]))

    def do_PUT(self) -> None:
        self.hub.requests.append(f'{self.command} {self.path}')
        body = self.body()
        oid = self.path.removeprefix('/lfs/')
        if hashlib.sha256(body).hexdigest() != oid:
            return self.reply(400)
        self.hub.lfs[oid] = body
        self.reply(200)

    def commit(self, repo: str, revision: str, body: bytes) -> None:
        files = dict(self.hub.repos[repo][revision])
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation['value']
            if operation['key'] == 'file':
                files[value['path']] = base64.b64decode(value['content'])
            elif operation['key'] == 'lfsFile':
                files[value['path']] = self.hub.lfs[value['oid']]
        self.hub.repos[repo][revision] = files
        oid = self.hub.commit_of(files)
        self.reply_json(dict(commitUrl=f'{self.hub.url}/{repo}/commit/{oid}', commitOid=oid, success=True))


def find_request(server: HubServer, pattern: str) -> Optional[str]:
    """The first request so far that matches a regular expression."""
    return next((r for r in server.requests if re.search(pattern, r)), None)


class Client:
    """A process with the real client of the Hub, of which a server on the loopback is the endpoint."""

    def __init__(self, server: HubServer, home: Path, **env: str) -> None:
        env = dict(
            os.environ, HF_ENDPOINT=server.url, HF_HOME=str(home), HF_TOKEN='hf_test', HF_HUB_DISABLE_XET='1',
            HF_HUB_DISABLE_TELEMETRY='1', HF_HUB_DISABLE_PROGRESS_BARS='1', **env)
        env['PYTHONPATH'] = os.pathsep.join([str(Path(timm_spot.__file__).parent.parent), env.get('PYTHONPATH', '')])
        self.process = subprocess.Popen(
            [sys.executable, '-c', CLIENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)

    def __call__(self, code: str, **values: object) -> dict:
        """Run code with some names set; its `result`, or the error's name and message."""
        names = '\n'.join(f'{k} = {v!r}' for k, v in values.items())
        self.process.stdin.write(json.dumps(f'result = None\n{names}\n{code}') + '\n')
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.process.stdout.close()
