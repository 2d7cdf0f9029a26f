"""The PROXY header, under any bytes and any splits."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anser.core.errors import Malformed
from anser.wire.proxy_header import BYTES_MAX, Address, ProxyHeader
from tests.proxy_headers import SIGNATURE, line, packed

PORTS = st.integers(0, 65_535)
ADDRESSES = st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6))
PIECES = st.sampled_from(
    [
        b"PROXY ",
        b"TCP4 ",
        b"TCP6 ",
        b"UNKNOWN",
        b"192.0.2.7 ",
        b"::1 ",
        b"80 ",
        b"443\r\n",
        b"\r\n",
        b"\r",
        b"\n",
        b" ",
        SIGNATURE,
        b"\x20",
        b"\x21",
        b"\x11",
        b"\0\x0c",
    ]
)
RAW = st.lists(PIECES | st.binary(max_size=8), max_size=24).map(b"".join)
Verdict = tuple[int, Address | None, bool] | None


def read(data: bytes, step: int) -> Verdict:
    """Bytes taken, who is named, whether it is complete; None if it is refused."""
    header, taken = ProxyHeader(), 0
    try:
        while header.missing and taken < len(data):
            piece = data[taken : taken + min(step, header.missing)]
            header.feed(piece)
            taken += len(piece)
            assert taken + header.missing <= BYTES_MAX
    except Malformed:
        return None
    return taken, header.source, not header.missing


def plain(address: IPv4Address | IPv6Address) -> str:
    """As the platform writes it."""
    inner = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return str(inner or address)


@given(ADDRESSES, PORTS, st.binary(max_size=40), st.integers(1, 60))
def test_version_1_names_the_client(
    address: IPv4Address | IPv6Address, port: int, rest: bytes, step: int
) -> None:
    """A line is taken to its end and no further, however it comes."""
    text = line(address, port)
    assert len(text) <= 107
    assert read(text + rest, step) == (len(text), (plain(address), port), True)


@given(ADDRESSES, PORTS, st.binary(max_size=300), st.binary(max_size=40), st.integers(1, 60))
def test_version_2_names_the_client(
    address: IPv4Address | IPv6Address, port: int, extensions: bytes, rest: bytes, step: int
) -> None:
    """A block is taken with its extensions to its end and no further, however it comes."""
    block = packed(address, port, extensions=extensions)
    assert read(block + rest, step) == (len(block), (plain(address), port), True)


@given(RAW, st.integers(1, 30))
def test_splits_do_not_change_the_verdict(data: bytes, step: int) -> None:
    """Whatever comes, it is taken or refused alike in one piece and in many."""
    assert read(data, len(data) + 1) == read(data, step) == read(data, 1)


@given(st.binary(min_size=16, max_size=16).map(lambda tail: SIGNATURE + tail[:4]), RAW)
def test_any_command_and_family(head: bytes, rest: bytes) -> None:
    """What version 2 says is taken within its length, or refused; never more than its length."""
    verdict = read(head + rest, 100)
    length = int.from_bytes(head[14:16])
    if verdict is not None and verdict[2]:
        assert verdict[0] == 16 + length
        assert head[12] in (0x20, 0x21)


@pytest.mark.parametrize(
    "header",
    [
        b"PROXY UNKNOWN\r\n",
        b"PROXY UNKNOWN ffff:f...f:ffff ffff:f...f:ffff 65535 65535\r\n",
        SIGNATURE + b"\x20\x00\0\0",  # LOCAL
        SIGNATURE + b"\x20\xff\0\3abc",  # LOCAL, whatever its family
        SIGNATURE + b"\x21\x00\0\0",  # UNSPEC
        SIGNATURE + b"\x21\x31\0\xd8" + b"/" * 216,  # UNIX
        SIGNATURE + b"\x21\x12\0\x0c" + bytes(12),  # datagrams
    ],
)
def test_nobody_is_named(header: bytes) -> None:
    """Health checks and families without an Internet address are taken, and name nobody."""
    assert read(header + b"GET", 7) == (len(header), None, True)


@pytest.mark.parametrize(
    "header",
    [
        b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03aaaaaa",
        b"proxy TCP4 192.0.2.7 192.0.2.1 1 2\r\n",
        b"PROXY TCP5 192.0.2.7 192.0.2.1 1 2\r\n",
        b"PROXY TCP4 ::1 ::1 1 2\r\n",
        b"PROXY TCP6 192.0.2.7 192.0.2.1 1 2\r\n",
        b"PROXY TCP6 fe80::1%eth0 ::1 1 2\r\n",
        b"PROXY TCP4 192.0.2.07 192.0.2.1 1 2\r\n",
        b"PROXY TCP4 192.0.2.256 192.0.2.1 1 2\r\n",
        b"PROXY TCP4 192.0.2.7 192.0.2.1 01 2\r\n",
        b"PROXY TCP4 192.0.2.7 192.0.2.1 1 65536\r\n",
        b"PROXY TCP4 192.0.2.7 192.0.2.1 -1 2\r\n",
        b"PROXY TCP4  192.0.2.7 192.0.2.1 1 2\r\n",
        b"PROXY TCP4 192.0.2.7 192.0.2.1 1 2 \r\n",
        b"PROXY TCP4 192.0.2.7 192.0.2.1 1\r\n",
        b"PROXY TCP4 192.0.2.7 192.0.2.1 1 2\n\r\n",
        b"PROXY \r\n0123456789\r\n",
        b"PROXY UNKNOWN " + b"x" * 94,
        SIGNATURE + b"\x11\x11\0\x0c" + bytes(12),  # version 1 in binary
        SIGNATURE + b"\x22\x11\0\x0c" + bytes(12),  # neither LOCAL nor PROXY
        SIGNATURE + b"\x21\x41\0\x0c" + bytes(12),  # no such family
        SIGNATURE + b"\x21\x13\0\x0c" + bytes(12),  # no such transport
        SIGNATURE + b"\x21\x11\0\x0b" + bytes(11),
        SIGNATURE + b"\x21\x21\0\x23" + bytes(35),
        SIGNATURE + b"\x21\x31\0\xd7" + bytes(215),
        SIGNATURE + b"\x21\x11\xff\xff",
        SIGNATURE + b"\x20\x00" + (BYTES_MAX - 15).to_bytes(2),
    ],
)
def test_what_is_not_well_formed_is_refused(header: bytes) -> None:
    """One spelling of everything, and nothing that the specification calls invalid."""
    assert read(header, 50) is None


def test_limits_are_what_they_say() -> None:
    """A line of 107 bytes and a block of BYTES_MAX are taken."""
    text = b"PROXY UNKNOWN " + b"x" * 91 + b"\r\n"
    assert read(text, 50) == (107, None, True)
    assert read(SIGNATURE + b"\x20\x00" + (BYTES_MAX - 16).to_bytes(2) + bytes(5_000), 999) == (
        BYTES_MAX,
        None,
        True,
    )
    assert repr(ProxyHeader()) == "<ProxyHeader 0 bytes, 15 missing>"
