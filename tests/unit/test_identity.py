"""A daemon's id: stable over restarts, different between daemons of one host."""

from __future__ import annotations

from pathlib import Path

from osync.daemon.identity import node_id


def test_id_stays_the_same_over_restarts(tmp_path: Path):
    assert node_id(tmp_path / "a", "127.0.0.1", 50051) == node_id(tmp_path / "a", "127.0.0.1", 50051)


def test_daemons_of_one_host_differ(tmp_path: Path):
    assert node_id(tmp_path, "127.0.0.1", 50051) != node_id(tmp_path, "127.0.0.1", 50052)
    assert node_id(tmp_path, "127.0.0.1", 0) != node_id(tmp_path, "127.0.0.1", 0)


def test_a_state_directory_that_cannot_be_written_is_no_obstacle(tmp_path: Path):
    (tmp_path / "file").write_text("")
    assert node_id(tmp_path / "file" / "state", "127.0.0.1", 50051)
