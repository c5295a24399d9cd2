"""A Hub on this machine's loopback: the HTTP endpoints that the real clients use, with faults on request.

It keeps repositories as lists of commits in memory. Weights arrive in the commit itself; parquet goes the way of large
files (LFS), for which `huggingface_hub` asks first.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


Files = dict[str, bytes]
WRITE_TOKEN, READ_TOKEN, OTHER_TOKEN = "hf_" + "w" * 34, "hf_" + "r" * 34, "hf_" + "o" * 34


@dataclass
class Repository:
    """One repository: its commits, oldest first, each with all files."""

    private: bool
    commits: list[tuple[str, Files]] = field(default_factory=list)

    def add(self, files: Files) -> str:
        sha = hashlib.sha1(f"{len(self.commits)} {sorted(files)}".encode()).hexdigest()
        self.commits.append((sha, dict(files)))
        return sha

    @property
    def files(self) -> Files:
        return self.commits[-1][1]


@dataclass
class Fault:
    """What happens instead of an answer, to the next requests that match: a status, or a lost connection."""

    pattern: str
    kind: int | str  # a status; "drop": closed unheard; "lose": done, but the answer is lost
    times: int


class Hub:
    """State and switches of the server. Start it once; `reset` between tests."""

    def __init__(self, listener: socket.socket) -> None:
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self._server = ThreadingHTTPServer(listener.getsockname(), _Handler, bind_and_activate=False)
        self._server.socket.close()
        self._server.socket = listener
        self._server.hub = self  # type: ignore[attr-defined]
        self._server.daemon_threads = True
        self.reset()
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def reset(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.large: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.gated: set[str] = set()  # models whose files are for those who accepted its terms
        self.requests: list[str] = []
        self.users = {
            WRITE_TOKEN: {"name": "alice", "role": "write", "orgs": ["org"]},
            READ_TOKEN: {"name": "alice", "role": "read", "orgs": ["org"]},
            OTHER_TOKEN: {"name": "mallory", "role": "write", "orgs": []},
        }
        self.sizes: dict[str, int] = {}  # sizes that are told instead of the true ones
        self.renamed: dict[str, str] = {}  # paths of the API by their old ones

    def fail(self, pattern: str, kind: int | str, *, times: int = 1) -> None:
        self.faults.append(Fault(pattern, kind, times))

    def put(self, name: str, files: Files, *, kind: str = "model", private: bool = False) -> Repository:
        """A repository as somebody else may have made it."""
        repository = self.repositories[(kind, name)] = Repository(private)
        repository.add(files)
        return repository

    def rename(self, old: str, new: str, *, kind: str = "model") -> None:
        """The old name goes on working: it is redirected."""
        self.renamed[f"/api/{kind}s/{old}"] = f"/api/{kind}s/{new}"

    def fault_of(self, request: str) -> int | str | None:
        for fault in self.faults:
            if fault.times and re.search(fault.pattern, request):
                fault.times -= 1
                return fault.kind
        return None

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Answer(Exception):
    def __init__(self, status: int, body: Any = None, headers: dict[str, str] | None = None) -> None:
        super().__init__(status)
        self.status, self.body, self.headers = status, body, headers or {}


def _missing(code: str, status: int = 404, **headers: str) -> _Answer:
    return _Answer(status, {"error": code}, {"X-Error-Code": code, "X-Error-Message": code, **headers})


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None: ...

    @property
    def hub(self) -> Hub:
        return self.server.hub  # type: ignore[attr-defined,no-any-return]

    def _serve(self) -> None:
        self.content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = urlsplit(self.path)
        path, self.query = unquote(parts.path), parse_qs(parts.query)
        request = f"{self.command} {path}"
        self.hub.requests.append(request)
        fault = self.hub.fault_of(request)
        if fault == "drop":
            self._hang_up()
            return
        if isinstance(fault, int):
            self._send(_Answer(fault, {"error": f"fault {fault}"}))
            return
        try:
            answer = self._route(path)
        except _Answer as error:
            answer = error
        if fault == "lose":
            self._hang_up()
            return
        self._send(answer)

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _hang_up(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def _send(self, answer: _Answer) -> None:
        body = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        self.send_response(answer.status)
        headers = {"Content-Length": str(len(body)), "Content-Type": "application/json", **answer.headers}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    # --- who asks, and for what ---

    def _user(self) -> dict[str, Any] | None:
        return self.hub.users.get((self.headers.get("Authorization") or "").removeprefix("Bearer "))

    def _may_write(self, name: str) -> bool:
        user = self._user()
        namespace = name.split("/")[0]
        return user is not None and user["role"] == "write" and namespace in (user["name"], *user["orgs"])

    def _repository(self, kind: str, name: str) -> Repository:
        repository = self.hub.repositories.get((kind, name))
        user = self._user()
        member = user is not None and name.split("/")[0] in (user["name"], *user["orgs"])
        if repository is None or (repository.private and not member):
            raise _missing("RepoNotFound", 404 if user else 401)
        return repository

    def _commit(self, kind: str, name: str, revision: str) -> tuple[str, Files]:
        repository = self._repository(kind, name)
        for sha, files in repository.commits:
            if sha == revision:
                return sha, files
        if revision != "main":
            raise _missing("RevisionNotFound")
        return repository.commits[-1]

    def _route(self, path: str) -> _Answer:
        if path in self.hub.renamed:
            return _Answer(307, {}, {"Location": self.hub.renamed[path]})
        name = r"([\w.-]+/[\w.-]+)"
        routes: list[tuple[str, Callable[..., _Answer]]] = [
            (r"/api/whoami-v2", self._whoami),
            (r"/api/repos/create", self._create),
            (r"/api/validate-yaml", self._validate),
            (r"/api/agent-harnesses", lambda: _Answer(200, {"standardEnvVars": [], "harnesses": {}})),
            (rf"/api/(model|dataset)s/{name}/preupload/(.+)", self._preupload),
            (rf"/api/(model|dataset)s/{name}/commit/(.+)", self._make_commit),
            (rf"/api/(model|dataset)s/{name}/tree/([^/]+)/?(.*)", self._tree),
            (rf"/api/(model|dataset)s/{name}/paths-info/([^/]+)", self._paths_info),
            (rf"/api/(model|dataset)s/{name}/refs", self._refs),
            (rf"/api/(model|dataset)s/{name}/revision/(.+)", self._info),
            (rf"/api/(model|dataset)s/{name}", self._info),
            (rf"/(datasets/)?{name}\.git/info/lfs/objects/batch", self._large_batch),
            (r"/large/([0-9a-f]{64})", self._large_put),
            (rf"/(datasets/)?{name}/resolve/([^/]+)/(.+)", self._download),
        ]
        for pattern, handler in routes:
            if match := re.fullmatch(pattern, path):
                return handler(*match.groups())
        return _Answer(404, {"error": f"no endpoint {path}"})

    def _json(self) -> Any:
        return json.loads(self.content)

    # --- endpoints ---

    def _whoami(self) -> _Answer:
        user = self._user()
        if user is None:
            return _Answer(401, {"error": "Invalid username or password."})
        orgs = [{"name": org, "roleInOrg": "write"} for org in user["orgs"]]
        token = {"displayName": "test", "role": user["role"]}
        return _Answer(200, {"type": "user", "name": user["name"], "orgs": orgs, "auth": {"accessToken": token}})

    def _create(self) -> _Answer:
        asked, user = self._json(), self._user()
        if user is None:
            return _Answer(401, {"error": "Invalid username or password."})
        name = f"{asked.get('organization') or user['name']}/{asked['name']}"
        kind = asked.get("type") or "model"
        url = f"{self.hub.url}/{'datasets/' if kind == 'dataset' else ''}{name}"
        if not self._may_write(name):
            return _Answer(403, {"error": f"You don't have the rights to create {name}."})
        if (kind, name) in self.hub.repositories:
            return _Answer(409, {"error": "You already created this repo.", "url": url})
        private = asked.get("visibility") == "private" or asked.get("private") is True
        self.hub.put(name, {".gitattributes": b""}, kind=kind, private=private)
        return _Answer(200, {"url": url, "name": name, "id": name})

    def _validate(self) -> _Answer:
        import yaml

        content = self._json()["content"]
        try:
            metadata = yaml.safe_load(content.split("---\n", 2)[1]) if content.startswith("---\n") else {}
        except yaml.YAMLError as error:
            return _Answer(400, {"errors": [{"message": str(error)}], "warnings": []})
        license = metadata.get("license")
        if license is not None and not re.fullmatch(r"[a-z0-9.-]+", license):
            return _Answer(400, {"errors": [{"message": f'"license" must be one of ...: {license}'}], "warnings": []})
        return _Answer(200, {"errors": [], "warnings": []})

    def _preupload(self, kind: str, name: str, revision: str) -> _Answer:
        _, files = self._commit(kind, name, revision)
        if not self._may_write(name):
            return _Answer(403, {"error": "Forbidden: you need write rights."})
        answers = []
        for file in self._json()["files"]:
            large = file["path"].endswith(".parquet")
            answer = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if (known := files.get(file["path"])) is not None:
                answer["oid"] = hashlib.sha256(known).hexdigest() if large else _blob(known)
            answers.append(answer)
        return _Answer(200, {"files": answers})

    def _make_commit(self, kind: str, name: str, revision: str) -> _Answer:
        parent, files = self._commit(kind, name, revision)
        if not self._may_write(name):
            return _Answer(403, {"error": "Forbidden: you need write rights."})
        files = dict(files)
        for line in self.content.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                if value.get("parentCommit") not in (None, parent):
                    return _Answer(412, {"error": "A commit has happened since. Please refresh and try again."})
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
            else:
                return _Answer(400, {"error": f"unknown operation {entry['key']}"})
        sha = self._repository(kind, name).add(files)
        return _Answer(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha})

    def _large_batch(self, kind: str | None, name: str) -> _Answer:
        del kind
        if not self._may_write(name):
            return _Answer(403, {"error": "Forbidden: you need write rights."})
        objects = []
        for asked in self._json()["objects"]:
            upload = {"upload": {"href": f"{self.hub.url}/large/{asked['oid']}"}}
            objects.append({**asked, **({} if asked["oid"] in self.hub.large else {"actions": upload})})
        return _Answer(200, {"transfer": "basic", "objects": objects})

    def _large_put(self, oid: str) -> _Answer:
        if hashlib.sha256(self.content).hexdigest() != oid:
            return _Answer(400, {"error": "not the content of that name"})
        self.hub.large[oid] = self.content
        return _Answer(200, {})

    def _info(self, kind: str, name: str, revision: str = "main") -> _Answer:
        sha, files = self._commit(kind, name, revision)
        siblings = [
            {"rfilename": path, "size": self._size(path, content), "blobId": _blob(content), **_large(path, content)}
            for path, content in files.items()
        ]
        private = self._repository(kind, name).private
        info = {"id": name, "modelId": name, "sha": sha, "siblings": siblings, "private": private, "tags": []}
        return _Answer(200, {**info, "lastModified": "2026-01-01T00:00:00.000Z"})

    def _size(self, path: str, content: bytes) -> int:
        return self.hub.sizes.get(path, len(content))

    def _entry(self, path: str, content: bytes) -> dict[str, Any]:
        return {"type": "file", "path": path, "size": self._size(path, content), "oid": _blob(content)}

    def _tree(self, kind: str, name: str, revision: str, folder: str) -> _Answer:
        _, files = self._commit(kind, name, revision)
        prefix = f"{folder.rstrip('/')}/" if folder else ""
        inside = {path: content for path, content in files.items() if path.startswith(prefix)}
        if folder and not inside:
            raise _missing("EntryNotFound")
        recursive = self.query.get("recursive", ["false"])[0].lower() == "true"
        folders: set[str] = set()
        entries = []
        for path, content in inside.items():
            rest = path.removeprefix(prefix)
            if "/" in rest:
                folders.add(prefix + rest.split("/")[0])
            if recursive or "/" not in rest:
                entries.append(self._entry(path, content))
        entries += [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in sorted(folders)]
        return _Answer(200, entries)

    def _paths_info(self, kind: str, name: str, revision: str) -> _Answer:
        _, files = self._commit(kind, name, revision)
        try:
            asked = self._json()["paths"]
        except ValueError:
            asked = parse_qs(self.content.decode())["paths"]
        entries = [self._entry(path, files[path]) for path in asked if path in files]
        folders = {path for path in asked if any(known.startswith(f"{path}/") for known in files)}
        entries += [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in sorted(folders)]
        return _Answer(200, entries)

    def _refs(self, kind: str, name: str) -> _Answer:
        sha, _ = self._commit(kind, name, "main")
        branch = {"name": "main", "ref": "refs/heads/main", "targetCommit": sha}
        return _Answer(200, {"branches": [branch], "converts": [], "tags": []})

    def _download(self, kind: str | None, name: str, revision: str, path: str) -> _Answer:
        sha, files = self._commit("dataset" if kind else "model", name, revision)
        if name in self.hub.gated:
            raise _missing("GatedRepo", 403)
        if path not in files:
            raise _missing("EntryNotFound", **{"X-Repo-Commit": sha})
        content = files[path]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{_blob(content)}"', "Accept-Ranges": "bytes"}
        headers["Content-Type"] = "application/octet-stream"
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked is None:
            return _Answer(200, content, headers)
        start, end = int(asked[1]), int(asked[2]) if asked[2] else len(content) - 1
        headers["Content-Range"] = f"bytes {start}-{min(end, len(content) - 1)}/{len(content)}"
        return _Answer(206, content[start : end + 1], headers)


def _large(path: str, content: bytes) -> dict[str, Any]:
    """What the Hub tells of a large file."""
    if not path.endswith(".parquet"):
        return {}
    return {"lfs": {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}}


def _blob(content: bytes) -> str:
    """The name that git gives to a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
