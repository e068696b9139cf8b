"""A hub for tests: a local server that answers the hub's HTTP API as huggingface_hub's client calls it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" * 6 + "beef"
TOKEN = "hf_secret"


@dataclass(frozen=True)
class Sparse:
    """A file of which only the beginning is there; the server must never be asked for the rest."""

    beginning: bytes
    size: int

    def __len__(self) -> int:
        return self.size


Content = bytes | Sparse


@dataclass
class Hub:
    """Its repositories, and what was asked of it.

    Args:
        address: its URL.
        files: the files of each repository's last commit, by name.
        heads: the last commits of those repositories that were pushed to; the others have one, `COMMIT`.
        private: the repositories that can only be read with the token.
        gated: the repositories that nobody has been given access to yet.
        failing: the names of files whose content it fails to send.
        objects: the large files that were uploaded, by their digest.
        fetched: the names of files that were read.
        sent: the name of a file and the number of its bytes, for each request that read any.
        buckets: the files of each bucket, by name.
        drops: how many answers are cut off in their middle before one is whole.
        denied: the buckets that nobody may read.
        uploaded: the digests of large files, in the order in which they were uploaded.
        commits: the names of all files after each commit that was made.
        refuses_commits: whether it answers that committing is not allowed.
        interrupt: called with each request that changes anything, once it was carried out and before it is answered.
    """

    address: str = ""
    files: dict[str, dict[str, Content]] = field(default_factory=dict)
    sent: list[tuple[str, int]] = field(default_factory=list)
    buckets: dict[str, dict[str, Content]] = field(default_factory=dict)
    drops: int = 0
    denied: set[str] = field(default_factory=set)
    heads: dict[str, str] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    gated: set[str] = field(default_factory=set)
    failing: set[str] = field(default_factory=set)
    objects: dict[str, bytes] = field(default_factory=dict)
    fetched: list[str] = field(default_factory=list)
    uploaded: list[str] = field(default_factory=list)
    commits: list[list[str]] = field(default_factory=list)
    refuses_commits: bool = False
    interrupt: Callable[[str], None] = lambda request: None

    def add(self, repository: str, folder: Path) -> None:
        paths = (path for path in folder.rglob("*") if path.is_file())
        self.files[repository] = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._file(with_body=False)

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+)(?:/(.+))?)?", path):
            self._about(found[1], found[2] or "revision", found[3] or "main", found[4] or "")
        elif found := re.fullmatch(r"/api/buckets/([^/]+/[^/]+)/tree(?:/(.+))?", path):
            self._list_bucket(found[1], found[2] or "")
        else:
            self._file(with_body=True)

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if found := re.fullmatch(r"/api/buckets/([^/]+/[^/]+)/paths-info", path):
            files = self.hub.buckets[found[1]]
            self._json([_describe_bucket_file(n, files[n]) for n in json.loads(body)["paths"] if n in files])
            return
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._error(401, "RepoNotFound")
        elif path == "/api/repos/create":
            self._create(json.loads(body)["name"])
        elif path.endswith("/objects/batch"):
            self._batch(json.loads(body))
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", path):
            (self._preupload if found[2] == "preupload" else self._commit)(found[1], body)
        else:
            self._json({})

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        digest = self.path.rpartition("/")[2]
        assert hashlib.sha256(body).hexdigest() == digest
        self.hub.objects[digest] = body
        self.hub.uploaded.append(digest)
        self._json({})

    def _list_bucket(self, bucket: str, folder: str) -> None:
        if bucket in self.hub.denied or bucket not in self.hub.buckets:
            self._error(403 if bucket in self.hub.denied else 404, "Forbidden")
            return
        rows = self.hub.buckets[bucket].items()
        self._json([_describe_bucket_file(name, content) for name, content in rows if name.startswith(folder)])

    def _about(self, repository: str, what: str, revision: str, folder: str) -> None:
        if not self._may_read(repository):
            return
        head = self.hub.heads.get(repository, COMMIT)
        if revision not in ("main", head):
            self._error(404, "RevisionNotFound")
            return
        files = self.hub.files[repository]
        if what == "revision":
            self._json({"id": repository, "sha": head, "siblings": [{"rfilename": name} for name in files]})
            return
        rows = [{"type": "file", "path": n, "size": len(b), "oid": _etag(b)} for n, b in files.items()]
        self._json([row for row in rows if str(row["path"]).startswith(folder)])

    def _file(self, *, with_body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        bucket = re.fullmatch(r"/buckets/([^/]+/[^/]+)/resolve/(.+)", path)
        found = bucket or re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
        if found is None:
            self._error(404, "EntryNotFound")
            return
        if not bucket and not self._may_read(found[1]):
            return
        content = (self.hub.buckets if bucket else self.hub.files)[found[1]].get(found[2])
        if content is None:
            self._error(404, "EntryNotFound")
            return
        if with_body and found[2] in self.hub.failing:
            self._error(500, "InternalError")
            return
        if with_body:
            self.hub.fetched.append(found[2])
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        start, stop = (int(wanted[1]), min(int(wanted[2]) + 1, len(content))) if wanted else (0, len(content))
        self.send_response(206 if wanted else 200)
        head = self.hub.heads.get(found[1], COMMIT)
        for name, value in (("ETag", f'"{_etag(content)}"'), ("X-Repo-Commit", head)):
            self.send_header(name, value)
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        if with_body:
            self.hub.sent.append((found[2], stop - start))
            part = _slice(content, start, stop)
            if self.hub.drops and len(part) > 1000:
                self.hub.drops -= 1
                part = part[: len(part) // 2]
                self.close_connection = True
            with suppress(ConnectionError):
                self.wfile.write(part)

    def _may_read(self, repository: str) -> bool:
        is_ours = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repository in self.hub.gated:
            self._error(403, "GatedRepo")
            return False
        if repository in self.hub.files and (is_ours or repository not in self.hub.private):
            return True
        self._error(404 if is_ours else 401, "RepoNotFound")
        return False

    def _create(self, name: str) -> None:
        repository = f"owner/{name}"
        self.hub.files.setdefault(repository, {})
        self._json({"url": f"{self.hub.address}/{repository}", "id": repository})

    def _preupload(self, repository: str, body: bytes) -> None:
        def mode(path: str) -> str:
            return "lfs" if path.endswith(".safetensors") else "regular"

        request = json.loads(body)
        ignored = request.get("gitIgnore", self.hub.files[repository].get(".gitignore", b"").decode()).split()
        rows = [
            {
                "path": row["path"],
                "uploadMode": mode(row["path"]),
                "shouldIgnore": any(fnmatchcase(row["path"], pattern) for pattern in ignored),
            }
            for row in request["files"]
        ]
        self._json({"files": rows})

    def _batch(self, request: dict[str, list[dict[str, object]]]) -> None:
        rows = [
            row
            if row["oid"] in self.hub.objects
            else {**row, "actions": {"upload": {"href": f"{self.hub.address}/objects/{row['oid']}"}}}
            for row in request["objects"]
        ]
        self._json({"transfer": "basic", "objects": rows})

    def _commit(self, repository: str, body: bytes) -> None:
        if self.hub.refuses_commits:
            self._error(403, "Forbidden")
            return
        head = self.hub.heads.get(repository, COMMIT)
        files = dict(self.hub.files[repository])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header" and value.get("parentCommit", head) != head:
                self._error(412, "PreconditionFailed")
                return
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        self.hub.commits.append(sorted(files))
        self.hub.files[repository] = files
        self.hub.heads[repository] = head = f"{len(self.hub.commits):040x}"
        self._json({"commitUrl": f"{self.hub.address}/{repository}/commit/{head}", "commitOid": head})

    def _json(self, value: object) -> None:
        if self.command != "GET":
            self.hub.interrupt(f"{self.command} {self.path}")
        with suppress(ConnectionError):  # The client may have been killed.
            self._send_json(value)

    def _send_json(self, value: object) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _error(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _etag(content: Content) -> str:
    known = content.beginning if isinstance(content, Sparse) else content
    return hashlib.sha1(known, usedforsecurity=False).hexdigest()


def _slice(content: Content, start: int, stop: int) -> bytes:
    if isinstance(content, bytes):
        return content[start:stop]
    return content.beginning[start:stop].ljust(stop - start, b"\0")


def _describe_bucket_file(name: str, content: Content) -> dict[str, object]:
    return {"type": "file", "path": name, "size": len(content), "xetHash": _etag(content)}
