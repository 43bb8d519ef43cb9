"""A plain app: what the cluster has, then an answer as it comes.

Run `make run` in another terminal, then: python examples/plain_app.py [MODEL]
"""

from __future__ import annotations

import sys

from osync import OllamaClient
from osync.errors import ModelNotFound, OsyncError


def main(model: str) -> int:
    """Print the models and one completion; return the exit status."""
    try:
        with OllamaClient("localhost", 8000) as client:
            print("models:", ", ".join(known.name for known in client.list().models) or "none")
            for piece in client.generate(model, "Why is the sky blue?", num_predict=60, temperature=0):
                print(piece.response, end="", flush=True)
            print()
    except ModelNotFound as error:
        print(f"{error}; fetch it with: osync pull {model}", file=sys.stderr)
        return 1
    except OsyncError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m-instruct:q4_1"))
