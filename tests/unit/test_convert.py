"""Messages of the node link and the values of osync.types: there and back, and what is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from osync import errors
from osync.errors import CapacityError, OsyncError, UpstreamUnavailable, WireError
from osync.net import convert
from osync.net.outbox import Outbox, Outgoing
from osync.pb import node_pb2 as pb
from osync.types import (
    BackendState,
    EngineDevice,
    EngineReport,
    Gpu,
    HostLoad,
    LoadedModel,
    ModelInfo,
    NodeId,
    NodeState,
    RequestHead,
    ResponseHead,
)

text = st.text(st.characters(codec="utf-8"), max_size=12)
size = st.integers(0, (1 << 63) - 1)
small = st.integers(0, (1 << 32) - 1)
real = st.floats(0, 1e12, allow_nan=False)
words = st.lists(text, max_size=3).map(tuple)
raw = st.binary(max_size=20).map(lambda data: data.decode("utf-8", "surrogateescape"))
field = raw.map(lambda text: text.replace("\n", " "))
headers = st.lists(st.tuples(field, field), max_size=5).map(tuple)
models = st.builds(ModelInfo, text, text, size, text, text, text, words, text, text, text, small, small, words)
loaded = st.builds(LoadedModel, text, text, size, size, text, small, small)
loads = st.builds(
    HostLoad, real, small, real, size, size, st.lists(st.builds(Gpu, text, size, size), max_size=2).map(tuple)
)
devices = st.builds(EngineDevice, text, text, text, text, size, size, st.booleans())
flags = [st.booleans()] * 4
engines = st.builds(
    EngineReport, text, text, text, *flags, text, text, text, text, small, st.lists(devices, max_size=2).map(tuple)
)
backends = st.builds(
    BackendState, st.sampled_from(["ollama", "engine"]), st.booleans(), text, text,
    st.lists(models, max_size=3).map(tuple), st.lists(loaded, max_size=2).map(tuple), small, small, small,
    st.none() | engines,
)  # fmt: skip
states = st.builds(
    NodeState, st.text("abc-0", min_size=1).map(NodeId), backends, text, text, words,
    st.integers(0, 65535), loads, st.booleans(), real,
)  # fmt: skip


@given(states)
def test_a_state_survives_the_wire(state):
    message = pb.NodeState()
    convert.fill_state(message, state)
    assert convert.state_from(pb.NodeState.FromString(message.SerializeToString())) == state


@given(st.sampled_from(["GET", "POST", "QUERY"]), raw, headers, st.binary(max_size=50))
def test_a_request_survives_the_wire_whatever_its_bytes(method, target, fields, body):
    head = RequestHead(method, target, fields)
    frame = over_the_wire(lambda outgoing: outgoing.open(head, body))
    assert (convert.request_head(frame), frame.data, frame.end) == (head, body, True)


@given(st.integers(100, 599), headers)
def test_an_answer_survives_the_wire(status, fields):
    head = ResponseHead(status, fields)
    frame = over_the_wire(lambda outgoing: outgoing.head(head))
    assert (convert.response_head(frame), frame.data, frame.end) == (head, b"", False)


def over_the_wire(send: Callable[[Outgoing], None]) -> pb.Frame:
    """Return the one frame that `send` leads to, as it arrives."""
    outbox = Outbox()
    send(Outgoing(outbox, 7))
    message = pb.LinkUp()
    outbox.fill(message.frames)
    [frame] = pb.LinkUp.FromString(message.SerializeToString()).frames
    assert frame.exchange == 7
    return frame


@pytest.mark.parametrize("header", [("X\nY", "1"), ("X", "1\nY"), ("X", "1\n")])
def test_a_header_with_a_line_feed_is_refused(header):
    with pytest.raises(WireError, match="line feed"):
        convert.join_headers((("Host", "x"), header))


@pytest.mark.parametrize("data", [b"X", b"X\n1\nY"])
def test_a_header_without_a_value_is_refused(data):
    with pytest.raises(WireError, match="no value"):
        convert.split_headers(data)


KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, OsyncError)]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_error_keeps_its_class_and_text(kind):
    message = pb.Frame()
    convert.fill_end(message, kind("what to do"))
    error = convert.error_from(message)
    assert type(error) is kind
    assert str(error) == "what to do"


def test_a_full_node_says_when_to_come_back():
    message = pb.Frame()
    convert.fill_end(message, CapacityError("full", 4.5))
    error = convert.error_from(message)
    assert isinstance(error, CapacityError)
    assert error.retry_after_s == 4.5


def test_a_clean_end_is_no_error():
    frame = pb.Frame(exchange=1)
    convert.fill_end(frame, None)
    assert frame.end
    assert convert.error_from(frame) is None


def test_an_error_of_a_later_version_is_unavailable():
    error = convert.error_from(pb.Frame(end=True, failure=pb.Failure(error="new", error_kind="os")))
    assert type(error) is UpstreamUnavailable


@pytest.mark.parametrize(
    "state",
    [
        pb.NodeState(backend=pb.BackendState(kind="ollama")),
        pb.NodeState(node_id="n", backend=pb.BackendState(kind="abacus")),
    ],
)
def test_a_state_that_makes_no_sense_is_refused(state):
    with pytest.raises(WireError):
        convert.state_from(state)


@pytest.mark.parametrize("status", [0, 99, 600])
def test_a_status_that_does_not_exist_is_refused(status):
    with pytest.raises(WireError):
        convert.response_head(pb.Frame(status=status))
