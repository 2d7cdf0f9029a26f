"""Headers of the PROXY protocol, as a proxy writes them."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_address

__all__ = ["LOCAL", "SIGNATURE", "line", "packed"]

SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
LOCAL = SIGNATURE + b"\x20\x00\0\0"
"""What a proxy says that asks on its own account."""


def line(address: str | IPv4Address | IPv6Address, port: int = 4_711) -> bytes:
    """Version 1."""
    source = ip_address(address)
    kind, own = ("TCP4", "192.0.2.1") if source.version == 4 else ("TCP6", "2001:db8::1")
    return f"PROXY {kind} {source} {own} {port} 443\r\n".encode()


def packed(
    address: str | IPv4Address | IPv6Address, port: int = 4_711, *, extensions: bytes = b""
) -> bytes:
    """Version 2."""
    source = ip_address(address)
    family, own = (0x11, "192.0.2.1") if source.version == 4 else (0x21, "2001:db8::1")
    addresses = source.packed + ip_address(own).packed
    block = addresses + port.to_bytes(2) + (443).to_bytes(2) + extensions
    return SIGNATURE + bytes((0x21, family)) + len(block).to_bytes(2) + block
