"""A shard's speed: a guess that is plausible, and corrected by what stages took."""

from __future__ import annotations

from dataclasses import replace

import pytest

from osync.core.stages import SlicePiece, StageOrder, StageSettings
from osync.shard.speed import Speed, measure

pytest.importorskip("numpy")


def test_the_guess_is_that_of_a_computer() -> None:
    assert 1e-12 < measure(2) < 1e-6


def test_what_stages_take_replaces_the_guess() -> None:
    speed = Speed(1e-9)
    speed.learn(1000, 2e-5)
    assert speed.s_per_byte == pytest.approx(2e-8)
    speed.learn(1000, 1e-5)
    assert 1e-8 < speed.s_per_byte < 2e-8
    speed.learn(0, 1.0)
    speed.learn(10, 0.0)
    assert 1e-8 < speed.s_per_byte < 2e-8


def test_an_embedding_that_is_only_looked_up_is_not_read() -> None:
    pieces = (SlicePiece(100, source=0, tensor="token_embd.weight"), SlicePiece(7, source=100, tensor="blk.0.x"))
    order = StageOrder(
        pipeline="p", owner="o", model="m", digest="d", size=200, first=0, last=1, layers=2,
        settings=StageSettings(context_length=8), pieces=(SlicePiece(9, data=b"123456789"), *pieces),
    )  # fmt: skip
    assert order.read_bytes == 7
    assert replace(order, layers=1).read_bytes == 107
    assert replace(order, first=1, last=2).read_bytes == 107
