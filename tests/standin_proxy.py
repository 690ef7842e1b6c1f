"""A stand-in for a proxy: a small real one that speaks HTTP (CONNECT or whole addresses) or SOCKS5.

With StandInProxy() as proxy: set HTTPS_PROXY or the like to proxy.url. `proxy.targets` has what it
was asked for; `hosts` leads names that nobody resolves to ports of this machine.
"""

from __future__ import annotations

import base64
import contextlib
import socket
import ssl
import struct
import threading
from collections.abc import Mapping
from pathlib import Path
from socketserver import StreamRequestHandler, ThreadingTCPServer
from urllib.parse import urlsplit

SOCKS5, CONNECT, NO_LOGIN, BY_PASSWORD, IPV4, NAME = 5, 1, 0, 2, 1, 3
SOCKS5_REFUSED = 5


class StandInProxy:
    """The proxy, from `with` to the end of it. `login` is "name:password"."""

    def __init__(
        self,
        kind: str = "http",
        *,
        login: str = "",
        hosts: Mapping[str, int] | None = None,
        tls: tuple[Path, Path] | None = None,
        refuses_with: int | None = None,
    ) -> None:
        self.targets: list[tuple[str, int]] = []
        self.login, self.hosts, self.refuses_with = login, dict(hosts or {}), refuses_with
        self._server = _Server(self, _Http if kind == "http" else _Socks5)
        scheme = kind
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*tls)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
            scheme = "https"
        self.address = f"127.0.0.1:{self._server.server_address[1]}"
        self.url = f"{scheme}://{self.address}"

    def __enter__(self) -> StandInProxy:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def connect(self, host: str, port: int) -> socket.socket:
        self.targets.append((host, port))
        return socket.create_connection(("127.0.0.1", self.hosts.get(host, port)), timeout=20)


class _Server(ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True

    def __init__(self, proxy: StandInProxy, handler: type[_Handler]) -> None:
        self.proxy = proxy
        super().__init__(("127.0.0.1", 0), handler)

    def handle_error(self, request: object, client_address: object) -> None:
        pass


class _Handler(StreamRequestHandler):
    server: _Server
    rbufsize = 0  # what follows the head belongs to the target

    def join(self, target: socket.socket) -> None:
        """Pass bytes on in both directions until both have ended."""
        there = threading.Thread(target=_pass_on, args=(self.connection, target), daemon=True)
        there.start()
        _pass_on(target, self.connection)
        there.join()


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while chunk := source.recv(65536):
            target.sendall(chunk)
    for end in (source, target):
        with contextlib.suppress(OSError):
            socket.socket.shutdown(end, socket.SHUT_RDWR)


class _Http(_Handler):
    def handle(self) -> None:
        proxy = self.server.proxy
        method, target, _ = self._line().split(" ")
        headers = []
        while line := self._line():
            headers.append(line)
        expected = f"Basic {base64.b64encode(proxy.login.encode()).decode()}"
        status = proxy.refuses_with
        if proxy.login and f"Proxy-Authorization: {expected}" not in headers:
            status = 407
        if status:
            self.wfile.write(f"HTTP/1.1 {status} No\r\nContent-Length: 0\r\n\r\n".encode())
        elif method == "CONNECT":
            host, _, port = target.rpartition(":")
            there = proxy.connect(host, int(port))
            self.wfile.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            self.join(there)
        else:
            parts = urlsplit(target)
            there = proxy.connect(parts.hostname or "", parts.port or 80)
            path = target.split("/", 3)[3]
            kept = [line for line in headers if not line.startswith("Proxy-")]
            head = [f"{method} /{path} HTTP/1.1", *kept, "Connection: close", "", ""]
            there.sendall("\r\n".join(head).encode())
            self.join(there)

    def _line(self) -> str:
        return self.rfile.readline().decode().strip()


class _Socks5(_Handler):
    """RFC 1928 and, for the login, RFC 1929."""

    def handle(self) -> None:
        proxy = self.server.proxy
        self._read(self._read(2)[1])
        self.wfile.write(bytes([SOCKS5, BY_PASSWORD if proxy.login else NO_LOGIN]))
        if proxy.login:
            name = self._read(self._read(2)[1])
            is_right = name + b":" + self._read(self._read(1)[0]) == proxy.login.encode()
            self.wfile.write(bytes([1, 0 if is_right else 1]))
            if not is_right:
                return
        _, _, _, kind = self._read(4)
        host = (
            self._read(self._read(1)[0]).decode()
            if kind == NAME
            else socket.inet_ntop(*((socket.AF_INET, self._read(4)) if kind == IPV4
                                    else (socket.AF_INET6, self._read(16))))
        )  # fmt: skip
        (port,) = struct.unpack(">H", self._read(2))
        refused = proxy.refuses_with or 0
        there = None if refused else proxy.connect(host, port)
        self.wfile.write(bytes([SOCKS5, refused, 0, IPV4]) + bytes(6))
        if there:
            self.join(there)

    def _read(self, n: int) -> bytes:
        return self.rfile.read(n)
