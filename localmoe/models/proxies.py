"""Which proxy a request takes, by the usual variables: HTTPS_PROXY, ALL_PROXY, NO_PROXY."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit
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
