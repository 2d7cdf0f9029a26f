"""Bodies in chunks beside the parser behind, and under any splits."""

from __future__ import annotations

import httptools

from anser.core.errors import Malformed
from anser.wire.framing import Body, ChunkedBody, LengthBody
from tests.fuzz import cut

__all__ = ["check"]

_HEAD = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"


def check(data: bytes) -> None:
    """A body ends at one byte, however it is split, and the parser behind ends it there too."""
    stream, parts = cut(data)
    verdict = _taken(ChunkedBody(), [stream])
    assert verdict == _taken(ChunkedBody(), parts)
    assert verdict == _taken(ChunkedBody(), [stream[at : at + 1] for at in range(len(stream))])
    if verdict is not None:
        taken, complete = verdict
        assert _ends(stream[: taken - 1]) is False or not taken
        assert _ends(stream[:taken]) is complete
    length = data[0] if data else 0
    if length:
        taken = min(length, len(stream))
        assert _taken(LengthBody(length), parts) == (taken, taken == length)


def _taken(body: Body, parts: list[bytes]) -> tuple[int, bool] | None:
    """How many bytes it takes, and whether it is complete; None if it is refused."""
    taken = 0
    try:
        for part in parts:
            if body.complete:
                break
            count = body.take(part)
            assert 0 <= count <= len(part)
            assert count == len(part) or body.complete
            taken += count
    except Malformed:
        return None
    return taken, body.complete


class _Seen:
    """Told by the parser."""

    ended = False

    def on_message_complete(self) -> None:
        self.ended = True


def _ends(stream: bytes) -> bool:
    """Whether the parser behind takes these bytes for a whole body."""
    seen = _Seen()
    parser = httptools.HttpRequestParser(seen)
    parser.feed_data(_HEAD)
    parser.feed_data(stream)
    return seen.ended
