"""How a request may be framed: the rules for its head, and where its body ends.

These are checked on the raw bytes and on the parsed headers, before any application sees the
request, so that two parsers can never disagree about where one request ends and the next begins
(RFC 9112, sections 2.2, 5, 6 and 11.2). Stricter than the RFC has to be: chunk extensions and
trailers, which no client of this API sends, are refused, because they have hidden requests before.
"""

from __future__ import annotations

import re
from typing import Protocol

from anser.core.errors import Malformed

__all__ = ["Body", "ChunkedBody", "LengthBody", "body_of", "check_head_bytes", "check_headers"]

Headers = list[tuple[bytes, bytes]]

# Control characters, bare CR or LF, and lines that continue the one before (obs-fold).
_UNCLEAN = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\r[^\n]|(?<!\r)\n|\n[ \t]")
_PLAIN = bytes([9, *range(32, 127), *range(128, 256)])
_LINE = re.compile(rb"[A-Z-]+ [^ \r\n]+ HTTP/[0-9.]+\r\n")
_HOST = re.compile(rb"(?:[A-Za-z0-9._~!$&'()*+,;=%-]*|\[[0-9A-Fa-f:.]+\])(?::[0-9]{0,5})?")
_SIZE = re.compile(rb"[0-9A-Fa-f]{1,15}")  # less than 2**60
_SIZE_LINE_MAX = 17
_LENGTH_DIGITS_MAX = 15


def check_head_bytes(data: bytes | bytearray, start: int, stop: int) -> None:
    """Check raw bytes of a head, those before `start` having been checked. Raises Malformed.

    Of a whole head the first line is checked, too: single spaces part its three words. Parsers that
    are content with less have taken different ones (RFC 9112, section 3).

    What is well is seen by counting, in a tenth of the pattern's time: the only characters that
    are not plain are whole line ends.
    """
    part = bytes(data[max(start - 2, 0) : stop])
    if data.endswith(b"\r\n\r\n", 0, stop) and _LINE.match(data) is None:
        raise Malformed("A request begins with a method, a path and a version.")
    whole_lines = len(part.translate(None, _PLAIN)) == 2 * part.count(b"\r\n")
    if whole_lines and b"\n " not in part and b"\n\t" not in part:
        return
    if _UNCLEAN.search(data, max(start - 2, 0), stop) is not None:
        raise Malformed("The head has control characters, bare line ends or folded lines.")


def check_headers(version: str, target: bytes, headers: Headers) -> None:
    """Check a parsed head; names in lower case. Raises Malformed."""
    if version not in ("1.1", "1.0"):
        raise Malformed(f"HTTP/{version} is not spoken here.")
    if not target.startswith(b"/") or not target.isascii() or b"#" in target:
        raise Malformed("The target of a request is a path that begins with a slash.")
    hosts = [value for name, value in headers if name == b"host"]
    if len(hosts) > 1 or (version == "1.1" and not hosts):
        raise Malformed("There must be one Host header.")
    if hosts and _HOST.fullmatch(hosts[0]) is None:
        raise Malformed("The Host header is not a host.")


class Body(Protocol):
    """A body that is on its way: told the bytes, it tells which are its own."""

    @property
    def complete(self) -> bool:
        """Whether its last byte has come."""
        ...

    def take(self, data: bytes | bytearray) -> int:
        """How many of these bytes, from the first on, belong to it. Raises Malformed."""
        ...


def body_of(version: str, headers: Headers) -> Body | None:
    """The body that these headers announce. Raises Malformed if that is not clear."""
    lengths = [value for name, value in headers if name == b"content-length"]
    codings = [value for name, value in headers if name == b"transfer-encoding"]
    if not lengths and not codings:
        return None
    if len(lengths) + len(codings) > 1:
        raise Malformed("The body's length is given more than once.")
    if lengths:
        digits = lengths[0]
        if not digits.isdigit() or len(digits) > _LENGTH_DIGITS_MAX:
            raise Malformed("Content-Length is not a length.")
        return LengthBody(int(digits)) if int(digits) else None
    if codings[0].lower() != b"chunked" or version != "1.1":
        raise Malformed("The only transfer coding is chunked, in HTTP/1.1.")
    return ChunkedBody()


class LengthBody:
    """A body of so many bytes."""

    __slots__ = ("left",)

    def __init__(self, length: int) -> None:
        self.left = length  # of its bytes

    def __repr__(self) -> str:
        return f"<LengthBody left={self.left}>"

    @property
    def complete(self) -> bool:
        """Whether its last byte has come."""
        return self.left == 0

    def take(self, data: bytes | bytearray) -> int:
        """How many of these bytes belong to it."""
        taken = min(len(data), self.left)
        self.left -= taken
        return taken


class ChunkedBody:
    """A body in chunks: each a size in hexadecimal, CRLF, the bytes, CRLF; the last has size 0."""

    __slots__ = ("_last", "_left", "_line", "complete")

    def __init__(self) -> None:
        self._line = bytearray()  # of an unfinished line
        self._left = 0  # bytes of the present chunk
        self._last = False  # the chunk of size 0 has begun
        self.complete = False

    def __repr__(self) -> str:
        return f"<ChunkedBody left={self._left} line={bytes(self._line)!r} last={self._last}>"

    def take(self, data: bytes | bytearray) -> int:
        """How many of these bytes belong to it. Raises Malformed."""
        at = 0
        while at < len(data) and not self.complete:
            if self._left > 2:
                step = min(len(data) - at, self._left - 2)
                at += step
                self._left -= step
            else:
                at = self._take_line(data, at)
        return at

    def _take_line(self, data: bytes | bytearray, at: int) -> int:
        """A size with its CRLF, or the CRLF after a chunk's bytes."""
        end = data.find(b"\n", at, at + _SIZE_LINE_MAX)
        stop = len(data) if end < 0 else end + 1
        self._line += data[at : min(stop, at + _SIZE_LINE_MAX)]
        if end < 0:
            self._check_unfinished()
            return stop
        line = bytes(self._line)
        self._line.clear()
        if self._left or self._last:
            self._end_chunk(line)
        elif line.endswith(b"\r\n") and _SIZE.fullmatch(line, 0, len(line) - 2):
            size = int(line[:-2], 16)
            self._last = size == 0
            self._left = size + 2 if size else 0
        else:
            raise Malformed("A chunk's size is not a number in hexadecimal alone.")
        return stop

    def _end_chunk(self, line: bytes) -> None:
        if line != b"\r\n":
            raise Malformed("A chunk does not end where its size says, or trailers follow.")
        self.complete = self._last
        self._left = 0

    def _check_unfinished(self) -> None:
        """What has come of a line can still become one."""
        if self._left or self._last:
            sound = bytes(self._line) in (b"", b"\r")
        else:
            digits = self._line.removesuffix(b"\r")
            sound = _SIZE.fullmatch(digits) is not None or not self._line
        if not sound:
            raise Malformed("A chunk's size or end is not as it must be.")
