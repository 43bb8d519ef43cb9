"""Common to all tests."""

from __future__ import annotations

from hypothesis import settings

# The same examples on every run and every machine, however slow.
settings.register_profile("osync", derandomize=True, deadline=None, max_examples=100)
settings.load_profile("osync")
