"""Answers of several nodes, made one."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from osync.core import merge
from osync.wire import names


def row(name: str, digest: str = "d", at: str = "2026-01-01T00:00:00Z", **more: Any) -> dict[str, Any]:
    return {"name": name, "model": name, "digest": digest, "modified_at": at, **more}


def test_one_row_per_model_whatever_its_spelling() -> None:
    rows = merge.merge_tags([[row("smol:latest")], [row("library/Smol")], [row("smol:x")]], names.key)
    assert sorted(names.key(r["name"]) for r in rows) == [names.key("smol"), names.key("smol:x")]


def test_the_digest_of_most_nodes_wins_over_a_newer_one() -> None:
    old, new = row("m", "same", x=1), row("m", "other", "2026-09-09T00:00:00Z")
    assert merge.merge_tags([[new], [old], [row("m", "same")]], names.key)[0]["digest"] == "same"


def test_among_equals_the_newest_wins_across_zones() -> None:
    earlier = row("m", "a", "2026-01-01T09:00:00+02:00")
    later = row("m", "b", "2026-01-01T08:00:00Z")
    assert merge.merge_tags([[earlier], [later]], names.key) == [later]


def test_unknown_fields_survive_and_rows_are_newest_first() -> None:
    a = row("a", at="2026-01-01T00:00:00.123456789Z", new={"field": [1]})
    b = row("b", at="2026-01-01T00:00:00.123456790Z")
    assert merge.merge_tags([[a, b]], names.key) == [b, a]


def test_nothing_is_an_empty_list_for_tags_and_null_for_openai() -> None:
    assert merge.merge_tags([[], []], names.key) == []
    assert merge.merge_ps([], names.key) == []
    assert merge.merge_v1_models([[]], names.key) is None


def test_ps_has_the_row_of_the_replica_that_expires_last() -> None:
    a = {"name": "m:latest", "size": 5, "size_vram": 5, "expires_at": "2026-01-01T00:05:00Z"}
    b = {"name": "m:latest", "size": 9, "size_vram": 0, "expires_at": "2318-01-01T00:00:00Z"}
    assert merge.merge_ps([[a], [b]], names.key) == [b]


def test_v1_rows_are_merged_newest_first() -> None:
    a = {"id": "a", "object": "model", "created": 1, "owned_by": "library"}
    b = {"id": "b", "object": "model", "created": 2, "owned_by": "library"}
    assert merge.merge_v1_models([[a], [b, a]], names.key) == [b, a]


@pytest.mark.parametrize(
    ("versions", "lowest"),
    [
        ([], ""),
        (["0.9.0", "0.10.0"], "0.9.0"),
        (["0.33.0", "0.33.0-rc2"], "0.33.0-rc2"),
        (["1.0", "1.0.1"], "1.0"),
        (["", "unknown", "0.5.1"], "0.5.1"),
        (["v0.4", "0.3.9"], "0.3.9"),
    ],
)
def test_versions_compare_by_number(versions: list[str], lowest: str) -> None:
    assert merge.lowest_version(versions) == lowest


@given(st.lists(st.lists(st.fixed_dictionaries({"name": st.sampled_from(["a", "A", "b:1"]),
                                                "digest": st.sampled_from(["x", "y"]),
                                                "modified_at": st.sampled_from(["", "2026-01-01T00:00:00Z", "x"])}),
                         max_size=4), max_size=4))  # fmt: skip
def test_merging_loses_and_invents_no_model(answers: list[list[dict[str, Any]]]) -> None:
    rows = merge.merge_tags(answers, names.key)
    given_keys = {names.key(r["name"]) for rows_of in answers for r in rows_of}
    assert [names.key(r["name"]) for r in rows].count("") == 0
    assert {names.key(r["name"]) for r in rows} == given_keys
    assert len(rows) == len(given_keys)
    assert all(any(r in rows_of for rows_of in answers) for r in rows)


def test_rows_without_a_name_are_left_out() -> None:
    assert merge.merge_tags([[{"digest": "x"}, {"name": 5}]], names.key) == []


def test_majority_of_digests() -> None:
    assert merge.majority(["a", "b", "b", ""]) == "b"
    assert merge.majority([]) == ""
