"""Settings: precedence, conversions, and errors that say what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from osync.config import Settings, default_state_dir, fields, load
from osync.errors import ConfigError


def test_defaults_are_those_of_the_design():
    settings = load({}, {}).settings
    assert settings.role == ("proxy", "node")
    assert (settings.host, settings.port, settings.grpc_port) == ("127.0.0.1", 8000, 50051)
    assert settings.ollama_host == "http://127.0.0.1:11434"
    assert settings.parallel == 4


def test_flag_beats_environment_beats_file_beats_default(tmp_path: Path):
    file = tmp_path / "osync.toml"
    file.write_text('port = 1\ngrpc-port = 2\nhost = "127.0.0.2"\n')
    loaded = load({"port": 3}, {"OSYNC_PORT": "4", "OSYNC_GRPC_PORT": "5"}, file)
    assert (loaded.settings.port, loaded.settings.grpc_port, loaded.settings.host) == (3, 5, "127.0.0.2")
    assert loaded.origin["port"] == "flag --port"
    assert loaded.origin["grpc_port"] == "environment OSYNC_GRPC_PORT"
    assert loaded.origin["host"] == f"file {file}"
    assert loaded.origin["backend"] == "default"


@pytest.mark.parametrize("name", ["OSYNC_PORT", "OLOL_PORT"])
def test_each_variable_of_a_setting_counts(name: str):
    assert load({}, {name: " '9000' "}).settings.port == 9000


def test_lists_come_comma_separated_or_repeated():
    settings = load({"servers": ["a:1,b:2", "c:3"], "rpc_servers": ["b:2"]}, {"OSYNC_ROLE": "proxy, node"}).settings
    assert settings.peers == ("a:1", "b:2", "c:3")
    assert settings.role == ("proxy", "node")


@pytest.mark.parametrize(
    ("raw", "url"),
    [
        ("0.0.0.0", "http://127.0.0.1:11434"),
        ("gpu:9", "http://gpu:9"),
        (":8080", "http://127.0.0.1:8080"),
        ("https://x/y", "https://x/y"),
    ],
)
def test_ollama_host_is_completed_as_ollama_does(raw: str, url: str):
    assert load({}, {"OLLAMA_HOST": raw}).settings.ollama_host == url


@pytest.mark.parametrize(
    ("flags", "env", "words"),
    [
        ({"port": "x"}, {}, "port from flag --port: 'x' does not fit"),
        ({"port": 70000}, {}, "between 0 and 65535"),
        ({"role": ["cook"]}, {}, "'cook' is not one of proxy, node"),
        ({"servers": ["nohost"]}, {}, "'nohost' is not host:port"),
        ({"parallel": 0}, {}, "at least 1"),
        ({"host": "0.0.0.0"}, {}, "--insecure"),
        ({"nonsense": 1}, {}, "unknown setting 'nonsense'"),
        ({}, {"OSYNC_INSECURE": "maybe"}, "true or false"),
    ],
)
def test_wrong_settings_say_what_is_wrong(flags: dict[str, object], env: dict[str, str], words: str):
    with pytest.raises(ConfigError, match=words.replace("(", r"\(")):
        load(flags, env)


def test_a_broken_file_is_an_error_with_its_name(tmp_path: Path):
    file = tmp_path / "bad.toml"
    file.write_text("port = = 3")
    with pytest.raises(ConfigError, match=r"bad\.toml is not TOML"):
        load({}, {}, file)
    with pytest.raises(ConfigError, match="cannot read"):
        load({}, {}, tmp_path / "absent.toml")


def test_an_unknown_key_in_a_file_is_an_error(tmp_path: Path):
    file = tmp_path / "osync.toml"
    file.write_text("prot = 3")
    with pytest.raises(ConfigError, match="'prot'"):
        load({}, {}, file)


def test_every_setting_has_a_meaning_and_a_variable_of_its_own():
    variables = [v for f in fields() for v in f.metadata["env"]]
    assert len(variables) == len(set(variables))
    assert all(f.metadata["doc"] and f.metadata["env"] for f in fields())


def test_state_directory_is_where_the_platform_keeps_state():
    assert default_state_dir({"STATE_DIRECTORY": "/s/osync:/other"}) == Path("/s/osync")
    assert default_state_dir({"XDG_STATE_HOME": "/x"}) in (Path("/x/osync"), default_state_dir({}))


def test_loopback_is_what_only_this_host_reaches():
    assert Settings(host="127.0.0.9").is_loopback
    assert Settings(host="localhost").is_loopback
    assert not Settings(host="192.168.0.1").is_loopback
