"""The SSE decoder under any bytes and any splits."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from anser.core.errors import EngineBroken
from anser.wire.sse import SseDecoder

_PIECES = st.sampled_from(
    [
        b"data: x\n\n",
        b"\n\n",
        b"data: ",
        b"data:",
        b"data",
        b"\n",
        b"\r",
        b"\r\n",
        b":",
        b"event: x",
        b"\xef\xbb\xbf",
        b" ",
    ]
)
_STREAMS = st.lists(_PIECES | st.binary(max_size=6), max_size=40).map(b"".join)
_LIMIT = 48


def _split(data: bytes, cuts: list[int]) -> list[bytes]:
    points = sorted({min(cut, len(data)) for cut in cuts} | {0, len(data)})
    return [data[a:b] for a, b in pairwise(points)]


def _decode(parts: list[bytes]) -> tuple[list[bytes], bool]:
    decoder = SseDecoder(_LIMIT)
    payloads: list[bytes] = []
    try:
        for part in parts:
            payloads += decoder.feed(part)
            decoder.validate()
        payloads += decoder.close()
    except EngineBroken:
        return payloads, False
    return payloads, True


@given(_STREAMS, st.lists(st.integers(0, 240), max_size=20))
def test_splits_do_not_matter(data: bytes, cuts: list[int]) -> None:
    """However a stream is split, it gives the same payloads, or is refused all the same."""
    whole, sound = _decode([data])
    parts, parts_sound = _decode(_split(data, cuts))
    bytewise, bytewise_sound = _decode([data[i : i + 1] for i in range(len(data))])
    assert sound == parts_sound == bytewise_sound
    if sound:
        assert whole == parts == bytewise
    else:
        assert bytewise[: len(parts)] == parts


@given(st.lists(st.binary(min_size=1, max_size=20), max_size=8), st.booleans())
def test_what_is_encoded_comes_back(values: list[bytes], crlf: bool) -> None:
    """Payloads without line ends come back as they were sent."""
    clean = [v.replace(b"\n", b"x").replace(b"\r", b"x") for v in values]
    end = b"\r\n" if crlf else b"\n"
    stream = b"".join(b"data: " + value + end + end for value in clean)
    assert _decode([stream]) == (clean, True)


@given(st.binary(max_size=400))
def test_never_crashes(data: bytes) -> None:
    """Any bytes are decoded or refused with the one error that says so."""
    _decode([data])
