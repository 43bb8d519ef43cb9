"""The node role over a fake backend: state, counting, draining, and the host's load."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from osync.config import Settings
from osync.errors import CapacityError
from osync.net.exchange import Body, Responder
from osync.net.memory import MemoryLink
from osync.node.host import HostSampler, parse_gpus, query_gpus
from osync.node.role import NodeRole
from osync.types import BackendState, Gpu, ModelInfo, NodeId, RequestHead
from tests.links import GET, OK, fetch, rest, until


@dataclass
class FakeBackend:
    """Answers when it is released."""

    current: BackendState = field(default_factory=lambda: BackendState("ollama"))
    notify: Callable[[], None] = lambda: None
    release: asyncio.Event = field(default_factory=asyncio.Event)
    calls: list[str] = field(default_factory=list)

    async def start(self) -> None:
        self.calls.append("start")

    async def close(self) -> None:
        self.calls.append("close")

    def state(self) -> BackendState:
        return self.current

    def on_change(self, notify: Callable[[], None]) -> None:
        self.notify = notify

    async def serve(self, head: RequestHead, body: Body, responder: Responder) -> None:
        await responder.start(OK)
        await self.release.wait()


@pytest.fixture
async def backend():
    return FakeBackend()


@pytest.fixture
async def role(backend):
    role = NodeRole(Settings(role=("node",)), backend, NodeId("n-1"))
    await role.start(50123)
    yield role
    await role.close()
    assert backend.calls == ["start", "close"]


async def test_the_state_says_who_and_how_it_is(role):
    state = role.state()
    assert (state.node_id, state.roles, state.grpc_port) == ("n-1", ("node",), 50123)
    assert state.hostname
    assert state.started_at > 0
    assert state.load.memory_total > state.load.memory_free > 0
    assert state.load.cpu_count >= 1
    assert role.state() is state


async def test_a_change_of_the_backend_is_passed_on(role, backend):
    changes = []
    role.on_change(lambda: changes.append(role.state().backend.models))
    backend.current = replace(backend.current, ok=True, models=(ModelInfo("m:latest"),))
    backend.notify()
    assert changes == [(ModelInfo("m:latest"),)]


async def test_requests_are_counted_and_idle_waits_for_the_last(role, backend):
    link = MemoryLink(role.serve, role.state)
    first, second = link.open(GET, b""), link.open(GET, b"")
    await first.head()
    await second.head()
    assert role.active == 2
    idle = asyncio.create_task(role.idle())
    second.close()
    await until(lambda: role.active == 1)
    assert not idle.done()
    backend.release.set()
    assert await rest(first) == b""
    first.close()
    await idle
    assert role.active == 0


async def test_while_draining_what_runs_goes_on_and_nothing_new_comes(role, backend):
    link = MemoryLink(role.serve, role.state)
    running = link.open(GET, b"")
    await running.head()
    changes = []
    role.on_change(lambda: changes.append(role.state().draining))
    role.drain()
    role.drain()
    with pytest.raises(CapacityError, match="draining"):
        await fetch(link)
    backend.release.set()
    assert await rest(running) == b""
    running.close()
    role.undrain()
    assert await fetch(link) == (OK, b"")
    assert changes == [True, False]


async def test_the_load_is_sampled_again(monkeypatch):
    monkeypatch.setattr("osync.node.host.SAMPLE_S", 0.01)
    sampled = asyncio.Event()
    sampler = HostSampler(sampled.set)
    sampler.start()
    first = sampler.load
    await sampled.wait()
    await sampler.close()
    assert sampler.load is not first


def test_gpus_are_read_from_the_tools_table():
    table = "NVIDIA GeForce RTX 4090, 24564, 20000\nOdd, name, [N/A], 5\nbroken\n"
    assert parse_gpus(table) == (Gpu("NVIDIA GeForce RTX 4090", 24564 << 20, 20000 << 20), Gpu("Odd, name", 0, 5 << 20))


@pytest.mark.parametrize(("script", "gpus"), [("echo 'A, 2, 1'", (Gpu("A", 2 << 20, 1 << 20),)), ("exit 9", ())])
async def test_the_tool_is_asked_off_the_loop(tmp_path: Path, script: str, gpus: tuple[Gpu, ...]):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    assert await query_gpus(str(tool)) == gpus


async def test_a_tool_that_hangs_is_killed(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("osync.node.host.GPU_TIMEOUT_S", 0.05)
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nexec sleep 60\n")
    tool.chmod(0o755)
    with pytest.raises(TimeoutError):
        await query_gpus(str(tool))
