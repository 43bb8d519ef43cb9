"""What every loaded model has in common, wherever its layers are: a vocabulary and a generation loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Final

from osync.coordinator.generation import Generation
from osync.coordinator.request import Final as Last
from osync.coordinator.request import Piece
from osync.engine.sampling import SamplingOptions
from osync.engine.vocabulary import Vocabulary

_LONG_TEXT: Final = 16 << 10
"""Characters from which a text is tokenized beside the event loop: some milliseconds' work."""


class Answering:
    """`generate` for as many requests at once as there are slots, the rest waits."""

    def __init__(self, vocabulary: Vocabulary, generation: Generation) -> None:
        self.vocabulary = vocabulary
        self._generation = generation

    @property
    def active(self) -> int:
        """Requests in work."""
        return self._generation.active

    @property
    def queued(self) -> int:
        """Requests that wait for a slot."""
        return self._generation.queued

    async def generate(self, prompt: Sequence[int], options: SamplingOptions) -> AsyncGenerator[Piece | Last, None]:
        """Yield pieces of an answer, at last a Final. Closing the iterator cancels the request."""
        request = self._generation.submit(prompt, options)
        try:
            async with aclosing(request.events()) as events:
                async for event in events:
                    yield event
        finally:
            request.cancel()

    async def tokenize(self, text: str, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Return the text's tokens; a long text does not hold the event loop up."""
        if len(text) < _LONG_TEXT:
            return self.vocabulary.tokenize(text, add_special, parse_special)
        return await asyncio.to_thread(self.vocabulary.tokenize, text, add_special, parse_special)
