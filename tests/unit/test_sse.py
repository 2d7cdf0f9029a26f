"""The SSE decoder, one rule at a time."""

from __future__ import annotations

import pytest

from anser.core.errors import EngineBroken
from anser.wire.sse import SseDecoder
from tests.cost import measured


def decode(*parts: bytes, limit: int = 1_024) -> list[bytes]:
    decoder = SseDecoder(limit)
    payloads: list[bytes] = []
    for part in parts:
        payloads += decoder.feed(part)
        decoder.validate()
    return payloads + decoder.close()


@pytest.mark.parametrize("end", [b"\n", b"\r", b"\r\n"])
def test_line_ends(end: bytes) -> None:
    """Lines end in LF, CR or CRLF."""
    assert decode(end.join([b"data: a", b"", b"data: b", b"", b""])) == [b"a", b"b"]


def test_crlf_split_between_its_bytes() -> None:
    """A CRLF that is split over two reads is one line end, not two."""
    assert decode(b"data: a\r", b"\ndata: b\r", b"\n\r", b"\ndata: c\r\n\r\n") == [b"a\nb", b"c"]


def test_several_data_lines_are_joined_by_lf() -> None:
    """The data lines of one event are one payload."""
    assert decode(b"data: {\ndata:}\n\n") == [b"{\n}"]


def test_only_one_space_after_the_colon_is_dropped() -> None:
    """One space after the colon belongs to the framing, the next to the data."""
    assert decode(b"data:  a\n\ndata:b\n\n") == [b" a", b"b"]


def test_comments_and_unknown_fields_carry_nothing() -> None:
    """Comments, event, id, retry and unknown fields are passed over."""
    assert decode(b": hi\nevent: x\nid: 1\nretry: 5\nfoo: bar\ndata\ndatax: y\ndata: a\n\n") == [
        b"a"
    ]


def test_empty_data_is_no_payload() -> None:
    """An event with empty data is passed over: it carries nothing."""
    assert decode(b"data:\n\ndata: \n\n\n\ndata: a\n\n") == [b"a"]


def test_an_empty_line_of_data_is_kept_beside_others() -> None:
    """An empty data line within an event is an empty line of its payload."""
    assert decode(b"data: a\ndata:\ndata: b\n\n") == [b"a\n\nb"]


def test_byte_order_mark_at_the_start_only() -> None:
    """A BOM is dropped at the start of the stream, and is an unknown field anywhere else."""
    assert decode(b"\xef", b"\xbb\xbfdata: a\n\n\xef\xbb\xbfdata: b\n\n") == [b"a"]


def test_close_gives_a_last_event_without_blank_line() -> None:
    """A stream that ends without its last blank line still gives its last event."""
    decoder = SseDecoder()
    assert decoder.feed(b"data: [DONE]") == []
    assert decoder.close() == [b"[DONE]"]
    assert decoder.close() == []


def test_feeding_nothing_changes_nothing() -> None:
    """An empty read is no event and does not separate a CR from its LF."""
    assert decode(b"data: a\r", b"", b"\n\r\n") == [b"a"]


def test_event_at_the_limit_and_one_above() -> None:
    """An event may have as many bytes as the limit says, and not one more."""
    assert decode(b"data:" + b"a" * 59 + b"\n\n", limit=64) == [b"a" * 59]
    assert decode(b"data:aa\n" * 21 + b"data:a\n\n", limit=64)  # 21 * 3 + 1 = 64
    with pytest.raises(EngineBroken, match="event of more than 64"):
        decode(b"data:aa\n" * 22, limit=64)


def test_line_at_the_limit_and_one_above() -> None:
    """A line is bounded also while its end has not come."""
    assert decode(b":" * 63 + b"\n", limit=64) == []
    with pytest.raises(EngineBroken, match="line of more than 64"):
        decode(b":" * 65, limit=64)
    with pytest.raises(EngineBroken, match="line of more than 64"):
        decode(b":" * 33, b":" * 32 + b"\n", limit=64)


def test_noise_at_the_limit_and_one_above() -> None:
    """Comments and empty events without a payload between them are bounded in all."""
    assert decode(b":a\n" * 20, b"data: a\n\n", b":a\n" * 20, limit=64) == [b"a"]
    with pytest.raises(EngineBroken, match="run without data of more than 64"):
        decode(b":a\n" * 22, limit=64)
    with pytest.raises(EngineBroken, match="run without data"):
        decode(b"data:\n\n" * 33, limit=64)


def test_a_flood_of_empty_events_is_cheap() -> None:
    """Megabytes of empty events cost what their number does, not its square."""
    decoder = SseDecoder(64 * 1024 * 1024)
    flood = b"data:\n\n" * 125_000
    with measured() as cost:
        for _ in range(2):
            assert decoder.feed(flood) == []
    assert cost.million_steps < 500
    decoder.validate()


def test_repr_shows_what_is_held() -> None:
    """The state is visible in one line."""
    decoder = SseDecoder()
    decoder.feed(b":c\ndata: ab\nda")
    assert repr(decoder) == "<SseDecoder line=2 held=3 noise=3>"
