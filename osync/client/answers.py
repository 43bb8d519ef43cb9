"""What the server answers, typed. Each value keeps the whole object that it came from in `raw`.

Ollama leaves out what is zero or empty; here it is 0, "" or an empty tuple. Durations are nanoseconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, TypeVar

A = TypeVar("A", bound="Answer")

_BUILT = {"built": True}
_PLAIN: dict[type[Answer], tuple[tuple[str, Any], ...]] = {}  # worked out once: it is asked per token


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Base of all answers. `raw` is the JSON object as it came, with the fields that have no attribute."""

    raw: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls: type[A], raw: Any, **known: Any) -> A:
        """Build one from a decoded JSON object; what is absent or of another type gets its default."""
        source: Mapping[str, Any] = raw if isinstance(raw, dict) else {}
        values = {
            name: converted
            for name, default in _plain_fields(cls)
            if name in source and (converted := _fit(source[name], default)) is not None
        }
        return cls(**(values | known), raw=source)


def _plain_fields(cls: type[Answer]) -> tuple[tuple[str, Any], ...]:
    """Return name and default of the fields that are taken from the JSON as they are."""
    known = _PLAIN.get(cls)
    if known is None:
        known = _PLAIN[cls] = tuple(
            (f.name, f.default if f.default is not MISSING else {})
            for f in fields(cls)
            if f.name != "raw" and not f.metadata.get("built")
        )
    return known


def _fit(value: Any, default: Any) -> Any:
    if isinstance(default, bool):
        return value if isinstance(value, bool) else None
    if isinstance(default, (int, float)):
        return type(default)(value) if isinstance(value, (int, float)) else None
    if isinstance(default, tuple):
        return tuple(value) if isinstance(value, list) else None
    return value if isinstance(value, type(default)) else None


def _built(default: Any) -> Any:
    """Declare a field that `of` of the class makes itself."""
    return field(default=default, metadata=_BUILT)


def _table() -> Any:
    """Declare a field that holds a JSON object."""
    return field(default_factory=dict)


def _rows(raw: Any, key: str) -> list[Any]:
    rows = raw.get(key) if isinstance(raw, dict) else None
    return rows if isinstance(rows, list) else []


@dataclass(frozen=True, kw_only=True)
class ToolCall(Answer):
    """A function that the model wants called."""

    id: str = ""
    name: str = _built("")
    arguments: Mapping[str, Any] = field(default_factory=dict, metadata=_BUILT)

    @classmethod
    def of(cls, raw: Any, **known: Any) -> ToolCall:
        """Build one from Ollama's {"function": {"name", "arguments"}}."""
        function = raw.get("function") if isinstance(raw, dict) else None
        function = function if isinstance(function, dict) else {}
        arguments = function.get("arguments")
        known.setdefault("name", str(function.get("name", "")))
        known.setdefault("arguments", arguments if isinstance(arguments, dict) else {})
        return super().of(raw, **known)


@dataclass(frozen=True, kw_only=True)
class Message(Answer):
    """One message of a chat; may be given back to `chat` as it is."""

    role: str = ""
    content: str = ""
    thinking: str = ""
    images: tuple[str, ...] = ()
    tool_name: str = ""
    tool_calls: tuple[ToolCall, ...] = _built(())

    @classmethod
    def of(cls, raw: Any, **known: Any) -> Message:
        """Build one from a decoded message."""
        known.setdefault("tool_calls", tuple(ToolCall.of(call) for call in _rows(raw, "tool_calls")))
        return super().of(raw, **known)

    def as_json(self) -> dict[str, Any]:
        """Return the message as a request carries it."""
        out: dict[str, Any] = {**self.raw, "role": self.role, "content": self.content}
        for name in ("thinking", "tool_name"):
            if value := getattr(self, name):
                out[name] = value
        if self.images:
            out["images"] = list(self.images)
        if self.tool_calls:
            out["tool_calls"] = [
                {**call.raw, "function": {"name": call.name, "arguments": dict(call.arguments)}}
                if not call.raw
                else dict(call.raw)
                for call in self.tool_calls
            ]
        return out


@dataclass(frozen=True, kw_only=True)
class Timed(Answer):
    """Counts and times that a final answer carries."""

    model: str = ""
    created_at: str = ""
    done: bool = False
    done_reason: str = ""
    total_duration: int = 0
    load_duration: int = 0
    prompt_eval_count: int = 0
    prompt_eval_duration: int = 0
    eval_count: int = 0
    eval_duration: int = 0
    logprobs: tuple[Any, ...] = ()
    node: str = _built("")
    """Node that answered, from the X-Osync-Node header; "" where an Ollama answers directly."""


@dataclass(frozen=True, kw_only=True)
class GenerateResponse(Timed):
    """A piece of a completion, or all of it where nothing was streamed."""

    response: str = ""
    thinking: str = ""
    context: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ChatResponse(Timed):
    """A piece of an assistant's message, or all of it where nothing was streamed."""

    message: Message = field(default_factory=Message, metadata=_BUILT)

    @classmethod
    def of(cls, raw: Any, **known: Any) -> ChatResponse:
        """Build one from a decoded line or object."""
        known.setdefault("message", Message.of(raw.get("message") if isinstance(raw, dict) else None))
        return super().of(raw, **known)


