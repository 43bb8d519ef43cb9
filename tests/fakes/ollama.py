"""An Ollama for tests and benchmarks: the real one's routes, silences, slots and faults, without a model.

    async with FakeOllama(models=("a", "b:7b")) as fake:     # http://127.0.0.1:<free port> is fake.url
        fake.fault(status=503, times=2)                      # the next two inference requests fail
        fake.hold(); ...; fake.release(1); ...; fake.release()   # tokens only as the test lets them
        await fake.changes.until(lambda: fake.cancelled == 1)

Every answer is the text `expected_text(n)`: n = `fake.tokens`, or num_predict where that is less.
As a process: python -m tests.fakes.ollama --port 0 --models a,b --tokens 100 --token-delay-ms 20
prints one line `listening http://127.0.0.1:PORT`; POST /_fake/fault, /_fake/hold, /_fake/release
and GET /_fake/stats control it.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any, Self

import orjson
from aiohttp import web

from tests.fakes.fault import Changes, Fault, Gate
from tests.fakes.inference import Inference, answer
from tests.fakes.model import FakeModel, canonical, expected_text
from tests.fakes.scheduler import Scheduler
from tests.fakes.store import Store
from tests.fakes.surface import SURFACES

__all__ = ["FakeModel", "FakeOllama", "Fault", "Received", "expected_text"]

VERSION = "0.33.0"
_MAX_BODY = 1 << 30
_MANAGE = {
    ("POST", "/api/show"), ("POST", "/api/copy"), ("DELETE", "/api/delete"), ("POST", "/api/pull"),
    ("POST", "/api/push"), ("POST", "/api/create"),
}  # fmt: skip
_EMBED = {"/api/embed", "/api/embeddings", "/v1/embeddings"}
_READS = {"/", "/api/version", "/api/tags", "/api/ps", "/api/status", "/v1/models"}
_POSTS = {*SURFACES, *_EMBED, "/api/me", *(p for m, p in _MANAGE if m == "POST")}
_LOCAL_ORIGINS = ("localhost", "127.0.0.1", "0.0.0.0")


@dataclass(frozen=True, slots=True)
class Received:
    """One request as it came over the wire."""

    method: str
    target: str
    raw_headers: tuple[tuple[bytes, bytes], ...]
    body: bytes
    at: float

    @property
    def headers(self) -> dict[str, str]:
        """Return the headers by name in lower case; the last one wins."""
        return {k.decode().lower(): v.decode("latin-1") for k, v in self.raw_headers}

    @property
    def path(self) -> str:
        """Return the target without its query."""
        return self.target.partition("?")[0]

    @property
    def json(self) -> Any:
        """Return the body, decoded."""
        return orjson.loads(self.body)


class FakeOllama:
    """One fake Ollama. Its attributes may be changed while it runs."""

    def __init__(
        self,
        *,
        models: Iterable[str | FakeModel] = ("a:latest",),
        host: str = "127.0.0.1",
        port: int = 0,
        tokens: int = 5,
        token_delay_s: float = 0.0,
        first_token_delay_s: float = 0.0,
        load_s: float = 0.0,
        parallel: int = 1,
        max_queue: int = 512,
        max_loaded: int = 3,
        keep_alive_s: float = 300.0,
        version: str = VERSION,
        record: bool = True,
    ) -> None:
        self.host, self.port, self.version = host, port, version
        self.tokens, self.token_delay_s, self.first_token_delay_s = tokens, token_delay_s, first_token_delay_s
        self.changes = Changes()
        self.gate = Gate()
        self.scheduler = Scheduler(
            parallel=parallel, max_queue=max_queue, max_loaded=max_loaded, load_s=load_s,
            keep_alive_s=keep_alive_s, changed=self.changes.notify,
        )  # fmt: skip
        self.store = Store(self, tuple(m if isinstance(m, FakeModel) else FakeModel(m) for m in models))
        self.requests: deque[Received] = deque(maxlen=10_000 if record else 0)
        self.cancelled = 0
        self.cancelled_at = 0.0
        self.running = 0
        self.served = 0
        self.tokens_sent = 0
        self.blob_bytes = 0
        self.ps_delay_s = 0.0
        self.killed: set[int] = set()
        self.unhang = asyncio.Event()
        self._record = record
        self._faults: list[Fault] = []
        self._inference = Inference(self)
        self._runner: web.ServerRunner | None = None
        self._closing = False
        self._hosts: dict[str, bool] = {}

    @property
    def url(self) -> str:
        """Return its base address."""
        return f"http://{self.host}:{self.port}"

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def start(self) -> None:
        """Listen; again on the same port after `close()`."""
        self._closing = False

        loop = asyncio.get_running_loop()

        def make(message: Any, payload: Any, protocol: Any, writer: Any, task: Any) -> web.BaseRequest:
            return web.BaseRequest(message, payload, protocol, writer, task, loop, client_max_size=_MAX_BODY)

        server = web.Server(self._handle, request_factory=make, handler_cancellation=True, access_log=None,
                            auto_decompress=False)  # fmt: skip
        self._runner = web.ServerRunner(server, shutdown_timeout=0.05)
        await self._runner.setup()
        site = web.TCPSite(self._runner, self.host, self.port, backlog=2048, reuse_address=True)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def close(self) -> None:
        """Stop at once, as a killed process does."""
        self._closing = True
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None
        self.scheduler.close()

    def fault(self, fault: Fault | None = None, **fields: Any) -> Fault:
        """Add a fault (see `Fault`); returns it."""
        fault = fault or Fault.of(fields)
        if fault.model:
            fault.model = canonical(fault.model)
        self._faults.append(fault)
        return fault

    def clear_faults(self) -> None:
        """Take all faults back; those that hang go on."""
        self._faults.clear()
        self.unhang.set()
        self.unhang = asyncio.Event()

    def take_fault(self, model: str) -> Fault | None:
        """Return the first fault that matches and count it down."""
        for fault in self._faults:
            if fault.model in {"", model}:
                if fault.times:
                    fault.times -= 1
                    if not fault.times:
                        self._faults.remove(fault)
                return fault
        return None

    def hold(self) -> None:
        """Let no further token out; before the first one nothing at all is sent."""
        self.gate.hold()

    def release(self, count: int | None = None) -> None:
        """Let `count` tokens out, or all from now on."""
        self.gate.release(count)

    def received(self, path: str) -> list[Received]:
        """Return the requests of that path, oldest first."""
        return [r for r in self.requests if r.path == path]

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        try:
            response = await self._route(request)
            self.served += 1
            return response
        except (asyncio.CancelledError, ConnectionResetError):
            if id(request) in self.killed:
                self.killed.discard(id(request))
            elif not self._closing:
                self.cancelled += 1
                self.cancelled_at = time.monotonic()
            raise
        finally:
            self.changes.notify()

    async def _route(self, request: web.BaseRequest) -> web.StreamResponse:
        method, path = request.method, request.path
        if refusal := self._refuse(request):
            self._note(request, b"")
            return refusal
        if method in {"HEAD", "POST"} and path.startswith("/api/blobs/"):
            self._note(request, b"")
            return await self.store.blob(request, path.removeprefix("/api/blobs/"))
        body = await request.read() if request.body_exists else b""
        self._note(request, body)
        if method == "POST":
            if path in SURFACES:
                return await self._inference.serve(request, path, body)
            if path in _EMBED:
                return await self._inference.embed(path, body, request.headers.get("Content-Encoding", "").lower())
            if path == "/api/me":
                text = {"error": "unauthorized", "signin_url": "https://ollama.com/connect"}
                return answer(text, 401)
        if (method, path) in _MANAGE:
            return await self.store.serve(request, path, body)
        if method in {"GET", "HEAD"} and (path in _READS or path.startswith("/v1/models/")):
            return await self._read(path)
        if path.startswith("/_fake/"):
            return self._control(path, body)
        if path in _READS or path in _POSTS or path == "/api/delete":
            return web.Response(status=405, text="405 method not allowed")
        if len(path) > 1 and path.endswith("/") and path.rstrip("/") in _READS | _POSTS:
            status = 301 if method == "GET" else 307
            return web.Response(status=status, headers={"Location": path.rstrip("/")})
        return web.Response(status=404, text="404 page not found")

    def _note(self, request: web.BaseRequest, body: bytes) -> None:
        if self._record:
            raw = request.raw_headers
            target = request._message.path
            self.requests.append(Received(request.method, target, tuple(raw), body, time.monotonic()))
            self.changes.notify()

    async def _read(self, path: str) -> web.Response:
        match path:
            case "/":
                return web.Response(text="Ollama is running")
            case "/api/version":
                return answer({"version": self.version})
            case "/api/tags":
                return answer({"models": self.store.rows()})
            case "/api/ps":
                if self.ps_delay_s:
                    await asyncio.sleep(self.ps_delay_s)
                return answer({"models": self.scheduler.rows()})
            case "/api/status":
                return answer({"cloud": {"disabled": False, "source": "none"}})
            case "/v1/models":
                rows = [self._openai_model(row["name"]) for row in self.store.rows()]
                return answer({"object": "list", "data": rows or None})
        name = path.removeprefix("/v1/models/")
        if self.store.find(name) is None:
            text = f"model '{name}' not found"
            error = {"message": text, "type": "api_error", "param": None, "code": None}
            return answer({"error": error}, 404)
        return answer(self._openai_model(name))

    def _openai_model(self, name: str) -> dict[str, Any]:
        owner = name.split("/")[-2] if "/" in name else "library"
        return {"id": name, "object": "model", "created": 1767323045, "owned_by": owner}

    def _refuse(self, request: web.BaseRequest) -> web.Response | None:
        host = request.headers.get("Host", "")
        allowed = self._hosts.get(host)
        if allowed is None:
            allowed = self._hosts[host] = self._is_local(host)
        if not allowed:
            return web.Response(status=403)
        origin = request.headers.get("Origin")
        if origin is None:
            if request.method == "OPTIONS":
                return web.Response(status=204 if self._is_name(host) else 405)
            return None
        if origin.partition("://")[2] != host and not self._is_allowed(origin):
            return web.Response(status=403)
        return web.Response(status=204) if request.method == "OPTIONS" else None

    def _is_allowed(self, origin: str) -> bool:
        scheme, _, rest = origin.partition("://")
        if scheme in {"app", "file", "tauri", "vscode-webview", "vscode-file"}:
            return True
        return scheme in {"http", "https"} and rest.split(":")[0] in _LOCAL_ORIGINS

    def _is_name(self, host: str) -> bool:
        name = host.rsplit(":", 1)[0].lower()
        local = name in {"localhost", socket.gethostname().lower()}
        return local or name.endswith((".localhost", ".local", ".internal"))

    def _is_local(self, host: str) -> bool:
        if not self.host.startswith("127."):
            return True
        try:
            address = ipaddress.ip_address(host.rsplit(":", 1)[0].strip("[]"))
        except ValueError:
            return self._is_name(host)
        return address.is_loopback or address.is_private

    def _control(self, path: str, body: bytes) -> web.Response:
        """Answer /_fake/*: the same controls, for a fake that runs as a process of its own."""
        fields = orjson.loads(body) if body else {}
        actions: dict[str, Callable[[], object]] = {
            "/_fake/fault": lambda: self.fault(**fields),
            "/_fake/clear": self.clear_faults,
            "/_fake/hold": self.hold,
            "/_fake/release": lambda: self.release(fields.get("count")),
            "/_fake/stats": lambda: None,
        }
        if path not in actions:
            return web.Response(status=404, text="404 page not found")
        actions[path]()
        names = ("cancelled", "cancelled_at", "running", "served", "tokens_sent", "blob_bytes")
        return answer({name: getattr(self, name) for name in names})


def main(arguments: list[str] | None = None) -> None:
    """Run one fake Ollama until it is killed."""
    import argparse

    parser = argparse.ArgumentParser(prog="python -m tests.fakes.ollama", description="A fake Ollama.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--models", default="a", help="names, comma-separated")
    parser.add_argument("--tokens", type=int, default=5, help="length of every answer")
    parser.add_argument("--token-delay-ms", type=float, default=0.0)
    parser.add_argument("--first-token-ms", type=float, default=0.0)
    parser.add_argument("--load-ms", type=float, default=0.0)
    parser.add_argument("--parallel", type=int, default=1)
    parser.add_argument("--max-queue", type=int, default=512)
    parser.add_argument("--record", action="store_true", help="keep the requests received")
    given = parser.parse_args(arguments)

    async def run() -> None:
        fake = FakeOllama(
            models=given.models.split(","), host=given.host, port=given.port, tokens=given.tokens,
            token_delay_s=given.token_delay_ms / 1e3, first_token_delay_s=given.first_token_ms / 1e3,
            load_s=given.load_ms / 1e3, parallel=given.parallel, max_queue=given.max_queue, record=given.record,
        )  # fmt: skip
        async with fake:
            print(f"listening {fake.url}", flush=True)
            await asyncio.Event().wait()

    try:
        _run_loop(run)
    except KeyboardInterrupt:
        pass


def _run_loop(run: Callable[[], Awaitable[None]]) -> None:
    import uvloop

    async def whole() -> None:
        await run()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(whole())


if __name__ == "__main__":
    main()
