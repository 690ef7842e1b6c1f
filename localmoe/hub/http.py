"""HTTP to the Hub over urllib3: ranges of files and short answers, by proxies where they are set.

urllib3 keeps the connections and does TLS, tunnels and SOCKS. Redirects are followed here, because
the token goes to the endpoint's own origin alone and nothing leads from https to http. Faults are
told apart: a TransferFault may go well when it is tried again, an HttpRefusal is the endpoint's no.
"""

from __future__ import annotations

import ipaddress
import re
import socket
import ssl
import sys
import threading
import time
from base64 import b64encode
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.client import HTTPException
from importlib.util import find_spec
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit

import truststore
import urllib3
from urllib3.connection import HTTPConnection
from urllib3.exceptions import HTTPError, ProtocolError, ProxyError, ReadTimeoutError

from .. import __version__
from ..errors import DownloadError
from .types import (
    OFFLINE_HINT,
    FaultKind,
    HttpRefusal,
    HubAccess,
    ProxySettings,
    TransferFault,
    retry_after_s,
)

USER_AGENT = f"localmoe/{__version__}"
CONNECT_S = 10.0
REDIRECTS = (301, 302, 303, 307, 308)
MAX_REDIRECTS = 5
IDLE_PER_ORIGIN = 8  # connections kept for the next request
RECEIVE_BYTES = 512 << 10
"""What the kernel may hold of one connection, up to twice that on Linux: lost, and fetched again,
when a line drops. Four connections at a distance of 100 ms still come to 20 MB/s."""
SOCKET_OPTIONS = [
    *HTTPConnection.default_socket_options,
    (socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES),
]
MIN_READ_BYTES, MAX_READ_BYTES = 2**12, 2**18
"""At a time. A long read is cheap, above all with TLS, whose records have 16 KiB; but it ends when
all of it has come, and what has come is lost where the line fails before."""
READ_S = 0.1  # a read is for what comes in this time
SHORT_BODY_BYTES = 2**16
MAX_ANSWER_BYTES = 2**26  # listings of the largest repositories have some 10 MB
PORTS = {"http": 80, "https": 443}
SOCKS_PORTS = dict.fromkeys(("socks4", "socks4a", "socks5", "socks5h"), 1080)
PROXY_HINT = "See HTTPS_PROXY, ALL_PROXY and NO_PROXY."
LOGIN_WANTED = "the proxy wants a name and a password, as in http://NAME:PASSWORD@HOST:PORT"
NO_ANSWER = (HTTPError, OSError, HTTPException)


@dataclass(frozen=True, slots=True)
class Origin:
    """Scheme, host and port: what a token is bound to."""

    scheme: str
    host: str
    port: int

    @classmethod
    def of(cls, url: str) -> Origin:
        """The origin of `url`. Raises DownloadError where that is none of HTTP."""
        try:
            parts = urlsplit(url)
            default = PORTS[parts.scheme]
            return cls(parts.scheme, (parts.hostname or "").lower(), parts.port or default)
        except (ValueError, KeyError):
            what = "The Hub's address, or where it redirects to, is no http:// or https:// link."
            raise DownloadError(what, "See HF_ENDPOINT.") from None


@dataclass(frozen=True, slots=True)
class Route:
    """Where a request goes, by which proxy, and for how long it may stay without a byte."""

    origin: Origin
    proxy: Proxy | None
    stall_s: float

    def __str__(self) -> str:
        by = f" by the proxy {self.proxy.address}" if self.proxy else ""
        return f"{self.origin.host}{by}"

    def dropped(self) -> TransferFault:
        return TransferFault("dropped", f"The connection to {self} broke off.")

    def stalled(self) -> TransferFault:
        return TransferFault("stalled", f"{self} sent nothing for {self.stall_s:.0f} s.")

    def unreachable(self, kind: FaultKind, reason: str) -> TransferFault:
        """There is no way to the Hub: why, and what works all the same."""
        hint = f"{PROXY_HINT} {OFFLINE_HINT}" if kind == "proxy" else OFFLINE_HINT
        return TransferFault(kind, f"The Hub can't be reached ({self}: {reason}).", hint=hint)