@dataclass(frozen=True, kw_only=True)
class EmbedResponse(Answer):
    """One vector per input, in order."""

    model: str = ""
    embeddings: tuple[tuple[float, ...], ...] = _built(())
    total_duration: int = 0
    load_duration: int = 0
    prompt_eval_count: int = 0
    node: str = _built("")

    @classmethod
    def of(cls, raw: Any, **known: Any) -> EmbedResponse:
        """Build one from a decoded object."""
        known.setdefault("embeddings", tuple(tuple(v) for v in _rows(raw, "embeddings") if isinstance(v, list)))
        return super().of(raw, **known)


@dataclass(frozen=True, kw_only=True)
class ModelDetails(Answer):
    """What kind of model it is."""

    format: str = ""
    family: str = ""
    families: tuple[str, ...] = ()
    parameter_size: str = ""
    quantization_level: str = ""
    parent_model: str = ""


@dataclass(frozen=True, kw_only=True)
class Model(Answer):
    """A model that at least one node has. Size in bytes."""

    name: str = ""
    model: str = ""
    modified_at: str = ""
    digest: str = ""
    size: int = 0
    capabilities: tuple[str, ...] = ()
    details: ModelDetails = field(default_factory=ModelDetails, metadata=_BUILT)

    @classmethod
    def of(cls, raw: Any, **known: Any) -> Model:
        """Build one from a row of /api/tags."""
        known.setdefault("details", ModelDetails.of(raw.get("details") if isinstance(raw, dict) else None))
        return super().of(raw, **known)


@dataclass(frozen=True, kw_only=True)
class RunningModel(Answer):
    """A model in some node's memory. Sizes in bytes."""

    name: str = ""
    model: str = ""
    digest: str = ""
    size: int = 0
    size_vram: int = 0
    expires_at: str = ""
    context_length: int = 0
    details: ModelDetails = field(default_factory=ModelDetails, metadata=_BUILT)

    @classmethod
    def of(cls, raw: Any, **known: Any) -> RunningModel:
        """Build one from a row of /api/ps."""
        known.setdefault("details", ModelDetails.of(raw.get("details") if isinstance(raw, dict) else None))
        return super().of(raw, **known)


@dataclass(frozen=True, kw_only=True)
class ListResponse(Answer):
    """Models of all nodes."""

    models: tuple[Model, ...] = _built(())

    @classmethod
    def of(cls, raw: Any, **known: Any) -> ListResponse:
        """Build one from a decoded /api/tags."""
        known.setdefault("models", tuple(Model.of(row) for row in _rows(raw, "models")))
        return super().of(raw, **known)


@dataclass(frozen=True, kw_only=True)
class PsResponse(Answer):
    """Models in memory, over all nodes."""

    models: tuple[RunningModel, ...] = _built(())

    @classmethod
    def of(cls, raw: Any, **known: Any) -> PsResponse:
        """Build one from a decoded /api/ps."""
        known.setdefault("models", tuple(RunningModel.of(row) for row in _rows(raw, "models")))
        return super().of(raw, **known)


@dataclass(frozen=True, kw_only=True)
class ShowResponse(Answer):
    """What is known of one model."""

    modelfile: str = ""
    parameters: str = ""
    template: str = ""
    system: str = ""
    license: str = ""
    modified_at: str = ""
    capabilities: tuple[str, ...] = ()
    model_info: Mapping[str, Any] = _table()
    details: ModelDetails = field(default_factory=ModelDetails, metadata=_BUILT)

    @classmethod
    def of(cls, raw: Any, **known: Any) -> ShowResponse:
        """Build one from a decoded /api/show."""
        known.setdefault("details", ModelDetails.of(raw.get("details") if isinstance(raw, dict) else None))
        return super().of(raw, **known)


@dataclass(frozen=True, kw_only=True)
class Progress(Answer):
    """One step of a pull, push or create. Sizes in bytes."""

    status: str = ""
    digest: str = ""
    total: int = 0
    completed: int = 0


@dataclass(frozen=True, kw_only=True)
class StatusResponse(Answer):
    """The cluster as the proxy sees it; the rows are JSON objects (see the HTTP API's /api/status)."""

    version: str = ""
    node_id: str = ""
    nodes: tuple[Mapping[str, Any], ...] = ()
    shards: tuple[Mapping[str, Any], ...] = ()
    pipelines: tuple[Mapping[str, Any], ...] = ()
    models: tuple[Mapping[str, Any], ...] = ()
    proxies: tuple[Any, ...] = ()
    requests: Mapping[str, Any] = _table()


@dataclass(frozen=True, kw_only=True)
class PlanResponse(Answer):
    """How a model would be split over shards now. `plan` is empty where it cannot be, and `reason` says why."""

    model: str = ""
    reason: str = ""
    decision: Mapping[str, Any] = _table()
    """`is_split`, `reason`, and the `node` that would serve it whole."""
    plan: Mapping[str, Any] = _table()
    table: Mapping[str, Any] = _table()
    """The plan for people: `header` and `rows`."""
