"""The committed protobuf code is what proto/ says."""

from __future__ import annotations

import runpy
from importlib.metadata import version
from pathlib import Path

import pytest

from osync.pb import node_pb2_grpc

ROOT = Path(__file__).resolve().parents[2]


def test_generated_code_is_up_to_date(tmp_path: Path):
    if version("grpcio-tools") != node_pb2_grpc.GRPC_GENERATED_VERSION:
        pytest.skip("another version of grpcio-tools writes other code")
    written = runpy.run_path(str(ROOT / "proto" / "generate.py"))["generate"](tmp_path)
    committed = ROOT / "osync" / "pb"
    assert {path.name for path in written} == {path.name for path in committed.glob("*_pb2*.py*")}
    for path in (*written, tmp_path / "__init__.py"):
        assert path.read_text() == (committed / path.name).read_text(), f"{path.name}: run make proto"