class HttpClient:
    """GETs from an endpoint and from where it redirects to, over connections that stay open.

    Can be used by several threads at once. `stall_s`: for how long no byte of a file may come.
    """

    def __init__(self, access: HubAccess, stall_s: float) -> None:
        self._access, self._stall_s = access, stall_s
        self._home = Origin.of(access.endpoint)
        self._managers: dict[tuple[str, Proxy | None], urllib3.PoolManager] = {}
        self._lock = threading.Lock()

    def get_range(
        self, url: str, start: int, end: int | None, etag: str | None = None
    ) -> RemoteBytes:
        """Bytes `start` to `end` (not included; None: all) of what lies at `url`, or all of it
        where the server says so: where `etag` is no longer its ETag, for one.

        Raises TransferFault; HttpRefusal, the endpoint's no; DownloadError.
        """
        wanted = {"Range": f"bytes={start}-{'' if end is None else end - 1}"}
        if etag is not None:
            wanted["If-Range"] = etag
        route, response = self._follow(url, wanted, self._stall_s)
        found = extent(response.status, response.headers)
        if not found or (response.status == 206 and not _is_asked(found, start, end)):
            response.close()
            raise DownloadError(f"{route} returned other bytes than were asked for.")
        return RemoteBytes(response, route, *found)

    def get(self, url: str, stall_s: float) -> bytes:
        """A short answer, whole. Raises as get_range() does."""
        route, response = self._follow(url, {}, stall_s)
        try:
            return response.read(MAX_ANSWER_BYTES)
        except ReadTimeoutError:
            raise route.stalled() from None
        except NO_ANSWER:
            raise route.dropped() from None
        finally:
            response.close()

    def _follow(
        self, url: str, wanted: Mapping[str, str], stall_s: float
    ) -> tuple[Route, urllib3.BaseHTTPResponse]:
        """The answer with status 200 or 206, wherever it comes from."""
        for _ in range(MAX_REDIRECTS + 1):
            origin = Origin.of(url)
            route = Route(origin, proxy_for(self._access.proxies, origin), stall_s)
            response = self._request(route, url, wanted)
            if response.status in (200, 206):
                return route, response
            pass_over(response)
            if response.status not in REDIRECTS:
                raise self._refusal(route, response)
            url = redirected(url, response.headers.get("Location", ""))
        raise DownloadError(f"The Hub redirects more than {MAX_REDIRECTS} times.", "Try again.")

    def _request(
        self, route: Route, url: str, wanted: Mapping[str, str]
    ) -> urllib3.BaseHTTPResponse:
        headers = {"User-Agent": USER_AGENT, "Accept-Encoding": "identity", **wanted}
        if self._access.token and route.origin == self._home:
            headers["Authorization"] = f"Bearer {self._access.token}"
        manager = self._manager(route)
        timeout = urllib3.Timeout(connect=CONNECT_S, read=route.stall_s)
        is_repeated = False
        while True:
            try:
                return manager.urlopen(
                    "GET", url, headers=headers, timeout=timeout,
                    redirect=False, retries=False, preload_content=False,
                )  # fmt: skip
            except (*NO_ANSWER, UnicodeError) as error:
                if is_repeated or not _was_closed_while_idle(error):
                    raise fault_of(error, route) from None
                is_repeated = True

    def _manager(self, route: Route) -> urllib3.PoolManager:
        key = (route.origin.scheme, route.proxy)
        with self._lock:
            if key not in self._managers:
                self._managers[key] = self._new_manager(*key)
            return self._managers[key]

    def _new_manager(self, scheme: str, proxy: Proxy | None) -> urllib3.PoolManager:
        pool: dict[str, Any] = {"maxsize": IDLE_PER_ORIGIN, "socket_options": SOCKET_OPTIONS}
        if scheme == "https":
            pool["ssl_context"] = tls_context(self._access)
        if proxy is None:
            return urllib3.PoolManager(**pool)
        url = f"{proxy.scheme}://{proxy.address}"
        if proxy.scheme in SOCKS_PORTS:
            # start-up, 10 ms; it needs PySocks, which may not be there
            from urllib3.contrib.socks import SOCKSProxyManager

            return SOCKSProxyManager(url, proxy.user, proxy.password, **pool)
        tls = tls_context(self._access) if proxy.scheme == "https" else None
        return urllib3.ProxyManager(url, proxy_headers=proxy.headers, proxy_ssl_context=tls, **pool)

    def _refusal(self, route: Route, response: urllib3.BaseHTTPResponse) -> Exception:
        status = response.status
        headers = {name.lower(): value for name, value in response.headers.items()}
        if route.proxy and status == 407:
            return route.unreachable("proxy", LOGIN_WANTED)
        if route.origin == self._home:
            return HttpRefusal(status, headers)
        # elsewhere it is a signed link that has expired, or a busy server
        message = f"{route} can't answer now (HTTP {status})."
        return TransferFault("busy", message, retry_after_s(headers))


