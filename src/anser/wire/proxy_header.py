"""What a proxy says before anything else: the PROXY protocol, versions 1 and 2 of its header.

Theory of operation. A header is read from a connection that something else follows on (TLS, HTTP),
so not one byte too many may be taken: told its bytes, it tells how many more are certainly its own.
That is all the rest in version 2, which says its length, and at least two more in version 1, which
ends in CRLF and is short. The header is strict where the specification (HAProxy's
proxy-protocol.txt, sections 2.1 and 2.2) leaves a choice: one spelling of a number, of a line, of
a family. What is well formed but names no address of the Internet (LOCAL, UNKNOWN, UNSPEC, UNIX,
datagrams) leaves the connection with its own. Extensions (TLV) are passed over.

Invariants: never more than BYTES_MAX are taken, nor a byte behind the end; the verdict does not
depend on how the bytes were split.
"""

from __future__ import annotations

import re
from ipaddress import IPv4Address, IPv6Address

from anser.core.errors import Malformed

__all__ = ["BYTES_MAX", "Address", "ProxyHeader"]

Address = tuple[str, int]
"""Where a connection comes from: an IP address and a port."""

BYTES_MAX = 4_096  # HAProxy and the clouds' balancers send some hundreds at most
_SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
_FIXED = 16  # signature, version and command, family, length
_FIRST = 15  # the shortest header there is: b"PROXY UNKNOWN\r\n"
_LINE_MAX = 107
_LOCAL, _PROXY = 0x20, 0x21
_STREAM_4, _STREAM_6 = 0x11, 0x21
_ADDRESS_BYTES = {0: 0, 1: 12, 2: 36, 3: 216}  # by family: none, IPv4, IPv6, UNIX
_PORT = rb"(0|[1-9][0-9]{0,4})"
_FOUR = re.compile(rb"PROXY TCP4 ([0-9.]{7,15}) ([0-9.]{7,15}) %b %b\r\n" % (_PORT, _PORT))
_SIX = re.compile(
    rb"PROXY TCP6 ([0-9A-Fa-f:.]{2,45}) ([0-9A-Fa-f:.]{2,45}) %b %b\r\n" % (_PORT, _PORT)
)
_UNKNOWN = re.compile(rb"PROXY UNKNOWN(?: [^\r\n]*)?\r\n")


class ProxyHeader:
    """One header on its way.

    >>> header = ProxyHeader()
    >>> line = b"PROXY TCP4 192.0.2.7 192.0.2.1 4711 443\\r\\n"
    >>> while header.missing:
    ...     header.feed(line[: header.missing])
    ...     line = line[header.missing :]
    """

    __slots__ = ("_data", "missing", "source")

    def __init__(self) -> None:
        self._data = bytearray()
        self.missing = _FIRST  # bytes that are certainly still its own; 0 when it is complete
        self.source: Address | None = None  # what it names, once it is complete; None: nobody

    def __repr__(self) -> str:
        return f"<ProxyHeader {len(self._data)} bytes, {self.missing} missing>"

    def feed(self, data: bytes) -> None:
        """Take the next bytes, at most `missing`. Raises Malformed."""
        assert 0 < len(data) <= self.missing, self
        self._data += data
        self.missing -= len(data)
        if not self.missing:
            self.missing = self._more()

    def _more(self) -> int:
        """How many bytes are missing now, by what is there; none: then the source is known."""
        start = bytes(self._data[: len(_SIGNATURE)])
        if start == _SIGNATURE:
            return self._binary()
        if start.startswith(b"PROXY "):
            return self._line()
        raise Malformed("That is no PROXY header.")

    def _line(self) -> int:
        size = len(self._data)
        if not self._data.endswith(b"\r\n"):
            least = 1 if self._data.endswith(b"\r") else 2
            if size + least > _LINE_MAX or b"\n" in self._data:
                raise Malformed("The PROXY header does not end.")
            return least
        self.source = _source_of(bytes(self._data))
        return 0

    def _binary(self) -> int:
        size = len(self._data)
        if size < _FIXED:
            return _FIXED - size
        length = int.from_bytes(self._data[14:16])
        if _FIXED + length > BYTES_MAX:
            raise Malformed(f"A PROXY header may have {BYTES_MAX} bytes.")
        if size < _FIXED + length:
            return _FIXED + length - size
        self.source = _named_by(self._data[12], self._data[13], bytes(self._data[_FIXED:]))
        return 0


def _source_of(line: bytes) -> Address | None:
    """Version 1, section 2.1."""
    if _UNKNOWN.fullmatch(line):
        return None
    for pattern, kind in ((_FOUR, IPv4Address), (_SIX, IPv6Address)):
        match = pattern.fullmatch(line)
        if match is not None:
            return _address(match, kind)
    raise Malformed("The PROXY header is not well formed.")


def _address(match: re.Match[bytes], kind: type[IPv4Address | IPv6Address]) -> Address:
    ports = int(match[3]), int(match[4])
    try:
        source, _ = kind(match[1].decode()), kind(match[2].decode())
    except ValueError as error:
        raise Malformed("The PROXY header has no address.") from error
    if max(ports) > 65_535:
        raise Malformed("The PROXY header has no port.")
    return _plain(source), ports[0]


def _named_by(command: int, family: int, block: bytes) -> Address | None:
    """Version 2, section 2.2. `block` is what follows the fixed part."""
    if command == _LOCAL:
        return None  # the proxy itself asks; the family is passed over
    if command != _PROXY or family >> 4 not in _ADDRESS_BYTES or family & 0x0F > 2:
        raise Malformed("The PROXY header has an unknown version, command or family.")
    if len(block) < _ADDRESS_BYTES[family >> 4]:
        raise Malformed("The PROXY header is too short for its addresses.")
    if family == _STREAM_4:
        return _plain(IPv4Address(block[:4])), int.from_bytes(block[8:10])
    if family == _STREAM_6:
        return _plain(IPv6Address(block[:16])), int.from_bytes(block[32:34])
    return None


def _plain(address: IPv4Address | IPv6Address) -> str:
    """An IPv4 address in IPv6's clothes is that IPv4 address."""
    inner = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return str(inner or address)
