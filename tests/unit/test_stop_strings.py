"""Stop strings must not depend on where the text is cut."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from osync.coordinator.stop import StopFilter

TEXT = st.text(alphabet="ab<|é", max_size=24)
STOPS = st.lists(st.text(alphabet="ab<|é", max_size=4), max_size=4)


def run(text: str, stops: list[str], cuts: list[int]) -> tuple[str, bool]:
    edges = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    found = StopFilter(stops)
    shown = "".join(found.feed(text[a:b]) for a, b in itertools.pairwise(edges))
    return shown + found.finish(), found.stopped


@given(TEXT, STOPS, st.lists(st.integers(0, 24), max_size=24))
def test_same_text_wherever_it_is_cut(text: str, stops: list[str], cuts: list[int]):
    assert run(text, stops, cuts) == run(text, stops, []) == run(text, stops, list(range(len(text))))


@given(TEXT, STOPS, st.lists(st.integers(0, 24), max_size=24))
def test_shown_text_is_a_start_without_any_stop_string(text: str, stops: list[str], cuts: list[int]):
    shown, stopped = run(text, stops, cuts)
    wanted = [stop for stop in stops if stop]
    assert text.startswith(shown)
    assert not any(stop in shown for stop in wanted)
    assert stopped == any(stop in text for stop in wanted)
    if not stopped:
        assert shown == text


@given(TEXT, STOPS)
def test_holds_back_only_what_may_become_a_stop_string(text: str, stops: list[str]):
    found = StopFilter(stops)
    shown = ""
    for end, char in enumerate(text, 1):
        shown += found.feed(char)
        if found.stopped:
            break
        held = text[len(shown) : end]
        assert held == "" or any(stop.startswith(held) and stop != held for stop in stops)


def test_nothing_more_after_a_stop():
    found = StopFilter(["\n"])
    assert found.feed("a\nb") == "a"
    assert found.stopped
    assert found.feed("c") == "" == found.finish()
