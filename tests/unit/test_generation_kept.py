"""Prefixes outlive the slots that their requests ran in: which are found again, and which go first."""

from __future__ import annotations

import random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from osync.coordinator.kept import Kept
from osync.coordinator.request import Request
from osync.coordinator.schedule import Schedule
from osync.coordinator.slot import common_length
from osync.engine.frame import Copy, Frame, Limits, Outcome, Truncate
from osync.engine.sampling import SamplingOptions
from tests.fakes.stage import Letters


def limits(sequences: int = 2, kept_tokens: int = 1000, **other: Any) -> Limits:
    kept = 8 if kept_tokens else 0
    return Limits(sequences, 4096, 512, sequences, 1000, kept=kept, kept_tokens=kept_tokens, **other)


def prompt_of(conversation: int, length: int = 100) -> list[int]:
    return [conversation] * length


def start(schedule: Schedule, prompt: list[int], **options: Any) -> tuple[Request, int]:
    request = Request(prompt, SamplingOptions(**options), Letters(), context_length=4096, now_ns=0)
    return request, schedule.admit(request)


def evaluate(schedule: Schedule) -> Frame:
    frame = schedule.frame()
    assert frame is not None
    sampled = {rows.sequence: (5,) for rows in frame.rows if rows.sample}
    for request in schedule.apply(frame, Outcome(sampled), 1, 1):
        schedule.release(request)
    return frame


def ask(schedule: Schedule, prompt: list[int], **options: Any) -> int:
    """Run a request of one token alone; return how much of its prompt was there."""
    request, reused = start(schedule, prompt, num_predict=1, **options)
    while not request.ended:
        evaluate(schedule)
    return reused


def test_more_conversations_than_slots_are_kept():
    schedule = Schedule(limits())
    assert [ask(schedule, prompt_of(n)) for n in range(1, 7)] == [0] * 6
    assert [ask(schedule, [*prompt_of(n), 9, 9]) for n in range(1, 7)] == [100] * 6


def test_another_slot_goes_on_while_the_first_is_taken():
    schedule = Schedule(limits())
    ask(schedule, prompt_of(1))
    # Two others that both stay in work; the conversation's slot is one of theirs.
    _, reused = start(schedule, prompt_of(2))
    assert reused == 0
    evaluate(schedule)
    assert ask(schedule, [*prompt_of(1), 9]) == 100


def test_a_running_answers_prompt_is_copied():
    schedule = Schedule(limits(kept_tokens=0))
    start(schedule, prompt_of(1))
    evaluate(schedule)
    _, reused = start(schedule, [*prompt_of(1), 7, 7])
    assert reused == 100
    assert Copy(0, 1, 100) in evaluate(schedule).operations


def test_a_branch_does_not_take_the_trunk_away():
    schedule = Schedule(limits(sequences=1))
    ask(schedule, [*prompt_of(1), *prompt_of(2)])
    assert ask(schedule, [*prompt_of(1), *prompt_of(3)]) == 100
    assert ask(schedule, [*prompt_of(1), *prompt_of(2), 4]) == 200
    assert ask(schedule, [*prompt_of(1), *prompt_of(3), 4]) == 200


def test_idle_slots_are_emptied_for_those_that_run():
    schedule = Schedule(limits(sequences=3))
    for n in (1, 2, 3):
        ask(schedule, prompt_of(n))
    start(schedule, prompt_of(4))
    assert [len(slot.tokens) for slot in schedule.slots if slot.request is None] == [0, 0]


def test_what_does_not_fit_aside_stays_in_its_slot():
    schedule = Schedule(limits(sequences=3, kept_tokens=150))
    assert [ask(schedule, prompt_of(n)) for n in (1, 2, 3)] == [0, 0, 0]
    assert [ask(schedule, [*prompt_of(n), 9]) for n in (1, 2, 3)] == [100] * 3
    assert schedule.kept.tokens <= 150


def test_without_room_aside_slots_keep_what_they_have():
    schedule = Schedule(limits(kept_tokens=0))
    for n in (1, 2):
        ask(schedule, prompt_of(n))
    assert [ask(schedule, [*prompt_of(n), 9]) for n in (1, 2)] == [100, 100]


