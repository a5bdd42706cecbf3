"""A hub on this machine: the few endpoints that huggingface_hub asks for models, over folders, with a log of what was asked.

GET /api/models?search=..., /api/models/OWNER/NAME/revision/REV and .../tree/COMMIT; HEAD and GET, whole or in part,
/OWNER/NAME/resolve/REV/FILE.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from huggingface_hub import constants

COMMIT = "c0ffee" * 6 + "c0de"
_REPO = re.compile(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/?]+))?")
_FILE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


@dataclass
class StandIn:
    """What it serves, and what it was asked."""

    url: str = ""
    repos: dict[str, Path] = field(default_factory=dict)
    revisions: dict[str, str] = field(default_factory=lambda: {"main": COMMIT, "v1": COMMIT, COMMIT: COMMIT})
    refuse: dict[str, tuple[int, dict[str, str]]] = field(default_factory=dict)
    """Of a repository: status and headers in place of everything."""
    cut: dict[str, int] = field(default_factory=dict)
    """Of a file: after so many bytes the connection ends, once."""
    log: list[tuple[str, str, str]] = field(default_factory=list)
    """Method, file, and what range of it."""

    def whole(self) -> set[str]:
        """Files that were asked for to their end, as owner/name/file."""
        return {name for method, name, span in self.log if method == "GET" and (not span or span.endswith("-"))}


@contextmanager
def serving(hub: StandIn) -> Iterator[StandIn]:
    """While it answers."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def point_at(url: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT, HF_HUB_CACHE and HF_HUB_OFFLINE say, which huggingface_hub reads when it is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", url)
    monkeypatch.setenv("MODEKIT_CACHE", str(cache / "modekit"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: StandIn

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        file, repo = _FILE.fullmatch(path), _REPO.fullmatch(path)
        if path == "/api/models":
            wanted = parse_qs(urlsplit(self.path).query)["search"][0].lower()
            self._json([{"id": name, "modelId": name} for name in self.hub.repos if wanted in name.lower()])
        elif file:
            self._repo(file[1], file[2], file[3])
        elif repo:
            self._repo(repo[1], repo[3] or "main", None, tree=repo[2] == "tree")
        else:
            self._send(404, {})

    def _repo(self, name: str, revision: str, file: str | None, tree: bool = False) -> None:
        folder, commit = self.hub.repos.get(name), self.hub.revisions.get(revision)
        if name in self.hub.refuse:
            self._send(*self.hub.refuse[name])
        elif folder is None:
            self._send(404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        elif commit is None:
            self._send(404, {"X-Error-Code": "RevisionNotFound"})
        elif file is None:
            self._json(_tree(folder) if tree else _info(name, folder, commit))
        elif not (folder / file).is_file():
            self._send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        else:
            self._file(name, folder / file, commit)

    def _file(self, name: str, path: Path, commit: str) -> None:
        key, span = f"{name}/{path.name}", self.headers.get("Range", "").removeprefix("bytes=")
        self.hub.log.append((self.command, key, span))
        content = path.read_bytes()
        size, start = len(content), 0
        headers = {"ETag": f'"{_etag(path)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if span:
            first, _, last = span.partition("-")
            start, stop = int(first), min(int(last) + 1 if last else size, size)
            content, headers["Content-Range"] = content[start:stop], f"bytes {start}-{stop - 1}/{size}"
        if _is_large(path):
            headers |= {"X-Linked-Size": str(size), "X-Linked-Etag": headers["ETag"]}
        cut = self.hub.cut.pop(key, None) if self.command == "GET" and (not span or span.endswith("-")) else None
        self._send(206 if "Content-Range" in headers else 200, headers, content, cut)

    def _json(self, data: object) -> None:
        self._send(200, {"Content-Type": "application/json"}, json.dumps(data).encode())

    def _send(self, status: int, headers: dict[str, str], content: bytes = b"", cut: int | None = None) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:cut])
        if cut is not None:
            self.close_connection = True


def _is_large(path: Path) -> bool:
    return path.suffix in (".safetensors", ".gguf", ".bin")


def _etag(path: Path) -> str:
    """Of a large file sha256, of others git's."""
    content = path.read_bytes()
    if _is_large(path):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _info(name: str, folder: Path, commit: str) -> dict[str, object]:
    siblings = [{"rfilename": each} for each in _names(folder)]
    return {"id": name, "modelId": name, "sha": commit, "private": False, "siblings": siblings}


def _names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _tree(folder: Path) -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    for name in _names(folder):
        path = folder / name
        entry: dict[str, object] = {"type": "file", "path": name, "oid": _etag(path)[:40], "size": path.stat().st_size}
        if _is_large(path):
            entry["lfs"] = {"oid": _etag(path), "size": path.stat().st_size, "pointerSize": 134}
        found.append(entry)
    return found
