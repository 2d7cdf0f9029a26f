"""Server-sent events as OpenAI's clients read them: `data:` lines and, to stay alive, comments.

No `event:` line, no empty `data:`: clients in wide use break on both.
"""

from __future__ import annotations

from anser.api.errors import Headers

__all__ = ["DONE", "HEADERS", "KEEP_ALIVE", "event"]

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": still working\n\n"
HEADERS: Headers = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]

_ONE_LINE = bytes.maketrans(b"\r\n", b"  ")


def event(data: bytes) -> bytes:
    """One event from one JSON text: a line break between its tokens is only white space."""
    return b"data: %b\n\n" % data.translate(_ONE_LINE)
