"""A stand-in of the Hugging Face hub's HTTP interface, as far as huggingface_hub 2.4 uses it for a push.

It keeps repositories, branches and commits in memory, asks for a token, and records every request.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_StandInOfTheHubToken0123456789"
LICENCES = ("apache-2.0", "mit", "other")


@dataclass
class Commit:
    """Files at a commit, and how it was made."""

    oid: str
    files: dict[str, bytes]
    large: frozenset[str] = frozenset()
    """Names of files in large-file storage."""
    summary: str = "initial commit"


@dataclass
class Repo:
    """A repository."""

    private: bool
    branches: dict[str, Commit] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    def add(self, branch: str, commit: Commit) -> None:
        self.branches[branch] = self.commits[commit.oid] = commit


@dataclass
class Request:
    """A request as it came."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class HubServer(ThreadingHTTPServer):
    """The stand-in; `faults` has a status for paths that match a pattern."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, Repo] = {}
        self.stored: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.faults: dict[str, int] = {}
        self.ignored: tuple[str, ...] = ()
        """Names of files that a `.gitignore` leaves out."""
        self.writable = {"org"}
        self.echo = ""
        """Text that refusals of a token repeat, as a careless proxy might."""
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def repo(self, name: str, *, private: bool = True, **files: bytes) -> Repo:
        """Create a repository as the hub does, with files (`__` stands for a dot)."""
        named = {key.replace("__", "."): value for key, value in files.items()}
        self.repos[name] = made = Repo(private=private)
        made.add("main", Commit(oid=oid_of(name), files={".gitattributes": b"", **named}))
        return made

    def sent(self, part: str) -> list[Request]:
        """Return the requests whose path has a part."""
        return [request for request in self.requests if part in request.path]


def oid_of(text: str) -> str:
    return hashlib.sha1(text.encode()).hexdigest()


class _Refused(Exception):
    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        self.status, self.code, self.message = status, code, message


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        """Answer any request."""
        request = Request(self.command, self.path, dict(self.headers), self._body())
        self.server.requests.append(request)
        try:
            self._check(request)
            self._answer(*self._route(request))
        except _Refused as refused:
            named = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
            body = json.dumps({"error": refused.message}).encode()
            self._answer(refused.status, body, {key: value for key, value in named.items() if value})

    do_POST = do_PUT = do_HEAD = do_GET

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _check(self, request: Request) -> None:
        for pattern, status in self.server.faults.items():
            if re.search(pattern, f"{request.method} {request.path}"):
                raise _Refused(status, message="this was ordered by the test")
        if not request.path.startswith("/storage/") and request.headers.get("authorization") != f"Bearer {TOKEN}":
            raise _Refused(401, message=self.server.echo or "Invalid credentials in Authorization header")

    def _route(self, request: Request) -> tuple[int, bytes, dict[str, str]]:
        path = urlsplit(request.path).path
        for pattern, answer in _ROUTES.items():
            if match := re.fullmatch(pattern, f"{request.method} {path}"):
                found = answer(self.server, request, *map(unquote, match.groups()))
                return found if isinstance(found, tuple) else (200, json.dumps(found).encode(), {})
        raise _Refused(404, message=f"no such address: {path}")


def _found(server: HubServer, name: str, revision: str = "main") -> tuple[Repo, Commit]:
    if name not in server.repos:
        raise _Refused(404, "RepoNotFound", "Repository not found")
    repo = server.repos[name]
    commit = repo.branches.get(revision) or repo.commits.get(revision)
    if commit is None:
        raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
    return repo, commit


def _info(server: HubServer, request: Request, name: str, revision: str = "main") -> Any:
    repo, commit = _found(server, name, revision)
    files: list[dict[str, Any]] = [{"rfilename": file} for file in commit.files]
    if "blobs=" in request.path:
        for one in files:
            content = commit.files[one["rfilename"]]
            one |= {"size": len(content), "blobId": git_oid(content)}
            if one["rfilename"] in commit.large:
                one["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return {"id": name, "private": repo.private, "sha": commit.oid, "siblings": files}


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _create(server: HubServer, request: Request) -> Any:
    wanted = request.json
    if wanted["organization"] not in server.writable:
        raise _Refused(403, message=f"You don't have the rights to create a model under {wanted['organization']}")
    name = f"{wanted['organization']}/{wanted['name']}"
    if name in server.repos:
        raise _Refused(409, message="You already created this model repo")
    server.repo(name, private=wanted.get("visibility") == "private")
    return {"url": f"{server.address}/{name}"}


def _branch(server: HubServer, request: Request, name: str, branch: str) -> Any:
    repo, commit = _found(server, name)
    if branch in repo.branches:
        raise _Refused(409, message="Reference already exists")
    repo.branches[branch] = commit
    return {}


def _validate(server: HubServer, request: Request) -> Any:
    card = yaml.safe_load(request.json["content"].split("---")[1])
    if card.get("license", "mit") not in LICENCES:
        errors = [{"message": f'"license" must be one of [{", ".join(LICENCES)}]'}]
        return 400, json.dumps({"errors": errors, "warnings": []}).encode(), {}
    return {"warnings": []}


def _preupload(server: HubServer, request: Request, name: str, revision: str) -> Any:
    _, commit = _found(server, name, revision)
    return {
        "files": [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": file["path"] in server.ignored,
                **({"oid": _oid(commit, file["path"])} if file["path"] in commit.files else {}),
            }
            for file in request.json["files"]
        ]
    }


def _oid(commit: Commit, file: str) -> str:
    content = commit.files[file]
    return hashlib.sha256(content).hexdigest() if file in commit.large else git_oid(content)


def _batch(server: HubServer, request: Request, name: str) -> Any:
    assert request.json["operation"] == "upload"
    return {
        "transfer": "basic",
        "objects": [
            {
                **wanted,
                "actions": {
                    "upload": {"href": f"{server.address}/storage/{wanted['oid']}"},
                    "verify": {"href": f"{server.address}/{name}/verify"},
                },
            }
            for wanted in request.json["objects"]
        ],
    }


def _store(server: HubServer, request: Request, oid: str) -> Any:
    if hashlib.sha256(request.body).hexdigest() != oid:
        raise _Refused(400, message="content differs from its hash")
    server.stored[oid] = request.body
    return {}


def _verify(server: HubServer, request: Request, name: str) -> Any:
    if request.json["oid"] not in server.stored:
        raise _Refused(404, message="no such object")
    return {}


def _commit(server: HubServer, request: Request, name: str, branch: str) -> Any:
    repo, head = _found(server, name, branch)
    lines = [json.loads(line) for line in request.body.splitlines()]
    assert lines[0]["key"] == "header"
    if lines[0]["value"].get("parentCommit", head.oid) != head.oid:
        raise _Refused(412, message="A commit has happened since. Please refresh and try again.")
    files, large = dict(head.files), set(head.large)
    for line in lines[1:]:
        value = line["value"]
        if line["key"] == "deletedFile":
            del files[value["path"]]
            large.discard(value["path"])
        elif line["key"] == "lfsFile":
            if value["oid"] not in server.stored:
                raise _Refused(400, message="LFS object was not uploaded")
            files[value["path"]] = server.stored[value["oid"]]
            large.add(value["path"])
        else:
            assert (line["key"], value["encoding"]) == ("file", "base64")
            files[value["path"]] = base64.b64decode(value["content"])
    made = Commit(
        oid=oid_of(head.oid + request.body.decode()),
        files=files,
        large=frozenset(large),
        summary=lines[0]["value"]["summary"],
    )
    repo.add(branch, made)
    return {"success": True, "commitOid": made.oid, "commitUrl": f"{server.address}/{name}/commit/{made.oid}"}


def _resolve(server: HubServer, request: Request, name: str, revision: str, file: str) -> Any:
    _, commit = _found(server, name, revision)
    if file not in commit.files:
        raise _Refused(404, "EntryNotFound", "Entry not found")
    headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{_oid(commit, file)}"'}
    return 200, commit.files[file], headers


_NAME = r"([\w.-]+/[\w.-]+)"
_ROUTES: dict[str, Any] = {
    rf"GET /api/models/{_NAME}": _info,
    rf"GET /api/models/{_NAME}/revision/([^/]+)": _info,
    r"POST /api/repos/create": _create,
    rf"POST /api/models/{_NAME}/branch/([^/]+)": _branch,
    r"POST /api/validate-yaml": _validate,
    rf"POST /api/models/{_NAME}/preupload/([^/]+)": _preupload,
    rf"POST /{_NAME}\.git/info/lfs/objects/batch": _batch,
    r"PUT /storage/(\w+)": _store,
    rf"POST /{_NAME}/verify": _verify,
    rf"POST /api/models/{_NAME}/commit/([^/]+)": _commit,
    rf"(?:GET|HEAD) /{_NAME}/resolve/([^/]+)/(.+)": _resolve,
}
"""Method and path -> what answers it."""
