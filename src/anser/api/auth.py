"""Who is asking: the key in a request's head, the place it came from, and guessing made slow.

Theory of operation. A key is one dict look-up in Members, and a right one is always let in: it has
256 random bits, so that no guesser comes near it, and refusing it would only harm its owner. What
is slowed are wrong keys, counted by source network (IPv4 /24, IPv6 /64): after FAILURES_MAX within
WINDOW_S the next ones are told to wait. Only what is shaped like a key counts as one; the
placeholders that clients are given where no key is wanted are wrong, but no guesses. Addresses are
those of the connection, or what a trusted proxy says (wire/proxies.py): no header that a client
could forge is believed. A Unix socket has no network.

A request without a key from a web page of another site is refused: a visitor's browser must not
spend the machine that it runs on.

Invariants: the table is bounded, the longest unused entry goes first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from ipaddress import ip_address

from starlette.types import Scope as ConnectionScope

from anser.core.errors import Forbidden, LimitReached, Unauthenticated
from anser.core.members import Scope, is_key_shaped
from anser.ports import Clock
from anser.services.members import OWNER, Members, Principal

__all__ = [
    "FAILURES_MAX",
    "OWN_SOCKET",
    "WINDOW_S",
    "Doorkeeper",
    "Header",
    "bearer_of",
    "check_site",
    "network_of",
    "on_loopback",
    "on_own_socket",
]

Header = Callable[[bytes], str | None]
"""The first header of a (lower-case) name, if there is one."""
OWN_SOCKET = Principal(member=OWNER, key=None, scope=Scope.OPERATE, anonymous=False)
"""Who asks on the Unix socket."""
FAILURES_MAX = 20
WINDOW_S = 60.0
_NETWORKS_MAX = 4_096


@dataclass(slots=True)
class _Window:
    """Wrong keys from one network since `opened_at`."""

    opened_at: float
    failures: int = 0


@dataclass(slots=True)
class Doorkeeper:
    """Lets members in, and slows whoever tries keys."""

    members: Members
    clock: Clock
    _windows: OrderedDict[str, _Window] = field(default_factory=OrderedDict[str, _Window])

    def __repr__(self) -> str:
        return f"<Doorkeeper networks={len(self._windows)}>"

    def validate(self) -> None:
        """Assert the invariants: the table is within its bounds."""
        assert len(self._windows) <= _NETWORKS_MAX
        assert all(window.failures > 0 for window in self._windows.values())

    def admit(self, header: Header, scope: ConnectionScope) -> Principal:
        """The member who asks; on the platform's own socket, its owner.

        Raises Unauthenticated, Forbidden, LimitReached.
        """
        if on_own_socket(scope):
            return OWN_SOCKET
        client = scope.get("client")
        principal = self.authenticate(bearer_of(header), peer=client[0] if client else "")
        if principal.anonymous:
            check_site(header, on_loopback=on_loopback(scope))
        return principal

    def authenticate(self, bearer: str | None, *, peer: str) -> Principal:
        """The member that this key opens, asked from `peer`. Raises as `admit` does."""
        try:
            return self.members.authenticate(bearer, peer=peer)
        except Unauthenticated:
            network = network_of(peer)
            if network and bearer is not None and is_key_shaped(bearer):
                self._note_failure(network)
            raise

    def _note_failure(self, network: str) -> None:
        """One more wrong key. Raises LimitReached where there have been too many."""
        now = self.clock.now()
        window = self._windows.get(network)
        if window is None or now - window.opened_at >= WINDOW_S:
            window = self._windows[network] = _Window(now)
        window.failures += 1
        self._windows.move_to_end(network)
        if len(self._windows) > _NETWORKS_MAX:
            self._windows.popitem(last=False)
        if window.failures > FAILURES_MAX:
            message = "Too many wrong keys from your network; try again later."
            raise LimitReached(message, retry_after_s=WINDOW_S - (now - window.opened_at)) from None


def bearer_of(header: Header) -> str | None:
    """The key of a request, from `authorization: Bearer` or `x-api-key`. Raises Unauthenticated."""
    value = header(b"authorization")
    if value is None:
        return header(b"x-api-key")
    scheme, _, key = value.partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        raise Unauthenticated("Send the key as 'Authorization: Bearer hf_...'.")
    return key.strip()


def on_own_socket(scope: ConnectionScope) -> bool:
    """Whether this came over the Unix socket, which the platform's owner alone can open.

    The listening side tells: a TCP client that has already hung up has no address either.
    """
    server = scope.get("server")
    return scope.get("client") is None and server is not None and server[1] is None


def on_loopback(scope: ConnectionScope) -> bool:
    """Whether this came from this machine, be it through a proxy on it.

    A page in this machine's browser can write a proxy's headers, so they do not make it a stranger.
    """
    client = scope.get("client")
    return _is_loopback(scope.get("proxy", "")) or (client is not None and _is_loopback(client[0]))


def check_site(header: Header, *, on_loopback: bool) -> None:
    """Raise Forbidden if a browser sends this for a page that is not the platform's own.

    On loopback the host must also be spelled as one: a name could be any site's, pointed here.
    """
    host = header(b"host") or ""
    origin = header(b"origin")
    if origin is not None and origin.lower().partition("://")[2] != host.lower():
        raise Forbidden("Another site's page needs a key to ask here.")
    if header(b"sec-fetch-site") in ("cross-site", "same-site"):
        raise Forbidden("Another site's page needs a key to ask here.")
    if on_loopback and origin is not None and not _names_loopback(host):
        raise Forbidden("Open this platform as localhost, or send a key.")


def _names_loopback(host: str) -> bool:
    name = host.lower().rpartition(":")[0] or host.lower()
    return name == "localhost" or name.endswith(".localhost") or _is_address(name.strip("[]"))


def _is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


@lru_cache(maxsize=4_096)
def network_of(peer: str) -> str:
    """The network that guesses are counted by: IPv4 /24, IPv6 /64; empty without an address.

    >>> network_of("192.0.2.77"), network_of("::ffff:192.0.2.9"), network_of("2001:db8::1")
    ('192.0.2', '192.0.2', '2001:0db8:0000:0000')
    """
    try:
        ip = ip_address(peer.partition("%")[0])
    except ValueError:
        return ""
    ip = getattr(ip, "ipv4_mapped", None) or ip
    if ip.version == 4:
        return str(ip).rpartition(".")[0]
    return ip.exploded[:19]


@lru_cache(maxsize=4_096)
def _is_loopback(peer: str) -> bool:
    try:
        return ip_address(peer.partition("%")[0]).is_loopback
    except ValueError:
        return False
