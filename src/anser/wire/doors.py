"""The sockets of a platform: opened, served, and closed.

Theory of operation. All sockets are bound before anything is announced. At the end a door takes no
more connections, closes those that idle, and lets what runs finish, or cuts it short. Answers that
are cut short are cancelled like a client's own leaving, so every request still leaves its receipt
before the process ends. What a door takes from clients may be changed while it is open: it holds
for every connection from its next wait or request on.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import ssl
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from ipaddress import ip_address
from pathlib import Path
from typing import cast

import uvicorn
from starlette.types import ASGIApp

from anser.core.errors import ConfigError
from anser.core.limits import ABORT_WAIT_S, IDLE_TIMEOUT_S
from anser.wire.entrance import Entrance
from anser.wire.server import GuardedProtocol, GuardSettings, guarded
from anser.wire.tls import Identity
from anser.wire.turn import lane_of

__all__ = [
    "Door",
    "is_loopback",
    "listen",
    "listen_unix",
    "serving_loop",
    "url_of",
]

_BACKLOG = 2_048
_FLUSH_S = 3.0  # for the last bytes of what has finished
_GOODBYE_S = 1.0  # for the last words to those that are cut short
_PATIENCE_S = 1.0  # with idle connections, when their platform retires: a request may be under way
_TICK_S = 0.02
_PRIVATE = 0o600


class Door:
    """One application on one listening socket.

    With `tls` it is behind handshakes; with `proxy_protocol`, trusted proxies say who asks.
    """

    def __init__(
        self,
        app: ASGIApp,
        sock: socket.socket,
        guard: GuardSettings,
        *,
        tls: ssl.SSLContext | None = None,
        proxy_protocol: bool = False,
    ) -> None:
        self.opened = asyncio.Event()
        self._sock = sock
        self._protocol = guarded(guard, lane_of(app))
        self._entrance: Entrance | None = None
        if tls is not None or proxy_protocol:
            self._entrance = Entrance(sock, tls=tls, proxy_protocol=proxy_protocol)
        self._server = _Server(
            uvicorn.Config(
                app,
                interface="asgi3",  # a bound method would be taken for ASGI 2
                http=self._protocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                backlog=_BACKLOG,
                timeout_keep_alive=round(IDLE_TIMEOUT_S),
            ),
            self.opened,
            self._entrance,
        )

    def __repr__(self) -> str:
        return f"<Door {self._sock.fileno()} opened={self.opened.is_set()}>"

    async def serve(self) -> None:
        """Take connections until `close`; returns when the last request has ended."""
        if self._entrance is None:
            await self._server.serve(sockets=[self._sock])
            return
        async with asyncio.TaskGroup() as tasks:
            arriving = tasks.create_task(self._entrance.run(self._server.make_protocol))
            await self._server.serve(sockets=[self._sock])
            arriving.cancel()

    def change(self, guard: GuardSettings, *, tls: ssl.SSLContext | None = None) -> None:
        """Take other bounds from now on, and show another certificate where there is one."""
        self._protocol.settings = guard
        if tls is not None:
            assert self._entrance is not None, self
            self._entrance.tls = tls

    async def retire(self) -> None:
        """Leave who comes to the successor on this socket; returns when who is here has left.

        Each connection is closed behind its next answer; one that idles, after a moment.
        """
        await self._server.retire(self._sock)

    def close(self, *, quickly: bool) -> None:
        """Take no more connections, and end once running requests have; or at once."""
        self._server.force_exit = quickly
        self._server.should_exit = True


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers; it says when its socket is open, and ends everything."""

    def __init__(
        self, config: uvicorn.Config, opened: asyncio.Event, entrance: Entrance | None
    ) -> None:
        super().__init__(config)
        self.servers = []
        self._opened = opened
        self._entrance = entrance

    def make_protocol(self) -> GuardedProtocol:
        """A protocol for one connection that an entrance has accepted."""
        make = cast("type[GuardedProtocol]", self.config.http_protocol_class)
        return make(config=self.config, server_state=self.server_state, app_state={})

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Open the sockets; an entrance has opened its own."""
        await super().startup(sockets if self._entrance is None else [])
        self._opened.set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more connections; end those that are idle, then those that do not end."""
        self._stop_accepting(sockets or ())
        state = self.server_state
        for connection in tuple(state.connections):
            connection.shutdown()
        with suppress(TimeoutError):
            async with asyncio.timeout(0 if self.force_exit else _FLUSH_S):
                while state.connections or state.tasks:  # noqa: ASYNC110 - nobody tells
                    await asyncio.sleep(_TICK_S)
        told = self._cut_turns_short()
        cut_short = set(state.tasks)
        for task in cut_short:
            task.cancel()
        if cut_short:
            await asyncio.wait(cut_short, timeout=ABORT_WAIT_S + _FLUSH_S)  # they stop engines
        with suppress(TimeoutError):
            async with asyncio.timeout(_GOODBYE_S):
                while told & state.connections:  # noqa: ASYNC110 - nobody tells
                    await asyncio.sleep(_TICK_S)

    def _cut_turns_short(self) -> set[object]:
        """End the fast lane's answers; the connections of those that were told."""
        connections: set[object] = set(self.server_state.connections)
        return {
            connection
            for connection in connections
            if isinstance(connection, GuardedProtocol) and connection.cut_short()
        }

    async def retire(self, sock: socket.socket) -> None:
        """Take no more connections on `sock`, and let those that are there come to their end."""
        loop = asyncio.get_running_loop()
        patient_until = loop.time() + _PATIENCE_S
        self._stop_accepting([sock])
        while True:
            for connection in self._present():
                connection.retire(patient=loop.time() < patient_until)
            await asyncio.sleep(_TICK_S)  # what was accepted a moment ago becomes a connection
            if not (self._present() or self._arriving):
                return

    def _present(self) -> list[GuardedProtocol]:
        """The connections that nobody has closed yet."""
        connections = cast("set[GuardedProtocol]", self.server_state.connections)
        return [each for each in connections if not each.transport.is_closing()]

    @property
    def _arriving(self) -> bool:
        return self._entrance is not None and self._entrance.arriving > 0

    def _stop_accepting(self, sockets: Iterable[socket.socket]) -> None:
        if self._entrance is not None:
            self._entrance.close()
        for server in self.servers:
            server.close()
        for sock in sockets:
            sock.close()

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        """Leave signals to StopSignals."""
        yield


