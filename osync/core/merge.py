"""What several nodes answer, made into the one answer that a single Ollama would give.

Rows are JSON objects of Ollama's API, kept whole: fields unknown here survive. `key` maps a model's
name to the form to compare by.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

Row = dict[str, Any]
Key = Callable[[str], str]

_LONG_FRACTION = re.compile(r"(\.\d{6})\d+")
_NUMBERS = re.compile(r"v?(\d+(?:\.\d+)*)(.*)", re.DOTALL)


def merge_tags(answers: Iterable[Sequence[Row]], key: Key) -> list[Row]:
    """Merge the rows of /api/tags: one per name, newest first.

    Where digests differ, the one that most nodes have wins, among equals the newest.
    """
    groups = _by_name(answers, key)
    rows = []
    for group in groups.values():
        votes = Counter(str(row.get("digest")) for row in group)
        rows.append(max(group, key=lambda row: (votes[str(row.get("digest"))], _time(row, "modified_at"))))
    return _newest_first(rows, "modified_at")


def merge_ps(answers: Iterable[Sequence[Row]], key: Key) -> list[Row]:
    """Merge the rows of /api/ps: one per name, the row of the replica that expires last, kept whole.

    Sizes are that replica's, not a sum: clients show size_vram / size as the share on the GPU and
    context_length beside it, which belong to one replica. What each node has is in /api/status.
    """
    rows = [max(g, key=lambda row: _time(row, "expires_at")) for g in _by_name(answers, key).values()]
    return _newest_first(rows, "expires_at")


def merge_v1_models(answers: Iterable[Sequence[Row]], key: Key) -> list[Row] | None:
    """Merge the `data` rows of /v1/models: one per id, newest first; None where there is none, as Ollama."""
    rows = [max(group, key=_created) for group in _by_name(answers, key).values()]
    rows.sort(key=lambda row: (-_created(row), str(row.get("id"))))
    return rows or None


def v1_model(name: str, modified_at: str, namespace: str) -> Row:
    """Return OpenAI's row of a model."""
    created = int(max(instant(modified_at), 0))
    return {"id": name, "object": "model", "created": created, "owned_by": namespace}


def lowest_version(versions: Iterable[str]) -> str:
    """Return the lowest of `versions` by number, a pre-release before its release; "" for none."""
    known = [v for v in versions if _NUMBERS.match(v)]
    return min(known, key=_version, default="")


def majority(digests: Iterable[str]) -> str:
    """Return the digest that occurs most often, the first of equals; "" for none."""
    ranked = Counter(digest for digest in digests if digest).most_common(1)
    return ranked[0][0] if ranked else ""


def instant(text: object) -> float:
    """Return the Unix time of an RFC 3339 text, minus infinity for anything else."""
    if not isinstance(text, str):
        return float("-inf")
    try:
        value = datetime.fromisoformat(_LONG_FRACTION.sub(r"\1", text))
    except ValueError:
        return float("-inf")
    return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()


def _by_name(answers: Iterable[Sequence[Row]], key: Key) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for rows in answers:
        for row in rows:
            name = row.get("name") or row.get("model") or row.get("id")
            if isinstance(name, str) and name:
                groups.setdefault(key(name), []).append(row)
    return groups


def _newest_first(rows: list[Row], field: str) -> list[Row]:
    return sorted(rows, key=lambda row: _time(row, field), reverse=True)


def _time(row: Row, field: str) -> tuple[float, str]:
    # The text decides within a microsecond, which is as far as the number goes.
    return instant(row.get(field)), str(row.get(field))


def _created(row: Row) -> float:
    created = row.get("created")
    return created if isinstance(created, (int, float)) else float("-inf")


def _version(text: str) -> tuple[tuple[int, ...], bool, str]:
    match = _NUMBERS.match(text)
    if match is None:
        return (), False, text
    numbers = [int(part) for part in match[1].split(".")]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers), not match[2].startswith("-"), match[2]
