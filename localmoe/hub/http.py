"""Which proxy a request takes, by the usual variables: HTTPS_PROXY, ALL_PROXY, NO_PROXY.

Bytes of a file over HTTP: one GET of a range, redirects followed by hand, faults told apart.

http.client and not the client of huggingface_hub, whose buffers pass through Python more often:
four connections on loopback gave 2.0 against 0.8 GB/s, for a third of the processor's time.
Proxies are those of the usual variables; the token goes to the endpoint's own origin alone.
"""

from __future__ import annotations

import base64
import re
import socket
import ssl
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from email.message import Message
from email.utils import parsedate_to_datetime
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from time import time
from typing import Literal
from urllib.parse import quote, unquote, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

from ..errors import DownloadError

DEFAULT_PORT = 80


@dataclass(frozen=True, slots=True)
class Proxy:
    """Where it is, and the headers that log in there, which no repr shows."""

    host: str
    port: int
    headers: dict[str, str] = field(repr=False)


def proxy_for(scheme: str, host: str, port: int) -> Proxy | None:
    """The proxy for an origin; None where it is reached directly.

    As the variables say or, where there are none, the system's settings. Raises DownloadError
    for a proxy of another kind than http://.
    """
    proxies = getproxies()
    said = proxies.get(scheme) or proxies.get("all")
    if not said or proxy_bypass(f"{host}:{port}"):
        return None
    try:
        parts = urlsplit(said if "://" in said else f"http://{said}")
        proxy_host, proxy_port = parts.hostname, parts.port or DEFAULT_PORT
    except ValueError:
        proxy_host = None
    if not proxy_host or parts.scheme != "http":
        what = "Only proxies of the form http://HOST:PORT are known."
        raise DownloadError(what, f"Set {scheme.upper()}_PROXY to one, or NO_PROXY.")
    headers = {}
    if parts.username is not None:
        login = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        headers["Proxy-Authorization"] = f"Basic {base64.b64encode(login.encode()).decode()}"
    return Proxy(proxy_host, proxy_port, headers)


CONNECT_S = 10.0
STALL_S = 30.0  # without a byte
MAX_REDIRECTS = 5
IDLE_PER_ORIGIN = 8  # connections kept for the next request
RECEIVE_BYTES = 768 << 10
"""What the kernel may hold of one connection: lost, and fetched again, when a line drops. Four
connections at a distance of 100 ms still come to 30 MB/s."""
READ_BYTES = 2**18  # at a time: it stays in the processor's cache
SHORT_BODY_BYTES = 2**16
DEFAULT_PORTS = {"http": 80, "https": 443}
OFFLINE_HINT = "Models that are here run without it: localmoe list --installed"

FaultKind = Literal["dropped", "stalled", "busy"]


class TransferFault(DownloadError):
    """What may go well when it is tried again: a connection that was `dropped` or never made, one
    that `stalled`, a server that is `busy` (429, 5xx; `retry_after_s` where it says so)."""

    def __init__(
        self,
        kind: FaultKind,
        message: str,
        retry_after_s: float | None = None,
        hint: str = "Try again.",
    ) -> None:
        super().__init__(message, hint)
        self.kind = kind
        self.retry_after_s = retry_after_s


class HttpRefusal(Exception):
    """The endpoint's own no: a status of 4xx, and the headers that say why, in lower case."""

    def __init__(self, status: int, headers: Mapping[str, str]) -> None:
        super().__init__(status)
        self.status = status
        self.headers = headers


@dataclass(frozen=True, slots=True)
class Origin:
    """Scheme, host and port: what a token is bound to."""

    scheme: str
    host: str
    port: int

    @classmethod
    def of(cls, url: str) -> Origin:
        """Raises DownloadError where `url` is none of HTTP."""
        try:
            parts = urlsplit(url)
            port = parts.port or DEFAULT_PORTS[parts.scheme]
        except (ValueError, KeyError):
            what = "The Hub's address, or where it redirects to, is no http:// or https:// link."
            raise DownloadError(what, "See HF_ENDPOINT.") from None
        return cls(parts.scheme, (parts.hostname or "").lower(), port)


