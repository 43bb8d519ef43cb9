"""The public surface: both clients alike, importing osync cheap, all names there."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import osync
from osync import AsyncOllamaClient, OllamaClient, aio, errors, sync
from osync.client import asynchronous, synchronous


def methods(cls: type) -> dict[str, inspect.Signature]:
    found = inspect.getmembers(cls, inspect.isfunction)
    return {name: inspect.signature(f) for name, f in found if not name.startswith("_") or name == "__init__"}


def test_both_clients_have_the_same_methods_and_parameters():
    ours, theirs = methods(AsyncOllamaClient), methods(OllamaClient)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].parameters == theirs[name].parameters, name


def test_what_the_clients_are_documented_to_have():
    assert set(methods(OllamaClient)) == {
        "__init__", "chat", "close", "copy", "create", "delete", "embed", "generate", "list", "plan", "ps", "pull",
        "push", "show", "status", "version",
    }  # fmt: skip
    for cls in (AsyncOllamaClient, OllamaClient, asynchronous.AsyncStream, synchronous.Stream):
        for name, member in inspect.getmembers(cls, inspect.isfunction):
            assert name.startswith("_") or inspect.getdoc(member), f"{cls.__name__}.{name}"


def test_exported_names_are_sorted_and_there():
    assert osync.__all__ == sorted(osync.__all__)
    for name in osync.__all__:
        assert getattr(osync, name) is not None
    assert aio.AsyncOllamaClient is AsyncOllamaClient
    assert sync.OllamaClient is OllamaClient
    with pytest.raises(AttributeError, match="nothing"):
        osync.nothing  # noqa: B018


def test_importing_osync_imports_no_client_and_the_plain_one_no_aiohttp():
    code = (
        "import sys, osync; assert 'osync.client' not in sys.modules; osync.OllamaClient; "
        "assert 'aiohttp' not in sys.modules and 'asyncio' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)


@pytest.mark.parametrize("client", [AsyncOllamaClient, OllamaClient])
def test_a_wrong_address_is_refused_at_once(client):
    with pytest.raises(errors.ConfigError):
        client(base_urls=["localhost:8000"])
