"""One connection to an upstream, and the answer that is read from it.

Theory of operation. A Connection carries one request at a time: IDLE -> HEAD (asked) -> BODY (the
head of the answer has come) -> IDLE again, or LINGER while only the end of a body is awaited that
nobody reads, or CLOSED. Bytes wait in the connection until they are read; beyond the bound the
socket is paused. One timer per connection watches whatever is waited for; it is moved only when
it must be, so that a chunk costs no timer.

Invariants: what the upstream did wrong is told to the reader after the sound bytes before it; a
closed connection is never used again; once an answer is complete nothing can spoil it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol, cast

import httptools

from anser.core import limits
from anser.core.errors import AnserError, EngineBroken, EngineStalled, EngineUnreachable

__all__ = ["Bounds", "Connection", "Keeper", "Response", "State"]

Headers = list[tuple[bytes, bytes]]

_LINGER_S = 1.0  # for the end of a body whose reader has seen all that it wants
_LINGER_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What an upstream may take: bytes, seconds and connections."""

    connect_timeout_s: float = limits.CONNECT_TIMEOUT_S
    silence_s: float = limits.ENGINE_SILENCE_S  # any one wait for bytes
    head_bytes_max: int = limits.ENGINE_HEAD_BYTES_MAX
    buffer_bytes: int = limits.ENGINE_BUFFER_BYTES  # unread bytes at which reading pauses
    connections_max: int = limits.ENGINE_CONNECTIONS_MAX
    idle_max: int = limits.ENGINE_IDLE_MAX
    idle_s: float = limits.ENGINE_IDLE_S


class Keeper(Protocol):
    """Who keeps connections, and is told of their turns."""

    def made(self, connection: Connection) -> None:
        """It is open."""
        ...

    def lost(self, connection: Connection) -> None:
        """It is gone."""
        ...

    def idle(self, connection: Connection) -> None:
        """It may carry another request."""
        ...


class Response:
    """An answer whose head has come: iterate its body, then `finish` or `close` it.

    As a context manager it closes itself: a body that was not read to its end is cut off.
    """

    __slots__ = ("_connection", "headers", "status", "until_eof")

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.status = connection.status
        self.headers = connection.headers  # names in lower case
        self.until_eof = connection.until_eof  # only the end of the connection ends the body

    def __repr__(self) -> str:
        return f"<Response {self.status} {self._connection!r}>"

    def header(self, name: bytes) -> bytes:
        """The first value of this lower-case name, or nothing."""
        return next((value for key, value in self.headers if key == name), b"")

    def __aiter__(self) -> Response:
        return self

    async def __anext__(self) -> bytes:
        data = await self._connection.read()
        if not data:
            raise StopAsyncIteration
        return data

    async def read(self, limit: int) -> bytes:
        """The whole body. Raises EngineBroken if it has more than `limit` bytes."""
        parts: list[bytes] = []
        size = 0
        async for data in self:
            size += len(data)
            if size > limit:
                self.close()
                raise EngineBroken(f"The engine's answer has more than {limit} bytes.")
            parts.append(data)
        return b"".join(parts)

    def finish(self) -> None:
        """All that matters has been read: keep the connection if the rest ends soon."""
        self._connection.release(linger=True)

    def close(self) -> None:
        """Keep the connection if the body is complete, else cut it at once; idempotent."""
        self._connection.release(linger=False)

    def __enter__(self) -> Response:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class State(Enum):
    """Where a connection is in its life."""

    IDLE = "idle"
    HEAD = "head"  # asked; the head of the answer is awaited
    BODY = "body"
    LINGER = "linger"  # nobody reads any more; the end of the body is awaited
    CLOSED = "closed"


