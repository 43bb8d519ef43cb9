"""Who may call from a browser: Ollama's rules for Origin and Host, decided from a request's head."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from osync.types import Headers

_LOCAL_HOSTS = ("localhost", "127.0.0.1", "0.0.0.0")  # noqa: S104 (matched against, never bound)
_LOCAL_DOMAINS = (".localhost", ".local", ".internal")
_SCHEMES = ("app://*", "file://*", "tauri://*", "vscode-webview://*", "vscode-file://*")

_METHODS = "GET,POST,PUT,PATCH,DELETE,HEAD,OPTIONS"
_HEADERS = (
    "Authorization,Content-Type,User-Agent,Accept,X-Requested-With,OpenAI-Beta,"
    "x-stainless-arch,x-stainless-async,x-stainless-custom-poll-interval,x-stainless-helper-method,"
    "x-stainless-lang,x-stainless-os,x-stainless-package-version,x-stainless-poll-helper,"
    "x-stainless-retry-count,x-stainless-runtime,x-stainless-runtime-version,x-stainless-timeout,"
    "X-Osync-Session,X-Osync-Node"
)
_EXPOSED = "X-Osync-Node,X-Osync-Request-Id"
_MAX_AGE_S = "43200"
_KEPT = 256
"""Verdicts that are kept; a client may send any number of different Origins and Hosts."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """`status` 0: answer the request, with `headers`. Otherwise that status, without a body, is the answer."""

    status: int = 0
    headers: Headers = ()


_PASS = Verdict()
_FORBIDDEN = Verdict(403)
_LOCAL_OPTIONS = Verdict(204)
_NOT_ALLOWED = Verdict(405)


class Policy:
    """Ollama's rules with this daemon's settings. `hostname` is this machine's."""

    def __init__(self, origins: tuple[str, ...], is_loopback: bool, hostname: str) -> None:
        own = [f"{scheme}://{host}{port}"
               for host in _LOCAL_HOSTS for port in ("", ":*") for scheme in ("http", "https")]  # fmt: skip
        patterns = [origin.strip().lower() for origin in (*origins, *own, *_SCHEMES) if origin.strip()]
        self._any = "*" in patterns
        self._exact = frozenset(p for p in patterns if "*" not in p)
        self._wild = tuple(tuple(p.split("*", 1)) for p in patterns if "*" in p)
        self._is_loopback = is_loopback
        self._hostname = hostname.lower()
        self._verdicts: dict[tuple[bool, str, str], Verdict] = {}

    def decide(self, method: str, origin: str, host: str) -> Verdict:
        """Decide on a request by its method, Origin and Host."""
        key = (method == "OPTIONS", origin, host)
        verdict = self._verdicts.get(key)
        if verdict is None:
            verdict = self._decide(*key)
            if len(self._verdicts) >= _KEPT:
                self._verdicts.clear()
            self._verdicts[key] = verdict
        return verdict

    def _decide(self, is_options: bool, origin: str, host: str) -> Verdict:
        verdict = _PASS
        if origin and origin.lower() not in (f"http://{host.lower()}", f"https://{host.lower()}"):
            if not self.allows(origin):
                return _FORBIDDEN
            if is_options:
                return Verdict(204, self._preflight(origin))
            verdict = Verdict(0, self._allow(origin))
        if self._is_loopback and host and not (_is_private(host) or _is_local_name(host, self._hostname)):
            return _FORBIDDEN
        if is_options and verdict is _PASS:
            return _LOCAL_OPTIONS if self._is_loopback and _is_local_name(host, self._hostname) else _NOT_ALLOWED
        return verdict

    def allows(self, origin: str) -> bool:
        """Return True if a page of that origin may call."""
        origin = origin.lower()
        if self._any or origin in self._exact:
            return True
        return any(
            len(origin) >= len(start) + len(end) and origin.startswith(start) and origin.endswith(end)
            for start, end in self._wild
        )

    def _allow(self, origin: str) -> Headers:
        if self._any:
            return (("Access-Control-Allow-Origin", "*"), ("Access-Control-Expose-Headers", _EXPOSED))
        return (
            ("Access-Control-Allow-Origin", origin),
            ("Access-Control-Expose-Headers", _EXPOSED),
            ("Vary", "Origin"),
        )

    def _preflight(self, origin: str) -> Headers:
        allowed: Headers = (
            ("Access-Control-Allow-Origin", "*" if self._any else origin),
            ("Access-Control-Allow-Methods", _METHODS),
            ("Access-Control-Allow-Headers", _HEADERS),
            ("Access-Control-Max-Age", _MAX_AGE_S),
        )
        if self._any:
            return allowed
        vary = ("Origin", "Access-Control-Request-Method", "Access-Control-Request-Headers")
        return allowed + tuple(("Vary", name) for name in vary)


def _bare(host: str) -> str:
    """Return a Host value without its port and brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if host.count(":") == 1 else host


def _is_private(host: str) -> bool:
    """Return True for an address that no public name can be pointed from: the rebinding defence."""
    try:
        address = ipaddress.ip_address(_bare(host))
    except ValueError:
        return False
    return address.is_loopback or address.is_private or address.is_unspecified


def _is_local_name(host: str, hostname: str) -> bool:
    name = _bare(host).lower()
    return name in ("", "localhost", hostname) or name.endswith(_LOCAL_DOMAINS)
