"""How much memory models may take."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from osync.core.memory import budget
from osync.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "expected"),
    [("80%", 800 << 30), ("12GiB", 12 << 30), ("12 gb", 12 << 30), ("1.5g", 3 << 29), ("4096", 4096),
     ("512M", 512 << 20), ("100%", 1000 << 30), ("2TiB", 1000 << 30), ("7b", 7), ("0.5%", 5 << 30)],
)  # fmt: skip
def test_amounts(text: str, expected: int):
    assert budget(text, 1000 << 30) == expected


@pytest.mark.parametrize(
    "text", ["", "%", "-1", "80%%", "GiB", "1e9", "1,5g", "101%", "12ib", "9" * 40 + "t", "12 GiBs"]
)
def test_nonsense_is_a_config_error(text: str):
    with pytest.raises(ConfigError):
        budget(text, 1 << 30)


@given(st.floats(0, 100), st.integers(-5, 1 << 50))
def test_a_share_is_never_more_than_there_is(share: float, available: int):
    assert 0 <= budget(f"{share:.3f}%", available) <= max(0, available)
