"""How many sequences a loaded model gets in the memory that is there."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest

from osync.coordinator.runner import RunnerSettings, plan_context
from osync.engine.llama import Model
from osync.errors import ModelUnusable

GIB = 1 << 30


class FakeModel:
    """One GiB of weights, 64 KiB of KV cache per token."""

    size_bytes = GIB
    train_context_length = 32768
    gpu_layers = 0
    path = Path("fake.gguf")

    def kv_bytes_per_token(self, kv_type: str, flash_attention: str = "auto") -> int:
        return 64 << 10


MODEL = cast(Model, FakeModel())


def test_the_models_context_is_the_default_8192_at_most():
    assert plan_context(MODEL, RunnerSettings(), 64 * GIB).context_length == 8192
    assert plan_context(MODEL, RunnerSettings(context_length=20000), 64 * GIB).context_length == 20000
    assert plan_context(MODEL, RunnerSettings(context_length=1 << 20), 64 * GIB).context_length == 32768
    assert plan_context(MODEL, RunnerSettings(context_length=1), 64 * GIB).context_length == 4


def test_fewer_sequences_before_none_at_all():
    assert plan_context(MODEL, RunnerSettings(), 64 * GIB).sequences == 4
    assert plan_context(MODEL, RunnerSettings(), int(2.5 * GIB)).sequences == 2
    with pytest.raises(ModelUnusable, match=r"requires more system memory \(1\.6 GiB\) than is available"):
        plan_context(MODEL, RunnerSettings(), int(1.5 * GIB))


def test_deterministic_mode_fixes_what_changes_bits():
    settings = plan_context(MODEL, RunnerSettings(deterministic=True), 64 * GIB)
    assert (settings.flash_attention, settings.unified) == ("off", False)


def test_a_batch_has_a_row_for_each_sequence_and_512_at_most():
    assert plan_context(MODEL, RunnerSettings(n_batch=1), 64 * GIB).n_batch == 4
    assert plan_context(MODEL, RunnerSettings(n_batch=10_000), 64 * GIB).n_batch == 512


def test_prefixes_are_kept_in_memory_that_nobody_needs():
    """As much as one more sequence of 8192 tokens, half a GiB."""
    assert plan_context(MODEL, RunnerSettings(), 64 * GIB).kept_tokens == 8192
    assert plan_context(MODEL, RunnerSettings(), int(3.7 * GIB)).kept_tokens < 8192
    assert plan_context(MODEL, RunnerSettings(), int(1.7 * GIB)).kept_tokens < 1024
