"""The proxies that a client may ask, and which of them it asks next. No I/O."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import urlsplit

from osync.client.calls import Call
from osync.errors import CapacityError, ConfigError, NoNodes, OsyncError, UpstreamUnavailable

CONNECT_TIMEOUT_S = 5.0  # a LAN answers in milliseconds; one lost SYN costs a second, two cost three


def base_url(host: str, port: int) -> str:
    """Return the address of a server given by host and port; a host may be a whole URL."""
    if "://" in host:
        return checked(host)
    return checked(f"http://[{host}]:{port}" if ":" in host and host[0] != "[" else f"http://{host}:{port}")


def checked(url: str) -> str:
    """Return a base URL without its last slash. Raises ConfigError if it is none."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable or parts.query or parts.fragment:
        raise ConfigError(f"{url!r} is not a server's address; write it as http://host:8000")
    return url.rstrip("/")


class Servers:
    """Base URLs in the order given, starting from the one that answered last."""

    def __init__(self, urls: Sequence[str]) -> None:
        if isinstance(urls, str) or not urls:
            raise ConfigError("base_urls must be a list of at least one http://host:port")
        self._urls = tuple(checked(url) for url in urls)
        self._current = 0

    def order(self) -> tuple[str, ...]:
        """Return all servers in the order in which one request tries them."""
        return self._urls[self._current :] + self._urls[: self._current]

    def answered(self, url: str) -> None:
        """Stay with `url` from now on."""
        self._current = self._urls.index(url)


def headers(api_key: str | None) -> dict[str, str]:
    """Return the headers of every request."""
    own = {"Content-Type": "application/json", "Accept": "application/json, application/x-ndjson"}
    return own | {"Authorization": f"Bearer {api_key}"} if api_key else own


def may_move(call: Call, error: OsyncError, *, sent: bool) -> bool:
    """Return whether another proxy may be asked after `error`, which came before any byte of an answer."""
    if not sent or isinstance(error, (CapacityError, NoNodes)):
        return True
    return call.repeatable and isinstance(error, UpstreamUnavailable)
