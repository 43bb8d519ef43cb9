"""The engine's frames and outcomes as the messages that travel between shards, and back."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

import orjson

from osync.engine import frame as engine
from osync.engine.sampling import SamplingOptions
from osync.errors import BadRequest, WireError
from osync.wire import activation as wire
from osync.wire.activation_dtype import Activations

_DRAWN = "drawn"
_DEFAULTS = {field.name: field.default for field in fields(SamplingOptions)}


def to_wire(frame: engine.Frame, epoch: int, number: int, activations: Activations | None = None) -> wire.Frame:
    """Return a frame as its message; `activations` are what the stage before gave for its rows."""
    rows = tuple([wire.Rows(run.sequence, run.position, run.tokens, run.sample) for run in frame.rows])
    return wire.Frame(epoch, number, rows, tuple(map(_operation_to_wire, frame.operations)), activations)


def from_wire(message: wire.Frame) -> engine.Frame:
    """Return what a message asks a stage to evaluate. Raises WireError for sampling options that are none."""
    rows = tuple([engine.Rows(run.sequence, run.position, run.tokens, run.sample) for run in message.rows])
    return engine.Frame(rows, tuple(map(_operation_from_wire, message.operations)))


def outcome_to_wire(outcome: engine.Outcome, epoch: int, number: int) -> wire.Outcome:
    """Return an outcome as its message."""
    return wire.Outcome(epoch, number, outcome.sampled, outcome.undone)


def outcome_from_wire(message: wire.Outcome) -> engine.Outcome:
    """Return the outcome that a message carries."""
    return engine.Outcome(message.sampled, message.undone)


def _operation_to_wire(operation: engine.Operation) -> wire.Operation:
    match operation:
        case engine.Open(sequence, sampling, history, drawn):
            return wire.Open(sequence, _pack(sampling, drawn), history)
        case engine.Close(sequence):
            return wire.Close(sequence)
        case engine.Truncate(sequence, length):
            return wire.Truncate(sequence, length)
        case engine.Copy(source, target, length):
            return wire.Copy(source, target, length)


def _operation_from_wire(operation: wire.Operation) -> engine.Operation:
    match operation:
        case wire.Open(sequence, sampling, history):
            options, drawn = _unpack(sampling)
            return engine.Open(sequence, options, history, drawn)
        case wire.Close(sequence):
            return engine.Close(sequence)
        case wire.Truncate(sequence, length):
            return engine.Truncate(sequence, length)
        case wire.Copy(source, target, length):
            return engine.Copy(source, target, length)


def _pack(options: SamplingOptions, drawn: int) -> bytes:
    changed = {name: value for name, default in _DEFAULTS.items() if (value := getattr(options, name)) != default}
    return orjson.dumps(changed | {_DRAWN: drawn} if drawn else changed)


def _unpack(text: bytes) -> tuple[SamplingOptions, int]:
    try:
        given = orjson.loads(text or b"{}")
    except orjson.JSONDecodeError:
        raise WireError("activation frame: sampling options are not JSON") from None
    if not isinstance(given, dict):
        raise WireError("activation frame: sampling options are not an object")
    drawn = given.pop(_DRAWN, 0)
    if type(drawn) is not int or not 0 <= drawn <= wire.MAX_TOKENS:
        raise WireError("activation frame: the number of tokens drawn is none")
    try:
        return SamplingOptions(**{name: _checked(name, value) for name, value in given.items()}), drawn
    except BadRequest as error:
        raise WireError(f"activation frame: {error}") from None


def _checked(name: str, value: Any) -> Any:
    default = _DEFAULTS.get(name, MISSING)
    if default is MISSING:
        raise WireError(f"activation frame: unknown sampling option {name!r}")
    if isinstance(default, tuple):
        if isinstance(value, list) and all(isinstance(part, str) for part in value):
            return tuple(value)
    elif isinstance(default, float):
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    elif type(value) is type(default):
        return value
    raise WireError(f"activation frame: sampling option {name!r} is {type(value).__name__}")
