"""Credit: both ends count alike, nothing over a window is ever unread, and nobody waits for ever."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from osync.errors import StreamBroken
from osync.net.credit import ReceiveCredit, SendCredit

WINDOW = 1000


def test_a_grant_comes_for_half_a_window_at_a_time():
    credit = ReceiveCredit(WINDOW)
    credit.arrived(1000)
    assert credit.consumed(499) == 0
    assert credit.consumed(1) == 500
    assert credit.consumed(500) == 500


def test_more_than_was_granted_breaks_the_stream():
    credit = ReceiveCredit(WINDOW)
    credit.arrived(600)
    with pytest.raises(StreamBroken, match="sent 401 bytes and was granted 400"):
        credit.arrived(401)


def test_a_sender_never_gets_more_than_a_window():
    credit = SendCredit(WINDOW)
    credit.grant(1 << 32)
    assert credit.take(5000) == WINDOW
    assert credit.take(1) == 0
    credit.grant(10)
    assert credit.take(3) == 3
    assert credit.left == 7


@given(st.lists(st.tuples(st.integers(1, 3 * WINDOW), st.integers(1, 2 * WINDOW)), max_size=60))
def test_all_bytes_get_through_within_the_window(steps):
    """Whatever the sender has and the reader takes, in any order: the unread stay within the window."""
    sender, receiver = SendCredit(WINDOW), ReceiveCredit(WINDOW)
    waiting = unread = 0
    for offered, wanted in [*steps, *[(0, WINDOW)] * (len(steps) * 6 + 4)]:
        waiting += offered
        sent = sender.take(waiting)
        receiver.arrived(sent)
        waiting -= sent
        unread += sent
        assert unread <= WINDOW
        taken = min(unread, wanted)
        unread -= taken
        sender.grant(receiver.consumed(taken))
    assert (waiting, unread) == (0, 0)
