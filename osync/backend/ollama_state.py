"""What Ollama's answers to tags and ps say, as osync's types. Pure; bad rows are left out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from osync.errors import WireError
from osync.types import LoadedModel, ModelInfo


def parse_version(body: bytes) -> str:
    """Return the version. Raises WireError if this is not Ollama's answer."""
    version = _object(body).get("version")
    if not isinstance(version, str) or not version:
        raise WireError("what answers there is not an Ollama")
    return version


def parse_tags(body: bytes) -> tuple[ModelInfo, ...]:
    """Return the models on disk, in Ollama's order. Raises WireError."""
    return tuple(_model(row) for row in _rows(body))


def parse_ps(body: bytes) -> tuple[LoadedModel, ...]:
    """Return the models in memory, in Ollama's order. Raises WireError."""
    return tuple(
        LoadedModel(
            name=_text(row, "name"),
            digest=_text(row, "digest"),
            size=_count(row, "size"),
            size_vram=_count(row, "size_vram"),
            expires_at=_text(row, "expires_at"),
            context_length=_count(row, "context_length"),
        )
        for row in _rows(body)
    )


def answered_model(piece: bytes) -> str:
    """Return the model that an answer's first bytes seem to name, "" where they do not."""
    _, found, rest = piece[:512].partition(b'"model":"')
    name, quote, _ = rest.partition(b'"')
    return name.decode("utf-8", "replace") if found and quote else ""


def _model(row: Mapping[str, Any]) -> ModelInfo:
    details = row.get("details")
    details = details if isinstance(details, dict) else {}
    family = _text(details, "family")
    return ModelInfo(
        name=_text(row, "name"),
        digest=_text(row, "digest"),
        size=_count(row, "size"),
        modified_at=_text(row, "modified_at"),
        format=_text(details, "format"),
        family=family,
        families=_texts(details, "families"),
        architecture=family,
        parameter_size=_text(details, "parameter_size"),
        quantization=_text(details, "quantization_level"),
        context_length=_count(details, "context_length"),
        embedding_length=_count(details, "embedding_length"),
        capabilities=_texts(row, "capabilities"),
    )


def _object(body: bytes) -> dict[str, Any]:
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise WireError("what answers there is not an Ollama: no JSON") from error
    if not isinstance(value, dict):
        raise WireError("what answers there is not an Ollama: no JSON object")
    return value


def _rows(body: bytes) -> list[dict[str, Any]]:
    rows = _object(body).get("models") or []
    if not isinstance(rows, list):
        raise WireError("Ollama's list of models is not a list")
    return [row for row in rows if isinstance(row, dict) and _text(row, "name")]


def _text(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    return value if isinstance(value, str) else ""


def _count(row: Mapping[str, Any], key: str) -> int:
    value = row.get(key)
    return value if isinstance(value, int) and value > 0 else 0


def _texts(row: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = row.get(key)
    return tuple(item for item in value if isinstance(item, str)) if isinstance(value, list) else ()
