"""HTTP/1.1 of the node's client: heads cannot be forged, answers are the same in any cut, ends are never guessed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from osync.backend.http1 import MAX_HEAD_BYTES, MAX_HEADERS, AnswerParser, BadAnswer, encode_head
from osync.errors import BadRequest

LENGTH = b"HTTP/1.1 200 OK\r\nContent-Type: a/b\r\nContent-Length: 5\r\n\r\nhello"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3;x=y\r\nllo\r\n0\r\nX-Trailer: t\r\n\r\n"
TO_EOF = b"HTTP/1.1 200 OK\r\n\r\nhello"
INTERIM = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\nContent-Length: 9\r\n\r\n" + LENGTH


def parse(*pieces: bytes, method: str = "POST") -> tuple[AnswerParser, bytes]:
    parser = AnswerParser(method)
    body = b""
    for piece in pieces:
        parser.feed(piece)
        body += parser.take()
    return parser, body


def cuts(data: bytes) -> list[tuple[bytes, ...]]:
    """Return `data` cut in two everywhere, and in single bytes."""
    return [(data[:at], data[at:]) for at in range(1, len(data))] + [tuple(bytes([b]) for b in data)]


@pytest.mark.parametrize("answer", [LENGTH, CHUNKED, INTERIM])
def test_any_cut_gives_the_same_answer(answer: bytes) -> None:
    for pieces in cuts(answer):
        parser, body = parse(*pieces)
        assert parser.head is not None and parser.head.status == 200
        assert (body, parser.complete, parser.reusable) == (b"hello", True, True)
        if answer is not CHUNKED:
            assert parser.head.headers == (("Content-Type", "a/b"), ("Content-Length", "5"))


@pytest.mark.parametrize("answer", [LENGTH, CHUNKED, INTERIM])
def test_an_end_before_the_end_is_not_one(answer: bytes) -> None:
    for at in range(len(answer)):
        parser, body = parse(answer[:at])
        parser.feed_eof()
        assert not parser.complete
        assert b"hello".startswith(body)


def test_without_a_length_the_end_is_the_servers() -> None:
    for pieces in cuts(TO_EOF):
        parser, body = parse(*pieces)
        assert not parser.complete
        parser.feed_eof()
        assert (body, parser.complete, parser.reusable) == (b"hello", True, False)
    parser, _ = parse(TO_EOF[:18])
    parser.feed_eof()
    assert not parser.complete


def test_the_head_is_there_before_the_body() -> None:
    parser, body = parse(LENGTH[:-5])
    assert parser.head is not None and not body and not parser.complete


@pytest.mark.parametrize(
    ("method", "answer"),
    [
        ("HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n"),
        ("HEAD", b"HTTP/1.1 200 OK\r\n\r\n"),
        ("HEAD", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"),
        ("GET", b"HTTP/1.1 204 No Content\r\n\r\n"),
        ("GET", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n"),
        ("GET", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"),
    ],
)
def test_answers_without_a_body(method: str, answer: bytes) -> None:
    for pieces in cuts(answer):
        parser, body = parse(*pieces, method=method)
        assert parser.complete and not body
        assert parser.reusable == (method == "GET")


@pytest.mark.parametrize("extra", [b"H", b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx", b"\0", b"junk"])
@pytest.mark.parametrize("answer", [LENGTH, CHUNKED, b"HTTP/1.1 204 No Content\r\n\r\n"])
def test_what_follows_the_end_spoils_the_connection_only(answer: bytes, extra: bytes) -> None:
    whole = answer + extra
    for pieces in [(whole,), *cuts(whole)]:
        parser, body = parse(*pieces)
        assert parser.complete and not parser.reusable
        assert body == (b"" if b"204" in answer else b"hello")
    assert parser.head is not None and len(parser.head.headers) < 3


@pytest.mark.parametrize("version", [b"HTTP/1.0 200 OK\r\n", b"HTTP/1.1 200 OK\r\nConnection: close\r\n"])
def test_the_server_may_ask_for_the_end(version: bytes) -> None:
    parser, body = parse(version + b"Content-Length: 2\r\n\r\nok")
    assert (body, parser.complete, parser.reusable) == (b"ok", True, False)


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH\r\n",
        b"HTTP/1.1 2000 OK\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999999\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: a\r\n folded\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX : a\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: a\0b\r\n\r\n",
    ],
)
def test_answers_that_make_no_sense(answer: bytes) -> None:
    for pieces in [(answer,), *cuts(answer)]:
        with pytest.raises(BadAnswer):
            parse(*pieces)


def test_bad_framing_leaves_what_came_before() -> None:
    parser = AnswerParser("POST")
    with pytest.raises(BadAnswer):
        parser.feed(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhe\r\nzz\r\n")
    assert parser.head is not None and parser.take() == b"he"
    parser.feed_eof()
    assert not parser.complete and not parser.reusable


@pytest.mark.parametrize(
    ("before", "piece"),
    [
        (b"HTTP/1.1 200 ", b"o" * 1000),
        (b"HTTP/1.1 200 OK\r\nX: ", b"v" * 1000),
        (b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"),
        (b"HTTP/1.1 200 OK\r\n", b"X: " + b"y" * 3000 + b"\r\n"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1;", b"e" * 1000),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX: ", b"t" * 1000),
    ],
)
def test_heads_and_trailers_are_bounded(before: bytes, piece: bytes) -> None:
    parser, _ = parse(before)
    with pytest.raises(BadAnswer, match=f"over {MAX_HEADERS}|over {MAX_HEAD_BYTES}"):
        for _ in range(MAX_HEAD_BYTES // len(piece) + 2):
            parser.feed(piece)


@given(st.lists(st.binary(min_size=1, max_size=300), max_size=8), st.data())
def test_bodies_of_any_chunks_in_any_cuts(chunks: list[bytes], data: st.DataObject) -> None:
    wire = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    wire += b"".join(b"%X\r\n%b\r\n" % (len(c), c) for c in chunks) + b"0\r\n\r\n"
    at = sorted(data.draw(st.lists(st.integers(0, len(wire)), max_size=10)))
    parser, body = parse(*(wire[a:b] for a, b in zip([0, *at], [*at, len(wire)], strict=True) if a < b))
    assert (body, parser.complete, parser.reusable) == (b"".join(chunks), True, True)


def test_a_head_goes_out_as_it_is() -> None:
    headers = (("Host", "h:1"), ("X-Latin", "\udce9"), ("x-Utf8", "é"), ("X-Empty", ""))
    assert encode_head("POST", "/api/chat?a=%2F&b=", headers) == (
        b"POST /api/chat?a=%2F&b= HTTP/1.1\r\nHost: h:1\r\nX-Latin: \xe9\r\nx-Utf8: \xc3\xa9\r\nX-Empty: \r\n\r\n"
    )


@pytest.mark.parametrize("bad", ["a\r\nX: y", "a\ny", "a\ry", "a\0y", "\r\n", "\n\r", "\r\r\n\n", "\ud800"])
def test_no_part_of_a_head_can_pass_for_more(bad: str) -> None:
    for method, target, name, value in (
        (bad, "/", "X", "y"), ("GET", "/" + bad, "X", "y"), ("GET", "/", bad, "y"), ("GET", "/", "X", bad),
    ):  # fmt: skip
        with pytest.raises(BadRequest, match="cannot be sent on"):
            encode_head(method, target, ((name, value),))


@pytest.mark.parametrize(
    ("method", "target", "name"),
    [("", "/", "X"), ("G T", "/", "X"), ("GET", "/ HTTP/1.1", "X"), ("GET", "/", ""), ("GET", "/", "X:"),
     ("GET", "/", "X y")],
)  # fmt: skip
def test_words_stay_words(method: str, target: str, name: str) -> None:
    with pytest.raises(BadRequest):
        encode_head(method, target, ((name, "v"),))


@given(st.text(), st.text(), st.text(), st.text())
def test_whatever_is_sent_is_one_request(method: str, target: str, name: str, value: str) -> None:
    try:
        head = encode_head(method, target, ((name, value),))
    except BadRequest:
        return
    assert head.count(b"\r\n") == 3 and head.count(b"\n") == 3 and head.endswith(b"\r\n\r\n")