class RemoteBytes:
    """An answer whose bytes are still to come; a context manager, for one reader.

    `status` is 206 for the range that was asked for, 200 for the whole file. `start` is the place
    of the first byte, `total_bytes` the length of the whole file, `etag` what If-Range takes.
    close() may be called from another thread: the reader then gets a TransferFault.
    """

    def __init__(
        self, connection: _HttpConnection, response: HTTPResponse, start: int, n: int, total: int
    ) -> None:
        self.status: int = response.status
        self.start, self.total_bytes = start, total
        self.content_type = response.headers.get("Content-Type", "")
        etag = response.headers.get("ETag")
        # a weak one never matches in If-Range (RFC 9110, 13.1.5)
        self.etag = None if etag is None or etag.startswith("W/") else etag
        self._connection, self._response = connection, response
        self._n_left = n
        self._ahead = b""

    def __enter__(self) -> RemoteBytes:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read_into(self, buffer: memoryview) -> int:
        """Put what has come into `buffer`, waiting for some; gives its size, 0 at the end.

        Raises TransferFault where the connection ends early, or nothing comes for too long.
        """
        if not len(buffer):
            return 0
        chunk = self._ahead or self._read(min(len(buffer), READ_BYTES))
        n = min(len(chunk), len(buffer))
        buffer[:n] = chunk[:n]
        self._ahead = self._ahead[n:]
        return n

    def peek(self) -> bytes:
        """Up to 64 bytes that come next; they stay to be read."""
        self._ahead = self._ahead or self._read(64)
        return self._ahead

    def close(self) -> None:
        """Give the connection back where all was read, else end it. Can be called again."""
        if self._n_left:
            self._connection.abort()

    def _read(self, n: int) -> bytes:
        if not self._n_left:
            return b""
        try:
            chunk = self._response.read1(min(n, self._n_left))
        except TimeoutError:
            raise self._connection.stalled() from None
        except (OSError, HTTPException, ValueError, AttributeError):
            chunk = b""  # the last two: it was closed meanwhile
        if not chunk:
            raise TransferFault("dropped", f"The connection to {self._connection.host} broke off.")
        self._n_left -= len(chunk)
        if not self._n_left:
            self._connection.release(self._response)
        return chunk


