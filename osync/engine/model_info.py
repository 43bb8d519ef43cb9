"""What a file's header says of the model in it."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from osync.engine.embedding import only_embeds
from osync.engine.gguf import GGUFHeader, human_count
from osync.engine.plausible import check_plausible
from osync.errors import ModelUnusable
from osync.types import ModelInfo

_NO_LANGUAGE_MODELS = {"clip", "mmproj", "adapter", "imatrix"}
_NO_VOCABULARY = {"none", "no_vocab"}


def check_language_model(path: Path, header: GGUFHeader) -> None:
    """Raise ModelUnusable if a file is no language model."""
    kind = header.text("general.type", "model")
    if header.architecture in _NO_LANGUAGE_MODELS or kind in _NO_LANGUAGE_MODELS:
        raise ModelUnusable(f"{path.name}: a {kind if kind != 'model' else 'projector'}, not a language model")
    if not header.tensors:
        raise ModelUnusable(f"{path.name}: it holds no tensors, only a vocabulary")
    if header.text("tokenizer.ggml.model") in _NO_VOCABULARY:
        raise ModelUnusable(f"{path.name}: it has no vocabulary")
    check_plausible(header, path.name)


def model_info(
    name: str,
    digest: str,
    size: int,
    mtime: float,
    header: GGUFHeader,
    config: Mapping[str, Any] | None = None,
) -> ModelInfo:
    """Return what a header, and an Ollama store's config object, say of a model; `mtime` in Unix time."""
    config = config or {}
    family = str(config.get("model_family") or header.architecture)
    families = config.get("model_families")
    quantization = str(config.get("file_type") or "")
    return ModelInfo(
        name=name,
        digest=digest,
        size=size,
        modified_at=datetime.fromtimestamp(mtime, UTC).isoformat().replace("+00:00", "Z"),
        family=family,
        families=tuple(map(str, families)) if isinstance(families, list) and families else (family,),
        architecture=header.architecture,
        parameter_size=str(config.get("model_type") or human_count(header.parameter_count)),
        quantization=quantization if quantization not in {"", "unknown"} else header.quantization,
        context_length=header.context_length,
        embedding_length=header.embedding_length,
        capabilities=("embedding",) if only_embeds(header) else ("completion",),
    )
