"""OpenAI's and Anthropic's routes over the native ones, for backends that speak only those."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from osync.wire.answer import Codec, Ids, SurfaceAnswer
from osync.wire.anthropic_events import MessagesCodec
from osync.wire.anthropic_messages import messages_request
from osync.wire.body import Object, dump_object, parse_object, struct_of
from osync.wire.openai_chat import ChatCodec, chat_request
from osync.wire.openai_completions import CompletionCodec, generate_request
from osync.wire.openai_embeddings import EmbeddingsCodec, embed_request
from osync.wire.openai_response_events import ResponsesCodec
from osync.wire.openai_responses import responses_request


@dataclass(frozen=True, slots=True)
class Translated:
    """A request in the native API, and what turns its native answer into the surface's."""

    target: str
    body: bytes
    answer: SurfaceAnswer


@dataclass(frozen=True, slots=True)
class _Route:
    target: str
    request: Callable[[Object], Object]
    codec: Callable[[Object, Object, Ids], Codec]


_ROUTES = {
    "/v1/chat/completions": _Route("/api/chat", chat_request, lambda r, n, ids: ChatCodec(r, ids)),
    "/v1/completions": _Route("/api/generate", generate_request, lambda r, n, ids: CompletionCodec(r, ids)),
    "/v1/embeddings": _Route("/api/embed", embed_request, lambda r, n, ids: EmbeddingsCodec(r)),
    "/v1/responses": _Route("/api/chat", responses_request, lambda r, n, ids: ResponsesCodec(r, ids)),
    "/v1/messages": _Route("/api/chat", messages_request, lambda r, n, ids: MessagesCodec(r, ids, _token_estimate(n))),
}


def translate(path: str, body: bytes, seed: str = "") -> Translated | None:
    """Return the native form of a POST to `path`, None where there is none.

    Raises BadRequest. `seed` (a request id) sets apart the ids of requests whose bytes are equal.
    """
    path = path.partition("?")[0]
    route = _ROUTES.get(path)
    if route is None:
        return None
    request = parse_object(body, struct_of(path))
    native = route.request(request)
    ids = Ids(seed, body)
    codec = route.codec(request, native, ids)
    request_id = ids.make("req_") if codec.surface == "anthropic" else ""
    streaming = native.get("stream") is True
    return Translated(route.target, dump_object(native), SurfaceAnswer(codec, streaming, request_id))


def _token_estimate(native: Object) -> int:
    """Return a rough count of a chat's tokens: four bytes each."""
    return max(1, sum(len(str(message.get("content", ""))) for message in native["messages"]) // 4)
