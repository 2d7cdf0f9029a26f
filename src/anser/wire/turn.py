"""The fast lane: requests that are answered without ASGI, task or dict, by calls alone.

Theory of operation. An application may have a fast lane (its attribute `lane`). The guard asks it
about each request whose target it serves and that has nothing unusual about it. Such a request is
a Turn: the lane meets it when its head has come, hears of its body as that grows, and is asked for
an answer when it is whole. The lane answers through the turn, at once or later, whole or in parts;
or it declines, and the guard lets uvicorn begin with that request as if nothing had been.

What a client does meanwhile, to leave, to read slowly, is told to the lane's Visit. All calls come
on the event loop's thread, and none comes from within another: a visit may answer in `meet` and
`ask`, but hears of nothing while it does.

Invariants: a turn is answered once; nothing is written after its end, nor after its client's; an
answer's head has only characters that a head may have.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Protocol

from uvicorn.protocols.http.httptools_impl import STATUS_LINE

__all__ = ["FastLane", "Headers", "Line", "Turn", "Visit", "lane_of", "lines_of"]

Headers = list[tuple[bytes, bytes]]
"""Header lines: names in lower case, and values."""

_VISIBLE = bytes([9, *range(32, 127), *range(128, 256)])  # what a header's value may have
_CLOSE = b"connection: close\r\n"
_CHUNKED = b"transfer-encoding: chunked\r\n"


class Visit(Protocol):
    """One request on the lane, as its application keeps it."""

    def grew(self) -> None:
        """More of the turn's body has come; called also if nothing has."""
        ...

    def ask(self) -> bool:
        """The turn's body is whole: answer it now, or later; False, to let uvicorn do it."""
        ...

    def left(self) -> None:
        """The client has left, or was cut off: there is nobody to answer."""
        ...

    def pause(self) -> None:
        """The client does not read: what is written now is held in memory."""
        ...

    def resume(self) -> None:
        """The client reads again."""
        ...

    def stop(self) -> None:
        """The platform ends: answer at once that it does."""
        ...


class FastLane(Protocol):
    """What an application answers without ASGI."""

    @property
    def targets(self) -> frozenset[bytes]:
        """The targets of POST requests that it wants to see, to the letter."""
        ...

    @property
    def body_bytes_max(self) -> int:
        """The longest body that it wants to see."""
        ...

    def meet(self, turn: Turn) -> Visit:
        """A request's head has come, and is sound; it may be refused at once."""
        ...


class Line(Protocol):
    """The connection that a turn is on."""

    @property
    def transport(self) -> asyncio.Transport:
        """Where to write."""
        ...

    def shared_lines(self) -> bytes:
        """The header lines that every answer begins with."""
        ...

    def listen(self) -> None:
        """Read on, or nobody sees whether the client has left."""
        ...

    def turn_over(self) -> None:
        """The present turn's answer is out."""
        ...


def lane_of(app: object) -> FastLane | None:
    """The application's fast lane, if it has one."""
    lane: FastLane | None = getattr(app, "lane", None)
    return lane


def lines_of(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Headers as they are sent. Raises ValueError if one has a character that ends it.

    >>> lines_of([(b"a", b"b")])
    b'a: b\\r\\n'
    """
    lines = [b"%b: %b\r\n" % pair for pair in headers]
    text = b"".join(lines)
    if len(text.translate(None, _VISIBLE)) != 2 * len(lines):
        raise ValueError("A header may have no control characters.")
    return text


class Turn:
    """One request on a connection, and the one answer to it."""

    __slots__ = (
        "_headers",
        "_line",
        "asked",
        "body",
        "keep_alive",
        "origin",
        "over",
        "started",
        "target",
        "visit",
    )

    def __init__(
        self,
        line: Line,
        *,
        target: bytes,
        headers: Headers,
        origin: dict[str, object],
        keep_alive: bool,
    ) -> None:
        """`origin` is who asks and where, as an ASGI scope has it: `client`, `server`, `proxy`."""
        self._line = line
        self._headers = dict(reversed(headers))  # of several, the first one counts
        self.target = target
        self.origin = origin
        self.keep_alive = keep_alive
        self.body: bytes | bytearray = b""  # as far as it has come
        self.visit: Visit | None = None
        self.asked = False  # the lane has been asked for an answer
        self.started = False  # a head is out
        self.over = False

    def __repr__(self) -> str:
        state = "over" if self.over else "started" if self.started else "waiting"
        return f"<Turn {self.target.decode()} {state} body={len(self.body)}>"

    def header(self, name: bytes) -> str | None:
        """The first header of this (lower-case) name."""
        value = self._headers.get(name)
        return None if value is None else value.decode("latin-1")

    def grow(self, data: bytes) -> None:
        """More of the body has come."""
        if not self.body:
            self.body = data
        elif isinstance(self.body, bytearray):
            self.body += data
        else:
            self.body = bytearray(self.body) + data

    def listen(self) -> None:
        """See to it that the client's leaving is seen."""
        self._line.listen()

    # The answer

    def reply(self, status: int, lines: bytes, body: bytes) -> None:
        """Answer with a whole body; `lines` are the answer's own headers, its length among them."""
        self._write(self._head(status, lines), b"\r\n", body)
        self._end()

    def open(self, lines: bytes) -> None:
        """Begin an answer that is sent in parts."""
        self._write(self._head(200, lines), _CHUNKED, b"\r\n")

    def write(self, data: bytes) -> None:
        """Send a part, not an empty one."""
        assert self.started
        assert not self.over
        self._line.transport.write(b"%x\r\n%b\r\n" % (len(data), data))

    def close(self, *parts: bytes) -> None:
        """Send the last parts."""
        assert self.started
        chunks = [b"%x\r\n%b\r\n" % (len(data), data) for data in parts]
        self._write(*chunks, b"0\r\n\r\n")
        self._end()

    def leave(self) -> None:
        """The client has left, or is cut off."""
        self.over = True
        visit, self.visit = self.visit, None
        if visit is not None:
            visit.left()

    def _head(self, status: int, lines: bytes) -> bytes:
        assert not self.started, self
        close = b"" if self.keep_alive else _CLOSE
        return b"".join((STATUS_LINE[status], self._line.shared_lines(), lines, close))

    def _write(self, *parts: bytes) -> None:
        assert not self.over, self
        self.started = True
        self._line.transport.write(b"".join(parts))

    def _end(self) -> None:
        self.over = True
        self._line.turn_over()
