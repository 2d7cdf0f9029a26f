"""Who asks, where proxies stand between: what they say, believed from configured addresses only.

Theory of operation. Each proxy appends the address that it was asked from, so the list is read from
its right end, beginning with the connection's own: as long as an address is a trusted proxy's,
what it says is believed, and the first that is none is the client. What stands left of it was
written by the client and is never looked at, and so cannot spoil what stands right of it.

`X-Forwarded-For` and `Forwarded` (RFC 7239) are both understood. A proxy that writes one of them
lets a client's own pass in the other; so where both are there and find different clients, neither
is believed.

Invariants: from an untrusted connection nothing is read; at most HOPS_MAX addresses are read, each
of at most _HOP_CHARS_MAX; what is no address ends the reading, and the last proxy is the client.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

__all__ = ["HOPS_MAX", "Asked", "Proxies"]

HOPS_MAX = 16
_HOP_CHARS_MAX = 256
_Headers = list[tuple[bytes, bytes]]
_Address = IPv4Address | IPv6Address

_PORT = r"(?::[0-9]{1,5})?"
_NODE = re.compile(rf"\[(?P<six>[0-9A-Fa-f:.]+)\]{_PORT}|(?P<four>[0-9.]+){_PORT}|[0-9A-Fa-f:.]+")
_WORD = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # "token" of RFC 9110, 5.6.2
_PAIR = re.compile(rf'[ \t]*({_WORD})=(?:({_WORD})|"([^"\\]*)")[ \t]*')
_SCHEMES = ("http", "https")


@dataclass(frozen=True, slots=True)
class Asked:
    """Where a request comes from: the client's address, and the scheme if a proxy said it."""

    address: str
    scheme: str | None


class Proxies:
    """The addresses whose word is taken.

    >>> Proxies(["10.0.0.0/8"]).asked("10.0.0.1", [(b"x-forwarded-for", b"192.0.2.7, 10.1.1.1")])
    Asked(address='192.0.2.7', scheme=None)
    """

    __slots__ = ("_networks",)

    def __init__(self, networks: Sequence[str] = ()) -> None:
        """`networks` are addresses or CIDR blocks. Raises ValueError if one is neither."""
        self._networks = tuple(ip_network(text) for text in networks)

    def __repr__(self) -> str:
        return f"<Proxies {', '.join(map(str, self._networks)) or 'none'}>"

    def trusts(self, address: str) -> bool:
        """Whether this is a proxy's address; a text that is no address is none."""
        found = _address_of(address)
        return found is not None and self._has(found)

    def asked(self, proxy: str, headers: _Headers) -> Asked:
        """Where a request with these headers (names in lower case) from a trusted proxy began."""
        by_x = self._client(proxy, _hops(headers, b"x-forwarded-for"))
        by_rfc = self._client(proxy, map(_for_of, _hops(headers, b"forwarded")))
        names = {name for name, _ in headers}
        if b"forwarded" not in names:
            return Asked(by_x, _x_scheme(headers))
        if b"x-forwarded-for" in names and by_x != by_rfc:
            return Asked(proxy, None)
        return Asked(by_rfc, _proto_of(headers) or _x_scheme(headers))

    def _client(self, proxy: str, hops: Iterator[str]) -> str:
        """The first address, from the right, that is no trusted proxy's."""
        client = proxy
        for hop in hops:
            found = _address_of(hop)
            if found is None:
                break
            client = str(found)
            if not self._has(found):
                break
        return client

    def _has(self, address: _Address) -> bool:
        return any(address in network for network in self._networks)


def _hops(headers: _Headers, name: bytes) -> Iterator[str]:
    """The elements of this list, the last first; a list may be spread over several headers."""
    left = HOPS_MAX
    for key, value in reversed(headers):
        if key != name:
            continue
        parts = value.rsplit(b",", left)
        for part in reversed(parts[1:] if len(parts) > left else parts):
            yield part[: _HOP_CHARS_MAX + 1].decode("latin-1").strip(" \t")
            left -= 1
        if left <= 0:
            return


def _address_of(text: str) -> _Address | None:
    """The address in `192.0.2.7`, `192.0.2.7:80`, `2001:db8::1` or `[2001:db8::1]:80`, or None.

    An IPv4 address in IPv6's clothes is that IPv4 address.
    """
    text = text.partition("%")[0]  # a link-local peer's zone
    match = _NODE.fullmatch(text) if len(text) <= _HOP_CHARS_MAX else None
    if match is None:
        return None
    try:
        found = ip_address(match["six"] or match["four"] or text)
    except ValueError:
        return None
    return (found.ipv4_mapped or found) if isinstance(found, IPv6Address) else found


def _pairs_of(element: str) -> dict[str, str]:
    """The parameters of one element of Forwarded; none if it is not well formed."""
    pairs: dict[str, str] = {}
    if len(element) > _HOP_CHARS_MAX:
        return pairs
    for part in element.split(";"):
        match = _PAIR.fullmatch(part)
        if match is None or match[1].lower() in pairs:
            return {}
        pairs[match[1].lower()] = match[2] or match[3] or ""
    return pairs


def _for_of(element: str) -> str:
    return _pairs_of(element).get("for", "")


def _proto_of(headers: _Headers) -> str | None:
    """The scheme that the nearest proxy was asked by, as it says in Forwarded."""
    return _scheme(_pairs_of(next(_hops(headers, b"forwarded"), "")).get("proto", ""))


def _x_scheme(headers: _Headers) -> str | None:
    return _scheme(next(_hops(headers, b"x-forwarded-proto"), ""))


def _scheme(text: str) -> str | None:
    return text.lower() if text.lower() in _SCHEMES else None
