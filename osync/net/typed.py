"""Between the messages of osync.v1.Inference and the JSON of Ollama's API. Pure."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Mapping
from typing import Any

from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct, Value

from osync.errors import BadRequest
from osync.pb import inference_pb2 as pb

Json = dict[str, Any]

_INT64 = 2**63 - 1


def generate(request: pb.GenerateRequest) -> Json:
    """Return the body of /api/generate."""
    body: Json = {"model": request.model, "prompt": request.prompt, "stream": True}
    if request.suffix:
        body["suffix"] = request.suffix
    if request.context:
        body["context"] = list(request.context)
    if request.raw:
        body["raw"] = True
    if request.images:
        body["images"] = _images(request.images)
    return body | _present(request, "system", "template", "truncate", "shift") | _shared(request)


def chat(request: pb.ChatRequest) -> Json:
    """Return the body of /api/chat."""
    body: Json = {"model": request.model, "messages": [_message(m) for m in request.messages], "stream": True}
    if request.tools:
        body["tools"] = [_plain(tool) for tool in request.tools]
    return body | _present(request, "truncate", "shift") | _shared(request)


def embed(request: pb.EmbedRequest) -> Json:
    """Return the body of /api/embed."""
    body: Json = {"model": request.model, "input": list(request.input)} | _present(request, "truncate")
    if request.dimensions:
        body["dimensions"] = request.dimensions
    if request.keep_alive:
        body["keep_alive"] = _keep_alive(request.keep_alive)
    if request.HasField("options"):
        body["options"] = _plain(request.options)
    return body


def _shared(request: pb.GenerateRequest | pb.ChatRequest) -> Json:
    body: Json = {}
    if request.keep_alive:
        body["keep_alive"] = _keep_alive(request.keep_alive)
    if request.HasField("format"):
        body["format"] = _value(request.format)
    if request.HasField("think"):
        body["think"] = _value(request.think)
    if request.HasField("options"):
        body["options"] = _plain(request.options)
    if request.logprobs:
        body["logprobs"] = True
    if request.top_logprobs:
        body["top_logprobs"] = request.top_logprobs
    return body


def _message(message: pb.Message) -> Json:
    row: Json = {"role": message.role, "content": message.content}
    for name in ("thinking", "tool_name", "tool_call_id"):
        if value := getattr(message, name):
            row[name] = value
    if message.images:
        row["images"] = _images(message.images)
    if message.tool_calls:
        row["tool_calls"] = [_tool_call(call) for call in message.tool_calls]
    return row


def _tool_call(call: pb.ToolCall) -> Json:
    row: Json = {"function": {"name": call.name, "arguments": _plain(call.arguments)}}
    return row | {"id": call.id} if call.id else row


def _images(images: Iterable[bytes]) -> list[str]:
    return [base64.b64encode(image).decode() for image in images]


def _present(request: Message, *names: str) -> Json:
    return {name: getattr(request, name) for name in names if request.HasField(name)}


def _keep_alive(text: str) -> str | float:
    """Return a bare number as a number: in JSON Ollama takes "10" for a broken duration."""
    try:
        seconds = float(text)
    except ValueError:
        return text
    return _number(seconds)


def _plain(struct: Struct) -> Json:
    return {name: _value(value) for name, value in struct.fields.items()}


def _value(value: Value) -> Any:
    match value.WhichOneof("kind"):
        case "number_value":
            return _number(value.number_value)
        case "string_value":
            return value.string_value
        case "bool_value":
            return value.bool_value
        case "struct_value":
            return _plain(value.struct_value)
        case "list_value":
            return [_value(item) for item in value.list_value.values]
    return None


def _number(number: float) -> int | float:
    """Return whole numbers as int: Ollama refuses 2048.0 where it wants an integer."""
    if not math.isfinite(number):
        raise BadRequest("numbers must be finite")
    return int(number) if number.is_integer() else number


def generate_response(raw: Json, node: str) -> pb.GenerateResponse:
    """Type one object of /api/generate."""
    return pb.GenerateResponse(
        model=_text(raw, "model"),
        created_at=_text(raw, "created_at"),
        response=_text(raw, "response"),
        thinking=_text(raw, "thinking"),
        done=raw.get("done") is True,
        done_reason=_text(raw, "done_reason"),
        context=[token for token in _list(raw, "context") if isinstance(token, int)],
        timings=_timings(raw),
        logprobs=_structs(raw, "logprobs"),
        node=node,
    )


def chat_response(raw: Json, node: str) -> pb.ChatResponse:
    """Type one object of /api/chat."""
    return pb.ChatResponse(
        model=_text(raw, "model"),
        created_at=_text(raw, "created_at"),
        message=_typed_message(_table(raw, "message")),
        done=raw.get("done") is True,
        done_reason=_text(raw, "done_reason"),
        timings=_timings(raw),
        logprobs=_structs(raw, "logprobs"),
        node=node,
    )


def _typed_message(raw: Json) -> pb.Message:
    calls = []
    for row in _list(raw, "tool_calls"):
        function = _table(row, "function") if isinstance(row, dict) else {}
        arguments = _struct(_table(function, "arguments"))
        calls.append(pb.ToolCall(id=_text(row, "id"), name=_text(function, "name"), arguments=arguments))
    return pb.Message(
        role=_text(raw, "role"),
        content=_text(raw, "content"),
        thinking=_text(raw, "thinking"),
        tool_calls=calls,
        tool_name=_text(raw, "tool_name"),
        tool_call_id=_text(raw, "tool_call_id"),
    )


def _timings(raw: Json) -> pb.Timings | None:
    names = [field.name for field in pb.Timings.DESCRIPTOR.fields]
    return pb.Timings(**{name: _int(raw, name) for name in names}) if raw.get("done") is True else None


def embed_response(raw: Json, node: str) -> pb.EmbedResponse:
    """Type the object of /api/embed."""
    return pb.EmbedResponse(
        model=_text(raw, "model"),
        embeddings=[pb.Embedding(values=row) for row in _list(raw, "embeddings")],
        total_duration=_int(raw, "total_duration"),
        load_duration=_int(raw, "load_duration"),
        prompt_eval_count=_int(raw, "prompt_eval_count"),
        node=node,
    )


def list_response(raw: Json) -> pb.ListResponse:
    """Type the object of /api/tags."""
    return pb.ListResponse(
        models=[
            pb.ModelSummary(
                name=_text(row, "name") or _text(row, "model"),
                digest=_text(row, "digest"),
                size=_int(row, "size"),
                modified_at=_text(row, "modified_at"),
                capabilities=_texts(row, "capabilities"),
                details=_details(row),
            )
            for row in _list(raw, "models")
        ]
    )


def ps_response(raw: Json) -> pb.PsResponse:
    """Type the object of /api/ps."""
    return pb.PsResponse(
        models=[
            pb.RunningModel(
                name=_text(row, "name") or _text(row, "model"),
                digest=_text(row, "digest"),
                size=_int(row, "size"),
                size_vram=_int(row, "size_vram"),
                expires_at=_text(row, "expires_at"),
                context_length=_int(row, "context_length"),
                details=_details(row),
            )
            for row in _list(raw, "models")
        ]
    )


def show_response(raw: Json) -> pb.ShowResponse:
    """Type the object of /api/show."""
    return pb.ShowResponse(
        modelfile=_text(raw, "modelfile"),
        parameters=_text(raw, "parameters"),
        template=_text(raw, "template"),
        system=_text(raw, "system"),
        license=_text(raw, "license"),
        modified_at=_text(raw, "modified_at"),
        capabilities=_texts(raw, "capabilities"),
        details=_details(raw),
        model_info=_struct(_table(raw, "model_info")),
    )


def progress(raw: Json, node: str) -> pb.PullProgress:
    """Type one object of /api/pull."""
    del node  # a pull is the whole cluster's
    return pb.PullProgress(
        status=_text(raw, "status"),
        digest=_text(raw, "digest"),
        total=_int(raw, "total"),
        completed=_int(raw, "completed"),
    )


def is_last(raw: Json) -> bool:
    """Return whether an object ends its stream cleanly."""
    return raw.get("done") is True or raw.get("status") == "success"


def _details(raw: Json) -> pb.ModelDetails:
    details = _table(raw, "details")
    return pb.ModelDetails(
        format=_text(details, "format"),
        family=_text(details, "family"),
        families=_texts(details, "families"),
        parameter_size=_text(details, "parameter_size"),
        quantization_level=_text(details, "quantization_level"),
        parent_model=_text(details, "parent_model"),
    )


def _text(raw: Any, name: str) -> str:
    value = raw.get(name) if isinstance(raw, dict) else None
    return value if isinstance(value, str) else ""


def _int(raw: Any, name: str) -> int:
    value = raw.get(name) if isinstance(raw, dict) else None
    return max(-_INT64, min(int(value), _INT64)) if isinstance(value, (int, float)) else 0


def _list(raw: Any, name: str) -> list[Any]:
    value = raw.get(name) if isinstance(raw, dict) else None
    return value if isinstance(value, list) else []


def _texts(raw: Any, name: str) -> list[str]:
    return [value for value in _list(raw, name) if isinstance(value, str)]


def _table(raw: Any, name: str) -> Json:
    value = raw.get(name) if isinstance(raw, dict) else None
    return value if isinstance(value, dict) else {}


def _structs(raw: Json, name: str) -> list[Struct]:
    return [_struct(row) for row in _list(raw, name) if isinstance(row, dict)]


def _struct(table: Mapping[str, Any]) -> Struct:
    struct = Struct()
    struct.update(table)
    return struct
