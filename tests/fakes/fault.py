"""Faults on demand and gates that tests hold, for the fake Ollama."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(slots=True)
class Fault:
    """What goes wrong, for the next `times` inference requests (0: for ever) that match `model`."""

    status: int = 0
    """Answer with this status before any token."""
    text: str = "fake fault"
    """Error text of `status` and `error_after`."""
    hang: bool = False
    """Say nothing at all, until the client leaves or the faults are cleared."""
    reset_after: int = -1
    """Kill the connection with a RST after this many tokens; 0: before the head."""
    eof_after: int = -1
    """Close the connection (FIN, no chunked end) after this many tokens."""
    error_after: int = -1
    """A line {"error": text} after this many tokens, then a clean end."""
    end_after: int = -1
    """A clean end after this many tokens, with neither done nor error."""
    delay_s: float = 0.0
    """Added before each token."""
    refuse_load: bool = False
    """500 instead of a load; models that are loaded keep answering."""
    model: str = ""
    """Only requests for this model, by canonical name; empty: any."""
    times: int = 1

    @classmethod
    def of(cls, values: dict[str, object]) -> Fault:
        """Make one of a JSON object; unknown keys are errors."""
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := set(values) - known:
            raise ValueError(f"unknown fault fields {sorted(unknown)}")
        return cls(**values)  # type: ignore[arg-type]


class Gate:
    """Open, or held: then each passage needs a permit."""

    def __init__(self) -> None:
        self.held = False
        self._permits = 0
        self._open = asyncio.Event()

    def hold(self) -> None:
        """Let nobody pass from now on."""
        self.held, self._permits = True, 0
        self._open.clear()

    def release(self, count: int | None = None) -> None:
        """Let `count` passages through, or open for good."""
        if count is None:
            self.held = False
        else:
            self._permits += count
        self._open.set()

    async def passage(self) -> None:
        """Wait until this passage is allowed."""
        while self.held:
            if self._permits:
                self._permits -= 1
                return
            self._open.clear()
            await self._open.wait()


class Changes:
    """Lets tests wait for a condition instead of sleeping for luck."""

    def __init__(self) -> None:
        self._waiting: list[asyncio.Future[None]] = []

    def notify(self) -> None:
        """Say that something changed."""
        if self._waiting:
            waiting, self._waiting = self._waiting, []
            for future in waiting:
                if not future.done():
                    future.set_result(None)

    async def until(self, condition: Callable[[], object], timeout_s: float = 5.0) -> None:
        """Return as soon as `condition()` is true; TimeoutError after `timeout_s`."""
        async with asyncio.timeout(timeout_s):
            while not condition():
                future = asyncio.get_running_loop().create_future()
                self._waiting.append(future)
                await future
