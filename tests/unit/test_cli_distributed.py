"""The commands of distributed inference: their flags, and what they print."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from typer.testing import CliRunner

import osync.cli.daemon
from osync.cli import distributed
from osync.cli.daemon import parser
from osync.cli.status import print_status
from osync.cli.user import app
from osync.client import calls
from osync.client.answers import PlanResponse, StatusResponse
from osync.config import load


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    flags: list[dict[str, Any]] = []

    def run(given: dict[str, Any]) -> int:
        flags.append(given)
        return 7

    monkeypatch.setattr(osync.cli.daemon, "run", run)
    return flags


def test_rpc_server_is_a_shard(started, tmp_path):
    result = CliRunner().invoke(
        app,
        ["rpc-server", "--host", "127.0.0.1", "--port", "50099", "--device", "cuda", "--flash-attention",
         "--context-window", "4096", "--quantize", "q4_0", "--memory", "2GiB", "--models-dir", str(tmp_path),
         "--state-dir", str(tmp_path)],
    )  # fmt: skip
    assert result.exit_code == 7, result.output
    settings = load(started[0], env={}).settings
    assert (settings.role, settings.grpc_port, settings.device) == (("shard",), 50099, "cuda")
    assert (settings.flash_attention, settings.context_window, settings.quantize) == ("on", 4096, "q4_0")
    assert (settings.memory, settings.models_dir, settings.state_dir) == ("2GiB", (tmp_path,), tmp_path)


def test_rpc_server_has_the_originals_port_and_leaves_the_rest_to_the_environment(started):
    assert CliRunner().invoke(app, ["rpc-server", "--no-flash-attention"]).exit_code == 7
    settings = load(started[0], env={"OSYNC_MEMORY": "1GiB", "OSYNC_DEVICE": "cpu"}).settings
    assert (settings.grpc_port, settings.memory, settings.device) == (50052, "1GiB", "cpu")
    assert settings.flash_attention == "off"


def test_what_this_version_cannot_do_is_said(started):
    from osync.config import fields

    result = CliRunner().invoke(app, ["rpc-server", "--discovery", "--interface", "eth0"])
    assert result.exit_code == 7
    known = {f.name for f in fields()}
    for name in ("discovery", "interface"):
        assert (name in started[0]) is (name in known)
        assert (f"--{name} has no effect yet" in result.stderr) is (name not in known)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dist", ("--servers", "--model", "--prompt", "--stages", "--shards", "--activation-dtype")),
        (
            "rpc_server",
            ("--device", "--flash-attention", "--context-window", "--quantize", "--discovery", "--interface"),
        ),
    ],
)
def test_scripts_have_the_originals_options(name, options, monkeypatch, capsys):
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", [f"osync-{name}", "--help"])
    with pytest.raises(SystemExit) as ended:
        getattr(distributed, name)()
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert all(option in shown for option in options)


def test_the_daemon_has_both_forms_of_its_flags():
    given = vars(parser().parse_args(["--no-distributed", "--distributed-threshold", "7B", "--stage-timeout", "2s"]))
    settings = load({k: v for k, v in given.items() if k not in ("config", "print_config", "version")}, {}).settings
    assert (settings.distributed, settings.distributed_threshold, settings.stage_timeout) == (False, "7B", "2s")
    assert parser().parse_args(["--distributed"]).distributed is True


def test_plan_asks_with_what_was_given():
    assert calls.plan("m:7b", 2, ["a", "b:1"], None).path == "/api/plan?model=m%3A7b&stages=2&shards=a%2Cb%3A1"
    assert calls.plan("m", None, (), 64).path == "/api/plan?model=m&context=64"
    assert PlanResponse.of({"model": "m", "plan": None, "reason": "no"}).plan == {}


def test_status_shows_shards_and_pipelines(capsys):
    shard = {"hostname": "h1", "address": "h1:50052", "online": True, "engine": "llama 1", "round_trip_s": 0.0021,
             "memory": {"total": 8e9, "free": 4e9}, "stages": [{}]}  # fmt: skip
    down = {"hostname": "h2", "address": "h2:50052", "online": False}
    stage = {"hostname": "h1", "first": 0, "last": 16, "state": "ready", "weight_bytes": 3e9, "kv_bytes": 1e9,
             "frame_busy_s": 0.03, "frame_wire_s": 0.001, "queued": 2}  # fmt: skip
    pipeline = {"name": "p", "model": "big:70b", "size": 8e9, "tokens_per_s": 4.25, "active": 1, "queued": 0,
                "recoveries": 1, "stages": [stage, {"address": "h2:1", "first": 16, "last": 32}]}  # fmt: skip
    print_status(StatusResponse.of({"nodes": [], "shards": [shard, down], "pipelines": [pipeline]}))
    out = capsys.readouterr().out
    assert "h1:50052  up" in out
    assert "2.1 ms" in out
    assert "h2:50052  down" in out
    assert "pipeline p: big:70b in 2 stages, 8.0 GB, 4.2 tokens/s, 1 running +0, made anew 1 time" in out
    assert "0-15" in out
    assert "30.0 ms" in out
    assert "16-31" in out
    assert "osyncd --role node" not in out