def serving_loop() -> asyncio.AbstractEventLoop:
    """A loop to serve on: uvloop's, twice as fast, where it is installed; else asyncio's own."""
    try:
        import uvloop  # noqa: PLC0415 - there is none for Windows
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


@contextmanager
def listen(host: str, port: int) -> Generator[socket.socket]:
    """Bind and listen. ConfigError says what is in the way."""
    try:
        found = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE | socket.AI_NUMERICSERV
        )
        family, address = found[0][0], found[0][4]
        # Named TCP, or asyncio leaves Nagle's algorithm on: 40 ms for each answer in two writes.
        sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    except OSError as error:
        raise ConfigError(f"{host} is not an address of this machine: {error.strerror}.") from error
    with sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(address)
            sock.listen(_BACKLOG)
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                message = f"{host} is not an address of this machine. Choose another --host."
                raise ConfigError(message) from error
            message = (
                f"Port {port} of {host} cannot be opened: {error.strerror}. Try another --port."
            )
            raise ConfigError(message) from error
        yield sock


@contextmanager
def listen_unix(path: Path) -> Generator[socket.socket]:
    """Listen on a socket file that only its owner can open; one left behind is replaced.

    The caller holds the folder's lock, so a file that is there belongs to nobody.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        path.unlink(missing_ok=True)
        before = os.umask(0o777 & ~_PRIVATE)
        try:
            sock.bind(os.fspath(path))
        except OSError as error:
            raise ConfigError(f"{path} cannot be opened: {error.strerror}.") from error
        finally:
            os.umask(before)
        try:
            sock.listen(_BACKLOG)
            yield sock
        finally:
            path.unlink(missing_ok=True)


def is_loopback(host: str) -> bool:
    """Whether a listening address is reached from this machine only."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def url_of(sock: socket.socket, identity: Identity | None = None) -> str:
    """The address that a client can paste; a wildcard is shown as loopback.

    With TLS it has a name that the certificate is for.
    """
    host, port = sock.getsockname()[:2]
    if ip_address(host).is_unspecified:
        host = "::1" if ":" in host else "127.0.0.1"
    scheme = "http"
    if identity is not None:
        scheme, host = "https", identity.host(host)
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
