"""Logs: to stderr, in the asked form, and never with what was in a function's variables."""

from __future__ import annotations

import json
import subprocess
import sys

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


def lines(form: str) -> tuple[str, str]:
    command = [sys.executable, "-c", PROGRAM.format(form=form)]
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
