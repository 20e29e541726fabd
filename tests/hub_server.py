"""A Hugging Face Hub on the loopback: enough of its protocol for the real huggingface_hub client, and its faults."""
from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Dict, List, Optional, Set
from urllib.parse import unquote

Files = Dict[str, bytes]


class HubServer:
    """Repositories in memory.

    Attributes:
        repos: {repository: {branch: {file: content}}}.
        requests: 'METHOD path' of every request, in order.
        drops: File names whose next download stops half-way; one with '!' appended stops every time.
        damaged: File names that are sent with one byte changed.
    """

    def __init__(self) -> None:
        self.repos: Dict[str, Dict[str, Files]] = {}
        self.private: Set[str] = set()
        self.lfs: Files = {}
        self.requests: List[str] = []
        self.drops: Set[str] = set()
        self.damaged: Set[str] = set()
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
    return name.endswith('.safetensors')


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
        if name not in files:
            return self.reply(404, X_Error_Code='EntryNotFound', X_Repo_Commit=self.hub.commit_of(files))
        self.send_file(name, files)

    do_GET = do_HEAD

    def send_file(self, name: str, files: Files) -> None:
        content = files[name]
        checksum = (hashlib.sha256 if is_lfs(name) else hashlib.sha1)(content).hexdigest()
        headers = dict(X_Repo_Commit=self.hub.commit_of(files), ETag=f'"{checksum}"', Accept_Ranges='bytes')
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
