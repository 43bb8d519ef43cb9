"""Logs: to stderr, in the asked form, and never with what was in a function's variables."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.daemons import ROOT, clean_env

PROGRAM = """
import structlog
from osync.telemetry import log
log.setup("INFO", {form!r})
def answer(prompt):
    raise ValueError("broken")
logger = structlog.get_logger("osync.test")
logger.debug("unseen")
try:
    answer("a " + "secret")
except ValueError:
    logger.exception("failed", node="n")
"""

LIBRARIES = """
import asyncio, gc, logging, warnings
from osync.telemetry import log
log.setup("INFO", {form!r})
log.setup("INFO", {form!r})  # a second time changes nothing

async def broken(prompt):
    raise ValueError("two\\nlines")

async def main():
    asyncio.create_task(broken("a " + "secret"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    gc.collect()
    try:
        await broken("a " + "secret")
    except ValueError:
        logging.getLogger("aiohttp.server").exception("Error handling %s", "request")

asyncio.run(main())
logging.getLogger("grpc._cython.cygrpc").info("unseen")
logging.getLogger("zeroconf").warning("address %s\\nin use", "x")
logging.getLogger("zeroconf").warning("%d does not fit", "text")
warnings.warn("old call")
"""


def lines(form: str, program: str = PROGRAM) -> tuple[str, str]:
    command = [sys.executable, "-W", "default", "-c", program.format(form=form)]
    done = subprocess.run(command, cwd=ROOT, env=clean_env(), capture_output=True, text=True, timeout=20, check=True)
    return done.stdout, done.stderr


@pytest.mark.parametrize("form", ["console", "json"])
def test_a_traceback_shows_no_values(form: str):
    out, err = lines(form)
    assert out == ""
    assert "failed" in err and "ValueError: broken" in err and "unseen" not in err
    assert "a secret" not in err


def test_json_is_one_object_per_line():
    _, err = lines("json")
    event = json.loads(err)
    assert (event["event"], event["level"], event["node"]) == ("failed", "error", "n")


def test_what_libraries_say_is_json_too():
    out, err = lines("json", LIBRARIES)
    events: list[dict[str, Any]] = [json.loads(line) for line in err.splitlines()]
    assert out == ""
    assert [(e["logger"], e["level"]) for e in events] == [
        ("asyncio", "error"), ("aiohttp.server", "error"), ("zeroconf", "warning"), ("zeroconf", "error"),
        ("py.warnings", "warning"),
    ]  # fmt: skip
    assert all(e["timestamp"].endswith("Z") for e in events)
    task, request, address, lost, warning = events
    assert task["event"].startswith("Task exception was never retrieved")
    assert "ValueError: two\nlines" in task["exception"]
    assert request["event"] == "Error handling request"
    assert request["exception"].startswith("Traceback") and "a secret" not in err
    assert address["event"] == "address x\nin use"
    assert lost["event"] == "record_lost"
    assert "old call" in warning["event"]


def test_what_libraries_say_is_readable_on_a_console():
    _, err = lines("console", LIBRARIES)
    row = next(line for line in err.splitlines() if "Error handling request" in line)
    assert "[error" in row and "[aiohttp.server]" in row
    assert err.count("Error handling request") == 1
    assert "ValueError: two" in err and "Logging error" not in err
    assert "unseen" not in err and "a secret" not in err


def test_what_json_cannot_say_does_not_cost_the_line():
    program = PROGRAM + "logger.info('odd', huge=1 << 70, lone='\\ud800', keys={{1: object}}, what={{(1,): 2}})\n"
    _, err = lines("json", program)
    event = json.loads(err.splitlines()[-1])
    assert (event["event"], event["huge"], event["lone"]) == ("odd", str(1 << 70), "?")
