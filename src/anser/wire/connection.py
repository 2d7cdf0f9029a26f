"""One connection to an upstream, which tells a listener of the answer that comes on it.

Theory of operation. A Connection carries one Question at a time: IDLE -> HEAD (asked) -> BODY (the
head of the answer has come) -> IDLE again, or LINGER while only the end of a body is awaited that
nobody listens to, or CLOSED. What comes is parsed first and told afterwards, so that a listener may
leave, pause or ask anew from within any call, and its own failures are never taken for the
upstream's. A connection keeps no bytes: who does not want more pauses it.

One timer per connection watches over silence. It outlives requests and looks, when it fires, at
when bytes came last, so that neither a chunk nor a request moves a timer.

Invariants: what the upstream did wrong is told after the sound bytes before it; a closed
connection is never used again; once an answer is complete nothing can spoil it; a listener hears
of one end, and of nothing after it or after it has left.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from enum import Enum
from typing import Protocol, cast

import httptools

from anser.core import limits
from anser.core.errors import EngineBroken, EngineError, EngineStalled, EngineUnreachable

__all__ = ["Bounds", "Connection", "Head", "Keeper", "Listener", "Question", "State"]

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


@dataclass(slots=True)
class Head:
    """The head of an answer."""

    status: int
    headers: Headers  # names in lower case
    until_eof: bool  # only the end of the connection ends the body

    def header(self, name: bytes) -> bytes:
        """The first value of this lower-case name, or nothing."""
        return next((value for key, value in self.headers if key == name), b"")


class Listener(Protocol):
    """Who is told of one answer as it comes, by calls on the event loop's thread."""

    def head(self, head: Head) -> None:
        """The head has come; first, and once."""
        ...

    def data(self, data: bytes) -> None:
        """The next bytes of the body, as many as came at once."""
        ...

    def complete(self) -> None:
        """The body has come whole; the connection may serve others already."""
        ...

    def failed(self, error: EngineError) -> None:
        """The answer ends here, before or after its head; the connection is closed."""
        ...


class Keeper(Protocol):
    """Who keeps connections, and is told of their turns."""

    def lost(self, connection: Connection) -> None:
        """It is gone."""
        ...

    def idle(self, connection: Connection) -> None:
        """It may carry another request."""
        ...

    def again(self, question: Question) -> None:
        """The kept connection that it was sent on had been dropped before: send it on another."""
        ...

    def forget(self, question: Question) -> None:
        """Its listener has left before it was sent."""
        ...


class Question:
    """A request that is sent, or waits for its connection, and who listens to its answer.

    Its verbs are the listener's. They may be called at any time, from within its calls too, and
    do nothing once the answer has ended.
    """

    __slots__ = ("_keeper", "connection", "data", "kept", "listener")

    def __init__(self, keeper: Keeper, data: tuple[bytes, ...], listener: Listener) -> None:
        self._keeper = keeper
        self.data = data
        self.listener: Listener | None = listener  # None once it has heard the end, or left
        self.connection: Connection | None = None  # that it was sent on, until the answer ends
        self.kept = False  # that connection had served before

    def __repr__(self) -> str:
        return f"<Question {self.connection!r} listening={self.listener is not None}>"

    def pause(self) -> None:
        """Take no more bytes from the upstream; those that have come already are told still."""
        if self.connection is not None:
            self.connection.pause()

    def resume(self) -> None:
        """Go on."""
        if self.connection is not None:
            self.connection.resume()

    def finish(self) -> None:
        """All that matters has come: leave, and keep the connection if the rest ends soon."""
        self._leave(linger=True)

    def close(self) -> None:
        """Leave. The connection is cut at once unless the answer has come whole."""
        self._leave(linger=False)

    def _leave(self, *, linger: bool) -> None:
        listener, self.listener = self.listener, None
        if self.connection is not None:
            self.connection.release(linger=linger)
        elif listener is not None:
            self._keeper.forget(self)

    # For connections and their keeper

    def complete(self) -> None:
        """Tell its listener that the answer is whole, unless it has left."""
        listener, self.listener = self.listener, None
        if listener is not None:
            listener.complete()

    def failed(self, error: EngineError) -> None:
        """Tell its listener that the answer ends here, unless it has left."""
        listener, self.listener = self.listener, None
        if listener is not None:
            listener.failed(error)


