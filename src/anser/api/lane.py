"""The fast lane of inference: chats and completions with one answer, by calls alone.

Theory of operation. The wire hands over requests as Turns (wire/turn.py), and the gateway tells of
answers as they come (`Gateway.start`); a Visit stands between the two. When its request's head has
come it finds out who asks, when the body is whole it makes it a demand and starts it; then it is
the flight's reader, and writes what it is told, each chunk as an event or all of them as one
answer. There is no task and no queue: a client that is slow to read pauses the flight, one that
leaves ends it.

What is not one demand (`n`, several prompts) is declined before anything has been started, and goes
the way that has room for it (openai.py). Words, headers and errors are the same on both ways.

Invariants: the body is counted among all that are held until its request is over; a stream is
silent for at most twice KEEP_ALIVE_S, one timer seeing to all; no exception leaves a visit.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from os import urandom

from anser.api import sse
from anser.api.auth import Doorkeeper
from anser.api.context import Services
from anser.api.decode import decode_object
from anser.api.demands import Asked, Asker, asker_of
from anser.api.errors import Headers, body_of, headers_of, status_of
from anser.api.exchange import KEEP_ALIVE_S, LARGE_BYTES, Bodies, check_head
from anser.api.openai import CHAT, TEXT, Identity, node_headers
from anser.api.refusal import goodbye, refusal_headers
from anser.api.rewrite import Rewriter
from anser.api.why import why_headers
from anser.core.errors import AnserError
from anser.services.bugs import bug
from anser.services.chunks import Piece
from anser.services.flight import Flight
from anser.services.members import Principal
from anser.wire.turn import Turn, lines_of

__all__ = ["InferenceLane"]

_DIALECTS = {b"/v1/chat/completions": CHAT, b"/v1/completions": TEXT}
_JSON = b"content-type: application/json\r\ncontent-length: %d\r\n"
_STREAM = lines_of(sse.HEADERS)


class InferenceLane:
    """The fast lane of one application."""

    targets = frozenset(_DIALECTS)
    body_bytes_max = LARGE_BYTES

    __slots__ = ("bodies", "doorkeeper", "services", "watch")

    def __init__(self, services: Services, doorkeeper: Doorkeeper, bodies: Bodies) -> None:
        self.services = services
        self.doorkeeper = doorkeeper
        self.bodies = bodies
        self.watch = _Watch()

    def __repr__(self) -> str:
        return f"<InferenceLane {self.watch!r} {self.bodies!r}>"

    def meet(self, turn: Turn) -> _Visit:
        """A request's head has come."""
        visit = _Visit(self, turn)
        visit.enter()
        return visit


class _Visit:
    """One request, from its head to its answer's end."""

    __slots__ = (
        "_asker",
        "_flight",
        "_held",
        "_lane",
        "_paused",
        "_principal",
        "id",
        "silent",
        "turn",
    )

    def __init__(self, lane: InferenceLane, turn: Turn) -> None:
        self.id = "req_" + urandom(12).hex()
        self.turn = turn
        self.silent = False  # since the watch last looked
        self._lane = lane
        self._principal: Principal | None = None  # once it is known who asks
        self._asker: Asker | None = None
        self._flight: Flight | None = None
        self._held = 0  # bytes of the body that are counted
        self._paused = False

    def __repr__(self) -> str:
        return f"<_Visit {self.id} {self.turn!r} {self._flight!r}>"

    @property
    def flight(self) -> Flight:
        """The answer under way."""
        assert self._flight is not None, self
        return self._flight

    # The request, as the wire tells of it

    def enter(self) -> None:
        """Find out who asks, and whether the body can be read."""
        self._or_fail(self._enter)

    def grew(self) -> None:
        """Count what has come of the body."""
        self._or_fail(self._count)

    def ask(self) -> bool:
        """Start what the body asks for; False if that is more than one demand."""
        return self._or_fail(self._start)

    def left(self) -> None:
        """Nobody is there to answer."""
        flight = self._forget()
        if flight is not None:
            flight.leave()

    def pause(self) -> None:
        """The client does not read."""
        self._paused = True
        if self._flight is not None:
            self._flight.pause()

    def resume(self) -> None:
        """The client reads again."""
        self._paused = False
        if self._flight is not None:
            self._flight.resume()

    def stop(self) -> None:
        """The platform's own end cuts the answer short."""
        flight = self._flight
        self.fail(goodbye())
        if flight is not None:
            flight.leave()

    def look(self) -> None:
        """Keep a silent stream alive, and see whether its client is still there."""
        if self.silent and self.turn.started and not self._paused:
            self.turn.write(sse.KEEP_ALIVE)
        self.silent = True
        self.turn.listen()

    def _enter(self) -> bool:
        lane, turn = self._lane, self.turn
        services = lane.services
        self._principal = lane.doorkeeper.admit(turn.header, turn.origin)
        self._asker = asker_of(services, self.id, self._principal.member, turn.header)
        check_head(turn.header, services.config.server.body_bytes_max)
        return True

    def _count(self) -> bool:
        more = len(self.turn.body) - self._held
        self._lane.bodies.take(more)
        self._held += more
        return True

    def _start(self) -> bool:
        assert self._asker is not None, self
        dialect = _DIALECTS[self.turn.target]
        asked = dialect.ask(self._asker, decode_object(bytes(self.turn.body)))
        if asked.demands[1:]:
            self._forget()
            return False
        services = self._lane.services
        demand = asked.demands[0]
        identity = Identity(
            dialect=dialect,
            request=self.id,
            created=int(services.clock.wall()),
            model=demand.model,
        )
        reader = _Streamed(self, asked, identity) if asked.stream else _Whole(self, identity)
        self._flight = services.gateway.start(demand, reader)
        self.turn.body = b""
        self._lane.watch.add(self)
        return True

    # The answer

    def lines(self) -> bytes:
        """The headers of an answer that goes well, but for those of its body."""
        flight, services, header = self.flight, self._lane.services, self.turn.header
        told = why_headers(services, self.id, header)
        return self._named([*node_headers(flight.node, flight.limits), *told])

    def answer(self, body: bytes) -> None:
        """Answer whole."""
        lines = self.lines()
        self._forget()
        self.turn.reply(200, _JSON % len(body) + lines, body)

    def close(self, *events: bytes) -> None:
        """End the stream."""
        self._forget()
        self.turn.close(*events)

    def fail(self, error: AnserError) -> None:
        """Tell what went wrong, in the place where the client can still read it."""
        self._forget()
        body = body_of(error)
        if self.turn.started:
            self.turn.close(sse.event(body))
            return
        told = refusal_headers(
            self._lane.services,
            error,
            principal=self._principal,
            request=self.id,
            header=self.turn.header,
        )
        lines = self._named([*headers_of(error), *told])
        self.turn.reply(status_of(error), _JSON % len(body) + lines, body)

    def _or_fail(self, step: Callable[[], bool]) -> bool:
        try:
            return step()
        except AnserError as error:
            self.fail(error)
        except Exception as error:  # noqa: BLE001 - one request's bug is not its connection's end
            self.fail(bug(error, request=self.id))
        return True

    def _named(self, headers: Headers) -> bytes:
        return lines_of([*headers, (b"x-request-id", self.id.encode())])

    def _forget(self) -> Flight | None:
        """The request is over: its body is held no longer, nor what was under way for it."""
        self._lane.bodies.held -= self._held
        self._held = 0
        self._lane.watch.discard(self)
        flight, self._flight = self._flight, None
        return flight