class Transport:
    """GETs from an endpoint and from where it redirects to, over connections that stay open."""

    def __init__(
        self,
        endpoint: str,
        token: str | None,
        stall_s: float = STALL_S,
        make_tls: Callable[[], ssl.SSLContext] = ssl.create_default_context,
    ) -> None:
        self._home = Origin.of(endpoint)
        self._token = token
        self._stall_s = stall_s
        self._make_tls = make_tls
        self._tls: ssl.SSLContext | None = None
        self._idle: dict[Origin, list[_HttpConnection]] = {}

    def get(self, url: str, start: int, end: int | None, etag: str | None = None) -> RemoteBytes:
        """Bytes `start` to `end` (not included; None: all) of what lies at `url`, or all of it
        where the server says so: where `etag` is no longer its ETag, for one.

        Raises TransferFault; HttpRefusal, the endpoint's no; DownloadError.
        """
        wanted = {"Range": f"bytes={start}-{'' if end is None else end - 1}"}
        if etag is not None:
            wanted["If-Range"] = etag
        for _ in range(MAX_REDIRECTS + 1):
            connection, response = self._request(url, wanted)
            if response.status not in (301, 302, 303, 307, 308):
                return self._checked(connection, response, start, end)
            url = self._next(url, response.headers.get("Location", ""))
            connection.finish(response)
        raise DownloadError(f"The Hub redirects more than {MAX_REDIRECTS} times.", "Try again.")

    def close(self) -> None:
        """End the connections that wait for a next request."""
        for idle in self._idle.values():
            while connection := _popped(idle):
                connection.abort()

    def _next(self, url: str, location: str) -> str:
        there = urljoin(url, location)
        if Origin.of(url).scheme == "https" and Origin.of(there).scheme != "https":
            raise DownloadError("The Hub redirects from https to http: refused.", "Try again.")
        return there

    def _request(self, url: str, wanted: Mapping[str, str]) -> tuple[_HttpConnection, HTTPResponse]:
        origin = Origin.of(url)
        headers = {"User-Agent": "localmoe", "Accept-Encoding": "identity", **wanted}
        if self._token and origin == self._home:
            headers["Authorization"] = f"Bearer {self._token}"
        idle = self._idle.setdefault(origin, [])
        while connection := _popped(idle):
            try:
                return connection, connection.ask(url, headers)
            except TimeoutError:
                connection.abort()
                raise connection.stalled() from None
            except (OSError, HTTPException):  # it was closed while it waited
                connection.abort()
        connection = _HttpConnection(origin, idle, self._stall_s)
        try:
            connection.open(self._context(origin))
            return connection, connection.ask(url, headers)
        except BaseException as error:
            connection.abort()
            if isinstance(error, (OSError, HTTPException, UnicodeError)):
                raise connection.fault(error) from None
            raise

    def _context(self, origin: Origin) -> ssl.SSLContext | None:
        if origin.scheme == "https" and self._tls is None:
            self._tls = self._make_tls()
        return self._tls if origin.scheme == "https" else None

    def _checked(
        self, connection: _HttpConnection, response: HTTPResponse, start: int, end: int | None
    ) -> RemoteBytes:
        status, headers = response.status, response.headers
        if status in (200, 206):
            found = extent(status, headers)
            if found and (status == 200 or _is_asked(found, start, end)):
                first, n, total = found
                remote = RemoteBytes(connection, response, first, n, total)
                if not n:
                    connection.release(response)
                return remote
            connection.abort()
            raise DownloadError(f"{connection.host} sends other bytes than it was asked for.")
        connection.finish(response)
        why = {name.lower(): value for name, value in headers.items()}
        busy = status in (408, 429) or status >= 500
        if busy or connection.origin != self._home:  # elsewhere: a signed link that has expired
            message = f"{connection.host} can't answer now (HTTP {status})."
            raise TransferFault("busy", message, retry_after_s(why))
        raise HttpRefusal(status, why)