class RemoteBytes:
    """An answer whose bytes are still to come; a context manager, for one reader.

    `status` is 206 for the range that was asked for, 200 for the whole file. `start` is the place
    of the first byte, `total_bytes` the length of the whole file, `etag` what If-Range takes.
    close() may be called from another thread: the reader then gets a TransferFault.
    """

    def __init__(
        self, response: urllib3.BaseHTTPResponse, route: Route, start: int, n: int, total: int
    ) -> None:
        self.status = response.status
        self.start, self.total_bytes = start, total
        self.content_type = response.headers.get("Content-Type", "")
        etag = response.headers.get("ETag")
        # a weak one never matches in If-Range (RFC 9110, 13.1.5)
        self.etag = None if etag is None or etag.startswith("W/") else etag
        self._response, self._route = response, route
        self._n_left = n
        self._n_at_once = MIN_READ_BYTES
        self._ahead = b""
        self._is_aborted = False

    def __enter__(self) -> RemoteBytes:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read_into(self, buffer: memoryview) -> int:
        """Put the next bytes into `buffer`, waiting for them; gives how many, 0 at the end.

        Raises TransferFault where the connection ends early, or nothing comes for too long.
        """
        if not len(buffer):
            return 0
        chunk = self._ahead or self._read(min(len(buffer), self._n_at_once))
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
        if not self._n_left:
            pass_over(self._response)
        elif not self._is_aborted:
            self._is_aborted = True
            wake_reader(self._response)
            self._response.close()

    def _read(self, n: int) -> bytes:
        if not self._n_left:
            return b""
        began = time.perf_counter()
        try:
            chunk = self._response.read(min(n, self._n_left), decode_content=False)
        except ReadTimeoutError:
            raise self._route.stalled() from None
        except (*NO_ANSWER, ValueError, AttributeError):
            chunk = b""  # the last two: it was closed meanwhile
        # behind a shutdown a TLS socket gives its bytes as they came, still encrypted
        if not chunk or self._is_aborted:
            raise self._route.dropped()
        self._n_left -= len(chunk)
        comes = len(chunk) * READ_S / max(time.perf_counter() - began, 1e-6)
        at_most = min(2 * self._n_at_once, MAX_READ_BYTES)
        self._n_at_once = max(MIN_READ_BYTES, min(int(comes), at_most))
        return chunk


def wake_reader(response: urllib3.BaseHTTPResponse) -> None:
    """End a read that another thread waits in."""
    try:
        response.shutdown()
    except (ValueError, RuntimeError, OSError):
        # TLS within the TLS of a proxy knows no shutdown; the socket below it does
        below = getattr(getattr(response.connection, "sock", None), "socket", None)
        if isinstance(below, socket.socket):
            with suppress(OSError):
                socket.socket.shutdown(below, socket.SHUT_RDWR)


def pass_over(response: urllib3.BaseHTTPResponse) -> None:
    """Read the rest of a short body, so that its connection can be used again, and close it."""
    with suppress(*NO_ANSWER):
        response.read(SHORT_BODY_BYTES, decode_content=False)
        if response.length_remaining == 0:
            response.drain_conn()
    response.close()


def redirected(url: str, location: str) -> str:
    """Where a redirect leads. Raises DownloadError where that is from https to http."""
    there = urljoin(url, location)
    if Origin.of(url).scheme == "https" and Origin.of(there).scheme != "https":
        raise DownloadError("The Hub redirects from https to http: refused.", "Try again.")
    return there


def extent(status: int, headers: Mapping[str, str]) -> tuple[int, int, int] | None:
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


def tls_context(access: HubAccess) -> ssl.SSLContext:
    """Trusts the authorities that were named (SSL_CERT_FILE, SSL_CERT_DIR), or the system's."""
    file, folder = access.ca_file, access.ca_folder
    if file or folder:
        try:
            return ssl.create_default_context(cafile=file, capath=folder)
        except OSError:
            what = f"No certificate authorities can be read from {file or folder}."
            raise DownloadError(what, "See SSL_CERT_FILE and SSL_CERT_DIR.") from None
    paths = ssl.get_default_verify_paths()
    if sys.platform in ("darwin", "win32") or not (paths.cafile or paths.capath):
        return truststore.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    return ssl.create_default_context()


# --- proxies


