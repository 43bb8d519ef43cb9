"""A shard's speed: a guess that is plausible, and corrected by what stages took."""

from __future__ import annotations

import pytest

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
