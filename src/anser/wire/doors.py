"""The sockets of a platform, and the signals that end it.

Theory of operation. All sockets are bound before anything is announced. The first SIGINT or SIGTERM
fails readiness and admits nothing new; what runs may finish within `server.drain_s`; a second one
cuts it short. Answers that are cut short are cancelled like a client's own leaving, so every
request still leaves its receipt before the process ends.
"""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
from collections.abc import Generator
from contextlib import contextmanager, suppress
from ipaddress import ip_address
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from anser.core.errors import ConfigError
from anser.core.limits import ABORT_WAIT_S, IDLE_TIMEOUT_S
from anser.wire.server import GuardedProtocol, GuardSettings, guarded
from anser.wire.turn import lane_of

__all__ = [
    "Door",
    "StopSignals",
    "is_loopback",
    "listen",
    "listen_unix",
    "serving_loop",
    "url_of",
]

_BACKLOG = 2_048
_FLUSH_S = 3.0  # for the last bytes of what has finished
_GOODBYE_S = 1.0  # for the last words to those that are cut short
_TICK_S = 0.02
_PRIVATE = 0o600


class StopSignals:
    """The operator's wish to stop: `first` asks for an orderly end, `second` for a quick one."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()

    def __repr__(self) -> str:
        return f"<StopSignals first={self.first.is_set()} second={self.second.is_set()}>"

    @classmethod
    @contextmanager
    def watched(cls) -> Generator[StopSignals]:
        """Listen for SIGINT and SIGTERM while the context is open."""
        loop, stop = asyncio.get_running_loop(), cls()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.ask)
        try:
            yield stop
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)

    def ask(self) -> None:
        """One more wish to stop."""
        (self.second if self.first.is_set() else self.first).set()


class Door:
    """One application on one listening socket."""

    def __init__(self, app: ASGIApp, sock: socket.socket, guard: GuardSettings) -> None:
        self.opened = asyncio.Event()
        self._sock = sock
        self._server = _Server(
            uvicorn.Config(
                app,
                interface="asgi3",  # a bound method would be taken for ASGI 2
                http=guarded(guard, lane_of(app)),
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
        )

    def __repr__(self) -> str:
        return f"<Door {self._sock.getsockname()} opened={self.opened.is_set()}>"

    async def serve(self) -> None:
        """Take connections until `close`; returns when the last request has ended."""
        await self._server.serve(sockets=[self._sock])

    def close(self, *, quickly: bool) -> None:
        """Take no more connections, and end once running requests have; or at once."""
        self._server.force_exit = quickly
        self._server.should_exit = True


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers; it says when its socket is open, and ends everything."""

    def __init__(self, config: uvicorn.Config, opened: asyncio.Event) -> None:
        super().__init__(config)
        self._opened = opened

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Open the sockets."""
        await super().startup(sockets)
        self._opened.set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more connections; end those that are idle, then those that do not end."""
        for server in self.servers:
            server.close()
        for sock in sockets or ():
            sock.close()
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


def url_of(sock: socket.socket) -> str:
    """The address that a client on this machine can paste; a wildcard is shown as loopback."""
    host, port = sock.getsockname()[:2]
    if ip_address(host).is_unspecified:
        host = "::1" if ":" in host else "127.0.0.1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
