"""A listening socket whose clients say something before HTTP: a PROXY header, a TLS handshake.

Theory of operation. Connections are accepted here, one task for each until its first word is
said: then the loop takes it over, the protocol hears nothing but HTTP, and the task has ended. So
the certificate that is shown may be replaced at any time: a handshake takes the one that is there
when it begins, and what is connected keeps its own. A trusted proxy's header comes before the
handshake and is read from the bare socket, to its last byte and not further. Who is no trusted
proxy is not asked for one.

Invariants: of connections that have not said their first word there are never more than the socket
may have connections, and none is older than the time for a head; whoever speaks something else is
closed without a word; after `close` nothing is accepted, and what was accepted still arrives.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable

from anser.core.errors import Malformed
from anser.core.limits import ARRIVALS_AT_ONCE
from anser.wire.proxy_header import Address, ProxyHeader
from anser.wire.server import GuardedProtocol

__all__ = ["Entrance"]

_AGAIN_S = 0.5  # after the system had no file or memory for another connection


class Entrance:
    """The way in through one listening socket, which is its own."""

    def __init__(
        self, sock: socket.socket, *, tls: ssl.SSLContext | None, proxy_protocol: bool
    ) -> None:
        self.tls = tls
        self._proxy_protocol = proxy_protocol
        self._sock = sock
        self._arrivals = asyncio.TaskGroup()
        self._arriving = 0
        self._closed = asyncio.Event()
        self._make: Callable[[], GuardedProtocol] | None = None

    def __repr__(self) -> str:
        return f"<Entrance {self._sock.fileno()} arriving={self._arriving}>"

    @property
    def arriving(self) -> int:
        """How many have not said their first word yet."""
        return self._arriving

    async def run(self, make: Callable[[], GuardedProtocol]) -> None:
        """Give each connection a protocol of its own from `make`; until `close`."""
        self._make = make
        self._sock.settimeout(0)
        async with self._arrivals:
            self._watch()
            try:
                await self._closed.wait()
            finally:
                self.close()

    def close(self) -> None:
        """Accept nothing more; idempotent."""
        if self._sock.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self._sock)
            self._sock.close()
        self._closed.set()

    def _watch(self) -> None:
        if self._sock.fileno() >= 0:
            asyncio.get_running_loop().add_reader(self._sock, self._accept)

    def _accept(self) -> None:
        """Called by the event loop: somebody is at the door."""
        for _ in range(ARRIVALS_AT_ONCE):
            try:
                sock, address = self._sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError:  # no file or memory left: who waits, waits in the backlog
                loop = asyncio.get_running_loop()
                loop.remove_reader(self._sock)
                loop.call_later(_AGAIN_S, self._watch)
                return
            sock.settimeout(0)
            self._arrivals.create_task(self._arrive(sock, str(address[0])))

    async def _arrive(self, sock: socket.socket, peer: str) -> None:
        """Take one connection as far as its first byte of HTTP."""
        assert self._make is not None
        protocol = self._make()
        settings = protocol.settings
        if self._arriving + len(protocol.connections) >= settings.connections_max:
            sock.close()
            return
        self._arriving += 1
        arrived = False
        try:
            async with asyncio.timeout(settings.head_timeout_s):
                if self._proxy_protocol and settings.proxies.trusts(peer):
                    protocol.announced = await _announced(sock)
                await self._take_over(sock, protocol)
            arrived = True
        except (OSError, Malformed):  # not what was to be said, not in time, or gone
            pass
        finally:
            self._arriving -= 1
            if not arrived:
                sock.close()

    async def _take_over(self, sock: socket.socket, protocol: GuardedProtocol) -> None:
        """Give the connection to the loop, behind a handshake if TLS is spoken."""
        settings, bounds = protocol.settings, dict[str, float]()
        if self.tls is not None:
            bounds["ssl_handshake_timeout"] = settings.head_timeout_s
            bounds["ssl_shutdown_timeout"] = settings.write_timeout_s  # for its last bytes, too
        await asyncio.get_running_loop().connect_accepted_socket(
            lambda: protocol, sock, ssl=self.tls, **bounds
        )


async def _announced(sock: socket.socket) -> Address | None:
    """Whom a proxy speaks for; None if for itself. Raises Malformed, OSError."""
    loop, header = asyncio.get_running_loop(), ProxyHeader()
    while header.missing:
        data = await loop.sock_recv(sock, header.missing)
        if not data:
            raise Malformed("The PROXY header breaks off.")
        header.feed(data)
    return header.source