@dataclass(frozen=True, slots=True)
class Proxy:
    """Where a proxy is, and the login there, which no repr shows."""

    scheme: str
    host: str
    port: int
    user: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)

    @property
    def address(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def headers(self) -> dict[str, str]:
        if self.user is None:
            return {}
        login = f"{self.user}:{self.password or ''}".encode()
        return {"Proxy-Authorization": f"Basic {b64encode(login).decode()}"}


def proxy_for(settings: ProxySettings, origin: Origin) -> Proxy | None:
    """The proxy for an origin; None where it is reached directly. Raises as parse_proxy does."""
    url = settings.urls.get(origin.scheme) or settings.urls.get("all")
    if not url or bypasses_proxy(settings.no_proxy, origin.host, origin.port):
        return None
    if settings.bypasses and settings.bypasses(origin.host):
        return None
    return parse_proxy(url)


def parse_proxy(url: str) -> Proxy:
    """A proxy's address; without a scheme it is http.

    Raises DownloadError for one of another kind, and for SOCKS where PySocks is missing.
    """
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        scheme = "socks5" if parts.scheme == "socks" else parts.scheme
        default = {**PORTS, **SOCKS_PORTS}[scheme]
        host, port = parts.hostname, parts.port or default
    except (ValueError, KeyError):
        host = None
    if not host:
        what = "A proxy is http://HOST:PORT, https://HOST:PORT or socks5://HOST:PORT."
        raise DownloadError(f"{what} The one that is set is none of these.", PROXY_HINT)
    user, password = (x if x is None else unquote(x) for x in (parts.username, parts.password))
    proxy = Proxy(scheme, host, port, user, password)
    if scheme in SOCKS_PORTS and find_spec("socks") is None:
        what = f"The proxy {proxy.address} speaks SOCKS, which needs PySocks."
        raise DownloadError(what, "Try: pip install 'localmoe[socks]', or see NO_PROXY.")
    return proxy


def bypasses_proxy(no_proxy: str, host: str, port: int) -> bool:
    """Whether NO_PROXY leaves a host out: by `*`, a domain, an address or a range of addresses.

    A domain stands for all below it, too, with or without a dot or `*.` before it; a port may
    follow. Names are compared as they are written and never resolved, as curl and Go do.
    """
    host = host.strip("[]").rstrip(".").lower()
    return any(_matches(entry, host, port) for entry in re.split(r"[,\s]+", no_proxy.lower()))


def _matches(entry: str, host: str, port: int) -> bool:
    if entry == "*":
        return True
    with_port = re.fullmatch(r"(\[[^]]*\]|[^:]*):(\d+)", entry)
    if with_port and int(with_port[2]) != port:
        return False
    name = (with_port[1] if with_port else entry).strip("[]")
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        domain = name.removeprefix("*").strip(".")
        return bool(domain) and f".{host}".endswith(f".{domain}")
    with suppress(ValueError):
        return address in ipaddress.ip_network(name, strict=False)
    return False


# --- what went wrong before an answer came


def fault_of(error: BaseException, route: Route) -> DownloadError:
    """The error for a request without an answer, without addresses or headers."""
    chain = list(causes(error))
    root = chain[-1]
    if any(isinstance(e, ssl.SSLCertVerificationError) for e in chain):
        is_proxy = route.proxy and any(isinstance(e, ProxyError) for e in chain)
        return untrusted(route.proxy.host if route.proxy and is_proxy else route.origin.host)
    if isinstance(error, ReadTimeoutError):
        return route.stalled()
    nobody: FaultKind = "proxy" if route.proxy else "unreachable"
    if isinstance(root, socket.gaierror):
        return route.unreachable(nobody, "its name can't be resolved: no network?")
    if isinstance(root, ConnectionRefusedError):
        return route.unreachable(nobody, "connection refused")
    if isinstance(root, TimeoutError):
        kind: FaultKind = "proxy" if route.proxy else "dropped"
        return route.unreachable(kind, f"no answer within {CONNECT_S:.0f} s")
    if type(root).__module__ == "socks":
        return route.unreachable("proxy", f"the proxy refuses: {root}")
    if tunnel := re.match(r"Tunnel connection failed: (\d{3})", str(root)):
        return _refused_tunnel(route, int(tunnel[1]))
    said = root.strerror.lower() if isinstance(root, OSError) and root.strerror else ""
    return route.unreachable("dropped", said or "the connection broke off")


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error and what it wraps; urllib3 and PySocks each have their own ways to do that."""
    yield error
    wrapped = (
        getattr(error, "original_error", None),
        getattr(error, "socket_err", None),
        *error.args,
        error.__cause__ or error.__context__,
    )
    inner = next((e for e in wrapped if isinstance(e, BaseException) and e is not error), None)
    if inner:
        yield from causes(inner)


def _was_closed_while_idle(error: BaseException) -> bool:
    """Whether a kept connection may have ended just when it was used again."""
    *_, root = causes(error)
    is_ended = isinstance(root, ConnectionError) and not isinstance(root, ConnectionRefusedError)
    return is_ended and isinstance(error, (ProtocolError, ProxyError))


def _refused_tunnel(route: Route, status: int) -> TransferFault:
    if status == 407:
        return route.unreachable("proxy", LOGIN_WANTED)
    # a gateway's own trouble may pass
    kind: FaultKind = "busy" if status in (502, 503, 504) else "proxy"
    return route.unreachable(kind, f"the proxy refuses: HTTP {status}")


def untrusted(host: str) -> DownloadError:
    """Someone sits between, or this machine lacks an authority."""
    what = f"The certificate of {host} can't be verified."
    return DownloadError(what, "Behind a company's proxy, set SSL_CERT_FILE to its CA file.")