class State(Enum):
    """Where a connection is in its life."""

    IDLE = "idle"
    HEAD = "head"  # asked; the head of the answer is awaited
    BODY = "body"
    LINGER = "linger"  # nobody listens any more; the end of the body is awaited
    CLOSED = "closed"


class Connection(asyncio.Protocol):
    """One connection; carries one request at a time."""

    def __init__(self, keeper: Keeper, bounds: Bounds) -> None:
        self._keeper = keeper
        self._bounds = bounds
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)  # ready anew after a complete answer
        self._timer: asyncio.TimerHandle | None = None
        self._question: Question | None = None  # None too once its listener has left
        self._bodies: list[bytes] = []  # of the packet that is parsed
        self._paused = False
        self._heard = 0.0  # when bytes came last, or began to be awaited
        self._linger_until = 0.0
        self.state = State.IDLE
        self.since = self._loop.time()
        self._reset()

    def _reset(self) -> None:
        self._head: Head | None = None
        self._headers: Headers = []
        self._told = False  # of its head
        self._answered = False  # any byte of an answer has come
        self._quiet = 0  # bytes since the last that brought the answer forward
        self._head_bytes = 0  # of headers, of interim answers and trailers too
        self._interim = 0
        self._lingered = 0
        self._complete = False
        self._keep = False

    def __repr__(self) -> str:
        return f"<Connection {self.state.value} paused={self._paused} complete={self._complete}>"

    # For the pool and the question

    def ask(self, question: Question) -> None:
        """Write a request; its listener is told of the answer, and of nothing before this ends."""
        assert self.state is State.IDLE, self
        assert self._transport is not None
        self._reset()
        self.state = State.HEAD
        self._question = question
        question.connection = self
        self._heard = self._loop.time()
        if self._timer is None:
            self._arm(self._heard + self._bounds.silence_s)
        if len(question.data) == 1:
            self._transport.write(question.data[0])
        else:
            self._transport.writelines(question.data)

    def pause(self) -> None:
        """Take no more bytes from the upstream; idempotent."""
        if self.state is State.BODY and not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()

    def resume(self) -> None:
        """Go on; idempotent."""
        if self._paused and self._transport is not None:
            self._paused = False
            self._heard = self._loop.time()
            self._transport.resume_reading()

    def release(self, *, linger: bool) -> None:
        """The listener has left."""
        self._detach()
        if self._complete:
            self._settle()
        elif linger and self._head is not None and not self._head.until_eof:
            self.state = State.LINGER
            self._linger_until = self._loop.time() + _LINGER_S
            self._arm(self._linger_until)
            self.resume()
        else:
            self.cut()

    def cut(self) -> None:
        """Close at once, without a word to the upstream."""
        self.fail(EngineUnreachable("The connection to the engine was closed."))

    def fail(self, error: EngineError) -> None:
        """Close at once; whoever listens is told `error`."""
        if self.state is State.CLOSED:
            return
        question = self._detach()
        self.state = State.CLOSED
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._keeper.lost(self)
        if self._transport is not None:
            self._transport.abort()
        if question is not None:
            question.failed(error)

    def _settle(self) -> None:
        """The answer is complete: serve again, or close."""
        question = self._detach()
        if not self._keep or self._transport is None or self._transport.is_closing():
            self.cut()
        else:
            self.resume()
            self.state = State.IDLE
            self.since = self._loop.time()
            self._keeper.idle(self)
        if question is not None:
            question.complete()

    def _detach(self) -> Question | None:
        question, self._question = self._question, None
        if question is not None:
            question.connection = None
        return question

    def _arm(self, when: float) -> None:
        """See to it that the timer fires by then; earlier does no harm."""
        if self._timer is not None and self._timer.when() > when:
            self._timer.cancel()
            self._timer = None
        if self._timer is None:
            self._timer = self._loop.call_at(when, self._expire)

    def _expire(self) -> None:
        self._timer = None
        if self.state is State.IDLE:
            return
        if self._paused:
            self._heard = self._loop.time()  # it is the listener who is slow
        lingers = self.state is State.LINGER
        due = self._linger_until if lingers else self._heard + self._bounds.silence_s
        if self._loop.time() < due:
            self._arm(due)
        else:
            self.fail(EngineStalled("The engine went silent."))

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the event loop."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass
        if self.state is State.CLOSED:
            self._transport.abort()  # given up while it was dialled

    def data_received(self, data: bytes) -> None:
        """Called by the event loop."""
        if self.state is State.IDLE or self.state is State.CLOSED:
            self.cut()  # it speaks without being asked
            return
        self._answered = True
        self._heard = self._loop.time()
        question = self._question
        error = self._parse(data) or self._idled(len(data))
        if error is not None:
            self._keep = False
        if question is not None:
            self._tell(question)
        else:
            self._bodies.clear()
        # Within these calls the listener may have left, and the connection serve another already.
        if self._complete and self._question is question:
            self._settle()
        elif error is not None:
            self.fail(error)

    def _parse(self, data: bytes) -> EngineError | None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            return EngineBroken("The engine switched to another protocol.")
        except httptools.HttpParserError as error:
            own = error.__context__
            what = f"The engine's answer is not HTTP: {error}."
            return own if isinstance(own, EngineBroken) else EngineBroken(what)
        return None

    def _idled(self, size: int) -> EngineError | None:
        """What is wrong if a packet of this size has brought nothing, or nothing that is wanted."""
        if self.state is State.LINGER:
            self._lingered += sum(map(len, self._bodies))
            if self._lingered > _LINGER_BYTES:
                return EngineBroken("The engine goes on after its end.")
        if self._bodies or (self._head is not None and not self._told):
            self._quiet = 0
            return None
        self._quiet += size
        if self._quiet > self._bounds.head_bytes_max:
            return EngineBroken("The engine's answer brings nothing but its head.")
        return None

    def _tell(self, question: Question) -> None:
        """What the packet has brought."""
        bodies, listener = self._bodies, question.listener
        assert listener is not None, question
        if bodies:
            data = bodies[0] if len(bodies) == 1 else b"".join(bodies)
            bodies.clear()
        else:
            data = b""
        if not self._told and self._head is not None:
            self._told = True
            question.data = ()  # it is not sent again
            listener.head(self._head)
        if data and question.listener is not None:
            listener.data(data)

    def eof_received(self) -> None:
        """Called by the event loop; the transport then closes itself."""

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the event loop."""
        self._transport = None
        question = self._question
        if self.state is State.BODY and self._until_eof() and exc is None:
            self._complete = True
            self._settle()
        elif question is not None and question.kept and not self._answered:
            self._detach()
            self.cut()
            self._keeper.again(question)
        elif self.state is State.HEAD:
            reason = f" ({exc})" if exc is not None else ""
            self.fail(EngineUnreachable(f"The engine closed the connection unanswered{reason}."))
        else:
            self.fail(EngineBroken("The engine broke off in the middle of its answer."))

    def _until_eof(self) -> bool:
        return self._head is not None and self._head.until_eof

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
        if self._head is None:  # else it is a trailer
            self._headers.append((name.lower(), value))

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
            self._headers.clear()
            if self._interim > limits.ENGINE_INTERIM_MAX:
                raise EngineBroken("The engine sent too many interim answers.")
            return
        self._head = Head(status, self._headers, _until_eof(status, self._headers))
        self._keep = self._parser.should_keep_alive()
        self.state = State.BODY

    def on_body(self, body: bytes) -> None:
        """Called by the parser."""
        if self._head is None:
            raise EngineBroken("The engine sent an interim answer with a body.")
        self._bodies.append(body)

    def on_message_complete(self) -> None:
        """Called by the parser."""
        self._complete = self._head is not None  # else it is an interim answer


def _until_eof(status: int, headers: Headers) -> bool:
    """Whether only the end of the connection ends the body. Raises EngineBroken if unclear."""
    lengths = [value for name, value in headers if name == b"content-length"]
    codings = [value.lower() for name, value in headers if name == b"transfer-encoding"]
    if codings not in ([], [b"chunked"]) or len(lengths) > 1 or (lengths and codings):
        raise EngineBroken("The length of the engine's answer cannot be told.")
    return not lengths and not codings and status not in (204, 304)
