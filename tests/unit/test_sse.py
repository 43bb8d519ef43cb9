from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from osync.wire import sse
from tests.unit.native_answers import events

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab\n", max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["", "error", "message_start"]), JSON_VALUES), max_size=5))
def test_frames_read_back(frames):
    body = b"".join(sse.frame(value, name) for name, value in frames)
    assert events(body) == [(name or None, value) for name, value in frames]


def test_a_frame_is_one_data_line():
    assert sse.frame({"a": "x\n\ny"}, "e") == b'event: e\ndata: {"a":"x\\n\\ny"}\n\n'
    assert sse.frame(1) == b"data: 1\n\n"


def test_done_reads_as_openai_wants():
    assert events(sse.DONE) == [(None, "[DONE]")]
