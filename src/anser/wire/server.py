"""A guard around uvicorn's HTTP protocol: strict framing, and a limit on every wait.

Theory of operation. Bytes that come in are cut into heads and bodies here, by rules stricter than
the parser's (wire/framing.py), and only then given to uvicorn, one request at a time: what a
client sends ahead waits until the answer before it is out, so answers, and refusals too, keep
their order. Where the parser and these rules disagree about an end, the request is refused.

Requests that an application's fast lane serves (wire/turn.py) are not given to uvicorn at all,
unless the lane declines.

Whoever is slow is timed: a head or a body that does not arrive (408), a kept connection without a
request (closed), an answer that is not read (cut off once the buffer has been full for too long).
Refusals are in OpenAI's envelope; after one, what still comes is thrown away for a moment, so that
the client can read why, and then the connection is closed.

Invariants: no application sees a request whose head was not checked; of each connection at most
one head, or what one read brings, is held; every connection has a timer running whenever it is
the client's turn. Protocols are not switched: an Upgrade header is passed over (RFC 9110, 7.8), and
hidden from the parser, which would take what follows it for another protocol.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from anser.core import limits
from anser.core.errors import (
    AnserError,
    BodyTimeout,
    HeadTimeout,
    HeadTooLarge,
    Malformed,
    Overloaded,
)
from anser.wire.cors import Cors
from anser.wire.framing import Body, LengthBody, body_of, check_head_bytes, check_headers
from anser.wire.proxies import Proxies
from anser.wire.proxy_header import Address
from anser.wire.refusal import refusal_of
from anser.wire.timer import Timer
from anser.wire.turn import FastLane, Turn, lines_of

__all__ = ["GuardSettings", "GuardedProtocol", "guarded"]

_LINGER_S = 2.0  # for a client that has been refused to read why
_DRAIN_S = 5.0  # for the rest of a body that its answer did not wait for
_UPGRADE = re.compile(rb"(?i)(?<=\n)upgrade:[^\n]*\n")  # lines are clean: check_head_bytes
_UNUSUAL = frozenset({b"expect", b"content-encoding"})  # left to uvicorn
_HELD_BYTES_MAX = 64 * 1024  # of what a client sends ahead, at which reading pauses


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardSettings:
    """What one listening socket takes from clients: bytes, seconds and connections."""

    head_bytes_max: int = limits.HEAD_BYTES_MAX
    head_timeout_s: float = limits.HEAD_TIMEOUT_S
    body_timeout_s: float = limits.BODY_TIMEOUT_S
    idle_timeout_s: float = limits.IDLE_TIMEOUT_S
    write_timeout_s: float = limits.WRITE_TIMEOUT_S
    connections_max: int = limits.CONNECTIONS_MAX
    proxies: Proxies = field(default_factory=Proxies)  # whose word on the client is taken
    cors: Cors = field(default_factory=Cors)


def guarded(settings: GuardSettings, lane: FastLane | None = None) -> type[GuardedProtocol]:
    """The protocol class to give to uvicorn as `http`."""
    return type("GuardedProtocol", (GuardedProtocol,), {"settings": settings, "lane": lane})


class GuardedProtocol(HttpToolsProtocol):
    """One client's connection."""

    settings: ClassVar[GuardSettings] = GuardSettings()
    lane: ClassVar[FastLane | None] = None

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.timeout_keep_alive = self.settings.idle_timeout_s  # type: ignore[assignment]
        self._inbox = bytearray()  # what no request has taken yet
        self._searched = 0  # bytes of the inbox that hold no end of a head
        self._body: Body | None = None  # of the present request, until its last byte
        self._head_seen = False  # told by the parser
        self._message_seen = False
        self._retiring = False  # the next answer is its last
        self._busy = False  # an answer is still to be sent
        self._refused = False
        self._turn: Turn | None = None  # the present request, while the lane answers it
        self._on_lane = False  # the present request is not uvicorn's
        self._common = self.server_state.default_headers  # of the present answer, or a refusal
        self._shared = ([*self._common], b"")  # the same as it is sent; of a list that is no more
        self._peers: dict[str, object] = {}  # both ends, as an ASGI scope has them
        self.announced: Address | None = None  # who asks, as a proxy said before HTTP began
        self._proxy: str | None = None  # the other end, if it is a trusted proxy
        self._head_timer = Timer(self.loop)
        self._body_timer = Timer(self.loop)
        self._write_timer = Timer(self.loop)

    def __repr__(self) -> str:
        state = "refused" if self._refused else "busy" if self._busy else "waiting"
        return f"<GuardedProtocol {state} inbox={len(self._inbox)} body={self._body!r}>"

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Called by the event loop."""
        super().connection_made(transport)
        if self.client is not None and self.settings.proxies.trusts(self.client[0]):
            self._proxy = self.client[0]
            self.client = self.announced or self.client
        self._peers = {"client": self.client, "server": self.server}
        if len(self.connections) > self.settings.connections_max:
            self._refuse(Overloaded("Too many connections are open here."), linger=False)
        else:
            self._time_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the event loop."""
        self._refused = True
        self._stop_timers()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)
        self._leave_turn()

    def data_received(self, data: bytes) -> None:
        """Called by the event loop."""
        if self._refused:
            return
        self._unset_keepalive_if_required()
        self._inbox += data
        self._advance()

    def pause_writing(self) -> None:
        """Called by the transport: the client does not read."""
        super().pause_writing()
        self._time_write()
        if self._turn is not None and self._turn.visit is not None:
            self._turn.visit.pause()

    def resume_writing(self) -> None:
        """Called by the transport: the client reads."""
        super().resume_writing()
        self._write_timer.stop()
        if self._turn is not None and self._turn.visit is not None:
            self._turn.visit.resume()
        elif self._inbox and not self._busy:
            self.flow.resume_reading()
            self._advance()

    # Cutting what comes into requests

    def _advance(self) -> None:
        try:
            while self._inbox and not self._refused and self._step():
                pass
        except AnserError as error:
            self._refuse(error)
        if self._body is not None and not self._body_timer.running and not self._refused:
            self._time_body(self.settings.body_timeout_s)
        if self._turn is not None and not self._turn.asked:
            self._attend(self._turn)
        waits = self._busy or self.flow.write_paused
        if len(self._inbox) > _HELD_BYTES_MAX and waits and self._body is None:
            self.flow.pause_reading()

    def _step(self) -> bool:
        """Take one part of the inbox; False when it needs more, or must wait."""
        if self._body is not None:
            self._take_body(self._body)
            return True
        return not self._busy and not self.flow.write_paused and self._take_head()

    def _take_head(self) -> bool:
        while self._inbox.startswith(b"\r\n"):
            del self._inbox[:2]  # RFC 9112, 2.2: empty lines before a request are passed over
        end = self._inbox.find(b"\r\n\r\n", max(self._searched - 3, 0))
        size = len(self._inbox) if end < 0 else end + 4
        check_head_bytes(self._inbox, self._searched, size)
        if size > self.settings.head_bytes_max:
            raise HeadTooLarge(f"A head may have {self.settings.head_bytes_max} bytes.")
        if end < 0:
            self._searched = size
            if not self._head_timer.running:
                self._time_head()
            return False
        self._searched = 0
        self._head_timer.stop()
        self._head_seen = self._message_seen = False
        head = self._take(size)
        self._parse(_UPGRADE.sub(b"", head) if b"\nupgrade:" in head.lower() else head)
        if not self._head_seen or (self._body is None) != self._message_seen:
            raise Malformed("The end of the head is not clear.")
        return True

    def _take_body(self, body: Body) -> None:
        self._parse(self._take(body.take(self._inbox)))
        if body.complete != self._message_seen:
            raise Malformed("The end of the body is not clear.")
        if body.complete:
            self._body = None
            self._body_timer.stop()

    def _take(self, size: int) -> bytes:
        """So many bytes out of the inbox."""
        data = bytes(self._inbox[:size])
        del self._inbox[:size]
        return data

    def _parse(self, data: bytes) -> None:
        """Give these bytes to uvicorn."""
        parser = self.parser
        assert parser is not None
        try:
            parser.feed_data(data)
        except httptools.HttpParserError as error:
            own = error.__context__
            if isinstance(own, AnserError):
                raise own from None
            raise Malformed(f"That is not HTTP: {error}.") from error

    # httptools

    def on_headers_complete(self) -> None:
        """Called by the parser: check the head, before the application sees it."""
        parser = self.parser
        assert parser is not None
        version = parser.get_http_version()
        check_headers(version, self.url, self.headers)
        self._body = body_of(version, self.headers)
        if parser.should_upgrade():
            raise Malformed("Nothing is tunnelled here.")
        self._head_seen = True
        self._on_lane = version == "1.1" and self._is_for_lane(parser.get_method())
        if self._on_lane:
            self._begin_turn(keep_alive=parser.should_keep_alive() and not self._retiring)
        else:
            self._begin_cycle(version)
        self._busy = True

    def _is_for_lane(self, method: bytes) -> bool:
        """Whether the application's lane serves it, and nothing about it is unusual."""
        lane, body = self.lane, self._body
        if lane is None or self.url not in lane.targets or not isinstance(body, LengthBody):
            return False
        if method != b"POST" or body.left > lane.body_bytes_max:
            return False
        return _UNUSUAL.isdisjoint(dict(self.headers))

    def _begin_turn(self, *, keep_alive: bool) -> None:
        self._common = self.server_state.default_headers
        if self.settings.cors:
            shared = self.settings.cors.headers(self.headers, preflight=False)
            self._common = [*self._common, *shared]
        self._turn = Turn(
            self,
            target=self.url,
            headers=self.headers,
            origin=self._origin(),
            keep_alive=keep_alive,
        )

    def _begin_cycle(self, version: str) -> None:
        """Let uvicorn begin."""
        cast("dict[str, object]", self.scope).update(self._origin())
        super().on_headers_complete()
        if self.settings.cors:
            self._share()
        if self._retiring:
            self.cycle.keep_alive = False
        if version == "1.0":
            self.cycle.__class__ = _OldCycle

    def _share(self) -> None:
        """Let the browser show the answer to the page that asks, if it may read it."""
        preflight = Cors.is_preflight(self.scope["method"], self.headers)
        shared = self.settings.cors.headers(self.headers, preflight=preflight)
        self._common = [*self.server_state.default_headers, *shared]
        self.cycle.default_headers = self._common
        if preflight:
            cast("dict[str, object]", self.scope)["preflight"] = True

    def _origin(self) -> dict[str, object]:
        """Who asks; behind a proxy who asked that, and that there is one."""
        if self._proxy is None:
            return self._peers
        assert self.client is not None
        told: dict[str, object] = {**self._peers, "proxy": self._proxy, "scheme": self.scheme}
        if self.announced is None or self.settings.proxies.trusts(self.client[0]):
            asked = self.settings.proxies.asked(self.client[0], self.headers)
            told["client"] = (asked.address, 0)
            told["scheme"] = asked.scheme or self.scheme
        return told

    def on_body(self, body: bytes) -> None:
        """Called by the parser."""
        if not self._on_lane:
            super().on_body(body)
        elif self._turn is not None:
            self._turn.grow(body)

    def on_message_complete(self) -> None:
        """Called by the parser."""
        self._message_seen = True
        if not self._on_lane:
            super().on_message_complete()

    # The fast lane

    def _attend(self, turn: Turn) -> None:
        """Let the lane know how far its request has come."""
        visit = turn.visit
        if visit is None:
            assert self.lane is not None
            visit = self.lane.meet(turn)
            if not turn.over:
                turn.visit = visit
        if not turn.over:
            visit.grew()
        if not turn.over and self._body is None:
            turn.asked = True
            if not visit.ask():
                self._hand_over(turn)

    def _hand_over(self, turn: Turn) -> None:
        """Let uvicorn begin with a request that the lane has declined."""
        self._turn, self._on_lane = None, False
        self._begin_cycle("1.1")
        self.cycle.keep_alive = turn.keep_alive  # the parser is past it; so may be the platform
        super().on_body(bytes(turn.body))
        super().on_message_complete()

    def _leave_turn(self) -> Turn | None:
        """The client of the present turn, if there is one, has left, or is cut off."""
        turn, self._turn = self._turn, None
        if turn is not None:
            turn.leave()
        return turn

    def shared_lines(self) -> bytes:
        """Called by a turn: the header lines that every answer begins with."""
        if self._shared[0] is not self._common:
            self._shared = self._common, lines_of(self._common)
        return self._shared[1]

    def listen(self) -> None:
        """Called by a turn: read on, or nobody sees whether the client has left."""
        self.flow.resume_reading()

    def turn_over(self) -> None:
        """Called by a turn: its answer is out. Others have their turn before this client's next."""
        turn, self._turn = self._turn, None
        assert turn is not None, self
        turn.visit = None  # which knows the turn
        if not turn.keep_alive:
            self.transport.close()
        if self._inbox:
            self.loop.call_soon(self._next)
        else:
            self.on_response_complete()

    def _next(self) -> None:
        if not self._refused:
            self.on_response_complete()

    def cut_short(self) -> bool:
        """The platform ends: tell the client of the present turn; False if there is none."""
        if self._turn is None or self._turn.visit is None:
            return False
        self._turn.visit.stop()
        return True

    # uvicorn

    def shutdown(self) -> None:
        """Called by the server: end after the present answer."""
        if self._turn is not None:
            self._turn.keep_alive = False
        else:
            super().shutdown()

    def on_response_complete(self) -> None:
        """Called when an answer is out: the next request may begin."""
        self._busy = False
        self._common = self.server_state.default_headers
        super().on_response_complete()
        if self.transport.is_closing():
            self._time_write()
        elif self._body is not None:
            self._unset_keepalive_if_required()
            self._time_body(min(_DRAIN_S, self.settings.body_timeout_s))
        elif self._inbox:
            self._unset_keepalive_if_required()
            self._advance()

    def timeout_keep_alive_handler(self) -> None:
        """Called when a kept connection has idled too long, its last answer read or not."""
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            super().timeout_keep_alive_handler()

    def retire(self, *, patient: bool) -> None:
        """Make the next answer the last, and close if none is under way; if `patient`, wait."""
        self._retiring = True
        if self._busy or not (patient or self._inbox):
            self.shutdown()

    # Time

    def _time_head(self) -> None:
        self._head_timer.start(self.settings.head_timeout_s, self._head_late)

    def _head_late(self) -> None:
        if self._inbox:
            self._refuse(HeadTimeout("The head of the request did not arrive in time."))
        else:
            self.transport.close()

    def _time_body(self, seconds: float) -> None:
        self._body_timer.start(seconds, self._body_late)

    def _body_late(self) -> None:
        if not self._busy:
            self.transport.abort()  # it has been answered, and still sends
        elif self.flow.read_paused:
            self._time_body(self.settings.body_timeout_s)  # it is the application that waits
        else:
            self._refuse(BodyTimeout("The body of the request did not arrive in time."))

    def _time_write(self) -> None:
        if not self._write_timer.running:
            self._write_timer.start(self.settings.write_timeout_s, self.transport.abort)

    def _stop_timers(self) -> None:
        for timer in (self._head_timer, self._body_timer, self._write_timer):
            timer.stop()

    # Refusing

    def _refuse(self, error: AnserError, *, linger: bool = True) -> None:
        """Say why, in the envelope, and close; who has been answered, if by half, is cut off."""
        self._refused = True
        self._stop_timers()
        self._unset_keepalive_if_required()
        self._inbox.clear()
        turn = self._leave_turn()
        cycle = self.cycle if self._busy and not self._on_lane else None
        if cycle is not None:
            cycle.disconnected = True
            cycle.message_event.set()
            self.flow.resume_writing()
        begun = cycle is not None and cycle.response_started
        answered = self._body is not None and not self._busy  # before all of its body had come
        if begun or answered or (turn is not None and turn.started):
            self.transport.abort()
            return
        self.transport.write(refusal_of(error, self._common))
        self.flow.resume_reading()
        if linger and self.transport.can_write_eof():
            self.transport.write_eof()
            self._write_timer.start(_LINGER_S, self.transport.abort)
        else:
            self.transport.close()
            self._time_write()


class _OldCycle(RequestResponseCycle):
    """An answer in HTTP/1.0, which has no chunks (RFC 9112, 6.1): its end is the connection's."""

    async def send(self, message: Any) -> None:
        """Called by the application."""
        while self.flow.write_paused and not self.disconnected:
            await self.flow.drain()
        self.chunked_encoding = False
        self.expected_content_length = len(message.get("body", b""))  # read before another sends
        await super().send(message)