def test_a_state_that_cannot_be_cut_is_only_gone_on_with():
    schedule = Schedule(limits(cuts=False))
    for n in (1, 2, 3):
        ask(schedule, prompt_of(n))
    assert ask(schedule, [*prompt_of(2), 9, 9]) == 100
    assert ask(schedule, [*prompt_of(1, 99), 9, 9]) == 0
    assert ask(schedule, [*prompt_of(1), 9, 9]) == 100


def test_deterministic_mode_uses_whole_chunks_of_any_sequence():
    schedule = Schedule(limits(kept_tokens=3000), deterministic=True)
    for n in (1, 2, 3):
        ask(schedule, prompt_of(n, 600))
    assert [ask(schedule, [*prompt_of(n, 600), 9]) for n in (1, 2, 3)] == [512] * 3
    start(schedule, prompt_of(1, 700))
    for _ in range(3):
        evaluate(schedule)
    assert start(schedule, prompt_of(1, 700))[1] == 512


def test_a_failed_evaluation_takes_what_it_was_to_keep():
    schedule = Schedule(limits(sequences=1))
    ask(schedule, prompt_of(1))
    request, _ = start(schedule, prompt_of(2))
    frame = schedule.frame()
    assert frame is not None
    assert any(isinstance(operation, Copy) for operation in frame.operations)
    assert schedule.forget(frame) == [request]
    schedule.release(request)
    assert schedule.kept.tokens == 0
    assert ask(schedule, prompt_of(1)) == 0
    assert ask(schedule, [*prompt_of(1), 9]) == 100


def test_the_least_recently_used_goes_first():
    kept = Kept(range(4, 6), 100)
    assert kept.put([1] * 40, 0, 1) == (4, [])
    assert kept.put([2] * 40, 0, 2) == (5, [])
    assert kept.put([1] * 30, 0, 3) == (None, [])  # the longer one serves, and was used with that
    assert kept.put([3] * 40, 0, 4) == (5, [])
    assert {prefix.tokens[0] for prefix in kept} == {1, 3}
    assert kept.put([4] * 90, 0, 5) == (5, [4])
    assert kept.put([5] * 101, 0, 6) == (None, [])
    assert kept.put([6] * 20, 0, 0) == (None, [])  # older than what would have to go
    assert kept.put([4] * 95, 0, 7) == (5, [])
    assert kept.tokens == 95


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 60), st.integers(0, 20)), max_size=30), st.booleans())
def test_never_more_is_kept_than_may_be(puts: list[tuple[int, int, int]], cuts: bool):
    kept = Kept(range(3, 7), 100, cuts=cuts)
    there: set[int] = set()
    for used, (kind, length, fixed) in enumerate(puts):
        place, gone = kept.put([kind] * length, min(fixed, length), used)
        assert there.issuperset(gone)
        there.difference_update(gone)
        if place is not None:
            there.add(place)
        assert {prefix.place for prefix in kept} == there
        assert kept.tokens <= 100
        assert len(there) <= 4


@given(st.lists(st.integers(1, 2), max_size=40), st.lists(st.integers(1, 2), max_size=40), st.integers(0, 50))
def test_common_length(a: list[int], b: list[int], most: int):
    length = common_length(a, b, most)
    assert a[:length] == b[:length]
    assert length == min(most, len(a), len(b)) or a[length] != b[length]


def test_random_conversations_find_their_latest_turn():
    """Six conversations over three slots, with room for all: each turn evaluates what is new and no more."""
    rng = random.Random(7)
    schedule = Schedule(limits(sequences=3, kept_tokens=6000))
    turns = {n: prompt_of(n) for n in range(1, 7)}
    lengths = dict.fromkeys(turns, 0)
    for _ in range(60):
        n = rng.choice(list(turns))
        assert ask(schedule, turns[n]) == lengths[n]
        lengths[n] = len(turns[n])
        turns[n] = turns[n] + [9] * rng.randrange(1, 50)
    assert not any(isinstance(op, Truncate) and op.sequence >= 3 for op in schedule._operations)