class _HttpConnection:
    """One connection to an origin, by a proxy where one is set."""

    def __init__(self, origin: Origin, idle: list[_HttpConnection], stall_s: float) -> None:
        self.origin, self.host = origin, origin.host
        self._idle, self._stall_s = idle, stall_s
        self._http: HTTPConnection | None = None
        self._socket: socket.socket | None = None
        self._proxy_headers: dict[str, str] = {}
        self._whole_url = False  # a proxy of plain http is asked for the whole address

    def open(self, tls: ssl.SSLContext | None) -> None:
        host, port = self.origin.host, self.origin.port
        if proxy := proxy_for(self.origin.scheme, host, port):
            host, port = proxy.host, proxy.port
        if tls:
            http: HTTPConnection = HTTPSConnection(host, port, timeout=CONNECT_S, context=tls)
        else:
            http = HTTPConnection(host, port, timeout=CONNECT_S)
        if proxy and tls:
            http.set_tunnel(self.origin.host, self.origin.port, proxy.headers)
        elif proxy:
            self._whole_url, self._proxy_headers = True, proxy.headers
        self._http = http
        http.connect()
        self._socket = http.sock
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)
        self._socket.settimeout(self._stall_s)

    def ask(self, url: str, headers: Mapping[str, str]) -> HTTPResponse:
        assert self._http
        parts = urlsplit(url)
        # what a redirect holds may not be plain ASCII
        path = quote(parts.path or "/", safe="/%:=&~+!$,;'@()*")
        target = f"{path}?{quote(parts.query, safe='/%:=&~+!$,;@()*?')}" if parts.query else path
        if self._whole_url:
            target = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{target}"
        self._http.request("GET", target, headers={**headers, **self._proxy_headers})
        return self._http.getresponse()

    def release(self, response: HTTPResponse) -> None:
        """Done with an answer: keep the connection where all was read and the server does too."""
        all_read = response.length == 0 and not response.will_close
        response.close()
        if all_read and len(self._idle) < IDLE_PER_ORIGIN:
            self._idle.append(self)
        else:
            self.abort()

    def finish(self, response: HTTPResponse) -> None:
        """Pass over the body of an answer that has none of interest."""
        with suppress(OSError, HTTPException):
            response.read(SHORT_BODY_BYTES)
        self.release(response)

    def abort(self) -> None:
        if self._socket:
            with suppress(OSError):  # closed already
                # wakes a thread that waits for bytes; TLS's own would wait for an answer
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)
        if self._http:
            self._http.close()

    def stalled(self) -> TransferFault:
        return TransferFault("stalled", f"{self.host} sent nothing for {self._stall_s:.0f} s.")

    def fault(self, error: BaseException) -> DownloadError:
        """What went wrong before an answer came, in a sentence without addresses or headers."""
        if isinstance(error, ssl.SSLCertVerificationError):
            return untrusted(self.host)
        if isinstance(error, TimeoutError) and self._socket:
            return self.stalled()
        return unreachable(self.host, reason_of(error))


def _popped(idle: list[_HttpConnection]) -> _HttpConnection | None:
    """One of them; another thread may take the last one at any time."""
    try:
        return idle.pop()
    except IndexError:
        return None


def extent(status: int, headers: Message) -> tuple[int, int, int] | None:
    """First byte, number of bytes and length of the whole, as the headers have it."""
    if status == 200:
        length = headers.get("Content-Length", "")
        return (0, int(length), int(length)) if length.isdecimal() else None
    found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", headers.get("Content-Range", ""))
    if not found:
        return None
    first, last, total = (int(n) for n in found.groups())
    return (first, last + 1 - first, total) if first <= last < total else None


def _is_asked(found: tuple[int, int, int], start: int, end: int | None) -> bool:
    first, n, total = found
    return first == start and first + n == (total if end is None else min(end, total))


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """How long a busy server asks to wait: seconds or a date, or the Hub's own `RateLimit`."""
    said = headers.get("retry-after", "")
    if said.isdecimal():
        return float(said)
    try:
        return max(0.0, parsedate_to_datetime(said).timestamp() - time())
    except (ValueError, TypeError):
        found = re.search(r";\s*t=(\d{1,6})", headers.get("ratelimit", ""))
        return float(found[1]) if found else None


def reason_of(error: BaseException) -> str:
    """Why no connection came about."""
    if isinstance(error, socket.gaierror):
        return "its name can't be resolved: no network?"
    if isinstance(error, TimeoutError):
        return f"no answer within {CONNECT_S:.0f} s"
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    tunnel = re.match(r"Tunnel connection failed: (\d{3})", str(error))
    return f"the proxy refuses: HTTP {tunnel[1]}" if tunnel else "the connection broke off"


def untrusted(host: str) -> DownloadError:
    """Someone sits between, or this machine lacks an authority."""
    what = f"The certificate of {host} can't be verified."
    return DownloadError(what, "Behind a company's proxy, set SSL_CERT_FILE to its CA file.")


def unreachable(host: str, reason: str) -> TransferFault:
    """There is no way to the Hub: what to say, and what works all the same."""
    message = f"The Hub can't be reached ({host}: {reason})."
    return TransferFault("dropped", message, hint=OFFLINE_HINT)
