"""One request to a loaded model: tokens come in from the loop, pieces of text go out to who asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from osync.coordinator.stop import StopFilter
from osync.engine.sampling import SamplingOptions
from osync.engine.vocabulary import TextDecoder

DoneReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an answer: whole characters, and the tokens that came since the piece before."""

    text: str
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Final:
    """The end of an answer. Times in nanoseconds."""

    done_reason: DoneReason
    prompt_tokens: int
    prompt_ns: int
    output_tokens: int
    """All that were sampled, the one that ended the answer included."""
    output_ns: int
    tokens: tuple[int, ...]
    """The answer's tokens, without the one that ended it."""
    queued_ns: int = 0
    reused_tokens: int = 0
    """Of the prompt: were in a slot's KV cache already."""


class Words(Protocol):
    """What a request needs of a vocabulary."""

    def piece(self, token: int) -> bytes:
        """Return a token's bytes."""

    def is_end(self, token: int) -> bool:
        """Tell whether the token ends an answer."""


class Request:
    """State of one answer. The loop calls `start`, `take`, `fail`; the asker iterates `events`."""

    def __init__(
        self,
        prompt: Sequence[int],
        options: SamplingOptions,
        words: Words,
        *,
        context_length: int,
        now_ns: int,
        on_cancel: Callable[[Request], None] = lambda _: None,
    ) -> None:
        self.prompt = tuple(prompt)
        self.options = options.with_seed()
        self.is_repeatable = self.options is options
        self.cancelled = False
        self.ended = False
        self.reused = 0
        self._words = words
        self._on_cancel = on_cancel
        self._context_length = context_length
        most = 10 * context_length
        self._limit = options.num_predict if 0 <= options.num_predict <= most else most
        self._decoder = TextDecoder()
        self._stop = StopFilter(options.stop)
        self._tokens: list[int] = []
        self._sampled = 0
        self._queued_ns = self._started_ns = self._first_ns = now_ns
        # Unread text is one string however slow the reader is: no more than the answer itself.
        self._text: list[str] = []
        self._shown = 0
        self._final: Final | None = None
        self._error: BaseException | None = None
        self._news = asyncio.Event()

    @property
    def wants_tokens(self) -> bool:
        """False where only the prompt is to be evaluated."""
        return self._limit > 0

    def may_follow(self, ahead: int) -> bool:
        """Tell whether another token may be wanted after `ahead` tokens that are not known yet."""
        return (
            self._sampled + ahead < self._limit and len(self.prompt) + len(self._tokens) + ahead < self._context_length
        )

    def start(self, now_ns: int, reused: int) -> None:
        """The request got a slot that has `reused` of its tokens already."""
        self._started_ns = now_ns
        self.reused = reused

    def prompt_done(self, now_ns: int) -> None:
        """The whole prompt has been evaluated."""
        if not self._sampled:  # else it was evaluated again
            self._first_ns = now_ns
        if not self.wants_tokens:
            self._finish("length", now_ns)

    def take(self, token: int, now_ns: int) -> None:
        """Take a sampled token; sets `ended` if it was the last."""
        self._sampled += 1
        if self._words.is_end(token):
            self._finish("stop", now_ns)
            return
        self._tokens.append(token)
        self._show(self._stop.feed(self._decoder.feed(self._words.piece(token))))
        if self._stop.stopped:
            self._finish("stop", now_ns)
        elif self._sampled >= self._limit or len(self.prompt) + len(self._tokens) > self._context_length:
            self._finish("length", now_ns)

    def fail(self, error: BaseException) -> None:
        """End with an error."""
        if not self.ended:
            self.ended = True
            self._error = error
            self._news.set()

    def cancel(self) -> None:
        """Nobody reads any more; takes effect at the next evaluation."""
        if not self.ended and not self.cancelled:
            self.cancelled = True
            self._on_cancel(self)

    async def events(self) -> AsyncGenerator[Piece | Final, None]:
        """Yield pieces as they come, at last a Final; raise what the request failed of."""
        while True:
            await self._news.wait()
            self._news.clear()
            if self._text:
                text = "".join(self._text)
                self._text.clear()
                tokens = tuple(self._tokens[self._shown :])
                self._shown = len(self._tokens)
                yield Piece(text, tokens)
            if self._error is not None:
                raise self._error
            if self._final is not None:
                yield self._final
                return

    def _show(self, text: str) -> None:
        if text:
            self._text.append(text)
            self._news.set()

    def _finish(self, reason: DoneReason, now_ns: int) -> None:
        if not self._stop.stopped:
            self._show(self._stop.feed(self._decoder.finish()))
            self._show(self._stop.finish())
        self.ended = True
        self._final = Final(
            done_reason=reason,
            prompt_tokens=len(self.prompt),
            prompt_ns=self._first_ns - self._started_ns,
            output_tokens=self._sampled,
            # The first token falls out of the prompt's evaluation; a count without a time misleads who divides.
            output_ns=max(now_ns - self._first_ns, min(1, self._sampled)),
            tokens=tuple(self._tokens),
            queued_ns=self._started_ns - self._queued_ns,
            reused_tokens=self.reused,
        )
        self._news.set()