class _Streamed:
    """Passes each chunk on when it comes; usage, if asked for, is the platform's own count."""

    __slots__ = ("_identity", "_include_usage", "_rewriter", "_visit")

    def __init__(self, visit: _Visit, asked: Asked, identity: Identity) -> None:
        self._visit = visit
        self._identity = identity
        self._include_usage = asked.include_usage
        self._rewriter = Rewriter(asked, identity.fields(identity.dialect.chunk))

    def began(self) -> None:
        """Called by the flight."""
        self._visit.turn.open(_STREAM + self._visit.lines())

    def piece(self, piece: Piece) -> None:
        """Called by the flight. Raises EngineBroken."""
        data = self._rewriter.chunk(piece.data)
        if data is not None:
            self._visit.silent = False
            self._visit.turn.write(sse.event(data))

    def ended(self) -> None:
        """Called by the flight."""
        events = [sse.DONE]
        if self._include_usage:
            flight = self._visit.flight
            events.insert(0, sse.event(self._identity.usage_chunk(flight.node, flight.usage)))
        self._visit.close(*events)

    def failed(self, error: AnserError) -> None:
        """Called by the flight."""
        self._visit.fail(error)


class _Whole:
    """Puts everything together, then answers."""

    __slots__ = ("_choice", "_identity", "_visit")

    def __init__(self, visit: _Visit, identity: Identity) -> None:
        self._visit = visit
        self._identity = identity
        self._choice = identity.dialect.choice()

    def began(self) -> None:
        """Called by the flight."""

    def piece(self, piece: Piece) -> None:
        """Called by the flight. Raises EngineBroken."""
        self._choice.take(piece)

    def ended(self) -> None:
        """Called by the flight."""
        visit = self._visit
        visit.answer(self._identity.whole([self._choice], visit.flight.usage))

    def failed(self, error: AnserError) -> None:
        """Called by the flight."""
        self._visit.fail(error)


class _Watch:
    """Looks after the requests under way, again and again, while there are any."""

    __slots__ = ("_timer", "_visits")

    def __init__(self) -> None:
        self._visits = set[_Visit]()
        self._timer: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<_Watch {len(self._visits)} visits>"

    def add(self, visit: _Visit) -> None:
        """Look after it, too."""
        self._visits.add(visit)
        if self._timer is None:
            self._wait()

    def discard(self, visit: _Visit) -> None:
        """Look after it no more."""
        self._visits.discard(visit)

    def _wait(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(KEEP_ALIVE_S, self._look)

    def _look(self) -> None:
        self._timer = None
        for visit in tuple(self._visits):
            visit.look()
        if self._visits:
            self._wait()
