"""A stand-in for the Hugging Face Hub: a small real HTTP server with the parts of its API in use.

With StandInHub() as hub: point HubAccess(endpoint=hub.endpoint) at it. Every request is recorded
in `hub.requests`; `hub.fault` decides what goes wrong with it. With `cdn=True` file bytes come
from a second server under another host name, as on the Hub. For benchmarks it runs in a process
of its own: `start_in_process(folder)`, or `python tests/standin_hub.py FOLDER --port 8765`, where
FOLDER holds org/name/file.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

TOKEN = "hf_standinToken"  # the one token that is right
SEND_BYTES = 4 * 2**20  # at a time
FLIPPED = bytes(255 - i for i in range(256))
PAGE = b"<!DOCTYPE html>\n<html><head><title>Sign in</title></head><body>Hello</body></html>\n"
RESOLVE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
MODEL = re.compile(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+))?(?:/.*)?")


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong with one request; several can be set. Byte counts are of the body."""

    hang_up: bool = False  # the connection ends without an answer
    drop_after: int | None = None  # the connection ends after so many bytes
    reset: bool = False  # ... with RST, not FIN
    stall_after: int | None = None  # after so many bytes nothing comes for stall_s, then the rest
    stall_s: float = 60.0
    status: int | None = None  # 429, 500, 503, ...
    retry_after: str | None = None  # the header with a status
    html: bool = False  # a page, with 200
    html_type: str = "text/html; charset=utf-8"  # what the page calls itself
    lfs_pointer: bool = False  # the pointer in place of the file, with 200
    ignore_range: bool = False  # the whole file, with 200
    wrong_bytes: bool = False  # of the right size: every bit is flipped
    bytes_per_s: float | None = None


@dataclass(slots=True)
class RequestRecord:
    """A request as it came. `bytes_sent` grows while the body goes out; `host` is hub or cdn."""

    method: str
    path: str  # as sent, with the query
    range: str | None
    headers: dict[str, str]  # names in lower case
    host: str
    is_bytes: bool  # of a file's content, not of the API
    bytes_sent: int = 0
    status: int = 0
    at: float = field(default_factory=time.monotonic)


@dataclass(frozen=True, slots=True)
class StoredFile:
    content: Path
    n_bytes: int
    sha256: str
    git_sha1: str
    lfs: bool

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git_sha1


@dataclass(slots=True)
class StoredRepo:
    commits: dict[str, dict[str, StoredFile]]
    refs: dict[str, str]
    gated: bool
    private: bool


