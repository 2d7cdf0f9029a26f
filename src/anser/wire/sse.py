"""Server-sent events, decoded as they arrive, in bounded memory.

Theory of operation. `feed` takes whatever bytes have come and returns the data payloads that they
complete (WHATWG HTML, "Server-sent events", section 9.2.6). Lines end in LF, CR or CRLF, wherever
the bytes were split; comments and every field but `data` are passed over; several data lines of
one event are joined by LF. An event whose data is empty carries nothing and is passed over too.

Invariants: the payloads depend on the bytes only, not on how they were split; what is held never
exceeds the limit; what carries no payload is counted, and too much of it is a broken stream, so
that a sender of endless comments or empty events is cut off.
"""

from __future__ import annotations

from anser.core.errors import EngineBroken
from anser.core.limits import CHUNK_BYTES_MAX

__all__ = ["SseDecoder"]

_BOM = b"\xef\xbb\xbf"
_LF = 10


class SseDecoder:
    """One stream's decoder. No line, event or run of empty events may exceed `limit` bytes."""

    __slots__ = ("_after_cr", "_data", "_held", "_line", "_noise", "_started", "limit")

    def __init__(self, limit: int = CHUNK_BYTES_MAX) -> None:
        self.limit = limit
        self._line = bytearray()  # of an unfinished line
        self._data: list[bytes] = []  # of an unfinished event
        self._held = 0  # bytes in _data, with their line ends
        self._noise = 0  # bytes since the last payload that were no data
        self._after_cr = False  # an LF that comes next belongs to that CR
        self._started = False  # a BOM has been looked for

    def __repr__(self) -> str:
        return f"<SseDecoder line={len(self._line)} held={self._held} noise={self._noise}>"

    def validate(self) -> None:
        """Assert the invariants."""
        assert len(self._line) <= self.limit, self
        assert self._held == sum(len(part) + 1 for part in self._data), self
        assert self._held <= self.limit + 1, self
        assert self._noise <= self.limit, self

    def feed(self, data: bytes) -> list[bytes]:
        """The payloads that `data` completes. Raises EngineBroken beyond the limit."""
        if not self._line and not self._data and data[:6] == b"data: " and data[-2:] == b"\n\n":
            payloads = self._plain(data[6:-2])
            if payloads is not None:
                return payloads
        return self._any(data)

    def _plain(self, body: bytes) -> list[bytes] | None:
        """The usual case, whole events of one line each and LF alone; None if it is not that."""
        if len(body) > self.limit - 6 or b"\r" in body:
            return None
        payloads = body.split(b"\n\ndata: ")
        if body.count(b"\n") != 2 * (len(payloads) - 1) or b"" in payloads:
            return None
        self._started, self._after_cr, self._noise = True, False, 0
        return payloads

    def _any(self, data: bytes) -> list[bytes]:
        if self._after_cr and data:
            self._after_cr = False
            if data[0] == _LF:
                data = data[1:]
        if not data:
            return []
        self._after_cr = data.endswith(b"\r")
        lines = data.splitlines()
        rest = b"" if data.endswith((b"\n", b"\r")) else lines.pop()
        if lines and self._line:
            lines[0] = bytes(self._line) + lines[0]
            self._line.clear()
        payloads: list[bytes] = []
        for line in lines:
            self._take(line, payloads)
        self._line += rest
        self._check(len(self._line), "line")
        return payloads

    def close(self) -> list[bytes]:
        """The stream has ended: the payload of a last event that lacks its blank line."""
        payloads: list[bytes] = []
        if self._line:
            line = bytes(self._line)
            self._line.clear()
            self._take(line, payloads)
        if self._data:
            self._take(b"", payloads)
        return payloads

    def _take(self, line: bytes, payloads: list[bytes]) -> None:
        self._check(len(line), "line")
        if not self._started:
            self._started = True
            line = line.removeprefix(_BOM)
        if line.startswith(b"data:"):
            self._hold(line[6:] if line[5:6] == b" " else line[5:])
        elif not line and self._held > len(self._data):
            payloads.append(self._data[0] if len(self._data) == 1 else b"\n".join(self._data))
            self._clear()
            self._noise = 0
        else:
            if not line:
                self._noise += self._held
                self._clear()
            self._noise += len(line) + 1
            self._check(self._noise, "run without data")

    def _hold(self, value: bytes) -> None:
        self._data.append(value)
        self._held += len(value) + 1
        self._check(self._held - 1, "event")

    def _clear(self) -> None:
        self._data.clear()
        self._held = 0

    def _check(self, size: int, what: str) -> None:
        if size > self.limit:
            raise EngineBroken(f"The engine sent a {what} of more than {self.limit} bytes.")
