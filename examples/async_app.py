"""An asyncio app: several questions at once through one client, printed as their answers end.

Run `make run` in another terminal, then: python examples/async_app.py [MODEL]
"""

from __future__ import annotations

import asyncio
import sys

from osync import AsyncOllamaClient
from osync.errors import OsyncError

QUESTIONS = ("Name one colour.", "Name one animal.", "Name one city.")


async def ask(client: AsyncOllamaClient, model: str, question: str) -> None:
    """Print one answer, with what it took."""
    words = []
    async with client.chat(model, [{"role": "user", "content": question}], num_predict=40) as stream:
        async for piece in stream:
            words.append(piece.message.content)
            if piece.done:
                seconds = piece.total_duration / 1e9
                print(f"{question}\n  {''.join(words).strip()}")
                print(f"  ({piece.eval_count} tokens in {seconds:.1f} s on {piece.node or 'this server'})")


async def main(model: str) -> None:
    """Ask all questions at once; one that fails ends the others."""
    async with AsyncOllamaClient("localhost", 8000) as client, asyncio.TaskGroup() as group:
        for question in QUESTIONS:
            group.create_task(ask(client, model, question))


if __name__ == "__main__":
    try:
        asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m-instruct:q4_1"))
    except* OsyncError as failures:
        print(failures.exceptions[0], file=sys.stderr)
        raise SystemExit(1) from None
