"""What the commands print, and how they read their flags."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from osync.cli import options
from osync.cli.status import print_status
from osync.cli.tables import ago, print_table, size
from osync.client.answers import StatusResponse
from osync.errors import ConfigError

NOW = datetime(2026, 1, 2, 12, 0, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("timestamp", "words"),
    [
        ("2026-01-02T11:59:30Z", "30 seconds ago"),
        ("2026-01-02T11:59:30.123456789Z", "29 seconds ago"),
        ("2026-01-02T12:05:00+00:00", "in 5 minutes"),
        ("2026-01-01T12:00:00Z", "1 day ago"),
        ("2318-01-02T12:00:00Z", "forever"),
        ("0001-01-01T00:00:00Z", "-"),
        ("", "-"),
        ("soon", "-"),
    ],
)
def test_ago(timestamp, words):
    assert ago(timestamp, NOW) == words


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (91_728_032, "91.7 MB"), (5_230_000_000, "5.2 GB"), (1e15, "1000 TB")],
)
def test_size(count, text):
    assert size(count) == text


def test_piped_tables_are_plain_columns(capsys):
    print_table(("name", "size"), [("a", "1 B"), ("longer", "2 B")])
    assert capsys.readouterr().out == "NAME    SIZE\na       1 B\nlonger  2 B\n"


def test_which_server(monkeypatch):
    monkeypatch.delenv("OSYNC_URL", raising=False)
    assert options.urls(None, None, None) == ["http://127.0.0.1:8000"]
    monkeypatch.setenv("OSYNC_URL", "http://a:1, b:2")
    assert options.urls(None, None, None) == ["http://a:1", "http://b:2"]
    assert options.urls("c", None, None) == ["http://c:8000"]
    assert options.urls(None, 9, None) == ["http://127.0.0.1:9"]
    assert options.urls("::1", 9, None) == ["http://[::1]:9"]
    assert options.urls("c", 9, "https://d") == ["https://d"]


def test_model_options():
    assert options.model_options(["a=1", "b=x=y", "c=[1]", "d="]) == {"a": 1, "b": "x=y", "c": [1], "d": ""}
    with pytest.raises(ConfigError, match="NAME=VALUE"):
        options.model_options(["a"])


def test_status_shows_each_node_and_why_one_is_not_usable(capsys):
    up = {
        "hostname": "h1", "address": "h1:50051", "online": True, "usable": True,
        "backend": {"kind": "engine", "version": "0.1"}, "load": {"active": 1, "slots": 4, "queued": 0},
        "models": ["a", "b"], "loaded_models": [{"name": "a"}], "cpu": {"percent": 12.4},
        "memory": {"total": 8e9, "free": 4e9}, "last_heartbeat": "",
    }  # fmt: skip
    down = {"address": "h2:50051", "host": "h2", "online": False, "health": {"error": "connection refused"}}
    print_status(StatusResponse.of({"version": "1", "nodes": [up, down], "models": [{}], "requests": {"total": 3}}))
    out = capsys.readouterr().out
    assert "1 of 2 nodes usable" in out
    assert "1/4 +0" in out
    assert "4.0 GB of 8.0 GB" in out
    assert "h2:50051: connection refused" in out


def test_status_without_a_node_says_how_to_add_one(capsys):
    print_status(StatusResponse.of({"version": "1", "nodes": []}))
    assert "osyncd --role node" in capsys.readouterr().out
