"""A client's bytes against the guard, by the fast lane and by ASGI, beside another parser (h11).

The application answers each request with its number and the length of its body, when all of it has
come; `early` in the target has it answer before, `later` in the body, after a while; and `decline`
makes the lane pass it on.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import h11
from starlette.types import Receive, Scope, Send

from anser.wire.server import GuardSettings, guarded
from anser.wire.turn import FastLane, Turn, Visit, lines_of
from tests.fed import Fed
from tests.fuzz import cut

__all__ = ["check"]

_TURNS = 8  # of the loop in which nothing is written: then nothing will be
_SETTINGS = GuardSettings(head_bytes_max=512)
_ANSWER = re.compile(
    rb"HTTP/1\.1 (?P<status>\d{3}) [^\r\n]+\r\n(?P<lines>(?:[a-z-]+: [^\r\n]*\r\n)*)\r\n"
)
_CHANCE = re.compile(rb"req_[0-9a-f]{24}")  # differs each time
_HIDDEN = b"upgrade"  # from the parser, and so from the application

Headers = list[tuple[bytes, bytes]]


@dataclass(slots=True)
class _Request:
    """One request as the application has it."""

    method: bytes
    target: bytes
    headers: Headers
    body: bytes = b""
    whole: bool = False

    @property
    def early(self) -> bool:
        """It is answered before its body has come."""
        return b"early" in self.target

    def same_as(self, other: _Request) -> bool:
        """Whether another parser has read the same."""
        return (
            self.method == other.method
            and self.target.partition(b"?")[::2] == other.target.partition(b"?")[::2]
            and lowered(self.headers)
            == [line for line in lowered(other.headers) if line[0] != _HIDDEN]
            and (self.body == other.body if self.whole else other.body.startswith(self.body))
        )


def lowered(headers: Headers) -> Headers:
    """The headers as h11 has them: one value in lower case, none with spaces after it."""
    return [(name.lower(), value.lower().rstrip(b" \t")) for name, value in headers]


@dataclass(slots=True)
class _Book:
    """The application by ASGI, and all requests in their order."""

    requests: list[_Request] = field(default_factory=list[_Request])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        query = scope["query_string"]
        target = scope["raw_path"] + (b"?" + query if query else b"")
        number = self.begin(scope["method"].encode(), target, scope["headers"])
        request = self.requests[number - 1]
        while not (request.whole or request.early):
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            request.body += message["body"]
            request.whole = not message["more_body"]
        body, headers = said(number, request)
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def begin(self, method: bytes, target: bytes, headers: Headers) -> int:
        """The number of a request that begins."""
        self.requests.append(_Request(method, target, [(name, value) for name, value in headers]))
        return len(self.requests)


def said(number: int, request: _Request) -> tuple[bytes, Headers]:
    """The answer to a request."""
    body = b"%d" % (0 if request.early else len(request.body))
    return body, [(b"x-number", b"%d" % number), (b"content-length", b"%d" % len(body))]


class _Lane:
    """The same application's fast lane."""

    targets = frozenset({b"/lane", b"/lane-early"})
    body_bytes_max = 300

    def __init__(self, book: _Book) -> None:
        self.book = book

    def meet(self, turn: Turn) -> Visit:
        """A request begins."""
        visit = _Visit(self.book, turn)
        if visit.request.early:
            visit.answer()
        return visit


class _Visit:
    """One request on it."""

    def __init__(self, book: _Book, turn: Turn) -> None:
        self.book, self.turn = book, turn
        self.number = book.begin(b"POST", turn.target, [])
        self.request = book.requests[-1]

    def grew(self) -> None:
        self.request.body = bytes(self.turn.body)

    def ask(self) -> bool:
        assert not self.turn.over
        self.request.whole = True
        if self.request.body.startswith(b"decline"):
            del self.book.requests[-1]
            return False
        if self.request.body.startswith(b"later"):
            asyncio.get_running_loop().call_soon(self.unless_over, self.answer)
        else:
            self.answer()
        return True

    def unless_over(self, step: Callable[[], None]) -> None:
        if not self.turn.over:
            step()

    def answer(self) -> None:
        body, headers = said(self.number, self.request)
        self.turn.reply(200, lines_of(headers), body)

    def left(self) -> None:
        assert self.turn.over

    def pause(self) -> None:
        raise AssertionError("nobody is slow here")

    resume = stop = pause


def check(data: bytes) -> None:
    """Both ways give the same bytes; each request is answered or refused once, in order, and none
    that another parser would not read as it was read here.
    """
    stream, parts = cut(data)
    asyncio.run(_check(stream, parts))


async def _check(stream: bytes, parts: list[bytes]) -> None:
    fast, plain = _Book(), _Book()
    written = await _written(fast, _Lane(fast), parts)
    assert written == await _written(plain, None, parts)
    answers, refused = _read(written, plain.requests)
    for number, request in enumerate(plain.requests, start=1):
        told = number <= answers or (refused and number == answers + 1)
        assert told or not (request.whole or request.early), request
    others = _other_reading(stream, len(plain.requests))
    assert not refused or not answers or others[answers - 1].whole  # else it is answered twice
    for request, other, lanes in zip(plain.requests, others, fast.requests, strict=True):
        assert request.same_as(other), (request, other)
        assert (lanes.method, lanes.target) == (request.method, request.target)
        assert (lanes.body, lanes.whole) == (request.body, request.whole) or request.early


async def _written(book: _Book, lane: FastLane | None, parts: list[bytes]) -> bytes:
    """What comes back, but for chance."""
    fed = Fed(guarded(_SETTINGS, lane), book)
    for part in parts:
        fed.feed(part)
        await _idle(fed)
    fed.leave()
    await _idle(fed)
    return _CHANCE.sub(b"req_", bytes(fed.transport.written))


async def _idle(fed: Fed) -> None:
    """Let the loop go on until nothing more comes of it."""
    turns = size = 0
    while turns < _TURNS:
        await asyncio.sleep(0)
        turns = turns + 1 if size == len(fed.transport.written) else 0
        size = len(fed.transport.written)


def _read(written: bytes, requests: list[_Request]) -> tuple[int, bool]:
    """How many requests are answered, in their order, and whether a refusal ends it."""
    answers = 0
    while written:
        head = _ANSWER.match(written)
        assert head is not None, written
        written = written[head.end() :]
        if head["status"] == b"100":
            continue
        lines = dict(line.split(b": ", 1) for line in head["lines"].splitlines())
        size = int(lines[b"content-length"])
        if b"x-number" not in lines:
            assert 400 <= int(head["status"]) < 500
            assert lines[b"connection"] == b"close"
            assert len(written) == size
            return answers, True
        answers += 1
        assert (head["status"], lines[b"x-number"]) == (b"200", b"%d" % answers)
        size = 0 if requests[answers - 1].method == b"HEAD" else size
        assert len(written) >= size
        written = written[size:]
    return answers, False


def _other_reading(stream: bytes, count: int) -> list[_Request]:
    """The first so many requests as h11 reads them."""
    found: list[_Request] = []
    while len(found) < count:
        while stream.startswith(b"\r\n"):
            stream = stream[2:]
        connection = h11.Connection(h11.SERVER)
        connection.receive_data(stream)
        head = connection.next_event()
        assert isinstance(head, h11.Request), head
        request = _Request(head.method, head.target, list(head.headers))
        found.append(request)
        with suppress(h11.RemoteProtocolError):
            while isinstance(event := connection.next_event(), h11.Data):
                request.body += bytes(event.data)
            request.whole = isinstance(event, h11.EndOfMessage)
        stream = connection.trailing_data[0] if request.whole else b""
    return found
