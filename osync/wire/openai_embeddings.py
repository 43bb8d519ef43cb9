"""OpenAI's /v1/embeddings over /api/embed."""

from __future__ import annotations

import base64
import struct
from typing import Any

from osync.errors import BadRequest, StreamBroken
from osync.wire.answer import Codec, read_reply
from osync.wire.body import Object
from osync.wire.fields import integer, model_of, text

_FORMATS = ("float", "base64")


def embed_request(request: Object) -> Object:
    """Return the /api/embed body for an embeddings request."""
    value = request.get("input")
    if value is None or value == []:
        raise BadRequest("invalid input")
    if not isinstance(value, str) and not (isinstance(value, list) and all(isinstance(v, str) for v in value)):
        raise BadRequest("invalid input type: expected a string or a list of strings")
    encoding_format(request)
    native: Object = {"model": model_of(request), "input": value or [""]}  # "" alone would only load
    dimensions = integer(request, "dimensions")
    if dimensions:
        native["dimensions"] = dimensions
    return native


def encoding_format(request: Object) -> str:
    """Return float or base64."""
    wanted = text(request, "encoding_format").lower() or "float"
    if wanted not in _FORMATS:
        raise BadRequest(f"Invalid value for 'encoding_format' = {wanted}. Supported values: ['float', 'base64'].")
    return wanted


class EmbeddingsCodec(Codec):
    """Writes the list of embeddings; it is never streamed."""

    def __init__(self, request: Object) -> None:
        self._model = model_of(request)
        self._base64 = encoding_format(request) == "base64"

    def whole(self, native: Object) -> Object:
        """Return the list object."""
        found = native.get("embeddings")
        rows = found if isinstance(found, list) else []
        tokens = read_reply(native).prompt_tokens
        return {
            "object": "list",
            "data": [
                {"object": "embedding", "embedding": self._row(row), "index": index} for index, row in enumerate(rows)
            ],
            "model": self._model,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }

    def _row(self, row: Any) -> Any:
        if not self._base64:
            return row
        try:
            return base64.b64encode(struct.pack(f"<{len(row)}f", *row)).decode()
        except (struct.error, TypeError, OverflowError):
            raise StreamBroken("the backend's embeddings are not lists of numbers") from None