class Connection(asyncio.Protocol):
    """One connection; carries one request at a time."""

    def __init__(self, keeper: Keeper, bounds: Bounds) -> None:
        self._keeper = keeper
        self._bounds = bounds
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._deadline = 0.0
        self.state = State.IDLE
        self.since = self._loop.time()
        self._reset()

    def _reset(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._chunks: deque[bytes] = deque()
        self._unread = 0
        self._paused = False
        self._quiet = 0  # bytes since the last that brought the answer forward
        self._forward = False
        self._head_bytes = 0  # of headers, of interim answers and trailers too
        self._interim = 0
        self._lingered = 0
        self._complete = False
        self._keep = False
        self._error: AnserError | None = None
        self.answered = False  # any byte of an answer has come
        self.status = 0
        self.headers: Headers = []
        self.until_eof = False

    def __repr__(self) -> str:
        return f"<Connection {self.state.value} unread={self._unread} complete={self._complete}>"

    # For the pool and the response

    async def ask(self, data: Sequence[bytes]) -> Response:
        """Write a request, and wait for the head of its answer."""
        assert self.state is State.IDLE, self
        assert self._transport is not None
        self._reset()
        self.state = State.HEAD
        self._transport.writelines(data)
        while self.state is State.HEAD:
            await self._wait()
        if self._error is not None and self.status == 0:
            raise self._error
        return Response(self)

    async def read(self) -> bytes:
        """The next bytes of the body; nothing at its end."""
        while not self._chunks:
            if self._error is not None:
                raise self._error
            if self._complete or self.state is not State.BODY:
                return b""
            await self._wait()
        data = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        self._chunks.clear()
        self._unread = 0
        if self._paused and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()
        return data

    def release(self, *, linger: bool) -> None:
        """The reader has left."""
        if self.state is not State.BODY:
            return
        self._chunks.clear()
        self._unread = 0
        if self._complete:
            self._settle()
        elif linger and not self.until_eof:
            self.state = State.LINGER
            self._arm(_LINGER_S)
            if self._paused and self._transport is not None:
                self._paused = False
                self._transport.resume_reading()
        else:
            self.cut()

    def cut(self) -> None:
        """Close at once, without a word."""
        self.fail(EngineUnreachable("The connection to the engine was closed."))

    def fail(self, error: AnserError) -> None:
        """Close at once; whoever waits gets `error`."""
        if self.state is State.CLOSED:
            return
        self._error = None if self._complete else error
        self.state = State.CLOSED
        self._disarm()
        self._wake()
        self._keeper.lost(self)
        if self._transport is not None:
            self._transport.abort()

    def _settle(self) -> None:
        """The answer is complete and read: serve again, or close."""
        self._disarm()
        if not self._keep or self._transport is None or self._transport.is_closing():
            self.cut()
            return
        if self._paused:
            self._paused = False
            self._transport.resume_reading()
        self.state = State.IDLE
        self.since = self._loop.time()
        self._keeper.idle(self)

    # Waiting

    async def _wait(self) -> None:
        self._waiter = self._loop.create_future()
        self._arm(self._bounds.silence_s)
        try:
            await self._waiter
        except asyncio.CancelledError:
            self.cut()
            raise
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _arm(self, delay_s: float) -> None:
        """Set the deadline; the timer itself moves only when it must, to cost a chunk nothing."""
        self._deadline = self._loop.time() + delay_s
        if self._timer is not None and self._timer.when() > self._deadline:
            self._disarm()
        if self._timer is None:
            self._timer = self._loop.call_at(self._deadline, self._expire)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expire(self) -> None:
        self._timer = None
        if self._waiter is None and self.state is not State.LINGER:
            return  # it is the reader who is slow
        if self._loop.time() < self._deadline:
            self._timer = self._loop.call_at(self._deadline, self._expire)
        else:
            self.fail(EngineStalled("The engine went silent."))

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the event loop."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass
        if self.state is State.CLOSED:
            self._transport.abort()  # given up while it was dialled
        else:
            self._keeper.made(self)

    def data_received(self, data: bytes) -> None:
        """Called by the event loop."""
        if self.state in (State.IDLE, State.CLOSED):
            self.cut()  # it speaks without being asked
            return
        self.answered = True
        self._forward = False
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self.fail(EngineBroken("The engine switched to another protocol."))
        except httptools.HttpParserError as error:
            own = error.__context__
            what = f"The engine's answer is not HTTP: {error}."
            self.fail(own if isinstance(own, EngineBroken) else EngineBroken(what))
        else:
            self._quiet = 0 if self._forward else self._quiet + len(data)
            if self._quiet > self._bounds.head_bytes_max:
                self.fail(EngineBroken("The engine's answer brings nothing but its head."))

    def eof_received(self) -> None:
        """Called by the event loop; the transport then closes itself."""

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the event loop."""
        if self.state is State.BODY and self.until_eof and exc is None:
            self._complete = True
        early = self.state in (State.IDLE, State.HEAD)
        self._transport = None
        if early:
            reason = f" ({exc})" if exc is not None else ""
            self.fail(EngineUnreachable(f"The engine closed the connection unanswered{reason}."))
        else:
            self.fail(EngineBroken("The engine broke off in the middle of its answer."))

    # httptools

    def on_message_begin(self) -> None:
        """Called by the parser."""
        if self._complete:
            raise EngineBroken("The engine answered twice.")

    def on_header(self, name: bytes, value: bytes) -> None:
        """Called by the parser."""
        self._head_bytes += len(name) + len(value) + 4
        if self._head_bytes > self._bounds.head_bytes_max:
            raise EngineBroken("The head of the engine's answer is too long.")
        if not self.status:  # else it is a trailer
            self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        """Called by the parser."""
        status = self._parser.get_status_code()
        version = self._parser.get_http_version()
        if version not in ("1.1", "1.0"):
            raise EngineBroken(f"The engine answered in HTTP/{version}.")
        if status == 101 or not 100 <= status <= 599:
            raise EngineBroken(f"The engine answered with status {status}.")
        if status < 200:
            self._interim += 1
            self.headers.clear()
            if self._interim > limits.ENGINE_INTERIM_MAX:
                raise EngineBroken("The engine sent too many interim answers.")
            return
        self.until_eof = _until_eof(status, self.headers)
        self.status = status
        self._forward = True
        self._keep = self._parser.should_keep_alive()
        if self.state is State.HEAD:
            self.state = State.BODY
        self._wake()

    def on_body(self, body: bytes) -> None:
        """Called by the parser."""
        self._forward = True
        if self.state is State.LINGER:
            self._lingered += len(body)
            if self._lingered > _LINGER_BYTES:
                raise EngineBroken("The engine goes on after its end.")
            return
        self._chunks.append(body)
        self._unread += len(body)
        if self._unread > self._bounds.buffer_bytes and not self._paused:
            assert self._transport is not None
            self._paused = True
            self._transport.pause_reading()
        self._wake()

    def on_message_complete(self) -> None:
        """Called by the parser."""
        if not self.status:
            return  # an interim answer
        self._complete = True
        if self.state is State.LINGER:
            self.state = State.BODY
            self._settle()
        else:
            self._wake()


def _until_eof(status: int, headers: Headers) -> bool:
    """Whether only the end of the connection ends the body. Raises EngineBroken if unclear."""
    lengths = [value for name, value in headers if name == b"content-length"]
    codings = [value.lower() for name, value in headers if name == b"transfer-encoding"]
    if codings not in ([], [b"chunked"]) or len(lengths) > 1 or (lengths and codings):
        raise EngineBroken("The length of the engine's answer cannot be told.")
    return not lengths and not codings and status not in (204, 304)