class StandInHub:
    """The server, from `with` to the end of it. All of it can be changed while it runs."""

    def __init__(
        self, *, cdn: bool = False, port: int = 0, tls: tuple[Path, Path] | None = None
    ) -> None:
        self.requests: list[RequestRecord] = []
        self.fault: Callable[[RequestRecord], Fault | None] | None = None
        self.repos: dict[str, StoredRepo] = {}
        self.moved: dict[str, str] = {}  # old name -> new name: answered with a redirect
        self.redirect_to: str | None = None  # every request for bytes is sent there instead
        self.closing = threading.Event()
        self._folder = Path(tempfile.mkdtemp(prefix="standin-hub-"))
        self._hub = _Server(self, "hub", "127.0.0.1", port)
        self._cdn = _Server(self, "cdn", "localhost", 0) if cdn else None
        if tls:  # certificate and key
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*tls)
            self._hub.socket = context.wrap_socket(self._hub.socket, server_side=True)
        self.endpoint = f"{'https' if tls else 'http'}://127.0.0.1:{self._hub.server_port}"
        self.cdn_endpoint = f"http://localhost:{self._cdn.server_port}" if self._cdn else None

    def __enter__(self) -> StandInHub:
        for server in self._servers():
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        for server in self._servers():
            server.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def add_repo(
        self,
        repo: str,
        files: Mapping[str, bytes | Path],
        *,
        lfs: bool = True,
        gated: bool = False,
        private: bool = False,
        sha256: Mapping[str, str] | None = None,
    ) -> str:
        """A new commit of `repo` with just these files; main moves there. Gives the commit.

        Paths are served from where they are. `sha256` spares hashing a huge sparse file.
        """
        known = sha256 or {}
        stored = {name: self._store(c, lfs, known.get(name)) for name, c in files.items()}
        text = repo + "".join(f"{name}{file.sha256}" for name, file in stored.items())
        before = self.repos.get(repo)
        commits = before.commits if before else {}
        commit = hashlib.sha1(f"{len(commits)}{text}".encode()).hexdigest()
        commits = {**commits, commit: stored}
        self.repos[repo] = StoredRepo(commits, {"main": commit}, gated, private)
        return commit

    def replace(
        self, repo: str, name: str, content: bytes | Path, sha256: str | None = None
    ) -> None:
        """Swap a file in place: same name and commit, other content and ETag."""
        stored = self.repos[repo]
        commit = stored.refs["main"]
        changed = self._store(content, stored.commits[commit][name].lfs, sha256)
        stored.commits[commit] = {**stored.commits[commit], name: changed}

    def bytes_sent(self, name: str = "") -> int:
        """Bytes of file content that went out, of files whose name holds `name`."""
        return sum(r.bytes_sent for r in self.requests if r.is_bytes and name in unquote(r.path))

    def blob(self, etag: str) -> StoredFile | None:
        for repo in self.repos.values():
            for files in repo.commits.values():
                for file in files.values():
                    if file.etag == etag:
                        return file
        return None

    def close_connections(self) -> None:
        """Drop every open connection, as a line that goes down does."""
        for server in self._servers():
            server.close_connections()

    def _servers(self) -> list[_Server]:
        return [self._hub, *([self._cdn] if self._cdn else [])]

    def _store(self, content: bytes | Path, lfs: bool, sha256: str | None) -> StoredFile:
        if isinstance(content, bytes):
            path = self._folder / hashlib.sha256(content).hexdigest()
            path.write_bytes(content)
            content = path
        n_bytes = content.stat().st_size
        if sha256:
            return StoredFile(content, n_bytes, sha256, sha256[:40], lfs)
        whole, git = hashlib.sha256(), hashlib.sha1(f"blob {n_bytes}\0".encode())
        with open(content, "rb") as stream:
            while chunk := stream.read(SEND_BYTES):
                whole.update(chunk)
                if not lfs:
                    git.update(chunk)
        return StoredFile(content, n_bytes, whole.hexdigest(), git.hexdigest(), lfs)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, hub: StandInHub, host: str, address: str, port: int) -> None:
        self.hub, self.host = hub, host
        self.open_sockets: set[socket.socket] = set()
        super().__init__((address, port), _Handler)

    def stop(self) -> None:
        self.shutdown()
        self.server_close()
        self.close_connections()

    def close_connections(self) -> None:
        for connection in list(self.open_sockets):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exc_info()[1], (OSError, ValueError)):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self.server.open_sockets.add(self.connection)

    def finish(self) -> None:
        self.server.open_sockets.discard(self.connection)
        super().finish()

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_GET

    def _answer(self) -> None:
        hub, path = self.server.hub, urlsplit(self.path).path
        # so that a request is never taken for the one after it
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        wanted = RESOLVE.fullmatch(path)
        is_bytes = self.command == "GET" and (self.server.host == "cdn" or wanted is not None)
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.record = RequestRecord(
            self.command, self.path, headers.get("range"), headers, self.server.host, is_bytes
        )
        hub.requests.append(self.record)
        self.fault = (hub.fault(self.record) if hub.fault else None) or Fault()
        if self.fault.hang_up:
            self._drop()
        elif self.fault.status:
            extra = {"Retry-After": self.fault.retry_after} if self.fault.retry_after else {}
            self._text(self.fault.status, b"it went wrong", extra)
        elif self.fault.html:
            self._text(200, PAGE, {"Content-Type": self.fault.html_type})
        elif self.server.host == "cdn":
            self._blob(unquote(path.rsplit("/", 1)[-1]))
        elif wanted:
            self._resolve(unquote(wanted[1]), unquote(wanted[2]), unquote(wanted[3]))
        elif path == "/api/models":
            self._search()
        elif found := MODEL.fullmatch(path):
            self._model(unquote(found[1]), found[2] or "revision", unquote(found[3] or "main"))
        else:
            self._refuse(404, "RepoNotFound", "Sorry, we can't find the page you are looking for.")

    # --- the API

    def _search(self) -> None:
        query = parse_qs(urlsplit(self.path).query)
        word, author = query.get("search", [""])[0].lower(), query.get("author", [""])[0]
        found = [r for r in self.server.hub.repos if word in r.lower() and r.startswith(author)]
        limit = int(query.get("limit", ["100"])[0])
        self._json([{"id": repo, "modelId": repo} for repo in found[:limit]])

    def _model(self, repo: str, what: str, revision: str) -> None:
        if (found := self._files(repo, revision)) is None:
            return
        commit, files = found
        if what == "revision":
            blobs = "blobs" in parse_qs(urlsplit(self.path).query)
            siblings = [_sibling(name, file, blobs) for name, file in files.items()]
            gated = "manual" if self.server.hub.repos[repo].gated else False
            model = {"id": repo, "modelId": repo, "sha": commit, "gated": gated}
            self._json({**model, "private": False, "siblings": siblings})
        elif what == "paths-info":
            asked = set(parse_qs(self.body.decode()).get("paths", []))
            with contextlib.suppress(ValueError):
                asked = set(json.loads(self.body)["paths"])
            self._json([_entry(name, file) for name, file in files.items() if name in asked])
        else:
            self._json([_entry(name, file) for name, file in files.items()])

    def _files(self, repo: str, revision: str) -> tuple[str, dict[str, StoredFile]] | None:
        """The commit and its files; None where a refusal was sent."""
        hub = self.server.hub
        if repo in hub.moved:
            there = self.path.replace(quote(repo), quote(hub.moved[repo]), 1)
            self._text(307, b"moved", {"Location": there})
            return None
        authorization = self.headers.get("Authorization")
        if authorization not in (None, f"Bearer {TOKEN}"):
            said = "Invalid credentials in Authorization header"
            self._text(401, b'{"error":"' + said.encode() + b'"}', {"X-Error-Message": said})
            return None
        stored = hub.repos.get(repo)
        if stored is None or (stored.private and authorization is None):
            status = 401 if authorization is None else 404
            self._refuse(status, "RepoNotFound", "Repository not found")
            return None
        commit = stored.refs.get(revision, revision)
        if commit not in stored.commits:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return commit, stored.commits[commit]

    # --- the bytes

    def _resolve(self, repo: str, revision: str, name: str) -> None:
        if (found := self._files(repo, revision)) is None:
            return
        commit, files = found
        hub = self.server.hub
        if name not in files:
            extra = {"X-Repo-Commit": commit}
            self._refuse(404, "EntryNotFound", "Entry not found", extra)
        elif hub.repos[repo].gated:
            status = 403 if "Authorization" in self.headers else 401
            self._refuse(status, "GatedRepo", f"Access to model {repo} is restricted.")
        else:
            self._found(commit, files[name])

    def _found(self, commit: str, file: StoredFile) -> None:
        hub, headers = self.server.hub, {"X-Repo-Commit": commit}
        if self.fault.lfs_pointer:
            pointer = f"oid sha256:{file.sha256}\nsize {file.n_bytes}\n"
            text = f"version https://git-lfs.github.com/spec/v1\n{pointer}".encode()
            self._text(200, text, {**headers, "ETag": f'"{hashlib.sha1(text).hexdigest()}"'})
            return
        if file.lfs:
            headers["X-Linked-Etag"] = f'"{file.sha256}"'
            headers["X-Linked-Size"] = str(file.n_bytes)
        if hub.redirect_to is not None:
            self._text(302, b"Found", {**headers, "Location": hub.redirect_to})
        elif hub.cdn_endpoint and file.lfs:
            location = f"{hub.cdn_endpoint}/blobs/{file.etag}?Signature=abc"
            # the Hub's own answer has an ETag too, which is not the one that the bytes come with
            extra = {"Location": location, "ETag": f'"{file.git_sha1}-text"'}
            self._text(302, b"Found. Redirecting", {**headers, **extra})
        else:
            self._content(file, file.etag, headers)

    def _blob(self, etag: str) -> None:
        file = self.server.hub.blob(etag)
        if file is None:
            self._text(404, b"<Error>NoSuchKey</Error>")
        else:
            self._content(file, f"cdn-{etag[:16]}", {})

    def _content(self, file: StoredFile, etag: str, headers: dict[str, str]) -> None:
        headers = {**headers, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        start, end, status = 0, file.n_bytes, 200
        wanted = None if self.fault.ignore_range else self._range(file.n_bytes, etag)
        if wanted:
            start, end, status = *wanted, 206
            if start >= file.n_bytes or end <= start:
                self._text(416, b"", {**headers, "Content-Range": f"bytes */{file.n_bytes}"})
                return
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{file.n_bytes}"
        self._head(status, end - start, {"Content-Type": "application/octet-stream", **headers})
        if self.command != "HEAD":
            with open(file.content, "rb") as stream:
                self._send(stream.fileno(), start, end - start)

    def _range(self, n_bytes: int, etag: str) -> tuple[int, int] | None:
        found = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        if not found or self.headers.get("If-Range", f'"{etag}"') != f'"{etag}"':
            return None
        if not found[1]:
            return max(0, n_bytes - int(found[2] or 0)), n_bytes
        return int(found[1]), min(int(found[2]) + 1 if found[2] else n_bytes, n_bytes)

    def _send(self, fd: int, start: int, n_bytes: int) -> None:
        """The body, with what is wrong with it."""
        fault, done = self.fault, 0
        stops = sorted({x for x in (fault.drop_after, fault.stall_after) if x is not None})
        for stop in [*stops, n_bytes]:
            until = min(stop, n_bytes)
            self._send_well(fd, start + done, max(0, until - done))
            done = max(done, until)
            if done < n_bytes and done == fault.drop_after:
                return self._drop()
            if done < n_bytes and done == fault.stall_after:
                self.server.hub.closing.wait(fault.stall_s)
        return None

    def _send_well(self, fd: int, start: int, n_bytes: int) -> None:
        fault, at, end = self.fault, start, start + n_bytes
        at_once = SEND_BYTES if not fault.bytes_per_s else max(1, int(fault.bytes_per_s / 20))
        while at < end and not self.server.hub.closing.is_set():
            n = min(at_once, end - at)
            by_hand = fault.wrong_bytes or isinstance(self.connection, ssl.SSLSocket)
            if by_hand or not hasattr(os, "sendfile"):
                chunk = os.pread(fd, n, at)
                self.connection.sendall(chunk.translate(FLIPPED) if fault.wrong_bytes else chunk)
                sent = len(chunk)
            else:
                sent = os.sendfile(self.connection.fileno(), fd, at, n)
            at += sent
            self.record.bytes_sent += sent
            if fault.bytes_per_s:
                self.server.hub.closing.wait(sent / fault.bytes_per_s)

    def _drop(self) -> None:
        self.close_connection = True
        if self.fault.reset:
            now = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, now)
            self.connection.close()
        else:
            self.connection.shutdown(socket.SHUT_RDWR)

    # --- answers

    def _json(self, value: object) -> None:
        self._text(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(
        self, status: int, code: str, message: str, extra: Mapping[str, str] | None = None
    ) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message, **(extra or {})}
        self._text(status, json.dumps({"error": message}).encode(), headers)

    def _text(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        """A short body from memory, which can be dropped or stall like any other."""
        with tempfile.TemporaryFile() as stream:
            stream.write(body)
            stream.flush()
            self._head(status, len(body), {"Content-Type": "text/plain", **(headers or {})})
            if self.command != "HEAD":
                self._send(stream.fileno(), 0, len(body))

    def _head(self, status: int, n_bytes: int, headers: Mapping[str, str]) -> None:
        self.record.status = status
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(n_bytes))
        self.end_headers()


