"""The SSE decoder beside a plain reading of the standard, and within narrow limits."""

from __future__ import annotations

import re

from anser.core.errors import EngineBroken
from anser.wire.sse import SseDecoder
from tests.fuzz import cut

__all__ = ["check"]

_NARROW = 48
_LINE_END = re.compile(rb"\r\n|\r|\n")


def check(data: bytes) -> None:
    """Payloads are those of the standard; splits change nothing; limits hold."""
    stream, parts = cut(data)
    wide, _ = _decoded([stream], len(stream) + 1)
    assert wide == _read(stream)
    assert wide == _decoded(parts, len(stream) + 1)[0]
    whole, sound = _decoded([stream], _NARROW)
    split, split_sound = _decoded(parts, _NARROW)
    assert sound == split_sound
    assert split[: len(whole)] == whole
    assert whole == split or not sound
    assert all(len(payload) <= _NARROW for payload in split)


def _decoded(parts: list[bytes], limit: int) -> tuple[list[bytes], bool]:
    """The payloads, and whether it ends well."""
    decoder = SseDecoder(limit)
    payloads: list[bytes] = []
    try:
        for part in parts:
            payloads += decoder.feed(part)
            decoder.validate()
        payloads += decoder.close()
    except EngineBroken:
        return payloads, False
    return payloads, True


def _read(stream: bytes) -> list[bytes]:
    """WHATWG HTML, 9.2.6, for those to whom a bare `data`, an empty line more, is nothing."""
    lines = _LINE_END.split(stream.removeprefix(b"\xef\xbb\xbf"))
    payloads: list[bytes] = []
    held: list[bytes] = []
    for line in [*lines, b""]:  # what lacks its blank line at the end counts too
        if line.startswith(b"data:"):
            held.append(line[5:].removeprefix(b" "))
        elif not line:
            payloads += [b"\n".join(held)] if any(held) else []
            held = []
    return payloads
