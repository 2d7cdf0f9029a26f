"""Where a request's body ends, under any bytes and any splits."""

from __future__ import annotations

import re

import httptools
from hypothesis import given
from hypothesis import strategies as st

from anser.core.errors import Malformed
from anser.wire.framing import Body, ChunkedBody, LengthBody, check_head_bytes

_PIECES = st.sampled_from(
    [b"0", b"1", b"a", b"F", b"\r\n", b"\r", b"\n", b";", b" ", b"x", b"5\r\nhello\r\n", b"00"]
)
_RAW = st.lists(_PIECES | st.binary(max_size=3), max_size=20).map(b"".join)
_CHUNKS = st.lists(st.binary(min_size=1, max_size=40), max_size=6)


def _encode(chunks: list[bytes]) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(c), c) for c in chunks) + b"0\r\n\r\n"


def _consume(body: Body, data: bytes, step: int) -> tuple[int, bool]:
    """How many bytes it takes when they come `step` at a time, and whether it is complete."""
    taken = 0
    while taken < len(data) and not body.complete:
        piece = data[taken : taken + step]
        count = body.take(piece)
        assert 0 <= count <= len(piece)
        taken += count
        if count < len(piece):
            assert body.complete
    return taken, body.complete


@given(_CHUNKS, st.binary(max_size=20), st.integers(1, 50))
def test_a_sound_body_ends_where_it_ends(chunks: list[bytes], rest: bytes, step: int) -> None:
    """Exactly the body's own bytes are taken, however they are split; the rest is left."""
    data = _encode(chunks)
    assert _consume(ChunkedBody(), data + rest, step) == (len(data), True)


@given(st.integers(1, 100), st.binary(max_size=200), st.integers(1, 50))
def test_a_length_is_a_length(length: int, data: bytes, step: int) -> None:
    """A body of a length takes that many bytes and no more."""
    taken = min(length, len(data))
    assert _consume(LengthBody(length), data, step) == (taken, taken == length)


@given(_RAW, st.integers(1, 30))
def test_splits_do_not_change_the_verdict(data: bytes, step: int) -> None:
    """Whatever comes, it is taken or refused alike in one piece and in many."""

    def verdict(size: int) -> tuple[int, bool] | None:
        try:
            return _consume(ChunkedBody(), data, size)
        except Malformed:
            return None

    assert verdict(len(data) + 1) == verdict(step) == verdict(1)


@given(_RAW | _CHUNKS.map(_encode))
def test_what_is_taken_for_whole_the_parser_takes_for_whole(data: bytes) -> None:
    """Nothing passes as a body that the parser behind ends elsewhere."""
    try:
        taken, complete = _consume(ChunkedBody(), data, 7)
    except Malformed:
        return
    ended: list[bool] = []

    class Seen:
        def on_message_complete(self) -> None:
            ended.append(True)

    parser = httptools.HttpRequestParser(Seen())
    parser.feed_data(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
    parser.feed_data(data[: max(taken - 1, 0)])
    assert not ended
    parser.feed_data(data[max(taken - 1, 0) : taken])
    assert bool(ended) == complete


@given(
    st.lists(
        st.sampled_from(
            [b"\r\n", b"\r", b"\n", b" ", b"\t", b"ab", b":", b"\x00", b"\x7f", b"\xe9"]
        ),
        max_size=12,
    ).map(b"".join),
    st.integers(0, 40),
)
def test_what_is_unclean_is_seen_in_any_two_parts(lines: bytes, cut: int) -> None:
    """A head with control characters, bare line ends or folded lines is refused, whether it comes
    at once or in two parts; none else is.
    """
    data = b"GET / HTTP/1.1\r\n" + lines
    unclean = re.search(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\r[^\n]|(?<!\r)\n|\n[ \t]", data)

    def refused(*ends: int) -> bool:
        start = 0
        for end in ends:
            try:
                check_head_bytes(data, start, end)
            except Malformed:
                return True
            start = end
        return False

    assert refused(len(data)) == refused(min(cut, len(data)), len(data)) == (unclean is not None)