def _sibling(name: str, file: StoredFile, blobs: bool) -> dict[str, object]:
    facts: dict[str, object] = {"rfilename": name}
    if blobs:
        facts |= {"size": file.n_bytes, "blobId": file.git_sha1}
        if file.lfs:
            facts["lfs"] = {"sha256": file.sha256, "size": file.n_bytes, "pointerSize": 134}
    return facts


def _entry(name: str, file: StoredFile) -> dict[str, object]:
    facts = {"type": "file", "path": name, "size": file.n_bytes, "oid": file.git_sha1}
    lfs = {"oid": file.sha256, "size": file.n_bytes, "pointerSize": 134}
    return {**facts, "lfs": lfs} if file.lfs else facts


@contextlib.contextmanager
def start_in_process(
    folder: Path, port: int = 0, tls: tuple[Path, Path] | None = None
) -> Iterator[str]:
    """The stand-in in a process of its own, with what `folder` holds. Gives its endpoint."""
    command = [sys.executable, __file__, str(folder), "--port", str(port)]
    if tls:
        command += ["--tls", *map(str, tls)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout
        try:
            yield child.stdout.readline().strip()
        finally:
            child.terminate()


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve FOLDER/org/name/file as the Hub would.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--cdn", action="store_true", help="send bytes from another host name")
    parser.add_argument("--tls", type=Path, nargs=2, help="certificate and key")
    options = parser.parse_args()
    with StandInHub(cdn=options.cdn, port=options.port, tls=options.tls) as hub:
        for repo in sorted(options.folder.glob("*/*")):
            files = {p.relative_to(repo).as_posix(): p for p in repo.rglob("*") if p.is_file()}
            hub.add_repo(repo.relative_to(options.folder).as_posix(), files)
        sys.stdout.write(hub.endpoint + "\n")
        sys.stdout.flush()
        with contextlib.suppress(KeyboardInterrupt):
            signal.sigwait({signal.SIGINT, signal.SIGTERM})


if __name__ == "__main__":
    main()
